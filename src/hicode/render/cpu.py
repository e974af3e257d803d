"""The rasteriser's kernels for the CPU: Numba over 16-lane vectors, forward and backward (Eqs 3-6).

n Gaussians, one image in tiles of 32 x 32 px, each of 8 x 8 blocks of 4 x 4 px; a block is one vector.

1. project   16 Gaussians a vector: projected mean, inverse (A, B, C) of Sigma', ln of the opacity, and the tiles that
             the ellipse alpha >= 1/255 can touch. One row of 16 floats a Gaussian (`splats`).
2. bin       a (Gaussian, tile) pair for every tile in a Gaussian's box, tile by tile, near before far.
3. blend     per tile: a 64-bit mask of touched blocks for every pair, then pair by pair the masked blocks. T and RGB
             stay in the nearest cache. A finished pixel carries -T: no test. A finished block leaves the masks.
4. backward  blends again front to back. With Q the part of <gradient, pixel> behind the Gaussian,
             d alpha = T <gradient, colour> - Q / (1 - alpha). Each pair writes nine sums to its own slot. A Gaussian's
             slots are neighbours and are added in order when the gradient goes back through the projection.

No two threads add to one place: results do not depend on the number of threads, bit for bit. Threads are Python's (the
kernels hold no lock); each takes the next tile when it is free. `torch.get_num_threads()` take part.
"""

# pyright: reportCallIssue=false
# Numba's intrinsics take a typing context first, which callers do not give.
# ruff: noqa: PLR0913 (kernels take their arrays one by one)

from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt64
from numba import njit
from torch import Tensor

from hicode.camera import Camera
from hicode.errors import InputError
from hicode.gaussians import Gaussians
from hicode.render.reference import ALPHA_MAX, ALPHA_MIN, DILATION_PX2, FIELD_MARGIN, NEAR, TRANSMITTANCE_MIN
from hicode.render.simd import (
    FAST,
    any_lane,
    block_rows_twice,
    block_x,
    block_y,
    gather_block,
    lane,
    lane_sum,
    lane_sums_of_8,
    load,
    load_block,
    load_rows_of_3,
    load_rows_of_4,
    load_rows_of_16,
    load_scalar,
    maximum,
    minimum,
    prefetch,
    quotient,
    right_then_left,
    row_bits,
    store,
    store_block,
    store_rows_of_2,
    store_rows_of_3,
    store_rows_of_4,
    store_rows_of_16,
    trailing_zeros,
    vabs,
    vceil,
    vector,
    vexp,
    vfloor,
    vlog,
    vsqrt,
    where,
)
from hicode.runtime import require_memory
from hicode.threads import run_on_threads, take

TILE = 32
BLOCKS = 64  # in a tile, 8 x 8
CHUNK = 1024  # Gaussians that a thread projects at a time

# A row of `splats`. Coordinates count pixel centres from 0, so they are px - 0.5.
X, Y = 0, 1  # projected mean
XX, XY, YY = 2, 3, 4  # -A/2, -B, -C/2: ln alpha = XX dx^2 + XY dx dy + YY dy^2 + LOG_OPACITY
LOG_OPACITY = 5
RED, GREEN, BLUE = 6, 7, 8
INVERSE_A, HALF_Y = 9, 10  # 1/A; half the height of the ellipse alpha >= 1/255
TIP_Y = 11  # y, from the mean, of the ellipse's rightmost point
REACH, SLOPE = 12, 13  # A k and B^2 - A C: the ellipse's half width at y is sqrt(SLOPE y^2 + REACH) / A
ROW = 16

# Numba freezes these into the cached kernels.
_LOG_ALPHA_MIN = np.float32(np.log(ALPHA_MIN))
_ALPHA_MAX = np.float32(ALPHA_MAX)
_TRANSMITTANCE_MIN = np.float32(TRANSMITTANCE_MIN)
_DILATION = np.float32(DILATION_PX2)
_NEAR = np.float32(NEAR)
_LARGEST = np.float32(1e9)  # px: a Gaussian larger than this on the image is not a Gaussian any more
_BIT = np.uint64(1)
_NONE = np.uint64(0)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_0, _1, _2, _3, _4 = (
    np.int64(0),
    np.int64(1),
    np.int64(2),
    np.int64(3),
    np.int64(4),
)  # a literal would compile its callee once more
_OPTIONS = {"fastmath": set(FAST), "error_model": "numpy", "cache": True, "boundscheck": False, "nogil": True}


@njit(inline="always", **_OPTIONS)
@no_type_check  # Numba must compile the function itself, not a checked wrapper
def _exp_of_visible(x):
    """e^x for x in [ln 1/255, 0], 2e-6 relative: a degree-5 fit of e^(x/8), to the eighth power."""
    t = x * 0.125
    e = ((((t * 5.8686724e-3 + 3.9808128e-2) * t + 0.16599411) * t + 0.49988723) * t + 0.99999291) * t + 0.99999994
    e = e * e
    e = e * e
    return e * e


# 1. Projection


@njit(inline="always", **_OPTIONS)
@no_type_check
def _rotation(quats, i):
    """The nine entries of 16 rotations, the unit quaternion, and what normalised it."""
    w, x, y, z = load_rows_of_4(quats, 4 * i)
    normalise = 1.0 / vsqrt(maximum(w * w + x * x + y * y + z * z, vector(1e-24)))
    w, x, y, z = w * normalise, x * normalise, y * normalise, z * normalise
    entries = (
        1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y),
        2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x),
        2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y),
    )  # fmt: skip
    return entries, w, x, y, z, normalise


@njit(inline="always", **_OPTIONS)
@no_type_check
def _projected_axes(view, lens, x, y, z, rotation):
    """J (four entries), T = J V and P = J V R of 16 Gaussians: Sigma' = (P S) (P S)^T (Eqs 3-4). Row by row."""
    near = 1.0 / z
    jx = minimum(maximum(x * near, vector(lens[4])), vector(lens[5]))
    jy = minimum(maximum(y * near, vector(lens[6])), vector(lens[7]))
    j00, j11 = near * lens[0], near * lens[1]
    j02, j12 = -(jx * j00), -(jy * j11)
    t00, t01, t02 = j00 * view[0] + j02 * view[8], j00 * view[1] + j02 * view[9], j00 * view[2] + j02 * view[10]
    t10, t11, t12 = j11 * view[4] + j12 * view[8], j11 * view[5] + j12 * view[9], j11 * view[6] + j12 * view[10]
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation
    p00, p01, p02 = (
        t00 * r00 + t01 * r10 + t02 * r20,
        t00 * r01 + t01 * r11 + t02 * r21,
        t00 * r02 + t01 * r12 + t02 * r22,
    )
    p10, p11, p12 = (
        t10 * r00 + t11 * r10 + t12 * r20,
        t10 * r01 + t11 * r11 + t12 * r21,
        t10 * r02 + t11 * r12 + t12 * r22,
    )
    return (near, jx, jy), (j00, j02, j11, j12), (t00, t01, t02, t10, t11, t12), (p00, p01, p02, p10, p11, p12)


@njit(**_OPTIONS)
@no_type_check
def _project_16(
    means, log_scales, quats, logits, colors, i, view, lens, width, height, splats, depths, radii, boxes, o
):
    """Project the Gaussians i .. i + 15 into rows o .. o + 15."""
    mx, my, mz = load_rows_of_3(means, 3 * i)
    x = mx * view[0] + my * view[1] + mz * view[2] + view[3]
    y = mx * view[4] + my * view[5] + mz * view[6] + view[7]
    z = mx * view[8] + my * view[9] + mz * view[10] + view[11]
    rotation, _, _, _, _, _ = _rotation(quats, i)
    s0, s1, s2 = load_rows_of_3(log_scales, 3 * i)
    s0, s1, s2 = vexp(s0), vexp(s1), vexp(s2)
    (near, _, _), _, _, (p00, p01, p02, p10, p11, p12) = _projected_axes(view, lens, x, y, z, rotation)
    u00, u01, u02, u10, u11, u12 = p00 * s0, p01 * s1, p02 * s2, p10 * s0, p11 * s1, p12 * s2
    a0, b, c0 = u00 * u00 + u01 * u01 + u02 * u02, u00 * u10 + u01 * u11 + u02 * u12, u10 * u10 + u11 * u11 + u12 * u12
    # The determinant from the cross product of the rows: a c - b^2 would cancel for long thin Gaussians.
    k0, k1, k2 = u01 * u12 - u02 * u11, u02 * u10 - u00 * u12, u00 * u11 - u01 * u10
    determinant = k0 * k0 + k1 * k1 + k2 * k2 + _DILATION * (a0 + c0) + _DILATION * _DILATION
    a, c = a0 + _DILATION, c0 + _DILATION
    inverse = 1.0 / determinant
    A, B, C = c * inverse, -(b * inverse), a * inverse

    logit = load(logits, i)
    log_opacity = minimum(logit, vector(0.0)) - vlog(1.0 + vexp(-vabs(logit)))
    k = maximum((log_opacity - _LOG_ALPHA_MIN) * 2.0, vector(0.0))
    u = x * near * lens[0] + (lens[2] - np.float32(0.5))
    v = y * near * lens[1] + (lens[3] - np.float32(0.5))
    half_x, half_y = vsqrt(k * a), vsqrt(k * c)
    red, green, blue = load_rows_of_3(colors, 3 * i)
    row = (
        u, v, A * -0.5, -B, C * -0.5, log_opacity, red, green, blue,
        1.0 / A, half_y, half_x * b / a, A * k, B * B - A * C, k, k,
    )  # fmt: skip
    store_rows_of_16(splats, ROW * o, row)
    store(depths, o, z)

    x0, x1 = vceil(maximum(u - half_x, vector(0.0))), vfloor(minimum(u + half_x, vector(np.float32(width - 1))))
    y0, y1 = vceil(maximum(v - half_y, vector(0.0))), vfloor(minimum(v + half_y, vector(np.float32(height - 1))))
    seen = (z >= _NEAR) & (k > 0.0) & (x1 >= x0) & (y1 >= y0) & (half_x < _LARGEST) & (half_y < _LARGEST)
    radius = where(seen, maximum(half_x, half_y), 0.0)
    store(radii, o, radius)
    tiles = np.float32(1.0 / TILE)
    for l in range(16):
        if lane(radius, l) > 0:
            boxes[o + l, 0] = np.int32(lane(x0, l) * tiles)
            boxes[o + l, 1] = np.int32(lane(x1, l) * tiles) + 1
            boxes[o + l, 2] = np.int32(lane(y0, l) * tiles)
            boxes[o + l, 3] = np.int32(lane(y1, l) * tiles) + 1
        else:
            boxes[o + l, 0] = boxes[o + l, 1] = boxes[o + l, 2] = boxes[o + l, 3] = 0


@njit(**_OPTIONS)
@no_type_check
def _last_rows(rows, width, i):
    """The rows from i on, of `width` floats each, and zeros up to 16 rows."""
    padded = np.zeros(16 * width, np.float32)
    for k in range(width * i, rows.shape[0]):
        padded[k - width * i] = rows[k]
    return padded


@njit(**_OPTIONS)
@no_type_check
def _project(
    counter, means, log_scales, quats, logits, colors, view, lens, width, height, splats, depths, radii, boxes
):  # fmt: skip
    n = logits.shape[0]
    chunk = take(counter)
    while chunk * CHUNK < n:
        for i in range(chunk * CHUNK, min(n, (chunk + 1) * CHUNK), 16):
            if i + 16 <= n:
                _project_16(
                    means,
                    log_scales,
                    quats,
                    logits,
                    colors,
                    i,
                    view,
                    lens,
                    width,
                    height,
                    splats,
                    depths,
                    radii,
                    boxes,
                    i,
                )
            else:  # only whole rows are read, so nothing runs past the arrays' ends
                _project_16(
                    _last_rows(means, _3, i), _last_rows(log_scales, _3, i), _last_rows(quats, _4, i),
                    _last_rows(logits, _1, i),
                    _last_rows(colors, _3, i), _0, view, lens, width, height, splats, depths, radii, boxes, i,
                )  # fmt: skip
        chunk = take(counter)


# 2. Binning


@njit(**_OPTIONS)
@no_type_check
def _count_pairs(boxes, keys, n, tiles_x, first_slot, tile_start):
    """Number of Gaussians that touch a tile, of their (Gaussian, tile) pairs; smallest and largest key (depth's bits).

    `first_slot[i]` counts the pairs of the Gaussians before i, `tile_start[t]` those of the tiles before t.
    """
    tile_start[:] = 0
    pairs = touching = 0
    least, most = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(n):
        first_slot[i] = pairs
        if boxes[i, 1] > boxes[i, 0]:
            touching += 1
            least, most = min(least, keys[i]), max(most, keys[i])
            for y in range(boxes[i, 2], boxes[i, 3]):
                for x in range(boxes[i, 0], boxes[i, 1]):
                    tile_start[y * tiles_x + x + 1] += 1
                    pairs += 1
    first_slot[n] = pairs
    for t in range(tile_start.shape[0] - 1):
        tile_start[t + 1] += tile_start[t]
    return touching, pairs, least, most


@njit(**_OPTIONS)
@no_type_check
def _order_by_depth(boxes, keys, n, least, most, order, other):
    """Sort the Gaussians that touch a tile by depth, equal depths by index; returns the given array with the result.

    A radix sort of (key - least) << 32 | index, with as many 12-bit digits as the keys need: a head takes two.
    """
    digits, span = 1, np.uint64(most) - np.uint64(least) if most > least else np.uint64(0)
    while span >> np.uint64(12 * digits) > 0:
        digits += 1
    histogram = np.zeros((digits, 4096), np.int32)
    m = 0
    for i in range(n):
        if boxes[i, 1] > boxes[i, 0]:
            key = np.uint64(keys[i] - least)
            for digit in range(digits):
                histogram[digit, (key >> np.uint64(12 * digit)) & np.uint64(4095)] += 1
            order[m] = (key << np.uint64(32)) | np.uint64(i)
            m += 1
    for digit in range(digits):
        total = np.int32(0)
        for j in range(4096):
            count = histogram[digit, j]
            histogram[digit, j] = total
            total += count
        shift = np.uint64(32 + 12 * digit)
        for j in range(m):
            item = order[j]
            d = (item >> shift) & np.uint64(4095)
            to = histogram[digit, d]
            histogram[digit, d] = to + 1
            other[to] = item
        order, other = other, order
    return order


@njit(**_OPTIONS)
@no_type_check
def _fill_tiles(boxes, order, touching, first_slot, tiles_x, tile_start, pairs):
    """`pairs[tile_start[t] : tile_start[t + 1]]` = (Gaussian, slot) of tile t, near before far."""
    fill = tile_start[:-1].copy()
    for j in range(touching):
        i = np.int64(order[j] & np.uint64(0xFFFFFFFF))
        slot = first_slot[i]
        for y in range(boxes[i, 2], boxes[i, 3]):
            for x in range(boxes[i, 0], boxes[i, 1]):
                t = y * tiles_x + x
                to = fill[t]
                fill[t] = to + 1
                pairs[to, 0] = i
                pairs[to, 1] = slot
                slot += 1


# 3. Blending


@njit(inline="always", **_OPTIONS)
@no_type_check
def _touched_blocks(g, tile_x, tile_y):
    """The 64-bit mask of a tile's blocks that the ellipse alpha >= 1/255 meets."""
    top = block_rows_twice() + (tile_y - g[Y])
    bottom = top + 3.0
    half = g[HALF_Y]
    inside = (top <= half) & (bottom >= -half)
    # The ellipse is widest at its tip; in a row of blocks without the tip, at the row's edge nearest to it.
    side = right_then_left()
    y = minimum(maximum(side * g[TIP_Y], maximum(top, vector(-half))), minimum(bottom, vector(half)))
    edge = (y * g[XY] + side * vsqrt(maximum(y * y * g[SLOPE] + g[REACH], vector(0.0)))) * g[INVERSE_A] + (
        g[X] - tile_x
    )
    # In blocks. Pixel 4 c + 3 is block c's last, so a left edge beyond it belongs to c + 1. Margins are for rounding.
    return row_bits(edge * 0.25 + where(side > 0.0, 1e-3, 0.25 - 1e-3), inside)


@njit(**_OPTIONS)
@no_type_check
def _blend_tile(
    tile,
    tiles_x,
    splats,
    rows,
    pairs,
    start,
    end,
    masks,
    wanted,
    buffer,
    corner,
    background,
    planes,
    width,
    height,
    pitch,
    plane,
):
    ox, oy = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
    tile_x, tile_y = np.float32(ox), np.float32(oy)
    alive = _NONE
    for b in range(BLOCKS):
        bx, by = 4 * (b & 7), 4 * (b >> 3)
        corner[2 * b], corner[2 * b + 1] = np.float32(bx), np.float32(by)
        inside = (block_x() < np.float32(width - ox - bx)) & (block_y() < np.float32(height - oy - by))
        store(buffer, 64 * b, where(inside, 1.0, -1.0))
        store(buffer, 64 * b + 16, vector(0.0))
        store(buffer, 64 * b + 32, vector(0.0))
        store(buffer, 64 * b + 48, vector(0.0))
        if any_lane(inside):
            alive |= _BIT << np.uint64(b)
    alive &= wanted
    if alive == _NONE:
        end = start
    for p in range(start, end):
        prefetch(rows, ROW * np.int64(pairs[min(p + 16, end - 1), 0]))
        masks[p] = _touched_blocks(splats[pairs[p, 0]], tile_x, tile_y)
    for p in range(start, end):
        m = masks[p] & alive
        masks[p] = m
        if m == _NONE:
            continue
        g = splats[pairs[p, 0]]
        dx0, dy0 = block_x() + (tile_x - g[X]), block_y() + (tile_y - g[Y])
        xx, xy, yy, log_opacity = g[XX], g[XY], g[YY], g[LOG_OPACITY]
        red, green, blue = g[RED], g[GREEN], g[BLUE]
        while m != _NONE:
            b = np.int64(trailing_zeros(m))
            m &= m - _BIT
            o = 64 * b
            dx, dy = dx0 + load_scalar(corner, 2 * b), dy0 + load_scalar(corner, 2 * b + 1)
            power = dx * (dx * xx + dy * xy) + (dy * dy * yy + log_opacity)
            alpha = minimum(_exp_of_visible(maximum(power, vector(_LOG_ALPHA_MIN))), vector(_ALPHA_MAX))
            alpha = where(power >= _LOG_ALPHA_MIN, alpha, 0.0)
            T = load(buffer, o)
            weight = alpha * T
            left = T - weight
            goes_on = left > _TRANSMITTANCE_MIN  # fails for finished pixels, whose T is negative
            weight = where(goes_on, weight, 0.0)
            store(buffer, o, where(goes_on, left, -vabs(T)))
            store(buffer, o + 16, load(buffer, o + 16) + weight * red)
            store(buffer, o + 32, load(buffer, o + 32) + weight * green)
            store(buffer, o + 48, load(buffer, o + 48) + weight * blue)
            if not any_lane(goes_on):
                alive &= ~(_BIT << np.uint64(b))
        if alive == _NONE:
            for rest in range(p + 1, end):
                masks[rest] = _NONE
            break
    for b in range(BLOCKS):
        q = (oy + 4 * (b >> 3)) * pitch + ox + 4 * (b & 7)
        o = 64 * b
        T = vabs(load(buffer, o))
        store_block(planes, q, pitch, load(buffer, o + 16) + T * background[0])
        store_block(planes, q + plane, pitch, load(buffer, o + 32) + T * background[1])
        store_block(planes, q + 2 * plane, pitch, load(buffer, o + 48) + T * background[2])
        store_block(planes, q + 3 * plane, pitch, 1.0 - T)


@njit(**_OPTIONS)
@no_type_check
def _blend(
    counter, schedule, tiles_x, tile_start, splats, rows, pairs, masks, wanted, background, planes, width, height,
    pitch, plane,
):  # fmt: skip
    buffer, corner = np.empty(64 * BLOCKS, np.float32), np.empty(2 * BLOCKS, np.float32)
    j = take(counter)
    while j < schedule.shape[0]:
        t = schedule[j]
        _blend_tile(
            t, tiles_x, splats, rows, pairs, tile_start[t], tile_start[t + 1], masks, wanted[t], buffer, corner,
            background, planes, width, height, pitch, plane,
        )  # fmt: skip
        j = take(counter)


# 4. Backward


@njit(**_OPTIONS)
@no_type_check
def _load_gradient(image, x, y, width, height, stride_y, stride_x, offset, scratch):
    """A 4 x 4 block of one channel of a gradient in any layout; 0 outside the image."""
    i = offset + y * stride_y + x * stride_x
    if x + 4 <= width and y + 4 <= height:
        if stride_x == 1:
            return load_block(image, i, stride_y)
        return gather_block(image, i, stride_y, stride_x)
    for k in range(16):
        kx, ky = k & 3, k >> 2
        scratch[k] = image[i + ky * stride_y + kx * stride_x] if x + kx < width and y + ky < height else np.float32(0)
    return load(scratch, 0)


@njit(**_OPTIONS)
@no_type_check
def _blend_tile_back(
    tile, tiles_x, splats, rows, pairs, start, end, masks, buffer, corner, planes, rgb_grad, rgb_strides, alpha_grad,
    alpha_strides, slots, width, height, pitch, plane,
):  # fmt: skip
    ox, oy = (tile % tiles_x) * TILE, (tile // tiles_x) * TILE
    tile_x, tile_y = np.float32(ox), np.float32(oy)
    scratch = np.empty(16, np.float32)
    for b in range(BLOCKS):
        bx, by = 4 * (b & 7), 4 * (b >> 3)
        x, y = ox + bx, oy + by
        q = y * pitch + x
        o = 80 * b
        corner[2 * b], corner[2 * b + 1] = np.float32(bx), np.float32(by)
        inside = (block_x() < np.float32(width - x)) & (block_y() < np.float32(height - y))
        red = _load_gradient(rgb_grad, x, y, width, height, rgb_strides[1], rgb_strides[2], _0, scratch)
        green = _load_gradient(rgb_grad, x, y, width, height, rgb_strides[1], rgb_strides[2], rgb_strides[0], scratch)
        blue = _load_gradient(
            rgb_grad, x, y, width, height, rgb_strides[1], rgb_strides[2], 2 * rgb_strides[0], scratch
        )
        # Everything is behind the first Gaussian. alpha = 1 - T at the end, so its gradient pulls on the last T only.
        behind = red * load_block(planes, q, pitch) + green * load_block(planes, q + plane, pitch)
        behind += blue * load_block(planes, q + 2 * plane, pitch)
        alpha = _load_gradient(alpha_grad, x, y, width, height, alpha_strides[0], alpha_strides[1], _0, scratch)
        behind -= alpha * (1.0 - load_block(planes, q + 3 * plane, pitch))
        store(buffer, o, where(inside, 1.0, -1.0))
        store(buffer, o + 16, behind)
        store(buffer, o + 32, red)
        store(buffer, o + 48, green)
        store(buffer, o + 64, blue)
    zero = vector(np.float32(0.0))
    for p in range(start, end):
        ahead = min(p + 8, end - 1)
        prefetch(rows, ROW * np.int64(pairs[ahead, 0]))
        prefetch(slots, ROW * np.int64(pairs[ahead, 1]))
        slot = ROW * np.int64(pairs[p, 1])
        m = masks[p]
        if m == _NONE:
            store(slots, slot, zero)
            continue
        g = splats[pairs[p, 0]]
        dx0, dy0 = block_x() + (tile_x - g[X]), block_y() + (tile_y - g[Y])
        xx, xy, yy, log_opacity = g[XX], g[XY], g[YY], g[LOG_OPACITY]
        red, green, blue = g[RED], g[GREEN], g[BLUE]
        s = sx = sy = sxx = sxy = syy = s_red = s_green = s_blue = zero
        while m != _NONE:
            b = np.int64(trailing_zeros(m))
            m &= m - _BIT
            o = 80 * b
            dx, dy = dx0 + load_scalar(corner, 2 * b), dy0 + load_scalar(corner, 2 * b + 1)
            power = dx * (dx * xx + dy * xy) + (dy * dy * yy + log_opacity)
            unclipped = _exp_of_visible(maximum(power, vector(_LOG_ALPHA_MIN)))
            alpha = where(power >= _LOG_ALPHA_MIN, minimum(unclipped, vector(_ALPHA_MAX)), 0.0)
            T = load(buffer, o)
            weight = alpha * T
            left = T - weight
            goes_on = left > _TRANSMITTANCE_MIN
            weight = where(goes_on, weight, 0.0)
            store(buffer, o, where(goes_on, left, -vabs(T)))
            g_red, g_green, g_blue = load(buffer, o + 32), load(buffer, o + 48), load(buffer, o + 64)
            own = g_red * red + g_green * green + g_blue * blue
            behind = load(buffer, o + 16) - weight * own
            store(buffer, o + 16, behind)
            d_log_alpha = alpha * (T * own - quotient(behind, 1.0 - alpha))
            d_log_alpha = where(goes_on & (unclipped < _ALPHA_MAX), d_log_alpha, 0.0)
            qx, qy = d_log_alpha * dx, d_log_alpha * dy
            s += d_log_alpha
            sx += qx
            sy += qy
            sxx += qx * dx
            sxy += qx * dy
            syy += qy * dy
            s_red += weight * g_red
            s_green += weight * g_green
            s_blue += weight * g_blue
        store(slots, slot, lane_sums_of_8(s, sx, sy, sxx, sxy, syy, s_red, s_green))
        slots[slot + 8] = lane_sum(s_blue)


@njit(**_OPTIONS)
@no_type_check
def _blend_back(
    counter, schedule, tiles_x, tile_start, splats, rows, pairs, masks, planes, rgb_grad, rgb_strides, alpha_grad,
    alpha_strides, slots, width, height, pitch, plane,
):  # fmt: skip
    buffer, corner = np.empty(80 * BLOCKS, np.float32), np.empty(2 * BLOCKS, np.float32)
    j = take(counter)
    while j < schedule.shape[0]:
        t = schedule[j]
        if tile_start[t + 1] > tile_start[t]:
            _blend_tile_back(
                t, tiles_x, splats, rows, pairs, tile_start[t], tile_start[t + 1], masks, buffer, corner, planes,
                rgb_grad, rgb_strides, alpha_grad, alpha_strides, slots, width, height, pitch, plane,
            )  # fmt: skip
        j = take(counter)


@njit(**_OPTIONS)
@no_type_check
def _project_16_back(
    means, log_scales, quats, logits, i, view, lens, rows, radii, first_slot, slots, o, count, scratch,
    d_means, d_log_scales, d_quats, d_logits, d_colors, d_means2d, pose, to,
):  # fmt: skip
    """Gradients of Gaussians i .. i + 15, `count` of them real, into rows `to` ..; projections are rows o .. o + 15.

    `pose` (12 x 16) receives, lane by lane, the sums of the gradient of V and the translation; None: not needed.
    """
    for l in range(16):
        total = vector(np.float32(0.0))
        if l < count:
            for slot in range(first_slot[o + l], first_slot[o + l + 1]):
                total += load(slots, ROW * slot)
        store(scratch, ROW * l, total)
    s, sx, sy, sxx, sxy, syy, s_red, s_green, s_blue, _, _, _, _, _, _, _ = load_rows_of_16(scratch, 0)
    _, _, xx, xy, yy, _, _, _, _, _, _, _, _, _, _, _ = load_rows_of_16(rows, ROW * o)
    store_rows_of_3(d_colors, 3 * to, (s_red, s_green, s_blue))
    store(d_logits, to, s / (1.0 + vexp(load(logits, i))))  # d ln sigmoid(o) / do = 1 - sigmoid(o)

    # What is not seen may hold infinities; its gradients are 0, and the arithmetic below is kept finite.
    seen = load(radii, o) > 0.0
    mx, my, mz = load_rows_of_3(means, 3 * i)
    x = where(seen, mx * view[0] + my * view[1] + mz * view[2] + view[3], 0.0)
    y = where(seen, mx * view[4] + my * view[5] + mz * view[6] + view[7], 0.0)
    z = where(seen, mx * view[8] + my * view[9] + mz * view[10] + view[11], 1.0)
    A, B, C = where(seen, xx * -2.0, 1.0), where(seen, -xy, 0.0), where(seen, yy * -2.0, 1.0)
    rotation, qw, qx, qy, qz, normalise = _rotation(quats, i)
    s0, s1, s2 = load_rows_of_3(log_scales, 3 * i)
    s0, s1, s2 = where(seen, vexp(s0), 0.0), where(seen, vexp(s1), 0.0), where(seen, vexp(s2), 0.0)
    (near, jx, jy), (j00, j02, j11, j12), (t00, t01, t02, t10, t11, t12), (p00, p01, p02, p10, p11, p12) = (
        _projected_axes(view, lens, x, y, z, rotation)
    )
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = rotation

    # To the projected mean and, through the inverse, to Sigma' = [[a b] [b c]].
    du, dv = A * sx + B * sy, B * sx + C * sy
    store_rows_of_2(d_means2d, 2 * to, (du, dv))
    dA, dB, dC = sxx * -0.5, sxy * -0.5, syy * -0.5
    m00, m01, m10, m11 = dA * A + dB * B, dA * B + dB * C, dB * A + dC * B, dB * B + dC * C
    da, db, dc = -(A * m00 + B * m10), -(A * m01 + B * m11), -(B * m01 + C * m11)

    # Sigma' = U U^T + 0.3 I with U = P S, P = T R, T = J V.
    u00, u01, u02, u10, u11, u12 = p00 * s0, p01 * s1, p02 * s2, p10 * s0, p11 * s1, p12 * s2
    d00, d01, d02 = 2.0 * (da * u00 + db * u10), 2.0 * (da * u01 + db * u11), 2.0 * (da * u02 + db * u12)
    d10, d11, d12 = 2.0 * (db * u00 + dc * u10), 2.0 * (db * u01 + dc * u11), 2.0 * (db * u02 + dc * u12)
    store_rows_of_3(d_log_scales, 3 * to, (d00 * u00 + d10 * u10, d01 * u01 + d11 * u11, d02 * u02 + d12 * u12))
    d00, d01, d02, d10, d11, d12 = d00 * s0, d01 * s1, d02 * s2, d10 * s0, d11 * s1, d12 * s2
    g00, g01, g02 = t00 * d00 + t10 * d10, t00 * d01 + t10 * d11, t00 * d02 + t10 * d12  # to R
    g10, g11, g12 = t01 * d00 + t11 * d10, t01 * d01 + t11 * d11, t01 * d02 + t11 * d12
    g20, g21, g22 = t02 * d00 + t12 * d10, t02 * d01 + t12 * d11, t02 * d02 + t12 * d12
    e00, e01, e02 = (
        d00 * r00 + d01 * r01 + d02 * r02,
        d00 * r10 + d01 * r11 + d02 * r12,
        d00 * r20 + d01 * r21 + d02 * r22,
    )  # to T
    e10, e11, e12 = (
        d10 * r00 + d11 * r01 + d12 * r02,
        d10 * r10 + d11 * r11 + d12 * r12,
        d10 * r20 + d11 * r21 + d12 * r22,
    )

    # To the quaternion, through its normalisation.
    dw = 2.0 * (qx * (g21 - g12) + qy * (g02 - g20) + qz * (g10 - g01))
    dx = 2.0 * (qy * (g01 + g10) + qz * (g02 + g20) + qw * (g21 - g12) - 2.0 * qx * (g11 + g22))
    dy = 2.0 * (qx * (g01 + g10) + qz * (g12 + g21) + qw * (g02 - g20) - 2.0 * qy * (g00 + g22))
    dz = 2.0 * (qx * (g02 + g20) + qy * (g12 + g21) + qw * (g10 - g01) - 2.0 * qz * (g00 + g11))
    along = dw * qw + dx * qx + dy * qy + dz * qz
    dw, dx, dy, dz = dw - along * qw, dx - along * qx, dy - along * qy, dz - along * qz
    store_rows_of_4(d_quats, 4 * to, (dw * normalise, dx * normalise, dy * normalise, dz * normalise))

    # To the point in the camera's frame, through mean and J. Where x / z is clamped at the margin, J ignores it.
    dj00, dj02 = e00 * view[0] + e01 * view[1] + e02 * view[2], e00 * view[8] + e01 * view[9] + e02 * view[10]
    dj11, dj12 = e10 * view[4] + e11 * view[5] + e12 * view[6], e10 * view[8] + e11 * view[9] + e12 * view[10]
    fx, fy = lens[0], lens[1]
    near2 = near * near
    djx = where((x * near > lens[4]) & (x * near < lens[5]), dj02 * j00 * -1.0, 0.0)
    djy = where((y * near > lens[6]) & (y * near < lens[7]), dj12 * j11 * -1.0, 0.0)
    dx = (du * fx + djx) * near
    dy = (dv * fy + djy) * near
    dz = -(dx * x + dy * y) * near - (dj00 * fx + dj11 * fy) * near2 + (dj02 * jx * fx + dj12 * jy * fy) * near2
    dmx = dx * view[0] + dy * view[4] + dz * view[8]
    dmy = dx * view[1] + dy * view[5] + dz * view[9]
    dmz = dx * view[2] + dy * view[6] + dz * view[10]
    store_rows_of_3(d_means, 3 * to, (dmx, dmy, dmz))

    if pose.shape[0] > 0:
        sums = (
            dx * mx + j00 * e00, dx * my + j00 * e01, dx * mz + j00 * e02, dx,
            dy * mx + j11 * e10, dy * my + j11 * e11, dy * mz + j11 * e12, dy,
            dz * mx + j02 * e00 + j12 * e10, dz * my + j02 * e01 + j12 * e11, dz * mz + j02 * e02 + j12 * e12, dz,
        )  # fmt: skip
        _add_pose(pose, sums)


@njit(inline="always", **_OPTIONS)
@no_type_check
def _add_pose(pose, sums):
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11 = sums
    store(pose, 0, load(pose, 0) + s0)
    store(pose, 16, load(pose, 16) + s1)
    store(pose, 32, load(pose, 32) + s2)
    store(pose, 48, load(pose, 48) + s3)
    store(pose, 64, load(pose, 64) + s4)
    store(pose, 80, load(pose, 80) + s5)
    store(pose, 96, load(pose, 96) + s6)
    store(pose, 112, load(pose, 112) + s7)
    store(pose, 128, load(pose, 128) + s8)
    store(pose, 144, load(pose, 144) + s9)
    store(pose, 160, load(pose, 160) + s10)
    store(pose, 176, load(pose, 176) + s11)


@njit(**_OPTIONS)
@no_type_check
def _keep_first(rows, padded, width, i):
    """The reverse of `_last_rows`."""
    for k in range(width * i, rows.shape[0]):
        rows[k] = padded[k - width * i]


@njit(**_OPTIONS)
@no_type_check
def _project_back(
    counter, means, log_scales, quats, logits, view, lens, rows, radii, first_slot, slots,
    d_means, d_log_scales, d_quats, d_logits, d_colors, d_means2d, pose_sums,
):  # fmt: skip
    n = logits.shape[0]
    scratch = np.empty(ROW * 16, np.float32)
    nothing = np.empty(0, np.float32)
    chunk = take(counter)
    while chunk * CHUNK < n:
        pose = pose_sums[chunk] if pose_sums.shape[0] > 0 else nothing
        for i in range(chunk * CHUNK, min(n, (chunk + 1) * CHUNK), 16):
            if i + 16 <= n:
                _project_16_back(
                    means, log_scales, quats, logits, i, view, lens, rows, radii, first_slot, slots, i,
                    min(16, n - i), scratch,
                    d_means, d_log_scales, d_quats, d_logits, d_colors, d_means2d, pose, i,
                )  # fmt: skip
            else:
                t3, t3s, t4, t1 = (
                    np.empty(48, np.float32),
                    np.empty(48, np.float32),
                    np.empty(64, np.float32),
                    np.empty(16, np.float32),
                )
                t3c, t2 = np.empty(48, np.float32), np.empty(32, np.float32)
                _project_16_back(
                    _last_rows(means, _3, i), _last_rows(log_scales, _3, i), _last_rows(quats, _4, i),
                    _last_rows(logits, _1, i), _0,
                    view, lens, rows, radii, first_slot, slots, i, n - i, scratch, t3, t3s, t4, t1, t3c, t2, pose, _0,
                )  # fmt: skip
                _keep_first(d_means, t3, _3, i)
                _keep_first(d_log_scales, t3s, _3, i)
                _keep_first(d_quats, t4, _4, i)
                _keep_first(d_logits, t1, _1, i)
                _keep_first(d_colors, t3c, _3, i)
                _keep_first(d_means2d, t2, _2, i)
        chunk = take(counter)


# Around the kernels


class _Buffers:
    """Working memory of a rendering, reused by the next: fresh pages would cost as much as the blending."""

    def __init__(self):
        self.arrays: dict[str, np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype) -> np.ndarray:
        size = int(np.prod(shape))
        array = self.arrays.get(name)
        if array is None or array.size < size:
            array = self.arrays[name] = np.empty(size + size // 4, dtype)
        return array[:size].reshape(shape)


_free: list[_Buffers] = []


class _Lease:
    """Holds buffers as long as a rendering's graph lives, so two renderings in flight never share them."""

    def __init__(self):
        try:
            self.buffers = _free.pop()
        except IndexError:
            self.buffers = _Buffers()

    def __del__(self, free=_free):  # bound early: the module may be gone when the interpreter ends
        if len(free) < 4:
            free.append(self.buffers)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().reshape(-1)


def _any_layout(tensor: Tensor) -> np.ndarray:
    """The memory that a strided tensor spans, flat, from its first element."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((span,), (1,)).numpy()


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, means, log_scales, quats, logits, colors, T_camera_head, background, K, width, height, stats, wanted
    ):
        n = means.shape[0]
        rows = -(-n // 16) * 16
        tiles_x, tiles_y = -(-width // TILE), -(-height // TILE)
        pitch, plane = tiles_x * TILE, tiles_x * tiles_y * TILE * TILE
        lease = _Lease()
        get = lease.buffers.get

        fx, fy, cx, cy = (float(K[i, j]) for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
        margin_x, margin_y = FIELD_MARGIN * width / 2, FIELD_MARGIN * height / 2
        field = (
            -(cx + margin_x) / fx,
            (width - cx + margin_x) / fx,
            -(cy + margin_y) / fy,
            (height - cy + margin_y) / fy,
        )
        lens = np.array([fx, fy, cx, cy, *field], np.float32)
        view = _flat(T_camera_head)[:12]
        inputs = [_flat(t) for t in (means, log_scales, quats, logits)]

        splats = get("splats", (rows, ROW), np.float32)
        depths = get("depths", (rows,), np.float32)
        boxes = get("boxes", (rows, 4), np.int32)
        radii = torch.empty(rows)
        pieces = -(-n // CHUNK)
        run_on_threads(
            _project,
            pieces,
            *inputs,
            _flat(colors),
            view,
            lens,
            width,
            height,
            splats.reshape(-1),
            depths,
            _flat(radii),
            boxes,
        )

        first_slot = get("first_slot", (n + 1,), np.int64)
        tile_start = get("tile_start", (tiles_x * tiles_y + 1,), np.int64)
        keys = depths.view(np.uint32)  # the bits of a positive float grow with it
        touching, total, least, most = _count_pairs(boxes, keys, n, tiles_x, first_slot, tile_start)
        _check_room(total, n, width, height)
        # full tiles first, so that the threads finish together
        schedule = np.argsort(-np.diff(tile_start), kind="stable")
        order = get("order", (touching,), np.uint64)
        order = _order_by_depth(boxes, keys, n, least, most, order, get("other_order", (touching,), np.uint64))
        pairs, masks = get("pairs", (total, 2), np.int32), get("masks", (total,), np.uint64)
        _fill_tiles(boxes, order, touching, first_slot, tiles_x, tile_start, pairs)

        planes = torch.empty(4, tiles_y * TILE, tiles_x * TILE)
        tiling = (schedule, tiles_x, tile_start, splats, splats.reshape(-1), pairs, masks)
        size = (width, height, pitch, plane)
        blocks = _wanted_blocks(wanted, tiles_x, tiles_y)
        run_on_threads(_blend, len(schedule), *tiling, blocks, _flat(background), _flat(planes), *size)

        if stats is not None:
            stats.radii_px = radii[:n].clone()
        ctx.save_for_backward(means, log_scales, quats, logits, T_camera_head, planes)
        ctx.set_materialize_grads(False)
        ctx.state = (lease, view, lens, radii, first_slot, tiling, size, pieces, total, stats)
        return planes[:3, :height, :width].permute(1, 2, 0), planes[3, :height, :width]

    @staticmethod
    def backward(ctx, rgb_grad, alpha_grad):
        means, log_scales, quats, logits, T_camera_head, planes = ctx.saved_tensors
        lease, view, lens, radii, first_slot, tiling, size, pieces, total, stats = ctx.state
        width, height = size[:2]
        n = means.shape[0]
        rgb_grad = torch.zeros(1).expand(height, width, 3) if rgb_grad is None else rgb_grad
        alpha_grad = torch.zeros(1).expand(height, width) if alpha_grad is None else alpha_grad
        by_channel = rgb_grad.permute(2, 0, 1)
        gradients = (
            _any_layout(by_channel), np.array(by_channel.stride(), np.int64),
            _any_layout(alpha_grad), np.array(alpha_grad.stride(), np.int64)
        )  # fmt: skip
        slots = lease.buffers.get("slots", (total * ROW,), np.float32)
        run_on_threads(_blend_back, len(tiling[0]), *tiling, _flat(planes), *gradients, slots, *size)

        out = [torch.empty_like(t) for t in (means, log_scales, quats, logits)] + [torch.empty(n, 3), torch.empty(n, 2)]
        pose_sums = np.zeros((pieces if ctx.needs_input_grad[5] else 0, 12 * 16), np.float32)
        inputs = [_flat(t) for t in (means, log_scales, quats, logits)]
        run_on_threads(
            _project_back,
            pieces,
            *inputs,
            view,
            lens,
            tiling[4],
            _flat(radii),
            first_slot,
            slots,
            *(_flat(t) for t in out),
            pose_sums,
        )
        if stats is not None:
            stats.grad_means2d = out[5]
        d_pose = d_background = None
        if ctx.needs_input_grad[5]:
            d_pose = torch.zeros_like(T_camera_head)
            d_pose[:3] = torch.from_numpy(pose_sums.sum(0, dtype=np.float64).reshape(12, 16).sum(1).reshape(3, 4))
        if ctx.needs_input_grad[6]:
            d_background = (rgb_grad * (1 - planes[3, :height, :width, None])).sum((0, 1))
        return *out[:5], d_pose, d_background, None, None, None, None, None


PAIR_BYTES = 80  # of a (Gaussian, tile) pair: 8 for the pair, 8 for its mask, 64 for its slot of gradients
ASK_BYTES = 1 << 29  # less than this is taken without asking how much is left, which reads a file


def _check_room(pairs: int, n: int, width: int, height: int) -> None:
    """Raise ResourceError where the pairs of a rendering will not fit, as when Gaussians cover the whole image."""
    if pairs * PAIR_BYTES > ASK_BYTES:
        doing = f"Rendering {n:,} Gaussians that cover {pairs / max(n, 1):.0f} tiles each at {width}x{height}"
        require_memory(
            pairs * PAIR_BYTES,
            doing,
            "They have grown too large or too many: use fewer, lower their learning rates, or a smaller image.",
        )


def _wanted_blocks(wanted: Bool[np.ndarray, "h w"] | None, tiles_x: int, tiles_y: int) -> UInt64[np.ndarray, "t"]:
    """For each tile, the bits of its blocks that hold a wanted pixel."""
    if wanted is None:
        return np.full(tiles_x * tiles_y, _ALL)
    whole = np.zeros((tiles_y * TILE, tiles_x * TILE), np.uint8)
    whole[: wanted.shape[0], : wanted.shape[1]] = wanted
    blocks = (whole.view(np.uint32).reshape(tiles_y, 8, 4, -1) != 0).any(2)  # four pixels a number
    rows = np.packbits(blocks.reshape(tiles_y, 8, tiles_x, 8), axis=3, bitorder="little")[..., 0]
    return np.ascontiguousarray(rows.transpose(0, 2, 1)).view("<u8").reshape(-1).astype(np.uint64)


def rasterize_cpu(
    gaussians: Gaussians,
    camera: Camera,
    background: Float[Tensor, "3"],
    stats=None,
    wanted: Bool[np.ndarray, "h w"] | None = None,
) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w"]]:
    """(rgb, alpha) of `hicode.render.rasterize`. rgb is planar in memory: `rgb.permute(2, 0, 1)` is contiguous.

    Tensors on another device are copied here and the result is copied back. InputError for types other than float32.
    """
    device = gaussians.means.device
    for name, tensor in gaussians.tensors().items():
        if tensor.dtype != torch.float32:
            raise InputError(
                f"gaussians.{name} is {tensor.dtype}; the cpu rasteriser reads float32. "
                "Convert it, or take backend='reference'."
            )
    tensors = [gaussians.means, gaussians.log_scales, gaussians.quats, gaussians.opacity_logits, gaussians.colors]
    tensors += [camera.T_camera_head, background]
    tensors = [t.to(device="cpu", dtype=torch.float32).contiguous() for t in tensors]
    rgb, alpha = _Rasterize.apply(*tensors, camera.K.detach().cpu(), camera.width, camera.height, stats, wanted)
    return rgb.to(device), alpha.to(device)
