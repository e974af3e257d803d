"""Score the saved frames of a cell again, and compare with its stored figures."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hicode.evaluation.images import AREAS, Truth, mean_of_frames
from hicode.evaluation.lips import LMD_SIZE_PX, detect, lip_distances
from hicode.files import read_json
from hicode.preparation.clip import Clip, read_png
from hicode.tracking.landmarks import FaceLandmarker
from research.reproduce.cells import SCHEMA, VERSION

# Allowed differences: convolutions of another machine sum in another order.
TOLERANCES = {"psnr": 2e-3, "ssim": 1e-4, "lpips": 1e-3, "lmd_px": 0.02}


@dataclass(frozen=True)
class Difference:
    """A stored figure that the saved frames do not give."""

    key: str
    figure: str
    stored: float | None
    again: float | None

    def __str__(self) -> str:
        return f"cell {self.key}: {self.figure} is stored as {self.stored}, its frames give {self.again}"


@dataclass
class _Comparison:
    key: str
    compared: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, figure: str, kind: str, stored: float | None, again: float | None) -> None:
        self.compared += 1
        pair = [v for v in (stored, again) if v is not None and np.isfinite(v)]
        if len(pair) == 1 or (len(pair) == 2 and abs(pair[0] - pair[1]) > TOLERANCES[kind]):
            self.differences.append(Difference(self.key, figure, stored, again))


def check_cell(file: Path) -> tuple[int, list[Difference]]:
    """Score a cell's saved frames again: how many figures were compared, and those that differ by more than TOLERANCES.

    Compares the figures of each kept frame; and if all test frames were kept, the means that the tables show. Timings
    and cross-identity rows have no frames. Raises FileFormatError if frames or clip are missing.
    """
    stored = read_json(file, SCHEMA, VERSION)
    report, clip = stored["report"], Clip.open(file.parent.parent / stored["clip"]["folder"])
    comparison, landmarker = _Comparison(stored["key"]), FaceLandmarker()
    truths: dict[int, tuple[Truth, np.ndarray]] = {}
    for row, kept in stored["kept_frames"].items():
        scores, distances = [], []
        for i in kept:
            image = read_png(file.with_suffix(".frames") / row / f"{i:06d}.png", grey=False)
            if i not in truths:
                t = clip.test[i]
                truth = Truth(clip.image(t), clip.head_mask(t), clip.track.mouth_box(t))
                truths[i] = truth, detect([clip.image(t)], landmarker)
            truth, points = truths[i]
            scores.append(truth.compare(image))
            distances.append(float(lip_distances(detect([image], landmarker), points)[0][0]) * LMD_SIZE_PX / clip.width)
            again = {
                "psnr_head": scores[-1]["head"]["psnr"],
                "psnr_mouth": scores[-1]["mouth"]["psnr"],
                "lpips_frame": scores[-1]["frame"]["lpips"],
                "lmd_px": distances[-1],
            }
            for name, value in again.items():
                kind = name if name in TOLERANCES else name.split("_")[0]
                comparison.add(f"{row} {name} of test frame {i}", kind, report["per_frame"][row][name][i], value)
        if len(kept) == len(clip.test):
            _compare_means(comparison, row, report[row], scores, distances)
    return comparison.compared, comparison.differences


def _compare_means(comparison: _Comparison, row: str, stored: dict, scores: list[dict], distances: list[float]) -> None:
    for area in AREAS:
        for kind in ("psnr", "ssim", "lpips"):
            again = mean_of_frames([s[area][kind] for s in scores])
            comparison.add(f"{row} {area} {kind}", kind, stored[area][kind], again)
    finite = [d for d in distances if np.isfinite(d)]
    comparison.add(f"{row} lmd_px", "lmd_px", stored["lmd_px"], float(np.mean(finite)) if finite else None)
