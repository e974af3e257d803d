"""L_VGG and its crops."""

import numpy as np
import pytest
import torch

from helpers.losses import images
from hicode.training.losses import perceptual
from hicode.training.losses.perceptual import PerceptualLoss, crop_around, random_crop


@pytest.fixture(scope="module")
def cheap_vgg():
    from hicode import assets

    if not assets.is_cached("perceptual"):
        pytest.skip("the asset `perceptual` is not in the cache: `hicode assets pull perceptual`")
    return PerceptualLoss("cheap", dtype=torch.float32)


def test_perceptual_loss_pulls_the_rendering_towards_the_target(cheap_vgg):
    rendered, target = (v.contiguous() for v in images(48, 48))
    rendered.requires_grad_()
    box = (4, 8, 36, 40)
    assert cheap_vgg(target, target, box) == 0
    loss = cheap_vgg(rendered, target, box)
    loss.backward()
    outside = rendered.grad.clone()
    outside[8:40, 4:36] = 0
    assert outside.abs().sum() == 0
    stepped = (rendered - 0.02 * rendered.grad / rendered.grad.abs().max()).detach()
    assert cheap_vgg(stepped, target, box) < loss
    assert target.grad is None


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("avx512f amx_bf16 amx_tile", torch.bfloat16),
        ("avx512f avx512_bf16\nvendor_id : AuthenticAMD", torch.bfloat16),
        ("avx512f avx512_bf16\nvendor_id : GenuineIntel", torch.float32),
        ("avx2 avx512f", torch.float32),
        (None, torch.float32),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it_faster(flags, expected, monkeypatch):
    def cpuinfo(path):
        if flags is None:
            raise FileNotFoundError(path)  # no Linux
        return f"flags : {flags}"

    monkeypatch.setattr(perceptual.Path, "read_text", cpuinfo)
    assert perceptual.fast_dtype.__wrapped__() is expected


def test_bfloat16_features_say_nearly_the_same(cheap_vgg):
    rendered, target = images(32, 32)
    other = PerceptualLoss("cheap", dtype=torch.bfloat16)
    # 8 bits of mantissa: 1/256 a layer
    assert other(rendered, target).item() == pytest.approx(cheap_vgg(rendered, target).item(), rel=0.02)


def test_crops_stay_inside_and_repeat_with_the_generator():
    assert crop_around((2.0, 500.0), 128, 512, 512) == (0, 384, 128, 512)
    assert crop_around((5.0, 5.0), 128, 60, 100) == (0, 0, 100, 60)
    mask = np.zeros((512, 512), np.uint8)
    mask[200:300, 100:180] = 255
    boxes = [random_crop(mask, 64, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert boxes[0] == boxes[1] != boxes[2]
    x0, y0, x1, y1 = boxes[0]
    assert 100 <= (x0 + x1) / 2 <= 184 and 200 <= (y0 + y1) / 2 <= 304
    assert random_crop(np.zeros((64, 64), np.uint8), 32, torch.Generator().manual_seed(0)) == (20, 20, 52, 52)
