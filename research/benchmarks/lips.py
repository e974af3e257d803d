"""How well speech moves lips, on people that weights did not learn from.

    python -m research.benchmarks.lips --cache UNSEEN --data VIDEOS                        the weights that ship
    python -m research.benchmarks.lips --cache UNSEEN --data VIDEOS --weights A.safetensors B.safetensors
    python -m research.benchmarks.lips ... --variants --markdown table.md --json docs/results/speech.json

UNSEEN is a corpus that `hicode pretrain` made of people whom no weights learned from; VIDEOS are its clips. Weights of
another encoder get the same sounds. A speaker's mean face and amplitude come from the frames in which they speak, as in
a user's clip. Predictions are those of the speech models: no calibration, no silence gate, no rendering. Row *truth* is
the tracked motion, *still* the speaker's mean face. Speakers of several clips are counted apart: sentences of GRID,
with the alignments that lie beside them.

Measures are of canonical landmarks in the frontal plane, at 25 fps:

opening, width, lips, jaw  correlation with the tracked mouth (`speech.sync.mouth_measures`); with x: of the mouth that
                           the predicted expression makes
error, less                error of the 40 lip landmarks, % of the eye distance; how much lower than a still mouth's, %
amplitude                  standard deviation of the opening over the truth's
apart                      distance of the lips of the two networks, % of the eye distance, each relative to the mean
closed, falsely            share of the truth's closed (open) frames that are closed, %
quiet                      speed of the lips in silence over that in speech

Closure on p, b, m by language: `research.pretrain.languages`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hicode.errors import HicodeError
from hicode.evaluation.lips import CLOSED, Closure, closure, closures_due
from hicode.motion import LEFT_EYE_OUTER, LIPS, RIGHT_EYE_OUTER
from hicode.preparation.clip import shift_audio
from hicode.runtime import tune_allocator
from hicode.speech.encoders import AudioEncoder, create_encoder, match_frames
from hicode.speech.loudness import speech_level
from hicode.speech.speech_model import SpeechModels, SpokenMotion, Subject
from hicode.speech.sync import mouth_measures
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import GENERIC, SpeechExample, load_generic, usual_gain
from hicode.training.faceformer import closed_gap, mouth_metrics
from research.pretrain.build import sound_of
from research.pretrain.corpus import Taken, load_corpus, load_examples
from research.pretrain.languages import landmark_gap, lines, measure_languages
from research.pretrain.synthetic import pink_noise
from research.reproduce.docs import save_results

# Least values on unseen speakers: correlations, error below a still mouth's.
LEAST = {"opening": 0.69, "width": 0.65, "jaw": 0.61, "less": 14.0}
NOISE_DB = (20.0, 10.0)


@dataclass(frozen=True)
class Data:
    """taken and clips in one order; sounds: of the clips, in sync, where `--data` is given; alignments: of words."""

    taken: list[Taken]
    clips: list[SpeechExample]
    sounds: dict[int, np.ndarray]
    alignments: dict[int, Path]

    def of(self, speaker: str) -> list[int]:
        """Indices of a speaker's clips."""
        return [i for i, t in enumerate(self.taken) if t.speaker == speaker]


def read(cache: Path, data: Path | None) -> Data:
    """The corpus, and the sounds of its clips."""
    taken = load_corpus(cache)
    by_speaker = load_examples(cache)
    clips = [by_speaker[t.speaker].pop(0) for t in taken]
    files = {p.stem: p for p in sorted(data.rglob("*")) if p.suffix in (".mp4", ".mkv")} if data else {}
    sounds = {
        i: shift_audio(sound_of(files[t.clip]), t.offset_frames, len(clips[i]))
        for i, t in enumerate(taken)
        if t.clip in files
    }
    aligned = {i: files[taken[i].clip].with_suffix(".align") for i in sounds}
    return Data(taken, clips, sounds, {i: file for i, file in aligned.items() if file.exists()})


# --- one speaker's figures --------------------------------------------------------------------------------------------


def template_of(examples: list[SpeechExample]) -> Subject:
    """The speaker's mean face."""
    return Subject.of(
        torch.cat([e.expression for e in examples]),
        torch.cat([e.landmarks for e in examples]),
        torch.cat([e.speaking for e in examples]),
    )


def own(generic: SpeechModels, examples: list[SpeechExample], template: Subject) -> SpeechModels:
    """The generic pair as the speaker's, by mean face, amplitude and closed lips alone."""
    motion = [torch.cat([getattr(e, k) for e in examples]) for k in ("expression", "landmarks")]
    speaking = torch.cat([e.speaking for e in examples])
    moved = motion[0] - template.expression, (motion[1] - template.landmarks).flatten(1)
    pair = generic.expression, generic.landmarks
    gains = [usual_gain(m, d, speaking, metric) for m, d, metric in zip(pair, moved, mouth_metrics())]
    gap = closed_gap(motion[1], speaking)
    subject = replace(template, expression_gain=gains[0], landmark_gain=gains[1], closed_gap=gap)
    return replace(generic, subject=subject)


def frontal(landmarks: Tensor) -> Tensor:
    return mouth_measures(landmarks * torch.tensor([1.0, 1.0, 0.0]))


def correlations(a: Tensor, b: Tensor) -> Tensor:
    a, b = a - a.mean(0), b - b.mean(0)
    a = torch.where(a.square().mean(0) > 1e-12, a, 0.0)  # no motion (1e-6 dm is rounding) correlates with nothing
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-9)


def eyes(landmarks: Tensor) -> Tensor:
    return (landmarks[:, LEFT_EYE_OUTER] - landmarks[:, RIGHT_EYE_OUTER]).norm(dim=-1).mean()


def figures(
    expression: Tensor, landmarks: Tensor, truth: SpeechExample, template: Subject, head: HeadModel
) -> dict[str, float]:
    """Of one clip."""
    actions = head.landmarks(head.expression_basis)
    shaped = template.landmarks + torch.einsum("te,elc->tlc", expression - template.expression, actions)
    measured, spoken = frontal(truth.landmarks), frontal(landmarks)
    names = ("opening", "width", "lips", "jaw")
    out: dict[str, float] = dict(zip(names, correlations(spoken, measured).tolist()))
    out |= dict(zip((f"x {name}" for name in names), correlations(frontal(shaped), measured).tolist()))
    unit = float(eyes(truth.landmarks)) / 100

    def error(x: Tensor, points) -> float:
        return float((x - truth.landmarks)[:, points].norm(dim=-1).mean()) / unit

    out["error"], still = error(landmarks, LIPS), error(template.landmarks.expand_as(landmarks), LIPS)
    out["less"] = 100 * (1 - out["error"] / still)
    out["all 478"] = error(landmarks, slice(None))
    metric = mouth_metrics()[0]
    wrong, moved = (
        metric(x - truth.expression).square().sum(-1).mean().sqrt() for x in (expression, template.expression[None])
    )
    out["expression less"] = 100 * float(1 - wrong / moved)
    out["amplitude"] = float(spoken[:, 0].std() / measured[:, 0].std())
    out["apart"] = float((landmarks - shaped)[:, LIPS].norm(dim=-1).mean()) / unit
    gap, true_gap = landmark_gap(landmarks), landmark_gap(truth.landmarks)
    least = max(CLOSED, float(np.quantile(true_gap, 0.08)))
    shut = true_gap < least
    out["closed"], out["falsely"] = (
        100 * float((gap[x] < least).mean()) if x.any() else float("nan") for x in (shut, ~shut)
    )
    out["quiet"] = quiet(gap, truth.speaking.numpy())
    return out


def quiet(gap: np.ndarray, speaking: np.ndarray) -> float:
    speed = np.abs(np.diff(gap))
    silent = ~speaking[1:] & ~speaking[:-1]
    if silent.sum() < 5 or (~silent).sum() < 5 or not speed[~silent].any():
        return float("nan")
    return float(speed[silent].mean() / speed[~silent].mean())


# --- everybody's ------------------------------------------------------------------------------------------------------

Figures = dict[str, dict[str, float]]  # by speaker
Shown = Literal["model", "truth", "still"]
Encode = Callable[[int], Tensor]


@dataclass
class Scores:
    """speakers: of each who has one clip; many: of the others; due: (recall, closed elsewhere, due) of these."""

    speakers: Figures
    many: Figures
    due: tuple[float, float, int] | None


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each column, without what is not known."""
    return {
        k: float(np.nanmean([r[k] for r in rows])) if any(r[k] == r[k] for r in rows) else float("nan") for k in rows[0]
    }


def score(data: Data, pair: SpeechModels | None, encode: Encode, shown: Shown = "model") -> Scores:
    """Score every speaker.

    encode  features "s d" of a clip
    shown   "truth" and "still" score these instead of a model
    """
    head, scores, found = HeadModel.load(), Scores({}, {}, None), []
    for name in dict.fromkeys(t.speaker for t in data.taken):
        index = data.of(name)
        clips = [data.clips[i] for i in index]
        template, rows = template_of(clips), []
        models = own(pair, clips, template) if pair is not None and shown == "model" else None
        for i, clip in zip(index, clips, strict=True):
            motion = _motion(models, clip, template, shown, encode, i)
            rows.append(figures(*motion, clip, template, head))
            if i in data.alignments:
                found.append(closure(landmark_gap(motion.landmarks), closures_due(data.alignments[i], 0, len(clip))))
        (scores.speakers if len(index) == 1 else scores.many)[name] = mean(rows)
    scores.due = _counted(found)
    return scores


def _motion(
    models: SpeechModels | None, clip: SpeechExample, template: Subject, shown: Shown, encode: Encode, index: int
) -> SpokenMotion:
    if models is not None:
        return models.predict(encode(index))
    if shown == "truth":
        return SpokenMotion(clip.expression, clip.landmarks)
    return SpokenMotion(template.expression.expand(len(clip), -1), template.landmarks.expand(len(clip), -1, -1))


def _counted(found: list[Closure]) -> tuple[float, float, int] | None:
    if not found:
        return None
    total, elsewhere = sum(c.due for c in found), [c.elsewhere for c in found if c.elsewhere is not None]
    return sum(c.hits for c in found) / total, float(np.mean(elsewhere)), total


def without_closure(m: SpeechModels) -> SpeechModels:
    """The two answers' mean alone."""
    return replace(m, closure=None)


def with_share(share: float) -> Callable[[SpeechModels], SpeechModels]:
    """Only one of the two answers, without closure."""

    def change(m: SpeechModels) -> SpeechModels:
        import copy

        pair = []
        for model in (m.expression, m.landmarks):
            one = copy.copy(model)
            one.config = replace(model.config, linear_share=share)
            pair.append(one)
        return SpeechModels(pair[0], pair[1], m.encoder, m.subject)

    return change


VARIANTS: dict[str, Callable[[SpeechModels], SpeechModels]] = {
    "no closure": without_closure,
    "faceformer": with_share(0.0),
    "linear": with_share(1.0),
}


def encoded(data: Data, encoder: AudioEncoder, snr_db: float | None = None) -> Encode:
    """Features of a clip's sound; with pink noise at a level below the speech, at an unknown loudness."""
    rng = np.random.default_rng(0)

    def features(i: int) -> Tensor:
        samples = data.sounds[i]
        if snr_db is not None:
            noise = speech_level(samples) * 10 ** (-snr_db / 20) * pink_noise(len(samples), rng)
            samples = (samples + noise).astype(np.float32)
        return match_frames(encoder.encode(samples), len(data.clips[i]))

    return features


def all_scores(data: Data, weights: list[Path], variants: bool) -> dict[str, Scores]:
    """By row. Noise is added to the first weights' sounds."""
    stored: Encode = lambda i: data.clips[i].features[0]
    results = {shown: score(data, None, stored, shown) for shown in ("truth", "still")}
    for number, file in enumerate(weights):
        models = load_generic(file)
        encode = stored if models.encoder == create_encoder().spec else encoded(data, models.encoder_for())
        results[file.stem] = score(data, models, encode)
        if number:
            continue
        for name, change in VARIANTS.items() if variants else ():
            results[f"{file.stem}, {name}"] = score(data, change(models), encode)
        for snr in NOISE_DB if data.sounds else ():
            noisy = encoded(data, models.encoder_for(), snr)
            results[f"{file.stem}, pink noise at {snr:.0f} dB"] = score(data, models, noisy)
    return results


def languages(models: SpeechModels) -> list[str]:
    """Closure by language, of synthesised speech by voices that nobody learned from."""
    encoder = models.encoder_for()
    people = replace(models, calibration=None)
    return lines(
        measure_languages(lambda samples: landmark_gap(people.predict(_even(encoder.encode(samples))).landmarks))
    )


def _even(features: Tensor) -> Tensor:
    return features[: len(features) // 2 * 2]


# --- tables -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "opening",
    "width",
    "lips",
    "jaw",
    "x opening",
    "x width",
    "x jaw",
    "error",
    "less",
    "all 478",
    "expression less",
    "amplitude",
    "apart",
    "closed",
    "falsely",
    "quiet",
)
SHOWN = ("opening", "width", "lips", "jaw", "error", "less", "closed", "falsely")


def cell(key: str, value: float) -> str:
    """With as many digits as the figure deserves."""
    if value != value:
        return "-"
    return (
        f"{value:.2f}"
        if key in ("error", "all 478", "amplitude", "apart", "quiet")
        else f"{value:.1f}"
        if key in ("less", "expression less")
        else f"{value:.0f}"
        if key in ("closed", "falsely")
        else f"{value:.3f}"
    )


def table(rows: Figures) -> list[str]:
    """In Markdown."""
    out = ["| row | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    return out + [f"| {name} | " + " | ".join(cell(k, row[k]) for k in COLUMNS) + " |" for name, row in rows.items()]


def report(results: dict[str, Scores], first: str) -> list[str]:
    """All tables but that of languages."""
    out = ["Unseen speakers, each with one clip: means", ""]
    out += [*table({n: mean(list(s.speakers.values())) for n, s in results.items()}), ""]
    if results["truth"].many:
        out += ["Sentences of speakers with several", ""]
        out += [*table({n: mean(list(s.many.values())) for n, s in results.items()}), ""]
    if results["truth"].due:
        out += ["| row | closure recall on p, b, m | closed elsewhere | due |", "|---|---|---|---|"]
        out += [f"| {n} | {s.due[0]:.3f} | {s.due[1]:.3f} | {s.due[2]} |" for n, s in results.items() if s.due]
        out += [""]
    return [*out, f"Each speaker by {first}", "", *table(results[first].speakers), ""]


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the corpus of people nobody learned from")
    parser.add_argument("--data", type=Path, help="folder of its clips: for noise, other encoders, alignments")
    parser.add_argument("--weights", type=Path, nargs="+", default=[GENERIC], help="files of hicode pretrain")
    parser.add_argument("--variants", action="store_true", help="also the first weights without their parts")
    parser.add_argument("--languages", action="store_true", help="also closure in synthesised languages")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    """Print the tables; 1 if the first weights miss a least value."""
    options = arguments()
    tune_allocator()
    torch.set_num_threads(1)
    try:
        results = all_scores(read(options.cache, options.data), options.weights, options.variants)
        first = options.weights[0].stem
        page = "\n".join(report(results, first)) + "\n"
        if options.languages:
            page += "\n".join(languages(load_generic(options.weights[0]))) + "\n"
    except HicodeError as error:
        raise SystemExit(str(error)) from None
    print(page)
    if options.markdown:
        options.markdown.write_text(page)
    means = {name: mean(list(s.speakers.values())) for name, s in results.items()}
    if options.json:
        rows = [[name, *(cell(k, row[k]) for k in SHOWN)] for name, row in means.items()]
        command = "python -m research.benchmarks.lips --cache UNSEEN --data CLIPS --weights FILES"
        save_results(options.json, ("weights, sound", *SHOWN), rows, command)
    missed = [f"{k} {means[first][k]:.2f} (≥ {least:g})" for k, least in LEAST.items() if means[first][k] < least]
    print("passed" if not missed else "missed: " + ", ".join(missed))
    return 0 if not missed else 1


if __name__ == "__main__":
    raise SystemExit(main())
