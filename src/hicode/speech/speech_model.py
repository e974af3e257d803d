"""The speech models of an avatar: two Faceformers, lip closure, and what is the subject's own.

s features at 50 Hz, t or m frames at 25 fps, d feature dimensions. One Faceformer predicts the 64 expression
parameters, the other the 478 canonical landmarks; both predict displacements from the subject's mean face.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.audio import FEATURES_PER_FRAME
from hicode.errors import FileFormatError
from hicode.motion import EXPRESSION_DIM, N_LANDMARKS
from hicode.speech.decoder import FaceformerStream, FrameConvolution, to_array
from hicode.speech.encoders import AudioEncoder, EncoderSpec, encoder_of
from hicode.speech.faceformer import Faceformer, FaceformerConfig
from hicode.speech.lip_closure import ClosureConfig, LipClosure, lip_gap
from hicode.speech.mouth_calibration import MouthCalibration

IDENTITY_FRAMES = 20
# With fewer frames of speech, statistics are taken over all frames.
MIN_SPEECH_FRAMES = 12


class SpokenMotion(NamedTuple):
    """Motion that speech gives."""

    expression: Float[Tensor, "t 64"]
    landmarks: Float[Tensor, "t 478 3"]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is a speaker's own.

    expression       "64"        mean over the frames in which they speak
    landmarks        "478 3"     likewise, canonical, dm
    identity_frames  "20 478 3"  drawn with a fixed seed
    expression_gain, landmark_gain  amplitude against the speaker that the Faceformers imitate
    closed_gap       what tracking shows of their closed lips, dm
    """

    expression: Float[Tensor, "64"]
    landmarks: Float[Tensor, "478 3"]
    identity_frames: Float[Tensor, "20 478 3"]
    expression_gain: float = 1.0
    landmark_gain: float = 1.0
    closed_gap: float = 0.006

    @staticmethod
    def of(
        expression: Float[Tensor, "t 64"],
        landmarks: Float[Tensor, "t 478 3"],
        speaking: Bool[Tensor, "t"],
        seed: int = 0,
    ) -> "Subject":
        """The statistics of tracked frames."""
        used = speaking if speaking.sum() >= MIN_SPEECH_FRAMES else torch.ones_like(speaking)
        rng = np.random.default_rng(seed)
        chosen = rng.choice(len(landmarks), IDENTITY_FRAMES, replace=len(landmarks) < IDENTITY_FRAMES)
        return Subject(expression[used].mean(0), landmarks[used].mean(0), landmarks[np.sort(chosen)].clone())

    @property
    def usual_gap(self) -> float:
        """Between the lips of the mean face, dm."""
        return float(lip_gap(self.landmarks))


@dataclass(eq=False)
class SpeechModels:
    """Features of `encoder` in, the subject's motion out.

    closure      None if the models never learned it
    calibration  gives the person's own amount of motion; None: what least squares predict
    people       how much people move their mouths, and how much is predicted of it: a prior that generic models have
    """

    expression: Faceformer
    landmarks: Faceformer
    encoder: EncoderSpec
    subject: Subject
    closure: LipClosure | None = field(default=None)
    calibration: MouthCalibration | None = field(default=None)
    people: MouthCalibration | None = field(default=None)

    def __post_init__(self):
        pair = self.expression.config, self.landmarks.config
        assert pair[0].outputs == EXPRESSION_DIM and pair[1].outputs == 3 * N_LANDMARKS, pair
        assert pair[0].feature_dim == pair[1].feature_dim == self.encoder.dim, (pair, self.encoder)
        self.expression.eval()
        self.landmarks.eval()

    @property
    def look_ahead(self) -> int:
        """Frames of sound that must follow a frame before it is complete, besides the encoder's latency."""
        ahead = self.closure.config.ahead if self.closure else 0
        return max(self.expression.config.look_ahead, self.landmarks.config.look_ahead, ahead)

    def encoder_for(self, weights: str | Path | None = None) -> AudioEncoder:
        """The encoder whose features the models take. `weights`: where its weights lie now, if they were moved.

        Raises InputError where they are gone or are others.
        """
        return encoder_of(self.encoder, weights)

    def predict(self, features: Float[Tensor, "s d"]) -> SpokenMotion:
        """Expression and canonical landmarks of every frame of a sound: the stream, drained."""
        stream = self.stream()
        parts = stream.push(features), stream.finish()
        return SpokenMotion(torch.cat([p.expression for p in parts]), torch.cat([p.landmarks for p in parts]))

    def stream(self) -> "SpeechStream":
        """Motion of a sound that is still coming."""
        return SpeechStream(self)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON-able config), from which `from_state` makes the same models."""
        modules = {"expression": self.expression, "landmarks": self.landmarks, "closure": self.closure}
        tensors = {f"{part}.{k}": v for part, m in modules.items() if m is not None for k, v in m.state_dict().items()}
        subject = dict(self.subject.__dict__)
        tensors |= {f"subject.{k}": subject.pop(k) for k in ("expression", "landmarks", "identity_frames")}
        for name, maps in (("calibration", self.calibration), ("people", self.people)):
            tensors |= {f"{name}.{k}": v for k, v in (maps.__dict__ if maps else {}).items()}
        config = {part: asdict(m.config) for part, m in modules.items() if m is not None}
        return tensors, config | {"encoder": self.encoder.to_json(), "subject": subject}

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "SpeechModels":
        """The inverse of `state`. Half-precision tensors are read as float32.

        Raises FileFormatError where something is missing.
        """
        try:
            expression, landmarks = (Faceformer(FaceformerConfig(**config[k])) for k in ("expression", "landmarks"))
            closure = None
            if "closure" in config:
                closure = LipClosure(ClosureConfig(**_with_tuples(config["closure"])))
                closure.load_state_dict(_part(tensors, "closure"))
            expression.load_state_dict(_part(tensors, "expression"))
            landmarks.load_state_dict(_part(tensors, "landmarks"))
            subject = Subject(**_part(tensors, "subject"), **config["subject"])
            parts = (_part(tensors, name) for name in ("calibration", "people"))
            maps = [MouthCalibration(**part) if part else None for part in parts]
            encoder = EncoderSpec.from_json(config["encoder"])
            return SpeechModels(expression, landmarks, encoder, subject, closure, *maps)
        except (KeyError, TypeError, RuntimeError, AssertionError) as error:
            raise FileFormatError(
                f"The speech models are damaged or from another version ({error!s:.200}). Train the avatar anew."
            ) from error


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(name + "."): v.float() for k, v in tensors.items() if k.startswith(name + ".")}


def _with_tuples(config: dict) -> dict:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


class SpeechStream:
    """Features in pieces of any size, motion out: both Faceformers and the closure, in step."""

    def __init__(self, models: SpeechModels):
        self.models = models
        style = models.landmarks.identity_style(models.subject.identity_frames).detach()
        self._expression = FaceformerStream(models.expression, models.expression.identity_style(None).detach())
        self._landmarks = FaceformerStream(models.landmarks, style)
        self._closure = None
        if (closure := models.closure) is not None:
            self._closure = FrameConvolution(
                models.expression, closure.weight, closure.bias, back=closure.config.back, ahead=closure.config.ahead
            )
        # Expression, landmarks and closure probability that wait for each other.
        self._pending = (torch.zeros(0, EXPRESSION_DIM), torch.zeros(0, 3 * N_LANDMARKS), torch.zeros(0))
        self._last: Tensor | None = None
        self._received = 0

    def push(self, features: Float[Tensor, "s d"]) -> SpokenMotion:
        """Motion of the frames that became complete."""
        encoder = self.models.encoder
        assert features.shape[-1] == encoder.dim, f"{features.shape[-1]} feature dimensions, expected {encoder}"
        self._received += len(features)
        if len(features):
            self._last = features[-1:]
        return self._emit(*self._advance(features))

    def finish(self) -> SpokenMotion:
        """The remaining frames. A last half frame is completed by repeating its feature."""
        parts = []
        if self._received % FEATURES_PER_FRAME and self._last is not None:
            parts.append(self._advance(self._last))
        expression, landmarks = self._expression.finish(), self._landmarks.finish()
        if self._closure:
            self._closure.finish()
        parts.append((expression, landmarks, self._closed()))
        return self._emit(*map(torch.cat, zip(*parts, strict=True)))

    def _advance(self, features: Float[Tensor, "s d"]) -> tuple[Tensor, Tensor, Tensor]:
        if self._closure:
            self._closure.push(to_array(features))
        return self._expression.push(features), self._landmarks.push(features), self._closed()

    def _closed(self) -> Float[Tensor, "m"]:
        if not self._closure or not self._closure.ready:
            return torch.zeros(0)
        return torch.from_numpy(self._closure.take(self._closure.ready)[:, 0]).sigmoid()

    def _emit(self, *new: Tensor) -> SpokenMotion:
        """Frames of which all parts are here: about the subject's mean face, with closed lips and the right amount."""
        parts = [torch.cat(pair) for pair in zip(self._pending, new, strict=True)]
        ready = min(len(x) for x in (parts if self._closure else parts[:2]))
        self._pending = tuple(x[ready:] for x in parts)
        expression, landmarks, probability = (x[:ready] for x in parts)
        subject, closure, calibration = self.models.subject, self.models.closure, self.models.calibration
        expression = subject.expression + subject.expression_gain * expression
        landmarks = subject.landmarks + subject.landmark_gain * landmarks.unflatten(1, (N_LANDMARKS, 3))
        if closure is not None:
            expression, landmarks = closure.close(
                probability, expression, landmarks, subject.closed_gap, subject.usual_gap
            )
        if calibration is not None:
            expression, landmarks = calibration(expression, landmarks)
        return SpokenMotion(expression, landmarks)
