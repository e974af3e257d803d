"""Idling: blinks, gaze and small head movements where nothing drives them.

t frames at `fps`. Angles in degrees about the head frame's axes: yaw to the subject's left, pitch up, roll to the
subject's left shoulder. Closure runs from 0 (as open as the frame) to 1 (closed).

    IdleSource  times and sizes: random, seeded, in constant memory
    Idler       adds them to a motion: eyes and pose only, the mouth is not touched

Statistics. Blinks: 17 a minute at rest and 26 in conversation (Bentivoglio et al. 1997), intervals log-normal; 100 to
300 ms long, closing two to three times as fast as opening (Evinger et al. 1991). Gaze: fixations broken by saccades of
25 ms + 2.4 ms a degree, with glances away of about .9 s (Lee, Badler & Badler 2002); the eyes counter the head's
rotation. Head: noise whose amplitude falls with frequency, below 1 Hz.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hicode.avatar.eyes import RADIANS, Actions, Eyes, eye_gap, near_tracked_blinks, tracked_blinks
from hicode.camera import Camera
from hicode.geometry import axis_angle_from_rotation, rigid, rotation_from_axis_angle, smoothstep
from hicode.motion import CHIN, Motion


@dataclass(frozen=True)
class IdleConfig:
    """How a face idles. Angles in degrees."""

    blinks_per_min: float = 18.0  # between rest and conversation
    blink_spread: float = 0.55  # standard deviation of the logarithm of the time between blinks
    blink_gap_s: float = 0.5  # shortest time from the end of a blink to the next one
    blink_s: tuple[float, float] = (0.16, 0.30)  # shortest and longest blink; their median lies in the middle
    closed_s: float = 0.04  # of a blink, lids shut: one frame, so that none falls between two
    tracked_blink_s: float = 4.0  # no blink is added within this time of one in the driving track
    fixation_s: float = 1.2  # mean time between saccades, log-normal
    fixation_spread: float = 0.7  # standard deviation of its logarithm
    shortest_fixation_s: float = 0.2
    gaze_deg: tuple[float, float] = (1.2, 0.6)  # standard deviation of fixations on the listener, sideways and upwards
    glance_chance: float = 0.1  # share of the fixations that are a glance away
    glance_deg: tuple[float, float] = (3.0, 5.0)  # how far away, sideways and a little downwards
    glance_s: float = 0.9  # mean length of a glance
    head_deg: tuple[float, float, float] = (2.0, 1.2, 0.8)  # farthest yaw, pitch and roll
    head_band_hz: tuple[float, float] = (0.05, 0.8)  # frequencies of the head's movements; power falls as 1 / f^2
    head_waves: int = 12  # sinusoids an axis, at random frequencies spread over the band


@dataclass(frozen=True, eq=False)
class Idle:
    """t frames: closure "t" in [0, 1], gaze "t 2" (yaw, pitch against the camera's direction), head "t 3" (yaw, pitch,
    roll), degrees."""

    closure: Float[np.ndarray, "t"]
    gaze_deg: Float[np.ndarray, "t 2"]
    head_deg: Float[np.ndarray, "t 3"]


class IdleSource:
    """A seeded sequence of `Idle` frames, read in pieces of any length with the same result.

    Blinks, gaze and head draw from separate generators, seeded by (seed, purpose).
    """

    def __init__(self, seed: int = 0, fps: float = 25.0, config: IdleConfig = IdleConfig()):
        self.config, self.fps, self._frame = config, fps, 0
        self._blinks, self._gaze, head = (np.random.default_rng([seed, purpose]) for purpose in range(3))
        self._blink_start_s, self._blink_length_s = self._next_blink(0.0)
        self._from, self._to = (0.0, 0.0), (0.0, 0.0)  # of the latest saccade
        self._saccade_s, self._next_saccade_s = -1.0, self._fixation(False)
        low, high = np.log(config.head_band_hz)
        n = config.head_waves
        # One frequency in each of n equal parts of the band's logarithm, where noise of power 1 / f^2 has amplitudes of
        # 1 / sqrt(f). Standard deviation 1.
        hz = np.exp(low + (high - low) * (np.arange(n) + head.random((3, n))) / n)
        phase = 2 * math.pi * head.random((3, n))
        amplitude = hz**-0.5 * np.sqrt(2 / (1 / hz).sum(1, keepdims=True))
        self._waves = np.stack([amplitude, 2 * math.pi * hz, phase], -1).tolist()

    def next(self, count: int) -> Idle:
        """The next `count` frames, sampled at their middle."""
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
        (x0, y0), (x1, y1) = self._from, self._to
        return x0 + done * (x1 - x0), y0 + done * (y1 - y0)

    def _head(self, now_s: float) -> list[float]:
        sums = (sum(a * math.sin(w * now_s + p) for a, w, p in waves) for waves in self._waves)
        # Two standard deviations are near the limit, nothing is beyond.
        return [limit * math.tanh(x / 2) for limit, x in zip(self.config.head_deg, sums, strict=True)]


def blink_profile(since_s: float, length_s: float, closed_s: float) -> float:
    """Closure `since_s` after a blink's start: 3/10 of the moving time closing, 7/10 opening, `closed_s` between."""
    down = 0.3 * (length_s - closed_s)
    if since_s < down + closed_s:
        return smoothstep(since_s / down)
    return 1 - smoothstep((since_s - down - closed_s) / (length_s - closed_s - down))


def _log_normal(rng: np.random.Generator, mean: float, spread: float) -> float:
    return mean * math.exp(spread * float(rng.standard_normal()) - spread * spread / 2)


class Idler:
    """Adds idling to the frames of a driving track, in the order in which they are played, in pieces of any length.

    still      whether one frame is held: then gaze and head are generated too. Else blinks alone, and only where the
               track has none within `IdleConfig.tracked_blink_s`
    blinks     whether blinks are added
    pivot      "3"  centre of rotation of the head (the neck), head frame
    head_scale share of `IdleConfig.head_deg` that the picture around the head allows
    """

    def __init__(
        self,
        driving: Motion,
        actions: Actions,
        still: bool = False,
        blinks: bool = True,
        seed: int = 0,
        pivot: Float[Tensor, "3"] | None = None,
        head_scale: float = 1.0,
    ):
        self.config, self.still, self.blinks, self.head_scale = IdleConfig(), still, blinks, head_scale
        self.source = IdleSource(seed, driving.fps, self.config)
        self.pivot = torch.zeros(3) if pivot is None else pivot
        self._driving, self._actions, self._eyes = driving, actions, None
        self._blink: bool | None = None  # whether the current blink is shown; None: there is none

    @property
    def eyes(self) -> Eyes:
        """Made when first needed: many tracks never need it."""
        if self._eyes is None:
            self._eyes = Eyes.of(self._driving, self._actions)
        return self._eyes

    def __call__(self, motion: Motion, near_blink: Bool[np.ndarray, "t"]) -> Motion:
        """The next frames. `near_blink`: where a tracked blink is near (`near_tracked_blinks`)."""
        idle = self.source.next(len(motion))
        closure = self._shown(idle.closure, near_blink)
        if not self.still and not closure.any():
            return motion
        frames = [
            self._frame(motion, t, float(closure[t]), idle.gaze_deg[t], idle.head_deg[t]) for t in range(len(motion))
        ]
        expression, landmarks, poses = (torch.stack(values) for values in zip(*frames, strict=True))
        return replace(motion, expression=expression, landmarks=landmarks, T_camera_head=poses)

    def _shown(self, closure: Float[np.ndarray, "t"], near_blink: Bool[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
        """A blink is shown whole or not at all: the frame in which it begins decides."""
        out = np.zeros(len(closure))
        for t, value in enumerate(closure):
            if value > 0 and self._blink is None:
                self._blink = self.blinks and (self.still or not near_blink[t])
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
            # The eyes counter the head's rotation and stay on the listener.
            yaw, pitch = (float(v) for v in gaze_deg - head_deg[:2])
            for way, amount in ((0, yaw), (1, -yaw), (2, pitch), (3, -pitch)):
                if amount > 0:
                    change += amount * eyes.look_expression[way]
                    landmarks += amount * eyes.look_landmarks[way]
            pose = pose @ rotation_about(self.pivot, head_deg)
        if closure > 0:
            gap = eye_gap(landmarks)
            for eye in range(2):
                # From the present gap to the closed one: a lid that is down already moves less.
                way = eyes.open_gap[eye] - eyes.shut_gap[eye]
                amount = closure * float(((gap[eye] - eyes.shut_gap[eye]) / way).clamp(0, 2)) if way > 0 else 0.0
                change += amount * eyes.shut_expression[eye]
                landmarks += amount * eyes.shut_landmarks[eye]
        # Landmarks go all the way, the expression within the range that the networks were trained on.
        moved = torch.minimum(torch.maximum(expression + change, eyes.low), eyes.high)
        expression = torch.where(change != 0, moved, expression)
        return expression, landmarks, pose


def rotation_about(pivot: Float[Tensor, "3"], angles_deg: Float[np.ndarray, "3"]) -> Float[Tensor, "4 4"]:
    """T_head_head: a rotation by yaw, pitch and roll (small: one rotation vector) about a point of the head frame."""
    yaw, pitch, roll = (float(a) * RADIANS for a in angles_deg)
    turn = rotation_from_axis_angle(torch.tensor([-pitch, yaw, -roll], dtype=pivot.dtype))
    return rigid(turn, pivot - turn @ pivot)


def still_frame(driving: Motion) -> int:
    """The best driving frame to hold: eyes open, no blink near, the head in its usual pose and not moving."""
    reach = round(0.2 * driving.fps)
    gap = eye_gap(driving.landmarks).mean(1).numpy()
    busy = near_tracked_blinks(
        tracked_blinks(driving), np.clip(np.arange(-reach, len(driving) + reach), 0, len(driving) - 1), reach
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
    # Every term in units of its median.
    cost = sum(x / max(float(np.median(x)), 1e-6) for x in (turn, away, speed))
    cost = cost + 10 * np.clip(1 - gap / max(float(np.median(gap)), 1e-6), 0, None) + 1e3 * busy
    return int(cost.argmin())


BELOW_CHIN, BEHIND_CHIN = 0.30, 0.75  # head units: from the chin to the middle of the neck where the head mask cuts it
# Of the image: how far the rendered head's outline may leave the held frame's. At 11 px of 512 hair shows a double
# edge, at 7 px none.
HEAD_ROOM = 7 / 512


def neck(driving: Motion) -> Float[Tensor, "3"]:
    """The head's centre of rotation, in the head frame: the cut of the head mask, where nothing may move."""
    chin = driving.landmarks[:, CHIN].median(0).values
    return chin - torch.tensor([0.0, BELOW_CHIN, BEHIND_CHIN])


@runtime_checkable
class Held(Protocol):
    """The part of `Avatar` that `head_room` reads."""

    driving: Motion
    camera: Camera

    def driving_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """The soft head mask of driving frame t."""
        ...


def head_room(avatar: Held, t: int, pivot: Float[Tensor, "3"], config: IdleConfig = IdleConfig()) -> float:
    """The share of `IdleConfig.head_deg` by which the head of driving frame t may move.

    No part of its mask's outline moves farther than HEAD_ROOM: composition covers a narrow rim around the mask only.
    """
    mask = avatar.driving_mask(t)
    y, x = np.nonzero(mask > 127)
    if len(x) == 0:
        return 1.0
    pose = avatar.driving.T_camera_head[t]
    at = pose[:3, :3] @ pivot + pose[:3, 3]
    centre = (avatar.camera.K @ (at / at[2]))[:2].numpy()
    farthest = float(np.hypot(x - centre[0], y - centre[1]).max())
    # Roll moves the outline by angle times distance, pitch by angle times depth before the neck, yaw hardly at all.
    _, pitch, roll = config.head_deg
    moved = farthest * math.hypot(0.4 * pitch, roll) * RADIANS
    return min(1.0, HEAD_ROOM * max(mask.shape) / max(moved, 1e-6))
