"""Steady noise, subtracted from the mel power of a sound that has much of it.

t frames at 100 Hz, m mel bands. A low quantile of each band's power, tracked in small steps, estimates the noise. It
needs no pauses and no look-ahead, and its state is three numbers a band. Quiet recordings are left alone: models that
learned with room noise do worse without it. So the noise's share of the mean power decides how much is subtracted.
"""

import numpy as np
from jaxtyping import Float


class NoiseReducer:
    """Power in pieces of any size, in and out.

    The noise is `OVER` times the `QUANTILE` of the power of the last few seconds. At least the share `FLOOR` of a band
    remains, since empty bands disturb an encoder more than noisy ones. Nothing is subtracted while the noise's share of
    the mean power (half-life 20 s) is below the first of `SHARES`, all of it from the second on. The sound is at level
    1 (`loudness.speech_level`). After digital silence the quantile starts anew, with larger steps.
    """

    # Chosen by mouth opening at 10 dB SNR, on unseen speakers.
    QUANTILE, OVER, FLOOR = 0.3, 1.2, 0.3
    # Nepers of power a frame: 8 dB a second upwards, 18 downwards.
    STEP, FIRST_STEP, SETTLED_FRAMES = 0.06, 2.0, 15.0
    SHARES = (0.03, 0.07)  # -15 and -11.5 dB. Quiet recordings have .00-.03, those with 10 dB SNR .06-.11.
    FORGET = 0.5 ** (1 / 2000)
    # The mean power of speech at level 1, summed over the bands, and how many frames that expectation weighs.
    SPEECH, PRIOR = 500.0, 300
    NOTHING = 1.01e-6  # power of a band in digital silence, as log-mel features have it

    def __init__(self):
        self._age = 0
        self._smooth = self._log = np.zeros(0, np.float32)
        self._sum, self._weight = self.SPEECH * self.PRIOR, float(self.PRIOR)

    def __call__(self, power: Float[np.ndarray, "t m"]) -> Float[np.ndarray, "t m"]:
        """The power without the noise."""
        out = power.copy()
        low, high = self.SHARES
        for now, result in zip(power, out, strict=True):
            if not (now > self.NOTHING).any():
                self._age = 0
                continue
            noise = self._noise(now)
            self._sum = self._sum * self.FORGET + float(now.sum())
            self._weight = self._weight * self.FORGET + 1
            amount = (float(noise.sum()) * self._weight / max(self._sum, 1e-30) - low) / (high - low)
            if amount > 0:
                reduced = np.maximum(now - np.float32(self.OVER) * noise, np.float32(self.FLOOR) * now)
                result += np.float32(min(amount, 1.0)) * (reduced - now)
        return out

    def _noise(self, now: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
        """The quantile after this frame."""
        self._smooth = now if self._age == 0 else 0.5 * (self._smooth + now)
        smooth = np.log(self._smooth + np.float32(1e-10))
        if self._age == 0:
            self._log = smooth - 1
        step = self.STEP + (self.FIRST_STEP - self.STEP) * np.exp(-self._age / self.SETTLED_FRAMES)
        self._log = self._log + np.float32(step) * (np.float32(self.QUANTILE) - (smooth < self._log))
        self._age += 1
        return np.exp(self._log)
