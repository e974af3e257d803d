"""The renderer: a process of its own that runs one `Session` by the clock.

    parent --commands--> Session --pictures in shared memory, sound with each tick--> parent

Tick i is due at start + 40 ms · i. The renderer is `LEAD` ticks early, so that the parent can send each tick when it is
due. A picture that is not ready then is repeated; its sound goes out in time. If the clock itself falls behind by more
than half a second (a suspended machine), it begins anew.
"""

import os
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hicode.audio import FPS, VIDEO_SAMPLE_RATE_HZ
from hicode.errors import HicodeError
from hicode.runtime import tune_allocator

if TYPE_CHECKING:
    from hicode.avatar.avatar import Avatar
    from hicode.session.session import Session
    from hicode.trust.marks import VideoRecord
    from hicode.trust.watermark import Watermark

TICK_S = 1 / FPS
LEAD = 2
"""Ticks between the making of a picture and its showing: what the parent may hold."""
SLOTS = 8
"""Pictures in shared memory."""
BEHIND_S = 0.5
MAX_WAITING_S = 120.0
"""Sound that may wait to be said."""
NICENESS = 15
"""Of the threads that render, so that those with a clock and the process with the sockets are punctual."""
MEASURED = 8
"""Frames that the renderer's speed is measured on."""

Source = Path | str
"""An avatar's file; or "module:function", which makes one (tests)."""


@dataclass(frozen=True)
class Hello:
    """The renderer is ready. `fps`: frames it renders a second, measured; `record`: what the marks of its video say."""

    width: int
    height: int
    memory: str
    latency_s: float
    fps: float
    record: "VideoRecord"


@dataclass(frozen=True, eq=False)
class Tick:
    """40 ms.

    slot        picture in shared memory (yuv420p); None: the last one again
    audio       int16 at 48 kHz; None: silence
    generation  interruptions before it
    late        whether its own picture was not ready
    """

    number: int
    due_s: float
    slot: int | None
    audio: bytes | None
    generation: int
    late: bool


@dataclass(frozen=True)
class Push:
    """Sound to say: int16, mono."""

    samples: bytes
    rate_hz: int


@dataclass(frozen=True)
class Failure:
    """The renderer cannot go on; one sentence."""

    message: str


@dataclass(frozen=True)
class Refusal:
    """Sound was not taken; the session goes on. One sentence."""

    message: str


def run_renderer(connection: Connection, loop: "type[TickLoop] | None" = None) -> None:
    """Main function of the process: waits for the avatar's source, then serves one session until it is closed."""
    tune_allocator()
    import hicode.session.session  # noqa: F401 - imports take seconds: done before anybody asks

    try:
        source = connection.recv()
    except (EOFError, KeyboardInterrupt):
        return
    try:
        _serve(connection, load_avatar(source), loop or TickLoop)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # the parent has gone
    except HicodeError as error:
        connection.send(Failure(str(error)))
    except MemoryError:
        connection.send(Failure("The renderer ran out of memory. Close other programs, or other conversations."))
    except Exception:
        connection.send(Failure("The renderer stopped by an error of its own. The server's terminal says more."))
        raise


def load_avatar(source: Source) -> "Avatar":
    """Of a file; or, for tests, what "module:function" makes."""
    if isinstance(source, str) and ":" in source:
        import importlib

        module, function = source.split(":")
        return getattr(importlib.import_module(module), function)()
    from hicode.avatar.avatar import Avatar

    return Avatar.load(source)


def _serve(connection: Connection, avatar: "Avatar", kind: "type[TickLoop]") -> None:
    from hicode.session.config import SpeakConfig
    from hicode.session.session import Session
    from hicode.session.speak import video_record
    from hicode.trust.watermark import Watermark

    height, width = (side - side % 2 for side in avatar.background_plate.shape[:2])
    memory = SharedMemory(create=True, size=SLOTS * (height * width * 3 // 2))
    try:
        with Session(avatar, SpeakConfig(output_rate_hz=VIDEO_SAMPLE_RATE_HZ, max_waiting_s=MAX_WAITING_S)) as session:
            _render_behind_others()
            session.warm_up()
            fps = _speed(session)
            record = video_record(avatar)
            connection.send(Hello(width, height, memory.name, session.latency_s, fps, record))
            loop = kind(connection, session, memory, Watermark(record.payload))
            reader = threading.Thread(target=loop.read_commands, daemon=True)
            reader.start()
            loop.run()
    finally:
        memory.close()
        memory.unlink()


def _render_behind_others() -> None:
    """Lower the priority of the pool's threads and give each a core of its own.

    Beside a server and a browser that wake up a hundred times a second, Linux left both threads on one core of two: 16
    frames a second instead of 25. On systems where priorities are a process's, that of all is lowered.
    """
    import torch

    from hicode.threads import frame_pool

    if sys.platform != "linux":
        os.nice(NICENESS)
        return
    together = threading.Barrier(torch.get_num_threads())

    cores = sorted(os.sched_getaffinity(0))

    def lower(number: int) -> None:
        together.wait()  # so that each thread is lowered once
        os.nice(NICENESS)
        os.sched_setaffinity(0, {cores[(os.getpid() + number) % len(cores)]})

    for done in [frame_pool().submit(lower, number) for number in range(torch.get_num_threads())]:
        done.result()


def _speed(session: "Session") -> float:
    """Frames a second, as idling renders them for the first time; they are kept for the session."""
    frames = session.frames()
    for _ in range(session.ahead + 1):  # compiles, and fills the pool
        next(frames)
    started = time.monotonic()
    for _ in range(MEASURED):
        next(frames)
    return MEASURED / (time.monotonic() - started)


class TickLoop:
    """Ticks out, commands in."""

    def __init__(self, connection: Connection, session: "Session", memory: SharedMemory, watermark: "Watermark"):
        self._connection, self._session, self._watermark = connection, session, watermark
        height, width = (side - side % 2 for side in session.avatar.background_plate.shape[:2])
        self._size = height, width
        self._memory = memory
        self._free = list(range(SLOTS))
        self._generation = 0
        self._sending = threading.Lock()
        self._open = True
        self._crash: Exception | None = None
        self._last: np.ndarray | None = None

    def read_commands(self) -> None:
        """The session's writer."""
        try:
            while self._open:
                command = self._connection.recv()
                if isinstance(command, Push):
                    try:
                        self._session.push_audio(np.frombuffer(command.samples, np.int16), command.rate_hz)
                    except HicodeError as error:
                        self.send(Refusal(str(error)))
                elif isinstance(command, int):
                    self._free.append(command)
                elif command == "end":
                    self._session.end_utterance()
                elif command == "clear":
                    self._session.clear()
                    self._generation += 1
                else:
                    break
        except (EOFError, OSError):
            pass
        except Exception as error:  # raised by `run`: a session must not go on deaf
            self._crash = error
        self._open = False
        self._session.close()

    def run(self) -> None:
        """One tick after another, until the session is closed."""
        import torch

        torch.set_num_threads(1)  # this thread's: speech models in small steps would wait for a busy core in each
        started, number, shift_s = time.monotonic(), 0, 0.0
        while self._open:
            due_s = started + shift_s + (number + LEAD) * TICK_S
            now = time.monotonic()
            if now - due_s > BEHIND_S:
                shift_s += now - due_s + LEAD * TICK_S
                continue
            time.sleep(max(0.0, due_s - LEAD * TICK_S - now))
            generation = self._generation
            frame = self._session.frame_within(max(0.001, due_s - TICK_S / 2 - time.monotonic()))
            if frame is None:
                break
            audio = frame.audio.tobytes() if frame.speaking else None
            self.send(Tick(number, due_s, self._slot(frame.image), audio, generation, frame.late))
            number += 1
        if self._crash is not None:
            raise self._crash

    def send(self, message: Tick | Refusal) -> None:
        """To the parent."""
        with self._sending:
            self._connection.send(message)

    def _slot(self, image: np.ndarray) -> int | None:
        """A slot with the picture; None where it is the last one again, or the parent has not freed any."""
        from hicode.trust.marks import labelled

        if image is self._last or not self._free:
            return None
        self._last = image
        slot = self._free.pop(0)
        height, width = self._size
        self.slot(slot)[:] = to_yuv420p(self._watermark.embed(labelled(image[:height, :width], "eu")))
        return slot

    def slot(self, number: int) -> np.ndarray:
        """A picture of the shared memory, yuv420p."""
        height, width = self._size
        shape = height * 3 // 2, width
        return np.ndarray(shape, np.uint8, self._memory.buf, number * shape[0] * shape[1])


def to_yuv420p(image: np.ndarray) -> np.ndarray:
    """RGB "h w 3" as planes "h*3/2 w", even sides, BT.601 limited range: what VP8 means."""
    import cv2

    return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2YUV_I420)
