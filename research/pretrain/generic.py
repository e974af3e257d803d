"""Generic Faceformers from many speakers.

Learned *within* speakers: features are taken relative to the speaker's own mean, as displacements are. Whose voice it
is says nothing of how lips move about a mean face, yet with a dozen speakers it passes for a cause. What is learned is
relative to the mean voice, the models' `feature_mean`, so nothing needs to be known of a new speaker.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.audio import FPS
from hicode.files import save_tensors
from hicode.motion import EXPRESSION_DIM, N_LANDMARKS
from hicode.speech.encoders import EncoderSpec
from hicode.speech.faceformer import Faceformer, FaceformerConfig
from hicode.speech.lip_closure import ClosureConfig, LipClosure, lip_gap
from hicode.speech.mouth_calibration import MouthCalibration, mouth_lengths
from hicode.speech.speech_model import MIN_SPEECH_FRAMES, SpeechModels, Subject
from hicode.training.adaptation import CLOSED_MARGIN, GENERIC, SCHEMA, VERSION, SpeechExample, usual_gain
from hicode.training.calibration import mouth_directions, quantiles
from hicode.training.faceformer import (
    CLOSED_GAP,
    ClosureRows,
    FaceformerTraining,
    SpeechTask,
    amplitude,
    closed_gap,
    closing_moment,
    fit_basis,
    fit_closure,
    fit_linear,
    mouth_metrics,
    set_closing_motion,
    to_coefficients,
    train_faceformer,
)

# Names of synthetic speakers begin so. Their visemes follow rules, hence the low weight; they do not shape the basis.
SYNTHETIC = "espeak-"
# Standard deviation of the window of slow motion that is not learned, seconds.
DRIFT_S = 2.0


@dataclass(frozen=True)
class PretrainConfig(FaceformerTraining):
    """How generic Faceformers are trained."""

    longest_speaker_s: float = 40.0
    """a speaker with more speech counts as one with this much: variety beats minutes"""
    synthetic_weight: float = 0.3
    """of all synthetic speakers together, against the real ones"""
    linear_share: float = 0.5
    """of the linear prediction"""
    closure_synthetic_weight: float = 0.05
    """of a synthetic frame where closures are learned, against a real one"""
    closure_probability: tuple[float, float] = ClosureConfig.probability
    closure_gap_shares: tuple[float, float] | None = ClosureConfig.gap_shares


def pretrain(
    examples: list[SpeechExample],
    encoder: EncoderSpec,
    config: PretrainConfig = PretrainConfig(),
    shape: FaceformerConfig = FaceformerConfig(),
    progress: Callable[[float], None] | None = None,
) -> SpeechModels:
    """A generic pair from recordings of several speakers; its subject is the real speakers' mean.

    encoder  of the features
    shape    of the expression's model; the landmarks' differs in outputs and style input
    """
    people = sorted({e.speaker for e in examples if not e.speaker.startswith(SYNTHETIC)})
    subjects = {s: _subject(examples, s) for s in {e.speaker for e in examples}}
    voices, share = mean_voices(examples), speaker_shares(examples, config)
    models = []
    for part, metric in enumerate(mouth_metrics()):
        torch.manual_seed(config.seed)
        outputs, styles = (EXPRESSION_DIM, 0) if part == 0 else (3 * N_LANDMARKS, min(6, len(people) - 1))
        model = Faceformer(
            replace(
                shape,
                feature_dim=examples[0].features.shape[2],
                outputs=outputs,
                style_components=styles,
                linear_share=config.linear_share,
            )
        )
        spoken = torch.cat([e.features[0] - voices[e.speaker][0] for e in examples if e.speaker in people])
        model.feature_mean.copy_(torch.stack([voices[s][0] for s in people]).mean(0))  # every voice counts alike
        model.feature_std.copy_(spoken.std(0) + 1e-3)
        targets = _scaled_displacements(model, part, examples, subjects, people)
        if styles:
            _fit_style(model, [subjects[s].identity_frames for s in people])
        tasks = [
            SpeechTask(
                e.features,
                to_coefficients(d, model.basis, metric),
                model.project_identity(subjects[e.speaker].identity_frames) if styles else None,
                share[e.speaker],
                voices[e.speaker] - model.feature_mean,
            )
            for e, d in zip(examples, targets, strict=True)
        ]
        report = None if progress is None else lambda done, p=part: progress((p + done) / 2)
        train_faceformer(model, tasks, metric, config, report)
        if config.linear_share:
            fit_linear(model, tasks, config.linear_ridge)
        models.append(model)
    faces = [subjects[s] for s in people]
    mean = Subject(
        expression=torch.stack([f.expression for f in faces]).mean(0),
        landmarks=torch.stack([f.landmarks for f in faces]).mean(0),
        identity_frames=torch.stack([f.identity_frames for f in faces]).mean(0),
    )
    closure = generic_closure(models[0], examples, config) if config.linear_share else None
    pair = SpeechModels(models[0], models[1], encoder, mean, closure)
    pair.people = usual_calibration(pair, [e for e in examples if e.speaker in people])
    return pair


def usual_calibration(models: SpeechModels, examples: list[SpeechExample]) -> MouthCalibration:
    """How much people move their mouths, and how much of it the pair predicts: means of their quantiles.

    Source and target are those of the pair's own mean face at gain 1; openings of the target are as people show them.
    """
    usual = mouth_lengths(models.subject.landmarks)[:, None]
    sources, targets = [], []
    for speaker in sorted({e.speaker for e in examples}):
        own = [e for e in examples if e.speaker == speaker]
        speaking, landmarks = torch.cat([e.speaking for e in own]), torch.cat([e.landmarks for e in own])
        if speaking.sum() < MIN_SPEECH_FRAMES:
            continue
        subject = replace(_subject(examples, speaker), closed_gap=closed_gap(landmarks, speaking))
        moved = (landmarks - subject.landmarks).flatten(1)
        gain = usual_gain(models.landmarks, moved, speaking, mouth_metrics()[1])
        person = replace(models, subject=replace(subject, landmark_gain=gain), calibration=None)
        spoken = torch.cat([person.predict(e.features[0]).landmarks for e in own])
        face = mouth_lengths(subject.landmarks)[:, None]
        sources.append((quantiles(mouth_lengths(spoken[speaking])) - face) / gain)
        shown = quantiles(mouth_lengths(landmarks[speaking]))
        targets.append(torch.cat([shown[:1], (shown - face + usual)[1:]]))
    source, target = (torch.stack(x).mean(0) for x in (sources, targets))
    return MouthCalibration(usual + source, target, *mouth_directions(models))


def _subject(examples: list[SpeechExample], speaker: str) -> Subject:
    own = [e for e in examples if e.speaker == speaker]
    expression, landmarks, speaking = (
        torch.cat([getattr(e, k) for e in own]) for k in ("expression", "landmarks", "speaking")
    )
    return Subject.of(expression, landmarks, speaking)


def _scaled_displacements(
    model: Faceformer, part: int, examples: list[SpeechExample], subjects: dict[str, Subject], people: list[str]
) -> list[Float[Tensor, "_ n"]]:
    """Displacements of everyone, scaled to the typical speaker's amplitude; sets the model's amplitude and basis.

    How much somebody moves is not in their sound, and is easily measured for a new speaker.
    """
    metric = mouth_metrics()[part]
    moved = [e.displacements(subjects[e.speaker])[part] for e in examples]

    def spoken(displacements: list[Tensor], speaker: str) -> Tensor:
        return torch.cat([d[e.speaking] for d, e in zip(displacements, examples, strict=True) if e.speaker == speaker])

    own = {s: amplitude(spoken(moved, s), metric) for s in subjects}
    model.amplitude.fill_(float(np.median([own[s] for s in people])))
    moved = [d * (float(model.amplitude) / max(own[e.speaker], 1e-6)) for d, e in zip(moved, examples, strict=True)]
    moved = [without_drift(d) if e.speaker in people else d for d, e in zip(moved, examples, strict=True)]
    model.basis.copy_(fit_basis([spoken(moved, s) for s in people], model.config.components, metric))
    return moved


def without_drift(displacement: Float[Tensor, "t n"], sigma_s: float = DRIFT_S) -> Float[Tensor, "t n"]:
    """Minus its mean under a Gaussian in time: moods and the tracking's drift, which no sound explains."""
    frame = torch.arange(len(displacement)) / (FPS * sigma_s)
    weight = torch.exp(-0.5 * (frame[:, None] - frame).square())
    return displacement - (weight / weight.sum(1, keepdim=True)) @ displacement


def mean_voices(examples: list[SpeechExample]) -> dict[str, Float[Tensor, "v d"]]:
    """Each speaker's mean features, of every variant, over the frames in which they speak (all if they never do)."""
    out = {}
    for speaker in {e.speaker for e in examples}:
        own = [e for e in examples if e.speaker == speaker]
        spoken = [e.features[:, e.speaking.repeat_interleave(2)] for e in own]
        rows = torch.cat(spoken if any(x.shape[1] for x in spoken) else [e.features for e in own], 1)
        out[speaker] = rows.mean(1)
    return out


def speaker_shares(examples: list[SpeechExample], config: PretrainConfig) -> dict[str, float]:
    """Weight of a frame by speaker: long recordings are drawn less often, synthetic speakers get their share."""
    frames: dict[str, int] = {}
    for e in examples:
        frames[e.speaker] = frames.get(e.speaker, 0) + len(e)
    share = {s: min(1.0, FPS * config.longest_speaker_s / n) for s, n in frames.items()}
    real, synthetic = (
        sum(share[s] * n for s, n in frames.items() if s.startswith(SYNTHETIC) == k) for k in (False, True)
    )
    return {
        s: x * (config.synthetic_weight * real / synthetic if s.startswith(SYNTHETIC) and real else 1.0)
        for s, x in share.items()
    }


def generic_closure(model: Faceformer, examples: list[SpeechExample], config: PretrainConfig) -> LipClosure:
    """When lips are closed, from real frames by their gap, from synthetic ones by their phones.

    Sound that is no speech is closed throughout: noise does not open a mouth.
    """
    c = model.config
    closure = LipClosure(
        ClosureConfig(c.feature_dim, c.linear_back, c.look_ahead, config.closure_probability, config.closure_gap_shares)
    )
    share = {s: min(x, 1.0) for s, x in speaker_shares(examples, replace(config, synthetic_weight=0.0)).items()}
    sounds, moment = [], torch.zeros(EXPRESSION_DIM)
    for e in examples:
        gap, real = lip_gap(e.landmarks), not e.speaker.startswith(SYNTHETIC)
        least = closed_gap(e.landmarks, e.speaking) + CLOSED_MARGIN if real else 0.0
        closed = gap < max(least, CLOSED_GAP)
        variants = e.features[[0, -1]] if len(e.features) > 1 else e.features  # as it is, and the farthest from it
        weight = (share[e.speaker] if real else config.closure_synthetic_weight) / len(variants)
        sounds += [ClosureRows(features, closed, weight) for features in variants]
        if real:
            moment += min(1.0, FPS * config.longest_speaker_s / len(e)) * closing_moment(e.expression, gap, e.speaking)
    fit_closure(model, closure, sounds, [e.features[0] for e in examples])
    set_closing_motion(closure, moment)
    return closure


def _fit_style(model: Faceformer, faces: list[Float[Tensor, "20 478 3"]]) -> None:
    """Principal faces of the speakers, scaled so that a speaker's coefficients have unit variance."""
    means = torch.stack([f.mean(0).flatten() for f in faces])
    model.style_mean.copy_(means.mean(0))
    _, s, vt = torch.linalg.svd(means - means.mean(0), full_matrices=False)
    k = model.config.style_components
    model.style_basis.copy_(vt[:k] / (s[:k, None] / (len(faces) - 1) ** 0.5).clamp(min=1e-6))


def save_generic(models: SpeechModels, learned_from: list[dict], path: Path | str = GENERIC) -> None:
    """Write the pair in half precision, but the knots of its prior, which lie close together.

    `learned_from`: one entry a clip, with its terms.
    """
    tensors, config = models.state()
    kept = {k: v if k.startswith("people.") else v.half() for k, v in tensors.items()}
    save_tensors(path, kept, SCHEMA, VERSION, config | {"learned_from": learned_from})
