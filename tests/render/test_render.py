"""The rasterisers: one contract over every backend that this machine has, and what is particular to one of them."""

import math
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from helpers.scenes import cloud, head_camera, stand_in
from hicode.camera import Camera
from hicode.errors import InputError
from hicode.gaussians import Gaussians
from hicode.render import RasterStats, rasterize

BACKENDS = ["reference", "cpu"]
if torch.cuda.is_available() and find_spec("gsplat"):
    BACKENDS.append("cuda")
TENSORS = ["means", "log_scales", "quats", "opacity_logits", "colors"]


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def smooth_scene(dtype=torch.float64) -> tuple[Gaussians, Camera]:
    """Few Gaussians, wide and half transparent, so that no pixel meets a threshold and finite differences hold."""
    g = cloud(6, seed=3, log_scale=0.3, dtype=dtype)
    g = replace(
        g, log_scales=0.3 + 0.2 * (g.log_scales - 0.3), means=0.5 * g.means, opacity_logits=0.3 * g.opacity_logits - 0.4
    )
    return g, head_camera(20, 14, dtype=dtype)


def render(gaussians, camera, background=(0.25, 0.5, 1.0), backend="cpu", stats=None):
    device = "cuda" if backend == "cuda" else "cpu"
    dtype = torch.float64 if backend == "reference" else torch.float32
    g = gaussians.map(lambda t: t.to(device, dtype))
    return rasterize(g, camera, torch.as_tensor(background, dtype=torch.float32), backend=backend, stats=stats)


def gradients(gaussians, camera, rgb_grad, alpha_grad, backend, stats=None) -> dict[str, torch.Tensor]:
    """Of <rgb, rgb_grad> + <alpha, alpha_grad> to the five tensors, the pose and the background."""
    leaves = gaussians.map(lambda t: t.detach().clone().requires_grad_())
    pose = camera.T_camera_head.detach().clone().requires_grad_()
    background = torch.tensor([0.25, 0.5, 1.0], dtype=pose.dtype, requires_grad=True)
    device = "cuda" if backend == "cuda" else "cpu"
    dtype = torch.float64 if backend == "reference" else torch.float32
    out = rasterize(
        leaves.map(lambda t: t.to(device, dtype)), camera.with_pose(pose), background, backend=backend, stats=stats
    )
    loss = (out.rgb * rgb_grad.to(out.rgb)).sum() + (out.alpha * alpha_grad.to(out.rgb)).sum()
    loss.backward()
    return {k: v.grad.double() for k, v in leaves.tensors().items()} | {
        "pose": pose.grad.double(),
        "background": background.grad.double(),
    }


def upstream(camera: Camera, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    r = torch.Generator().manual_seed(seed)
    return torch.randn(camera.height, camera.width, 3, generator=r), torch.randn(
        camera.height, camera.width, generator=r
    )


def brute_force(gaussians: Gaussians, camera: Camera, background) -> tuple[np.ndarray, np.ndarray]:
    """Eqs 3-6 a pixel at a time in float64, written from the equations with numpy's own inverse: shares nothing with
    the package.
    """
    means, log_scales, quats, logits, colors = (v.double().numpy() for v in gaussians.tensors().values())
    K, T = camera.K.double().numpy(), camera.T_camera_head.double().numpy()
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    w, h = camera.width, camera.height
    splats = []
    for m, ls, (qw, qx, qy, qz), logit, color in zip(means, log_scales, quats, logits, colors, strict=True):
        x, y, z = T[:3, :3] @ m + T[:3, 3]
        if z < 0.01:
            continue
        q = np.array([[0, -qz, qy], [qz, 0, -qx], [-qy, qx, 0]]) / np.sqrt(qw**2 + qx**2 + qy**2 + qz**2)
        R = np.eye(3) + 2 * qw / np.sqrt(qw**2 + qx**2 + qy**2 + qz**2) * q + 2 * q @ q
        Sigma = R @ np.diag(np.exp(2 * ls)) @ R.T
        jx = np.clip(x / z, -(cx + 0.15 * w) / fx, (w - cx + 0.15 * w) / fx)
        jy = np.clip(y / z, -(cy + 0.15 * h) / fy, (h - cy + 0.15 * h) / fy)
        JV = np.array([[fx / z, 0, -fx * jx / z], [0, fy / z, -fy * jy / z]]) @ T[:3, :3]
        inverse = np.linalg.inv(JV @ Sigma @ JV.T + 0.3 * np.eye(2))
        splats.append((z, np.array([fx * x / z + cx, fy * y / z + cy]), inverse, 1 / (1 + np.exp(-logit)), color))
    splats.sort(key=lambda s: s[0])
    rgb, alpha = np.empty((h, w, 3)), np.empty((h, w))
    for i in range(h):
        for j in range(w):
            left, pixel = 1.0, np.zeros(3)
            for _, mean, inverse, opacity, color in splats:
                d = np.array([j + 0.5, i + 0.5]) - mean
                a = min(opacity * np.exp(-0.5 * d @ inverse @ d), 0.99)
                if a < 1 / 255:
                    continue
                if left * (1 - a) <= 1e-4:
                    break
                pixel += a * left * color
                left *= 1 - a
            rgb[i, j], alpha[i, j] = pixel + left * np.asarray(background), 1 - left
    return rgb, alpha


# The contract


def test_the_image_equals_a_brute_force_in_float64(backend):
    g, camera = cloud(60), head_camera(37, 26)
    rgb, alpha = brute_force(g, camera, (0.25, 0.5, 1.0))
    out = render(g, camera, backend=backend)
    # float32 rounding; a pixel that sits on the 1/255 threshold may fall on its other side, which moves it by up to
    # 1/255
    tolerance = 1e-9 if backend == "reference" else 5e-6
    error = np.abs(out.rgb.cpu().double().numpy() - rgb).max(-1)
    assert np.quantile(error, 0.995) < tolerance and error.max() < 1 / 255
    assert np.quantile(np.abs(out.alpha.cpu().double().numpy() - alpha), 0.995) < tolerance


def test_gradients_equal_finite_differences(backend):
    g, camera = smooth_scene()
    rgb_grad, alpha_grad = (x.double() for x in upstream(camera))

    def loss(gaussians, pose) -> float:
        rgb, alpha = brute_force(gaussians, camera.with_pose(pose), (0.25, 0.5, 1.0))
        return float((rgb * rgb_grad.numpy()).sum() + (alpha * alpha_grad.numpy()).sum())

    found = gradients(g, camera, rgb_grad, alpha_grad, backend)
    step = 1e-4  # central differences: truncation about step^2, rounding about 1e-16 / step
    r = np.random.default_rng(0)
    for name, value in {**g.tensors(), "pose": camera.T_camera_head[:3]}.items():
        scale = float(found[name].abs().max())
        for k in r.choice(value.numel(), min(value.numel(), 6), replace=False):
            losses = []
            for sign in (1, -1):
                moved = value.clone()
                moved.view(-1)[k] += sign * step
                if name == "pose":
                    losses.append(loss(g, torch.cat([moved, camera.T_camera_head[3:]])))
                else:
                    losses.append(loss(replace(g, **{name: moved}), camera.T_camera_head))
            expected = (losses[0] - losses[1]) / (2 * step)
            assert float(found[name].reshape(-1)[k]) == pytest.approx(expected, abs=2e-5 * scale, rel=1e-4), (
                f"{name}[{k}]"
            )


def test_an_isotropic_gaussian_on_the_axis_is_a_round_spot(backend):
    """Sigma' = ((f s / z)^2 + 0.3) I: alpha at distance r is opacity exp(-r^2 / 2 / that)."""
    focal, distance, scale, opacity = 40.0, 4.0, 0.3, 0.7
    T = torch.eye(4)
    T[2, 3] = distance
    camera = Camera.pinhole(focal, 32, 24, T)
    g = Gaussians(
        torch.zeros(1, 3),
        torch.full((1, 3), math.log(scale)),
        torch.tensor([[2.0, 0, 0, 0]]),
        torch.logit(torch.tensor([opacity])),
        torch.tensor([[1.0, 0.5, 0.25]]),
    )
    out = render(g, camera, (0, 0, 0), backend)
    rows, columns = torch.meshgrid(torch.arange(24) + 0.5 - 12, torch.arange(32) + 0.5 - 16, indexing="ij")
    variance = (focal * scale / distance) ** 2 + 0.3
    expected = opacity * torch.exp(-(rows**2 + columns**2) / (2 * variance))
    expected = torch.where(expected >= 1 / 255, expected, 0)
    torch.testing.assert_close(out.alpha.cpu().float(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.rgb.cpu().float(), expected[..., None] * g.colors, atol=1e-5, rtol=0)


def layers(opacities, colors, backend, background=(0.0, 0.0, 1.0)):
    """Sheets so wide that alpha is constant over the image, one behind the other, given back to front."""
    n = len(opacities)
    T = torch.eye(4)
    T[2, 3] = 5
    camera = Camera.pinhole(30.0, 9, 7, T)
    means = torch.zeros(n, 3)
    means[:, 2] = torch.arange(n).flip(0).float() * 0.1
    log_scales = torch.full((n, 3), 4.0)
    log_scales[:, 2] = -9
    g = Gaussians(
        means,
        log_scales,
        torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        torch.logit(torch.tensor(opacities)),
        torch.tensor(colors),
    )
    return render(replace(g, means=g.means), camera, background, backend)


def test_two_layers_blend_front_over_back(backend):
    """The second is nearer: a2 c2 + (1 - a2) a1 c1 + (1 - a1)(1 - a2) background."""
    out = layers([0.6, 0.5], [[1.0, 0, 0], [0, 1.0, 0]], backend)
    # the sheets are not quite flat
    torch.testing.assert_close(out.rgb[3, 4].cpu().float(), torch.tensor([0.3, 0.5, 0.2]), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.alpha[3, 4].cpu().float(), torch.tensor(0.8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])  # gsplat's limit on alpha differs between versions
def test_alpha_is_clipped_and_a_finished_pixel_takes_no_more(backend):
    """Opacity 1 blends as 0.99. T would be .01, 5e-4, then 5e-6: the third layer is left out, and so is the weak one
    behind it.
    """
    out = layers([0.5, 0.99, 0.95, 1 - 1e-7], [[1.0, 1, 1], [0, 1.0, 0], [0, 0, 0], [1.0, 0, 0]], backend)
    torch.testing.assert_close(out.rgb[3, 4].cpu().float(), torch.tensor([0.99, 0.0, 5e-4]), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.alpha[3, 4].cpu().float(), torch.tensor(1 - 5e-4), atol=3e-5, rtol=0)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 1000])
def test_any_number_of_gaussians(backend, n):
    g, camera = cloud(n, seed=n), head_camera(33, 21)
    stats = RasterStats()
    out = render(g, camera, backend=backend, stats=stats)
    assert out.rgb.shape == (21, 33, 3) and out.alpha.shape == (21, 33) and stats.radii_px.shape == (n,)
    found = gradients(g, camera, *upstream(camera), backend)
    assert all(bool(v.isfinite().all()) for v in found.values())
    if n == 0:
        assert bool((out.alpha == 0).all())
        torch.testing.assert_close(out.rgb.cpu().float(), torch.tensor([0.25, 0.5, 1.0]).expand(21, 33, 3))
    elif n < 100:
        rgb, _ = brute_force(g, camera, (0.25, 0.5, 1.0))
        error = np.abs(out.rgb.cpu().double().numpy() - rgb).max(-1)
        assert np.quantile(error, 0.99) < 5e-6 and error.max() < 1 / 255


@pytest.mark.parametrize(("width", "height"), [(1, 1), (3, 50), (31, 33), (64, 32), (65, 4)])
def test_any_size_of_image(backend, width, height):
    g, camera = cloud(40, seed=7), head_camera(width, height, focal_px=40.0)
    out = render(g, camera, backend=backend)
    rgb, _ = brute_force(g, camera, (0.25, 0.5, 1.0))
    assert out.rgb.shape == (height, width, 3)
    error = np.abs(out.rgb.cpu().double().numpy() - rgb).max(-1)
    assert np.quantile(error, 0.99) < 5e-6 and error.max() < 1 / 255


def test_what_is_not_seen_changes_nothing_and_gets_no_gradient(backend):
    """Behind the camera, at its centre, too near, beside the image, too faint: together with one that is seen."""
    camera = Camera.pinhole(40.0, 40, 30)
    means = torch.tensor([[0, 0, 5.0], [0, 0, -5], [0.3, 0.2, 0], [0, 0, 0.009], [50, 0, 5], [0, 0, 4]])
    g = Gaussians(
        means,
        torch.tensor([[-1.0, -1.5, -2]]).repeat(6, 1),
        torch.tensor([[1.0, 0.3, 0, 0]]).repeat(6, 1),
        torch.tensor([1.0, 1, 1, 1, 1, -7]),
        torch.rand(6, 3),
    )
    stats = RasterStats()
    alone = render(g.map(lambda t: t[:1]), camera, backend=backend)
    torch.testing.assert_close(render(g, camera, backend=backend, stats=stats).rgb, alone.rgb, atol=1e-7, rtol=0)
    assert stats.visible.tolist() == [True] + [False] * 5
    for name, grad in gradients(g, camera, *upstream(camera), backend).items():
        if name in TENSORS:
            assert bool(grad[0].abs().sum() > 0) and bool((grad[1:] == 0).all()), name
    nothing = render(g.map(lambda t: t[1:]), camera, backend=backend)
    assert bool((nothing.alpha == 0).all())


def test_a_gaussian_on_the_border_shows_its_inner_half(backend):
    T = torch.eye(4)
    T[2, 3] = 5
    camera = Camera.pinhole(40.0, 40, 40, T)
    g = cloud(1)
    g = replace(
        g,
        means=torch.tensor([[2.5, 0.0, 0.0]]),
        log_scales=torch.full((1, 3), -1.0),
        opacity_logits=torch.tensor([3.0]),
    )  # at x = 40
    out = render(g, camera, backend=backend)
    rgb, _ = brute_force(g, camera, (0.25, 0.5, 1.0))
    assert float(out.alpha[20, 39]) > 0.9
    assert np.abs(out.rgb.cpu().double().numpy() - rgb).max() < 1e-5


@pytest.mark.parametrize("name", [*TENSORS, "K", "T_camera_head", "background"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(backend, name, poison):
    g, camera, background = cloud(5), head_camera(8, 8), torch.ones(3)
    if name in TENSORS:
        value = g.tensors()[name].clone()
        value[3] = poison
        g = replace(g, **{name: value})
    elif name == "background":
        background = torch.tensor([1.0, poison, 1.0])
    else:
        value = getattr(camera, name).clone()
        value[0, 0] = poison
        camera = replace(camera, **{name: value})
    with pytest.raises(InputError, match=rf"{name} holds .* NaN or infinite"):
        render(g, camera, background, backend)


def test_values_whose_sum_overflows_are_not_called_infinite():
    g = cloud(4)
    out = render(replace(g, colors=torch.full((4, 3), 2e38)), head_camera(8, 8), backend="cpu")
    assert out.rgb.shape == (8, 8, 3)


def test_gradients_equal_the_reference_on_a_scene_full_of_thresholds(backend):
    g, camera = cloud(400, seed=5), head_camera(70, 45)
    weights = upstream(camera)
    expected, stats = RasterStats(), RasterStats()
    want = gradients(g, camera, *weights, "reference", expected)
    found = gradients(g, camera, *weights, backend, stats)
    # float32 against float64, relative to the tensor's largest gradient; a pixel that changes sides at a threshold adds
    # its share. gsplat is compiled with fast approximations of exp and division (1.1e-4 on an H100).
    tolerance = 5e-4 if backend == "cuda" else 1e-4
    for name in want:
        assert float((found[name] - want[name]).abs().max()) < tolerance * float(want[name].abs().max()), name
    assert float((stats.grad_means2d.cpu() - expected.grad_means2d).abs().max()) < tolerance * float(
        expected.grad_means2d.abs().max()
    )
    if backend != "cuda":  # gsplat rounds its radii up
        torch.testing.assert_close(stats.radii_px.double(), expected.radii_px.double(), rtol=1e-4, atol=1e-4)


def test_the_order_of_the_gaussians_does_not_matter(backend):
    g, camera = cloud(200, seed=9), head_camera(40, 40)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    a, b = render(g, camera, backend=backend), render(g.map(lambda t: t[shuffle]), camera, backend=backend)
    torch.testing.assert_close(a.rgb, b.rgb, atol=1e-6, rtol=0)


# The CPU kernels


def test_one_and_two_threads_give_the_same_bits():
    g, camera = cloud(5000, seed=2, log_scale=-2.5), head_camera(150, 130)
    weights, before, found = upstream(camera), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = render(g, camera)
            found.append([out.rgb, out.alpha, *gradients(g, camera, *weights, "cpu").values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_renderings_in_flight_do_not_share_memory():
    """Four forwards, then their backwards in another order, give what one after the other gives."""
    camera = head_camera(60, 50)
    scenes = [cloud(100 + 40 * k, seed=k) for k in range(4)]
    rgb_grad, alpha_grad = upstream(camera)
    alone = [gradients(g, camera, rgb_grad, alpha_grad, "cpu") for g in scenes]
    leaves = [g.map(lambda t: t.clone().requires_grad_()) for g in scenes]
    outs = [render(g, camera) for g in leaves]
    for k in (2, 0, 3, 1):
        ((outs[k].rgb * rgb_grad).sum() + (outs[k].alpha * alpha_grad).sum()).backward()
    for g, want in zip(leaves, alone, strict=True):
        for name, tensor in g.tensors().items():
            assert torch.equal(tensor.grad.double(), want[name]), name


def test_a_graph_kept_gives_the_same_gradient_twice():
    g = cloud(50).map(lambda t: t.requires_grad_())
    out = render(g, head_camera(40, 40))
    first = torch.autograd.grad(out.rgb.sum(), g.means, retain_graph=True)[0]
    render(cloud(500), head_camera(40, 40))
    assert torch.equal(first, torch.autograd.grad(out.rgb.sum(), g.means)[0])


@pytest.mark.parametrize("size", [(64, 64), (61, 43)])
def test_gradients_may_come_in_any_memory_layout(size):
    camera = head_camera(*size)
    g = cloud(80).map(lambda t: t.requires_grad_())
    base, _ = upstream(camera)
    layouts = [
        base,
        base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        base.repeat(2, 2, 1)[: size[1], : size[0]],
        base.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    found = []
    for grad in layouts:
        out = render(g, camera)
        found.append(torch.autograd.grad(out.rgb, [g.means, g.colors], grad))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    out = render(g, camera)
    ones = torch.autograd.grad(out.rgb.sum(), g.means, retain_graph=True)[0]  # a gradient with stride 0
    assert torch.equal(ones, torch.autograd.grad(out.rgb, g.means, torch.ones_like(out.rgb))[0])


@pytest.mark.parametrize("width, height", [(20, 14), (75, 97)])
def test_wanted_pixels_are_the_same_bits_without_the_others(width, height):
    g, camera = cloud(300, seed=5).map(torch.Tensor.float), head_camera(width, height)
    wanted = np.random.default_rng(0).random((height, width)) < 0.02
    wanted[: height // 2, : width // 2] = True
    whole, part = (rasterize(g, camera, torch.ones(3), wanted=mask) for mask in (None, wanted))
    assert torch.equal(whole.rgb[wanted], part.rgb[wanted]) and torch.equal(whole.alpha[wanted], part.alpha[wanted])
    assert (part.alpha == 0).sum() > (whole.alpha == 0).sum()


def test_rgb_is_planar_in_memory():
    assert render(cloud(5), head_camera(64, 32)).rgb.permute(2, 0, 1).is_contiguous()


def test_a_scene_of_200000_composes_from_its_front_and_its_back():
    """rgb = front over black + T_front * back, where nothing is dark enough to finish a pixel."""
    g, camera = cloud(200_000, seed=4, log_scale=-4.5), head_camera(96, 96)
    g = replace(g, opacity_logits=g.opacity_logits * 0.1 - 4.0)
    depth = g.means @ camera.T_camera_head[2, :3]
    front, back = (g.map(lambda t, half=half: t[half]) for half in (depth < depth.median(), depth >= depth.median()))
    near, far, whole = render(front, camera, (0, 0, 0)), render(back, camera), render(g, camera)
    torch.testing.assert_close(whole.rgb, near.rgb + (1 - near.alpha)[..., None] * far.rgb, atol=2e-5, rtol=0)
    assert 0.5 < float(whole.alpha.max()) < 1


def test_extreme_but_finite_gaussians_neither_crash_nor_make_nan():
    """Exponents that overflow, a zero quaternion, a mean far away: such Gaussians vanish, their neighbours stay."""
    g, camera = cloud(40), head_camera(40, 30)
    for name, value in (
        ("log_scales", 200.0),
        ("log_scales", -200.0),
        ("means", 1e30),
        ("quats", 0.0),
        ("opacity_logits", 1e4),
        ("opacity_logits", -1e4),
    ):
        tensor = g.tensors()[name].clone()
        tensor[7] = value
        bad = replace(g, **{name: tensor})
        assert bool(render(bad, camera).rgb.isfinite().all()), (name, value)
        others = [i for i in range(40) if i != 7]
        for key, grad in gradients(bad, camera, *upstream(camera), "cpu").items():
            assert bool(grad[others if key in TENSORS else slice(None)].isfinite().all()), (name, value, key)


def test_the_kernels_refuse_other_float_types():
    with pytest.raises(InputError, match=r"float64.*reads float32"):
        rasterize(cloud(3, dtype=torch.float64), head_camera(8, 8), torch.ones(3), backend="cpu")


# Choosing


def test_auto_takes_the_reference_for_float64_and_the_kernels_for_float32():
    camera = head_camera(16, 16)
    assert rasterize(cloud(3, dtype=torch.float64), camera, torch.ones(3)).rgb.dtype == torch.float64
    g = cloud(3)
    assert torch.equal(rasterize(g, camera, torch.ones(3)).rgb, rasterize(g, camera, torch.ones(3), backend="cpu").rgb)


def test_an_unknown_backend_is_refused():
    with pytest.raises(InputError, match="opengl"):
        rasterize(cloud(3), head_camera(8, 8), torch.ones(3), backend="opengl")


def test_importing_the_package_loads_no_backend():
    code = "import sys, hicode.render; assert not {'numba', 'gsplat', 'hicode.render.cpu'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# gsplat's adapter, against a stand-in with gsplat's signature


def test_the_gsplat_adapter_speaks_its_language(monkeypatch):
    module = types.ModuleType("gsplat")
    module.rasterization = stand_in
    monkeypatch.setitem(sys.modules, "gsplat", module)
    g, camera = cloud(100), head_camera(40, 30)
    leaves, ours = g.map(lambda t: t.clone().requires_grad_()), g.map(lambda t: t.clone().requires_grad_())
    pose, our_pose = (camera.T_camera_head.clone().requires_grad_() for _ in range(2))
    stats, our_stats = RasterStats(), RasterStats()
    out = rasterize(
        leaves, camera.with_pose(pose), torch.rand(3, generator=torch.Generator().manual_seed(0)), "cuda", stats
    )
    want = rasterize(
        ours, camera.with_pose(our_pose), torch.rand(3, generator=torch.Generator().manual_seed(0)), "cpu", our_stats
    )
    torch.testing.assert_close(out.rgb, want.rgb, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.alpha, want.alpha, atol=2e-5, rtol=0)
    weights, _ = upstream(camera)
    (out.rgb * weights).sum().backward()
    (want.rgb * weights).sum().backward()
    assert torch.equal(stats.visible, our_stats.visible)
    torch.testing.assert_close(stats.grad_means2d, our_stats.grad_means2d, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(pose.grad, our_pose.grad, atol=1e-2, rtol=1e-3)
    for name, tensor in leaves.tensors().items():
        torch.testing.assert_close(tensor.grad, ours.tensors()[name].grad, atol=1e-3, rtol=1e-3)


def test_a_missing_gsplat_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", None)
    with pytest.raises(InputError, match=r"needs gsplat.*hicode.cuda"):
        rasterize(cloud(3), head_camera(8, 8), torch.ones(3), backend="cuda")
