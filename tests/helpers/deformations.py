"""A small head model and deformations of a few hundred Gaussians."""

import torch

from hicode.avatar.deformation import Deformation, DeformationConfig
from hicode.avatar.rig import MeshRig
from hicode.geometry import rotation_from_axis_angle
from hicode.motion import Motion, MotionFrame

G = lambda seed=0: torch.Generator().manual_seed(seed)


SMALL = dict(channels=8, hidden=16, position_frequencies=3, landmark_frequencies=3)


def a_head(n=300, seed=0):
    points = torch.randn(n, 3, generator=G(seed))
    return points / points.norm(dim=1, keepdim=True)


def a_deformation(trained=True, **options):
    config = DeformationConfig(**(SMALL | {"anchors": 0} | options))
    rig = None
    if config.rig:
        rig = MeshRig(*(torch.randn(*s, generator=G(5)) * 0.02 for s in ((64, 12, 3), (478, 3), (64, 478, 3))))
    torch.manual_seed(0)
    deformation = Deformation.create(config, torch.randn(80, generator=G(1)), torch.zeros(3), 1.0, rig)
    if trained and deformation.control is not None:
        torch.nn.init.normal_(deformation.control.offsets[-1].weight, std=0.3, generator=G(2))
    return deformation


def a_rotation(seed=3):
    return rotation_from_axis_angle(0.3 * torch.randn(3, generator=G(seed + 30)))


def a_frame(seed=3, speech=None):
    expression, landmarks = torch.randn(64, generator=G(seed)), torch.randn(478, 3, generator=G(seed + 1)) * 0.5
    return MotionFrame(expression, landmarks, a_rotation(seed), speech)


def a_motion(t=30, seed=40, speech_dim=0):
    poses = torch.eye(4).repeat(t, 1, 1)
    poses[:, :3, :3] = rotation_from_axis_angle(0.05 * torch.randn(t, 3, generator=G(seed)))
    speech = torch.randn(t, speech_dim, generator=G(seed + 3)) if speech_dim else None
    expression, landmarks = torch.randn(t, 64, generator=G(seed + 1)), torch.randn(t, 478, 3, generator=G(seed + 2))
    return Motion(expression, landmarks, poses, speech=speech)
