"""Avatars and sound for the live adapters: light, without marks, at 24 kHz."""

import asyncio
from dataclasses import dataclass

import numpy as np

from helpers.fake_avatar import FakeAvatar, speechlike
from hicode.session.config import SpeakConfig
from hicode.trust.marks import MarkConfig

RATE_HZ = 24_000
CONFIG = SpeakConfig(output_rate_hz=RATE_HZ, mark=MarkConfig(mark="none", reason="a test"))


@dataclass
class FailingAvatar(FakeAvatar):
    """Renders `good` frames, then raises."""

    good: int = 20

    def rasterize(self, *arguments, **options):
        if self.rendered >= self.good:
            raise RuntimeError("no more pictures")
        return super().rasterize(*arguments, **options)


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    samples = np.round(20000 * speechlike(seconds * RATE_HZ / 16000, seed)).astype(np.int16)
    return samples[: round(seconds * RATE_HZ)]


def run(coroutine, limit_s: float = 120.0):
    """Run a scenario; TimeoutError where it hangs."""
    return asyncio.run(asyncio.wait_for(coroutine, limit_s))
