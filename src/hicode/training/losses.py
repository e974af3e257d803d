"""Losses of the Gaussians' training (Eqs 15-16, and one on their depth).

A rendered face I and its truth are "h w 3" in [0, 1], both over the same background colour; a box is (x0, y0, x1, y1)
in px, the end exclusive.

    L = w_l1 L1 + w_ssim (1 - SSIM) + w_vgg L_vgg + w_wing L_wing        each but the last also on the mouth

Deviation from Eq. 16: its SSIM term, the norm of SSIM(I) - SSIM(I_gt), compares an image with nothing; 1 - SSIM(I,
I_gt) stands for it, as in 3DGS. Deviation from Eq. 16: the mouth has no SSIM term either in the paper; here its weight
in the L1 term is a map of pixel weights, so both terms are one pass over the image.

`photometric` is the fused kernel that training runs; `photometric_reference` says the same in torch, in any float type.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hicode.camera import Camera
from hicode.errors import TrainingError
from hicode.gaussians import Gaussians
from hicode.perceptual import LPIPS_LAYERS, Features
from hicode.render import rasterize
from hicode.threads import run_on_threads, take

if TYPE_CHECKING:
    from hicode.tracking.landmarks import FaceLandmarker

Box = tuple[int, int, int, int]

RADIUS = 5  # of the SSIM window, 11 x 11
SIGMA_PX = 1.5
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a data range of 1
_WINDOW = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA_PX) ** 2)
_WINDOW /= _WINDOW.sum()


@dataclass(frozen=True)
class LossWeights:
    """The λ's of Eqs 15-16, which the paper does not give (PAPER-DECISIONS 21-23)."""

    l1: float = 0.8
    """Mean absolute error over the image."""
    ssim: float = 0.2
    """1 - SSIM over the image; `l1` and `ssim` as 3DGS."""
    vgg: float = 0.03
    """Mean absolute difference of VGG16 features on a crop; sharpens."""
    wing: float = 0.0005
    """Wing loss of 478 landmarks in px: errors of 1 px each way give about 8, so 0.004 here beside an L1 of 0.02. Its
    gradient is rough, so small."""
    mouth: float = 0.4
    """The mouth box's own mean terms, relative to those of the whole image: L1 and VGG."""

    def __post_init__(self):
        for name, value in vars(self).items():
            assert value >= 0, f"loss weight {name} is {value}"


# ---------------------------------------------------------------------------------------------------------- photometric


def photometric_reference(
    rendered: Float[Tensor, "h w 3"],
    target: Float[Tensor, "h w 3"],
    weight: Float[Tensor, "h w"] | None = None,
    ssim_weight: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `photometric` computes, in plain torch, in the input's float type."""
    error = (rendered - target).abs()
    l1 = (error if weight is None else error * weight[..., None]).mean()
    x, y = rendered.permute(2, 0, 1)[:, None], target.permute(2, 0, 1)[:, None]
    window = torch.from_numpy(_WINDOW).to(x)

    def blur(a: Tensor) -> Tensor:
        return F.conv2d(
            F.conv2d(a, window.view(1, 1, -1, 1), padding=(RADIUS, 0)), window.view(1, 1, 1, -1), padding=(0, RADIUS)
        )

    mx, my = blur(x), blur(y)
    variance = blur(x * x) - mx * mx + blur(y * y) - my * my
    covariance = blur(x * y) - mx * my
    ssim = ((2 * mx * my + C1) * (2 * covariance + C2) / ((mx * mx + my * my + C1) * (variance + C2))).mean()
    return (1 - ssim_weight) * l1 + ssim_weight * (1 - ssim), {"l1": l1.detach(), "ssim": ssim.detach()}


def photometric(
    rendered: Float[Tensor, "h w 3"],
    target: Float[Tensor, "h w 3"],
    weight: Float[Tensor, "h w"] | None = None,
    ssim_weight: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(1 - ssim_weight) · mean(weight |I - I_gt|) + ssim_weight · (1 - mean SSIM), and both parts without gradient.

    SSIM is Gaussian-windowed (11 x 11, σ 1.5), zero-padded, per channel, over all pixels; the weights touch the L1 term
    only and are not normalised. One fused pass gives value and gradient (to `rendered`), the same to the bit on any
    number of threads. Best on views of planar memory, "3 h w" permuted, as the rasteriser returns, crops of it too:
    read where they are; others are copied once. Other devices and float types run the torch reference.
    """
    h, w, channels = rendered.shape
    assert channels == 3 and target.shape == rendered.shape, (
        f"rendered {tuple(rendered.shape)}, target {tuple(target.shape)}"
    )
    assert weight is None or weight.shape == (h, w), f"weight {tuple(weight.shape)} for an image of {h} x {w}"
    if rendered.device.type != "cpu" or rendered.dtype != torch.float32:
        return photometric_reference(rendered, target, weight, ssim_weight)
    loss, l1, ssim = _Photometric.apply(
        rendered, target.detach(), None if weight is None else weight.detach(), ssim_weight
    )
    return loss, {"l1": l1, "ssim": ssim}


class _Photometric(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rendered, target, weight, ssim_weight):
        h, w, _ = rendered.shape
        x, x_strides = _planar(rendered)
        y, y_strides = _planar(target)
        gradient = torch.empty(3, h, w)
        weights = np.zeros((0, 0), np.float32) if weight is None else weight.to(torch.float32).contiguous().numpy()
        strips = 3 * ((h + _STRIP - 1) // _STRIP)
        sums = np.zeros((strips, 2))
        arguments = x, x_strides, y, y_strides, weights, h, w, np.float32(ssim_weight), gradient.numpy(), sums
        run_on_threads(_photometric_kernel, strips, *arguments)
        l1, ssim = (float(s) for s in sums.sum(0) / (3.0 * h * w))
        ctx.gradient = gradient.permute(1, 2, 0)
        l1, ssim = torch.tensor(l1), torch.tensor(ssim)
        ctx.mark_non_differentiable(l1, ssim)
        return ((1 - ssim_weight) * l1 + ssim_weight * (1 - ssim)).float(), l1.float(), ssim.float()

    @staticmethod
    def backward(ctx, d_loss, *_):
        return ctx.gradient * d_loss, None, None, None


def _planar(image: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """The image's memory as one flat array from its first element, with (channel, row) strides; copied only where rows
    are not contiguous."""
    image = image.detach().to(torch.float32)
    if image.stride(1) != 1 or image.stride(0) < 0 or image.stride(2) < 0:
        image = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    h, w, _ = image.shape
    rows, channels = image.stride(0), image.stride(2)
    extent = 2 * channels + (h - 1) * rows + w
    return image.as_strided((extent,), (1,)).numpy(), (channels, rows)


# Rows a task owns: its scratch stays in the second-level cache, and its halo of 2 * RADIUS rows is computed twice.
_STRIP = 64
# Not plain fastmath, which would let the compiler assume that no NaN comes; a NaN must come out as one.
_FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}
_T0, _T1, _T2, _T3, _T4, _T5 = (np.float32(v) for v in _WINDOW[: RADIUS + 1])  # symmetric: outermost ... centre
_TAPS = tuple(np.float32(v) for v in _WINDOW[RADIUS:])  # by distance from the centre
_C1, _C2, _ONE, _TWO = np.float32(C1), np.float32(C2), np.float32(1), np.float32(2)


# The loops below name few arrays each on purpose: LLVM vectorises a loop only while it has few pairs of arrays to prove
# apart.


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _blur_rows(rows, row, n, out):
    """out = the window over rows[row - 5 .. row + 5], rows beyond the first n being zero."""
    width = out.shape[0]
    centre = rows[row]
    for j in range(width):
        out[j] = _T5 * centre[j]
    for distance in range(1, 6):
        tap = _TAPS[distance]
        above, below = row - distance, row + distance
        if above >= 0 and below < n:
            a, b = rows[above], rows[below]
            for j in range(width):
                out[j] += tap * (a[j] + b[j])
        elif above >= 0 or below < n:
            a = rows[above] if above >= 0 else rows[below]
            for j in range(width):
                out[j] += tap * a[j]


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _blur_along(p, out):
    """out = the window along a row; p is the row with five zeros at either end."""
    for j in range(out.shape[0]):
        out[j] = (
            _T0 * (p[j] + p[j + 10]) + _T1 * (p[j + 1] + p[j + 9]) + _T2 * (p[j + 2] + p[j + 8])
            + _T3 * (p[j + 3] + p[j + 7]) + _T4 * (p[j + 4] + p[j + 6]) + _T5 * p[j + 5]
        )  # fmt: skip


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _ssim_row(mx, my, ss, xy, scale):
    """Sum of SSIM over a row from E[x], E[y], E[x² + y²], E[x y].

    On return the first three hold scale · dSSIM by E[x], E[x²] and E[x y].
    """
    total = np.float32(0)
    for j in range(mx.shape[0]):
        a, b = mx[j], my[j]
        products = a * a + b * b
        n1, n2 = _TWO * a * b + _C1, _TWO * (xy[j] - a * b) + _C2
        i1, i2 = _ONE / (products + _C1), _ONE / (ss[j] - products + _C2)
        ssim = n1 * n2 * i1 * i2
        total += ssim
        mx[j] = scale * _TWO * (b * (n2 - n1) * i1 * i2 - ssim * a * (i1 - i2))
        my[j] = -scale * ssim * i2
        ss[j] = scale * _TWO * n1 * i1 * i2
    return total


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _products(a, b, squares, cross):
    for j in range(a.shape[0]):
        squares[j] = a[j] * a[j] + b[j] * b[j]
    for j in range(a.shape[0]):
        cross[j] = a[j] * b[j]


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _gradient_row(a, b, dm, ds, dx, out):
    for j in range(out.shape[0]):
        out[j] = dm[j] + _TWO * a[j] * ds[j] + b[j] * dx[j]


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _l1_row(a, b, scale, out):
    total = np.float32(0)
    for j in range(out.shape[0]):
        d = a[j] - b[j]
        total += abs(d)
        out[j] += scale * (np.float32(d > 0) - np.float32(d < 0))
    return total


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _l1_weighted_row(a, b, weight, scale, out):
    total = np.float32(0)
    for j in range(out.shape[0]):
        d = a[j] - b[j]
        total += weight[j] * abs(d)
        out[j] += scale * weight[j] * (np.float32(d > 0) - np.float32(d < 0))
    return total


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True, nogil=True)
def _photometric_kernel(
    counter, x_flat, x_strides, y_flat, y_strides, weights, height, width, ssim_weight, gradient, sums
):
    """Sums of weighted |x - y| and of SSIM over each task's rows; d loss / d x into `gradient`, "3 height width".

    A task owns 64 rows of one channel: blur four moments (x, y, x² + y², x y), form SSIM and its derivatives by the
    three moments that x touches, then blur those back: the window is symmetric, so the blur is its own adjoint.
    """
    r = 5
    strips = (height + _STRIP - 1) // _STRIP
    n = np.float32(1.0 / (3.0 * height * width))
    d_l1, d_ssim = (_ONE - ssim_weight) * n, -ssim_weight * n
    # One scratch a thread: allocating in every task would cost more, in page faults, than the arithmetic.
    scratch = np.empty((7, _STRIP + 4 * RADIUS, width), np.float32)
    task = take(counter)
    while task < 3 * strips:
        channel, first = task // strips, (task % strips) * _STRIP
        last = min(first + _STRIP, height)
        low, high = max(first - r, 0), min(last + r, height)  # rows whose SSIM this task needs
        bottom, top = max(low - r, 0), min(high + r, height)  # rows that those see
        source, maps = scratch[:4], scratch[4:7]
        for row in range(bottom, top):
            x0, y0 = channel * x_strides[0] + row * x_strides[1], channel * y_strides[0] + row * y_strides[1]
            source[0, row - bottom] = x_flat[x0 : x0 + width]
            source[1, row - bottom] = y_flat[y0 : y0 + width]
            _products(
                source[0, row - bottom], source[1, row - bottom], source[2, row - bottom], source[3, row - bottom]
            )
        cross = np.empty(width, np.float32)
        padded = np.zeros(width + 2 * r, np.float32)
        inner = padded[r : r + width]
        total_l1, total_ssim = 0.0, 0.0
        for row in range(low, high):
            for moment in range(3):
                _blur_rows(source[moment], row - bottom, top - bottom, inner)
                _blur_along(padded, maps[moment, row - low])
            _blur_rows(source[3], row - bottom, top - bottom, inner)
            _blur_along(padded, cross)
            row_sum = _ssim_row(maps[0, row - low], maps[1, row - low], maps[2, row - low], cross, d_ssim)
            if first <= row < last:
                total_ssim += row_sum
        d_moment = np.empty((3, width), np.float32)
        for row in range(first, last):
            for moment in range(3):
                _blur_rows(maps[moment], row - low, high - low, inner)
                _blur_along(padded, d_moment[moment])
            x, y, out = source[0, row - bottom], source[1, row - bottom], gradient[channel, row]
            _gradient_row(x, y, d_moment[0], d_moment[1], d_moment[2], out)
            if weights.size > 0:
                total_l1 += _l1_weighted_row(x, y, weights[row], d_l1, out)
            else:
                total_l1 += _l1_row(x, y, d_l1, out)
        sums[task, 0], sums[task, 1] = total_l1, total_ssim
        task = take(counter)


def mouth_weight(
    height: int, width: int, box: Box, mouth: float = LossWeights.mouth, largest: float = 8.0
) -> Float[Tensor, "h w"]:
    """Weights for `photometric` that make its L1 term Eq. 16's: the image's mean error plus `mouth` times the mouth
    box's own mean.

    Outside the box 1, inside 1 + mouth · (pixels of the image) / (pixels of the box), at most `largest`: a mouth a few
    pixels small must not take over.
    """
    x0, y0, x1, y1 = box
    weight = torch.ones(height, width)
    weight[y0:y1, x0:x1] = min(largest, 1 + mouth * height * width / max((y1 - y0) * (x1 - x0), 1))
    return weight


# ------------------------------------------------------------------------------------------------------------------ VGG


@cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it by itself (in tiles, AMX: 2-6 times faster than float32; in vectors, AVX-512: 1.7
    times); elsewhere float32, which is then the faster."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "amx_bf16" in flags or "avx512_bf16" in flags else torch.float32


class PerceptualLoss:
    """L_VGG (Eq. 16): mean absolute difference of VGG16 features, summed over layers.

    "First four layers" of the paper, by `depth`: "cheap" takes relu1_2 and relu2_2, "full" the four slices up to
    relu4_3 (3-4 times the cost). Images are compared on crops, since the cost is by the pixel; features of the truth
    take no gradient.
    """

    def __init__(self, depth: str = "cheap", dtype: torch.dtype | None = None, device: torch.device | str = "cpu"):
        assert depth in ("cheap", "full"), depth
        layers = LPIPS_LAYERS["vgg16"][: {"cheap": 2, "full": 4}[depth]]
        self.depth, self.device = depth, torch.device(device)
        self.dtype = dtype or (fast_dtype() if self.device.type == "cpu" else torch.bfloat16)
        self.features = Features("vgg16", layers, dtype=self.dtype).to(self.device)

    def __call__(
        self, rendered: Float[Tensor, "h w 3"], target: Float[Tensor, "h w 3"], box: Box | None = None
    ) -> Tensor:
        """The loss on one box (default: the whole image)."""
        assert rendered.shape == target.shape, f"rendered {tuple(rendered.shape)}, target {tuple(target.shape)}"
        if box is not None:
            x0, y0, x1, y1 = box
            rendered, target = rendered[y0:y1, x0:x1], target[y0:y1, x0:x1]
        with torch.no_grad():
            wanted = self.features(target.permute(2, 0, 1)[None])
        found = self.features(rendered.permute(2, 0, 1)[None])
        return sum((a.float() - b.float()).abs().mean() for a, b in zip(found, wanted, strict=True))


def crop_around(center: tuple[float, float], size: int, height: int, width: int) -> Box:
    """A square of `size` px (less where the image is smaller) about (x, y), moved inside the image: where L_VGG is
    taken."""
    w, h = min(size, width), min(size, height)
    x0 = min(max(round(center[0] - w / 2), 0), width - w)
    y0 = min(max(round(center[1] - h / 2), 0), height - h)
    return x0, y0, x0 + w, y0 + h


def random_crop(mask: np.ndarray, size: int, generator: torch.Generator) -> Box:
    """A square about a random pixel of the mask ("h w", above half), anywhere where the mask is empty; the generator's
    state is all the chance."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask[::8, ::8] > 127 if mask.dtype == np.uint8 else mask[::8, ::8] > 0.5)
    if len(rows) == 0:
        rows, columns = np.array([height // 16]), np.array([width // 16])
    pick = int(torch.randint(len(rows), (), generator=generator))
    return crop_around((columns[pick] * 8 + 4, rows[pick] * 8 + 4), size, height, width)


# ----------------------------------------------------------------------------------------------------------------- Wing


def wing(error_px: Float[Tensor, "*n"], width_px: float = 10.0, curvature_px: float = 2.0) -> Float[Tensor, "*n"]:
    """Wing loss of each error (Feng et al. 2018): w ln(1 + |x| / ε) below w, |x| - C above, C joining the two."""
    size = error_px.abs()
    joint = width_px - width_px * float(np.log1p(width_px / curvature_px))
    return torch.where(size < width_px, width_px * torch.log1p(size / curvature_px), size - joint)


class WingLandmarks:
    """L_WING (Eq. 16): Wing loss between the landmarks of the rendering and of the truth, with the landmark network's own
    gradient.

    Both images go through the network in one region, taken from the truth's known landmarks. Two looks at one face
    through regions a px apart differ by 0.6 px, where Wing is steepest (measured: a loss of 5.4 between a photograph and
    its own tracked landmarks); through one region equal images give exactly 0. The network was trained on photographs:
    on a bad rendering its gradient points anywhere, so the loss is scaled by the (detached) presence that it reports.
    Alone it distorts the face; keep its weight small.
    """

    def __init__(self, landmarker: "FaceLandmarker", width_px: float = 10.0, curvature_px: float = 2.0):
        self.landmarker, self.width_px, self.curvature_px = landmarker, width_px, curvature_px

    def __call__(
        self,
        rendered: Float[Tensor, "h w 3"],
        target: Float[Tensor, "h w 3"],
        landmarks_px: Float[Tensor, "478 2"],
        weight: Float[Tensor, "478"] | None = None,
    ) -> Tensor:
        """Mean over the landmarks of wing(x) + wing(y), each landmark times its weight (default 1).

        `landmarks_px` are the truth's as tracked: they say where to look, not what to find.
        """
        from hicode.tracking.landmarks import rois_from_landmarks

        roi = rois_from_landmarks(landmarks_px.to(rendered)[None])
        with torch.no_grad():
            wanted, _ = self.landmarker.landmarks(target.permute(2, 0, 1)[None], roi)
        points, presence = self.landmarker.landmarks(rendered.clamp(0, 1).permute(2, 0, 1)[None], roi)
        loss = wing(points[0, :, :2] - wanted[0, :, :2], self.width_px, self.curvature_px).sum(-1)
        return (loss if weight is None else loss * weight).mean() * presence[0].detach()


# ------------------------------------------------------------------------------------------------------------- geometry


_FAR_DM2 = 0.01  # a spread of 10 cm: hair before a neck is two surfaces, and must not be drawn into one


def depth_spread(gaussians: Gaussians, camera: Camera) -> Tensor:
    """Mean over the pixels of the variance of depth along the ray (dm², as the rendering weighs its Gaussians, times its coverage); saturates.

    A head seen from one side only explains its pictures as well with Gaussians strewn along the rays as on a surface, and falls apart when it turns further.
    A cousin of the distortion loss of Mip-NeRF 360 (Barron et al. 2022), whose pairwise distances need a kernel of their own: a variance takes one more
    rendering, of z and z² in the place of colours.
    """
    turn = camera.T_camera_head[2].to(gaussians.means.device)
    z = gaussians.means @ turn[:3]
    z = z - z.detach().mean()  # near 0, so that the difference of squares keeps its digits
    first, second, cover = rasterize(
        replace(gaussians, colors=torch.stack([z, z * z, torch.ones_like(z)], 1)),
        camera,
        torch.zeros(3, device=z.device),
    ).rgb.unbind(-1)
    spread = torch.where(cover > 0.3, second - first * first / cover.clamp_min(0.3), 0.0)
    return (spread / (1 + spread.detach() / _FAR_DM2)).mean()


# ------------------------------------------------------------------------------------------------------------- together


class HeadLoss:
    """L_3DGS (Eq. 15): the weighted sum. Terms whose weight is 0 or whose network is not given cost nothing."""

    def __init__(
        self,
        weights: LossWeights | None = None,
        perceptual: PerceptualLoss | None = None,
        landmarks: WingLandmarks | None = None,
    ):
        self.weights, self.perceptual, self.landmarks = weights or LossWeights(), perceptual, landmarks

    def __call__(
        self,
        rendered: Float[Tensor, "h w 3"],
        target: Float[Tensor, "h w 3"],
        mouth_box: Box | None = None,
        face_crop: Box | None = None,
        mouth_crop: Box | None = None,
        landmarks_px: Float[Tensor, "478 2"] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms without gradient and before weighting: l1, ssim, vgg, vgg_mouth, wing, as far as
        computed.

        A step takes the terms whose place it is given: `mouth_box` weighs the L1 term there, `face_crop` and
        `mouth_crop` call for L_VGG there, `landmarks_px` (the truth's, for the region) for L_WING.
        """
        w = self.weights
        h, width, _ = rendered.shape
        scale = w.l1 + w.ssim
        weight = (
            mouth_weight(h, width, mouth_box, w.mouth).to(rendered.device)
            if mouth_box is not None and w.mouth > 0
            else None
        )
        loss, parts = photometric(rendered, target, weight, w.ssim / scale if scale > 0 else 0.0)
        loss = scale * loss
        if self.perceptual is not None and w.vgg > 0:
            for name, box, share in (("vgg", face_crop, 1.0), ("vgg_mouth", mouth_crop, w.mouth)):
                if box is not None and share > 0:
                    term = self.perceptual(rendered, target, box)
                    loss, parts[name] = loss + w.vgg * share * term, term.detach()
        if self.landmarks is not None and w.wing > 0 and landmarks_px is not None:
            term = self.landmarks(rendered, target, landmarks_px)
            loss, parts["wing"] = loss + w.wing * term, term.detach()
        return loss, parts


def check_finite(step: int, terms: Mapping[str, Tensor], tensors: Mapping[str, Tensor], of: str = "Step") -> None:
    """Raise TrainingError naming the step, the first loss term that is not finite and the tensors (or gradients) that
    are not.

    Costs one look at the terms; the tensors are searched only once a term has gone. `of`: whose step, "Speech step".
    """
    bad = [name for name, value in terms.items() if not bool(torch.isfinite(value).all())]
    if not bad:
        return
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    broken += [
        f"gradient of {name}"
        for name, value in tensors.items()
        if value.grad is not None and not bool(torch.isfinite(value.grad).all())
    ]
    where = (
        f"not finite: {', '.join(broken[:4])}{' …' if len(broken) > 4 else ''}"
        if broken
        else "every parameter is finite"
    )
    raise TrainingError(
        f"{of} {step}: loss term {bad[0]!r} is {float(terms[bad[0]].detach().flatten()[0]):g} ({where}). "
        "Resume from the last checkpoint with a lower learning rate, or report this clip."
    )
