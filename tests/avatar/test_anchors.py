"""Anchors: where they lie, and interpolation with its adjoint."""

import pytest
import torch

from helpers.deformations import G, a_head
from hicode.avatar.anchors import Anchors, choose_anchors


def test_anchors_reproduce_a_smooth_field():
    points = a_head(4000)
    anchors = choose_anchors(points, torch.ones(4000), 600)
    field = lambda p: torch.stack([(3 * p[:, 0]).sin(), p[:, 1] * p[:, 2]], 1)
    error = anchors.interpolate(field(anchors.points)) - field(points)
    assert error.abs().mean() < 0.03  # the field's range is 2, the anchors' spacing about 0.14


def test_anchors_are_denser_where_asked():
    points = a_head(4000)
    importance = torch.where(points[:, 2] > 0, 3.0, 1.0)
    chosen = choose_anchors(points, importance, 500).points
    ratio = float((chosen[:, 2] > 0).sum() / (chosen[:, 2] <= 0).sum())
    assert 5 < ratio < 12  # spacing a third, so about nine times as many on a surface


@pytest.mark.parametrize("rows", [40, 55])  # all of them in use, and some that no point is made of
def test_interpolation_gradient_is_the_adjoint(rows):
    index, weight = torch.randint(40, (200, 4), generator=G()), torch.rand(200, 4, generator=G(2))
    table = torch.randn(rows, 10, generator=G(), requires_grad=True)
    weights = torch.randn(200, 10, generator=G(1))
    (Anchors(torch.zeros(rows, 3), index, weight).interpolate(table) * weights).sum().backward()
    reference = table.detach().clone().requires_grad_(True)
    ((reference[index] * weight[..., None]).sum(1) * weights).sum().backward()
    assert torch.allclose(table.grad, reference.grad, atol=1e-5)
