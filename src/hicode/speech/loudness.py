"""Loudness of speech: the level that features are normalised by, and that silence is measured against.

A level is an RMS at a full scale of 1. t frames, of 20 or 40 ms.
"""

import math

import numpy as np
from jaxtyping import Float

from hicode.audio import FEATURE_RATE_HZ, SAMPLES_PER_FEATURE, DcBlocker, frame_rms

# -54 dB of full scale. A quieter sound counts as silence and is not amplified further.
MIN_LEVEL = 2e-3


def speech_level(samples: Float[np.ndarray, "n"]) -> float:
    """Level of a sound's speech: RMS of its louder 20 ms frames, so that pauses do not count. At least MIN_LEVEL."""
    return level_of_frames(frame_rms(DcBlocker()(samples), SAMPLES_PER_FEATURE))


def level_of_frames(rms: Float[np.ndarray, "t"]) -> float:
    """`speech_level` from the RMS of 20 ms frames, for a sound too long to hold.

    Frames above a tenth of the 95th percentile are averaged.
    """
    if len(rms) == 0:
        return MIN_LEVEL
    loud = rms[rms > 0.1 * np.percentile(rms, 95)]
    return max(float(np.sqrt((loud**2).mean())) if len(loud) else 0.0, MIN_LEVEL)


class LoudnessEstimator:
    """Speech level of a sound that is still coming: a mean over active frames with a half-life of 20 s.

    It starts from a typical speech level (-26 dB) that weighs as much as one second and fades within a few seconds of
    speech. A frame is active if it is less than 20 dB below the loudest and more than 8 dB above the noise floor: a
    room's hum says nothing about the voice.
    """

    PRIOR_LEVEL = 0.05
    ABOVE_FLOOR = 2.5
    MIN_FLOOR = 1e-4

    def __init__(self, rate_hz: float = FEATURE_RATE_HZ):
        self._decay = 0.5 ** (1 / (20 * rate_hz))
        self._prior_weight, self._prior_decay = float(rate_hz), 0.5 ** (2 / rate_hz)  # halves every .5 s of speech
        # 6 dB a second: reaches a noise that became louder within seconds, and hardly rises within a word.
        self._floor_rise = 10 ** (6 / 20 / rate_hz)
        self._power, self._weight, self._peak, self._floor = 0.0, 0.0, 0.0, math.inf

    @property
    def level(self) -> float:
        """The estimate so far."""
        power = self.PRIOR_LEVEL**2 * self._prior_weight + self._power
        return max(math.sqrt(power / (self._prior_weight + self._weight)), MIN_LEVEL)

    def update(self, rms: Float[np.ndarray, "t"]) -> float:
        """The level after these frames."""
        for value in map(float, rms):
            self._peak = max(self._peak * self._decay, value)
            self._floor = max(min(value, self._floor * self._floor_rise), self.MIN_FLOOR)
            if value > 0.1 * self._peak and value > MIN_LEVEL and value > self.ABOVE_FLOOR * self._floor:
                self._power = self._power * self._decay + value**2
                self._weight = self._weight * self._decay + 1
                self._prior_weight *= self._prior_decay
        return self.level
