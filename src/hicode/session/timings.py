"""Where the time of speaking goes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields


@dataclass
class Timings:
    """CPU seconds of all frames so far, each of the thread that did the work: together more than the wall clock's."""

    features: float = 0.0  # speech features
    faceformers: float = 0.0  # speech to mouth motion, VAD gate
    driving: float = 0.0  # decoding the driving frame and its mask
    deform: float = 0.0
    rasterise: float = 0.0
    composite: float = 0.0
    encode: float = 0.0  # original size and video encoding
    frames: int = 0  # rendered

    def __post_init__(self):
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return ", ".join(f"{part} {ms:.1f}" for part, ms in self.ms_per_frame().items()) + " ms a frame"

    def ms_per_frame(self) -> dict[str, float]:
        """CPU ms of each part, over the frames that were rendered."""
        each = 1000 / max(self.frames, 1)
        return {f.name: each * getattr(self, f.name) for f in fields(self) if f.name != "frames"}

    def count(self) -> None:
        """One more frame."""
        with self._lock:
            self.frames += 1

    @contextmanager
    def clocked(self, name: str) -> Iterator[None]:
        """Add the time that this thread works inside."""
        started = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                setattr(self, name, getattr(self, name) + time.thread_time() - started)
