"""Deformation: Eqs 7-8, anchors, gradients to positions, view-dependent colours."""

from dataclasses import replace

import pytest
import torch

from helpers.deformations import G, a_deformation, a_frame, a_head, a_motion
from hicode.avatar.deformation import ROTATION_UNIT, Deformation
from hicode.avatar.rig import bind
from hicode.gaussians import Gaussians, gaussians_from_points
from hicode.geometry import rotation_from_axis_angle


def bound(deformation: Deformation, points: torch.Tensor) -> Deformation:
    vertices, triangles = torch.randn(12, 3, generator=G(4)), torch.randint(0, 12, (9, 3), generator=G(5))
    deformation.binding = bind(points, vertices, triangles, a_frame().landmarks)
    return deformation


def a_cloud(points: torch.Tensor) -> Gaussians:
    return gaussians_from_points(points, torch.rand(len(points), 3, generator=G(6)))


def test_anchors_that_are_all_the_points_give_the_plain_evaluation():
    points = a_head(200)
    plain, anchored = a_deformation(rig=False), a_deformation(rig=False, anchors=199)
    anchored.place_anchors(points[:199])
    assert anchored.anchors is None  # no more points than anchors: nothing to interpolate
    anchored.place_anchors(points)
    assert anchored.anchors is not None and len(anchored.anchors.points) == 199
    for a, b in zip(plain(points, a_frame()), anchored(points, a_frame()), strict=True):
        # AdaIN's statistics run over 199 points instead of 200, and one point is interpolated.
        assert (a - b).abs().median() < 0.02 * a.abs().max().clamp_min(1e-6)


@pytest.mark.parametrize("options", [{}, {"control": "none"}, {"rig": False}])
def test_state_round_trips_bit_for_bit(options):
    points, deformation = a_head(), a_deformation(anchors=64, **options)
    if deformation.rig is not None:
        bound(deformation, points)
    deformation.fit(a_motion())
    deformation.place_anchors(points)
    again = Deformation.from_state(*deformation.state())
    for a, b in zip(deformation(points, a_frame()), again(points, a_frame()), strict=True):
        assert torch.equal(a, b)


def test_the_rig_alone_moves_positions_and_nothing_else():
    points = a_head()
    deformation = bound(a_deformation(control="none"), points)
    assert not list(deformation.parameters())
    offsets = deformation(points, a_frame())
    assert torch.equal(offsets.means, deformation.rig_displacement(a_frame())) and offsets.means.abs().max() > 0.01
    assert not any(part.any() for part in offsets[1:])


def test_rig_and_control_add_up():
    points = a_head()
    both, rig, control = a_deformation(), a_deformation(control="none"), a_deformation(rig=False)
    bound(both, points), bound(rig, points)
    parts = [d(points, a_frame()).means for d in (both, rig, control)]
    torch.testing.assert_close(parts[0], parts[1] + parts[2])


def test_colours_shift_with_the_motion_and_only_with_color_offset():
    shifts = [a_deformation(rig=False, color_offset=on)(a_head(), a_frame()).colors for on in (True, False)]
    assert shifts[0].abs().max() > 0.01 and torch.count_nonzero(shifts[1]) == 0


@pytest.mark.parametrize("flows", [True, False])
def test_the_loss_reaches_positions_through_their_query_only_where_configured(flows):
    options = {"attention": "learned", "attention_reaches": ()}
    deformation = a_deformation(rig=False, position_gradient=flows, **options)
    points = a_head(40).requires_grad_()
    offsets = deformation(points, a_frame())
    gradient = torch.autograd.grad(offsets.means[:, 0].sum(), points, allow_unused=True)[0]
    assert (gradient is not None and float(gradient.abs().max()) > 1e-4) == flows
    if flows:
        step = 1e-3 * torch.randn(40, 3, generator=G(8))
        with torch.no_grad():
            ends = [deformation(points + s * step, a_frame()).means[:, 0].sum() for s in (1, -1)]
        assert float((gradient * step).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2, rel=0.05)


@pytest.mark.parametrize("options", [{"control": "none"}, {"rig": False}, {}])
def test_view_dependent_colours_are_linear_in_the_rotation_and_zero_at_the_mean(options):
    points = a_head()
    deformation = a_deformation(**options)
    if deformation.rig is not None:
        bound(deformation, points)
    deformation.fit(a_motion())
    mean = deformation.normalization.rotation_mean
    cloud = a_cloud(points)
    lit = replace(cloud, view_dependent_color=torch.randn(len(points), 3, 3, generator=G(7)))

    def change(angle: float) -> torch.Tensor:
        turned = mean @ rotation_from_axis_angle(torch.tensor([0.0, angle, 0.0]))
        frame = replace(a_frame(), head_rotation=turned)
        return deformation.deform(lit, frame).colors - deformation.deform(cloud, frame).colors

    assert change(0.0).abs().max() < 1e-5
    expected = lit.view_dependent_color[..., 1] * float(torch.tensor(0.1).sin()) / ROTATION_UNIT
    torch.testing.assert_close(change(0.1), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(change(-0.1), -expected, atol=1e-4, rtol=1e-3)


def test_the_anchor_cache_is_kept_while_anchors_stay_and_made_anew_when_they_move():
    deformation, points = a_deformation(rig=False, anchors=40), a_head()
    deformation.place_anchors(points)
    cache = deformation.anchor_cache(points)
    assert deformation.anchor_cache(points) is cache
    deformation.place_anchors(points * 0.5)
    assert deformation.anchor_cache(points * 0.5) is not cache
    deformation.place_anchors(points)
    assert torch.equal(deformation.anchor_cache(points).positions, cache.positions)
