"""Vocabulary: rotations, camera, motion, Gaussians, files."""

import math

import numpy as np
import pytest
import torch

from hicode.camera import Camera
from hicode.gaussians import gaussians_from_points
from hicode.geometry import (
    axis_angle_from_rotation,
    quat_from_rotation,
    rigid,
    rotation_from_axis_angle,
    rotation_from_quat,
    similarity,
    transform,
)
from hicode.motion import Motion, ping_pong


def axis_angles(n=200):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(n, 3, dtype=torch.float64, generator=g)
    a = a / a.norm(dim=1, keepdim=True) * torch.rand(n, 1, dtype=torch.float64, generator=g) * 3.1
    a[0] = 0
    a[1] = torch.tensor([1e-9, 0, 0])
    return a


def test_rotation_round_trips_through_axis_angle_and_quaternion():
    a = axis_angles()
    R = rotation_from_axis_angle(a)
    assert torch.allclose(R @ R.mT, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(axis_angle_from_rotation(R), a, atol=1e-8)
    # 3: quaternions need not be normalised
    assert torch.allclose(rotation_from_quat(3 * quat_from_rotation(R)), R, atol=1e-12)


def test_rotation_about_z_turns_x_to_y():
    R = rotation_from_axis_angle(torch.tensor([0.0, 0.0, math.pi / 2]))
    assert torch.allclose(R @ torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0]), atol=1e-6)


def test_rotation_gradient_is_finite_and_right_at_zero():
    for point in (torch.zeros(3, dtype=torch.float64), torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)):
        assert torch.autograd.gradcheck(rotation_from_axis_angle, point.clone().requires_grad_(True))


def test_similarity_recovers_scale_rotation_translation():
    g = torch.Generator().manual_seed(1)
    source = torch.randn(30, 3, dtype=torch.float64, generator=g)
    R = rotation_from_axis_angle(torch.tensor([0.2, 0.5, -0.4], dtype=torch.float64))
    target = 1.7 * source @ R.T + torch.tensor([1.0, 2, 3])
    s, R2, t = similarity(source, target)
    assert (
        abs(s - 1.7) < 1e-12
        and torch.allclose(R2, R)
        and torch.allclose(t, torch.tensor([1.0, 2, 3], dtype=torch.float64))
    )


def a_camera():
    T = rigid(rotation_from_axis_angle(torch.tensor([0.1, 0.2, 0.3])), torch.tensor([0.1, -0.2, 5.0]))
    return Camera.pinhole(700.0, 640, 480, T)


def test_point_on_the_axis_lands_in_the_middle():
    pixel, depth = Camera.pinhole(500.0, 64, 48).project(torch.tensor([[0.0, 0, 2]]))
    assert pixel.tolist() == [[32.0, 24.0]] and depth.tolist() == [2.0]


def test_unproject_inverts_project():
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))
    pixel, depth = a_camera().project(points)
    assert torch.allclose(a_camera().unproject(pixel, depth), points, atol=1e-5)


def test_cropped_and_resized_cameras_see_the_same_rays():
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(3))
    pixel, _ = a_camera().project(points)
    assert torch.allclose(
        a_camera().cropped(100, 50, 200, 100).project(points)[0], pixel - torch.tensor([100.0, 50.0]), atol=1e-4
    )
    assert torch.allclose(a_camera().resized(320, 240).project(points)[0], pixel / 2, atol=1e-4)


def test_transform_composes_right_to_left():
    A = rigid(rotation_from_axis_angle(torch.tensor([0.0, 0.3, 0.0])), torch.tensor([1.0, 0, 0]))
    B = rigid(rotation_from_axis_angle(torch.tensor([0.5, 0.0, 0.0])), torch.tensor([0.0, 2, 0]))
    p = torch.randn(5, 3, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(transform(A @ B, p), transform(A, transform(B, p)), atol=1e-6)


def test_bounce_runs_back_and_forth_without_a_jump():
    assert ping_pong(4, 0, 9).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert np.abs(np.diff(ping_pong(17, 5, 500))).max() == 1
    assert ping_pong(1, 0, 3).tolist() == [0, 0, 0]


@pytest.mark.wrong_shapes
def test_motion_refuses_wrong_shapes():
    with pytest.raises(AssertionError):
        Motion(torch.zeros(3, 64), torch.zeros(3, 468, 3), torch.eye(4).expand(3, 4, 4))


def test_gaussians_from_points_take_the_distance_to_their_neighbours():
    points = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"), -1).reshape(-1, 3) * 0.05
    cloud = gaussians_from_points(points, torch.rand(64, 3), opacity=0.25)
    assert torch.allclose(cloud.scales, torch.full((64, 3), 0.05), atol=1e-6)
    assert torch.allclose(cloud.opacities, torch.full((64,), 0.25))
    assert len(gaussians_from_points(torch.zeros(1, 3), torch.zeros(1, 3))) == 1
