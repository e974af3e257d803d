"""Speech from text with the times of its phones, by espeak-ng (GPL-3; the optional package `espeakng-loader`).

The library is loaded in a child process only, which runs this file as a program. Text goes in through a pipe; sound and
phones come back through another. So the library is never part of hicode's process. A minute of speech takes .3 s.

Requests are lines of JSON. An answer is the length of a header (4 bytes), the header in JSON, and 16-bit samples.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Self

import numpy as np
from jaxtyping import Float32

from hicode.audio import SAMPLE_RATE_HZ, resample, to_float
from hicode.errors import InputError
from research.pretrain.phones import STOPS, Phone, letters_of

PACKAGE = "espeakng-loader"
# Voices of espeak-ng, for any language. Whispers and effects are left out.
VARIANTS = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2", "klatt3",
    "klatt4", "Alex", "Alicia", "Andrea", "Andy", "Annie", "Diogo", "Gene", "Hugo", "Lee", "Marco", "Michael", "Mike",
    "aunty", "belinda", "grandma", "grandpa", "linda", "steph", "edward", "max", "paul", "quincy", "rob", "shelby",
    "travis", "victor",
)  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """Sound "n" at 16 kHz in [-1, 1], and its phones in order, without gaps. A pause is a phone without letters."""

    samples: Float32[np.ndarray, "n"]
    phones: tuple[Phone, ...]
    voice: str
    text: str

    @property
    def language(self) -> str:
        """Of the voice."""
        return self.voice.split("+")[0]


def installed() -> bool:
    """Whether the package is installed."""
    from importlib.util import find_spec

    return find_spec("espeakng_loader") is not None


@cache
def sentences() -> dict[str, tuple[str, ...]]:
    """The sentences of sentences.txt, by language."""
    out: dict[str, tuple[str, ...]] = {}
    for line in files("research.pretrain").joinpath("sentences.txt").read_text(encoding="utf-8").splitlines():
        if line and line[0] != "#":
            language, text = line.split("\t")
            out[language] = (*out.get(language, ()), text)
    return out


class Espeak:
    """A running synthesiser: `with Espeak() as espeak: espeak.say(...)`.

    Raises InputError if the package is not installed.
    """

    def __init__(self):
        if not installed():
            raise InputError(
                f"Speech cannot be synthesised: the package {PACKAGE} is not installed. Install it: pip install "
                "'hicode[research]'."
            )
        # -P: the folder of this file must not be searched for modules; `research` lies in the clone's root.
        places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        )
        assert self._child.stdin is not None and self._child.stdout is not None
        self._requests, self._answers = self._child.stdin, self._child.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._child.wait()

    def say(self, text: str, voice: str = "en-us", words_per_minute: int = 165, pitch: int = 50) -> Utterance:
        """Say a text. `voice` is a language, or language+variant (VARIANTS); `pitch` is 0 … 99.

        Raises InputError if there is nothing to say, no such voice, a setting out of range, or the synthesiser stopped.
        """
        if not text.strip() or "\0" in text:
            raise InputError(f"The text {text[:40]!r} cannot be spoken. Give at least one word.")
        if not 80 <= words_per_minute <= 450 or not 0 <= pitch <= 99:
            raise InputError(
                f"A voice at {words_per_minute} words a minute and pitch {pitch} does not exist. Stay in 80 … 450 and "
                "0 … 99."
            )
        request = {"text": text, "voice": voice, "rate": int(words_per_minute), "pitch": int(pitch)}
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
            (length,) = struct.unpack("<I", self._read(4))
            answer = json.loads(self._read(length))
            pcm = np.frombuffer(self._read(2 * answer["samples"]), "<i2")
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"The speech synthesiser stopped while saying {text[:40]!r} as {voice}. Start a new one, or leave the "
                "sentence out."
            ) from error
        if answer["error"]:
            raise InputError(
                f"{answer['error']} Choose another voice: en-us, en (British), de, fr, cmn or another of espeak-ng's "
                "languages, + a variant (m1 … f5)."
            )
        return _utterance(pcm, answer, voice, text)

    def _read(self, n: int) -> bytes:
        data = self._answers.read(n)
        if len(data) < n:
            raise EOFError(n)
        return data


def _utterance(pcm: np.ndarray, answer: dict, voice: str, text: str) -> Utterance:
    rate = answer["rate_hz"]
    samples = resample(to_float(pcm), rate)
    # "(en)": from here on in another language
    events = [(at / rate, ipa) for at, ipa in answer["phones"] if not ipa.startswith("(")]
    phones = []
    for (start, ipa), end in zip(events, [*(at for at, _ in events[1:]), len(pcm) / rate], strict=True):
        # An empty event in the very place of a sound is no pause: the sound goes on through it.
        if not ipa and phones and phones[-1].start_s >= start - 1e-4 and phones[-1].ipa:
            phones[-1] = Phone(start, end, phones[-1].ipa)
        elif end > start or ipa:
            phones.append(Phone(start, max(end, start), ipa))
    return Utterance(samples, _with_closures(_without_gaps(phones), samples), voice, text)


_GAP_S = (
    0.09  # a pause of speech is longer; shorter ones are the silence in which a stop is held, or joints between sounds
)


def _without_gaps(phones: list[Phone]) -> tuple[Phone, ...]:
    """Merge each short silence into the stop after it, or else into the sound before it. Silence at the ends stays."""
    out: list[Phone] = []
    start = None  # where the gap before this phone began
    for k, phone in enumerate(phones):
        gap = not phone.ipa and phone.end_s - phone.start_s < _GAP_S and out and k + 1 < len(phones)
        if gap and out[-1].ipa and phones[k + 1].ipa:
            if letters_of(phones[k + 1].ipa)[:1] and letters_of(phones[k + 1].ipa)[0] in STOPS:
                start = phone.start_s
            else:
                out[-1] = Phone(out[-1].start_s, phone.end_s, out[-1].ipa)
        else:
            out.append(Phone(phone.start_s if start is None else start, phone.end_s, phone.ipa))
            start = None
    return tuple(out)


_STEP = SAMPLE_RATE_HZ // 200  # 5 ms
_LONGEST_CLOSURE_S = 0.09
_SILENT = 0.03  # of the utterance's RMS


def _with_closures(phones: tuple[Phone, ...], samples: np.ndarray) -> tuple[Phone, ...]:
    """Move the closed phase of p, t, k from the sound before to the stop. espeak-ng reports them at their burst.

    Then every stop is closed for about the first 60 % of its time and open for the rest, whether voiced or not.
    """
    level = float(np.sqrt((samples.astype(np.float64) ** 2).mean())) if len(samples) else 0.0
    out = list(phones)
    for k, phone in enumerate(phones):
        if letters_of(phone.ipa)[:1] and letters_of(phone.ipa)[0] in STOPS and k:
            burst, earliest = (
                round(phone.start_s * SAMPLE_RATE_HZ),
                max(out[k - 1].start_s + 0.01, phone.start_s - _LONGEST_CLOSURE_S) * SAMPLE_RATE_HZ,
            )
            start = burst
            while start - _STEP >= earliest and np.sqrt((samples[start - _STEP : start] ** 2).mean()) < _SILENT * level:
                start -= _STEP
            out[k - 1] = replace(out[k - 1], end_s=start / SAMPLE_RATE_HZ)
            out[k] = replace(phone, start_s=start / SAMPLE_RATE_HZ)
    return tuple(out)


# --------------------------------------------------------------------------------------------------- child process

_PHONEME, _END = 7, 0
_RETRIEVAL, _PHONEME_EVENTS, _IPA = 1, 1, 2
_RATE, _PITCH = 1, 3
_UTF8 = 1


def _serve() -> None:
    """Answer requests until the input ends. Runs in the child only."""
    import ctypes
    import os

    import espeakng_loader

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the library prints must not get among the answers

    class Id(ctypes.Union):
        _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]

    class Event(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_int)
            for name in ("type", "identifier", "text_position", "length", "audio_position", "sample")
        ]
        _fields_ += [("user_data", ctypes.c_void_p), ("id", Id)]

    library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
    sound, phones = [], []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event))
    def receive(samples, count, events):
        if count > 0:
            sound.append(ctypes.string_at(samples, 2 * count))
        k = 0
        while events[k].type != _END:
            if events[k].type == _PHONEME:
                phones.append((events[k].sample, events[k].id.string.decode("utf-8", "ignore")))
            k += 1
        return 0

    data = str(espeakng_loader.get_data_path())
    rate_hz = library.espeak_Initialize(_RETRIEVAL, 0, data.encode(), _PHONEME_EVENTS | _IPA)
    library.espeak_SetSynthCallback(receive)
    variants = set(os.listdir(os.path.join(data, "voices", "!v")))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        sound.clear()
        phones.clear()
        voice, error = request["voice"], ""
        variant = voice.partition("+")[2]
        if variant and variant not in variants:  # the library would speak with its usual voice and say nothing
            error = f"espeak-ng has no variant {variant!r}."
        elif library.espeak_SetVoiceByName(voice.encode()) != 0:
            error = f"espeak-ng has no voice {voice!r}."
        else:
            library.espeak_SetParameter(_RATE, request["rate"], 0)
            library.espeak_SetParameter(_PITCH, request["pitch"], 0)
            library.espeak_ng_SetRandSeed(1)  # or its flutter and breath come from the clock
            if os.name == "posix":
                ctypes.CDLL(None).srand(1)
            text = request["text"].encode() + b"\0"
            library.espeak_Synth(text, len(text), 0, 0, 0, _UTF8, None, None)
            library.espeak_Synchronize()
        pcm = b"".join(sound)
        header = json.dumps({"rate_hz": rate_hz, "samples": len(pcm) // 2, "phones": phones, "error": error}).encode()
        answers.write(struct.pack("<I", len(header)) + header + pcm)
        answers.flush()


if __name__ == "__main__":
    _serve()
