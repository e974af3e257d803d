"""The voice: text to sound, without an account.

`Voice` is the protocol; `EmbeddedVoice` is hibari-tts (English, Apache-2.0), whose weights are in its package.
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int16

from hicode.errors import InputError, ResourceError

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
