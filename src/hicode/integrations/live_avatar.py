"""A session by the clock, for an event loop: sound in, ticks of picture and sound out. What the adapters share.

    push_audio, end_utterance, clear --> one thread that drives the `Session` --> ticks, each when it is due

Tick i is due 40 ms after tick i-1. Ticks with sound leave up to `LEAD` ticks early, so that a late thread is not heard;
the player's queues hold picture and sound alike. Where a picture is not rendered in time, the newest one goes with the
sound. A tick that is late itself goes without a picture. A consumer who takes nothing stops the clock: no sound is
lost.

Each utterance ends with one `UtteranceEnd`, when its last tick has been played. An utterance that follows another is
given to the session then. If rendering fails, one `Failure` comes, and ticks of sound alone after it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Shaped, UInt8

from hicode.audio import FPS, SpeechInput
from hicode.avatar.avatar import Avatar
from hicode.errors import InputError, ResourceError
from hicode.session.config import SpeakConfig
from hicode.session.session import Frame, Session
from hicode.session.speak import video_record
from hicode.trust.marks import FrameMarker

TICK_S = 1 / FPS
LEAD = 2
"""Ticks with sound that leave before they are due."""
QUEUED = LEAD + 2
"""Items that wait for the consumer before the clock stops."""
BEHIND_S = 0.5
"""A clock that is later than this begins anew."""
OUTPUT_RATE_HZ = 24_000
"""What speech synthesis gives most often."""

logger = logging.getLogger("hicode.integrations")


@dataclass(frozen=True, eq=False)
class Tick:
    """40 ms. `image`: None where none was ready in time. `changed`: not the last one again. `audio`: None in silence.

    `label`: of the utterance that the sound belongs to.
    """

    image: UInt8[np.ndarray, "h w 3"] | None
    changed: bool
    audio: Int16[np.ndarray, "n"] | None
    label: object = None


@dataclass(frozen=True)
class UtteranceEnd:
    """The last tick of an utterance has been played. `seconds`: its length in ticks."""

    label: object
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Rendering failed; the voice goes on without pictures."""

    message: str


Item = Tick | UtteranceEnd | Failure


@dataclass(eq=False)
class _Utterance:
    """`new`: sound that the session has not got. `unsent`: sound that has not left, for a voice without pictures."""

    label: object
    new: list[np.ndarray] = field(default_factory=list)
    unsent: deque[np.ndarray] = field(default_factory=deque)
    waiting: int = 0  # samples in `unsent`
    ended: bool = False
    given: bool = False  # its end, to the session
    ticks: int = 0

    def push(self, samples: np.ndarray) -> None:
        self.new.append(samples)
        self.unsent.append(samples)
        self.waiting += len(samples)

    def take(self, count: int) -> Int16[np.ndarray, "n"]:
        """The next samples that leave, with zeros where there are fewer."""
        taken = [np.zeros(0, np.float32)]
        missing = count
        while missing and self.unsent:
            piece = self.unsent.popleft()
            if len(piece) > missing:
                self.unsent.appendleft(piece[missing:])
            taken.append(piece[:missing])
            missing -= len(taken[-1])
        self.waiting -= count - missing
        samples = np.clip(np.round(np.concatenate(taken) * 32768), -32768, 32767).astype(np.int16)
        return np.pad(samples, (0, missing))


class LiveAvatar:
    """An avatar that an asyncio program shows.

        async with LiveAvatar("me.hicode") as live:
            live.push_audio(samples, 24_000)
            live.end_utterance()
            async for item in live: ...

    Pictures carry the marks of `config.mark`. Sound leaves at `config.output_rate_hz`. All methods are called on the
    event loop and never wait for rendering; one consumer iterates.
    """

    def __init__(self, avatar: Avatar | Path | str, config: SpeakConfig = SpeakConfig(output_rate_hz=OUTPUT_RATE_HZ)):
        self.config = config
        self.width, self.height = 0, 0
        """Of the pictures, px; known once started."""
        self._avatar = avatar
        self._changed = threading.Condition()  # guards what the thread shares
        self._utterances: deque[_Utterance] = deque()  # begun and not finished
        self._generation = 0  # grows with every interruption
        self._interrupted = False
        self._queued = 0
        self._closed = False
        # The event loop's.
        self._input = SpeechInput(config.output_rate_hz)
        self._open: _Utterance | None = None
        self._items: deque[Item] = deque()
        self._arrived = asyncio.Event()
        self._spoken_s = 0.0  # taken by the consumer, of the utterance in progress
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------------- the event loop

    async def start(self) -> None:
        """Load the avatar and begin to render. Raises what `Avatar.load` and `Session` raise."""
        self._loop = asyncio.get_running_loop()
        session = await asyncio.to_thread(self._open_session)
        if self._closed:
            session.close()
            return
        self.height, self.width = session.avatar.background_plate.shape[:2]
        self._thread = threading.Thread(target=self._run, args=(session,), name="hicode-live", daemon=True)
        self._thread.start()

    def push_audio(self, samples: Shaped[np.ndarray, "n *c"], rate_hz: int, label: object = None) -> None:
        """Sound to say: any type, rate and size. A new label, or the first sound after an end, begins an utterance.

        Raises InputError for sound that cannot be used, ResourceError for too much of it; then nothing was taken.
        """
        if self._open is not None and self._open.label != label:
            self.end_utterance()
        waiting_s = self.waiting_s + len(samples) / max(rate_hz, 1)
        if waiting_s > self.config.max_waiting_s:
            raise ResourceError(
                f"{waiting_s:.1f} s of sound would wait to be spoken; {self.config.max_waiting_s:.0f} s may. "
                "Push less at once, or raise SpeakConfig.max_waiting_s."
            )
        samples = self._input.push(samples, rate_hz)
        with self._changed:
            if self._open is None:
                self._open = _Utterance(label)
                self._utterances.append(self._open)
            self._open.push(samples)
            self._changed.notify_all()

    def end_utterance(self) -> None:
        """The last words are out. Nothing happens where no utterance is open."""
        if self._open is None:
            return
        rest = self._input.finish()
        with self._changed:
            self._open.push(rest)
            self._open.ended, self._open = True, None
            self._changed.notify_all()

    def clear(self) -> float:
        """Interrupt: no tick that was made before comes any more, and no `UtteranceEnd` of what was pushed before.

        Returns the seconds that the consumer has taken of the utterance in progress.
        """
        with self._changed:
            self._generation += 1
            self._interrupted, self._open, self._queued = True, None, 0
            self._utterances.clear()
            self._items = deque(item for item in self._items if isinstance(item, Failure))
            self._changed.notify_all()
        self._input = SpeechInput(self.config.output_rate_hz)
        seconds, self._spoken_s = self._spoken_s, 0.0
        return seconds

    @property
    def interruptions(self) -> int:
        """How often it was interrupted."""
        return self._generation

    @property
    def waiting_s(self) -> float:
        """Sound that was pushed and has not left, s."""
        return sum(utterance.waiting for utterance in tuple(self._utterances)) / self.config.output_rate_hz

    async def __aiter__(self) -> AsyncIterator[Item]:
        """Items as they are due, until `close`."""
        while not self._closed:
            if not self._items:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            item = self._items.popleft()
            if not isinstance(item, Failure):
                with self._changed:
                    self._queued -= 1
                    self._changed.notify_all()
            if isinstance(item, Tick) and item.audio is not None:
                self._spoken_s += TICK_S
            elif isinstance(item, UtteranceEnd):
                self._spoken_s = 0.0
            yield item

    async def close(self) -> None:
        """End the session and its thread; iteration ends."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._arrived.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> "LiveAvatar":
        await self.start()
        return self

    async def __aexit__(self, *error) -> None:
        await self.close()

    def _arrive(self, item: Item, generation: int) -> None:
        if generation == self._generation or isinstance(item, Failure):
            self._items.append(item)
            self._arrived.set()

    # ------------------------------------------------------------------------------------------------------ the thread

    def _open_session(self) -> Session:
        if isinstance(self._avatar, (str, Path)):
            self._avatar = Avatar.load(self._avatar)
        self._marker = FrameMarker(self.config.mark, video_record(self._avatar))
        return Session(self._avatar, self.config)

    def _run(self, session: Session) -> None:
        try:
            with session:
                self._render(session)
        except Exception as error:  # whatever it is, the voice goes on
            logger.exception("The avatar cannot be rendered")
            self._send(Failure(f"The avatar cannot be rendered, its voice goes on: {error}"), self._generation)
            self._speak_without_pictures()

    def _render(self, session: Session) -> None:
        """One tick after another, until closed."""
        last = None
        due, lead_s = time.monotonic(), 0.0
        while self._wait_until(due - lead_s):
            utterance, generation = self._give_sound(session)
            frame = session.frame_within(max(0.001, due + TICK_S / 2 - time.monotonic()))
            if frame is None:
                return
            lead_s = LEAD * TICK_S if frame.speaking else 0.0
            if not frame.speaking:
                self._wait_until(due)
                # Asked for after the end was given, with no sound left: the utterance is over.
                if utterance is not None and utterance.given and not session.pending:
                    self._finish(utterance, generation)
            late = time.monotonic() > due + TICK_S
            image = None if late and last is not None else self._marker(frame.image)
            changed = image is not None and (last is None or not np.array_equal(image, last))
            if self._emit(self._tick(frame, utterance, image, changed), generation):
                last = last if image is None else image
                due += TICK_S
            if time.monotonic() > due + BEHIND_S:
                due = time.monotonic()

    def _give_sound(self, session: Session) -> tuple[_Utterance | None, int]:
        """Interruption and sound, in order; the utterance that is spoken now and the number of interruptions."""
        with self._changed:
            interrupted, self._interrupted = self._interrupted, False
            utterance = self._utterances[0] if self._utterances else None
            generation = self._generation
            new, ends = [], False
            if utterance is not None:
                new, utterance.new = utterance.new, []
                ends = utterance.ended and not utterance.given
                utterance.given = utterance.ended
        if interrupted:
            session.clear()
        samples = np.concatenate([np.zeros(0, np.float32), *new])
        if len(samples):
            session.push_audio(samples, self.config.output_rate_hz)
        if ends:
            session.end_utterance()
        return utterance, generation

    def _tick(
        self, frame: Frame, utterance: _Utterance | None, image: UInt8[np.ndarray, "h w 3"] | None, changed: bool
    ) -> Tick:
        if utterance is None or not frame.speaking:
            return Tick(image, changed, None)
        return Tick(image, changed, frame.audio, utterance.label)

    def _speak_without_pictures(self) -> None:
        """What was pushed and has not left, and what will be."""
        due, count = time.monotonic(), round(self.config.output_rate_hz / FPS)
        while self._wait_until(due):
            with self._changed:
                utterance, generation = (self._utterances[0] if self._utterances else None), self._generation
                if utterance is None or (utterance.waiting < count and not utterance.ended):
                    self._changed.wait(TICK_S)
                    continue
                audio = utterance.take(count) if utterance.waiting else None
            due = max(due, time.monotonic() - TICK_S) + TICK_S
            if audio is None:
                self._finish(utterance, generation)
            else:
                self._emit(Tick(None, False, audio, utterance.label), generation, utterance)

    def _finish(self, utterance: _Utterance, generation: int) -> None:
        """Report that an utterance was played, unless it was interrupted."""
        if self._emit(UtteranceEnd(utterance.label, utterance.ticks * TICK_S), generation):
            with self._changed:
                if generation == self._generation:
                    self._utterances.popleft()

    def _emit(self, item: Item, generation: int, taken: _Utterance | None = None) -> bool:
        """Hand an item to the event loop, once there is room; False if it was interrupted or closed meanwhile.

        `taken`: the utterance whose sound in the item was taken already.
        """
        with self._changed:
            while self._queued >= QUEUED and generation == self._generation and not self._closed:
                self._changed.wait()
            if self._closed or generation != self._generation:
                return False
            self._queued += 1
            if isinstance(item, Tick) and item.audio is not None:
                utterance = self._utterances[0]
                utterance.ticks += 1
                if taken is None:
                    utterance.take(len(item.audio))
        return self._send(item, generation)

    def _send(self, item: Item, generation: int) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._arrive, item, generation)
        except RuntimeError:  # the loop was closed, and nobody closed this
            self._closed = True
        return not self._closed

    def _wait_until(self, moment_s: float) -> bool:
        """Whether it is still open then."""
        with self._changed:
            while not self._closed and (wait_s := moment_s - time.monotonic()) > 0:
                self._changed.wait(wait_s)
            return not self._closed


def pcm(audio: bytes, channels: int) -> Int16[np.ndarray, "n c"]:
    """Interleaved 16-bit samples as an array. InputError for a broken frame."""
    if channels < 1 or len(audio) % (2 * channels):
        raise InputError(f"{len(audio)} bytes are no whole number of 16-bit samples in {channels} channels.")
    return np.frombuffer(audio, np.int16).reshape(-1, channels)
