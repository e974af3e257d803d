"""How a face moves, from landmarks in the finished frames: amplitude, closure, dynamics, silence, loudness.

t frames at 25 fps; points "t 478 3" are MediaPipe's in px, NaN in frames without a face. Lengths are in percent of the
outer-eye distance. Opening and width are divided by each frame's own distance. Shapes are first brought to one pose, by
the similarity of the plane that fits the eyes' corners and the nose bridge: neither speech nor brows move these.

The five measures of THEval (Quignon et al., CVPR 2026) that need no other network: lip dynamics, brow dynamics, head
motion, lip stability in silence, lip-to-loudness. Each describes one video; the truth's value is the one to aim at:
`score` = 1 - |x - truth| / truth.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from hicode.audio import FPS
from hicode.evaluation.lips import CLOSED, opening
from hicode.motion import LEFT_EYE_OUTER, LIPS, MOUTH_CORNERS_INNER, RIGHT_EYE_OUTER

BROWS = np.array([70, 63, 105, 66, 107, 55, 65, 52, 53, 46, 300, 293, 334, 296, 336, 285, 295, 282, 283, 276])
# Corners of the eyes, and the bridge of the nose.
RIGID = np.array([33, 133, 263, 362, 168, 6, 197, 195, 5])
SILENCE_S = 0.3
LEAST_FRAMES = 10


@dataclass(frozen=True)
class MotionStatistics:
    """One video's motion against the truth's; None where it cannot be measured.

    docs/evaluation.md defines each; `scores`: of the last six, by `score`.
    """

    opening_amplitude: float | None
    width_amplitude: float | None
    opening_ccc: float | None
    width_ccc: float | None
    closed_share: float | None
    closed_share_ratio: float | None
    lip_dynamics: float | None
    lip_speed: float | None
    brow_dynamics: float | None
    head_motion: float | None
    silent_lip_stability: float | None
    lip_loudness: float | None
    scores: dict[str, float | None]


SCORED = ("lip_dynamics", "lip_speed", "brow_dynamics", "head_motion", "silent_lip_stability", "lip_loudness")


def motion_statistics(
    points: Float[np.ndarray, "t 478 3"],
    truth: Float[np.ndarray, "t 478 3"],
    rms: Float[np.ndarray, "t"] | None = None,
    silent: Bool[np.ndarray, "t"] | None = None,
) -> MotionStatistics:
    """Every measure of a video's landmarks against the truth's. `rms`: of each frame's sound; `silent`: frames in which
    nobody speaks. Frames without a face in either are left out of what compares the two."""
    gap, true_gap = opening(points), opening(truth)
    mouth, true_mouth = width(points), width(truth)
    closed, true_closed = closed_share(gap), closed_share(true_gap)
    own, wanted = (_alone(p, rms, silent) for p in (points, truth))
    return MotionStatistics(
        opening_amplitude=amplitude_ratio(gap, true_gap),
        width_amplitude=amplitude_ratio(mouth, true_mouth),
        opening_ccc=concordance(gap, true_gap),
        width_ccc=concordance(mouth, true_mouth),
        closed_share=closed,
        closed_share_ratio=closed / true_closed if closed is not None and true_closed else None,
        **own,
        scores={name: score(own[name], wanted[name]) for name in SCORED},
    )


def _alone(points: np.ndarray, rms: np.ndarray | None, silent: np.ndarray | None) -> dict[str, float | None]:
    """What is measured of one video by itself."""
    gap = opening(points)
    return {
        "lip_dynamics": pair_dynamics(points, LIPS),
        "lip_speed": speed(points, LIPS),
        "brow_dynamics": pair_dynamics(points, BROWS),
        "head_motion": head_motion(points),
        "silent_lip_stability": None if silent is None else silent_stability(gap, silent),
        "lip_loudness": None if rms is None else loudness_distance(gap, rms),
    }


# --- curves


def width(points: Float[np.ndarray, "t 478 3"]) -> Float[np.ndarray, "t"]:
    """Distance of the inner mouth corners over the outer-eye distance, in the image."""
    right, left = MOUTH_CORNERS_INNER
    return _distance(points, right, left) / _distance(points, RIGHT_EYE_OUTER, LEFT_EYE_OUTER)


def _distance(points: np.ndarray, i: int, j: int) -> np.ndarray:
    points = np.asarray(points, np.float64)
    return np.linalg.norm(points[:, i, :2] - points[:, j, :2], axis=-1)


def amplitude_ratio(curve: Float[np.ndarray, "t"], truth: Float[np.ndarray, "t"]) -> float | None:
    """Standard deviation over the truth's. Below 1: the mouth moves less than it should."""
    a, b = _both(curve, truth)
    return float(a.std() / b.std()) if len(a) >= LEAST_FRAMES and b.std() > 1e-9 else None


def concordance(curve: Float[np.ndarray, "t"], truth: Float[np.ndarray, "t"]) -> float | None:
    """Lin's concordance correlation, 2 cov / (var + var + (mean - mean)²): 1 only for equal curves.

    Unlike Pearson's, it falls with a wrong amplitude and a wrong mean.
    """
    a, b = _both(curve, truth)
    spread = a.var() + b.var() + (a.mean() - b.mean()) ** 2 if len(a) >= LEAST_FRAMES else 0.0
    return float(2 * ((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1e-12 else None


def _both(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(a) & np.isfinite(b)
    return a[there], b[there]


def closed_share(gap: Float[np.ndarray, "t"]) -> float | None:
    """Share of the frames with a face whose lips are closed: an opening below 2 %."""
    gap = gap[np.isfinite(gap)]
    return float((gap < CLOSED).mean()) if len(gap) else None


def score(value: float | None, truth: float | None) -> float | None:
    """1 - |value - truth| / truth: 1 at the truth's value, negative beyond twice of it."""
    return None if value is None or truth is None or truth < 1e-9 else 1 - abs(value - truth) / truth


# --- dynamics


def pair_dynamics(points: Float[np.ndarray, "t 478 3"], which: np.ndarray) -> float | None:
    """Mean over all pairs of landmarks of the deviation over time of their distance, % of the outer-eye distance."""
    shapes = in_one_pose(points)[:, which]
    shapes = shapes[np.isfinite(shapes).all((1, 2))]
    if len(shapes) < LEAST_FRAMES:
        return None
    first, second = np.triu_indices(len(which), 1)
    return float(np.linalg.norm(shapes[:, first] - shapes[:, second], axis=-1).std(0).mean())


def speed(points: Float[np.ndarray, "t 478 3"], which: np.ndarray) -> float | None:
    """Mean distance that a landmark travels from frame to frame, pose removed, % of the outer-eye distance."""
    steps = np.linalg.norm(np.diff(in_one_pose(points)[:, which], axis=0), axis=-1).mean(1)
    steps = steps[np.isfinite(steps)]
    return float(steps.mean()) if len(steps) >= LEAST_FRAMES else None


def in_one_pose(points: Float[np.ndarray, "t 478 3"]) -> Float[np.ndarray, "t 478 2"]:
    """Landmarks with each frame's shift, turn and scale in the image removed, in % of the outer-eye distance.

    The similarity is fitted to `RIGID`, towards their mean shape. NaN without a face.
    """
    flat = np.asarray(points, np.float64)[..., :2] @ np.array([1, 1j])
    rigid = flat[:, RIGID] - flat[:, RIGID].mean(1, keepdims=True)
    there = np.isfinite(rigid).all(1)
    out = np.full((*flat.shape, 2), np.nan)
    if not there.any():
        return out
    eyes = flat[:, LEFT_EYE_OUTER] - flat[:, RIGHT_EYE_OUTER]
    mean = (rigid[there] / eyes[there, None]).mean(0)  # eyes level and 1 apart
    factor = 100 * (rigid[there].conj() * mean).sum(1) / (np.abs(rigid[there]) ** 2).sum(1)
    moved = factor[:, None] * (flat[there] - flat[there][:, RIGID].mean(1, keepdims=True))
    out[there] = np.stack([moved.real, moved.imag], -1)
    return out


def head_motion(points: Float[np.ndarray, "t 478 3"]) -> float | None:
    """sqrt(sum over three angles of deviation x variance of the frame difference + variance of the translation).

    Angles (degrees) are those of the rotation that fits the rigid landmarks, in three dimensions, to their first
    frame's; the translation is the mean of those landmarks, % of the mean outer-eye distance. A head that is held
    scores 0; so does one that turns at a constant rate without moving.
    """
    rigid = np.asarray(points, np.float64)[:, RIGID]
    there = np.isfinite(rigid).all((1, 2))
    if there.sum() < LEAST_FRAMES:
        return None
    centre = rigid.mean(1)
    eyes = float(np.mean(_distance(points, RIGHT_EYE_OUTER, LEFT_EYE_OUTER)[there]))
    shapes = rigid - centre[:, None]
    angles = np.full((len(rigid), 3), np.nan)
    angles[there] = np.stack([_angles_deg(shape, shapes[there][0]) for shape in shapes[there]])
    steps = np.diff(angles, axis=0)
    turning = (np.nanstd(angles, 0) * np.nanvar(steps, 0)).sum() if np.isfinite(steps).any() else 0.0
    return float(np.sqrt(turning + (100 * centre[there, :2] / eyes).var(0).sum()))


def _angles_deg(shape: Float[np.ndarray, "r 3"], reference: Float[np.ndarray, "r 3"]) -> Float[np.ndarray, "3"]:
    """Rotation vector from a centred shape to another (Kabsch 1976), degrees."""
    from scipy.spatial.transform import Rotation

    return Rotation.align_vectors(shape, reference)[0].as_rotvec(degrees=True)


# --- with sound


def silent_stability(gap: Float[np.ndarray, "t"], silent: Bool[np.ndarray, "t"]) -> float | None:
    """Median absolute deviation of the opening over all silences of .3 s or longer, %: 0 for lips that rest."""
    inside = np.zeros(len(gap), bool)
    for run in np.split(np.arange(len(silent)), np.flatnonzero(np.diff(silent)) + 1):
        if len(run) >= SILENCE_S * FPS and silent[run[0]]:
            inside[run] = True
    values = gap[inside & np.isfinite(gap)]
    return float(100 * np.median(np.abs(values - np.median(values)))) if len(values) else None


def loudness_distance(gap: Float[np.ndarray, "t"], rms: Float[np.ndarray, "t"]) -> float | None:
    """Mean |opening - RMS|, both scaled to [0, 1] over the video: 0 for a mouth that opens as the sound is loud."""
    gap, rms = _both(gap, np.asarray(rms, np.float64))
    if len(gap) < LEAST_FRAMES or np.ptp(gap) < 1e-9 or np.ptp(rms) < 1e-9:
        return None
    return float(np.abs((gap - gap.min()) / np.ptp(gap) - (rms - rms.min()) / np.ptp(rms)).mean())
