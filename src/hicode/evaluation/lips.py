"""How well the mouth moves: landmark distance, jitter, closure.

Landmarks are detected in the frames as they are seen, the truth's by the same detector, each frame on its own: nothing
of the tracking that trained the avatar, and no smoothing that could hide what a viewer sees. t frames; points "t 478 2"
or "t 478 3" in px, NaN in frames without a face.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hicode.errors import InputError
from hicode.motion import LEFT_EYE_OUTER, LIPS, LOWER_LIP_INNER, N_LANDMARKS, RIGHT_EYE_OUTER, UPPER_LIP_INNER
from hicode.tracking.landmarks import FaceLandmarker, rois_from_landmarks

DETECTOR = (
    "MediaPipe face_landmark_with_attention (478 points, mediapipe 0.10.21), each frame by itself: "
    "region from its face detector, refined once, mean of 4 samples of slightly different regions"
)
# Four samples halve the network's own noise: .58 px of LMD between a frame and itself moved by 8 px become .28.
SAMPLES = 4
LMD_SIZE_PX = 512  # frames of this size are what `lmd_px` is quoted for
CLOSED = 0.02  # lips are closed when their inner edges are nearer than this fraction of the outer-eye distance
PRESENCE = 0.5


def detect(
    frames: list[UInt8[np.ndarray, "h w 3"]], landmarker: FaceLandmarker, samples: int = SAMPLES
) -> Float[np.ndarray, "t 478 3"]:
    """Landmarks of the largest face of each frame, in px; NaN where none is detected or believed."""
    out = np.full((len(frames), N_LANDMARKS, 3), np.nan, np.float32)
    for i, frame in enumerate(frames):
        faces = landmarker.detect(frame)
        if not faces:
            continue
        with torch.inference_mode():
            image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float() / 255
            points, _ = landmarker.landmarks(image, torch.from_numpy(faces[0].roi()[None]).float())
            rois = _varied(rois_from_landmarks(points), samples)
            points, presence = landmarker.landmarks(image.expand(samples, -1, -1, -1), rois)
        if presence.mean() >= PRESENCE:
            out[i] = points.mean(0).numpy()
    return out


def _varied(roi: Float[Tensor, "1 4"], samples: int) -> Float[Tensor, "n 4"]:
    """Variants of a region: shifted by 4 % of its size around a circle, 4 % larger and smaller, turned by 1.7 degrees
    to and fro."""
    k = torch.arange(samples, dtype=roi.dtype)
    wide = 0.0 if samples == 1 else 0.04
    angle, sign = 2 * torch.pi * k / samples, 1 - 2 * (k % 2)
    x, y, size, turn = roi[0]
    shifted = x + wide * angle.cos() * size, y + wide * angle.sin() * size
    return torch.stack([*shifted, size * (1 + wide * sign), turn + 0.75 * wide * sign], -1)


@dataclass(frozen=True)
class LipDistance:
    """LMD over a clip: means over the frames in which both faces were found, and how many were not counted.

    px      mean distance of the 40 lip landmarks in px, for frames 512 px wide
    iod     the same over the distance of the outer eye corners in the truth
    missed  frames without a face in the prediction or in the truth
    """

    px: float | None
    iod: float | None
    frames: int
    missed: int


def lip_distances(
    predicted: Float[np.ndarray, "t 478 c"], truth: Float[np.ndarray, "t 478 c"]
) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
    """LMD of each frame in px and over the outer-eye distance: lip points, each set minus its own mean, mean L2. NaN
    without a face."""
    if len(predicted) != len(truth):
        raise InputError(
            f"The prediction has {len(predicted)} frames, the truth {len(truth)}. "
            "Compare clips of one length: cutting one would shift it."
        )
    a, b = (np.asarray(p, np.float64)[:, LIPS, :2] for p in (predicted, truth))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    px = np.linalg.norm(a - b, axis=-1).mean(1)
    return px, px / eye_distance(truth)


def lip_distance(
    predicted: Float[np.ndarray, "t 478 c"], truth: Float[np.ndarray, "t 478 c"], width_px: int = LMD_SIZE_PX
) -> LipDistance:
    """LMD of a clip whose frames are `width_px` wide. A frame without a face is left out of the mean and counted as
    missed, never as zero."""
    px, iod = lip_distances(predicted, truth)
    known = ~np.isnan(px)
    if not known.any():
        return LipDistance(None, None, len(px), len(px))
    scale = LMD_SIZE_PX / width_px
    return LipDistance(float(px[known].mean() * scale), float(iod[known].mean()), len(px), int((~known).sum()))


def eye_distance(points: Float[np.ndarray, "t 478 c"]) -> Float[np.ndarray, "t"]:
    """Distance of the outer eye corners in the image, px."""
    points = np.asarray(points, np.float64)
    return np.linalg.norm(points[:, RIGHT_EYE_OUTER, :2] - points[:, LEFT_EYE_OUTER, :2], axis=-1)


def opening(points: Float[np.ndarray, "t 478 c"]) -> Float[np.ndarray, "t"]:
    """Gap between the inner lips over the outer-eye distance."""
    points = np.asarray(points, np.float64)
    return np.linalg.norm(points[:, UPPER_LIP_INNER, :2] - points[:, LOWER_LIP_INNER, :2], axis=-1) / eye_distance(
        points
    )


def correlation(a: Float[np.ndarray, "t"], b: Float[np.ndarray, "t"]) -> float | None:
    """Pearson's, over frames that both have; None with fewer than 10 of them or where one does not vary."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 10 or a.std() < 1e-9 or b.std() < 1e-9:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def jitter(points: Float[np.ndarray, "t 478 c"], width_px: int = LMD_SIZE_PX) -> float | None:
    """Mean length of the landmarks' second difference in px at 512, each frame's shift, turn and scale removed.

    What remains of a head that turns smoothly is small; what remains of a shaking one is what the eye calls jitter.
    Compare with the truth's own. None without three frames in a row.
    """
    flat = np.asarray(points, np.float64)[..., :2] @ np.array([1, 1j])
    known = np.isfinite(flat).all(1)
    if known.sum() < 3:
        return None
    reference = flat[known].mean(0)
    reference -= reference.mean()
    shapes = flat - flat.mean(1, keepdims=True)
    # The similarity of the plane that brings a shape closest to the reference: one complex factor.
    factor = (shapes.conj() * reference).sum(1) / (np.abs(shapes) ** 2).sum(1)
    shapes = factor[:, None] * shapes
    second = np.abs(shapes[2:] - 2 * shapes[1:-1] + shapes[:-2]).mean(1)
    second = second[np.isfinite(second)]
    return float(second.mean() * LMD_SIZE_PX / width_px) if len(second) else None


@dataclass(frozen=True)
class Closure:
    """Of the closures due, how many came: `hits` of `due`; `unknown` were not counted, no face being detected in them.

    elsewhere  share of the frames with a face and without a closure due in which the lips are closed all the same; None
               without such frames. A mouth that never opens has a recall of 1: this is what it pays.
    """

    hits: int
    due: int
    unknown: int
    elsewhere: float | None

    @property
    def recall(self) -> float | None:
        """Share of the closures due that came."""
        return self.hits / self.due if self.due else None


def closure(
    gap: Float[np.ndarray, "t"], due: list[tuple[int, int]], closed: float = CLOSED, slack_frames: int = 1
) -> Closure:
    """Recall of lip closure: each [first, end) of frames in which a p, b or m is spoken must have one frame with the
    lips closed.

    `gap` is `opening`; alignments are known for some corpora only. Sounds may be off by a frame: `slack_frames` widens
    each interval.
    """
    hits = unknown = 0
    free = np.isfinite(gap)
    for first, end in due:
        if not 0 <= first < end <= len(gap):
            raise InputError(
                f"A closure is due in frames {first} to {end}, but there are {len(gap)}. "
                "Check that the alignment belongs to this clip."
            )
        values = gap[max(0, first - slack_frames) : end + slack_frames]
        free[max(0, first - slack_frames) : end + slack_frames] = False
        if np.isnan(values).all():
            unknown += 1
        else:
            hits += bool(np.nanmin(values) < closed)
    return Closure(hits, len(due) - unknown, unknown, float((gap[free] < closed).mean()) if free.any() else None)


def motion_in_silence(gap: Float[np.ndarray, "t"], silent: Bool[np.ndarray, "t"]) -> float | None:
    """Mean change of the opening per frame in silence over that in speech: near 0 for a mouth that rests. None where
    either is too short."""
    speed = np.abs(np.diff(gap))
    quiet = silent[1:] & silent[:-1]
    loud = ~silent[1:] & ~silent[:-1]
    speeds = [speed[part & np.isfinite(speed)] for part in (quiet, loud)]
    if min(map(len, speeds)) < 5 or speeds[1].mean() < 1e-9:
        return None
    return float(speeds[0].mean() / speeds[1].mean())


# Silence is 20 dB under the speech's own level for a fifth of a second: rooms of real clips sound at -22 ... -35 dB
# (HDTF, GRID), weak consonants and the closure of a p, b or m are shorter.
SILENCE_DB = -20.0
SILENCE_FRAMES = 5


def silent_frames(rms: Float[np.ndarray, "t"], speech_level: float) -> Bool[np.ndarray, "t"]:
    """Which frames are silent, from each frame's RMS and the speech's."""
    quiet = np.asarray(rms) < speech_level * 10 ** (SILENCE_DB / 20)
    out = np.zeros(len(quiet), bool)
    for run in np.split(np.arange(len(quiet)), np.flatnonzero(np.diff(quiet)) + 1):
        if len(run) >= SILENCE_FRAMES and quiet[run[0]]:
            out[run] = True
    return out


_GRID_UNITS_PER_S = 25000
_WORD_CLOSURE_S = 0.12  # a word that begins with p, b or m closes the lips somewhere in this time about its beginning
_CLOSED_PHONES = {"P", "B", "M"}


def closures_due(
    path: Path | str, first: int, count: int, offset_frames: float = 0.0, fps: float = 25.0
) -> list[tuple[int, int]]:
    """[start, end) of the frames in which each p, b or m of an alignment is spoken.

    Counted from frame `first` of the video, in `count` frames; closures that are not wholly inside are left out. A line
    is `start end label`. In a file called *.align (GRID) labels are words and times are in 1/25000 s: a word that
    begins with p, b or m is due at its beginning, the letter m (spoken "em") at its end. In any other file labels are
    phones (ARPABET, with or without stress digits) and times are seconds. `offset_frames`: how much later the mouth is
    than the sound. InputError names the line that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist or is no file. Give an alignment: a line of start, end and phone for each sound."
        )
    words = path.suffix.lower() == ".align"
    due = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            start, end, label = float(fields[0]), float(fields[1]), fields[2]
        except (ValueError, IndexError):
            start, end, label = 0.0, -1.0, ""
        if start > end:
            raise InputError(
                f"{path}, line {number}, is not start, end and label: {line[:60]!r}. Give an alignment, a sound a line."
            )
        if words:
            start, end, word = start / _GRID_UNITS_PER_S, end / _GRID_UNITS_PER_S, label.lower()
            if word[0] not in "pbm":
                continue
            at = end if word == "m" else start
            start, end = at - _WORD_CLOSURE_S / 2, at + _WORD_CLOSURE_S / 2
        elif re.sub(r"\d", "", label).upper() not in _CLOSED_PHONES:
            continue
        a = int(np.floor(start * fps + offset_frames)) - first
        b = max(int(np.ceil(end * fps + offset_frames)) - first, a + 1)
        if a >= 0 and b <= count:
            due.append((a, b))
    return due
