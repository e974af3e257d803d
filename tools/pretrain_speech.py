"""Make the weights that the package ships for speech: generic Faceformers and the sync model, from a folder of talking faces.

    python tools/pretrain_speech.py track  --data ../shared/data --cache corpus     landmarks of every clip (about real time)
    python tools/pretrain_speech.py build  --data ../shared/data --cache corpus     head fits, offsets, features
    python tools/pretrain_speech.py report --cache corpus --leave-out markey khill  held-out figures, speaker by speaker
    python tools/pretrain_speech.py train  --cache corpus                           src/hicode/weights/{speech,sync}.safetensors

What may be learned from is in SOURCES. The last 1/11 of every clip that is also used for evaluation is never read by `train`; the sync model,
which is used as a score, is learned without the evaluation clips' speakers altogether.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from hicode.clip import shift_audio, split
from hicode.errors import HicodeError
from hicode.files import load_tensors, save_tensors
from hicode.media.audio import read_audio
from hicode.motion import LEFT_EYE_OUTER, LIPS, RIGHT_EYE_OUTER
from hicode.runtime import tune_allocator
from hicode.speech.encoder import create_encoder, match_frames, speech_level
from hicode.speech.sync import SyncModel, estimate_offset, fit_sync, mouth_measures, shuffled_control
from hicode.training.speech import (
    PretrainConfig,
    SpeechExample,
    Template,
    adapt_example,
    pretrain,
    save_generic,
    speaking_frames,
)  # fmt: skip

HDTF = "HDTF, CC BY 4.0; a public official's address"
OFFICIAL = "a public official's address"
ENCODER = "embedded"


@dataclass(frozen=True)
class Source:
    """One speaker's clips: `pattern` under the data folder. evaluated: speaks in an evaluation clip, so is kept out of the sync model. learn:
    whether its terms let weights be learned from it."""

    speaker: str
    pattern: str
    terms: str
    evaluated: bool = False
    learn: bool = True

    def used(self, frames: int) -> int:
        """How many of a clip's frames may be learned from: of the folders that evaluation draws on, the training part."""
        return len(split(frames)[0]) if self.pattern.startswith(("hdtf/", "long/")) else frames


SOURCES = (
    Source("radio2", "hdtf/RD_Radio2_000.mp4", HDTF, evaluated=True),
    Source("markey", "hdtf/WDA_EdMarkey0_000.mp4", HDTF, evaluated=True),
    Source("khill", "hdtf/WDA_KatieHill_000.mp4", HDTF, evaluated=True),
    Source("german", "long/german_20s.mp4", "broadcast footage: tests only", evaluated=True, learn=False),
    Source("trump", "long/trump_10s.mp4", OFFICIAL),
    Source("klobuchar", "speakers/klobuchar_10s.mp4", OFFICIAL),
    Source("mcguinness", "speakers/mcguinness_5s.mp4", OFFICIAL),
    Source("noem", "speakers/noem_18s.mp4", OFFICIAL),
    Source("radio10", "speakers/radio10_2s.mp4", OFFICIAL),
    Source("reagan", "speakers/reagan_26s.mp4", OFFICIAL),
    Source("swalwell", "speakers/swalwell_5s.mp4", OFFICIAL),
    Source("grid-s1", "grid-s1/*.mkv", "GRID corpus (Cooke et al. 2006), published as CC BY 4.0"),
)
# GRID was recorded in a studio and its picture is in sync: on 51 stops (bin, blue, by, place, please) lips part a median .3 frames after
# the burst. The other clips' offsets are measured against it.
ANCHOR = "grid-s1"
# Sound as it is, and as it might have been: (level, rows of delay, noise relative to the level).
VARIANTS = ((1.0, 0, 0.0), (1.4, 1, 0.0), (0.7, 2, 0.003), (1.0, 3, 0.02))


@dataclass(frozen=True)
class Options:
    """command: what to do. data: the folder that SOURCES' patterns are under. cache: where intermediate results lie. leave_out: speakers to
    report on. grid: how many GRID sentences. steps, width, look_ahead: of the training."""

    command: Annotated[Literal["track", "build", "report", "train"], tyro.conf.Positional]
    cache: Path
    data: Path = Path("../shared/data")
    leave_out: tuple[str, ...] = ("markey", "khill")
    grid: int = 100
    steps: int = 300
    width: int = 64
    look_ahead: int = 4
    components: int = 32


def clips(options: Options, source: Source) -> list[Path]:
    found = sorted(options.data.glob(source.pattern))
    if source.speaker == "grid-s1":
        found = [found[i] for i in np.random.default_rng(0).permutation(len(found))[: options.grid]]
    return found


def track(options: Options) -> None:
    """Landmarks at 25 fps. Faster clips are tracked at their own rate and interpolated, so motion stays even."""
    from hicode.face.landmarks import FaceLandmarker, TrackConfig, track_faces
    from hicode.media.video import probe, read_video

    landmarker = FaceLandmarker()
    for path in (p for source in SOURCES for p in clips(options, source)):
        out = options.cache / "points" / f"{path.stem}.safetensors"
        if out.exists():
            continue
        info = probe(path)
        fps = min(info.fps, 30.0) if info.fps > 25.5 else 25.0
        try:
            found = track_faces(read_video(path, fps=fps, max_size=512), landmarker, config=TrackConfig(crops=2))
        except HicodeError as error:
            print(f"{path.name}: left out, {error}")
            continue
        scale = min(1.0, 512 / max(info.width, info.height))
        at = np.arange(int(len(found) * 25 / fps)) * fps / 25
        points = np.stack([np.interp(at, np.arange(len(found)), c) for c in found.points_px.flatten(1).T.numpy()], 1)
        seen = found.found[np.clip(np.round(at).astype(int), 0, len(found) - 1)]
        tensors = {"points": torch.from_numpy(points).float().unflatten(1, (-1, 3)), "found": torch.as_tensor(seen)}
        save_tensors(out, tensors, "corpus-points", 1, {"width": round(info.width * scale), "height": round(info.height * scale)})
        print(path.name, len(points), flush=True)


def build(options: Options) -> None:
    """Head fits (a speaker's clips as one), offsets, features."""
    from hicode.face.fit import fit_track
    from hicode.face.model import HeadModel

    head = HeadModel.load()
    encoder = create_encoder(ENCODER)
    sounds, motions, lengths = {}, {}, {}
    for source in SOURCES:
        paths = [p for p in clips(options, source) if (options.cache / "points" / f"{p.stem}.safetensors").exists()]
        loaded = [load_tensors(options.cache / "points" / f"{p.stem}.safetensors", "corpus-points", 1) for p in paths]
        loaded = [(p, *l) for p, l in zip(paths, loaded) if l[0]["found"].float().mean() > 0.95]
        lengths[source.speaker] = [len(l[1]["points"]) for l in loaded]
        sounds[source.speaker] = [(l[0].stem, read_audio(l[0])) for l in loaded]
        stored = options.cache / "motion" / f"{source.speaker}.safetensors"
        if not stored.exists():
            points, found = (torch.cat([l[1][k] for l in loaded]) for k in ("points", "found"))
            train = range(source.used(len(points)))
            fitted = fit_track(points, found, loaded[0][2]["width"], loaded[0][2]["height"], head, train)
            save_tensors(stored, fitted.motion.tensors(), "corpus-motion", 1)
        motions[source.speaker] = load_tensors(stored, "corpus-motion", 1)[0]
        print(source.speaker, len(motions[source.speaker]["landmarks"]), flush=True)

    learners = [s for s in SOURCES if s.learn]
    pairs = []
    for source in learners:
        landmarks, features, at = [], [], 0
        for (_, samples), n in zip(sounds[source.speaker], lengths[source.speaker]):
            keep = source.used(n)
            features.append(match_frames(encoder.encode(samples), n)[: 2 * keep])
            landmarks.append(motions[source.speaker]["landmarks"][at : at + keep])
            at += n
        pairs.append((torch.cat(features), torch.cat(landmarks)))
    anchor = [s.speaker for s in learners].index(ANCHOR)
    # Each speaker's offset comes from a model of the others.
    _, found = fit_sync(pairs, ENCODER, (), anchor=anchor)
    offsets = dict(zip((s.speaker for s in learners), found)) | {ANCHOR: 0.0}
    judges = [k for k, s in enumerate(learners) if not s.evaluated]
    names = tuple(learners[k].speaker for k in judges)
    judge, _ = fit_sync([pairs[k] for k in judges], ENCODER, names, anchor=judges.index(anchor))
    judge.save(options.cache / "sync.safetensors")
    for source in SOURCES:
        if not source.learn:
            (_, samples), n = sounds[source.speaker][0], lengths[source.speaker][0]
            features = match_frames(encoder.encode(samples), n)[: 2 * source.used(n)]
            offsets[source.speaker] = estimate_offset(features, motions[source.speaker]["landmarks"], judge).offset_frames
    print("offsets", {k: round(v, 2) for k, v in offsets.items()}, flush=True)
    for source, (features, landmarks) in zip(learners, pairs):
        result, chance = estimate_offset(features, landmarks, judge), shuffled_control(features, landmarks, judge)
        print(f"   by the sync model: {source.speaker}{'' if source.evaluated else ' (its own training)'} {result}, control {chance}", flush=True)

    rng = np.random.default_rng(0)
    for source in SOURCES:
        at = 0
        for (name, samples), n in zip(sounds[source.speaker], lengths[source.speaker]):
            samples = shift_audio(samples, offsets[source.speaker], n)
            level = speech_level(samples)
            variants = []
            for gain, delay, noise in VARIANTS:
                noisy = samples + (noise * level * rng.standard_normal(len(samples))).astype(np.float32)
                delayed = np.concatenate([np.zeros(delay * 320, np.float32), noisy])
                variants.append(match_frames(encoder.encode(delayed, level / gain)[delay:], n))
            tensors = {
                "features": torch.stack(variants).half(),
                "expression": motions[source.speaker]["expression"][at : at + n],
                "landmarks": motions[source.speaker]["landmarks"][at : at + n],
                "speaking": speaking_frames(samples, n),
            }
            config = {"speaker": source.speaker, "offset_frames": offsets[source.speaker]}
            save_tensors(options.cache / "examples" / f"{source.speaker}~{name}.safetensors", tensors, "corpus-example", 1, config)
            at += n


def examples(options: Options) -> dict[str, list[SpeechExample]]:
    out: dict[str, list[SpeechExample]] = {}
    for path in sorted((options.cache / "examples").glob("*.safetensors")):
        tensors, config = load_tensors(path, "corpus-example", 1)
        tensors["features"] = tensors["features"].float()
        out.setdefault(config["speaker"], []).append(SpeechExample(config["speaker"], **tensors))
    return out


def learnable(corpus: dict[str, list[SpeechExample]], without: str | None = None) -> list[SpeechExample]:
    """What may be learned from: training parts only of clips that are evaluated."""
    out = []
    for source in SOURCES:
        if source.learn and source.speaker != without:
            for e in corpus.get(source.speaker, []):
                out.append(e[: source.used(len(e))])
    return out


def configs(options: Options) -> dict:
    from hicode.speech.faceformer import FaceformerConfig

    shape = FaceformerConfig(width=options.width, look_ahead=options.look_ahead, components=options.components)
    return {"config": PretrainConfig(steps=options.steps), "shape": shape}


def figures(expression, landmarks, truth: SpeechExample, template: Template, head) -> dict[str, float]:
    """Correlations of mouth measures, from landmarks and from expression; lip error in % of the eye distance, and a still mouth's."""
    measured = mouth_measures(truth.landmarks)
    rest = head.landmarks(head.mean)
    shaped = rest + torch.einsum("te,elc->tlc", expression, head.landmarks(head.expression_basis))
    out = {}
    for prefix, predicted in (("", mouth_measures(landmarks)), ("x.", mouth_measures(shaped))):
        for k, name in enumerate(("opening", "width", "lips", "jaw")):
            a, b = predicted[:, k] - predicted[:, k].mean(), measured[:, k] - measured[:, k].mean()
            out[prefix + name] = float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-9))
    eyes = float((truth.landmarks[:, LEFT_EYE_OUTER] - truth.landmarks[:, RIGHT_EYE_OUTER]).norm(dim=1).mean())

    def error(x) -> float:
        return 100 / eyes * float((x[:, LIPS] - truth.landmarks[:, LIPS]).norm(dim=-1).mean())

    return out | {"error": error(landmarks), "still": error(template.landmarks.expand_as(truth.landmarks))}


def report(options: Options) -> None:
    """Each left-out speaker: zero-shot on the test part of the clip, and adapted on its training part."""
    from hicode.face.model import HeadModel

    head, corpus = HeadModel.load(), examples(options)
    for speaker in options.leave_out:
        generic = pretrain(learnable(corpus, without=speaker), ENCODER, **configs(options))
        for part, cut in (("test part", True), ("whole clip, zero-shot", False)):
            rows = []
            for example in corpus[speaker][:8]:
                train, test = split(len(example))
                template = Template.of(*(getattr(example[: len(train)], k) for k in ("expression", "landmarks", "speaking")))
                own = (template.expression, template.landmarks, template.identity_frames)
                zero = type(generic)(generic.expression, generic.landmarks, ENCODER, *own)
                shown = slice(test.start, test.stop) if cut else slice(0, len(example))
                row = {"zero-shot": zero}
                if cut:
                    row["adapted"], story = adapt_example(replace(example[: len(train)]), generic=generic)
                    print(f"   {speaker}", *story.lines(), sep="\n      ")
                for name, models in row.items():
                    expression, landmarks = models.predict(example.features[0])
                    rows.append((name, figures(expression[shown], landmarks[shown], example[shown], template, head)))
                rows.append(("truth", figures(example.expression[shown], example.landmarks[shown], example[shown], template, head)))
            for name in dict(rows):
                mean = {k: np.mean([r[k] for n, r in rows if n == name]) for k in rows[0][1]}
                print(f"{speaker:10s} {part:22s} {name:10s}", *(f"{k} {v:.2f}" for k, v in mean.items()), flush=True)


def train(options: Options) -> None:
    corpus = examples(options)
    chosen = learnable(corpus)
    models = pretrain(chosen, ENCODER, progress=lambda x: print(f"\r{100 * x:.0f} %", end="", flush=True), **configs(options))
    learned = [
        {"speaker": s.speaker, "seconds": round(sum(len(e) for e in chosen if e.speaker == s.speaker) / 25, 1), "terms": s.terms}
        for s in SOURCES
        if s.learn and s.speaker in corpus
    ]
    save_generic(models, learned)
    SyncModel.load(options.cache / "sync.safetensors").save()
    print("\n", learned)


if __name__ == "__main__":
    chosen_options = tyro.cli(Options, description=__doc__)
    tune_allocator()
    torch.set_num_threads(1)
    {"track": track, "build": build, "report": report, "train": train}[chosen_options.command](chosen_options)
