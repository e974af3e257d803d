"""Steady noise, taken off the power of a sound where there is much of it.

t frames at 100 Hz, m mel bands. A low quantile of each band's power, followed by small steps, is the noise: no pause need be found, nothing is looked
ahead at, and the state is three numbers a band. Of quiet recordings nothing is taken: even a faint room's noise is missed by models that learned with
it (docs/log.md), so the share of the noise in the mean power decides, which is a usual voice's before much was heard.
"""

import numpy as np
from jaxtyping import Float


class SteadyNoise:
    """What has been there for a second, taken off a power that comes in pieces of any size.

    The noise is `OVER` times the `QUANTILE` of the power of the last few seconds; of what is above it at least the share `FLOOR` remains of all, since
    emptied bands are stranger to an encoder than noisy ones. Where its sum over the bands is less than the first of `SHARES` of the mean power
    (half-life 20 s), everything remains, from the second on it is taken off wholly. The sound's level is taken to be 1 (`loudness.speech_level`). After
    digital silence the quantile begins anew, with larger steps. Steps are in nepers of power: 8 dB a second upwards, 18 downwards.
    """

    # Chosen on unseen speakers' opening at 10 dB (docs/log.md).
    QUANTILE, OVER, FLOOR = 0.3, 1.2, 0.3
    STEP, FIRST_STEP, SETTLED_FRAMES = 0.06, 2.0, 15.0
    SHARES = (0.03, 0.07)  # -15 and -11.5 dB: recordings in quiet have .00-.03, those in noise at 10 dB .06-.11
    FORGET = 0.5 ** (1 / 2000)
    SPEECH, PRIOR = (
        500.0,
        300,
    )  # speech's mean power, summed over the bands, at a level of 1; frames that its expectation weighs
    NOTHING = 1.01e-6  # power of a band in digital silence, as log-mel features see it

    def __init__(self):
        self._age, self._smooth, self._log = 0, None, None
        self._heard, self._weight = self.SPEECH * self.PRIOR, float(self.PRIOR)

    def __call__(self, power: Float[np.ndarray, "t m"]) -> Float[np.ndarray, "t m"]:
        out = power.copy()
        low, high = self.SHARES
        for now, left in zip(power, out):
            if not (now > self.NOTHING).any():
                self._age = 0
                continue
            self._smooth = now if self._age == 0 else 0.5 * (self._smooth + now)
            smooth = np.log(self._smooth + np.float32(1e-10))
            if self._age == 0:
                self._log = smooth - 1
            step = self.STEP + (self.FIRST_STEP - self.STEP) * np.exp(-self._age / self.SETTLED_FRAMES)
            self._log = self._log + np.float32(step) * (np.float32(self.QUANTILE) - (smooth < self._log))
            self._age += 1
            noise = np.exp(self._log)
            self._heard = self._heard * self.FORGET + float(now.sum())
            self._weight = self._weight * self.FORGET + 1
            taken = (float(noise.sum()) * self._weight / max(self._heard, 1e-30) - low) / (high - low)
            if taken > 0:
                rest = np.maximum(now - np.float32(self.OVER) * noise, np.float32(self.FLOOR) * now)
                left += np.float32(min(taken, 1.0)) * (rest - now)
        return out
