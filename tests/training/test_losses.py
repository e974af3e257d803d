"""The training losses: the fused kernel against torch and finite differences, Wing, VGG, the NaN guard."""

import numpy as np
import pytest
import torch

from hicode.errors import TrainingError
from hicode.training import losses
from hicode.training.losses import (
    HeadLoss,
    LossWeights,
    PerceptualLoss,
    WingLandmarks,
    check_finite,
    crop_around,
    depth_spread,
    mouth_weight,
    photometric,
    photometric_reference,
    random_crop,
    wing,
)


def images(h, w, seed=0, noise=0.2):
    """A smooth pair, planar in memory as the rasteriser returns it, with areas that agree exactly."""
    g = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6, generator=g), (h, w), mode="bicubic").clamp(0, 1)[0]
    rendered = (target + noise * torch.randn(3, h, w, generator=g)).clamp(-0.2, 1.2)
    rendered[:, : h // 4] = target[:, : h // 4]
    return rendered.permute(1, 2, 0), target.permute(1, 2, 0)


@pytest.mark.parametrize("size", [(11, 11), (64, 64), (70, 45), (129, 200), (5, 300), (1, 1), (200, 7)])
@pytest.mark.parametrize("weighted", [False, True])
def test_kernel_equals_reference_in_value_and_gradient(size, weighted):
    rendered, target = images(*size)
    weight = torch.rand(*size) * 3 if weighted else None
    x = rendered.clone().requires_grad_()
    loss, parts = photometric(x, target, weight, 0.3)
    loss.backward()
    x64 = rendered.double().requires_grad_()
    wanted, wanted_parts = photometric_reference(x64, target.double(), None if weight is None else weight.double(), 0.3)
    wanted.backward()
    # float32 moments: E[x²] - E[x]² loses about 1e-7 of 1, against C2 = 9e-4
    assert loss.item() == pytest.approx(wanted.item(), abs=2e-5)
    for name in ("l1", "ssim"):
        assert parts[name].item() == pytest.approx(wanted_parts[name].item(), abs=1e-4)
        assert not parts[name].requires_grad
    error = (x.grad - x64.grad).norm() / x64.grad.norm()
    assert error < 1e-3, (
        error
    )  # where both images are flat the same cancellation is divided by C2; textured images give 1e-7


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
    view, wanted = planar.permute(1, 2, 0)[10:70, 5:77], target.permute(1, 2, 0)[10:70, 5:77]
    loss = photometric(view, wanted)[0]
    loss.backward()
    copy = view.detach().contiguous().requires_grad_()
    copied = photometric(copy, wanted.contiguous())[0]
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
    assert mouth_weight(512, 512, (0, 0, 4, 4)).max() == 8


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


class _FakeLandmarker:
    """478 points that follow the image's mean brightness: differentiable, and known."""

    def __init__(self, presence=1.0):
        self.presence = presence

    def landmarks(self, images, rois):
        assert rois.shape == (1, 4)
        level = images.mean()
        return (100 + 10 * level).expand(1, 478, 3), torch.full((1,), self.presence)


def test_wing_landmarks_take_gradient_through_the_network():
    rendered, target = torch.full((16, 16, 3), 0.5).requires_grad_(), torch.full((16, 16, 3), 0.8).requires_grad_()
    where = torch.linspace(2, 14, 478)[:, None].repeat(1, 2)
    loss = WingLandmarks(_FakeLandmarker())(rendered, target, where)
    loss.backward()
    assert loss.item() == pytest.approx(2 * wing(torch.tensor(3.0)).item(), rel=1e-5)
    assert rendered.grad.abs().sum() > 0 and target.grad is None
    assert WingLandmarks(_FakeLandmarker())(target, target, where) == 0
    assert WingLandmarks(_FakeLandmarker(presence=0.0))(rendered, target, where) == 0


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
    where = torch.from_numpy(detect([frame], landmarker, looks=1)[0, :, :2])
    target = torch.from_numpy(frame).float() / 255
    term = WingLandmarks(landmarker)
    values = [term(target.roll(shift, 0), target, where).item() for shift in (0, 2, 6)]
    assert values[0] == 0
    # a shift of s px down moves every landmark by about s: wing(2) = 6.9, wing(6) = 13.9
    assert 4 < values[1] < 11 and 10 < values[2] < 19
    moved = target.roll(3, 0).contiguous().requires_grad_()
    term(moved, target, where).backward()
    assert torch.isfinite(moved.grad).all() and moved.grad.abs().max() > 0


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
        ("avx512f avx512_bf16", torch.bfloat16),
        ("avx2 avx512f", torch.float32),
        (None, torch.float32),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it(flags, expected, monkeypatch):
    def cpuinfo(path):
        if flags is None:
            raise FileNotFoundError(path)  # no Linux
        return f"flags : {flags}"

    monkeypatch.setattr(losses.Path, "read_text", cpuinfo)
    assert losses.fast_dtype.__wrapped__() is expected


def test_bfloat16_features_say_nearly_the_same(cheap_vgg):
    rendered, target = images(32, 32)
    other = PerceptualLoss("cheap", dtype=torch.bfloat16)
    # 8 bits of mantissa: 1/256 a layer
    assert other(rendered, target).item() == pytest.approx(cheap_vgg(rendered, target).item(), rel=0.02)


def test_head_loss_is_the_weighted_sum_of_its_parts(cheap_vgg):
    rendered, target = images(64, 64)
    weights = LossWeights(l1=0.7, ssim=0.4, vgg=0.05, wing=0.01, mouth=0.5)
    crop, mouth = (0, 0, 32, 32), (20, 20, 52, 52)
    landmarks_px = torch.full((478, 2), 102.0)
    loss, parts = HeadLoss(weights, cheap_vgg, WingLandmarks(_FakeLandmarker()))(
        rendered, target, mouth, crop, mouth, landmarks_px
    )
    wanted = (
        0.7 * parts["l1"]
        + 0.4 * (1 - parts["ssim"])
        + 0.05 * (parts["vgg"] + 0.5 * parts["vgg_mouth"])
        + 0.01 * parts["wing"]
    )
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert set(HeadLoss(weights)(rendered, target, mouth, crop, mouth, landmarks_px)[1]) == {"l1", "ssim"}


def layers(distances, opacity=0.6, size=24):
    """Flat Gaussians that fill the picture, one layer a distance (dm) along the axis of a camera that looks at them."""
    from hicode.camera import Camera
    from hicode.gaussians import Gaussians

    n = len(distances)
    camera = Camera(torch.tensor([[30.0, 0, size / 2], [0, 30, size / 2], [0, 0, 1]]), torch.eye(4), size, size)
    means = torch.stack([torch.zeros(n), torch.zeros(n), torch.tensor(distances)], 1).requires_grad_()
    flat = torch.tensor([3.0, 3.0, 1e-3]).log().expand(n, 3)
    quats = torch.tensor([1.0, 0, 0, 0]).expand(n, 4)
    return Gaussians(means, flat, quats, torch.full((n,), opacity).logit(), torch.rand(n, 3)), camera


def test_depth_spread_is_the_variance_of_depth_along_a_ray():
    cloud, camera = layers([5.0, 5.04])
    weight = torch.tensor([0.6, 0.4 * 0.6])  # the second behind the first
    share = weight / weight.sum()
    z = torch.tensor([0.0, 0.04])
    variance = float(weight.sum() * ((share * z * z).sum() - (share * z).sum() ** 2))
    spread = depth_spread(cloud, camera)
    assert spread.item() == pytest.approx(variance / (1 + variance / 0.01), rel=0.05)
    spread.backward()
    near, far = cloud.means.grad[:, 2]
    assert near < 0 < far  # descending draws them together


def test_a_surface_has_no_depth_spread():
    cloud, camera = layers([5.0, 5.0, 5.0])
    assert depth_spread(cloud, camera).item() < 1e-8


def test_crops_stay_inside_and_repeat_with_the_generator():
    assert crop_around((2, 500), 128, 512, 512) == (0, 384, 128, 512)
    assert crop_around((5, 5), 128, 60, 100) == (0, 0, 100, 60)
    mask = np.zeros((512, 512), np.uint8)
    mask[200:300, 100:180] = 255
    boxes = [random_crop(mask, 64, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert boxes[0] == boxes[1] != boxes[2]
    x0, y0, x1, y1 = boxes[0]
    assert 100 <= (x0 + x1) / 2 <= 184 and 200 <= (y0 + y1) / 2 <= 304
    assert random_crop(np.zeros((64, 64), np.uint8), 32, torch.Generator().manual_seed(0)) == (20, 20, 52, 52)


def test_the_nan_guard_names_step_term_and_tensor():
    means = torch.zeros(3, requires_grad=True)
    check_finite(
        1, {"l1": torch.tensor(0.3)}, {"means": torch.tensor([float("nan")])}
    )  # terms first: nothing is wrong yet
    means.grad = torch.tensor([0.0, float("inf"), 0.0])
    with pytest.raises(TrainingError, match=r"Step 12: loss term 'vgg' is nan .*quats, gradient of means"):
        check_finite(
            12,
            {"l1": torch.tensor(0.1), "vgg": torch.tensor(float("nan"))},
            {"means": means, "quats": torch.tensor([float("nan")])},
        )
