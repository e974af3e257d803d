"""Head-background composition: the rendered head goes back into the video frame (HiCoDe, Eqs 17-18).

The head mask, dilated to reach past hair and an opening jaw, bounds what may change; outside it every pixel stays the
input's, exactly. On the head and a narrow rim, the *hidden* region, nothing of the input is read, so no true mouth can
leak into the result. Inside the dilated mask:

    fill   "h w 3"  the frame; in the hidden region the background plate, shifted smoothly to meet the frame at its
                    border. Where the two show different surfaces (a neck, a wall): the frame's colours, carried inwards
    plain  "h w 3"  rgb + (1 - alpha) fill: the alpha composite of the head, rendered over black
    output          weight (plain + residual) + (1 - weight) fill; weight falls from 1 to 0 within the mask's rim

The residual is the refiner's (`hicode.avatar.refiner`), or zero. By default the mask is that of the face alone
(`face_mask`): hair, ears and neck are then the frame's. Colours are floats in [0, 1] inside, uint8 at the edges.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, no_type_check, runtime_checkable

import cv2
import numba
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from hicode.avatar.film_grain import FilmGrainLayer

# Lengths as fractions of the image's larger side (the comments give px at 512).
REACH = 12 / 512  # of the dilated mask beyond the head: half for tracking error and hair, half for the feather
# of the hidden region beyond the head; beyond it hair and neck stay the frame's, which a plate would smear
HIDE = 4 / 512
FEATHER = 6 / 512  # width of the rim in which the composite fades into the fill
JAW_REACH = 6 / 512  # more reach downwards: the spoken jaw may open wider than the frame's. Not hidden
PLATE_GUARD = 3 / 512  # pixels this near to a head mask are no background (soft hair, motion blur)
FACE_REACH = 4 / 512  # of the face beyond its landmarks' hull: a smiling cheek
FACE_CUT = 8 / 512  # what a head mask may lack of the cheek at the cut of hanging hair
# A difference of frame and plate up to LIGHT (of 1, in every channel) is light; from SURFACE on, another surface.
LIGHT, SURFACE = 0.08, 0.25
CONTEXT = 16  # px of the input frame around the dilated mask that the refiner sees
STRIDE = 16  # the refiner's sides are multiples of this

Region = Literal["face", "head"]  # what of the rendered head goes into a frame of its pose
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in px, the last two exclusive

INPUT_CHANNELS = 11
RGB, ALPHA, SURROUND, FILL, WEIGHT = slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 10), slice(10, 11)


@runtime_checkable
class ResidualSource(Protocol):
    """A refiner (Eq. 18): `Compositor`."""

    def residual(self, layers: Float32[np.ndarray, "h w 11"]) -> Float32[np.ndarray, "h w 3"]:
        """What to add to the plain composite, from `PlainComposite.layers`."""
        ...


@dataclass(frozen=True, eq=False)
class BlendRegion:
    """What the head mask alone decides, inside a box of the frame.

    box    x0, y0, x1, y1 of the dilated mask and some context, px
    inside "bh bw" the dilated mask: what composition may change
    hidden "bh bw" what it must not read: the head and HIDE around it, without hair below its cut
    weight "bh bw" 1 on the head, 0 on the dilated mask's border and outside
    """

    box: Box
    inside: Bool[np.ndarray, "bh bw"]
    hidden: Bool[np.ndarray, "bh bw"]
    weight: Float32[np.ndarray, "bh bw"]

    @property
    def window(self) -> tuple[slice, slice]:
        """The box as an index of images."""
        x0, y0, x1, y1 = self.box
        return slice(y0, y1), slice(x0, x1)


@dataclass(frozen=True, eq=False)
class PlainComposite:
    """The composite before the refiner, within `region.box`.

    layers "bh bw 11": the refiner's input in [0, 1]: rgb, alpha, surround (frame, 0 in the hidden region), fill, weight
    """

    region: BlendRegion
    layers: Float32[np.ndarray, "bh bw 11"]

    @property
    def plain(self) -> Float32[np.ndarray, "bh bw 3"]:
        """rgb + (1 - alpha) fill."""
        return self.layers[..., RGB] + (1 - self.layers[..., ALPHA]) * self.layers[..., FILL]

    def output(self, residual: Float32[np.ndarray, "bh bw 3"] | float = 0.0) -> Float32[np.ndarray, "bh bw 3"]:
        """The box's final colours, valid within the dilated mask."""
        fill = self.layers[..., FILL]
        return fill + self.layers[..., WEIGHT] * (self.plain + residual - fill)


def dilate_mask(head_mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """What composition may change: 255 within REACH of the head (and JAW_REACH more downwards), 0 elsewhere."""
    return _full_size(head_mask, "inside")


def hidden_mask(head_mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The region of the input that composition does not read: 255 within `HIDE` of the head, 0 elsewhere."""
    return _full_size(head_mask, "hidden")


def _full_size(head_mask: np.ndarray, name: str) -> np.ndarray:
    out = np.zeros(head_mask.shape, np.uint8)
    region = blend_region(head_mask)
    if region is not None:
        out[region.window][getattr(region, name)] = 255
    return out


def blend_region(head_mask: UInt8[np.ndarray, "h w"]) -> BlendRegion | None:
    """The blend region of a head mask (soft, 0 … 255); None where the mask is empty."""
    box = blend_box(head_mask)
    if box is None:
        return None
    x0, y0, x1, y1 = box
    reach, hide, feather, jaw = (_px(length, head_mask) for length in (REACH, HIDE, FEATHER, JAW_REACH))
    distance = _distance_from_head(head_mask[y0:y1, x0:x1], jaw)
    weight = np.clip((reach - distance) / np.float32(feather), 0, 1)
    rim = max(3, 2 * round(hide) - 1)  # the diameter that leaves out what lies `hide` away and more
    head = cv2.threshold(head_mask[y0:y1, x0:x1], 127, 1, cv2.THRESH_BINARY)[1]
    hidden = cv2.dilate(head, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (rim, rim))) > 0
    hidden &= ~_hair_cut(head_mask[y0:y1, x0:x1], _px(1 / 512, head_mask))
    return BlendRegion(box, distance < reach, hidden, weight)


def blend_box(head_mask: UInt8[np.ndarray, "h w"]) -> Box | None:
    """The part of the frame that composition reads or changes; None where the mask is empty."""
    h, w = head_mask.shape
    x, y, width, height = cv2.boundingRect(cv2.threshold(head_mask, 127, 255, cv2.THRESH_BINARY)[1])
    if width == 0:
        return None
    margin, jaw = math.ceil(_px(REACH, head_mask)), math.ceil(_px(JAW_REACH, head_mask))
    x0, x1 = _span(max(0, x - margin), min(w, x + width + margin), w)
    y0, y1 = _span(max(0, y - margin), min(h, y + height + margin + jaw), h)
    return x0, y0, x1, y1


def _hair_cut(head_mask: UInt8[np.ndarray, "h w"], unit: float) -> np.ndarray:
    """Detects the straight lower cut through long hair, where the mask fades slowly downwards.

    The frame has the same hair there, so it is not hidden: a plate behind half a render would show as a line.
    `unit`: px per 1/512 of the image.
    """
    down, aside = max(1, round(3 * unit)), max(1, round(2 * unit))
    below = cv2.copyMakeBorder(head_mask, 0, down, 0, 0, cv2.BORDER_REPLICATE)[down:]
    fall = cv2.subtract(head_mask, below)  # saturates: 0 where it rises
    wide = cv2.copyMakeBorder(head_mask, 0, 0, aside, aside, cv2.BORDER_REPLICATE)
    # to twice the slope of `fall`
    across = cv2.convertScaleAbs(cv2.absdiff(wide[:, 2 * aside :], wide[:, : -2 * aside]), alpha=down / aside)
    per_px = down / unit
    return (head_mask <= 127) & (fall > 3 * per_px) & (fall < 24 * per_px) & (across < fall)


def plain_composite(
    rgb: Float[Tensor, "h w 3"] | np.ndarray,
    alpha: Float[Tensor, "h w"] | np.ndarray,
    frame: UInt8[np.ndarray, "h w 3"],
    plate: UInt8[np.ndarray, "h w 3"],
    region: BlendRegion,
    whole: bool = True,
) -> PlainComposite:
    """The alpha composite inside the region's box; `rgb` is rendered over black. The hidden region is not read.

    Not `whole`: inside the dilated mask alone, all that is shown without a refiner.
    """
    window = region.window
    h, w = region.inside.shape
    frame, plate = frame[window], plate[window]
    # The difference between frame and plate is carried smoothly inwards (a membrane, as in Poisson cloning).
    half = ((h + 1) // 2, (w + 1) // 2)
    light, around = np.empty((*half, 3), np.float32), np.empty((*half, 4), np.float32)
    of_light, known = np.empty(half, np.float32), np.empty(half, np.float32)
    _borders_halved(frame, plate, region.hidden, light, of_light, around, known)
    light, around = fill_smoothly(light, of_light), fill_smoothly(around, known)
    layers = np.empty((h, w, INPUT_CHANNELS), np.float32)
    pixels = np.ones_like(region.inside) if whole else region.inside
    _lay(
        _numpy(rgb)[window],
        _numpy(alpha)[window],
        frame,
        plate,
        pixels,
        region.hidden,
        region.weight,
        light,
        around,
        layers,
    )
    return PlainComposite(region, layers)


def compose(
    rgb: Float[Tensor, "h w 3"] | np.ndarray,
    alpha: Float[Tensor, "h w"] | np.ndarray,
    frame: UInt8[np.ndarray, "h w 3"],
    head_mask: UInt8[np.ndarray, "h w"] | BlendRegion,
    plate: UInt8[np.ndarray, "h w 3"],
    refiner: ResidualSource | None = None,
    grain: FilmGrainLayer | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The final frame: the head rendered over black (`rgb`, `alpha`) pasted into `frame` within the dilated head mask.

    Pixels outside the dilated mask are the frame's, bit for bit. Those of the hidden region are not read. Without a
    refiner, the plain composite with a feathered edge. An empty mask gives the frame back. Film grain is added times
    alpha. The mask may be given as its `blend_region`.
    """
    region = head_mask if isinstance(head_mask, BlendRegion) else blend_region(head_mask)
    out = frame.copy()
    if region is not None:
        composite = plain_composite(rgb, alpha, frame, plate, region, whole=refiner is not None)
        residual = np.zeros((0, 0, 3), np.float32) if refiner is None else refiner.residual(composite.layers)
        field, scale, lips = np.zeros((0, 0), np.uint8), 0.0, np.ones(4, np.float32)
        if grain is not None:
            field, scale = grain.field[region.window], grain.scale
            lips = grain.lips - np.array([*region.box[:2], 0, 0], np.float32)
        _paste(composite.layers, residual, region.inside, field, np.float32(scale), lips, out[region.window])
    return out


def face_room(head_mask: UInt8[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where a face may be, by the head mask alone. Without its soft edges: `_hair_cut` must not find a slope."""
    return _grown(head_mask, FACE_CUT) > 127


def face_mask(room: Bool[np.ndarray, "h w"], *faces_px: Float[np.ndarray, "l 2"]) -> UInt8[np.ndarray, "h w"]:
    """The head mask (its `face_room`) around the convex hull of faces' landmarks (px)."""
    return np.where(room, _face_hull(room, np.concatenate(faces_px)), np.uint8(0))


def with_whole_face(head_mask: UInt8[np.ndarray, "h w"], face_px: Float[np.ndarray, "l 2"]) -> UInt8[np.ndarray, "h w"]:
    """The head mask joined with the face (landmarks in px): no background is taken from it."""
    return np.maximum(head_mask, _face_hull(head_mask, face_px))


def _face_hull(image: np.ndarray, points: Float[np.ndarray, "l 2"]) -> UInt8[np.ndarray, "h w"]:
    """The hull of a face's landmarks, grown by FACE_REACH."""
    fraction = 4  # bits of a pixel that OpenCV reads
    hull, face = cv2.convexHull(points.astype(np.float32)), np.zeros(image.shape[:2], np.uint8)
    cv2.fillConvexPoly(face, np.round((hull - 0.5) * (1 << fraction)).astype(np.int32), 255, cv2.LINE_AA, fraction)
    # Nothing reaches further than this: dilation of the rest would be of zeros.
    reach = 2 + math.ceil(_px(FACE_REACH, face))
    (x0, y0), (x1, y1) = np.floor(points.min(0)) - 2 * reach, np.ceil(points.max(0)) + 2 * reach
    part = np.s_[max(0, int(y0)) : max(0, int(y1)), max(0, int(x0)) : max(0, int(x1))]
    if face[part].size:
        face[part] = _grown_by(face[part], _px(FACE_REACH, face))
    return face


def _grown(mask: np.ndarray, reach: float) -> np.ndarray:
    return _grown_by(mask, _px(reach, mask))


def _grown_by(mask: np.ndarray, reach_px: float) -> np.ndarray:
    side = 2 * round(reach_px) + 1
    return cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))


@numba.njit(cache=True, nogil=True)
@no_type_check  # Numba must compile the function itself, not a checked wrapper
def _borders_halved(frame, plate, hidden, light, of_light, around, known):
    """Means over the readable pixels of each 2 x 2 block; `known` "h2 w2" is 1 where there is one.

    around   "h2 w2 4" mean colour, and how surely another surface than the plate's is seen, 0 … 1
    of_light "h2 w2"   one minus the latter
    light    "h2 w2 3" mean difference from the plate, times `of_light`
    """
    h, w = hidden.shape
    light[:], of_light[:], around[:], known[:] = 0, 0, 0, 0
    zero, one, total = np.float32(0), np.float32(1), np.zeros(6, np.float32)
    for i in range(known.shape[0]):
        for j in range(known.shape[1]):
            count = 0
            total[:] = 0  # frame RGB, then plate RGB
            for y in range(2 * i, min(2 * i + 2, h)):
                for x in range(2 * j, min(2 * j + 2, w)):
                    if not hidden[y, x]:
                        count += 1
                        for c in range(3):
                            total[c] += np.float32(frame[y, x, c])
                            total[3 + c] += np.float32(plate[y, x, c])
            if count:
                scale = one / np.float32(255 * count)
                size = zero
                for c in range(3):
                    size = max(size, abs(total[c] - total[3 + c]) * scale)
                other = min(max((size - np.float32(LIGHT)) * np.float32(1 / (SURFACE - LIGHT)), zero), one)
                known[i, j], of_light[i, j], around[i, j, 3] = one, one - other, other
                for c in range(3):
                    around[i, j, c] = total[c] * scale
                    light[i, j, c] = (total[c] - total[3 + c]) * scale * (one - other)


@numba.njit(cache=True, nogil=True, fastmath={"nsz", "contract"}, error_model="numpy")
@no_type_check
def _lay(  # noqa: PLR0913 (a kernel takes its arrays one by one)
    rgb, alpha, frame, plate, pixels, hidden, weight, light, around, layers
):
    """Writes `PlainComposite.layers` in one pass. In the hidden region the fill is made of the plate and the two
    membranes, which are read bilinearly from half resolution."""
    h, w = hidden.shape
    one, zero, scale = np.float32(1), np.float32(0), np.float32(1 / 255)
    most, least = np.float32(0.75), np.float32(0.25)
    width = light.shape[1]
    lit, near_by = np.empty((width, 3), np.float32), np.empty((width, 4), np.float32)
    for y in range(h):
        # Half-resolution pixel i is centred on 2 i + 0.5: full-resolution rows lie a quarter of the way between.
        near = y // 2
        far = min(max(near + (1 if y % 2 else -1), 0), light.shape[0] - 1)
        for x in range(width):
            for c in range(3):
                lit[x, c] = most * light[near, x, c] + least * light[far, x, c]
            for c in range(4):
                near_by[x, c] = most * around[near, x, c] + least * around[far, x, c]
        for x in range(w):
            if not pixels[y, x]:
                continue
            out = layers[y, x]
            for c in range(3):
                out[c] = min(max(np.float32(rgb[y, x, c]), zero), one)
            out[3] = min(max(np.float32(alpha[y, x]), zero), one)
            if hidden[y, x]:
                left = x // 2
                right = min(max(left + (1 if x % 2 else -1), 0), width - 1)
                other = most * near_by[left, 3] + least * near_by[right, 3]
                for c in range(3):
                    value = plate[y, x, c] * scale + most * lit[left, c] + least * lit[right, c]
                    value += other * (most * near_by[left, c] + least * near_by[right, c] - value)
                    out[4 + c] = zero
                    out[7 + c] = min(max(value, zero), one)
            else:
                for c in range(3):
                    out[4 + c] = out[7 + c] = frame[y, x, c] * scale
            out[10] = weight[y, x]


@numba.njit(cache=True, nogil=True, fastmath={"nsz", "contract"}, error_model="numpy")
@no_type_check
def _paste(layers, residual, inside, field, scale, lips, out):
    """`PlainComposite.output`, rounded, into the inside pixels of `out`. `residual` "h w 3" or empty for 0. The film
    grain's `field` (or an empty one) times `scale` is added, times alpha, fading within the ellipse `lips`."""
    h, w = inside.shape
    zero, one, most = np.float32(0), np.float32(1), np.float32(255)
    extra = np.zeros((w, 3), np.float32)  # a row of the residual
    grain = np.zeros(w, np.float32)  # a row of the film grain
    across, down = np.float32(2) / (lips[2] * lips[2]), np.float32(2) / (lips[3] * lips[3])
    for y in range(h):
        if residual.shape[0] > 0:
            extra[:] = residual[y]
        if field.shape[0] > 0:
            height = down * (np.float32(y) - lips[1]) * (np.float32(y) - lips[1]) - one
            levels = field[y]
            for x in range(w):
                dx = np.float32(x) - lips[0]
                grain[x] = (
                    scale * min(max(across * dx * dx + height, zero), one) * (np.float32(levels[x]) - np.float32(128))
                )
        for x in range(w):
            if inside[y, x]:
                weight, alpha = layers[y, x, 10], layers[y, x, 3]
                more = alpha * grain[x]
                for c in range(3):
                    fill = layers[y, x, 7 + c]
                    value = (fill + weight * (layers[y, x, c] + extra[x, c] + more - alpha * fill)) * most + np.float32(
                        0.5
                    )
                    out[y, x, c] = np.uint8(np.int32(min(max(value, zero), most)))


def estimate_background(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]], head_masks: Iterable[UInt8[np.ndarray, "h w"]], max_frames: int = 48
) -> UInt8[np.ndarray, "h w 3"]:
    """The background plate: the median of what is seen outside the head; holes never seen are filled smoothly.

    At least `max_frames` evenly spread frames are used where there are as many. Give training frames only, one or more.
    """
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    stride = 1
    for t, (frame, mask) in enumerate(zip(frames, head_masks, strict=True)):
        if t % stride:
            continue
        far = _distance_from_head(mask, _px(JAW_REACH, mask)) >= _px(PLATE_GUARD, mask)
        kept.append((frame.copy(), far & (mask < 8)))  # the soft edge is part head, however small the picture
        if len(kept) == 2 * max_frames:
            kept, stride = kept[::2], 2 * stride
    assert kept, "no frame to take a background from"
    seen = np.stack([known for _, known in kept])
    count = seen.sum(0)
    # Sorting with the unseen last puts the median of the seen ones at half their count.
    values = np.stack([np.where(known[..., None], frame.astype(np.int16), 256) for frame, known in kept])
    values.sort(axis=0)
    middle = np.maximum(count - 1, 0)
    low = np.take_along_axis(values, (middle // 2)[None, ..., None], 0)[0]
    high = np.take_along_axis(values, ((middle + 1) // 2)[None, ..., None], 0)[0]
    known = (count > 0).astype(np.float32)
    median = (low + high).astype(np.float32) / 2 * known[..., None]
    return np.clip(fill_smoothly(median, known) + 0.5, 0, 255).astype(np.uint8)


def fill_smoothly(
    values: Float32[np.ndarray, "h w c"], known: Float32[np.ndarray, "h w"]
) -> Float32[np.ndarray, "h w c"]:
    """Fill holes by a push-pull pyramid (Gortler et al. 1996): exact where `known` is 1, smooth where it is 0.

    `values` are premultiplied by `known`. With nothing known, zeros. At most four channels (OpenCV's resize).
    """
    h, w = known.shape
    if known.min() >= 1:
        return values
    if max(h, w) <= 2:
        total = known.sum()
        mean = values.sum((0, 1)) / total if total > 0 else np.zeros(values.shape[-1], np.float32)
        return values + (1 - known)[..., None] * mean
    half = ((w + 1) // 2, (h + 1) // 2)
    weight = cv2.resize(known, half, interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(values, half, interpolation=cv2.INTER_AREA).reshape(half[1], half[0], -1)
    some = (weight > 0).astype(np.float32)
    coarse = fill_smoothly(coarse * (some / np.maximum(weight, 1e-6))[..., None], some)
    fine = cv2.resize(coarse, (w, h), interpolation=cv2.INTER_LINEAR).reshape(h, w, -1)
    return values + (1 - known)[..., None] * fine


def _distance_from_head(head_mask: np.ndarray, jaw_px: float) -> np.ndarray:
    """Distance of each pixel from the head (px), which reaches `jaw_px` further down. Infinite for an empty mask."""
    head = cv2.threshold(head_mask, 127, 1, cv2.THRESH_BINARY)[1]
    if not head.any():
        return np.full(head.shape, np.inf, np.float32)
    down = max(1, round(jaw_px))
    column = np.ones((down + 1, 1), np.uint8)
    head = cv2.dilate(head, column, anchor=(0, down))  # the anchor at the kernel's end: the mask grows downwards only
    return cv2.distanceTransform(1 - head, cv2.DIST_L2, cv2.DIST_MASK_5)


def _px(fraction: float, image: np.ndarray) -> float:
    return fraction * max(image.shape[:2])


def _span(low: int, high: int, size: int) -> tuple[int, int]:
    """[low, high) with context, on the refiner's grid, clipped to [0, size)."""
    low = max(0, (low - CONTEXT) // STRIDE * STRIDE)
    high = min(size, -(-(high + CONTEXT) // STRIDE) * STRIDE)
    return int(low), int(high)


def _numpy(image: Tensor | np.ndarray) -> np.ndarray:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else image
