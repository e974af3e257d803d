"""The deformation at speaking time equals the deformation that training uses; so does the frame made of it."""

from dataclasses import replace

import pytest
import torch

from helpers.deformations import G, a_deformation, a_head, signals
from hicode.avatar.compositor import Compositor
from hicode.avatar.deformation import Binding
from hicode.avatar.fast import SCORE_MAX, FrameDeformer
from hicode.camera import Camera
from hicode.gaussians import Gaussians
from hicode.geometry import rotation_from_axis_angle
from hicode.render import rasterize


def a_cloud(n=300):
    return Gaussians(
        a_head(n), -3 + 0.3 * torch.randn(n, 3, generator=G(7)), torch.randn(n, 4, generator=G(8)),
        torch.randn(n, generator=G(9)), torch.rand(n, 3, generator=G(10)),
    )  # fmt: skip


def a_frozen(anchors=0, base="mesh", n=300, sharpness=1.0, **options):
    """A deformation with weights everywhere, as training leaves it, of the cloud of the same size."""
    deformation = a_deformation(base=base, anchors=anchors, **options)
    with torch.no_grad():
        deformation.control.style.weight.normal_(std=0.1, generator=G(11))
        deformation.control.query[-1].weight.mul_(sharpness)
        deformation.control.landmark_code.mul_(3)
    if base == "mesh":
        deformation.binding = Binding(
            torch.randint(0, 12, (n, 3), generator=G(12)), torch.rand(n, 3, generator=G(13)) * 0.3,
            torch.randint(0, 478, (n, 8), generator=G(14)), torch.rand(n, 8, generator=G(15)) * 0.1,
        )  # fmt: skip
    deformation.place_anchors(a_cloud(n).means)
    return deformation.eval().requires_grad_(False)


def a_turn(seed=3):
    return rotation_from_axis_angle(0.3 * torch.randn(3, generator=G(seed + 30)))


def reference(deformation, cloud, expression, landmarks, turn=None):
    with torch.no_grad():
        return deformation.moved(cloud, expression, landmarks, turn=turn)


# Float32 sums of 478 terms in another order: 1e-6 relative each, through four layers whose outputs are of order 1.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.mark.parametrize("attention", ["nearness", "learned"])
@pytest.mark.parametrize("base, shade", [("mesh", True), ("none", True), ("mesh", False)])
@pytest.mark.parametrize("anchors, n", [(0, 300), (0, 257), (64, 300), (300, 300), (260, 2500)])
def test_it_equals_the_deformation_of_training(base, shade, anchors, n, attention):
    reaches = {"nearness": (0.05, 0.15), "learned": (0.15,)}[attention]
    deformation, cloud = (
        a_frozen(anchors, base, n, shade=shade, attention=attention, attention_reaches=reaches),
        a_cloud(n),
    )
    deformer = FrameDeformer(deformation, cloud)
    for seed in (3, 20, 3):  # again at the end: nothing of one frame stays in the next
        signal = *signals(seed), a_turn(seed)
        expected, got = reference(deformation, cloud, *signal), deformer(*signal)
        assert (expected.means - cloud.means).abs().max() > 0.01, "nothing moves, so nothing is compared"
        assert bool((expected.colors != cloud.colors).any()) == shade
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(getattr(got, name), tensor, **CLOSE)


def test_colours_of_their_own_turn_as_in_training():
    cloud = a_cloud()
    turning = replace(cloud, turn_colors=0.1 * torch.randn(len(cloud), 3, 3, generator=G(50)))
    deformation, signal = a_frozen(), (*signals(), a_turn())
    got, expected = FrameDeformer(deformation, turning)(*signal).colors, reference(deformation, turning, *signal).colors
    torch.testing.assert_close(got, expected, **CLOSE)
    torch.testing.assert_close(
        got - FrameDeformer(deformation, cloud)(*signal).colors,
        torch.einsum("nct,t->nc", turning.turn_colors, deformation.control.turned(signal[2])), **CLOSE,
    )  # fmt: skip
    assert (expected - reference(deformation, cloud, *signal).colors).abs().max() > 0.01
    assert torch.equal(
        FrameDeformer(deformation, turning)(*signals()).colors, FrameDeformer(deformation, cloud)(*signals()).colors
    )  # no turn is known


def test_attention_may_be_as_sharp_as_it_likes():
    """Scores far beyond what float32's exponential holds take the row's maximum out first."""
    deformation, cloud = a_frozen(sharpness=5e3, attention="learned", attention_reaches=(0.15,)), a_cloud()
    deformer = FrameDeformer(deformation, cloud)
    assert deformer._query_norm > 10 * SCORE_MAX
    got, expected = deformer(*signals()), reference(deformation, cloud, *signals())
    torch.testing.assert_close(got.means, expected.means, **CLOSE)


def test_it_does_not_depend_on_the_number_of_threads():
    deformation, cloud = a_frozen(64), a_cloud()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(FrameDeformer(deformation, cloud)(*signals()))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0].means, results[1].means, **CLOSE)


def test_ablations_and_what_still_trains_are_left_to_the_deformation_itself():
    assert FrameDeformer.supports(a_frozen())
    for options in ({"fine": "none"}, {"coarse": "literal"}, {"coarse": "none"}):
        assert not FrameDeformer.supports(a_deformation(base="none", **options).requires_grad_(False))
    assert not FrameDeformer.supports(a_deformation())


def test_the_image_is_the_training_paths_to_a_fraction_of_a_grey_level():
    deformation, cloud = a_frozen(64, n=2000), a_cloud(2000)
    T = torch.diag(torch.tensor([1.0, -1, -1, 1]))
    T[2, 3] = 5.0
    camera = Camera.pinhole(150.0, 128, 128, T)
    images = [
        rasterize(moved, camera, torch.zeros(3)).rgb
        for moved in (FrameDeformer(deformation, cloud)(*signals()), reference(deformation, cloud, *signals()))
    ]
    assert images[0].std() > 0.05
    # Two Gaussians of nearly one depth may change places, and one at alpha's or T's threshold come or go: 1/255 each at most, on few pixels.
    difference = (images[0] - images[1]).abs()
    assert difference.mean() < 1e-5 and difference.quantile(0.999) < 1 / 255


def test_packed_convolutions_equal_torchs_own():
    torch.manual_seed(0)
    plain = Compositor()
    torch.nn.init.normal_(plain.out.weight, std=0.02)
    x = torch.rand(1, 11, 100, 84)
    with torch.inference_mode():
        expected = plain(x)
        packed = plain.for_inference()
        if packed._packed is None:
            pytest.skip("this torch has no fused convolutions")
        assert expected.std() > 1e-3
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)  # another order of the same sums
