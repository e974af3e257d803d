"""How well speech moves lips, on people that no part of the model has seen in training.

    python -m research.benchmarks.lips --cache CORPUS --data VIDEOS                    the shipped recipe
    python -m research.benchmarks.lips --cache CORPUS --data VIDEOS --rows all        also without its parts, on log-mel
    python -m research.benchmarks.lips --cache CORPUS --data VIDEOS --rows encoders --hubert FOLDER
    python -m research.benchmarks.lips ... --markdown table.md --keep FOLDER           write tables, keep trained models

CORPUS is what `hicode pretrain` made. The recipe is trained anew for each of four groups of speakers that are left out,
about three core minutes each. Speakers whose terms forbid learning are only scored. Every fifth sentence of GRID and
every fifth synthetic speaker is never learned from. A speaker's mean face and amplitude come from the frames in which
they speak, as in a user's clip. Predictions are those of the speech models: no silence gate, no rendering. Row *truth*
is the tracked motion, *still* the speaker's mean face. Other encoders (*logmel*, *hubert* with its weights) get the
same sounds in the same variants, and the same training, with their own windows.

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
import hashlib
import inspect
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hicode.errors import HicodeError
from hicode.evaluation.lips import CLOSED, closure, closures_due
from hicode.files import load_tensors, save_tensors
from hicode.motion import LEFT_EYE_OUTER, LIPS, RIGHT_EYE_OUTER
from hicode.preparation.clip import shift_audio
from hicode.progress import progress_bar
from hicode.runtime import tune_allocator
from hicode.speech import faceformer
from hicode.speech.encoders import AudioEncoder, EncoderSpec, create_encoder, match_frames
from hicode.speech.loudness import speech_level
from hicode.speech.speech_model import SpeechModels, Subject
from hicode.speech.sync import mouth_measures
from hicode.tracking.head_model import HeadModel
from hicode.training import faceformer as learning
from hicode.training.adaptation import SCHEMA, VERSION, SpeechExample, learn_speech_models, usual_gain
from hicode.training.faceformer import closed_gap, mouth_metrics
from research.pretrain import generic as pretraining
from research.pretrain.build import sound_of
from research.pretrain.corpus import Taken, encode_variants, load_corpus, load_examples, load_synthetic
from research.pretrain.generic import PretrainConfig, pretrain
from research.pretrain.languages import closure_rates, landmark_gap, lines
from research.pretrain.synthetic import SyntheticExample, pink_noise

GROUPS, HELD_OUT = 4, 5
HDTF = ("markey", "khill", "radio2")
# Least values: opening, width, jaw on unseen speakers; error below a still mouth's.
LEAST = {"opening": 0.70, "width": 0.65, "jaw": 0.55, "less": 12.0}
ROWS = ("hicode", "no closure", "faceformer", "linear", "no synthetic", "logmel", "hubert")
ENCODERS = ("hicode", "logmel", "hubert")


@dataclass(frozen=True)
class Data:
    """taken and clips in one order; synthetic: with phones; sounds: of the clips, in sync, where `--data` is given."""

    taken: list[Taken]
    clips: list[SpeechExample]
    synthetic: list[SyntheticExample]
    sounds: dict[tuple[str, str], np.ndarray]

    def of(self, speaker: str) -> list[int]:
        return [i for i, t in enumerate(self.taken) if t.speaker == speaker]


def read(cache: Path, data: Path | None) -> Data:
    taken = load_corpus(cache)
    by_speaker = load_examples(cache)
    clips = [by_speaker[t.speaker].pop(0) for t in taken]
    files = {p.stem: p for p in sorted(data.rglob("*")) if p.suffix in (".mp4", ".mkv")} if data else {}
    sounds = {
        (t.speaker, t.clip): shift_audio(sound_of(files[t.clip]), t.offset_frames, len(c))
        for t, c in zip(taken, clips)
        if t.clip in files
    }
    return Data(taken, clips, load_synthetic(cache), sounds)


def many(data: Data) -> str:
    """The speaker with the most clips. Some of these clips are left out, not all."""
    names = [t.speaker for t in data.taken]
    return max(set(names), key=names.count)


def groups(data: Data, but: str) -> list[list[str]]:
    """Groups of speakers that are left out together, of similar duration."""
    lengths: dict[str, int] = {}
    for t in data.taken:
        lengths[t.speaker] = lengths.get(t.speaker, 0) + t.frames
    order = sorted((s for s in lengths if s != but), key=lambda s: -lengths[s])
    return [order[k::GROUPS] for k in range(GROUPS)]


def held_out(index: int) -> bool:
    return index % HELD_OUT == 0


def speaker_number(item: SyntheticExample) -> int:
    return int(item.example.speaker.split("-")[1])


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


# --- a recipe ---------------------------------------------------------------------------------------------------------

Figures = dict[str, dict[str, float]]  # by speaker


@dataclass
class Scores:
    """speakers: figures of each; many: of the held-out sentences; due: (recall, closed elsewhere, due) on them;
    languages: table rows.
    """

    speakers: Figures
    many: dict[str, float]
    due: tuple[float, float, int] | None
    languages: dict


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {
        k: float(np.nanmean([r[k] for r in rows])) if any(r[k] == r[k] for r in rows) else float("nan") for k in rows[0]
    }


Shown = Literal["model", "truth", "still"]
Encode = Callable[[int], Tensor]


@dataclass(frozen=True)
class Features:
    """The features "v t d" of a clip and of a synthetic one, by their index, from one encoder."""

    encoder: EncoderSpec
    clip: Encode
    synthetic: Encode


@dataclass(frozen=True)
class Asked:
    """A clip whose motion is to be predicted."""

    example: SpeechExample
    encode: Encode
    index: int

    def answer(self, models: SpeechModels | None, template: Subject, shown: Shown) -> tuple[Tensor, Tensor]:
        """Expression and landmarks: of the models, or the truth, or a still mouth."""
        if models is not None:
            return models.predict(self.encode(self.index)[0])
        if shown == "truth":
            return self.example.expression, self.example.landmarks
        t = len(self.example)
        return template.expression.expand(t, -1), template.landmarks.expand(t, -1, -1)


def answers(
    pair: SpeechModels | None, known: list[SpeechExample], asked: list[Asked], shown: Shown
) -> tuple[list[tuple[Tensor, Tensor]], Subject]:
    """The motion of each clip that is asked for, and the mean face of the speaker, which comes from `known`."""
    template = template_of(known)
    models = own(pair, known, template) if pair is not None and shown == "model" else None
    return [a.answer(models, template, shown) for a in asked], template


def score(
    data: Data,
    trained: Sequence[tuple[list[str], SpeechModels | None]],
    alignments: Path | None,
    change: Callable[[SpeechModels], SpeechModels],
    encode: tuple[Encode, Encode],
    shown: Shown = "model",
) -> Scores:
    """Score every speaker by the models that have not seen them in training.

    change  makes the row's variant of a pair of models
    encode  features of a clip, and of a synthetic one; their first variant is used
    shown   "truth" and "still" score these instead of a model
    """
    head, grid = HeadModel.load(), many(data)
    pairs = [(names, change(generic) if generic is not None else None) for names, generic in trained]
    speakers: Figures = {}
    sentences, due = [], []
    for names, pair in pairs:
        for name in names:
            clips = [data.clips[i] for i in data.of(name)]
            asked = [Asked(data.clips[i], encode[0], i) for i in data.of(name)]
            predicted, template = answers(pair, clips, asked, shown)
            speakers[name] = mean([figures(*m, e, template, head) for m, e in zip(predicted, clips)])
        index = data.of(grid)
        known = [data.clips[i] for k, i in enumerate(index) if not held_out(k)][:80]
        asked = [Asked(data.clips[i], encode[0], i) for k, i in enumerate(index) if held_out(k)]
        predicted, template = answers(pair, known, asked, shown)
        for a, motion in zip(asked, predicted):
            sentences.append(figures(*motion, a.example, template, head))
            file = alignments / f"{data.taken[a.index].clip}.align" if alignments else None
            if file is not None and file.exists():
                due.append(closure(landmark_gap(motion[1]), closures_due(file, 0, len(motion[1]))))
    counted = None
    if due:
        elsewhere = [c.elsewhere for c in due if c.elsewhere is not None]
        total = sum(c.due for c in due)
        counted = sum(c.hits for c in due) / total, float(np.mean(elsewhere)), total
    return Scores(speakers, mean(sentences), counted, by_language(data, pairs[0][1], encode[1], shown))


def by_language(data: Data, pair: SpeechModels | None, encode: Encode, shown: Shown) -> dict:
    """Closure and opening of the synthetic speakers that are left out; the gap in sounds without speech."""
    gaps = []
    for i, item in enumerate(data.synthetic):
        if held_out(speaker_number(item)):
            same = [s.example for s in data.synthetic if s.example.speaker == item.example.speaker and not s.negative]
            ((_, landmarks),), _ = answers(pair, same, [Asked(item.example, encode, i)], shown)
            gaps.append((landmark_gap(landmarks), item))
    spoken = [(gap, item) for gap, item in gaps if not item.negative]
    tracks, phones = [gap for gap, _ in spoken], [item.phones for _, item in spoken]
    rates = closure_rates(tracks, phones, [item.language for _, item in spoken])
    rates |= closure_rates(tracks, phones, ["all"] * len(spoken))
    negatives = [float(gap.mean()) for gap, item in gaps if item.negative]
    return {"rates": rates, "negatives": float(np.mean(negatives)) if negatives else float("nan")}


def train(
    data: Data,
    names: list[str],
    config: PretrainConfig,
    features: Features,
    keep: Path | None = None,
    visible: bool = True,
) -> SpeechModels:
    """A generic pair that has not seen `names`, nor what is left out for everyone.

    `keep` is a folder of trained pairs. A pair of the same examples, settings and code is read from it.
    """
    grid = many(data)
    kept = {i for k, i in enumerate(data.of(grid)) if not held_out(k)}
    examples = []
    for i, (t, e) in enumerate(zip(data.taken, data.clips)):
        if t.speaker not in names and t.learned_frames and (t.speaker != grid or i in kept):
            examples.append(replace(e, features=features.clip(i))[: t.learned_frames])
    if config.synthetic_weight:
        examples += [
            replace(s.example, features=features.synthetic(i))
            for i, s in enumerate(data.synthetic)
            if not held_out(speaker_number(s))
        ]
    file = keep and keep / f"{_key(examples, config, features.encoder)}.safetensors"
    if file and file.exists():
        return SpeechModels.from_state(*load_tensors(file, SCHEMA, VERSION))
    with progress_bar(f"Without {', '.join(names)}", visible) as show:
        pair = pretrain(examples, features.encoder, config, progress=lambda done: show(round(100 * done), 100))
    if file:
        save_tensors(file, *_state(pair))
    return pair


def _state(pair: SpeechModels) -> tuple:
    tensors, config = pair.state()
    return tensors, SCHEMA, VERSION, config


def _key(examples: list[SpeechExample], config: PretrainConfig, encoder: EncoderSpec) -> str:
    code = [inspect.getsource(module) for module in (learning, pretraining, faceformer)]
    digest = hashlib.blake2b(json.dumps([asdict(config), encoder.to_json(), code]).encode(), digest_size=8)
    for e in examples:
        for tensor in (e.features, e.expression, e.landmarks, e.speaking):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def stored(data: Data) -> Features:
    """The features that the corpus holds, of the embedded encoder."""
    return Features(
        create_encoder().spec, lambda i: data.clips[i].features, lambda i: data.synthetic[i].example.features
    )


def by_encoder(data: Data, encoder: AudioEncoder) -> Features:
    """Features of another encoder, in the variants of the corpus."""

    @cache
    def clip(i: int) -> Tensor:
        t = data.taken[i]
        rng = np.random.default_rng((0, zlib.crc32(t.file.encode())))
        return encode_variants(encoder, data.sounds[t.speaker, t.clip], len(data.clips[i]), rng)

    @cache
    def synthetic(i: int) -> Tensor:
        item = data.synthetic[i]
        return encode_variants(encoder, item.samples, len(item.example), np.random.default_rng((1, i)))

    return Features(encoder.spec, clip, synthetic)


def without_closure(m: SpeechModels) -> SpeechModels:
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


# --- noise and adaptation ---------------------------------------------------------------------------------------------


def noisy(data: Data, snr_db: float = 10.0) -> Encode:
    """Features "1 t d" of a clip with pink noise, at an unknown level."""
    encoder, rng = create_encoder(), np.random.default_rng(0)

    def features(i: int) -> Tensor:
        t = data.taken[i]
        samples = data.sounds[t.speaker, t.clip]
        noise = speech_level(samples) * 10 ** (-snr_db / 20) * pink_noise(len(samples), rng)
        return match_frames(encoder.encode((samples + noise).astype(np.float32)), len(data.clips[i]))[None]

    return features


def adaptation(data: Data, trained, seconds: tuple[float, ...] = (6, 8, 10, 15)) -> list[tuple]:
    """(speaker, seconds learned from, opening and error of the generic pair with the speaker's own mean and amplitude,
    the same adapted) on what follows, of unseen speakers whose clips leave two seconds for it."""
    head, rows = HeadModel.load(), []
    for names, generic in trained:
        for name in names:
            index = data.of(name)
            if len(index) > 1:
                continue
            clip = data.clips[index[0]]
            for s in seconds:
                cut = round(25 * s)
                if len(clip) < cut + 50:
                    continue
                learned, rest = clip[:cut], clip[cut:]
                template = template_of([learned])
                zero = own(generic, [learned], template)
                adapted, _ = learn_speech_models(
                    replace(learned, features=learned.features[:1]), generic.encoder, generic
                )
                both = []
                for models in (zero, adapted):
                    expression, landmarks = models.predict(clip.features[0])
                    both.append(figures(expression[cut:], landmarks[cut:], rest, template, head))
                rows.append((name, s, both[0], both[1]))
    return rows


def minutes_of_own_speech(data: Data, generic: SpeechModels) -> tuple[float, dict[str, dict[str, float]]]:
    """(minutes learned from, figures on the held-out sentences) of the speaker of many sentences, whom `generic` has
    not seen: as they come, and adapted to others of their sentences."""
    head, index = HeadModel.load(), data.of(many(data))
    known = [data.clips[i] for k, i in enumerate(index) if not held_out(k)][:80]  # about four minutes
    parts = {k: torch.cat([getattr(e, k) for e in known]) for k in ("expression", "landmarks", "speaking")}
    whole = SpeechExample(known[0].speaker, torch.cat([e.features[:1] for e in known], 1), **parts)
    template = template_of(known)
    pairs = {
        "unseen": own(generic, known, template),
        "adapted": learn_speech_models(whole, generic.encoder, generic)[0],
    }
    out = {}
    for name, models in pairs.items():
        unseen_ones = [data.clips[i] for k, i in enumerate(index) if held_out(k)]
        out[name] = mean([figures(*models.predict(e.features[0]), e, template, head) for e in unseen_ones])
    return len(whole) / 1500, out


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


def cell(key: str, value: float) -> str:
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


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    out = ["| row | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    return out + [f"| {name} | " + " | ".join(cell(k, row[k]) for k in COLUMNS) + " |" for name, row in rows.items()]


def unseen(scores: Scores) -> dict[str, float]:
    """Mean over speakers whose clips last five seconds or more: correlations of less are luck."""
    return mean([row for name, row in scores.speakers.items() if name != "radio10"])


# --- the benchmark ----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[SpeechModels], SpeechModels]] = {
    "hicode": lambda m: m,
    "no closure": without_closure,
    "faceformer": with_share(0.0),
    "linear": with_share(1.0),
}


@dataclass
class Benchmark:
    """What is measured: data and options, trained pairs by group, scores by row."""

    data: Data
    options: argparse.Namespace
    rows: tuple[str, ...]
    trained: list[tuple[list[str], SpeechModels]] = field(default_factory=list)
    results: dict[str, Scores] = field(default_factory=dict)

    @property
    def config(self) -> PretrainConfig:
        return PretrainConfig(steps=self.options.steps)

    def learn(self, config: PretrainConfig, features: Features) -> list[tuple[list[str], SpeechModels]]:
        """A pair for each group of speakers, learned without them."""
        parts = groups(self.data, many(self.data))
        return [(group, train(self.data, group, config, features, self.options.keep)) for group in parts]

    def run(self) -> None:
        """Train and score every row."""
        data, options, corpus = self.data, self.options, stored(self.data)
        alignments = next((p.parent for p in options.data.rglob("*.align")), None) if options.data else None
        encode, same = (corpus.clip, corpus.synthetic), VARIANTS["hicode"]
        nobody = [(group, None) for group in groups(data, many(data))]
        for shown in ("truth", "still"):
            self.results[shown] = score(data, nobody, alignments, same, encode, shown)
        if {*self.rows} & {*VARIANTS}:
            self.trained = self.learn(self.config, corpus)
        for name in (n for n in self.rows if n in VARIANTS):
            self.results[name] = score(data, self.trained, alignments, VARIANTS[name], encode)
        if "no synthetic" in self.rows:
            bare = replace(self.config, synthetic_weight=0.0, closure_synthetic_weight=0.0)
            self.results["no synthetic"] = score(data, self.learn(bare, corpus), alignments, same, encode)
        for name in ("logmel", "hubert"):
            if name in self.rows and self._is_possible(name):
                encoder = create_encoder(name, options.hubert if name == "hubert" else None)
                other = by_encoder(data, encoder)
                pairs = self.learn(self.config, other)
                self.results[name] = score(data, pairs, alignments, same, (other.clip, other.synthetic))
        if data.sounds and "hicode" in self.rows:
            encode = noisy(data), corpus.synthetic
            self.results["hicode, pink noise at 10 dB"] = score(data, self.trained, alignments, same, encode)

    def _is_possible(self, name: str) -> bool:
        if not self.data.sounds or (name == "hubert" and self.options.hubert is None):
            print(f"{name}: not measured, {'--data' if not self.data.sounds else '--hubert'} is not given.")
            return False
        return True

    def report(self) -> list[str]:
        """All tables."""
        results, grid = self.results, many(self.data)
        first = next((n for n in self.rows if n in results), "truth")
        hdtf = {n: [s.speakers[k] for k in HDTF if k in s.speakers] for n, s in results.items()}
        out = ["Unseen speakers, mean of those with five seconds or more", ""]
        out += [*table({n: unseen(s) for n, s in results.items()}), "", "Of them HDTF's three", ""]
        out += [*table({n: mean(rows) for n, rows in hdtf.items() if rows}), ""]
        out += [f"Held-out sentences of {grid}", "", *table({n: s.many for n, s in results.items()}), ""]
        if results["truth"].due:
            out += ["| row | closure recall on p, b, m | closed elsewhere | due |", "|---|---|---|---|"]
            out += [f"| {n} | {s.due[0]:.3f} | {s.due[1]:.3f} | {s.due[2]} |" for n, s in results.items() if s.due]
            out += [""]
        out += [f"Each speaker by {first}", "", *table(results[first].speakers), ""]
        out += ["Synthetic speakers, held out, all languages; gap in noise, music and silence", ""]
        out += ["| row | recall % | closed elsewhere % | open vowel % | p b m % | pause % | no speech % |"]
        out += ["|---|---|---|---|---|---|---|"]
        for name, s in results.items():
            r = s.languages["rates"]["all"]
            values = (r.closure.recall, r.closure.elsewhere, r.open_vowel, r.bilabial, r.rest, s.languages["negatives"])
            out += [f"| {name} | " + " | ".join("-" if v is None else f"{100 * v:.1f}" for v in values) + " |"]
        rates = {k: v for k, v in results[first].languages["rates"].items() if k != "all"}
        out += ["", f"By language, {first}", "", *lines(rates), ""]
        if self.trained and not self.options.no_adaptation:
            out += self._adaptation()
        return out

    def _adaptation(self) -> list[str]:
        out = ["Adaptation: learned from the first seconds, scored on what follows", ""]
        out += [
            "| speaker | s | opening generic | adapted | lip error generic | adapted |",
            "|---|---|---|---|---|---|",
        ]
        for name, s, a, b in adaptation(self.data, self.trained):
            openings, errors = (f"{a[k]:.{d}f} | {b[k]:.{d}f}" for k, d in (("opening", 3), ("error", 2)))
            out += [f"| {name} | {s:g} | {openings} | {errors} |"]
        grid = many(self.data)
        alone = train(self.data, [grid], self.config, stored(self.data), self.options.keep)
        minutes, rows = minutes_of_own_speech(self.data, alone)
        title = f"Held-out sentences of {grid}, by models that have not seen them, and adapted to {minutes:.1f} minutes"
        return [*out, "", title, "", *table(rows)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the corpus that hicode pretrain made")
    parser.add_argument(
        "--data", type=Path, help="folder of the corpus's clips: for noise, log-mel and GRID's alignments"
    )
    default = ["hicode", "no closure", "faceformer", "linear"]
    parser.add_argument("--rows", nargs="*", default=default, help=f"of {', '.join(ROWS)}; all, encoders")
    parser.add_argument("--hubert", type=Path, help="folder of HuBERT's weights, for that row")
    parser.add_argument("--keep", type=Path, help="folder for trained pairs: a benchmark that was stopped goes on")
    parser.add_argument("--steps", type=int, default=PretrainConfig().steps)
    parser.add_argument("--no-adaptation", action="store_true")
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    first = options.rows[0] if options.rows else ""
    rows = {"all": ROWS, "encoders": ENCODERS}.get(first, tuple(options.rows))
    if unknown := [name for name in rows if name not in ROWS]:
        raise SystemExit(f"There is no row {unknown[0]!r}. There are: {', '.join(ROWS)}; all, encoders.")
    tune_allocator()
    torch.set_num_threads(1)
    try:
        benchmark = Benchmark(read(options.cache, options.data), options, rows)
    except HicodeError as error:
        raise SystemExit(str(error)) from None
    benchmark.run()
    page = "\n".join(benchmark.report()) + "\n"
    print(page)
    if options.markdown:
        options.markdown.write_text(page)
    if "hicode" not in benchmark.results:
        return 0
    got = unseen(benchmark.results["hicode"])
    missed = [f"{k} {got[k]:.2f} (≥ {least:g})" for k, least in LEAST.items() if got[k] < least]
    print("passed" if not missed else "missed: " + ", ".join(missed))
    return 0 if not missed else 1


if __name__ == "__main__":
    raise SystemExit(main())
