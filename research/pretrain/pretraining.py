"""Generic speech weights from folders of talking faces, in one command: corpus, synthetic speakers, both Faceformers, a report.

Stopped and started again, it does what is missing; the same folders, options and seed give the same weights. Beside the weights OUT.safetensors
lie OUT.md and OUT.json: who was learned from on which terms, how each clip's sound was moved, what was left out and why, how well the result says
its own examples, how long each step took, and the hashes of what came out.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from hicode.errors import InputError
from hicode.files import check_writable, sha256_of, write_json
from hicode.progress import progress_bar
from hicode.provenance import plain, provenance
from hicode.runtime import tune_allocator
from hicode.speech.encoder import AudioEncoder, create_encoder
from hicode.speech.faceformer import SpeechModels
from hicode.speech.sync import SyncModel
from hicode.training.adaptation import (
    PretrainConfig,
    SpeechExample,
    Template,
    amplitude,
    mouth_metrics,
    predict_displacement,
    pretrain,
    save_generic,
)  # fmt: skip
from research.pretrain import espeak, synthetic
from research.pretrain.corpus import BuildConfig, Built, Step, Tracker, build, learnable, load_synthetic, synthesise
from research.pretrain.presence import CONDITIONS, PresenceConfig, Recording, learn_presence
from research.pretrain.sources import find_sources

SCHEMA, VERSION = "hicode-pretraining", 1
SYNTHETIC_TERMS = "synthesised by espeak-ng for this purpose"
_SHOWN_FRAMES = 1000  # of a speaker, that the report says the fit of


@dataclass(frozen=True)
class PretrainingConfig:
    """What is learned, and for how long."""

    sentences: int = 300  # clips of a speaker at most
    synthetic_minutes: float = 15.0  # of synthesised speech; 0: none
    synthetic_speakers: int = 40
    steps: int = PretrainConfig().steps  # of each Faceformer
    seed: int = 0

    def __post_init__(self):
        for name, least in (
            ("sentences", 1),
            ("synthetic_minutes", 0),
            ("synthetic_speakers", 1),
            ("steps", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least:
                raise InputError(f"{name.replace('_', ' ')} is {value}. Give at least {least}.")


def pretrain_folders(
    folders: Sequence[Path | str],
    out: Path | str,
    cache: Path | str,
    config: PretrainingConfig = PretrainingConfig(),
    *,
    manifest: Path | str | None = None,
    sync_out: Path | str | None = None,
    presence_out: Path | str | None = None,
    corpus: BuildConfig = BuildConfig(),
    encoder: AudioEncoder | None = None,
    sync: SyncModel | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> dict:
    """Learn weights from the folders and write them to `out`; the report, which also lies beside it as JSON and Markdown.

    `manifest` as `find_sources` has it. `sync_out`: also write the sync model, which needs a manifest with an anchor. `presence_out`: also learn and
    write the score of speech, from all but the anchor, who measures it. `corpus`, `encoder`, `sync` and `tracker` as `build` has them. InputError where there are fewer than two usable speakers, or an option does not make sense.
    """
    tune_allocator()
    out, cache, started = Path(out), Path(cache), time.perf_counter()
    if out.suffix != ".safetensors":
        raise InputError(f"{out} does not end in .safetensors, as weights do. Choose such a name with -o.")
    sources = find_sources(folders, manifest)
    if sync_out is not None and sources.anchor is None:
        raise InputError(
            "A sync model is learned only from a manifest that names an anchor. Name one there, or leave --sync-out out."
        )
    for file in filter(None, (out, sync_out, presence_out, cache / "corpus.json")):
        check_writable(file)
    encoder = encoder or create_encoder()
    corpus = replace(corpus, clips=config.sentences)
    built = build(sources, cache, corpus, encoder=encoder, sync=sync, tracker=tracker, progress=progress)
    steps = dict(built.steps)
    examples = learnable(cache)
    terms = {t.speaker: t.terms for t in built.taken}
    imagined, note = [], None
    if config.synthetic_minutes and not espeak.installed():
        note = f"No synthetic speakers: the package {espeak.PACKAGE} is not installed (pip install 'hicode[corpus]')."
        print(note)
    elif config.synthetic_minutes:
        wanted = synthetic.CorpusConfig(
            minutes=config.synthetic_minutes, speakers=config.synthetic_speakers, seed=config.seed
        )
        steps["synthesise"] = synthesise(cache, wanted, encoder=encoder, variants=corpus.variants, progress=progress)
        imagined = [item.example for item in load_synthetic(cache)]

    presence = None
    if presence_out is not None:
        began, paths = time.perf_counter(), {s.speaker: s.clips for s in sources.speakers}
        heard = [t for t in built.taken if t.learned_frames and t.speaker != sources.anchor]
        recordings = [Recording(t.speaker, t.terms, paths[t.speaker][t.clip], t.learned_frames) for t in heard]
        wanted = PresenceConfig(seed=config.seed)
        steps["presence"], presence = learn_presence(recordings, cache, encoder, wanted, bool(imagined), progress)
        steps["presence"].seconds = round(time.perf_counter() - began, 1)
        Path(presence_out).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache / "presence.safetensors", presence_out)

    learning = time.perf_counter()
    training = replace(PretrainConfig(), steps=config.steps, seed=config.seed)
    with progress_bar("Learning", progress) as show:
        models = pretrain(
            examples + imagined,
            encoder.name,
            training,
            progress=lambda done: show(round(100 * done), 100),
            window=encoder.window,
        )
    learned = [
        {"speaker": s, "seconds": _seconds(examples, s), "terms": terms[s]}
        for s in dict.fromkeys(e.speaker for e in examples)
    ]
    if imagined:
        learned.append(
            {
                "speaker": f"synthetic ({len({e.speaker for e in imagined})})",
                "seconds": _seconds(imagined),
                "terms": SYNTHETIC_TERMS,
            }
        )
    save_generic(models, learned, out)
    steps["learn"] = Step(round(time.perf_counter() - learning, 1), 2, 0)
    if sync_out is not None:
        Path(sync_out).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache / "sync.safetensors", sync_out)

    report = {
        "schema": SCHEMA,
        "version": VERSION,
        "learned_from": learned,
        "clips": [asdict(t) for t in built.taken],
        "left_out": [asdict(left) for left in built.left_out],
        "anchor": sources.anchor,
        "note": note,
        "errors_mm": errors(models, examples),
        "presence": presence,
        "steps": {name: asdict(step) for name, step in steps.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "sha256": {f.name: sha256_of(f) for f in map(Path, filter(None, (out, sync_out, presence_out)))},
        "provenance": provenance(
            {
                "pretraining": config,
                "training": training,
                "corpus": corpus,
                "encoder": encoder.name,
                "window": list(encoder.window),
            },
            config.seed,
            ("face_landmarks", "face_detection", "head_model", "speech_encoder"),
        ),
    }
    write_json(out.with_suffix(".json"), plain(report))
    out.with_suffix(".md").write_text(markdown(report, built), encoding="utf-8")
    return report


@torch.no_grad()
def errors(models: SpeechModels, examples: list[SpeechExample]) -> list[dict]:
    """How far the mouth is from the truth by speaker, free-running, at their own template and amplitude: root mean squares in mm of expression and
    landmarks, and a still mouth's. These are the examples it learned from: they say whether it learned, not how well it does on others."""
    out = []
    for speaker in dict.fromkeys(e.speaker for e in examples):
        own = [e for e in examples if e.speaker == speaker]
        template = Template.of(
            *(torch.cat([getattr(e, k) for e in own]) for k in ("expression", "landmarks", "speaking"))
        )
        row, frames, shown = {"speaker": speaker}, 0, []
        for e in own:
            if frames < _SHOWN_FRAMES:
                shown.append(e[: _SHOWN_FRAMES - frames])
                frames += len(shown[-1])
        for part, model, metric in zip(
            ("expression", "landmarks"), (models.expression, models.landmarks), mouth_metrics()
        ):
            faces = template.identity_frames if part == "landmarks" else None
            target = torch.cat([(getattr(e, part) - getattr(template, part)).flatten(1) for e in shown])
            predicted = torch.cat([predict_displacement(model, e.features[0], faces) for e in shown])
            # One number a speaker, fitted here: how much they move.
            a, b = metric(predicted), metric(target)
            gain = float((a * b).sum() / a.square().sum().clamp(min=1e-12))
            row[part] = round(100 * amplitude(gain * predicted - target, metric), 3)
            row[f"{part}_still"] = round(100 * amplitude(target, metric), 3)
        out.append(row)
    return out


def markdown(report: dict, built: Built) -> str:
    """The report to read."""
    made = report["provenance"]
    lines = [
        "# Generic speech weights",
        "",
        f"{', '.join(f'`{name}` {digest}' for name, digest in report['sha256'].items())}. Seed {made['seed']}, {report['seconds']:.0f} s in all "
        f"({made['machine']}), hicode {made['version']} {made['commit'] or ''}, {made['made']}.",
        "",
        *([report["note"], ""] if report["note"] else []),
        "## Learned from",
        "",
        "| speaker | seconds | terms |",
        "|---|---|---|",
        *(f"| {row['speaker']} | {row['seconds']:.1f} | {row['terms']} |" for row in report["learned_from"]),
        "",
        "## Sound against picture",
        "",
        f"Frames that the mouth was later than the sound, before it was moved. {_anchored(report['anchor'])}",
        "",
        "| speaker | clips | frames | offset | margin |",
        "|---|---|---|---|---|",
    ]
    for speaker in dict.fromkeys(t.speaker for t in built.taken):
        own = [t for t in built.taken if t.speaker == speaker]
        offset, margin = (_span([getattr(t, k) for t in own]) for k in ("offset_frames", "margin"))
        only = "" if any(t.learned_frames for t in own) else " (not learned from)"
        lines.append(f"| {speaker}{only} | {len(own)} | {sum(t.frames for t in own)} | {offset} | {margin} |")
    lines += ["", "## Left out", "", *([f"- {left}" for left in built.left_out] or ["Nothing."])]
    lines += [
        "",
        "## On its own examples",
        "",
        "Root mean square of the mouth in mm, free-running, with the speaker's own template and amplitude; in brackets a still mouth's. Whether it "
        "learned, not how well it does on others: for that see `python -m research.benchmarks.lips`.",
        "",
        "| speaker | expression | landmarks |",
        "|---|---|---|",
    ]
    for row in report["errors_mm"]:
        cells = [f"{row[k]:.2f} ({row[k + '_still']:.2f})" for k in ("expression", "landmarks")]
        lines.append(f"| {row['speaker']} | {' | '.join(cells)} |")
    if report["presence"]:
        lines += _presence(report["presence"])
    lines += ["", "## Time", "", "| step | seconds | made | kept from before |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {step['seconds']:.0f} | {step['made']} | {step['kept']} |"
        for name, step in report["steps"].items()
    ]
    return "\n".join(lines) + "\n"


def _presence(figures: dict) -> list[str]:
    percent = lambda share: "-" if share is None else f"{100 * share:.1f}"
    return [
        "",
        "## Whether somebody speaks",
        "",
        f"Of single rows of 20 ms, in %, from {figures['speech_s']:.0f} s of speech; each speaker by a score that has learned from others. Missed: speech that is "
        "taken for none. Taken: what is taken for speech between their words, as far as a quiet recording lets that be told.",
        "",
        f"| speaker | speech, s | {' | '.join(f'missed, {c}' for c in CONDITIONS)} | taken |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['speaker']} | {row['speech_s']:.0f} | {' | '.join(percent(row['missed'][c]) for c in CONDITIONS)} | {percent(row['taken'])} |"
            for row in figures["speakers"]
        ),
        "",
        f"Other sounds taken for speech: {', '.join(f'{kind} {percent(share)}' for kind, share in figures['other_sounds'].items())}.",
    ]


def _anchored(anchor: str | None) -> str:
    return (
        "By the sync model."
        if anchor is None
        else f"{anchor} is in sync by definition; each speaker's comes from a model of the others."
    )


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} … {high:.2f}"


def _seconds(examples: list[SpeechExample], speaker: str | None = None) -> float:
    return round(sum(len(e) for e in examples if speaker in (None, e.speaker)) / 25, 1)
