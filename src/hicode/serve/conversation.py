"""What is said in one live session: text and sound to the avatar, the microphone to text, interruptions, captions.

Messages are dictionaries, the same over each transport. From the page: say(text, ask), interrupt, listen(on),
talk(down), language(language), stats. To the page: ready(chat, languages, language), state(state), caption(who, text),
error(message), interrupted, stats(...), clip(ready).
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int16

from hicode.errors import HicodeError, InputError
from hicode.serve.chat import REMEMBERED, Message, Reply, echo
from hicode.serve.hearing import Hearing, Turns
from hicode.serve.live import LiveSession, LiveTick
from hicode.serve.recording import Recorder
from hicode.serve.voice import EmbeddedVoice, Voice, checked_text

MAX_SOUND_S = 120.0
AHEAD_S = 3.0
"""Speech that waits to be said before the voice goes on: a long text at once would hold the event loop up."""


class Parts:
    """Voices and hearings by language, loaded at first use and shared by all sessions; each serves one call at a time.

    languages: names by code, for the page to choose from; empty where a service finds the language by itself.
    """

    def __init__(
        self,
        voice: Callable[[str], Voice],
        hearing: Callable[[str], Hearing],
        languages: dict[str, str] | None = None,
        language: str = "en",
    ):
        self._voice, self._hearing = cache(voice), cache(hearing)
        self.languages, self.language = languages or {}, language
        self.voice_lock, self.hearing_lock = threading.Lock(), threading.Lock()

    def prepare(self) -> None:
        """Load the embedded voice, which takes a second, before anybody speaks. Where it is missing, the first text
        says so."""
        with self.voice_lock, contextlib.suppress(HicodeError):
            if isinstance(voice := self.voice(self.language), EmbeddedVoice):
                for _ in voice.speak("Hello."):
                    pass

    def voice(self, language: str) -> Voice:
        """Call with `voice_lock` held."""
        return self._voice(language)

    def hearing(self, language: str) -> Hearing:
        """Call with `hearing_lock` held."""
        return self._hearing(language)


class Conversation:
    """The state of one listener's conversation with one avatar."""

    def __init__(self, session: LiveSession, parts: Parts, folder: Path, reply: Reply = echo):
        self.session, self._parts, self._reply = session, parts, reply
        self._loop = asyncio.get_running_loop()
        self._send: Callable[[dict], None] = lambda message: None
        self._turns = Turns()
        self._hands_free = False
        self._state, self._language = "idle", parts.language
        self._turn = 0  # grows with every interruption: what belongs to an earlier one is dropped
        self._tasks: set[asyncio.Task] = set()
        self._asked_s: float | None = None
        self.first_frame_s: float | None = None
        self._saying = asyncio.Lock()
        self._messages: list[Message] = []
        self.recorder = Recorder(folder, session)

    def connect(self, send: Callable[[dict], None]) -> None:
        """Where messages to the page go."""
        self._send = send
        languages = list(self._parts.languages.items())
        send({"type": "ready", "chat": self._reply is not echo, "languages": languages, "language": self._language})
        send({"type": "state", "state": self._state})

    # ---- from the page ----

    def receive(self, message: object) -> None:
        """One message of the page. What cannot be understood is answered with an error."""
        try:
            self._receive(message)
        except HicodeError as error:
            self._send({"type": "error", "message": str(error)})

    def _receive(self, message: object) -> None:
        message = message if isinstance(message, dict) else {}
        kind = message.get("type")
        if kind == "say":
            text = checked_text(message.get("text"))
            if message.get("ask") is True:
                self.interrupt()
                self._task(self._answer(text, self._turn))
            else:
                self.say(text)
        elif kind == "interrupt":
            self.interrupt()
        elif kind == "listen":
            self._hands_free = message.get("on") is True
        elif kind == "talk":
            self._talk(message.get("down") is True)
        elif kind == "language":
            language = str(message.get("language"))
            if language not in self._parts.languages:
                raise InputError("This language cannot be spoken here. Choose another.")
            self._language = language
        elif kind == "stats":
            self._send({"type": "stats", **self.stats()})
        else:
            raise InputError("The server does not know this message. Reload the page.")

    def say(self, text: str) -> None:
        """Speak a text; what is being said goes first."""
        self.session.admit_speaker()
        self._asked_s = time.monotonic()
        self._task(self._say(text, self._turn))

    def play(self, samples: Int16[np.ndarray, "n"], rate_hz: int) -> None:
        """Speak a recording. InputError where it is longer than two minutes."""
        if len(samples) > MAX_SOUND_S * rate_hz:
            raise InputError(f"The sound is {len(samples) / rate_hz:.0f} s long; {MAX_SOUND_S:.0f} s may be. Cut it.")
        self._asked_s = time.monotonic()
        self.session.push(samples, rate_hz)
        self.session.end_utterance()

    def interrupt(self) -> None:
        """Be quiet. The page is told first: what its buffer holds is not to be heard either."""
        self._turn += 1
        self._send({"type": "interrupted"})
        self.session.clear()
        self._state = ""  # the next tick tells it anew

    def _talk(self, down: bool) -> None:
        if down:
            self.interrupt()
            self._turns.begin()
        elif (turn := self._turns.end()) is not None:
            self._task(self._heard(turn, self._turn))

    def hear(self, samples: Float32[np.ndarray, "n"]) -> None:
        """Sound of the microphone, 16 kHz."""
        before = self._turns.speaking
        turn = self._turns.push(samples, self._hands_free)
        if self._turns.speaking and not before and self.session.speaking:
            self.interrupt()
        if turn is not None:
            self._task(self._heard(turn, self._turn))

    # ---- work ----

    def _task(self, work) -> None:
        task = asyncio.create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work) -> None:
        try:
            await work
        except HicodeError as error:
            self._send({"type": "error", "message": str(error)})

    async def _say(self, text: str, turn: int, last: bool = True) -> None:
        async with self._saying:
            if turn != self._turn:
                return
            self._send({"type": "caption", "who": "avatar", "text": text})
            await asyncio.to_thread(self._speak, text, turn)
            if turn == self._turn and last:
                self.session.end_utterance()

    def _speak(self, text: str, turn: int) -> None:
        """On a thread: the voice's pieces, each pushed as it comes, and none made long before it is heard."""
        pieces: Iterator[np.ndarray] | None = None
        language = self._language  # the page may choose another while this text is said
        while turn == self._turn:
            if self.session.waiting_s > AHEAD_S:
                time.sleep(0.1)
                continue
            with self._parts.voice_lock:
                voice = self._parts.voice(language)
                pieces = pieces or voice.speak(text)
                samples = next(pieces, None)
            if samples is None:
                return
            done = asyncio.run_coroutine_threadsafe(self._push(samples, voice.rate_hz, turn), self._loop)
            done.result(30)

    async def _push(self, samples: np.ndarray, rate_hz: int, turn: int) -> None:
        if turn == self._turn:
            self.session.push(samples, rate_hz)

    async def _heard(self, samples: np.ndarray, turn: int) -> None:
        def transcribe() -> str:
            with self._parts.hearing_lock:
                return self._parts.hearing(self._language).transcribe(samples)

        text = await asyncio.to_thread(transcribe)
        if text and turn == self._turn:
            await self._answer(text, turn)

    async def _answer(self, text: str, turn: int) -> None:
        """Answer, a sentence at a time; an interruption ends it between two."""
        self._send({"type": "caption", "who": "you", "text": text})
        self.session.admit_speaker()
        self._messages = [*self._messages[-REMEMBERED:], {"role": "user", "content": text}]
        self._asked_s = time.monotonic()
        sentences, said = self._reply(list(self._messages)), []
        try:
            while turn == self._turn and (sentence := await asyncio.to_thread(next, sentences, None)) is not None:
                if turn == self._turn and any(c.isalnum() for c in sentence):
                    await self._say(checked_text(sentence), turn, last=False)
                    said.append(sentence)
        finally:
            if said:
                self._messages.append({"role": "assistant", "content": " ".join(said)})
            if turn == self._turn:
                self.session.end_utterance()

    # ---- to the page ----

    def shown(self, tick: LiveTick) -> None:
        """A tick was sent."""
        if tick.speaking and self._asked_s is not None:
            self.first_frame_s, self._asked_s = time.monotonic() - self._asked_s, None
        if self.session.notice:
            self._send({"type": "error", "message": self.session.notice})
            self.session.notice = None
        if self.recorder.add(tick):
            self._send({"type": "clip", "ready": True})
        state = "speaking" if tick.speaking else "listening" if self._turns.speaking else "idle"
        if state != self._state:
            self._state = state
            self._send({"type": "state", "state": state})

    def stats(self) -> dict:
        """For the page's table: milliseconds and counts."""
        counters = self.session.counters
        return {
            "first_frame_ms": None if self.first_frame_s is None else round(1e3 * self.first_frame_s),
            "renderer_fps": round(self.session.hello.fps, 1) if self.session.hello else None,
            "repeated": counters.repeated,
            "ticks": counters.ticks,
        }

    async def close(self) -> None:
        """End it, with its session."""
        self._turn += 1
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.session.close()
        await asyncio.to_thread(self.recorder.close)
