"""How much the mouth moves in finished frames, against the person's own recording.

    python -m research.benchmarks.mouths --avatars A.hicode B.hicode --clips A.clip B.clip --sounds X.wav Y.wav \\
        --json docs/results/mouths.json

Each avatar speaks the first seconds of every sound, with its calibration and without. Landmarks are found in every
second frame, alike in the recording. Lengths in % of the outer-eye distance; figures are means over the sounds.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from hicode.audio import SAMPLE_RATE_HZ
from hicode.avatar.avatar import Avatar
from hicode.evaluation.lips import detect, opening
from hicode.evaluation.motion_statistics import closed_share, speed, width
from hicode.media.audio import read_speech
from hicode.motion import LIPS
from hicode.preparation.clip import Clip
from hicode.session.config import SpeakConfig
from hicode.session.speak import synthesize
from hicode.tracking.landmarks import FaceLandmarker
from research.reproduce.docs import save_results

EVERY, SAMPLES, RECORDED = 2, 2, 240
COLUMNS = ("", "opening", "closed, %", "deviation of width", "speed", "opening / own", "closed - own", "width / own")


@dataclass(frozen=True)
class Mouths:
    """Of one video: mean opening, closed share, deviation of width, speed; all in %."""

    opening: float
    closed: float
    width: float
    speed: float

    @staticmethod
    def of(frames: list[np.ndarray], landmarker: FaceLandmarker) -> "Mouths":
        """From its frames."""
        points = detect(frames, landmarker, SAMPLES)
        gap, moved = opening(points), speed(points, LIPS)
        wide = 100 * float(np.nanstd(width(points)))
        return Mouths(100 * float(np.nanmean(gap)), 100 * (closed_share(gap) or 0.0), wide, moved or 0.0)

    def row(self, name: str, own: "Mouths") -> list[str]:
        """For the table."""
        values = (self.opening, self.closed, self.width, self.speed)
        against = (
            f"{self.opening / own.opening:.2f}",
            f"{self.closed - own.closed:+.0f}",
            f"{self.width / own.width:.2f}",
        )
        return [name, *(f"{v:.{d}f}" for v, d in zip(values, (1, 0, 1, 2))), *against]


def mean(found: list[Mouths]) -> Mouths:
    """Of several videos."""
    return Mouths(*np.mean([(m.opening, m.closed, m.width, m.speed) for m in found], 0).tolist())


def main(
    avatars: tuple[Path, ...],
    clips: tuple[Path, ...],
    sounds: tuple[Path, ...],
    seconds: float = 4.0,
    json: Path | None = None,
) -> int:
    """Print the table; with --json, write it."""
    torch.set_num_threads(1)
    landmarker, rows = FaceLandmarker(), []
    heard = [read_speech(sound)[: round(seconds * SAMPLE_RATE_HZ)] for sound in sounds]
    for file, folder in zip(avatars, clips, strict=True):
        avatar, clip = Avatar.load(file), Clip.open(folder)
        own = Mouths.of([clip.image(t) for t in range(0, min(RECORDED, len(clip.track)), EVERY)], landmarker)
        rows.append(own.row(f"{folder.stem}: recording", own))
        assert avatar.speech is not None, f"{file} has no speech models"
        for name, calibration in (("as predicted", None), ("calibrated", avatar.speech.calibration)):
            speaker = replace(avatar, speech=replace(avatar.speech, calibration=calibration))
            found = []
            for samples in heard:
                spoken = synthesize(speaker, samples, SpeakConfig(blinks=False, film_grain=False))
                found.append(Mouths.of([f.image for i, f in enumerate(spoken) if i % EVERY == 0], landmarker))
            rows.append(mean(found).row(f"{folder.stem}: {name}", own))
            print(rows[-1], flush=True)
    if json:
        command = "python -m research.benchmarks.mouths --avatars AVATARS --clips CLIPS --sounds SOUNDS"
        save_results(json, COLUMNS, rows, command)
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main))
