"""Frames that a clip cannot use: damaged on the way, frozen while the sound went on, or dark (fades from black)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from hicode.audio import FPS

Kind = Literal["damaged", "frozen", "dark"]

# A frozen picture changes by nothing, or by what its encoder still refines; a person's by more than its noise.
_STILL_LEVELS = 0.1
_FROZEN_FRAMES = round(0.4 * FPS)
# A face in even light varies by a tenth. Darker than half of the usual is dark; a fade rises steadily from there.
_DARK, _FADED = 0.5, 0.93
_LONGEST_FADE = round(2 * FPS)


@dataclass(frozen=True)
class Defect:
    """The frames from `first` to before `end`."""

    kind: Kind
    first: int
    end: int


class DefectFinder:
    """Looks at a clip's frames one after the other."""

    def __init__(self):
        self._before: np.ndarray | None = None
        self._damaged: list[bool] = []
        self._still: list[bool] = []
        self._luma: list[float] = []

    def add(self, frame: UInt8[np.ndarray, "h w 3"], damaged: bool) -> None:
        """The next frame."""
        small = frame[::2, ::2].astype(np.int16)
        still = self._before is not None and np.abs(small - self._before).mean() < _STILL_LEVELS
        self._before = small
        self._damaged.append(damaged)
        self._still.append(bool(still))
        self._luma.append(float(small.mean()))

    def defects(self) -> list[Defect]:
        """All of them, in order; a frame may be in several."""
        found = [Defect("damaged", *run) for run in runs(np.array(self._damaged, bool))]
        found += [Defect("frozen", a, b) for a, b in runs(np.array(self._still, bool)) if b - a >= _FROZEN_FRAMES]
        found += [Defect("dark", *run) for run in _dark_runs(np.array(self._luma))]
        return sorted(found, key=lambda defect: defect.first)


def usable(count: int, defects: list[Defect]) -> Bool[np.ndarray, "t"]:
    """Which of `count` frames have no defect."""
    mask = np.ones(count, bool)
    for defect in defects:
        mask[defect.first : defect.end] = False
    return mask


def runs(mask: Bool[np.ndarray, "t"]) -> list[tuple[int, int]]:
    """(first, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def longest_run(mask: Bool[np.ndarray, "t"]) -> range:
    """The longest run of True, the first of equals; the whole where there is none."""
    return range(*max(runs(mask), key=lambda run: run[1] - run[0], default=(0, len(mask))))


def _dark_runs(luma: Float[np.ndarray, "t"]) -> list[tuple[int, int]]:
    """Dark frames, with those of the fades around them."""
    usual, dark = float(np.median(luma)) if len(luma) else 0.0, luma < 0
    for first, end in runs(luma < _DARK * usual):
        low, high = first, end
        while high < len(luma) and high - end < _LONGEST_FADE and luma[high - 1] < luma[high] < _FADED * usual:
            high += 1
        while low > 0 and first - low < _LONGEST_FADE and luma[low] < luma[low - 1] < _FADED * usual:
            low -= 1
        dark[low:high] = True
    return runs(dark)
