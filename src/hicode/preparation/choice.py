"""Which seconds of a long video a head learns from: those with the most poses and mouth shapes, sharp ones first.

Motion is known of every frame: speech is learned from all. Head masks, exact poses and the head's training see the
chosen seconds only, so what they cost does not grow with the video. t frames, in blocks of a second.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8

from hicode.audio import FPS
from hicode.geometry import axis_angle_from_rotation
from hicode.motion import LOWER_LIP_INNER, MOUTH_CORNERS_INNER, UPPER_LIP_INNER, FaceTrack
from hicode.preparation.defects import runs

BLOCK = round(FPS)  # frames

Grey = Callable[[int], UInt8[np.ndarray, "h w"]]


@dataclass(frozen=True)
class ChoiceConfig:
    """How much of a long video is chosen. A draft sees 1,800 frames, some of them twice."""

    seconds: float = 24.0  # Seconds of the training part that the head learns from.
    run_s: float = 8.0  # Of them in one piece: it drives the avatar.
    blurred: float = 0.7  # A second whose face is less sharp than so many times the median comes last.


@dataclass(frozen=True)
class Choice:
    """[first, end] of each chosen run of frames, the test part among them; how many seconds of training they are."""

    runs: list[list[int]]
    seconds: float

    def mask(self, count: int) -> Bool[np.ndarray, "t"]:
        """Which of `count` frames are chosen."""
        chosen = np.zeros(count, bool)
        for first, end in self.runs:
            chosen[first:end] = True
        return chosen


def choose(track: FaceTrack, train: range, good: Bool[np.ndarray, "t"], grey: Grey, config: ChoiceConfig) -> Choice:
    """Of a landmark fit: everything where the training part is short; else one long run, and single seconds.

    The run is the one in which the head moves most. Then comes, again and again, the second that shows what is farthest
    from all that is chosen. Frames that are not `good`, or show no face, are left out with their seconds.
    """
    count = len(track)
    if len(train) <= round(config.seconds * BLOCK):
        return Choice([[0, count]], len(train) / BLOCK)
    good = good & (track.confidence.numpy() > 0)
    starts = np.arange(train.start, train.stop - BLOCK + 1, BLOCK)
    looks, sharp = _looks(track, train), np.array([_sharpness(track, grey, int(t) + BLOCK // 2) for t in starts])
    whole = np.array([good[t : t + BLOCK].all() for t in starts])
    if not whole.any():
        return Choice([[0, count]], len(train) / BLOCK)
    worth = whole.astype(float) * np.where(sharp < config.blurred * np.median(sharp[whole]), 0.5, 1.0)
    long = max(1, round(config.run_s))
    variety = [
        (looks[t : t + long * BLOCK].std(0).mean() * worth[b : b + long].min(), -b)
        for b, t in enumerate(starts[: max(1, len(starts) - long + 1)])
    ]
    first = -max(variety)[1]
    taken = np.zeros(len(starts), bool)
    far = np.full(len(looks), np.inf)

    def take(block: int) -> None:
        taken[block] = True
        for look in looks[starts[block] : starts[block] + BLOCK : 5]:
            np.minimum(far, np.linalg.norm(looks - look, axis=1), out=far)

    for block in range(first, min(first + long, len(starts))):
        take(block)
    while taken.sum() < round(config.seconds) and (whole & ~taken).any():
        new = np.array([far[t : t + BLOCK].max() for t in starts])
        take(int(np.where(taken | ~whole, -1, new * worth).argmax()))
    chosen = np.zeros(count, bool)
    for block in np.flatnonzero(taken):
        chosen[starts[block] : starts[block] + BLOCK] = True
    seconds = float(chosen.sum()) / BLOCK
    chosen[: train.start] = chosen[train.stop :] = True
    return Choice([list(run) for run in runs(chosen)], seconds)


def _looks(track: FaceTrack, train: range) -> Float[np.ndarray, "t 5"]:
    """Head rotation, opening and width of the mouth, in deviations of the training part."""
    points = track.motion.landmarks
    length = lambda a, b: (points[:, a] - points[:, b]).norm(dim=1)
    mouth = [length(UPPER_LIP_INNER, LOWER_LIP_INNER), length(*MOUTH_CORNERS_INNER)]
    T = track.motion.T_camera_head
    turned = axis_angle_from_rotation(T[train.start, :3, :3].T @ T[:, :3, :3])
    looks = torch.cat([turned, torch.stack(mouth, 1)], 1).double().numpy()
    part = looks[train.start : train.stop]
    return (looks - part.mean(0)) / (part.std(0) + 1e-6)


def _sharpness(track: FaceTrack, grey: Grey, t: int) -> float:
    """Of the face's finest detail, in grey levels."""
    picture, points = grey(t), track.landmarks_px[t].numpy()
    x0, y0 = np.clip(points.min(0), 0, np.array(picture.shape[::-1]) - 8).astype(int)
    x1, y1 = np.clip(points.max(0), (x0 + 8, y0 + 8), picture.shape[::-1]).astype(int)
    face = picture[y0:y1, x0:x1].astype(np.float32)
    return float((face - cv2.GaussianBlur(face, (0, 0), 1.5)).std())


def hidden(track: FaceTrack, chosen: Bool[np.ndarray, "t"]) -> FaceTrack:
    """The track as if only the chosen frames showed a face: the others are not read."""
    return replace(track, confidence=torch.where(torch.from_numpy(chosen), track.confidence, 0.0))


def completed(track: FaceTrack, before: FaceTrack, chosen: Bool[np.ndarray, "t"]) -> FaceTrack:
    """A track that was corrected in its chosen frames only: the others are as `before`, shifted by the mean correction.

    Corrections differ from second to second. Interpolated between chosen seconds they are worse than none.
    """
    if chosen.all():
        return track
    known, old, new = torch.from_numpy(chosen), before.motion, track.motion
    expression, landmarks = (
        torch.where(known.view(-1, *[1] * (b.ndim - 1)), b, a + (b - a)[known].mean(0))
        for a, b in ((old.expression, new.expression), (old.landmarks, new.landmarks))
    )
    motion = replace(new, expression=expression, landmarks=landmarks)
    return replace(track, motion=motion, confidence=before.confidence)
