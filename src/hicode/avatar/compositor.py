"""Head-background composition (HiCoDe, "Head-background Composition", Eqs 17-18): the rendered head goes back into the video frame.

A frame is parted by its head mask, dilated to reach past hair and an opening jaw. Outside, every pixel stays the input's, exactly. On the head and a
narrow rim around it, the *hidden* region, nothing of the input is read, so no true mouth or head can leak into the result; below the level cut of hanging
hair the rim is left out, the hair there is the frame's own. What lies inside the dilated
mask is made of three things:

    fill   "h w 3"  in the hidden region the background plate, shifted smoothly so that it meets this frame at its border; the frame itself around it.
                    Where the two show different things there (a neck before the plate's wall), their difference is no light to carry on: added to a neck
                    that the plate does show, skin less wall is orange. There the frame's colours are carried inwards instead
    plain  "h w 3"  rgb + (1 - alpha) * fill, the alpha composite of the rendered head (`rgb` is rendered over black: premultiplied)
    output          weight * (plain + residual) + (1 - weight) * fill, `weight` falling from 1 to 0 within the mask's rim

Where the frame's head has the pose of the rendered one, less of it may go back: the face alone, with the mask that `face_mask` makes of the head's. Hair, ears and what hangs from them are the frame's then.

`residual` comes from a light U-Net whose last layer starts at zero: an untrained `Compositor` is the plain composite. As a generator it
sees [rgb, alpha, frame with the hidden region zeroed, fill, weight]; the fill and the two masks are additions to the paper's pair of
images. Colours are floats in [0, 1] inside, uint8 at the edges.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import cv2
import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from hicode.avatar.film_grain import FilmGrainLayer

# Lengths as fractions of the image's larger side (the comments give px at 512).
# How far the dilated mask goes beyond the head: half of it for tracking error and hair, half for the feather.
REACH = 12 / 512
# How far the input is hidden beyond the head: soft hair and a blurred edge. Between this and REACH the frame itself is the background, so that hair and neck
# that the mask cuts go on as they are; a plate there smears them.
HIDE = 4 / 512
FEATHER = 6 / 512  # width of the rim in which the composite fades into the fill
JAW_REACH = (
    6 / 512
)  # further reach downwards: the spoken jaw may open wider than the driving frame's. Not hidden: hiding the neck cost .9 dB of a frame
# Background this near to a head mask is not trusted (soft hair, motion blur). 6 px instead of 3 costs 1 dB of band (EdMarkey, held out).
PLATE_GUARD = 3 / 512
# Frame and plate that differ by up to LIGHT, of 1, in every channel differ in their light; by SURFACE and more in what they show.
LIGHT, SURFACE = 0.08, 0.25
# A face goes a little beyond its landmarks' hull: a smiling cheek does. And where hanging hair is cut, a head mask may lack some of the cheek beside it.
FACE_REACH, FACE_CUT = 4 / 512, 8 / 512
CONTEXT = 16  # px of the input frame around the dilated mask that the generator sees
STRIDE = 16  # the generator's sides are multiples of this

Region = Literal[
    "face", "head"
]  # what of the rendered head goes into a frame of its pose: the face (`face_mask`), or all of it
Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in px, the last two exclusive

INPUT_CHANNELS = 11
RGB, ALPHA, SURROUND, FILL, WEIGHT = slice(0, 3), slice(3, 4), slice(4, 7), slice(7, 10), slice(10, 11)


@dataclass(frozen=True)
class CompositorConfig:
    """The generator.

    filters: channels at half resolution; they double at each of three further levels.
    """

    filters: int = 16


@dataclass(frozen=True, eq=False)
class Seam:
    """Where the head goes: everything that the head mask alone decides, inside a box of the frame.

    box    (x0, y0, x1, y1)  the dilated mask's bounding box and some context, in px
    inside bool "bh bw"      the dilated mask: what composition may change
    hidden bool "bh bw"      what it must not read: the head and `HIDE` around it, but for hair below its cut
    weight float "bh bw"     1 on the head, 0 on the dilated mask's border and outside
    """

    box: Box
    inside: np.ndarray
    hidden: np.ndarray
    weight: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        x0, y0, x1, y1 = self.box
        return slice(y0, y1), slice(x0, x1)


@dataclass(frozen=True, eq=False)
class PlainComposite:
    """The composite before the generator, within `seam.box`.

    layers float32 "bh bw 11": what the generator sees, in [0, 1]: rgb, alpha, surround (the frame with the hidden region zeroed), fill,
    weight, in this order.
    """

    seam: Seam
    layers: np.ndarray

    @property
    def plain(self) -> Float32[np.ndarray, "bh bw 3"]:
        return self.layers[..., RGB] + (1 - self.layers[..., ALPHA]) * self.layers[..., FILL]

    def output(self, residual: Float32[np.ndarray, "bh bw 3"] | float = 0.0) -> Float32[np.ndarray, "bh bw 3"]:
        """The box's final colours; outside the dilated mask they are meaningless, the caller keeps the frame's."""
        fill = self.layers[..., FILL]
        return fill + self.layers[..., WEIGHT] * (self.plain + residual - fill)


class Compositor(nn.Module):
    """The generator of Eq. 18: a U-Net with additive skips, without normalisation, so a crop's result is the whole's (borders aside).

    Additive rather than concatenated skips: half the cost at full width for the same reach; 13 ms at 512² with 16 filters on two cores.
    """

    def __init__(self, config: CompositorConfig = CompositorConfig()):
        super().__init__()
        self.config = config
        self._packed: dict[str, tuple] | None = None
        c = config.filters
        self.down0 = nn.Conv2d(INPUT_CHANNELS, c, 4, 2, 1)
        self.down1 = nn.Conv2d(c, 2 * c, 4, 2, 1)
        self.down2 = nn.Conv2d(2 * c, 4 * c, 4, 2, 1)
        self.down3 = nn.Conv2d(4 * c, 8 * c, 4, 2, 1)
        self.bottom = nn.Conv2d(8 * c, 8 * c, 3, 1, 1)
        self.lift2, self.up2 = nn.Conv2d(8 * c, 4 * c, 1), nn.Conv2d(4 * c, 4 * c, 3, 1, 1)
        self.lift1, self.up1 = nn.Conv2d(4 * c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, 1, 1)
        self.lift0, self.up0 = nn.Conv2d(2 * c, c, 1), nn.Conv2d(c, c, 3, 1, 1)
        self.out = nn.Conv2d(c, 12, 3, 1, 1)  # four sub-pixels of RGB
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=0.2)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Float[Tensor, "b 11 h w"]) -> Float[Tensor, "b 3 h w"]:
        """The residual to add to the plain composite; any height and width."""
        h, w = x.shape[-2:]
        return F.pixel_shuffle(self._subpixels(x), 2)[..., :h, :w]

    def _subpixels(self, x: Float[Tensor, "b 11 h w"]) -> Float[Tensor, "b 12 h2 w2"]:
        """The residual's four sub-pixels a channel at half resolution, height and width filled up to multiples of `STRIDE`."""
        h, w = x.shape[-2:]
        if h % STRIDE or w % STRIDE:  # padding by nothing would copy
            x = F.pad(x, (0, -w % STRIDE, 0, -h % STRIDE))
        conv = self._convolution
        e0 = conv("down0", x)
        e1 = conv("down1", e0)
        e2 = conv("down2", e1)
        e3 = conv("down3", e2)
        d = e3 + conv("bottom", e3)
        d = conv("up2", _enlarged(conv("lift2", d, leaky=False)).add_(e2))
        d = conv("up1", _enlarged(conv("lift1", d, leaky=False)).add_(e1))
        d = conv("up0", _enlarged(conv("lift0", d, leaky=False)).add_(e0))
        return conv("out", d, leaky=False)

    def _convolution(self, name: str, x: Tensor, leaky: bool = True) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, *self._packed[name], *(("leaky_relu", [0.2], "") if leaky else ("none", [], ""))
            )
        y = getattr(self, name)(x)
        return F.leaky_relu(y, 0.2, inplace=True) if leaky else y  # in place: nobody else reads a convolution's result

    @torch.inference_mode()
    def residual(self, generator_input: Float32[np.ndarray, "h w 11"]) -> Float32[np.ndarray, "h w 3"]:
        """One image; numpy's "h w c" is torch's channels-last layout, so nothing is copied on the way in."""
        return self(self._image(generator_input))[0].permute(1, 2, 0).cpu().numpy()

    @torch.inference_mode()
    def residual_subpixels(self, generator_input: Float32[np.ndarray, "h w 11"]) -> Float32[np.ndarray, "h2 w2 12"]:
        """`residual` before its sub-pixels are spread: that of channel k at (y, x) is at [y // 2, x // 2, 4 k + 2 (y % 2) + x % 2]."""
        return np.ascontiguousarray(self._subpixels(self._image(generator_input))[0].permute(1, 2, 0).cpu().numpy())

    def _image(self, generator_input: np.ndarray) -> Tensor:
        return torch.from_numpy(generator_input).permute(2, 0, 1)[None].to(next(self.parameters()).device)

    def for_inference(self) -> "Compositor":
        """Frozen, weights laid out for speed: channels last (a quarter faster on the CPU), and packed for oneDNN's fused convolutions where torch has
        them (another tenth). Weights loaded later would not be seen."""
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._packed = _packed(self)
        return self

    def _apply(self, fn, recurse=True):
        """What `.to(device)` does: packed weights are the CPU's only, and copies."""
        super()._apply(fn, recurse)
        if self._packed is not None:
            self._packed = _packed(self)
        return self

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON-able config), the inverse of `from_state`."""
        return {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, asdict(self.config)

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "Compositor":
        compositor = Compositor(CompositorConfig(**config))
        compositor.load_state_dict(tensors)
        return compositor.for_inference()


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def _packed(generator: Compositor) -> dict[str, tuple] | None:
    """Arguments of oneDNN's convolution with the activation in it, which torch's compiler uses, by layer; None where this torch has none."""
    weights = [p for p in generator.parameters() if p.device.type != "cpu" or p.dtype != torch.float32]
    if weights or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return None
    return {
        name: (torch._C._nn.mkldnn_reorder_conv2d_weight(m.weight.detach().to_mkldnn(), m.padding, m.stride, m.dilation, 1), m.bias.detach(),
               list(m.padding), list(m.stride), list(m.dilation), 1)
        for name, m in generator.named_children()
    }  # fmt: skip


def dilate_mask(head_mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The region that composition may change: 255 within `REACH` of the head (and `JAW_REACH` more downwards), 0 elsewhere."""
    return _region(head_mask, "inside")


def hidden_mask(head_mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The region of the input that composition does not read: 255 within `HIDE` of the head, 0 elsewhere."""
    return _region(head_mask, "hidden")


def _region(head_mask: np.ndarray, name: str) -> np.ndarray:
    out = np.zeros(head_mask.shape, np.uint8)
    seam = seam_of(head_mask)
    if seam is not None:
        out[seam.window][getattr(seam, name)] = 255
    return out


def seam_of(head_mask: UInt8[np.ndarray, "h w"]) -> Seam | None:
    """The seam of a head mask (soft, 0..255); None where the mask is empty."""
    box = seam_box(head_mask)
    if box is None:
        return None
    x0, y0, x1, y1 = box
    reach, hide, feather, jaw = (_px(length, head_mask) for length in (REACH, HIDE, FEATHER, JAW_REACH))
    distance = _distance_from_head(head_mask[y0:y1, x0:x1], jaw)
    weight = np.clip((reach - distance) / np.float32(feather), 0, 1)
    # The jaw's further reach may be changed but need not be hidden: the neck there is this frame's own, and no plate knows where its collar is.
    rim = max(3, 2 * round(hide) - 1)  # the diameter that leaves out what lies `hide` away and more
    head = cv2.threshold(head_mask[y0:y1, x0:x1], 127, 1, cv2.THRESH_BINARY)[1]
    hidden = cv2.dilate(head, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (rim, rim))) > 0
    hidden &= ~_long_drawn(head_mask[y0:y1, x0:x1], _px(1 / 512, head_mask))
    return Seam(box, distance < reach, hidden, weight)


def seam_box(head_mask: UInt8[np.ndarray, "h w"]) -> Box | None:
    """All of the frame that composition under this mask reads or changes; None where the mask is empty."""
    h, w = head_mask.shape
    x, y, width, height = cv2.boundingRect(cv2.threshold(head_mask, 127, 255, cv2.THRESH_BINARY)[1])
    if width == 0:
        return None
    margin, jaw = math.ceil(_px(REACH, head_mask)), math.ceil(_px(JAW_REACH, head_mask))
    x0, x1 = _span(max(0, x - margin), min(w, x + width + margin), w)
    y0, y1 = _span(max(0, y - margin), min(h, y + height + margin + jaw), h)
    return x0, y0, x1, y1


def _long_drawn(head_mask: UInt8[np.ndarray, "h w"], unit: float) -> np.ndarray:
    """Where a mask's lower half falls slowly and downwards: the cut of hanging hair (`face/masks.py`). The frame has the same hair there, not a head
    to hide, and a plate behind half a render would show as a line. `unit`: px that one of 512 is."""
    down, aside = max(1, round(3 * unit)), max(1, round(2 * unit))
    below = cv2.copyMakeBorder(head_mask, 0, down, 0, 0, cv2.BORDER_REPLICATE)[down:]
    fall = cv2.subtract(head_mask, below)  # saturates: 0 where it rises
    wide = cv2.copyMakeBorder(head_mask, 0, 0, aside, aside, cv2.BORDER_REPLICATE)
    across = cv2.convertScaleAbs(
        cv2.absdiff(wide[:, 2 * aside :], wide[:, : -2 * aside]), alpha=down / aside
    )  # to twice the slope of `fall`
    per_px = down / unit
    return (head_mask <= 127) & (fall > 3 * per_px) & (fall < 24 * per_px) & (across < fall)


def plain_composite(
    rgb: Float[Tensor, "h w 3"] | np.ndarray,
    alpha: Float[Tensor, "h w"] | np.ndarray,
    frame: UInt8[np.ndarray, "h w 3"],
    plate: UInt8[np.ndarray, "h w 3"],
    seam: Seam,
) -> PlainComposite:
    """The alpha composite inside the seam's box; `rgb` is rendered over black. Reads the frame only outside the hidden region."""
    window = seam.window
    h, w = seam.inside.shape
    frame, plate = frame[window], plate[window]
    # Seamless: the difference between frame and plate, known outside, is carried smoothly inwards (a membrane, as in Poisson cloning).
    half = ((h + 1) // 2, (w + 1) // 2)
    light, around = np.empty((*half, 3), np.float32), np.empty((*half, 4), np.float32)
    of_light, known = np.empty(half, np.float32), np.empty(half, np.float32)
    _borders_halved(frame, plate, seam.hidden, light, of_light, around, known)
    light, around = fill_smoothly(light, of_light), fill_smoothly(around, known)
    layers = np.empty((h, w, INPUT_CHANNELS), np.float32)
    _lay(_numpy(rgb)[window], _numpy(alpha)[window], frame, plate, seam.hidden, seam.weight, light, around, layers)
    return PlainComposite(seam, layers)


def compose(
    rgb: Float[Tensor, "h w 3"] | np.ndarray,
    alpha: Float[Tensor, "h w"] | np.ndarray,
    frame: UInt8[np.ndarray, "h w 3"],
    head_mask: UInt8[np.ndarray, "h w"],
    plate: UInt8[np.ndarray, "h w 3"],
    generator: Compositor | None = None,
    grain: FilmGrainLayer | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The final frame: the head rendered over black (`rgb`, `alpha`) pasted into `frame` within the dilated head mask.

    Pixels outside the dilated mask are the frame's, bit for bit; the result does not depend on the frame's pixels in the hidden region. Without a
    generator, the plain composite with a feathered edge. An empty mask gives the frame back. Grain lies on what is rendered, as far as that covers.
    """
    seam = seam_of(head_mask)
    out = frame.copy()
    if seam is not None:
        composite = plain_composite(rgb, alpha, frame, plate, seam)
        residual = (
            np.zeros((0, 0, 12), np.float32) if generator is None else generator.residual_subpixels(composite.layers)
        )
        field, scale, lips = np.zeros((0, 0), np.uint8), 0.0, np.ones(4, np.float32)
        if grain is not None:
            field, scale = grain.field[seam.window], grain.scale
            lips = grain.lips - np.array([*seam.box[:2], 0, 0], np.float32)
        _paste(composite.layers, residual, seam.inside, field, np.float32(scale), lips, out[seam.window])
    return out


def face_mask(head_mask: UInt8[np.ndarray, "h w"], *faces_px: Float[np.ndarray, "l 2"]) -> UInt8[np.ndarray, "h w"]:
    """The head mask about the convex hull of some faces' landmarks (px): those of the frame and of the face that goes there, so that neither looks out."""
    # The head's soft edges are left out: a slope in this mask is no hanging hair that the frame goes on with (`_long_drawn`).
    return np.where(_grown(head_mask, FACE_CUT) > 127, _about(head_mask, np.concatenate(faces_px)), np.uint8(0))


def with_whole_face(head_mask: UInt8[np.ndarray, "h w"], face_px: Float[np.ndarray, "l 2"]) -> UInt8[np.ndarray, "h w"]:
    """The head mask and what it may lack of the face (landmarks in px): what no background is taken from."""
    return np.maximum(head_mask, _about(head_mask, face_px))


def _about(image: np.ndarray, points: Float[np.ndarray, "l 2"]) -> UInt8[np.ndarray, "h w"]:
    """`FACE_REACH` about the hull of a face's landmarks."""
    fraction = 4  # bits of a pixel that OpenCV reads
    hull, face = cv2.convexHull(points.astype(np.float32)), np.zeros(image.shape[:2], np.uint8)
    cv2.fillConvexPoly(face, np.round((hull - 0.5) * (1 << fraction)).astype(np.int32), 255, cv2.LINE_AA, fraction)
    return _grown(face, FACE_REACH)


def _grown(mask: np.ndarray, reach: float) -> np.ndarray:
    side = 2 * round(_px(reach, mask)) + 1
    return cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))


@numba.njit(cache=True, nogil=True)
def _borders_halved(frame, plate, hidden, light, of_light, around, known):
    """What is known of the readable pixels of each 2 x 2 block (`known`: 1 where there is one). around "h2 w2 4": their mean colour, and how much more than
    light tells them from the plate, 0 ... 1; light "h2 w2 3": their mean difference from it, times of_light "h2 w2", the rest of that."""
    h, w = hidden.shape
    light[:], of_light[:], around[:], known[:] = 0, 0, 0, 0
    for i in range(known.shape[0]):
        for j in range(known.shape[1]):
            count = 0
            r, g, b, plate_r, plate_g, plate_b = 0, 0, 0, 0, 0, 0
            for y in range(2 * i, min(2 * i + 2, h)):
                for x in range(2 * j, min(2 * j + 2, w)):
                    if not hidden[y, x]:
                        count += 1
                        r, g, b = (
                            r + np.int32(frame[y, x, 0]),
                            g + np.int32(frame[y, x, 1]),
                            b + np.int32(frame[y, x, 2]),
                        )
                        plate_r, plate_g, plate_b = (
                            plate_r + np.int32(plate[y, x, 0]),
                            plate_g + np.int32(plate[y, x, 1]),
                            plate_b + np.int32(plate[y, x, 2]),
                        )
            if count:
                scale = np.float32(1 / 255) / np.float32(count)
                size = max(abs(r - plate_r), abs(g - plate_g), abs(b - plate_b)) * scale
                other = min(
                    max((size - np.float32(LIGHT)) * np.float32(1 / (SURFACE - LIGHT)), np.float32(0)), np.float32(1)
                )
                known[i, j], of_light[i, j] = 1, np.float32(1) - other
                lit = scale * (np.float32(1) - other)
                light[i, j, 0], light[i, j, 1], light[i, j, 2] = (
                    (r - plate_r) * lit,
                    (g - plate_g) * lit,
                    (b - plate_b) * lit,
                )
                around[i, j, 0], around[i, j, 1], around[i, j, 2], around[i, j, 3] = (
                    r * scale,
                    g * scale,
                    b * scale,
                    other,
                )


@numba.njit(cache=True, nogil=True, fastmath={"nsz", "contract"}, error_model="numpy")
def _lay(rgb, alpha, frame, plate, hidden, weight, light, around, layers):
    """The generator's input in one pass; the fill is the frame but in the hidden region, where it is made of the plate and the two membranes. These, at
    half resolution, are read bilinearly."""
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
def _paste(layers, residual, inside, field, scale, lips, out):
    """`PlainComposite.output` in one pass, rounded, into the inside pixels of `out`; `residual` as `residual_subpixels`, or empty for 0. The grain's
    `field` (or an empty one) times `scale` is added as far as the render covers, fading within the ellipse `lips`."""
    h, w = inside.shape
    zero, one, most = np.float32(0), np.float32(1), np.float32(255)
    extra = np.zeros((w + 1, 3), np.float32)  # a row of the residual
    grain = np.zeros(w, np.float32)  # and of the grain
    across, down = np.float32(2) / (lips[2] * lips[2]), np.float32(2) / (lips[3] * lips[3])
    for y in range(h):
        if residual.shape[0] > 0:
            half, top = residual[y >> 1], 2 * (y & 1)
            for x in range((w + 1) // 2):
                for c in range(3):
                    extra[2 * x, c], extra[2 * x + 1, c] = half[x, 4 * c + top], half[x, 4 * c + top + 1]
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


def background_plate(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]], head_masks: Iterable[UInt8[np.ndarray, "h w"]], max_frames: int = 48
) -> UInt8[np.ndarray, "h w 3"]:
    """What is seen where the head is not: the median over (at most `max_frames`, evenly spread) frames; never-seen holes are filled smoothly.

    Give frames of the training part only. Asserts at least one frame.
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
    """Fill holes by a push-pull pyramid (Gortler et al. 1996): exact where `known` is 1, smooth elsewhere; between, as much of each as it says.

    `values` must be times `known`. With nothing known, zeros. At most four channels (OpenCV's resize).
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
    """Distance of each pixel from the head in px (0 on it); the head reaches `jaw_px` downwards. Infinite for an empty mask."""
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
    """[low, high) with context, on the generator's grid, clipped to [0, size)."""
    low = max(0, (low - CONTEXT) // STRIDE * STRIDE)
    high = min(size, -(-(high + CONTEXT) // STRIDE) * STRIDE)
    return int(low), int(high)


def _numpy(image: Tensor | np.ndarray) -> np.ndarray:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else image
