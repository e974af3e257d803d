"""The voice: text to sound. Without an account in English, and where espeak-ng is installed in its languages.

`Voice` is the protocol. `EmbeddedVoice` is hibari-tts (Apache-2.0), whose weights are in its package. `EspeakVoice`
runs the program espeak-ng (GPL-3) as a child process. `ServiceVoice` asks a service with OpenAI's `/audio/speech`.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int16

from hicode.errors import InputError, ResourceError
from hicode.serve.service import Service

MAX_CHARACTERS = 2_000
"""Of one text: two minutes of speech."""


@runtime_checkable
class Voice(Protocol):
    """Turns text into sound. `speak` may be called from any thread, one call at a time."""

    rate_hz: int

    def speak(self, text: str) -> Iterator[Int16[np.ndarray, "n"]]:
        """The sound in pieces, as they are made."""
        ...


class EmbeddedVoice:
    """English, 24 kHz; faster than a hundred times real time on one core."""

    rate_hz = 24_000

    def __init__(self):
        if find_spec("hibari") is None:
            raise ResourceError("The embedded voice is not installed. Run: pip install 'hicode[serve]'")
        from hibari import Hibari  # pyright: ignore[reportMissingImports] - an extra

        self._model = Hibari()

    def speak(self, text: str) -> Iterator[Int16[np.ndarray, "n"]]:
        """The sound, a sentence at a time."""
        for samples in self._model.stream(text):
            yield np.clip(np.round(samples * 32767), -32768, 32767).astype(np.int16)


class EspeakVoice:
    """Another language, by the program espeak-ng. Robotic. `language` is one of `languages()`."""

    rate_hz = 22_050

    def __init__(self, language: str):
        if language not in languages():
            raise InputError(
                f"There is no voice for the language {language!r}. Install espeak-ng and choose one of `espeak-ng "
                "--voices`, or name a service by --speech-url."
            )
        self._command = [
            shutil.which("espeak-ng") or "espeak-ng",
            "-v",
            language,
            "-a",
            "70",
            "-b",
            "1",
            "--stdin",
            "--stdout",
        ]

    def speak(self, text: str) -> Iterator[Int16[np.ndarray, "n"]]:
        """The sound, a quarter of a second at a time. Closing the iterator ends the program."""
        with subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
            assert program.stdin is not None and program.stdout is not None
            try:
                program.stdin.write(text.encode())
                program.stdin.close()
                program.stdout.read(44)  # the header of a WAV file
                while piece := program.stdout.read(2 * (self.rate_hz // 4)):
                    yield np.frombuffer(piece[: len(piece) // 2 * 2], "<i2").astype(np.int16)
            except OSError as error:
                raise ResourceError("espeak-ng does not work. Run it by hand: espeak-ng hello") from error
            finally:
                program.kill()


class ServiceVoice:
    """Any language, by a service with OpenAI's `/audio/speech` that answers with 16-bit samples at 24 kHz (`pcm`)."""

    rate_hz = 24_000

    def __init__(self, service: Service, model: str, name: str):
        self._service, self._about = service, {"model": model, "voice": name, "response_format": "pcm"}

    def speak(self, text: str) -> Iterator[Int16[np.ndarray, "n"]]:
        """The sound as it comes. ResourceError where the service fails."""
        with self._service.ask("/audio/speech", self._about | {"input": text}) as answer:
            rest = b""
            while piece := answer.read1(1 << 13):
                if not rest and piece[:4] in (b"RIFF", b"ID3\x04", b"OggS", b"fLaC"):
                    raise ValueError("a file, not samples")
                piece = rest + piece
                rest = piece[len(piece) // 2 * 2 :]
                yield np.frombuffer(piece[: len(piece) - len(rest)], "<i2").astype(np.int16)


@cache
def languages() -> dict[str, str]:
    """Names of the languages that can be spoken without a service, by code: English, and espeak-ng's where it is
    installed.
    """
    found = {"en": "English"}
    if (program := shutil.which("espeak-ng")) is None:
        return found
    try:
        listed = subprocess.run([program, "--voices"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return found
    rows = [line.split()[1:4:2] for line in listed.splitlines()[1:] if len(line.split()) > 4]
    others = {code: name.replace("_", " ") for code, name in rows if not code.startswith("en")}
    return found | dict(sorted(others.items(), key=lambda item: item[1]))


def checked_text(text: object) -> str:
    """The text in one line. InputError where there is nothing to say, or too much."""
    if not isinstance(text, str):
        raise InputError("The text is missing. Type what the avatar shall say.")
    text = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())
    if not any(character.isalnum() for character in text):
        raise InputError("There is nothing to say in this text. Type some words.")
    if len(text) > MAX_CHARACTERS:
        raise InputError(
            f"The text has {len(text):,} characters; {MAX_CHARACTERS:,} may be said at once. Say it in parts."
        )
    return text
