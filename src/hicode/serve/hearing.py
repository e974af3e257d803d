"""Hearing: sound to text, and when somebody speaks into the microphone.

`Hearing` is the protocol; `EmbeddedHearing` is Whisper tiny.en (MIT) run by faster-whisper. Its weights are an asset.
"""

from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from hicode.audio import SAMPLE_RATE_HZ
from hicode.errors import ResourceError

FRAME = 320  # samples of 20 ms
MARGIN_DB = 12.0
QUIETEST_DB = -50.0
ONSET_FRAMES, RELEASE_FRAMES = 6, 30
MAX_S, MIN_S = 30.0, 0.3


@runtime_checkable
class Hearing(Protocol):
    """Turns sound at 16 kHz into text. `transcribe` is called on a thread of its own."""

    def transcribe(self, samples: Float32[np.ndarray, "n"]) -> str:
        """The words; empty where there are none."""
        ...


class EmbeddedHearing:
    """English. 2 s of speech take half a second of one core."""

    def __init__(self):
        if find_spec("faster_whisper") is None:
            raise ResourceError("The embedded recogniser is not installed. Run: pip install 'hicode[serve]'")
        from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports] - an extra

        from hicode.assets import folder

        weights = folder("speech_recogniser")
        self._model = WhisperModel(str(weights), device="cpu", compute_type="int8", cpu_threads=1)

    def transcribe(self, samples: Float32[np.ndarray, "n"]) -> str:
        """The words."""
        segments, _ = self._model.transcribe(samples, beam_size=1, language="en", condition_on_previous_text=False)
        return " ".join(segment.text.strip() for segment in segments).strip()


class Turns:
    """Finds where somebody begins and ends to speak, by level above the background.

    `push` takes sound at 16 kHz. `speaking` is true within a turn; `push` returns the turn's sound when it is over.
    Hands-free: a turn begins after 120 ms of sound and ends after 600 ms without. Push-to-talk: see `begin` and `end`.
    """

    def __init__(self):
        self.speaking = False
        self._rest = np.zeros(0, np.float32)
        self._kept: list[np.ndarray] = []
        self._floor_db = QUIETEST_DB
        self._loud = self._quiet = 0
        self._held = False

    def begin(self) -> None:
        """The key is down: the turn lasts until `end`."""
        self._held = self.speaking = True
        self._kept = []

    def end(self) -> Float32[np.ndarray, "n"] | None:
        """The key is up: the turn's sound, None where it is too short."""
        self._held = self.speaking = False
        self._loud = self._quiet = 0
        turn = np.concatenate([*self._kept, np.zeros(0, np.float32)])
        self._kept = []
        return turn if len(turn) >= MIN_S * SAMPLE_RATE_HZ else None

    def push(self, samples: Float32[np.ndarray, "n"], hands_free: bool) -> Float32[np.ndarray, "turn"] | None:
        """More sound; the turn that it ends, if any."""
        samples = np.concatenate([self._rest, samples])
        whole = len(samples) // FRAME * FRAME
        self._rest = samples[whole:]
        turn = None
        for frame in samples[:whole].reshape(-1, FRAME):
            turn = self._frame(frame, hands_free) if turn is None else turn
        return turn

    def _frame(self, frame: np.ndarray, hands_free: bool) -> np.ndarray | None:
        if not self._held and not hands_free:
            self.speaking, self._kept = False, []
            return None
        self._kept.append(frame)
        if self._held:
            self._kept = self._kept[-round(MAX_S * SAMPLE_RATE_HZ / FRAME) :]
            return None
        level_db = 10 * np.log10(float(np.mean(frame**2)) + 1e-10)
        loud = level_db > max(self._floor_db + MARGIN_DB, QUIETEST_DB)
        if not loud:  # the background: falls at once, rises slowly
            self._floor_db = min(level_db, self._floor_db) if level_db < self._floor_db else self._floor_db + 0.05
        self._loud, self._quiet = (self._loud + 1, 0) if loud else (0, self._quiet + 1)
        if not self.speaking:
            self._kept = self._kept[-2 * ONSET_FRAMES :]
            self.speaking = self._loud >= ONSET_FRAMES
            return None
        if self._quiet >= RELEASE_FRAMES or len(self._kept) * FRAME > MAX_S * SAMPLE_RATE_HZ:
            return self.end()
        return None
