"""The pictures of a report's page, chosen while the frames pass: only what is shown is held."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from hicode.evaluation.images import Box
from hicode.evaluation.rows import Compared, Row

WORST_SHOWN, SPREAD_SHOWN, STRIP_SHOWN = 6, 2, 24
Image = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class ShownFrame:
    """A frame as the page shows it: the truth, each row's image and head PSNR (NaN: it has none), and what chose it."""

    t: int
    why: str
    truth: Image
    images: dict[str, Image]
    psnr_head: dict[str, float]


@dataclass(frozen=True, eq=False)
class Pictures:
    """`frames` side by side, worst first; `strip`: (frame, {row: mouth crop}) evenly through the frames; `sound` at
    16 kHz, 640 samples a frame, or None."""

    frames: list[ShownFrame]
    strip: list[tuple[int, dict[str, Image]]]
    sound: Float32[np.ndarray, "n"] | None = None


class Gallery:
    """Collects the frames with the lowest head PSNR of the row `judged`, a few others, and mouths through time.

    `mouths`: the mouth boxes of all frames, None where there is no face. `window`: the part of a frame that is shown.
    """

    def __init__(
        self,
        judged: str,
        mouths: Sequence[Box | None],
        size: tuple[int, int],
        window: tuple[slice, slice] = np.s_[:, :],
        note: str = "",
    ):
        self.judged, self._window, self._note = judged, window, note
        self._spread = set(evenly(len(mouths), SPREAD_SHOWN))
        seen = [(i, box) for i, box in enumerate(mouths) if box is not None]
        picked = [seen[k] for k in evenly(len(seen), STRIP_SHOWN)]
        windows = mouth_windows([box for _, box in picked], *size)
        self._mouths = {i: window for (i, _), window in zip(picked, windows, strict=True)}
        self._worst: list[tuple[float, int, ShownFrame]] = []
        self._others: list[tuple[int, ShownFrame]] = []
        self._strip: list[tuple[int, dict[str, Image]]] = []

    def watch(self, frames: Iterable[Compared], rows: dict[str, Row]) -> Iterator[Compared]:
        """Look at frames that were just measured, and give them on."""
        for i, frame in enumerate(frames):
            self._look(i, frame, rows)
            yield frame

    def _look(self, i: int, frame: Compared, rows: dict[str, Row]) -> None:
        scores = {name: row.images[i]["head"]["psnr"] for name, row in rows.items() if name in frame.images}
        judged = scores.get(self.judged, float("nan"))
        if np.isfinite(judged) and (len(self._worst) < WORST_SHOWN or judged < self._worst[-1][0]):
            self._worst.append((judged, i, self._shown(i, frame, rows, scores)))
            self._worst.sort(key=lambda entry: entry[:2])
            del self._worst[WORST_SHOWN:]
        if i in self._spread:
            self._others.append((i, self._shown(i, frame, rows, scores)))
        if i in self._mouths:
            x0, y0, x1, y1 = self._mouths[i]
            images = {"ground_truth": frame.truth} | {k: v for k, v in frame.images.items() if k != "control"}
            crops = {name: image[y0:y1, x0:x1].copy() for name, image in images.items()}
            self._strip.append((frame.t, crops))

    def _shown(self, i: int, frame: Compared, rows: dict[str, Row], scores: dict[str, float]) -> ShownFrame:
        blind = any(not np.isfinite(rows[name].points[i]).all() for name in ("ground_truth", self.judged))
        note = ("; no face found in it or in the truth" if blind else "") + self._note
        images = {name: image[self._window] for name, image in frame.images.items()}
        return ShownFrame(frame.t, note, frame.truth[self._window], images, scores)

    def pictures(self, sound: Float32[np.ndarray, "n"] | None) -> Pictures:
        """What was collected, worst first."""
        worst = {i for _, i, _ in self._worst}
        frames = [
            _because(f"worst {k + 1} by head PSNR ({self.judged})", shown)
            for k, (_, _, shown) in enumerate(self._worst)
        ]
        frames += [_because("evenly spread", shown) for i, shown in self._others if i not in worst]
        return Pictures(frames, self._strip, sound)


def _because(why: str, shown: ShownFrame) -> ShownFrame:
    return ShownFrame(shown.t, why + shown.why, shown.truth, shown.images, shown.psnr_head)


def evenly(count: int, shown: int) -> list[int]:
    """At most `shown` of `count` indices, evenly spread, first and last among them."""
    return sorted({int(k) for k in np.linspace(0, count - 1, min(count, shown))}) if count else []


def mouth_windows(boxes: list[Box], width: int, height: int) -> list[Box]:
    """Windows of one size about the mouth boxes, as large as the largest, inside the image: time keeps the scale."""
    w = min(max((x1 - x0 for x0, _, x1, _ in boxes), default=0), width)
    h = min(max((y1 - y0 for _, y0, _, y1 in boxes), default=0), height)
    out = []
    for x0, y0, x1, y1 in boxes:
        left = min(max((x0 + x1 - w) // 2, 0), width - w)
        top = min(max((y0 + y1 - h) // 2, 0), height - h)
        out.append((left, top, left + w, top + h))
    return out
