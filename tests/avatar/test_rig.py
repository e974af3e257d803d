"""The mesh rig: what rides on surface and landmarks, and what stays."""

import torch

from helpers.deformations import G
from hicode.avatar.rig import MeshRig, bind
from hicode.motion import Motion, MotionFrame


def a_frame(expression, landmarks):
    return MotionFrame(expression, landmarks, torch.eye(3))


def test_points_on_the_surface_ride_with_it():
    vertices, triangles = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0, 1, 2]])
    landmarks = torch.rand(478, 3, generator=G()) + 5  # far away: they do not pull
    basis = torch.zeros(64, 3, 3)
    basis[2] = torch.tensor([[0.0, 0, 0.1], [0, 0, 0.2], [0, 0, 0.3]])
    rig = MeshRig(basis, landmarks, torch.zeros(64, 478, 3))
    points = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 3.0]])
    expression = torch.zeros(64)
    expression[2] = 2.0
    moved = rig(bind(points, vertices, triangles, landmarks), a_frame(expression, landmarks))
    assert torch.allclose(moved[:, 2], torch.tensor([0.2, 0.4, 0.5, 0.0]), atol=1e-4)


def test_the_rig_follows_landmarks_beyond_the_model_but_not_their_mean_residual():
    landmarks = torch.rand(478, 3, generator=G())
    rig = MeshRig(torch.zeros(64, 3, 3), landmarks - 0.01, torch.zeros(64, 478, 3))
    motion = Motion(torch.zeros(4, 64), landmarks.expand(4, 478, 3), torch.eye(4).expand(4, 4, 4))
    for _ in range(2):  # the second time changes nothing
        rig.fit(motion)
    vertices = torch.tensor([[9.0, 9, 9], [10, 9, 9], [9, 10, 9]])
    binding = bind(landmarks[:20], vertices, torch.tensor([[0, 1, 2]]), landmarks)
    still = rig(binding, a_frame(torch.zeros(64), landmarks))
    assert still.abs().max() < 1e-6  # a constant residual is shape, not motion
    moved = rig(binding, a_frame(torch.zeros(64), landmarks + torch.tensor([0.0, 0.03, 0])))
    assert torch.allclose(moved, torch.tensor([0.0, 0.03, 0]).expand(20, 3), atol=1e-4)
