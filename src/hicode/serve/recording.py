"""What was said last, as an MP4: the pictures and the sound that were sent, signed."""

import logging
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from hicode.audio import FPS, VIDEO_SAMPLE_RATE_HZ
from hicode.media.video import VideoWriter
from hicode.serve.live import LiveSession, LiveTick
from hicode.trust.marks import sign_video

log = logging.getLogger(__name__)

QUEUED = 50  # ticks that wait for the encoder; beyond it the recording is given up: one with a hole is none
MAX_FRAMES = 120 * 25
GAP = 10  # silent ticks that end a recording


class _GivenUp(Exception):
    """The recording is not to be kept."""


class Recorder:
    """Records one utterance at a time on a thread of its own; `path` is the last one that is whole."""

    def __init__(self, folder: Path, session: LiveSession):
        self._folder, self._session = folder, session
        self._queue: queue.Queue[LiveTick | type[_GivenUp] | None] | None = None  # of the recording that goes on
        self._threads: list[threading.Thread] = []
        self._begun = self._frames = self._quiet = 0
        self._new = False
        self.path: Path | None = None

    def add(self, tick: LiveTick) -> bool:
        """The next tick that was sent; True once for each recording that has become whole."""
        if self._queue is None and tick.speaking:
            self._queue = queue.Queue()
            self._begun, self._frames, self._quiet = self._begun + 1, 0, 0
            thread = threading.Thread(target=self._record, args=(self._queue, self._begun), daemon=True)
            self._threads = [other for other in self._threads if other.is_alive()] + [thread]
            thread.start()
        if self._queue is not None:
            self._frames += 1
            self._quiet = 0 if tick.speaking else self._quiet + 1
            self._queue.put(tick)
            if self._queue.qsize() > QUEUED:
                self._end(_GivenUp)
            elif self._quiet > GAP or self._frames >= MAX_FRAMES:
                self._end(None)
        new, self._new = self._new, False
        return new

    def _end(self, last: type[_GivenUp] | None) -> None:
        if self._queue is not None:
            self._queue.put(last)
            self._queue = None

    def _record(self, ticks: queue.Queue, number: int) -> None:
        try:
            path = self._write(ticks, self._folder / f"{id(self)}-{number}.mp4")
        except _GivenUp:
            return
        except Exception:  # a full disk, say: the conversation goes on
            log.exception("a recording was lost")
            return
        old, self.path, self._new = self.path, path, True
        if old is not None:
            old.unlink(missing_ok=True)

    def _write(self, ticks: queue.Queue, path: Path) -> Path:
        sound: list[np.ndarray] = []

        def pieces() -> Iterator[np.ndarray]:
            while sound:
                yield sound.pop(0).astype(np.float32) / 32768

        tick = _taken(ticks)
        assert tick is not None
        height, width = tick.picture.shape[0] * 2 // 3, tick.picture.shape[1]
        options = {"crf": 20, "preset": "ultrafast", "threads": 1}  # beside a renderer: what costs least
        with VideoWriter(path, width, height, FPS, pieces(), VIDEO_SAMPLE_RATE_HZ, **options) as video:
            while tick is not None:
                sound.append(tick.audio)
                video.write(cv2.cvtColor(tick.picture, cv2.COLOR_YUV2RGB_I420))
                tick = _taken(ticks)
        if self._session.hello is not None:
            sign_video(path, self._session.hello.record)
        return path

    def close(self) -> None:
        """Give up what is not whole, and remove the rest."""
        self._end(_GivenUp)
        for thread in self._threads:
            thread.join(20)
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _taken(ticks: queue.Queue) -> LiveTick | None:
    """The next tick; None at the end."""
    tick = ticks.get()
    if tick is _GivenUp:
        raise _GivenUp
    return tick
