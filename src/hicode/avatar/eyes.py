"""A subject's eyes: when they blink in a track, and what closed lids and a turned gaze are in expression and landmarks.

First axis of what comes in pairs: right eye, left eye. Lengths are head units (1 unit = 10 cm).
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hicode.geometry import smoothstep
from hicode.motion import LEFT_EYE_RING, LEFT_IRIS, RIGHT_EYE_RING, RIGHT_IRIS, Motion

# Of the 64 expression dimensions (`HeadModel.expression_names`), right eye then left. A test ties them to the names.
BLINK = (9, 8)
LOOK_DOWN, LOOK_UP, LOOK_IN, LOOK_OUT = (11, 10), (17, 16), (13, 12), (15, 14)
EYE_ACTIONS = ((9, 11, 13, 15, 17, 19, 21), (8, 10, 12, 14, 16, 18, 20))
# Landmarks of the upper lid and those below them: the middle of each eye.
UPPER_LID, LOWER_LID = ((160, 159, 158), (387, 386, 385)), ((144, 145, 153), (373, 374, 380))
CORNERS = ((33, 133), (263, 362))
RINGS, IRISES = (RIGHT_EYE_RING, LEFT_EYE_RING), (RIGHT_IRIS, LEFT_IRIS)
EYEBALL = 0.14  # from the eye's centre of rotation to the iris
RADIANS = math.pi / 180

DIP = 0.72  # of the gap around it: below is a blink. A 40 ms frame and smoothing leave some blinks half open
SHUT = 0.5  # of the track's usual gap: below is shut, however long
AROUND_S, LONGEST_BLINK_S = 0.6, 0.5
LEARN_BELOW = 0.45  # of the open gap: a blink as deep as this shows how the subject's lids close
# Gap of closed lids, as a share of the open gap. A tracked blink is enlarged until the lids meet. The 3DMM's goes a
# little further, since the rig averages over neighbouring landmarks; more brings specks, not closure.
TRACKED_CLOSED, MODEL_CLOSED = 0.0, -0.1
IRIS_GAIN = 2.5  # landmarks of the iris move so much farther than the eye turns: the rig follows them by 1/5 to 1/2


@runtime_checkable
class Actions(Protocol):
    """What says how landmarks move with the 3DMM's expressions: an `Avatar`."""

    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]

    def landmark_actions(self) -> Float[Tensor, "64 478 3"]:
        """Displacement of the landmarks by a unit of each expression."""
        ...


def eye_gap(landmarks: Float[Tensor, "*t 478 3"]) -> Float[Tensor, "*t 2"]:
    """Distance of the lids along the head's y over the eye's width: about .3 open, 0 closed."""
    gaps = []
    for upper, lower, (outer, inner) in zip(UPPER_LID, LOWER_LID, CORNERS, strict=True):
        apart = (landmarks[..., list(upper), 1] - landmarks[..., list(lower), 1]).mean(-1)
        gaps.append(apart / (landmarks[..., outer, :] - landmarks[..., inner, :]).norm(dim=-1).clamp_min(1e-6))
    return torch.stack(gaps, -1)


def tracked_blinks(driving: Motion) -> Bool[np.ndarray, "t"]:
    """Frames in which the track's lids go down: a dip against .6 s to each side, or shut."""
    gap = eye_gap(driving.landmarks).mean(1).numpy()
    reach = round(AROUND_S * driving.fps)
    around = np.array([np.median(gap[max(0, t - reach) : t + reach + 1]) for t in range(len(gap))])
    return (gap < DIP * around) | (gap < SHUT * np.percentile(gap, 75))


def near_tracked_blinks(
    blinks: Bool[np.ndarray, "t"], played: Int[np.ndarray, "k"], within: int
) -> Bool[np.ndarray, "m"]:
    """Whether a tracked blink is within so many frames, for driving frames in the order in which they are played.

    `played` holds `within` frames more at either end than are answered for.
    """
    count = np.concatenate([[0], np.cumsum(blinks[played])])
    return count[2 * within + 1 :] > count[: -2 * within - 1]


def runs(flags: Bool[np.ndarray, "t"]) -> list[tuple[int, int]]:
    """[begin, end) of each run of true flags."""
    edges = np.diff(np.concatenate([[0], np.asarray(flags, np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Eyes:
    """Displacements from open to closed lids, and by one degree of gaze.

    open_gap, shut_gap   "2" `eye_gap` of open and of closed lids
    shut_expression      "2 64" from deep blinks of the track, else the 3DMM's blink; enlarged until the lids meet
    shut_landmarks       "2 478 3"
    look_expression      "4 64" a degree to the left, right, up, down; both eyes
    look_landmarks       "4 478 3"
    low, high            "64" range of the track's expressions: the avatar has learned nothing beyond
    learned              whether the track has deep blinks
    """

    open_gap: Float[Tensor, "2"]
    shut_gap: Float[Tensor, "2"]
    shut_expression: Float[Tensor, "2 64"]
    shut_landmarks: Float[Tensor, "2 478 3"]
    look_expression: Float[Tensor, "4 64"]
    look_landmarks: Float[Tensor, "4 478 3"]
    low: Float[Tensor, "64"]
    high: Float[Tensor, "64"]
    learned: bool

    @staticmethod
    def of(driving: Motion, actions: Actions) -> "Eyes":
        """The eyes of a driving track."""
        basis = actions.landmark_actions().cpu()
        blinking, gap = tracked_blinks(driving), eye_gap(driving.landmarks)
        awake = torch.from_numpy(~blinking)
        if not awake.any():
            awake = torch.ones_like(awake)
        open_gap = gap[awake].median(0).values
        rest = driving.landmarks[awake].median(0).values
        near = _near_eyes(rest, actions.mouth_landmark_weight.cpu())
        blink = _mean_blink(driving, blinking, gap)
        expression, landmarks, shut_gap = torch.zeros(2, 64), torch.zeros(2, 478, 3), open_gap.clone()
        for eye in range(2):
            # The gap is linear in the displacement while the corners stay: one division finds the scale.
            closes_by = lambda moved, eye=eye: (open_gap - eye_gap(rest + moved))[eye]
            if blink is not None and closes_by(blink[1]) > (1 - 1.5 * LEARN_BELOW) * open_gap[eye]:  # not a wink
                own = list(EYE_ACTIONS[eye])
                expression[eye, own], landmarks[eye] = blink[0][own], blink[1] * near[eye, :, None]
                scale = max(1.0, (1 - TRACKED_CLOSED) * open_gap[eye] / closes_by(landmarks[eye]))
            else:
                expression[eye, BLINK[eye]], landmarks[eye] = 1.0, basis[BLINK[eye]] * near[eye, :, None]
                closes = closes_by(landmarks[eye])
                # Landmarks without an eye: it stays as it is.
                scale = (1 - MODEL_CLOSED) * open_gap[eye] / closes if closes > 1e-4 else 0.0
            shut_gap[eye] -= scale * closes_by(landmarks[eye])
            expression[eye] *= scale
            landmarks[eye] *= scale
        look, moved = _gaze(basis, near)
        low, high = driving.expression.amin(0), driving.expression.amax(0)
        return Eyes(open_gap, shut_gap, expression, landmarks, look, moved, low, high, blink is not None)


def _gaze(
    basis: Float[Tensor, "64 478 3"], near: Float[Tensor, "2 478"]
) -> tuple[Float[Tensor, "4 64"], Float[Tensor, "4 478 3"]]:
    """Expression and landmark displacement of a degree of gaze to the left, right, up, down."""
    looks = torch.zeros(4, 64)
    ways = ((LOOK_IN, LOOK_OUT), (LOOK_OUT, LOOK_IN), (LOOK_UP, LOOK_UP), (LOOK_DOWN, LOOK_DOWN))
    for way, (right, left) in enumerate(ways):
        for eye, action in enumerate((right[0], left[1])):
            travel = float(basis[action, IRISES[eye][0]].norm())
            looks[way, action] = EYEBALL * RADIANS / travel if travel > 0 else 0.0
    moved = torch.tensordot(looks, basis, 1) * near.amax(0)[:, None]
    moved[:, np.concatenate(IRISES)] *= IRIS_GAIN
    return looks, moved


def _near_eyes(landmarks: Float[Tensor, "478 3"], mouth_weight: Float[Tensor, "478"]) -> Float[Tensor, "2 478"]:
    """1 on each eye's ring, iris and folds, 0 from 30 mm on and on everything that speech moves."""
    weights = []
    for eye in range(2):
        distance = torch.cdist(landmarks, landmarks[torch.from_numpy(RINGS[eye])]).amin(1)
        weight = smoothstep((0.30 - distance) / 0.18)
        weight[IRISES[eye]] = 1.0
        weight[np.concatenate([RINGS[1 - eye], IRISES[1 - eye]])] = 0.0
        weights.append(weight * (mouth_weight == 0))
    return torch.stack(weights)


def _mean_blink(
    driving: Motion, blinking: Bool[np.ndarray, "t"], gap: Float[Tensor, "t 2"]
) -> tuple[Float[Tensor, "64"], Float[Tensor, "478 3"]] | None:
    """Mean displacement from open to shut over the track's deep blinks, each against the open frames next to it."""
    mean_gap = gap.mean(1)
    moves, reach = [], round(AROUND_S * driving.fps)
    for begin, end in runs(blinking):
        deepest = begin + int(mean_gap[begin:end].argmin())
        nearby = np.arange(max(0, begin - reach), min(len(blinking), end + reach))
        nearby = nearby[~blinking[nearby]]
        if end - begin > LONGEST_BLINK_S * driving.fps or len(nearby) < 3:
            continue
        usual = mean_gap[nearby].median()
        nearby = nearby[(mean_gap[nearby] > 0.9 * usual).numpy()]
        if float(mean_gap[deepest]) < LEARN_BELOW * float(usual):
            moves.append([v[deepest] - v[nearby].median(0).values for v in (driving.expression, driving.landmarks)])
    if not moves:
        return None
    return torch.stack([e for e, _ in moves]).mean(0), torch.stack([l for _, l in moves]).mean(0)
