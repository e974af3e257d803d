"""Contact sheets of an avatar's mouth while it speaks, with the sounds beneath.

    python -m research.benchmarks.sheets AVATAR --cache CORPUS --audio speech/*.wav -o sheets
    python -m research.benchmarks.sheets --cache CORPUS

CORPUS is what `hicode pretrain` made. Its synthetic speakers have known phones; they train a linear recogniser of lip
shapes (`research.pretrain.phones.CLASSES`) on the avatar's speech features. So any recording in any language gets its
sounds. The second form says how well it recognises synthetic speakers that it has not seen. A sheet shows the three
seconds with the most p, b, m: the mouth of every frame, its shape, its gap in the image.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hicode.errors import HicodeError
from hicode.media.audio import read_speech
from hicode.motion import LIPS
from hicode.speech.encoders import create_encoder, match_frames
from research.pretrain.corpus import load_synthetic
from research.pretrain.phones import BILABIAL, CLASSES

SHEET_S, COLUMNS, TILE = 3.0, 15, 120
SHORT = {
    "silence": ".",
    "bilabial": "PBM",
    "labiodental": "FV",
    "dental": "TH",
    "alveolar": "TDN",
    "sibilant": "SZ",
    "postalveolar": "SH",
    "velar": "KG",
    "r": "R",
    "rounded_close": "U W",
    "rounded_open": "O",
    "open": "A",
    "mid": "E",
    "spread": "I",
    "neutral": "@",
    "other": "H",
}


class Shapes:
    """Lip shapes from features: linear discriminants over a frame and its neighbours."""

    def __init__(self, features: list[Tensor], classes: list[Tensor], ridge: float = 30.0):
        rows = torch.cat([self._context(f) for f in features]).double()
        labels = torch.cat(classes)
        self.mean, self.std = rows.mean(0), rows.std(0) + 1e-3
        x = (rows - self.mean) / self.std
        count = torch.bincount(labels, minlength=len(CLASSES)).double().clamp(min=1)
        weight = (count.mean() / count)[
            labels
        ].sqrt()  # rare shapes count for more than their number, common ones for less
        target = F.one_hot(labels, len(CLASSES)).double() - 1 / len(CLASSES)
        gram = (x * weight[:, None]).T @ x + ridge * len(x) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
        self.weight = torch.linalg.solve(gram, (x * weight[:, None]).T @ target)

    @staticmethod
    def _context(features: Tensor) -> Tensor:
        frames = features.unflatten(0, (-1, 2)).mean(1)
        index = torch.arange(len(frames))[:, None] + torch.arange(-1, 2)
        return frames[index.clamp(0, len(frames) - 1)].flatten(1)

    def __call__(self, features: Tensor) -> Tensor:
        """The likeliest class of each frame, "t"."""
        return (((self._context(features).double() - self.mean) / self.std) @ self.weight).argmax(1)


def recogniser(cache: Path) -> Shapes:
    """Learned from four fifths of the synthetic speakers; how well it does on the others is printed."""
    items = load_synthetic(cache)
    if not items:
        raise SystemExit(
            f"{cache} has no synthetic speakers. Make them: hicode pretrain FOLDER --cache {cache}, with "
            "espeakng-loader installed."
        )
    number = [int(s.example.speaker.split("-")[1]) for s in items]
    trained = [s for s, n in zip(items, number) if n % 5]
    shapes = Shapes([s.example.features[0] for s in trained], [s.classes for s in trained])
    unseen = [s for s, n in zip(items, number) if n % 5 == 0]
    said, found = torch.cat([s.classes for s in unseen]), torch.cat([shapes(s.example.features[0]) for s in unseen])
    lips = said == BILABIAL
    near = F.max_pool1d((found == BILABIAL).float()[None, None], 3, 1, 1)[0, 0] > 0
    print(
        f"unseen synthetic speakers: {100 * (said == found).double().mean():.0f} % of frames right in {len(CLASSES)} "
        "shapes, p b m found within a "
        f"frame {100 * near[lips].double().mean():.0f} %, p b m where there is none "
        f"{100 * (found == BILABIAL)[~lips].double().mean():.1f} %"
    )
    return shapes


def sheet(avatar, audio: Path, shapes: Shapes, out: Path) -> None:
    import cv2

    from hicode.evaluation.lips import detect, opening
    from hicode.session.speak import synthesize
    from hicode.tracking.landmarks import FaceLandmarker

    sound = read_speech(audio)
    count = -(-len(sound) // 640)
    found = shapes(match_frames(create_encoder().encode(sound), count)).numpy()
    length = min(round(25 * SHEET_S), count)
    per_window = np.convolve(found == BILABIAL, np.ones(length), "valid")
    first = int(per_window.argmax())
    lead = min(first, 50)  # the stream needs its past
    spoken = synthesize(avatar, sound[(first - lead) * 640 : (first + length) * 640])
    frames = [frame.image for i, frame in enumerate(spoken) if i >= lead]
    points = detect(frames, FaceLandmarker())
    gaps = opening(points)
    lips = points[:, LIPS, :2]
    centre = np.nanmedian((np.nanmin(lips, 1) + np.nanmax(lips, 1)) / 2, 0)
    half = 0.75 * float(np.nanmedian(np.nanmax(lips[..., 0], 1) - np.nanmin(lips[..., 0], 1)))
    rows = -(-length // COLUMNS)
    picture = np.full((rows * (TILE + 26), COLUMNS * TILE, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        x, y = (int(np.clip(c - half, 0, s - 2 * half)) for c, s in zip(centre, frame.shape[1::-1]))
        tile = cv2.resize(
            frame[y : y + int(2 * half), x : x + int(2 * half)], (TILE, TILE), interpolation=cv2.INTER_AREA
        )
        top, left = i // COLUMNS * (TILE + 26), i % COLUMNS * TILE
        picture[top : top + TILE, left : left + TILE] = tile
        label = f"{SHORT[CLASSES[found[first + i]]]} {100 * gaps[i]:.0f}"
        colour = (200, 0, 0) if found[first + i] == BILABIAL else (0, 0, 0)
        cv2.putText(picture, label, (left + 4, top + TILE + 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA)
    out.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out / f"{audio.stem}.png"), picture[..., ::-1])
    shut = [
        np.nanmin(gaps[max(0, i - 1) : i + 2]) < 0.02 for i in np.flatnonzero(found[first : first + length] == BILABIAL)
    ]
    print(
        f"{audio.stem}: {first / 25:.1f} s on, p b m {len(shut)} frames, lips closed within a frame in "
        f"{100 * np.mean(shut) if shut else float('nan'):.0f} %, "
        f"closed elsewhere {100 * np.nanmean(gaps[found[first : first + length] > BILABIAL] < 0.02):.0f} %, "
        f"gap median {100 * np.nanmedian(gaps):.1f}, 90 % {100 * np.nanquantile(gaps, 0.9):.1f} % of the eye distance"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("avatar", type=Path, nargs="?")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--audio", type=Path, nargs="*", default=[])
    parser.add_argument("-o", "--out", type=Path, default=Path("sheets"))
    options = parser.parse_args()
    shapes = recogniser(options.cache)
    if options.avatar is None:
        return
    from hicode.avatar.avatar import Avatar

    try:
        avatar = Avatar.load(options.avatar)
        for audio in options.audio:
            sheet(avatar, audio, shapes, options.out)
    except HicodeError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
