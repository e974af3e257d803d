"""Log-mel energies (Whisper's 80 bands), and the encoder that is nothing else: a baseline without learning."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.audio import SAMPLE_RATE_HZ
from hicode.speech.encoders.windowed import Window, WindowedEncoder

N_FFT, MEL_HOP, N_MELS = 400, 160, 80
# log10 of mel power at RMS 1 peaks near 2 in loud vowels; Whisper clamps 8 decades below the maximum. A fixed reference
# instead of the window's maximum keeps the value of a moment independent of its neighbours.
LOG_MEL_REFERENCE, LOG_MEL_DECADES = 2.0, 8.0


def mel_filters(n_mels: int = N_MELS, n_fft: int = N_FFT, rate_hz: int = SAMPLE_RATE_HZ) -> Float[np.ndarray, "m f"]:
    """Triangular filters on Slaney's mel scale, each of unit area in Hz.

    The scale is linear to 1 kHz, then has 27 steps per factor of 6.4.
    """
    step = math.log(6.4) / 27

    def to_mel(hz: float) -> float:
        return hz * 3 / 200 if hz < 1000 else 15 + math.log(hz / 1000) / step

    mels = np.linspace(0, to_mel(rate_hz / 2), n_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * step))
    hz = np.linspace(0, rate_hz / 2, n_fft // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangle = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return triangle * (2 / (high - low))


class MelPower:
    """Power in the mel bands: 25 ms Hann windows every 10 ms."""

    def __init__(self):
        self.filters = torch.from_numpy(mel_filters()).float()
        self.hann = torch.hann_window(N_FFT)

    def __call__(self, audio: Float[Tensor, "n"]) -> Float[Tensor, "80 t"]:
        """Frames lie wholly inside the audio: t = (n - 400) / 160 + 1, the first centred on sample 200."""
        return self.filters @ torch.fft.rfft(audio.unfold(0, N_FFT, MEL_HOP) * self.hann).abs().square().T


def log_mel(power: Float[Tensor, "80 t"]) -> Float[Tensor, "80 t"]:
    """Logarithm of mel power against the fixed reference, scaled to about [-.5, 1.5]."""
    return (power.clamp(min=10 ** (LOG_MEL_REFERENCE - LOG_MEL_DECADES)).log10() + 4) / 4


class LogMelEncoder(WindowedEncoder):
    """Two log-mel frames a feature, 160-d."""

    name, dim, window, margin = "logmel", 2 * N_MELS, Window(4, 4, 0), 120

    def __init__(self):
        self._power = MelPower()

    def _rows(self, audio: Float[Tensor, "n"], state: Any) -> Float[Tensor, "t c"]:
        # Frames are centred 80 and 240 samples into each row: the margin is 200 - 80.
        return log_mel(self._power(audio)).T.reshape(-1, self.dim)

    def _features(self, rows: Float[Tensor, "b w c"]) -> Float[Tensor, "b hop d"]:
        return rows[:, self.window.lead : self.window.lead + self.window.hop]
