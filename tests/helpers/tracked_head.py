"""A drawn head that turns, with its detected landmarks and its true poses."""

from functools import cache

import numpy as np
import torch

from hicode.camera import Camera
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.motion import FaceTrack, Motion

SIZE, FOCAL, FRAMES = 192, 330.0, 26


TRAIN = range(20)


PX_PER_DM = FOCAL / 4.5


KEYS = torch.tensor([0, 6, 12, 17])  # keyframes where a test names them itself


RADII = np.array([0.8, 1.0, 0.9])


def true_poses():
    """Turns of some ten degrees, as a speaker's."""
    t = torch.arange(FRAMES) / 4.0
    angles = torch.stack([0.10 * torch.sin(t), 0.17 * torch.sin(0.7 * t + 1), 0.05 * torch.cos(t)], 1)
    shift = torch.stack([0.05 * torch.sin(t), 0.03 * torch.cos(t), 4.5 + 0.05 * torch.sin(t)], 1)
    return rigid(torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ rotation_from_axis_angle(angles), shift)


def draw(pose):
    """(RGB uint8, depth with NaN beside the head) of the ellipsoid, its colour a sum of waves through space."""
    pose = pose.double().numpy()
    R, T = pose[:3, :3], pose[:3, 3]
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    ray = np.stack([(x - SIZE / 2) / FOCAL, (y - SIZE / 2) / FOCAL, np.ones_like(x)], -1)
    d, o = ray @ R / RADII, -T @ R / RADII  # the head's axes, the ellipsoid as the unit sphere
    a, b, c = (d * d).sum(-1), d @ o, o @ o - 1
    inside = b * b - a * c
    z = (-b - np.sqrt(np.maximum(inside, 0))) / a
    z = np.where(inside > 0, z, np.nan)
    p = ray * np.nan_to_num(z)[..., None] - T
    p = p @ R
    waves = np.random.default_rng(0)
    value = sum(np.sin(p @ waves.normal(0, 11, 3) + waves.uniform(0, 6)) for _ in range(14))
    gray = np.where(inside > 0, np.clip(128 + 24 * value, 0, 255), 40).astype(np.uint8)
    return np.repeat(gray[..., None], 3, 2), z.astype(np.float32)


def landmarks():
    """478 points on the front of the ellipsoid."""
    rng = np.random.default_rng(2)
    across = rng.uniform(-0.6, 0.6, (478, 2))
    front = np.concatenate([across, np.sqrt(1 - (across**2).sum(1, keepdims=True))], 1)
    return torch.from_numpy(front * RADII).float()


def detected(poses):
    """Where the frames show the landmarks, px "t 478 2"."""
    camera = Camera.pinhole(FOCAL, SIZE, SIZE)
    return torch.stack([camera.with_pose(p).project(landmarks())[0] for p in poses])


def tracked(poses, fit, seen_at=None, confidence=None):
    """The track of a landmark fit that took the head's poses for `fit`; its landmarks keep the shape that they have."""
    motion = Motion(torch.zeros(FRAMES, 64), landmarks().expand(FRAMES, 478, 3), fit)
    seen = torch.ones(FRAMES) if confidence is None else confidence
    return FaceTrack(
        motion,
        torch.zeros(80),
        Camera.pinhole(FOCAL, SIZE, SIZE),
        detected(poses) if seen_at is None else seen_at,
        seen,
    )


@cache
def drawn_head():
    """(poses, [(picture, depth) of each frame]): drawn once for all tests that look at it."""
    poses = true_poses()
    return poses, [draw(p) for p in poses]


def swings():
    """ "t 3" (dm): slow and as large as on real clips, 2-3 px; none along the depth, which nobody sees."""
    t = torch.arange(FRAMES) / 5.0
    return torch.stack([0.03 * torch.sin(t), 0.02 * torch.cos(1.3 * t), torch.zeros(FRAMES)], 1)
