"""The report of pre-training, in Markdown, and the errors on the training examples."""

import torch

from hicode.speech.speech_model import SpeechModels, Subject
from hicode.training.adaptation import SpeechExample
from hicode.training.faceformer import amplitude, mouth_metrics, predict_displacement
from research.pretrain.build import Built
from research.pretrain.voice_activity import CONDITIONS

ERROR_FRAMES = 1000  # of each speaker, for the errors


@torch.no_grad()
def errors(models: SpeechModels, examples: list[SpeechExample]) -> list[dict]:
    """Error of the mouth by speaker, free-running, with the speaker's template and amplitude.

    Root mean squares in mm of expression and landmarks, and those of a still mouth. These are the training examples:
    the figures say whether the models learned, not how well they do on other people.
    """
    speakers = dict.fromkeys(e.speaker for e in examples)
    return [_speaker_errors(models, [e for e in examples if e.speaker == s], s) for s in speakers]


def _speaker_errors(models: SpeechModels, examples: list[SpeechExample], speaker: str) -> dict:
    template = Subject.of(
        torch.cat([e.expression for e in examples]),
        torch.cat([e.landmarks for e in examples]),
        torch.cat([e.speaking for e in examples]),
    )
    shown, frames = [], 0
    for e in examples:
        if frames < ERROR_FRAMES:
            shown.append(e[: ERROR_FRAMES - frames])
            frames += len(shown[-1])
    row: dict = {"speaker": speaker}
    parts = (("expression", models.expression), ("landmarks", models.landmarks))
    for (part, model), metric in zip(parts, mouth_metrics(), strict=True):
        identity = template.identity_frames if part == "landmarks" else None
        target = torch.cat([(getattr(e, part) - getattr(template, part)).flatten(1) for e in shown])
        predicted = torch.cat([predict_displacement(model, e.features[0], identity) for e in shown])
        # One number per speaker is fitted here: the amplitude of their motion.
        a, b = metric(predicted), metric(target)
        gain = float((a * b).sum() / a.square().sum().clamp(min=1e-12))
        row[part] = round(100 * amplitude(gain * predicted - target, metric), 3)
        row[f"{part}_still"] = round(100 * amplitude(target, metric), 3)
    return row


def markdown(report: dict, built: Built) -> str:
    """The report as a page."""
    made = report["provenance"]
    hashes = ", ".join(f"`{name}` {digest}" for name, digest in report["sha256"].items())
    lines = ["# Generic speech weights", ""]
    lines += [
        f"{hashes}. Seed {made['seed']}, {report['seconds']:.0f} s in all ({made['machine']}), hicode "
        f"{made['version']} "
        f"{made['commit'] or ''}, {made['made']}.",
        "",
        *([report["note"], ""] if report["note"] else []),
    ]
    rows = [(r["speaker"], f"{r['seconds']:.1f}", r["terms"]) for r in report["learned_from"]]
    lines += ["## Learned from", "", *_table(("speaker", "seconds", "terms"), rows), ""]
    lines += [
        "## Sound against picture",
        "",
        f"Frames by which the mouth is later than the sound. {_judge(report['anchor'])}",
        "",
    ]
    lines += [*_offsets(built), "", "## Left out", ""]
    lines += [*([f"- {item}" for item in built.left_out] or ["Nothing."]), ""]
    lines += [
        "## Errors on the training examples",
        "",
        "Root mean square of the mouth in mm, free-running, with the speaker's own template and amplitude; in brackets "
        "that of a still mouth. For other people see `python -m research.benchmarks.lips`.",
        "",
    ]
    with_still = lambda row, part: f"{row[part]:.2f} ({row[part + '_still']:.2f})"
    rows = [(r["speaker"], with_still(r, "expression"), with_still(r, "landmarks")) for r in report["errors_mm"]]
    lines += _table(("speaker", "expression", "landmarks"), rows)
    if report["voice_activity"]:
        lines += _voice_activity(report["voice_activity"])
    rows = [(n, f"{s['seconds']:.0f}", f"{s['made']}", f"{s['kept']}") for n, s in report["steps"].items()]
    lines += ["", "## Time", "", *_table(("step", "seconds", "made", "kept"), rows)]
    return "\n".join(lines) + "\n"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]


def _judge(anchor: str | None) -> str:
    if anchor is None:
        return "By the sync model."
    return f"{anchor} is in sync by definition. Each speaker is judged by a model of the others."


def _offsets(built: Built) -> list[str]:
    rows = []
    for speaker in dict.fromkeys(t.speaker for t in built.taken):
        clips = [t for t in built.taken if t.speaker == speaker]
        note = "" if any(t.learned_frames for t in clips) else " (not learned from)"
        offset, margin = _span([t.offset_frames for t in clips]), _span([t.margin for t in clips])
        rows.append((f"{speaker}{note}", f"{len(clips)}", f"{sum(t.frames for t in clips)}", offset, margin))
    return _table(("speaker", "clips", "frames", "offset", "margin"), rows)


def _voice_activity(figures: dict) -> list[str]:
    percent = lambda share: "–" if share is None else f"{100 * share:.1f}"
    rows = [
        (r["speaker"], f"{r['speech_s']:.0f}", *(percent(r["missed"][c]) for c in CONDITIONS), percent(r["taken"]))
        for r in figures["speakers"]
    ]
    others = ", ".join(f"{kind} {percent(share)}" for kind, share in figures["other_sounds"].items())
    return [
        "",
        "## Voice activity",
        "",
        f"Rows of 20 ms, in %, from {figures['speech_s']:.0f} s of speech. Each speaker is tested by a score that was "
        "learned from others. Missed: speech taken for none. Taken: pauses taken for speech.",
        "",
        *_table(("speaker", "speech, s", *(f"missed, {c}" for c in CONDITIONS), "taken"), rows),
        "",
        f"Other sounds taken for speech: {others}.",
    ]


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.2f}" if high - low < 0.005 else f"{low:.2f} … {high:.2f}"
