"""Phones of any language as lip shapes: the classes of a phone, and the share of its time for each.

A phone is what espeak-ng reports, in IPA: often one letter with marks, but also a diphthong (aɪ), an affricate (tʃ) or
the rest of a syllable (Mandarin's onɡ). A class holds sounds with equal lips in every language: p, b, m or k, ŋ, x.
Tongue, voice and nose are ignored, so one table serves all languages.
"""

import unicodedata
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hicode.errors import InputError

CLASSES = (
    "silence", "bilabial", "labiodental", "dental", "alveolar", "sibilant", "postalveolar", "velar",
    "r", "rounded_close", "rounded_open", "open", "mid", "spread", "neutral", "other",
)  # fmt: skip
SILENCE, BILABIAL, NEUTRAL = CLASSES.index("silence"), CLASSES.index("bilabial"), CLASSES.index("neutral")
VOWELS = tuple(CLASSES.index(c) for c in ("rounded_close", "rounded_open", "open", "mid", "spread", "neutral"))

# Lips of [β, ɸ] come near each other but do not meet (Spanish b between vowels, Japanese fu): nearer to v than to b.
# Palatals are with the velars, uvulars and pharyngeals: sounds made behind the lips. ɯ is u without its rounding.
_LETTERS = {
    "bilabial": "p b m ɓ ʙ",
    "labiodental": "f v ɱ ʋ ⱱ β ɸ",
    "dental": "θ ð",
    "alveolar": "t d n l r ɾ ɗ ɫ ɭ ɬ ɮ ɺ ʈ ɖ ɳ ɽ",
    "sibilant": "s z",
    "postalveolar": "ʃ ʒ ɕ ʑ ʂ ʐ ɧ",
    "velar": "k ɡ g ɠ ŋ x ɣ q ɢ χ ʁ ʀ ɴ c ɟ ç ɲ ʎ ʝ ʟ ɰ",
    "r": "ɹ ɻ ɚ ɝ",
    "rounded_close": "w u ʊ y ʏ ʉ ɥ ʍ ø ɵ",
    "rounded_open": "o ɔ ɒ œ ɶ ɞ",
    "open": "a æ ɑ",
    "mid": "e ɛ",
    "spread": "i ɪ j ɨ ᵻ",
    "neutral": "ə ɐ ʌ ɘ ɜ ɤ ɯ ᵊ",
    "other": "h ɦ ħ ʕ ʔ ʡ ʢ",
}
_CLASS_OF = {letter: CLASSES.index(name) for name, letters in _LETTERS.items() for letter in letters.split()}
# Marks that are sounds of their own for the lips: p͡ʰ ends open, pʲ is left with spread lips, kʷ with rounded ones.
_CLASS_OF |= {
    "ʰ": CLASSES.index("other"),
    "ʱ": CLASSES.index("other"),
    "ʲ": CLASSES.index("spread"),
    "ʷ": CLASSES.index("rounded_close"),
}
_SHORT = set("ʰʱʲʷ")
# Stress, length, syllable breaks, tones, ties, rhoticity: not visible on the lips. Combining marks (nasal, voiceless,
# dental, …) are recognised by their Unicode class.
_IGNORED = set("ˈˌːˑ.‿|‖˥˦˧˨˩↗↘ꜛꜜ'’ʼˠˤⁿˡᵝ˞~^-_;:!?,\"") | set("0123456789¹²³⁴⁵⁶⁷⁸⁹")
_LONG = {"ː": 2.0, "ˑ": 1.5}
STOPS = frozenset("pbtdʈɖcɟkɡgqɢʔɓɗɠ")  # begin with a silence, or nearly one
_AFFRICATES = {a + b: b for a in "tdʈɖcɟ" for b in "szʃʒɕʑʂʐ"}


@dataclass(frozen=True)
class Phone:
    """One sound in time; ipa "" is a pause."""

    start_s: float
    end_s: float
    ipa: str


def letters_of(ipa: str) -> list[str]:
    """The letters of a phone that are sounds; unknown ones among them, marks not."""
    return [
        c
        for c in unicodedata.normalize("NFD", ipa)
        if not unicodedata.combining(c) and c not in _IGNORED and not c.isspace()
    ]


def unknown_letters(ipa: str) -> list[str]:
    """The letters of a phone that the table does not know; they are taken for neutral."""
    return [c for c in letters_of(ipa.replace("ç", "c")) if c not in _CLASS_OF]


def lip_shapes(ipa: str) -> tuple[tuple[int, float], ...]:
    """(class, share of the phone's time) in order; shares sum to one. A pause, or a phone of marks alone, is silence.

    An affricate has the shape of its second half from its start. An aspiration or a glide by mark has half a letter's
    time.
    """
    # ç must not lose its cedilla, which is a combining mark once decomposed.
    letters, weights = [], []
    for c in unicodedata.normalize("NFD", ipa.replace("ç", "x")):
        if c in _LONG and weights:
            weights[-1] *= _LONG[c]
        elif not unicodedata.combining(c) and c not in _IGNORED and not c.isspace():
            if letters and letters[-1] + c in _AFFRICATES:
                letters[-1] = c
                weights[-1] *= 1.5
            else:
                letters.append(c)
                weights.append(0.5 if c in _SHORT else 1.0)
    if not letters:
        return ((SILENCE, 1.0),)
    total = sum(weights)
    return tuple((_CLASS_OF.get(c, NEUTRAL), w / total) for c, w in zip(letters, weights, strict=True))


def shapes_in_time(phones: tuple[Phone, ...], end_s: float) -> list[tuple[float, float, int]]:
    """(start_s, end_s, class) without a hole from 0 to `end_s`: phones cut into shapes, what lies between them silence.

    Neighbours of one class are one. InputError where phones overlap or run backwards.
    """
    out: list[tuple[float, float, int]] = []

    def add(start: float, end: float, kind: int) -> None:
        if end <= start:
            return
        if out and out[-1][2] == kind:
            out[-1] = (out[-1][0], end, kind)
        else:
            out.append((start, end, kind))

    at = 0.0
    for phone in phones:
        if phone.start_s < at - 1e-6 or phone.end_s < phone.start_s:
            raise InputError(
                f"The phone {phone.ipa!r} at {phone.start_s:.3f} s begins before the one before it ends ({at:.3f} s). "
                "Sort the phones."
            )
        add(at, phone.start_s, SILENCE)
        at = max(at, phone.start_s)
        for kind, share in lip_shapes(phone.ipa):
            end = at + share * (phone.end_s - phone.start_s)
            add(at, end, kind)
            at = end
        at = phone.end_s
    add(at, end_s, SILENCE)
    return out


def frame_classes(phones: tuple[Phone, ...], frames: int, fps: float = 25.0) -> Int[np.ndarray, "t"]:
    """The class that sounds in the middle of each frame."""
    middle = (np.arange(frames) + 0.5) / fps
    out = np.full(frames, SILENCE, np.int64)
    for start, end, kind in shapes_in_time(phones, frames / fps):
        out[(middle >= start) & (middle < end)] = kind
    return out
