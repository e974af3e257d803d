"""Idling: blinks, gaze and small movements of the head when nothing drives them.

A driving track has its own eyes and its own head; sound tells neither. Where the track has none either (a short take without a blink, a single frame
that is held), people expect what every living face does. t frames at `fps`; angles in degrees about the head frame's axes: yaw to the subject's left,
pitch up, roll to the subject's left shoulder; closure c runs from 0 (open as the frame is) to 1 (closed).

    IdleSource    the times and sizes: random, seeded, a frame after the other, so that pieces of any length make the same sequence in constant memory
    Eyes          what a closed lid and a turned eye are on this subject, in expression and landmarks
    Idler         both, laid over a motion: eyes and pose only, the mouth is not touched

Statistics. Blinks: 17 a minute at rest and 26 in conversation (Bentivoglio et al. 1997, Mov. Disord. 12), intervals skewed to the right, here log-normal;
100 to 300 ms long, closing two to three times as fast as opening (Evinger et al. 1991, IOVS 32). Gaze: fixations broken by saccades that last
25 ms + 2.4 ms a degree, mostly on the listener, with glances away of about .9 s (Lee, Badler & Badler 2002, "Eyes Alive"); the eyes turn against
the head, which keeps them on the listener. Head: noise whose amplitude falls with frequency, below 1 Hz.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hicode.camera import Camera
from hicode.geometry import axis_angle_from_rotation, rigid, rotation_from_axis_angle, smoothstep
from hicode.motion import LEFT_EYE_RING, LEFT_IRIS, RIGHT_EYE_RING, RIGHT_IRIS, Motion

# Of the 64 expression dimensions (`HeadModel.expression_names`), right eye then left: a test ties them to the names.
BLINK = (9, 8)
LOOK_DOWN, LOOK_UP, LOOK_IN, LOOK_OUT = (11, 10), (17, 16), (13, 12), (15, 14)
EYE_ACTIONS = ((9, 11, 13, 15, 17, 19, 21), (8, 10, 12, 14, 16, 18, 20))
# Landmarks of the upper lid and those below them: the middle of each eye, right then left.
UPPER_LID, LOWER_LID = ((160, 159, 158), (387, 386, 385)), ((144, 145, 153), (373, 374, 380))
CORNERS = ((33, 133), (263, 362))
RINGS, IRISES = (RIGHT_EYE_RING, LEFT_EYE_RING), (RIGHT_IRIS, LEFT_IRIS)
EYEBALL = 0.14  # dm: from the eye's centre of rotation to the iris
RADIANS = math.pi / 180


@dataclass(frozen=True)
class IdleConfig:
    """How a face idles."""

    blinks_per_min: float = 18.0
    """between rest and conversation"""
    blink_spread: float = 0.55
    """standard deviation of the logarithm of the time between blinks"""
    blink_gap_s: float = 0.5
    """shortest time from the end of a blink to the next one"""
    blink_s: tuple[float, float] = (0.16, 0.30)
    """shortest and longest blink; their median lies in the middle"""
    closed_s: float = 0.04
    """of a blink, lids shut: one frame, so that none falls between two"""
    own_blink_s: float = 4.0
    """nothing is added within this time of a blink that the driving track has itself"""
    fixation_s: float = 1.2
    """mean time between saccades, log-normal"""
    fixation_spread: float = 0.7
    """standard deviation of its logarithm"""
    shortest_fixation_s: float = 0.2
    gaze_deg: tuple[float, float] = (1.2, 0.6)
    """standard deviation of fixations on the listener, sideways and upwards"""
    glance_chance: float = 0.1
    """share of the fixations that are a glance away"""
    glance_deg: tuple[float, float] = (3.0, 5.0)
    """how far away, sideways and a little downwards"""
    glance_s: float = 0.9
    """mean length of a glance"""
    head_deg: tuple[float, float, float] = (2.0, 1.2, 0.8)
    """farthest yaw, pitch and roll"""
    head_band_hz: tuple[float, float] = (0.05, 0.8)
    """frequencies of the head's movements; power falls as 1 / f^2"""
    head_waves: int = 12
    """sinusoids an axis, at random frequencies spread over the band"""


@dataclass(frozen=True, eq=False)
class Idle:
    """t frames: closure "t" in [0, 1], gaze "t 2" (yaw, pitch of the eyes against the camera's direction), head "t 3" (yaw, pitch, roll), degrees."""

    closure: Float[np.ndarray, "t"]
    gaze_deg: Float[np.ndarray, "t 2"]
    head_deg: Float[np.ndarray, "t 3"]


class IdleSource:
    """A seeded sequence of `Idle` frames, asked for a few at a time; how many makes no difference. Blinks, gaze and head draw from generators of
    their own, each of (seed, purpose), and every frame is computed by itself."""

    def __init__(self, seed: int = 0, fps: float = 25.0, config: IdleConfig = IdleConfig()):
        self.config, self.fps, self._frame = config, fps, 0
        self._blinks, self._gaze, head = (np.random.default_rng([seed, purpose]) for purpose in range(3))
        self._blink_start_s, self._blink_length_s = self._next_blink(0.0)
        self._from, self._to = (0.0, 0.0), (0.0, 0.0)  # of the saccade that began last
        self._saccade_s, self._next_saccade_s = -1.0, self._fixation(False)
        low, high = np.log(config.head_band_hz)
        n = config.head_waves
        # One frequency in each of n equal parts of the band's logarithm, where noise of power 1 / f^2 has amplitudes of 1 / sqrt(f). Deviation 1.
        hz = np.exp(low + (high - low) * (np.arange(n) + head.random((3, n))) / n)
        phase = 2 * math.pi * head.random((3, n))
        amplitude = hz**-0.5 * np.sqrt(2 / (1 / hz).sum(1, keepdims=True))
        self._waves = np.stack([amplitude, 2 * math.pi * hz, phase], -1).tolist()

    def next(self, count: int) -> Idle:
        """The next `count` frames, each at the middle of its time."""
        closure, gaze, head = np.zeros(count), np.zeros((count, 2)), np.zeros((count, 3))
        for i in range(count):
            now_s = (self._frame + 0.5) / self.fps
            closure[i], gaze[i], head[i] = self._closure(now_s), self._gaze_at(now_s), self._head(now_s)
            self._frame += 1
        return Idle(closure, gaze, head)

    def _next_blink(self, after_s: float) -> tuple[float, float]:
        c = self.config
        shortest, longest = c.blink_s
        mean_s = 60 / c.blinks_per_min - c.blink_gap_s - (shortest + longest) / 2
        pause = _log_normal(self._blinks, mean_s, c.blink_spread)
        length = float(
            np.clip(self._blinks.normal((shortest + longest) / 2, (longest - shortest) / 4), shortest, longest)
        )
        return after_s + c.blink_gap_s + pause, length

    def _closure(self, now_s: float) -> float:
        while now_s >= self._blink_start_s + self._blink_length_s:
            self._blink_start_s, self._blink_length_s = self._next_blink(self._blink_start_s + self._blink_length_s)
        return blink_profile(now_s - self._blink_start_s, self._blink_length_s, self.config.closed_s)

    def _fixation(self, glance: bool) -> float:
        c = self.config
        mean_s = (c.glance_s if glance else c.fixation_s) - c.shortest_fixation_s
        return c.shortest_fixation_s + _log_normal(self._gaze, mean_s, c.fixation_spread)

    def _gaze_at(self, now_s: float) -> tuple[float, float]:
        c = self.config
        while now_s >= self._next_saccade_s:
            self._from, self._saccade_s = self._to, self._next_saccade_s
            glance = self._gaze.random() < c.glance_chance
            side, aside = (-1 if self._gaze.random() < 0.5 else 1), float(self._gaze.uniform(*c.glance_deg))
            yaw, pitch = (float(v) for v in self._gaze.normal(0, 1, 2).clip(-2, 2))
            self._to = (
                (side * aside, -0.4 * aside + 0.5 * pitch) if glance else (yaw * c.gaze_deg[0], pitch * c.gaze_deg[1])
            )
            self._next_saccade_s += self._fixation(glance)
        size = math.dist(self._from, self._to)
        done = smoothstep((now_s - self._saccade_s) / (0.025 + 0.0024 * size))
        return tuple(a + done * (b - a) for a, b in zip(self._from, self._to))

    def _head(self, now_s: float) -> list[float]:
        sums = (sum(a * math.sin(w * now_s + p) for a, w, p in waves) for waves in self._waves)
        return [
            limit * math.tanh(x / 2) for limit, x in zip(self.config.head_deg, sums)
        ]  # two deviations are near the limit, nothing is beyond


def blink_profile(since_s: float, length_s: float, closed_s: float) -> float:
    """Closure `since_s` after a blink's start: three tenths of the moving time go down, seven up, `closed_s` between."""
    down = 0.3 * (length_s - closed_s)
    if since_s < down + closed_s:
        return smoothstep(since_s / down)
    return 1 - smoothstep((since_s - down - closed_s) / (length_s - closed_s - down))


def _log_normal(rng: np.random.Generator, mean: float, spread: float) -> float:
    return mean * math.exp(spread * float(rng.standard_normal()) - spread * spread / 2)


# --- the subject's eyes -------------------------------------------------------------------------------------------------------------------


def eye_gap(landmarks: Float[Tensor, "*t 478 3"]) -> Float[Tensor, "*t 2"]:
    """How far the lids are apart over the eye's width, right and left eye: about .3 open, 0 closed. Along the head's y, so shut lids measure 0."""
    gaps = []
    for upper, lower, (outer, inner) in zip(UPPER_LID, LOWER_LID, CORNERS):
        apart = (landmarks[..., list(upper), 1] - landmarks[..., list(lower), 1]).mean(-1)
        gaps.append(apart / (landmarks[..., outer, :] - landmarks[..., inner, :]).norm(dim=-1).clamp_min(1e-6))
    return torch.stack(gaps, -1)


DIP = (
    0.72  # of the gap around it: below is a blink. A 40 ms frame and the track's smoothing leave some blinks half open
)
SHUT = 0.5  # of the track's usual gap: below is shut, however long
AROUND_S, LONGEST_BLINK_S = 0.6, 0.5
LEARN_BELOW = 0.45  # of the gap beside it: a blink as deep as this shows how the subject's lids close
# Gap of generated closed lids, of open. A subject's own blink is enlarged until the lids meet, and stays as it is if it goes farther. The 3DMM's goes on a little:
# where nothing was learned of closed lids, they follow their landmarks less than wholly (the carrier averages over neighbours). More brings specks, not closure.
OWN_CLOSED, MODEL_CLOSED = 0.0, -0.1


def own_blinks(driving: Motion) -> Bool[np.ndarray, "t"]:
    """The frames in which the track's own lids go down: a dip against half a second around it, or shut."""
    gap = eye_gap(driving.landmarks).mean(1).numpy()
    reach = round(AROUND_S * driving.fps)
    around = np.array([np.median(gap[max(0, t - reach) : t + reach + 1]) for t in range(len(gap))])
    return (gap < DIP * around) | (gap < SHUT * np.percentile(gap, 75))


# How much farther than the eye turns its landmarks are moved: an avatar's iris follows them by a fifth to a half (lids, which stay, are their neighbours).
IRIS_GAIN = 2.5


class Actions(Protocol):
    """What says how landmarks move with the 3DMM's actions: an `Avatar`."""

    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]

    def landmark_actions(self) -> Float[Tensor, "64 478 3"]: ...


@dataclass(frozen=True, eq=False)
class Eyes:
    """How this subject's eyes close and turn: displacements from open to closed and by a degree of gaze. First axis: right eye, left eye.

    open_gap         "2"                 usual `eye_gap`
    shut_gap         "2"                 that of closed lids
    shut_expression  "2 64"              learned from the track's own blinks where it has some that are deep enough, else the 3DMM's blink action,
    shut_landmarks   "2 478 3"           enlarged until the lids meet
    look_expression  "4 64"              a degree to the left, right, up, down; both eyes
    look_landmarks   "4 478 3"
    low, high        "64"                the expressions that the track has seen: beyond them nobody has taught the avatar anything
    learned          whether the track has such blinks
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
        basis = actions.landmark_actions().cpu()
        blinking, gap = own_blinks(driving), eye_gap(driving.landmarks)
        awake = torch.from_numpy(~blinking)
        if not awake.any():
            awake = torch.ones_like(awake)
        open_gap = gap[awake].median(0).values
        rest = driving.landmarks[awake].median(0).values
        near = _near_eyes(rest, actions.mouth_landmark_weight.cpu())
        learned = _own_shut(driving, blinking, gap)
        expression, landmarks, shut_gap = torch.zeros(2, 64), torch.zeros(2, 478, 3), open_gap.clone()
        for eye in range(2):
            own = list(EYE_ACTIONS[eye])
            # The gap is linear in the displacement while the corners stay: one division finds the scale.
            closes_by = lambda moved, eye=eye: (open_gap - eye_gap(rest + moved))[eye]
            if (
                learned is not None and closes_by(learned[1]) > (1 - 1.5 * LEARN_BELOW) * open_gap[eye]
            ):  # both eyes together were; a wink was not
                expression[eye, own], landmarks[eye] = learned[0][own], learned[1] * near[eye, :, None]
                scale = max(1.0, (1 - OWN_CLOSED) * open_gap[eye] / closes_by(landmarks[eye]))
            else:
                expression[eye, BLINK[eye]], landmarks[eye] = 1.0, basis[BLINK[eye]] * near[eye, :, None]
                closes = closes_by(landmarks[eye])
                scale = (
                    (1 - MODEL_CLOSED) * open_gap[eye] / closes if closes > 1e-4 else 0.0
                )  # landmarks without an eye: it stays as it is
            shut_gap[eye] -= scale * closes_by(landmarks[eye])
            expression[eye] *= scale
            landmarks[eye] *= scale
        looks = torch.zeros(4, 64)
        for way, (right, left) in enumerate(
            ((LOOK_IN, LOOK_OUT), (LOOK_OUT, LOOK_IN), (LOOK_UP, LOOK_UP), (LOOK_DOWN, LOOK_DOWN))
        ):
            for eye, action in enumerate((right[0], left[1])):
                travel = float(basis[action, IRISES[eye][0]].norm())
                looks[way, action] = EYEBALL * RADIANS / travel if travel > 0 else 0.0
        turned = torch.tensordot(looks, basis, 1) * near.amax(0)[:, None]
        turned[:, np.concatenate(IRISES)] *= IRIS_GAIN
        return Eyes(
            open_gap, shut_gap, expression, landmarks, looks, turned,
            driving.expression.amin(0), driving.expression.amax(0), learned is not None,
        )  # fmt: skip


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


def _own_shut(driving: Motion, blinking: np.ndarray, gap: Tensor) -> tuple[Tensor, Tensor] | None:
    """(expression "64", landmarks "478 3") from open to shut, the mean over the track's deep blinks, each against the open frames beside it."""
    mean_gap = gap.mean(1)
    moves, reach = [], round(AROUND_S * driving.fps)
    for begin, end in runs(blinking):
        deepest = begin + int(mean_gap[begin:end].argmin())
        beside = np.arange(max(0, begin - reach), min(len(blinking), end + reach))
        beside = beside[~blinking[beside]]
        if end - begin > LONGEST_BLINK_S * driving.fps or len(beside) < 3:
            continue
        usual = mean_gap[beside].median()
        beside = beside[(mean_gap[beside] > 0.9 * usual).numpy()]
        if float(mean_gap[deepest]) < LEARN_BELOW * float(usual):
            moves.append([v[deepest] - v[beside].median(0).values for v in (driving.expression, driving.landmarks)])
    if not moves:
        return None
    return torch.stack([e for e, _ in moves]).mean(0), torch.stack([l for _, l in moves]).mean(0)


def runs(flags: Bool[np.ndarray, "t"]) -> list[tuple[int, int]]:
    """[begin, end) of each run of true flags."""
    edges = np.diff(np.concatenate([[0], np.asarray(flags, np.int8), [0]]))
    return list(zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist()))


# --- over a motion ------------------------------------------------------------------------------------------------------------------------


def near_own_blinks(own: Bool[np.ndarray, "t"], played: Int[np.ndarray, "k"], within: int) -> Bool[np.ndarray, "m"]:
    """For driving frames in the order in which they are played: whether one of the track's own blinks is within so many frames. `played` holds
    `within` frames more at either end than are answered for."""
    blinks = np.concatenate([[0], np.cumsum(own[played])])
    return blinks[2 * within + 1 :] > blinks[: -2 * within - 1]


class Idler:
    """Lays idling over the frames of a driving track as they are played, in order, a few at a time; how many makes no difference.

    still      whether one frame is held. Then gaze and head are generated too; else blinks alone, and only where the track as it is played has none
               of its own within `IdleConfig.own_blink_s`
    blinks     off: none is added
    pivot      "3"  what the head turns about (the neck), head frame
    head_scale share of `IdleConfig.head_deg` that the picture around the head allows
    """

    def __init__(
        self, driving: Motion, actions: Actions, still: bool = False, blinks: bool = True, seed: int = 0,
        pivot: Float[Tensor, "3"] | None = None, head_scale: float = 1.0, config: IdleConfig = IdleConfig(),
    ):  # fmt: skip
        self.config, self.still, self.blinks, self.head_scale = config, still, blinks, head_scale
        self.source = IdleSource(seed, driving.fps, config)
        self.pivot = torch.zeros(3) if pivot is None else pivot
        self._driving, self._actions, self._eyes = driving, actions, None
        self._blink: bool | None = None  # whether the blink under way is shown; None: no blink

    @property
    def eyes(self) -> Eyes:
        """Made when first needed: a track that blinks by itself never does."""
        if self._eyes is None:
            self._eyes = Eyes.of(self._driving, self._actions)
        return self._eyes

    def __call__(self, motion: Motion, near_own_blink: Bool[np.ndarray, "t"]) -> Motion:
        """The next frames. `near_own_blink`: where the driving track blinks by itself soon, now or has just done so."""
        idle = self.source.next(len(motion))
        closure = self._shown(idle.closure, near_own_blink)
        if not self.still and not closure.any():
            return motion
        frames = [
            self._frame(motion, t, float(closure[t]), idle.gaze_deg[t], idle.head_deg[t]) for t in range(len(motion))
        ]
        expression, landmarks, poses = (torch.stack(values) for values in zip(*frames))
        return replace(motion, expression=expression, landmarks=landmarks, T_camera_head=poses)

    def _shown(self, closure: np.ndarray, near_own_blink: np.ndarray) -> np.ndarray:
        """Blinks that are shown at all are shown whole: what counts is the frame in which one begins."""
        out = np.zeros(len(closure))
        for t, value in enumerate(closure):
            if value > 0 and self._blink is None:
                self._blink = self.blinks and (self.still or not near_own_blink[t])
            elif value == 0:
                self._blink = None
            out[t] = value if self._blink else 0.0
        return out

    def _frame(
        self, motion: Motion, t: int, closure: float, gaze_deg: np.ndarray, head_deg: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        expression, landmarks, pose = motion.expression[t].clone(), motion.landmarks[t].clone(), motion.T_camera_head[t]
        eyes = self.eyes
        change = torch.zeros_like(expression)
        if self.still:
            head_deg = self.head_scale * head_deg
            # The listener stays where they are while the head turns under the eyes.
            yaw, pitch = (float(v) for v in gaze_deg - head_deg[:2])
            for way, amount in ((0, yaw), (1, -yaw), (2, pitch), (3, -pitch)):
                if amount > 0:
                    change += amount * eyes.look_expression[way]
                    landmarks += amount * eyes.look_landmarks[way]
            pose = pose @ turned_about(self.pivot, head_deg)
        if closure > 0:
            gap = eye_gap(landmarks)
            for eye in range(2):
                # From as far open as the lids are now, to the same closed gap: a lid that is down already has less way to go.
                way = eyes.open_gap[eye] - eyes.shut_gap[eye]
                amount = closure * float(((gap[eye] - eyes.shut_gap[eye]) / way).clamp(0, 2)) if way > 0 else 0.0
                change += amount * eyes.shut_expression[eye]
                landmarks += amount * eyes.shut_landmarks[eye]
        # Landmarks go all the way, the expression as far as the avatar has seen it: its networks know nothing beyond.
        moved = torch.minimum(torch.maximum(expression + change, eyes.low), eyes.high)
        expression = torch.where(change != 0, moved, expression)
        return expression, landmarks, pose


def turned_about(pivot: Float[Tensor, "3"], angles_deg: Float[np.ndarray, "3"]) -> Float[Tensor, "4 4"]:
    """T_head_head that turns by yaw, pitch and roll (small: as one rotation vector) about a point of the head frame."""
    yaw, pitch, roll = (float(a) * RADIANS for a in angles_deg)
    turn = rotation_from_axis_angle(torch.tensor([-pitch, yaw, -roll], dtype=pivot.dtype))
    return rigid(turn, pivot - turn @ pivot)


# --- holding one frame --------------------------------------------------------------------------------------------------------------------


def still_frame(driving: Motion) -> int:
    """The driving frame that holds best: eyes open, no blink near it, the head where it usually is and not moving."""
    reach = round(0.2 * driving.fps)
    gap = eye_gap(driving.landmarks).mean(1).numpy()
    busy = near_own_blinks(
        own_blinks(driving), np.clip(np.arange(-reach, len(driving) + reach), 0, len(driving) - 1), reach
    )
    poses = driving.T_camera_head.numpy()
    usual = driving.T_camera_head[:, :3, :3].mean(0)
    u, _, v = torch.linalg.svd(usual)
    turn = axis_angle_from_rotation((u @ v).T @ driving.T_camera_head[:, :3, :3]).norm(dim=-1).numpy()
    points = driving.T_camera_head[:, :3, 3].numpy()
    away = np.linalg.norm(points - np.median(points, 0), axis=1)
    speed = (
        np.linalg.norm(np.gradient(poses.reshape(len(poses), -1), axis=0), axis=1) if len(poses) > 1 else np.zeros(1)
    )
    # Every term in units of its own usual size.
    cost = sum(x / max(float(np.median(x)), 1e-6) for x in (turn, away, speed))
    cost = cost + 10 * np.clip(1 - gap / max(float(np.median(gap)), 1e-6), 0, None) + 1e3 * busy
    return int(cost.argmin())


CHIN = 152
BELOW_CHIN, BEHIND_CHIN = 0.30, 0.75  # dm: from the chin to the middle of the neck where the head mask cuts it
# Of the image: how far the rendered head's outline may leave the held frame's. Composition shows it up to REACH - FEATHER (6 px at 512) beyond the mask and
# fades then; on two avatars no harm was seen at 7 px, a double edge of the hair at 11.
HEAD_ROOM = 7 / 512


def neck(driving: Motion) -> Float[Tensor, "3"]:
    """What a small movement of the head turns about, in the head frame: there the seam lies, and there nothing may move."""
    chin = driving.landmarks[:, CHIN].median(0).values
    return chin - torch.tensor([0.0, BELOW_CHIN, BEHIND_CHIN])


class Held(Protocol):
    """What a held frame shows: an `Avatar`."""

    driving: Motion
    camera: Camera

    def driving_mask(self, t: int) -> UInt8[np.ndarray, "h w"]: ...


def head_room(avatar: Held, t: int, pivot: Float[Tensor, "3"], config: IdleConfig = IdleConfig()) -> float:
    """The share of `IdleConfig.head_deg` by which the head of driving frame t may move: no part of its mask's outline farther than HEAD_ROOM of the
    image, since composition knows a narrow rim around the mask only."""
    mask = avatar.driving_mask(t)
    y, x = np.nonzero(mask > 127)
    if len(x) == 0:
        return 1.0
    pose = avatar.driving.T_camera_head[t]
    at = pose[:3, :3] @ pivot + pose[:3, 3]
    centre = (avatar.camera.K @ (at / at[2]))[:2].numpy()
    farthest = float(np.hypot(x - centre[0], y - centre[1]).max())
    # Roll moves the outline by the angle times the distance, a nod by the angle times its depth before the neck, and yaw hardly at all.
    _, pitch, roll = config.head_deg
    moved = farthest * math.hypot(0.4 * pitch, roll) * RADIANS
    return min(1.0, HEAD_ROOM * max(mask.shape) / max(moved, 1e-6))
