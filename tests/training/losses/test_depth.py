"""Depth distortion of flat layers, where it is known."""

import pytest
import torch

from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.training.losses.depth import depth_distortion


def layers(distances, opacity=0.6, size=24):
    """Flat Gaussians that fill the picture, one layer a distance (dm) along the axis of a camera that looks at them."""
    n = len(distances)
    camera = Camera(torch.tensor([[30.0, 0, size / 2], [0, 30, size / 2], [0, 0, 1]]), torch.eye(4), size, size)
    means = torch.stack([torch.zeros(n), torch.zeros(n), torch.tensor(distances)], 1).requires_grad_()
    flat = torch.tensor([3.0, 3.0, 1e-3]).log().expand(n, 3)
    quats = torch.tensor([1.0, 0, 0, 0]).expand(n, 4)
    return Gaussians(means, flat, quats, torch.full((n,), opacity).logit(), torch.rand(n, 3)), camera


def test_depth_distortion_is_the_variance_of_depth_along_a_ray():
    cloud, camera = layers([5.0, 5.04])
    weight = torch.tensor([0.6, 0.4 * 0.6])  # the second behind the first
    share = weight / weight.sum()
    z = torch.tensor([0.0, 0.04])
    variance = float(weight.sum() * ((share * z * z).sum() - (share * z).sum() ** 2))
    distortion = depth_distortion(cloud, camera)
    assert distortion.item() == pytest.approx(variance / (1 + variance / 0.01), rel=0.05)
    distortion.backward()
    near, far = cloud.means.grad[:, 2]
    assert near < 0 < far  # descending draws them together


def test_a_surface_has_no_depth_distortion():
    cloud, camera = layers([5.0, 5.0, 5.0])
    assert depth_distortion(cloud, camera).item() < 1e-8
