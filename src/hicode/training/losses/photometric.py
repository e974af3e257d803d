"""The photometric part of the head's loss (Eqs 15-16): mean absolute error and SSIM, in one fused pass.

Images are "h w 3" in [0, 1]. A box is (x0, y0, x1, y1) in px, the end exclusive.

Two deviations from Eq. 16:

- Its SSIM term, the norm of SSIM(I) - SSIM(I_gt), compares each image with nothing. 1 - SSIM(I, I_gt) replaces it, as
  in 3DGS.
- The mouth's own L1 term is a map of pixel weights, so one pass computes both.

`photometric` is the fused kernel that training runs. `photometric_reference` is its specification in torch.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hicode.render.simd import lane_sum, load, store, vector
from hicode.threads import run_on_threads, take

Box = tuple[int, int, int, int]

RADIUS = 5  # of the SSIM window, 11 x 11
SIGMA_PX = 1.5
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a data range of 1
LARGEST_MOUTH_WEIGHT = 8.0  # a mouth of a few pixels must not dominate the loss
_WINDOW = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA_PX) ** 2)
_WINDOW /= _WINDOW.sum()


def photometric_reference(
    rendered: Float[Tensor, "h w 3"],
    target: Float[Tensor, "h w 3"],
    weight: Float[Tensor, "h w"] | None = None,
    ssim_weight: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Specification of `photometric` in torch: any float type, any device."""
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
    """(1 - ssim_weight) · mean(weight |I - I_gt|) + ssim_weight · (1 - mean SSIM), and both means without gradient.

    SSIM uses a Gaussian window (11 x 11, σ 1.5), zero padding, and runs per channel over all pixels. The weights apply
    to the L1 term only and are not normalised. The gradient goes to `rendered` alone. Results are bit-identical for
    any number of threads. Planar memory (a permuted "3 h w", crops of it too) is read in place; other layouts are
    copied once. Other devices and float types run `photometric_reference`.
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
        arguments = x, x_strides, y, y_strides, weights, np.float32(ssim_weight), gradient.numpy(), sums
        run_on_threads(_photometric_kernel, strips, *arguments)
        l1, ssim = (float(s) for s in sums.sum(0) / (3.0 * h * w))
        ctx.gradient = gradient.permute(1, 2, 0)
        l1, ssim = torch.tensor(l1), torch.tensor(ssim)
        ctx.mark_non_differentiable(l1, ssim)
        return ((1 - ssim_weight) * l1 + ssim_weight * (1 - ssim)).float(), l1.float(), ssim.float()

    @staticmethod
    def backward(ctx, d_loss, *_):
        return ctx.gradient.mul_(d_loss), None, None, None


def _planar(image: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """(flat memory from the first element on, (channel, row) strides). Copies only if rows are not contiguous."""
    image = image.detach().to(torch.float32)
    if image.stride(1) != 1 or image.stride(0) < 0 or image.stride(2) < 0:
        image = image.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    h, w, _ = image.shape
    rows, channels = image.stride(0), image.stride(2)
    extent = 2 * channels + (h - 1) * rows + w
    return image.as_strided((extent,), (1,)).numpy(), (channels, rows)


# Rows of a task. Its scratch fits the second-level cache; its halo of 2 * RADIUS rows is computed twice.
_STRIP = 64
# Full fastmath lets the compiler assume that there is no NaN. A NaN must propagate.
_FAST = {"reassoc", "contract", "arcp", "nsz", "afn"}
_T0, _T1, _T2, _T3, _T4, _T5 = (np.float32(v) for v in _WINDOW[: RADIUS + 1])  # symmetric: outermost ... centre
_C1, _C2, _ONE, _TWO = np.float32(C1), np.float32(C2), np.float32(1), np.float32(2)


# LLVM vectorises a loop only if it can check that its arrays do not overlap, and gives up when there are many pairs. So
# the plain loops below use few arrays, and the blur names its vectors.


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check  # Numba must compile the function itself, not a checked wrapper
def _blur(rows, i, pitch, padded, out, o, width):
    """out[o : o + width] = the window over the rows around the one at rows[i], which lie `pitch` apart.

    Both widths are multiples of 16; `padded` is a row with 16 zeros at each end.
    """
    for j in range(i, i + width, 16):
        column = load(rows, j) * _T5
        column += (load(rows, j - pitch) + load(rows, j + pitch)) * _T4
        column += (load(rows, j - 2 * pitch) + load(rows, j + 2 * pitch)) * _T3
        column += (load(rows, j - 3 * pitch) + load(rows, j + 3 * pitch)) * _T2
        column += (load(rows, j - 4 * pitch) + load(rows, j + 4 * pitch)) * _T1
        column += (load(rows, j - 5 * pitch) + load(rows, j + 5 * pitch)) * _T0
        store(padded, 16 + j - i, column)
    for j in range(16, 16 + width, 16):
        along = load(padded, j) * _T5
        along += (load(padded, j - 1) + load(padded, j + 1)) * _T4
        along += (load(padded, j - 2) + load(padded, j + 2)) * _T3
        along += (load(padded, j - 3) + load(padded, j + 3)) * _T2
        along += (load(padded, j - 4) + load(padded, j + 4)) * _T1
        along += (load(padded, j - 5) + load(padded, j + 5)) * _T0
        store(out, o + j - 16, along)


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check
def _ssim_row(moments, inside, maps, o, plane, scale):
    """Sum of SSIM over a row, from rows of E[x], E[y], E[x² + y²] and E[x y]; `inside` is 1 in the image, else 0.

    scale · dSSIM by E[x], E[x²] and E[x y] goes to maps[o], maps[o + plane] and maps[o + 2 plane].
    """
    total, width = vector(np.float32(0)), inside.shape[0]
    for j in range(0, width, 16):
        a, b = load(moments, j), load(moments, j + width)
        products = a * a + b * b
        p, q = products + _C1, load(moments, j + 2 * width) - products + _C2
        n1, n2 = a * b * _TWO + _C1, (load(moments, j + 3 * width) - a * b) * _TWO + _C2
        inverse = load(inside, j) / (p * q)
        ssim = n1 * n2 * inverse
        total += ssim
        store(maps, o + j, (b * (n2 - n1) - ssim * a * (q - p)) * inverse * (scale * _TWO))
        store(maps, o + j + plane, ssim * p * inverse * -scale)
        store(maps, o + j + 2 * plane, n1 * inverse * (scale * _TWO))
    return lane_sum(total)


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check
def _copy(source, i, row):
    for j in range(row.shape[0]):
        row[j] = source[i + j]


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check
def _products(rows, o, width, plane):
    """x² + y² and x y of a row of x and y; the four lie `plane` apart."""
    for j in range(o, o + width, 16):
        a, b = load(rows, j), load(rows, j + plane)
        store(rows, j + 2 * plane, a * a + b * b)
        store(rows, j + 3 * plane, a * b)


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check
def _gradient_row(a, b, dm, ds, dx, out):
    for j in range(out.shape[0]):
        out[j] = dm[j] + _TWO * a[j] * ds[j] + b[j] * dx[j]


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check
def _l1_row(a, b, scale, out):
    total = np.float32(0)
    for j in range(out.shape[0]):
        d = a[j] - b[j]
        total += abs(d)
        out[j] += scale * (np.float32(d > 0) - np.float32(d < 0))
    return total


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
@no_type_check
def _l1_weighted_row(a, b, weight, scale, out):
    total = np.float32(0)
    for j in range(out.shape[0]):
        d = a[j] - b[j]
        total += weight[j] * abs(d)
        out[j] += scale * weight[j] * (np.float32(d > 0) - np.float32(d < 0))
    return total


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True, nogil=True)
@no_type_check
def _photometric_kernel(counter, x_flat, x_strides, y_flat, y_strides, weights, ssim_weight, gradient, sums):  # noqa: PLR0913 - a kernel takes arrays
    """Sums of weighted |x - y| and of SSIM over each task's rows; writes d loss / d x into `gradient` "3 h w".

    A task has 64 rows of one channel. It blurs four moments (x, y, x² + y², x y) and computes SSIM and its derivatives
    by the three moments that depend on x. Then it blurs these derivatives: the window is symmetric, so the blur is its
    own adjoint.
    """
    r = 5
    _, height, width = gradient.shape
    pitch, rows = (width + 15) // 16 * 16, _STRIP + 4 * r
    strips = (height + _STRIP - 1) // _STRIP
    n = np.float32(1.0 / (3.0 * height * width))
    d_l1, d_ssim = (_ONE - ssim_weight) * n, -ssim_weight * n
    # One scratch per thread: page faults of an allocation per task would cost more than the arithmetic. Four moments,
    # three maps of derivatives, and what is blurred of a row; zero outside the image.
    scratch = np.zeros((7, rows, pitch), np.float32)
    blurred, padded = np.zeros((4, pitch), np.float32), np.zeros(pitch + 32, np.float32)
    flat, flat_blurred, plane, inside = (
        scratch.reshape(-1),
        blurred.reshape(-1),
        rows * pitch,
        np.zeros(pitch, np.float32),
    )
    inside[:width] = 1
    task = take(counter)  # pyright: ignore[reportCallIssue] - numba adds the typing context
    while task < 3 * strips:
        channel, first = task // strips, (task % strips) * _STRIP
        last, above = min(first + _STRIP, height), first - 2 * r  # `above` is the image's row in the scratch's first
        for k in range(rows):
            row = above + k
            if row < 0 or row >= height:
                scratch[:, k] = 0
                continue
            x0, y0 = channel * x_strides[0] + row * x_strides[1], channel * y_strides[0] + row * y_strides[1]
            _copy(x_flat, x0, scratch[0, k, :width])
            _copy(y_flat, y0, scratch[1, k, :width])
            _products(flat, k * pitch, pitch, plane)
        total_l1, total_ssim = 0.0, 0.0
        for row in range(max(first - r, 0), min(last + r, height)):
            k = row - above
            for moment in range(4):
                _blur(flat, moment * plane + k * pitch, pitch, padded, flat_blurred, moment * pitch, pitch)
            row_sum = _ssim_row(flat_blurred, inside, flat, 4 * plane + k * pitch, plane, d_ssim)
            if first <= row < last:
                total_ssim += row_sum
        for row in range(first, last):
            k = row - above
            for moment in range(3):
                _blur(flat, (4 + moment) * plane + k * pitch, pitch, padded, flat_blurred, moment * pitch, pitch)
            x, y, out = scratch[0, k, :width], scratch[1, k, :width], gradient[channel, row]
            _gradient_row(x, y, blurred[0], blurred[1], blurred[2], out)
            if weights.size > 0:
                total_l1 += _l1_weighted_row(x, y, weights[row], d_l1, out)
            else:
                total_l1 += _l1_row(x, y, d_l1, out)
        sums[task, 0], sums[task, 1] = total_l1, total_ssim
        task = take(counter)  # pyright: ignore[reportCallIssue]


def mouth_weight(height: int, width: int, box: Box, mouth: float) -> Float[Tensor, "h w"]:
    """Pixel weights for the L1 term: the image's mean error plus `mouth` times the mean error inside the box (Eq. 16).

    1 outside the box, 1 + mouth · (pixels of the image) / (pixels of the box) inside, at most `LARGEST_MOUTH_WEIGHT`.
    """
    x0, y0, x1, y1 = box
    weight = torch.ones(height, width)
    inside = 1 + mouth * height * width / max((y1 - y0) * (x1 - x0), 1)
    weight[y0:y1, x0:x1] = min(LARGEST_MOUTH_WEIGHT, inside)
    return weight
