"""Driving: which part of the motion comes from speech, and which from the driving video.

Speech moves the mouth and the jaw; head pose, eyes, brows and upper face are the driving track's, since sound does not tell them (blinks
least of all). Where nobody speaks the lips rest. t frames at 25 fps; 640 samples of 16 kHz sound a frame.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.motion import LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, Motion
from hicode.speech.encoder import RunningLevel


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
    """When lips rest.

    closed_db, open_db: of a frame's RMS against the speech level: at and below the first the mouth rests, at and above the second speech has it
                        wholly, where loudness alone must tell
    heard_closed_db, heard_open_db: likewise where speech is told from other sound by a score: only what is as good as inaudible counts as silence,
                        so that soft parts of sentences keep their lips
    closed_score, open_score: likewise of that score, a logit (`speech/presence.py`). Speech's lips at rest are worse than lips that stir in noise:
                        it takes a probability of 5 % or less to close them wholly
    look_ahead:         frames by which the mouth wakes before the sound: lips move first
    attack, release:    frames from rest to speech and back
    hold:               frames of silence before the release begins, so that the closure of a p, b or m is not taken for one
    """

    closed_db: float = -34.0
    open_db: float = -24.0
    heard_closed_db: float = -46.0
    heard_open_db: float = -38.0
    closed_score: float = -3.0
    open_score: float = -1.0
    look_ahead: int = 3
    attack: int = 2
    release: int = 6
    hold: int = 4


class SilenceGate:
    """How much of each frame's mouth is speech's, in [0, 1]: levels in, gates out `look_ahead` frames later.

    `level` is the speech's RMS; where it is not known, a running estimate (`RunningLevel`). `heard`: scores of speech come beside the levels; a gate
    is known when both are.
    """

    def __init__(self, level: float | None = None, config: SilenceConfig = SilenceConfig(), heard: bool = False):
        assert level is None or level > 0, level
        self.config, self._heard = config, heard
        self._level, self._running = level, RunningLevel(rate_hz=25)
        self._closed_db, self._open_db = (
            (config.heard_closed_db, config.heard_open_db) if heard else (config.closed_db, config.open_db)
        )
        self._coming: list[float] = []
        self._speech: list[float] = []
        self._gate, self._quiet = 0.0, 0

    def push(self, rms: Float[np.ndarray, "k"], scores: Float[np.ndarray, "j"] = ()) -> Float[np.ndarray, "m"]:
        """Frame RMS of the next frames, and scores of the next frames that have none yet; the gates that became known."""
        c = self.config
        for value in np.asarray(rms, np.float64):
            level = self._running.level if self._level is None else self._level
            db = 20 * np.log10(max(value, 1e-9) / level)
            self._coming.append(_share(db, self._closed_db, self._open_db))
            if self._level is None:
                self._running.update([value])
        self._speech += [_share(score, c.closed_score, c.open_score) for score in scores]
        ready = max(0, len(self._coming) - c.look_ahead)
        if self._heard:
            ready = min(ready, len(self._speech))
        gates = [self._next(self._wanted(i)) for i in range(ready)]
        self._coming, self._speech = self._coming[ready:], self._speech[ready:]
        return np.array(gates, np.float32)

    def finish(self) -> Float[np.ndarray, "m"]:
        """The remaining gates, as if silence followed."""
        return self.push(np.zeros(self.config.look_ahead))

    def _wanted(self, i: int) -> float:
        loud = max(self._coming[i : i + self.config.look_ahead + 1])
        return min(loud, self._speech[i]) if self._heard else loud

    def _next(self, wanted: float) -> float:
        c = self.config
        if wanted >= self._gate:
            self._gate, self._quiet = min(wanted, self._gate + 1 / c.attack), 0
        else:
            self._quiet += 1
            if self._quiet > c.hold:
                self._gate = max(wanted, self._gate - 1 / c.release)
        return self._gate * self._gate * (3 - 2 * self._gate)  # eased, so that neither end is a jerk


def _share(value: float, closed: float, open: float) -> float:
    return float(np.clip((value - closed) / (open - closed), 0, 1))
