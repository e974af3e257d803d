"""Closure and opening by language: how often a model closes the lips on p, b, m and opens them on open vowels.

Phones of synthesised speech are known (`research.pretrain.espeak`), so no camera and no alignment is needed. t frames.
*Gap* is `lips.opening`: the distance of the inner lips over the outer-eye distance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hicode.errors import InputError
from hicode.evaluation.lips import CLOSED, Closure, closure
from hicode.motion import LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from hicode.speech.lip_closure import lip_gap
from research.pretrain.phones import BILABIAL, CLASSES, Phone, frame_classes, shapes_in_time

SHORTEST_CLOSURE_S = 0.05  # shorter ones (a b in passing) may come between two frames
_HELD = 0.62  # of a stop's time the lips are held, then comes the burst: see espeak._with_closures


@dataclass(frozen=True)
class LanguageRates:
    """Of one language: closures due and come, and how far apart an open vowel and a closure are.

    closure      as `lips.closure` counts; its `elsewhere` are false closures, outside pauses
    open_vowel   mean gap while an open vowel sounds; None without one
    bilabial     mean over closures due of the least gap in each
    rest         mean gap in the middle of pauses; None without one
    """

    closure: Closure
    open_vowel: float | None
    bilabial: float | None
    rest: float | None


def closures_due(
    phones: tuple[Phone, ...], frames: int, fps: float = 25.0, shortest_s: float = SHORTEST_CLOSURE_S
) -> list[tuple[int, int]]:
    """[first, end) of the frames in which the lips are held together for each p, b, m of at least `shortest_s`."""
    due = []
    for start, end, kind in shapes_in_time(phones, frames / fps):
        if kind == BILABIAL and end - start >= shortest_s:
            first = int(np.floor(start * fps))
            due.append((first, min(max(int(np.ceil((start + _HELD * (end - start)) * fps)), first + 1), frames)))
    return due


def closure_rates(
    gaps: list[Float[np.ndarray, "t"]],
    phones: list[tuple[Phone, ...]],
    languages: list[str],
    closed: float = CLOSED,
    fps: float = 25.0,
) -> dict[str, LanguageRates]:
    """Rates of each language over recordings: a gap track, its phones, and the language of each.

    Run it on the truth too (`SyntheticExample.example.landmarks`), for the best possible row. Raises InputError if the
    lists differ in length.
    """
    if not len(gaps) == len(phones) == len(languages):
        raise InputError(
            f"There are {len(gaps)} gap tracks, {len(phones)} of phones and {len(languages)} languages. Give one of "
            "each a recording."
        )
    out = {}
    for language in dict.fromkeys(languages):
        hits = due = unknown = 0
        false_frames = free_frames = 0
        vowels, least, rests = [], [], []
        for gap, spoken, _ in (r for r in zip(gaps, phones, languages, strict=True) if r[2] == language):
            gap = np.asarray(gap, np.float64)
            kinds = frame_classes(spoken, len(gap), fps)
            wanted = closures_due(spoken, len(gap), fps)
            counted = closure(gap, wanted, closed)
            hits, due, unknown = hits + counted.hits, due + counted.due, unknown + counted.unknown
            # Lips may be closed in a pause and near any p, b, m, however short. False closures are counted in the rest
            # of the speech.
            near = np.convolve((kinds == BILABIAL) | (kinds == 0), np.ones(5), "same") > 0
            free = np.isfinite(gap) & ~near
            false_frames, free_frames = false_frames + int((gap[free] < closed).sum()), free_frames + int(free.sum())
            vowels.append(gap[(kinds == CLASSES.index("open")) & np.isfinite(gap)])
            quiet = np.convolve(kinds == 0, np.ones(9), "same") >= 9
            rests.append(gap[quiet & np.isfinite(gap)])
            least += [
                float(np.nanmin(part)) for a, b in wanted if np.isfinite(part := gap[max(0, a - 1) : b + 1]).any()
            ]
        out[language] = LanguageRates(
            Closure(hits, due, unknown, false_frames / free_frames if free_frames else None),
            _mean(np.concatenate(vowels)), _mean(np.array(least)), _mean(np.concatenate(rests)),
        )  # fmt: skip
    return out


def measure_languages(
    gap_of: Callable[[Float[np.ndarray, "n"]], Float[np.ndarray, "t"]],
    per_language: int = 4,
    seed: int = 1000,
    languages: tuple[str, ...] = (),
) -> dict[str, LanguageRates]:
    """Rates of a model on `per_language` sentences of each language, each with its own voice in a quiet room.

    `gap_of` returns the model's gap for a sound at 16 kHz, one value per 640 samples (`landmark_gap` of its landmarks).
    The sentences are those of `synthetic.corpus`; voices, speeds and rooms are those of this seed. Raises InputError if
    espeakng-loader is not installed.
    """
    from research.pretrain.espeak import Espeak, sentences
    from research.pretrain.synthetic import Speaker, recorded

    gaps, phones, spoken = [], [], []
    with Espeak() as espeak:
        for l, language in enumerate(languages or tuple(sentences())):
            rng = np.random.default_rng((seed, l))
            for k in rng.permutation(len(sentences()[language]))[:per_language]:
                speaker = Speaker.sample("test", language, rng)
                said = espeak.say(sentences()[language][k], speaker.voice, speaker.words_per_minute, speaker.pitch)
                samples, heard = recorded(said, rng)
                gaps.append(gap_of(samples))
                phones.append(heard)
                spoken.append(language)
    return closure_rates(gaps, phones, spoken)


def landmark_gap(landmarks: Float[Tensor, "t 478 3"]) -> Float[np.ndarray, "t"]:
    """Height between the inner lips over the outer-eye distance, in the frontal plane of the head frame.

    Depth does not count: lips that touch lie at different depths.
    """
    gap = lip_gap(landmarks).clamp(min=0)
    return (gap / (landmarks[:, LEFT_EYE_OUTER] - landmarks[:, RIGHT_EYE_OUTER]).norm(dim=-1)).numpy()


def lines(rates: dict[str, LanguageRates]) -> list[str]:
    """A table row a language."""

    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f}"

    rows = [
        "| language | closures | recall % | closed elsewhere % | open vowel % | p b m % | pause % |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in rates.items():
        values = (r.closure.recall, r.closure.elsewhere, r.open_vowel, r.bilabial, r.rest)
        rows.append(f"| {name} | {r.closure.due} | " + " | ".join(map(percent, values)) + " |")
    return rows


def _mean(x: np.ndarray) -> float | None:
    return float(x.mean()) if len(x) else None
