"""The deformation at speaking time equals the deformation that training uses; so does the frame made of it."""

from dataclasses import replace

import pytest
import torch

from helpers.deformations import G, a_deformation, a_frame, a_head
from hicode.avatar.fast import SCORE_MAX, FrameDeformer
from hicode.avatar.rig import Binding
from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.render import rasterize


def a_cloud(n=300):
    return Gaussians(
        a_head(n),
        -3 + 0.3 * torch.randn(n, 3, generator=G(7)),
        torch.randn(n, 4, generator=G(8)),
        torch.randn(n, generator=G(9)),
        torch.rand(n, 3, generator=G(10)),
    )


def a_frozen(anchors=0, n=300, sharpness=1.0, **options):
    """A deformation with weights everywhere, as training leaves it, of the cloud of the same size."""
    deformation = a_deformation(anchors=anchors, **options)
    if deformation.control is not None:
        with torch.no_grad():
            deformation.control.style.affine.weight.normal_(std=0.1, generator=G(11))
            deformation.control.query.mlp[-1].weight.mul_(sharpness)
            deformation.control.attention.landmark_code.mul_(3)
    if deformation.rig is not None:
        deformation.binding = Binding(
            torch.randint(0, 12, (n, 3), generator=G(12)),
            torch.rand(n, 3, generator=G(13)) * 0.3,
            torch.randint(0, 478, (n, 8), generator=G(14)),
            torch.rand(n, 8, generator=G(15)) * 0.1,
        )
    deformation.place_anchors(a_cloud(n).means)
    return deformation.eval().requires_grad_(False)


# Float32 sums of 478 terms in another order: 1e-6 relative each, through four layers whose outputs are of order 1.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("attention", ["nearness", "learned"])
@pytest.mark.parametrize("options", [{}, {"rig": False}, {"color_offset": False}, {"control": "none"}])
@pytest.mark.parametrize("anchors, n", [(0, 300), (0, 257), (64, 300), (260, 2500)])
def test_it_equals_the_deformation_of_training(options, anchors, n, attention):
    reaches = {"nearness": (0.05, 0.15), "learned": (0.15,)}[attention]
    deformation, cloud = a_frozen(anchors, n, attention=attention, attention_reaches=reaches, **options), a_cloud(n)
    deformer = FrameDeformer(deformation, cloud)
    for seed in (3, 20, 3):  # again at the end: nothing of one frame stays in the next
        expected, got = deformation.deform(cloud, a_frame(seed)), deformer(a_frame(seed))
        assert (expected.means - cloud.means).abs().max() > 0.01, "nothing moves, so nothing is compared"
        moved = "control" not in options and options.get("color_offset", True)
        assert bool((expected.colors != cloud.colors).any()) == moved
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(getattr(got, name), tensor, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"control": "none"}])
def test_view_dependent_colours_are_those_of_training(options):
    cloud, deformation, frame = a_cloud(), a_frozen(**options), a_frame()
    lit = replace(cloud, view_dependent_color=0.1 * torch.randn(len(cloud), 3, 3, generator=G(50)))
    got, expected = FrameDeformer(deformation, lit)(frame).colors, deformation.deform(lit, frame).colors
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (expected - deformation.deform(cloud, frame).colors).abs().max() > 0.01


def test_attention_may_be_as_sharp_as_it_likes():
    """Scores far beyond what float32's exponential holds take the row's maximum out first."""
    deformation, cloud = a_frozen(sharpness=5e3, attention="learned", attention_reaches=(0.15,)), a_cloud()
    deformer = FrameDeformer(deformation, cloud)
    assert deformer._query_norm > 10 * SCORE_MAX
    torch.testing.assert_close(deformer(a_frame()).means, deformation.deform(cloud, a_frame()).means, **CLOSE)


def test_it_does_not_depend_on_the_number_of_threads():
    deformation, cloud = a_frozen(64), a_cloud()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(FrameDeformer(deformation, cloud)(a_frame()))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0].means, results[1].means, **CLOSE)


def test_ablations_and_what_still_trains_are_left_to_the_deformation_itself():
    assert FrameDeformer.supports(a_frozen()) and FrameDeformer.supports(a_frozen(control="none"))
    for control in ("expression", "literal", "landmarks"):
        assert not FrameDeformer.supports(a_deformation(rig=False, control=control).requires_grad_(False))
    assert not FrameDeformer.supports(a_deformation())


def test_the_image_is_the_training_paths_to_a_fraction_of_a_grey_level():
    deformation, cloud = a_frozen(64, n=2000), a_cloud(2000)
    T = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    T[2, 3] = 5.0
    camera = Camera.pinhole(150.0, 128, 128, T)
    clouds = FrameDeformer(deformation, cloud)(a_frame()), deformation.deform(cloud, a_frame())
    images = [rasterize(moved, camera, torch.zeros(3)).rgb for moved in clouds]
    assert images[0].std() > 0.05
    # Two Gaussians of nearly one depth may change places, and one at alpha's or T's threshold come or go: 1/255 each at
    # most, on few pixels.
    difference = (images[0] - images[1]).abs()
    assert difference.mean() < 1e-5 and difference.quantile(0.999) < 1 / 255
