"""A live session as the server has it: renderer processes, one clock, bounded queues, admission by measured speed.

    push, end, clear --> renderer process --ticks--> LiveSession --each when it is due--> a listener's queue

Every tick holds a picture and its 40 ms of sound: what sends the one sends the other. A listener who reads too slowly
loses the oldest ticks; nobody else waits for it. A renderer that dies is one error event of one session.
"""

import asyncio
import contextlib
import logging
import math
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
from jaxtyping import Int16, UInt8

from hicode.audio import FPS, VIDEO_SAMPLE_RATE_HZ
from hicode.errors import InputError, ResourceError
from hicode.serve.renderer import MAX_WAITING_S, TICK_S, Failure, Hello, Push, Refusal, Source, Tick, run_renderer

log = logging.getLogger(__name__)

TICK_SAMPLES = round(VIDEO_SAMPLE_RATE_HZ * TICK_S)
SILENCE = np.zeros(TICK_SAMPLES, np.int16)
QUEUED_TICKS = 5
"""Ticks that wait for a listener before the oldest is dropped."""
START_S = 120.0
"""A renderer that is not ready by then is given up."""
SILENT_S = 10.0
"""A renderer that sends nothing for so long is given up."""
STOPPED = "The renderer has stopped. Begin another conversation."
HASTE_S = 0.2
"""After an interruption, pictures are shown as they come: without sound, they need not wait for their time."""
SPARE = 0.9
"""Share of the measured speed that may be promised to speakers."""


@dataclass(frozen=True, eq=False)
class LiveTick:
    """40 ms as they are sent. `picture`: yuv420p, h·3/2 rows; the last one where a new one was late (`repeated`)."""

    number: int
    due_s: float
    picture: UInt8[np.ndarray, "rows w"]
    audio: Int16[np.ndarray, "n"]
    speaking: bool
    repeated: bool


@dataclass
class Counters:
    """Of all sessions since the server began."""

    sessions: int = 0
    failed: int = 0
    refused: int = 0
    ticks: int = 0
    repeated: int = 0
    dropped: int = 0
    late_s: float = 0.0


class Machine:
    """What this machine can do, and who uses it.

    A machine whose renderer makes r frames a second serves SPARE · r / 25 speakers at once, at least one; listeners
    cost next to nothing.
    """

    def __init__(
        self,
        max_sessions: int = 4,
        renderer: Callable[[Connection], None] = run_renderer,
        max_s: float = math.inf,
        max_mb: float = math.inf,
    ):
        self.max_sessions, self.max_s, self.max_mb, self._renderer = max_sessions, max_s, max_mb, renderer
        self.counters = Counters()
        self.fps = 0.0
        self.sessions: set[LiveSession] = set()
        self._context = multiprocessing.get_context("spawn")
        self._spare: tuple | None = None

    @property
    def speakers(self) -> int:
        """Sessions that speak now."""
        return sum(session.speaking for session in self.sessions)

    @property
    def room(self) -> int:
        """Sessions that may speak at once."""
        return max(1, int(SPARE * self.fps / FPS))

    def prepare(self) -> None:
        """Start a renderer process before anybody asks for it."""
        if self._spare is None:
            self._spare = self._spawn()

    def take_renderer(self) -> tuple:
        """(process, connection) of a fresh renderer."""
        spare, self._spare = self._spare, None
        if spare is not None and spare[0].is_alive():
            return spare
        return self._spawn()

    def _spawn(self) -> tuple:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=self._renderer, args=(theirs,), daemon=True, name="hicode-renderer")
        process.start()
        theirs.close()
        return process, ours

    def admit_session(self) -> None:
        """ResourceError where there are too many sessions."""
        if len(self.sessions) >= self.max_sessions:
            self.counters.refused += 1
            raise ResourceError(
                f"{len(self.sessions)} conversations are open, and no more fit. End one, or raise --max-sessions."
            )

    def admit_speaker(self, session: "LiveSession") -> None:
        """ResourceError where the machine cannot render one more speaker at 25 frames a second."""
        if not session.speaking and self.speakers >= self.room:
            self.counters.refused += 1
            raise ResourceError(
                f"This machine renders {self.fps:.0f} frames a second, enough for {self.room} speaker(s) at a time. "
                "Wait until the other avatar has finished."
            )

    async def close(self) -> None:
        """End all sessions and renderers."""
        for session in list(self.sessions):
            await session.close()
        if self._spare is not None:
            process, connection = self._spare
            connection.close()
            await asyncio.to_thread(_end, process)
            self._spare = None


def resident_mb(pid: int | None) -> float:
    """Memory of a process; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return 0.0


def _end(process) -> None:
    process.join(2)
    if process.is_alive():
        process.terminate()
        process.join(2)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()  # its pipe; else it stays until garbage is collected


class LiveSession:
    """One avatar, one listener.

        session = await LiveSession.open(machine, path)
        session.push(samples, 24_000); session.end_utterance()
        async for tick in session.ticks(): ...

    All methods are called on the event loop, and none of them waits for the renderer: a thread writes to it.
    """

    def __init__(self, machine: Machine, process, connection):
        self._machine, self._process, self._connection = machine, process, connection
        self._loop = asyncio.get_running_loop()
        self._queue: deque[LiveTick] = deque(maxlen=QUEUED_TICKS)
        self._arrived: deque[tuple[Tick, np.ndarray | None]] = deque()
        self._writer = ThreadPoolExecutor(1, "hicode-writer")
        self._ready: asyncio.Future[Hello] = self._loop.create_future()
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._pacer: asyncio.Task | None = None
        self._memory: SharedMemory | None = None
        self._generation = 0
        self._cleared_s = -math.inf  # the last interruption
        self._until_s = 0.0  # speech that was pushed lasts until then, about
        self._speaks = False
        self.error: str | None = None
        self.notice: str | None = None
        self.closed = False
        self.hello: Hello | None = None
        self.spoken_s = 0.0

    @staticmethod
    async def open(machine: Machine, source: Source) -> "LiveSession":
        """Begin a session. ResourceError where there is no room; InputError where the avatar cannot be used."""
        machine.admit_session()
        session = LiveSession(machine, *machine.take_renderer())
        machine.sessions.add(session)
        machine.counters.sessions += 1
        session._loop.add_reader(session._connection.fileno(), session._receive)
        try:
            session._send(source)
            hello = session.hello = await asyncio.wait_for(asyncio.shield(session._ready), START_S)
            assert hello is not None
            session._memory = SharedMemory(hello.memory)
        except (OSError, TimeoutError) as error:
            await session.close()
            raise ResourceError("The renderer did not start. Free some memory, and try again.") from error
        except BaseException:
            await session.close()
            raise
        if machine.fps == 0 or not machine.speakers:
            machine.fps = hello.fps
        session._pacer = asyncio.create_task(session._pace())
        session._pacer.add_done_callback(session._pacer_ended)
        return session

    # ---- the writer ----

    @property
    def speaking(self) -> bool:
        """Whether it says something, or is about to."""
        return not self.closed and (self._speaks or time.monotonic() < self._until_s)

    @property
    def waiting_s(self) -> float:
        """Speech that was pushed and not yet said, about, s."""
        return max(0.0, self._until_s - time.monotonic())

    def admit_speaker(self) -> None:
        """ResourceError where the machine has no room for one more speaker; InputError where the session is over."""
        if self.closed or self.error:
            raise InputError(self.error or "The conversation has ended. Begin another one.")
        self._machine.admit_speaker(self)

    @property
    def counters(self) -> Counters:
        """Of the machine."""
        return self._machine.counters

    def push(self, samples: Int16[np.ndarray, "n"], rate_hz: int) -> None:
        """Sound to say. ResourceError where the machine has no room for one more speaker, or too much waits."""
        if not 4000 <= rate_hz <= 192_000:
            raise InputError(f"Sound at {rate_hz} samples a second cannot be used. Give 8,000 to 96,000.")
        self.admit_speaker()
        now = time.monotonic()
        until_s = max(self._until_s, now + 0.2) + len(samples) / rate_hz
        if until_s - now > MAX_WAITING_S + 1:
            raise ResourceError(f"{MAX_WAITING_S:.0f} s of sound wait to be said. Say less at once.")
        self._until_s = until_s
        self._send(Push(np.ascontiguousarray(samples, np.int16).tobytes(), rate_hz))

    def end_utterance(self) -> None:
        """The last words are out."""
        self._send("end")

    def clear(self) -> None:
        """Interrupt. What is on its way is neither heard nor shown: at most `LEAD` ticks hold the last picture."""
        self._generation += 1
        self._cleared_s = time.monotonic()
        for k, tick in enumerate(self._queue):
            self._queue[k] = replace(tick, audio=SILENCE, speaking=False)
        self._until_s, self._speaks = 0.0, False
        self._send("clear")

    def _send(self, command) -> None:
        if not self.closed and not self.error:
            self._writer.submit(self._write, command)

    def _write(self, command) -> None:
        """On the writer's thread: a renderer that does not read must not stop the event loop."""
        try:
            self._connection.send(command)
        except OSError:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._fail, STOPPED)

    # ---- the renderer's messages ----

    def _receive(self) -> None:
        """What has arrived; called by the event loop."""
        try:
            while not self.closed and self._connection.poll():
                message = self._connection.recv()
                if isinstance(message, Tick):
                    self._take(message)
                elif isinstance(message, Hello):
                    self._ready.set_result(message)
                elif isinstance(message, Failure):
                    self._fail(message.message)
                elif isinstance(message, Refusal):
                    self.notice = message.message
        except (EOFError, OSError):
            self._fail(STOPPED)
        except Exception:
            log.exception("a message of the renderer could not be read")
            self._fail(STOPPED)

    def _take(self, tick: Tick) -> None:
        picture = None
        if tick.slot is not None:
            if self._memory is not None and self.hello is not None:
                rows, width = self.hello.height * 3 // 2, self.hello.width
                slot = np.ndarray((rows, width), np.uint8, self._memory.buf, tick.slot * rows * width)
                picture = slot.copy()
            self._send(tick.slot)
        self._arrived.append((tick, picture))
        self._news.set()

    def _fail(self, message: str) -> None:
        if self.closed or self.error:
            return
        self.error = message
        self._machine.counters.failed += 1
        if not self._ready.done():
            self._ready.set_exception(InputError(message))
        self._loop.remove_reader(self._connection.fileno())
        self._wake.set()
        self._news.set()

    # ---- the pacer ----

    async def _pace(self) -> None:
        """Hand each tick on when it is due."""
        picture: np.ndarray | None = None
        counters, ends_s = self._machine.counters, time.monotonic() + self._machine.max_s
        while not self.closed and not self.error:
            if time.monotonic() > ends_s:
                self._fail(f"The conversation lasted {self._machine.max_s / 60:g} minutes, the limit here.")
            if counters.ticks % 50 == 0 and resident_mb(self._process.pid) > self._machine.max_mb:
                self._fail(f"The renderer took more than {self._machine.max_mb:.0f} MB of memory, the limit here.")
            if not self._arrived:
                self._news.clear()
                try:
                    await asyncio.wait_for(self._news.wait(), SILENT_S)
                except TimeoutError:
                    self._fail("The renderer does not answer. Begin another conversation.")
                continue
            tick, new = self._arrived.popleft()
            await asyncio.sleep(max(0.0, tick.due_s - time.monotonic()))
            stale = tick.generation < self._generation and tick.audio is not None
            if time.monotonic() < self._cleared_s + HASTE_S:
                new = self._newest(None if stale else new)
            if new is not None:
                picture = new
            if picture is None:
                continue
            speaking = tick.audio is not None and not stale
            audio = np.frombuffer(tick.audio, np.int16) if speaking and tick.audio else SILENCE
            self._speaks = speaking
            self.spoken_s += TICK_S * speaking
            counters.ticks += 1
            counters.repeated += tick.late
            counters.late_s += max(0.0, time.monotonic() - tick.due_s)
            counters.dropped += len(self._queue) == QUEUED_TICKS
            self._queue.append(LiveTick(tick.number, tick.due_s, picture, audio, speaking, new is None))
            self._wake.set()

    def _newest(self, picture: np.ndarray | None) -> np.ndarray | None:
        """The picture that has arrived last since the interruption; the given one where there is none."""
        for tick, new in reversed(self._arrived):
            if new is not None and tick.audio is None and tick.generation >= self._generation:
                return new
        return picture

    def _pacer_ended(self, pacer: asyncio.Task) -> None:
        """A pacer that meets an error of its own is the session's error: its listener must not wait for ever."""
        if not pacer.cancelled() and (error := pacer.exception()) is not None:
            log.error("the pacer of a conversation stopped", exc_info=error)
            self._fail("The conversation stopped by an error of the server. Begin another one.")

    async def ticks(self):
        """Ticks as they are due, until the session is closed or has failed."""
        while not self.closed:
            if self._queue:
                yield self._queue.popleft()
                continue
            if self.error:
                return
            self._wake.clear()
            await self._wake.wait()

    async def close(self) -> None:
        """End the session and its process."""
        if self.closed:
            return
        if not self.error:
            self._loop.remove_reader(self._connection.fileno())
            self._send("close")
        self.closed = True
        self._machine.sessions.discard(self)
        self._wake.set()
        self._news.set()
        if self._pacer is not None:
            self._pacer.cancel()
        await asyncio.to_thread(_end, self._process)
        await asyncio.to_thread(self._writer.shutdown)  # the process has ended, so no write waits any more
        self._connection.close()
        if self._memory is not None:
            self._memory.close()
            with contextlib.suppress(FileNotFoundError):  # the renderer has removed it, unless it was killed
                self._memory.unlink()
