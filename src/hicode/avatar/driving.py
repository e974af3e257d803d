"""Driving: which part of the motion comes from speech, and which from the driving video.

Speech moves the mouth and the jaw; head pose, eyes, brows and upper face are the driving track's, since sound does not tell them (blinks
least of all). In silence the lips rest. t frames at 25 fps; 640 samples of 16 kHz sound a frame.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.motion import LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, Motion


class MouthDrive(Protocol):
    """What says which controls speech drives: a `HeadModel` or an `Avatar`."""

    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]


def merge_motion(
    driving: Motion, expression: Float[Tensor, "t 64"], landmarks: Float[Tensor, "t 478 3"], model: MouthDrive
) -> Motion:
    """The driving motion with its mouth replaced by the spoken one.

    Expression: the dimensions of `mouth_expression` are speech's, the others the driving track's. Landmarks: blended by
    `mouth_landmark_weight`, 1 at mouth and jaw. Pose and frame rate: the driving track's. Asserts equal lengths.
    """
    assert len(driving) == len(expression) == len(landmarks), (len(driving), len(expression), len(landmarks))
    return replace(
        driving,
        expression=torch.where(model.mouth_expression, expression, driving.expression),
        landmarks=torch.lerp(driving.landmarks, landmarks, model.mouth_landmark_weight[:, None]),
    )


def resting_mouth(driving: Motion, model: MouthDrive) -> tuple[Float[Tensor, "64"], Float[Tensor, "478 3"]]:
    """The subject's mouth at rest: the mean over the tenth of the driving frames whose lips are the most closed."""
    gap = (driving.landmarks[:, UPPER_LIP_INNER] - driving.landmarks[:, LOWER_LIP_INNER]).norm(dim=-1)
    width = driving.landmarks[:, torch.from_numpy(LIPS), 0]
    # Pursed and stretched lips are closed too: of the closed frames, those of usual width are at rest.
    unusual = (width.amax(1) - width.amin(1)) / (width.amax(1) - width.amin(1)).median() - 1
    rest = (gap / gap.median().clamp_min(1e-6) + unusual.abs()).argsort()[: max(1, len(driving) // 10)]
    return driving.expression[rest].mean(0), driving.landmarks[rest].mean(0)


@dataclass(frozen=True)
class SilenceConfig:
    """When lips rest. Levels are of a frame's RMS against the speech level, in dB.

    closed_db, open_db: at and below the first the mouth rests, at and above the second speech has it wholly
    look_ahead:         frames by which the mouth wakes before the sound: lips move first
    attack, release:    frames from rest to speech and back
    hold:               frames of silence before the release begins, so that the closure of a p, b or m is not taken for one
    """

    closed_db: float = -34.0
    open_db: float = -24.0
    look_ahead: int = 3
    attack: int = 3
    release: int = 6
    hold: int = 4


class SilenceGate:
    """How much of each frame's mouth is speech's, in [0, 1]: levels in, gates out `look_ahead` frames later.

    `level` is the speech's RMS; where it is not known, an average of the frames heard so far, from a usual one (-26 dB) on.
    """

    USUAL_LEVEL = 0.05
    FORGET = 0.98  # per frame with sound: a time constant of two seconds

    def __init__(self, level: float | None = None, config: SilenceConfig = SilenceConfig()):
        assert level is None or level > 0, level
        self.config = config
        self._known, self._power = level is not None, (level or self.USUAL_LEVEL) ** 2
        self._coming: list[float] = []
        self._gate, self._quiet = 0.0, 0

    def push(self, rms: Float[np.ndarray, "k"]) -> Float[np.ndarray, "m"]:
        """Frame RMS of the next frames; the gates that became known."""
        c = self.config
        for value in np.asarray(rms, np.float64):
            db = 10 * np.log10(max(value * value, 1e-18) / self._power)
            self._coming.append(float(np.clip((db - c.closed_db) / (c.open_db - c.closed_db), 0, 1)))
            if not self._known and db > c.open_db:
                self._power = self.FORGET * self._power + (1 - self.FORGET) * value * value
        ready = max(0, len(self._coming) - c.look_ahead)
        gates = [self._next(max(self._coming[i : i + c.look_ahead + 1])) for i in range(ready)]
        self._coming = self._coming[ready:]
        return np.array(gates, np.float32)

    def finish(self) -> Float[np.ndarray, "m"]:
        """The remaining gates, as if silence followed."""
        return self.push(np.zeros(self.config.look_ahead))

    def _next(self, wanted: float) -> float:
        c = self.config
        if wanted >= self._gate:
            self._gate, self._quiet = min(wanted, self._gate + 1 / c.attack), 0
        else:
            self._quiet += 1
            if self._quiet > c.hold:
                self._gate = max(wanted, self._gate - 1 / c.release)
        return self._gate * self._gate * (3 - 2 * self._gate)  # eased, so that neither end is a jerk


def frame_rms(samples: Float[np.ndarray, "n"], samples_per_frame: int = 640) -> Float[np.ndarray, "t"]:
    """RMS of each frame's sound; a last part frame counts as if silence filled it."""
    padded = np.pad(samples, (0, -len(samples) % samples_per_frame)).reshape(-1, samples_per_frame).astype(np.float64)
    return np.sqrt((padded**2).mean(1))
