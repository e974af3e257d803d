"""The fused kernel against its reference, finite differences and scikit-image."""

import pytest
import torch

from helpers.losses import images
from hicode.training.losses.photometric import mouth_weight, photometric, photometric_reference


@pytest.mark.parametrize("size", [(11, 11), (64, 64), (70, 45), (129, 200), (5, 300), (1, 1), (200, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_equals_reference_in_value_and_gradient(size, weighted):
    rendered, target = images(*size)
    weight = torch.rand(*size) * 3 if weighted else None
    x = rendered.clone().requires_grad_()
    loss, parts = photometric(x, target, weight, 0.3)
    loss.backward()
    x64 = rendered.double().requires_grad_()
    expected, expected_parts = photometric_reference(
        x64, target.double(), None if weight is None else weight.double(), 0.3
    )
    expected.backward()
    # float32 moments: E[x²] - E[x]² loses about 1e-7 of 1, against C2 = 9e-4
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    for name in ("l1", "ssim"):
        assert parts[name].item() == pytest.approx(expected_parts[name].item(), abs=1e-4)
        assert not parts[name].requires_grad
    # where both images are flat the same cancellation is divided by C2; textured images give 1e-7
    error = (x.grad - x64.grad).norm() / x64.grad.norm()
    assert error < 1e-3, error


def test_gradient_of_a_textured_image_is_exact_to_rounding():
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(90, 77, 3, generator=g).requires_grad_(), torch.rand(90, 77, 3, generator=g)
    photometric(x, y)[0].backward()
    x64 = x.detach().double().requires_grad_()
    photometric_reference(x64, y.double())[0].backward()
    assert (x.grad - x64.grad).norm() / x64.grad.norm() < 2e-6


def test_reference_gradient_is_the_finite_difference():
    g = torch.Generator().manual_seed(2)
    x, y = (
        torch.rand(9, 13, 3, dtype=torch.float64, generator=g).requires_grad_(),
        torch.rand(9, 13, 3, dtype=torch.float64, generator=g),
    )
    weight = torch.rand(9, 13, dtype=torch.float64, generator=g)
    assert torch.autograd.gradcheck(lambda a: photometric_reference(a, y, weight)[0], (x,), eps=1e-6, atol=1e-7)


def test_kernel_reads_views_in_place():
    """Crops of planar memory give what contiguous copies give, and the gradient lands where the crop was."""
    planar, target = torch.rand(3, 80, 90).requires_grad_(), torch.rand(3, 80, 90)
    view, expected = planar.permute(1, 2, 0)[10:70, 5:77], target.permute(1, 2, 0)[10:70, 5:77]
    loss = photometric(view, expected)[0]
    loss.backward()
    copy = view.detach().contiguous().requires_grad_()
    copied = photometric(copy, expected.contiguous())[0]
    copied.backward()
    assert loss.item() == copied.item()
    assert torch.equal(planar.grad[:, 10:70, 5:77].permute(1, 2, 0), copy.grad)
    assert planar.grad.count_nonzero() == copy.grad.count_nonzero()


def test_threads_do_not_change_a_bit():
    rendered, target = images(200, 130)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x = rendered.clone().requires_grad_()
            loss = photometric(x, target)[0]
            loss.backward()
            results.append((loss.item(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


def test_equal_images_have_no_loss_and_no_gradient():
    x = images(60, 60)[1].clone().requires_grad_()
    loss, parts = photometric(x, x.detach())
    loss.backward()
    assert parts["l1"] == 0 and parts["ssim"].item() == pytest.approx(1, abs=1e-6)
    assert x.grad.abs().max() < 1e-7  # rounding of a maximum; a wrong pixel's gradient is about 1e-4 here


def test_nan_in_gives_nan_out():
    rendered, target = images(40, 40)
    rendered = rendered.clone()
    rendered[20, 20, 1] = float("nan")
    assert torch.isnan(photometric(rendered, target)[0])


def test_ssim_agrees_with_scikit_image_where_borders_are_alike():
    """Ours is zero-padded, theirs reflects and cuts 5 px off: with zeros 11 px wide around both images, the full maps'
    means are one number."""
    from skimage.metrics import structural_similarity

    x, y = torch.zeros(82, 82, 3), torch.zeros(82, 82, 3)
    x[11:71, 11:71], y[11:71, 11:71] = images(60, 60)
    options = {"channel_axis": 2, "data_range": 1, "gaussian_weights": True, "sigma": 1.5}
    options |= {"use_sample_covariance": False, "full": True}
    assert photometric(x, y)[1]["ssim"].item() == pytest.approx(
        structural_similarity(x.numpy(), y.numpy(), **options)[1].mean(), abs=1e-5
    )


def test_mouth_weight_adds_the_boxs_own_mean():
    rendered, target = images(64, 64)
    box = (20, 30, 44, 50)
    weight = mouth_weight(64, 64, box, 0.4)
    with_mouth = photometric(rendered, target, weight)[1]["l1"]
    error = (rendered - target).abs()
    assert with_mouth.item() == pytest.approx((error.mean() + 0.4 * error[30:50, 20:44].mean()).item(), rel=1e-5)
    assert mouth_weight(512, 512, (0, 0, 4, 4), 0.4).max() == 8
