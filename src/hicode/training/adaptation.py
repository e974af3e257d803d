"""A person's speech models: generic Faceformers adapted to a clip, or Faceformers learned from the clip alone.

t frames, n outputs. Generic Faceformers ship for the embedded encoder; `hicode pretrain` made them, and the file names
its speakers. For another encoder there are none: the models are learned from the clip alone, and less can be expected.
Learning never sees a clip's test part. It validates free-running, on the end of the training part.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.audio import FEATURES_PER_FRAME, FPS, SAMPLES_PER_FRAME, frame_rms
from hicode.errors import TrainingError
from hicode.files import load_tensors
from hicode.speech.encoders import EncoderSpec
from hicode.speech.faceformer import Faceformer, FaceformerConfig
from hicode.speech.lip_closure import ClosureConfig, LipClosure, lip_gap
from hicode.speech.speech_model import MIN_SPEECH_FRAMES, SpeechModels, Subject
from hicode.training.calibration import CalibrationConfig, calibrate
from hicode.training.faceformer import (
    CLOSED_GAP,
    ClosureRows,
    FaceformerTraining,
    Metric,
    SpeechTask,
    amplitude,
    closed_gap,
    closing_moment,
    fit_basis,
    fit_closure,
    fit_linear,
    mouth_metrics,
    predict_displacement,
    set_closing_motion,
    to_coefficients,
    train_faceformer,
)

if TYPE_CHECKING:
    from hicode.preparation.clip import Clip

SCHEMA, VERSION = "hicode-speech", 2
GENERIC = Path(__file__).parent.parent / "weights" / "speech.safetensors"
# dm. A real frame is closed within .8 mm of the speaker's least gap.
CLOSED_MARGIN = 0.008

Progress = Callable[[float], None]


@dataclass(frozen=True)
class AdaptConfig:
    """How a person's speech models are learned."""

    fine_tune_from_s: float = 10.0  # seconds of speech; with less, only mean face and gain are adapted
    steps: int = 120
    learning_rate: float = 5e-4
    alone_steps: int = 300  # without generic models
    alone_learning_rate: float = 2e-3
    alone_ridge: float = 200.0  # of the linear prediction
    validation: float = 0.15  # share of the training part, at its end
    gain_prior_s: float = 4.0  # seconds of speech that the usual gain weighs
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)  # of the amount of motion
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SpeechExample:
    """One recording of one speaker, sound and picture in sync.

    features    "v 2*t d"  of the sound; v variants (other loudness, other window phase) of which training draws one
    expression  "t 64"
    landmarks   "t 478 3"  canonical
    speaking    "t"        where there is sound
    """

    speaker: str
    features: Float[Tensor, "v s d"]
    expression: Float[Tensor, "t 64"]
    landmarks: Float[Tensor, "t 478 3"]
    speaking: Bool[Tensor, "t"]

    def __len__(self) -> int:
        return len(self.expression)

    def __getitem__(self, frames: slice) -> "SpeechExample":
        start, stop, step = frames.indices(len(self))
        assert step == 1, frames
        return replace(
            self,
            features=self.features[:, FEATURES_PER_FRAME * start : FEATURES_PER_FRAME * stop],
            expression=self.expression[frames],
            landmarks=self.landmarks[frames],
            speaking=self.speaking[frames],
        )

    @property
    def subject(self) -> Subject:
        """Mean face and identity frames, with gains of 1."""
        return Subject.of(self.expression, self.landmarks, self.speaking)

    def displacements(self, subject: Subject) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 1434"]]:
        """Expression and landmarks minus the subject's mean face."""
        return self.expression - subject.expression, (self.landmarks - subject.landmarks).flatten(1)


def speaking_frames(samples: Float[np.ndarray, "n"], frames: int) -> Bool[Tensor, "t"]:
    """Where a frame or one within 120 ms of it is louder than 8 % of the loudest."""
    padded = np.zeros(frames * SAMPLES_PER_FRAME, np.float32)
    padded[: min(len(samples), len(padded))] = samples[: len(padded)]
    rms = frame_rms(padded)
    active = rms > max(0.08 * np.percentile(rms, 95), 1e-3) if frames else np.zeros(0, bool)
    return torch.from_numpy(np.convolve(active, np.ones(7), "same") > 0 if frames else active)


def example_of(clip: "Clip", encoder: EncoderSpec) -> SpeechExample:
    """The training part of a clip. Without sound, or with silence, its features have no length."""
    train = slice(clip.train.start, clip.train.stop)
    motion = clip.track.motion[train]
    samples = clip.audio()
    speaking = torch.zeros(len(motion), dtype=torch.bool)
    if samples is not None:
        speaking = speaking_frames(samples[: SAMPLES_PER_FRAME * train.stop], train.stop)[train]
        speaking &= torch.from_numpy(clip.usable[train])
    features = clip.speech_features(encoder) if speaking.any() else None
    features = torch.zeros(0, encoder.dim) if features is None else features[2 * train.start : 2 * train.stop]
    return SpeechExample("subject", features[None], motion.expression, motion.landmarks, speaking)


def load_generic(path: Path | str = GENERIC) -> SpeechModels:
    """Generic models, by default those that ship. Their subject is the mean of their speakers.

    Raises FileFormatError where the file is damaged.
    """
    tensors, config = load_tensors(path, SCHEMA, VERSION)
    return SpeechModels.from_state(tensors, config)


@dataclass(frozen=True)
class AdaptReport:
    """What learning did. Errors are RMS of the mouth in mm, free-running, on the validation part.

    Pairs are (expression, landmarks). `still_mm`: of a mouth that does not move; `start_mm`: before fine-tuning.
    """

    speech_s: float
    gain: tuple[float, float]
    still_mm: tuple[float, float]
    start_mm: tuple[float, float]
    final_mm: tuple[float, float]
    fine_tuned: tuple[bool, bool]


def learn_speech_models(
    example: SpeechExample,
    encoder: EncoderSpec,
    generic: SpeechModels,
    config: AdaptConfig = AdaptConfig(),
    progress: Progress | None = None,
) -> tuple[SpeechModels, AdaptReport]:
    """A person's models for features of `encoder`, from the training part of their clip.

    Generic models of the same encoder are adapted: mean face and gain, and from `fine_tune_from_s` seconds of speech
    also weights, kept only if validation improves. For another encoder the models are learned from the clip alone.
    Without speech, the generic models get the person's mean face and amplitude. Raises TrainingError for values that
    are not finite.
    """
    for name in ("features", "expression", "landmarks"):
        bad = int((~getattr(example, name).isfinite()).sum())
        if bad:
            raise TrainingError(
                f"The {name} that speech is to be learned from hold {bad} values that are not finite. "
                "Prepare the clip again: hicode prepare."
            )
    subject = Subject.of(example.expression, example.landmarks, example.speaking, config.seed)
    subject = replace(subject, closed_gap=closed_gap(example.landmarks, example.speaking))
    if not example.speaking.any():
        return _without_speech(example, subject, generic, config)
    assert example.features.shape[-1] == encoder.dim, (example.features.shape, encoder)
    adapting = encoder == generic.encoder
    learned = []
    for k in (0, 1):
        report = None if progress is None else lambda done, k=k: progress((k + done) / 2)
        part = _Part.of(k, example, subject, config)
        if adapting:
            start = (generic.expression, generic.landmarks)[k]
            learned.append(_best(part, start, start.config, config, report))
        else:
            start = part.closed_form(encoder.dim, config.alone_ridge)
            alone = replace(config, steps=config.alone_steps, learning_rate=config.alone_learning_rate)
            learned.append(_best(part, start, replace(start.config, linear_share=0.5), alone, report))
        if progress:
            progress((k + 1) / 2)
    a, b = learned
    subject = replace(subject, expression_gain=a.gain, landmark_gain=b.gain)
    closure = generic.closure if adapting else closure_of(a.model, example)
    models = SpeechModels(a.model, b.model, encoder, subject, closure)
    models.calibration = calibrate(models, example, generic, config.calibration)
    return models, AdaptReport(
        speech_s=float(example.speaking.sum()) / FPS,
        gain=(a.gain, b.gain),
        still_mm=(a.still_mm, b.still_mm),
        start_mm=(a.start_mm, b.start_mm),
        final_mm=(a.final_mm, b.final_mm),
        fine_tuned=(a.fine_tuned, b.fine_tuned),
    )


def _without_speech(
    example: SpeechExample, subject: Subject, generic: SpeechModels, config: AdaptConfig
) -> tuple[SpeechModels, AdaptReport]:
    pair = generic.expression, generic.landmarks
    moved = example.displacements(subject)
    gains = [
        usual_gain(m, d, example.speaking, metric) for m, d, metric in zip(pair, moved, mouth_metrics(), strict=True)
    ]
    subject = replace(subject, expression_gain=gains[0], landmark_gain=gains[1])
    nothing = float("nan"), float("nan")
    models = SpeechModels(*pair, generic.encoder, subject, generic.closure)
    models.calibration = calibrate(models, example, generic, config.calibration)
    return models, AdaptReport(0.0, (gains[0], gains[1]), nothing, nothing, nothing, (False, False))


@dataclass(frozen=True, eq=False)
class _Part:
    """What the Faceformer of the expression, or that of the landmarks, is learned from.

    The first `cut` frames are learned from, the others validate.
    """

    example: SpeechExample
    target: Float[Tensor, "t n"]
    metric: Metric
    identity_frames: Float[Tensor, "20 478 3"] | None
    cut: int

    @staticmethod
    def of(index: int, example: SpeechExample, subject: Subject, config: AdaptConfig) -> "_Part":
        cut = len(example) - min(max(25, round(config.validation * len(example))), len(example) // 2)
        faces = subject.identity_frames if index else None
        return _Part(example, example.displacements(subject)[index], mouth_metrics()[index], faces, cut)

    def error_mm(self, displacement: Float[Tensor, "t n"]) -> float:
        return 100 * amplitude(displacement[self.cut :] - self.target[self.cut :], self.metric)

    def closed_form(self, feature_dim: int, ridge: float) -> Faceformer:
        """A Faceformer of this speaker whose linear prediction says everything."""
        features, target = self.example.features[:, : 2 * self.cut], self.target[: self.cut]
        speaking = self.example.speaking[: self.cut]
        used = speaking if speaking.sum() >= MIN_SPEECH_FRAMES else torch.ones_like(speaking)
        components = min(FaceformerConfig().components, int(used.sum()) - 1)
        shape = FaceformerConfig(
            feature_dim=feature_dim, outputs=target.shape[1], components=components, linear_share=1.0
        )
        model = Faceformer(shape)
        rows = features[0][used.repeat_interleave(FEATURES_PER_FRAME)]
        model.feature_mean.copy_(rows.mean(0))
        model.feature_std.copy_(rows.std(0) + 1e-3)
        model.basis.copy_(fit_basis([target[used]], components, self.metric))
        model.amplitude.fill_(amplitude(target[used], self.metric))
        fit_linear(model, [SpeechTask(features, to_coefficients(target, model.basis, self.metric))], ridge)
        return model.eval()


@dataclass(frozen=True, eq=False)
class _Learned:
    model: Faceformer
    gain: float
    still_mm: float
    start_mm: float
    final_mm: float
    fine_tuned: bool


def _best(
    part: _Part, start: Faceformer, tuned_shape: FaceformerConfig, config: AdaptConfig, progress: Progress | None
) -> _Learned:
    """The best on validation: `start` with its usual or a fitted gain, or a fine-tuned copy."""
    learned, target = part.example[: part.cut], part.target[: part.cut]
    predicted = predict_displacement(start, part.example.features[0], part.identity_frames)
    usual = usual_gain(start, target, learned.speaking, part.metric)
    # Least squares make badly predicted speakers mumble, for an error that hardly falls: never below the usual gain.
    gain = max(fit_gain(predicted[: part.cut], target, part.metric, config.gain_prior_s, usual), usual)
    candidates = [(part.error_mm(g * predicted), g, start) for g in (usual, gain)]
    if float(part.example.speaking.sum()) / FPS >= config.fine_tune_from_s:
        tuned = fine_tune(start, tuned_shape, learned, target, part.metric, config, progress)
        predicted = predict_displacement(tuned, part.example.features[0], part.identity_frames)
        gain = fit_gain(predicted[: part.cut], target, part.metric, config.gain_prior_s, usual)
        candidates.append((part.error_mm(gain * predicted), gain, tuned))
    error, gain, model = min(candidates, key=lambda c: c[0])
    still = part.error_mm(torch.zeros_like(part.target))
    return _Learned(model, gain, still, candidates[0][0], error, fine_tuned=model is not start)


def usual_gain(model: Faceformer, target: Float[Tensor, "t n"], speaking: Bool[Tensor, "t"], metric: Metric) -> float:
    """The person's amplitude over that of the speaker whom the model imitates, within a factor of two."""
    used = speaking if speaking.sum() >= MIN_SPEECH_FRAMES else torch.ones_like(speaking)
    return float(np.clip(amplitude(target[used], metric) / max(float(model.amplitude), 1e-9), 0.5, 2.0))


def fit_gain(
    predicted: Float[Tensor, "t n"],
    target: Float[Tensor, "t n"],
    metric: Metric,
    prior_s: float,
    prior_gain: float = 1.0,
) -> float:
    """The factor on a prediction that is nearest the target, drawn to `prior_gain` as by `prior_s` s of speech."""
    p, y = metric(predicted), metric(target)
    prior = FPS * prior_s * float(p.square().sum(-1).mean())
    return float(((p * y).sum() + prior * prior_gain) / (p.square().sum() + prior).clamp(min=1e-12))


def fine_tune(
    model: Faceformer,
    shape: FaceformerConfig,
    example: SpeechExample,
    target: Float[Tensor, "t n"],
    metric: Metric,
    config: AdaptConfig,
    progress: Progress | None = None,
) -> Faceformer:
    """A copy of that shape, trained on one person; few steps at a low rate keep it near the generic one."""
    copy = Faceformer(shape)
    copy.load_state_dict(model.state_dict())
    style = None
    if shape.style_components:
        subject = Subject.of(example.expression, example.landmarks, example.speaking, config.seed)
        style = copy.project_identity(subject.identity_frames)
    task = SpeechTask(example.features, to_coefficients(target, copy.basis, metric), style)
    training = FaceformerTraining(
        steps=config.steps, batch=8, learning_rate=config.learning_rate, style_dropout=0.0, seed=config.seed
    )
    train_faceformer(copy, [task], metric, training, progress)
    if shape.linear_share:
        fit_linear(copy, [task], training.linear_ridge)
    return copy


def closure_of(model: Faceformer, example: SpeechExample) -> LipClosure | None:
    """Lip closure learned from one person's clip; None if their lips are hardly ever closed, or hardly ever open."""
    gap = lip_gap(example.landmarks)
    closed = gap < max(closed_gap(example.landmarks, example.speaking) + CLOSED_MARGIN, CLOSED_GAP)
    in_speech = int((closed & example.speaking).sum())
    if not MIN_SPEECH_FRAMES <= in_speech <= int(example.speaking.sum()) - MIN_SPEECH_FRAMES:
        return None
    c = model.config
    closure = LipClosure(ClosureConfig(c.feature_dim, c.linear_back, c.look_ahead))
    fit_closure(model, closure, [ClosureRows(example.features[0], closed, 1.0)], [example.features[0]])
    set_closing_motion(closure, closing_moment(example.expression, gap, example.speaking))
    return closure
