"""The head model nodding, turning and speaking, and its landmarks without error."""

import numpy as np
import torch

from hicode.camera import Camera
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.motion import FaceTrack, Motion
from hicode.tracking.head_model import HeadModel


def true_track(
    model: HeadModel, frames: int = 30, focal: float = 1400.0, seed: int = 0
) -> tuple[FaceTrack, np.ndarray]:
    """A head that nods, turns and speaks, and its landmarks "t 478 3" as MediaPipe would give them without error."""
    rng = np.random.default_rng(seed)
    time = torch.arange(frames) / 25
    identity = torch.from_numpy(rng.normal(0, 0.4, 80)).float()
    expression = torch.zeros(frames, 64)
    for name, rate, size in (
        ("jawOpen", 3.0, 0.3),
        ("mouthFunnel", 2.0, 0.3),
        ("browInnerUp", 0.7, 0.4),
        ("mouthSmileLeft", 1.0, 0.3),
    ):
        expression[:, model.expression_names.index(name)] = size * (0.5 - 0.5 * torch.cos(2 * np.pi * rate * time))
    turn = torch.stack([0.05 * torch.sin(5 * time), 0.2 * torch.sin(3 * time), 0.04 * torch.cos(4 * time)], 1)
    shift = torch.stack([0.2 * torch.sin(2 * time), 0.1 * torch.cos(3 * time), 8 + 0.1 * torch.sin(time)], 1)
    flip = torch.tensor([1.0, -1.0, -1.0])
    poses = rigid(flip[:, None] * rotation_from_axis_angle(turn), shift)
    camera = Camera.pinhole(focal, 512, 512)
    shape = model.landmarks(model.vertices(identity, expression))
    pixels, depth = Camera(camera.K.expand(frames, 3, 3), poses, 512, 512).project(shape)
    points = torch.cat([pixels, ((depth - shift[:, 2:]) * focal / shift[:, 2:])[..., None]], -1)
    return FaceTrack(
        Motion(expression, shape, poses), identity, camera, pixels, torch.ones(frames)
    ), points.double().numpy()
