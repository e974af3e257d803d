"""The Wing loss, and its gradient through a landmark network."""

import numpy as np
import pytest
import torch

from helpers.losses import BrightnessLandmarker
from hicode.training.losses.landmark import WingLandmarks, wing


def test_wing_joins_smoothly_and_is_steep_at_small_errors():
    x = torch.tensor([0.0, 10 - 1e-4, 10 + 1e-4, -25.0], dtype=torch.float64, requires_grad=True)
    y = wing(x)
    assert y[0] == 0
    assert y[1].item() == pytest.approx(y[2].item(), abs=1e-3)
    assert y[3].item() == pytest.approx(25 - (10 - 10 * np.log(6)))
    y.sum().backward()
    assert x.grad[3] == -1
    small = torch.tensor([0.1], requires_grad=True)
    wing(small).backward()
    assert small.grad.item() == pytest.approx(10 / 2.1, rel=1e-5)


def test_wing_landmarks_take_gradient_through_the_network():
    rendered, target = torch.full((16, 16, 3), 0.5).requires_grad_(), torch.full((16, 16, 3), 0.8).requires_grad_()
    where = torch.linspace(2, 14, 478)[:, None].repeat(1, 2)
    loss = WingLandmarks(BrightnessLandmarker())(rendered, target, where)
    loss.backward()
    assert loss.item() == pytest.approx(2 * wing(torch.tensor(3.0)).item(), rel=1e-5)
    assert rendered.grad.abs().sum() > 0 and target.grad is None
    assert WingLandmarks(BrightnessLandmarker())(target, target, where) == 0
    assert WingLandmarks(BrightnessLandmarker(presence=0.0))(rendered, target, where) == 0


@pytest.mark.clip
def test_wing_through_the_real_network_follows_a_displaced_face(markey):
    av = pytest.importorskip("av")
    from hicode import assets

    if not (assets.is_cached("face_landmarks") and assets.is_cached("face_detection")):
        pytest.skip("the face networks are not in the cache: `hicode assets pull face_landmarks face_detection`")
    from hicode.evaluation.lips import detect
    from hicode.tracking.landmarks import FaceLandmarker

    with av.open(str(markey)) as video:
        frame = next(video.decode(video=0)).to_ndarray(format="rgb24")
    landmarker = FaceLandmarker().requires_grad_(False)
    where = torch.from_numpy(detect([frame], landmarker, samples=1)[0, :, :2])
    target = torch.from_numpy(frame).float() / 255
    term = WingLandmarks(landmarker)
    values = [term(target.roll(shift, 0), target, where).item() for shift in (0, 2, 6)]
    assert values[0] == 0
    # a shift of s px down moves every landmark by about s: wing(2) = 6.9, wing(6) = 13.9
    assert 4 < values[1] < 11 and 10 < values[2] < 19
    moved = target.roll(3, 0).contiguous().requires_grad_()
    term(moved, target, where).backward()
    assert torch.isfinite(moved.grad).all() and moved.grad.abs().max() > 0
