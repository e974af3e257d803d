"""Person and head masks: MediaPipe's selfie segmentation, its edge aligned to the picture, and the head cut out of it.

Masks are uint8 "h w", 0 … 255, soft at the edges. The head is the face, the ears and the hair; neck and torso stay out.
The person mask gives what landmarks cannot see (ears, hair, the outline); landmarks give where the head ends inside it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import nn

from hicode import assets
from hicode.motion import FACE_OVAL, FOREHEAD_TOP, JAW, JAW_CORNERS, LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from hicode.threads import map_frames
from hicode.tracking.tflite import TfliteGraph


@dataclass(frozen=True)
class MaskConfig:
    """Where edges run. Shares are of the face's height (forehead to chin) unless another unit is named."""

    edge_radius: float = 0.015  # windows of the guided filter, as a share of the frame's longer side
    edge_eps: float = 1e-4  # regularisation of the guided filter
    edge_haze: float = 0.15  # alpha below this is background, above 1 - this the person
    person: int = 20  # a pixel belongs to the person from this value of the soft mask on
    mouth_margin: float = 0.05  # next to the jaw the head ends this far below the mouth's corners
    cut_soft: float = 0.012  # softness of that cut, and of the jaw's edge
    hair_drop: float = 0.03  # the lower half of the cut through hair begins this much further down ...
    hair_soft: float = 0.06  # ... and is this soft: composition shows the frame through it
    jaw_margin: float = 0.015  # how far below the jaw's landmarks the chin's edge lies
    side_soft: float = 0.03  # softness of the oval's sides, as a share of its width


class Segmenter(nn.Module):
    """MediaPipe's selfie segmentation (general model) with its weights; holds no state of a video."""

    def __init__(self):
        super().__init__()
        self.net = TfliteGraph(assets.path("person_mask"))

    def person(self, frame: UInt8[np.ndarray, "h w 3"], config: MaskConfig = MaskConfig()) -> UInt8[np.ndarray, "h w"]:
        """The person's soft mask at the frame's size.

        The network sees the frame as 256x256; a guided filter (He et al. 2013) then moves its edge onto the picture's.
        """
        return _at_full_size(self._small(frame)[0], frame, config)

    def persons(
        self, frames: Iterable[UInt8[np.ndarray, "h w 3"]], config: MaskConfig = MaskConfig()
    ) -> Iterator[UInt8[np.ndarray, "h w"]]:
        """`person` over a video: each mask is averaged with the one before, moved along by optical flow.

        The network sees frames singly and its edge flickers: the average removes 13-30 % of the change along the flow.
        """
        finish = lambda drawn: _at_full_size(drawn[0], drawn[1], config)
        return map_frames(finish, self._steady(frames))

    def _steady(
        self, frames: Iterable[UInt8[np.ndarray, "h w 3"]]
    ) -> Iterator[tuple[Float32[np.ndarray, "a b"], UInt8[np.ndarray, "h w 3"]]]:
        """Averaged masks in the network's size, each with its frame."""
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)  # pyright: ignore[reportAttributeAccessIssue]
        h, w = self.net.input_size
        here = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
        last = None
        small = lambda frame: (frame, *self._small(frame))
        for frame, mask, grey in map_frames(small, frames):
            if last is not None:
                x, y = np.moveaxis(here + flow.calc(grey, last[1], None), -1, 0)
                moved = cv2.remap(last[0], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                mask = (mask + moved) / 2
            last = mask, grey
            yield mask, frame

    @torch.inference_mode()
    def _small(self, frame: UInt8[np.ndarray, "h w 3"]) -> tuple[Float32[np.ndarray, "a b"], UInt8[np.ndarray, "a b"]]:
        """The network's mask and the frame in grey, both in the network's size."""
        small = cv2.resize(frame, self.net.input_size[::-1], interpolation=cv2.INTER_AREA)
        (mask,) = self.net(torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255).values()
        return mask[0, 0].numpy().copy(), cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)


def _at_full_size(
    mask: Float32[np.ndarray, "a b"], frame: UInt8[np.ndarray, "h w 3"], config: MaskConfig
) -> UInt8[np.ndarray, "h w"]:
    h, w = frame.shape[:2]
    return to_uint8(refine_edge(cv2.resize(mask, (w, h), interpolation=cv2.INTER_LINEAR), frame, config))


def to_uint8(mask: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """[0, 1] to 0 … 255."""
    return (np.clip(mask, 0, 1) * 255 + 0.5).astype(np.uint8)


def refine_edge(
    mask: Float[np.ndarray, "h w"], frame: UInt8[np.ndarray, "h w 3"], config: MaskConfig = MaskConfig()
) -> Float[np.ndarray, "h w"]:
    """The mask as a locally affine function of the picture's colour (guided filter): its edge follows hair and skin.

    Far from the edge the mask is unchanged.
    """
    radius = max(2, round(config.edge_radius * max(mask.shape)))
    alpha = _guided(mask, frame.astype(np.float32) / 255, radius, config.edge_eps)
    return np.clip((alpha - config.edge_haze) / (1 - 2 * config.edge_haze), 0, 1)


def _guided(
    p: Float[np.ndarray, "h w"], guide: Float[np.ndarray, "h w 3"], radius: int, eps: float
) -> Float[np.ndarray, "h w"]:
    """The guided filter with a colour guide: p ≈ a · colour + b in every window, with a and b at half size."""
    h, w = p.shape
    half = (max(w // 2, 1), max(h // 2, 1))
    g = list(cv2.split(cv2.resize(guide, half, interpolation=cv2.INTER_AREA)))
    q = cv2.resize(p, half, interpolation=cv2.INTER_AREA)
    window = (radius | 1, radius | 1)

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.blur(x, window, borderType=cv2.BORDER_REFLECT)

    g_mean, q_mean = [mean(c) for c in g], mean(q)
    covariance = [mean(c * q) - m * q_mean for c, m in zip(g, g_mean, strict=True)]
    rr, rg, rb, gg, gb, bb = (
        mean(g[i] * g[j]) - g_mean[i] * g_mean[j] + eps * (i == j) for i in range(3) for j in range(i, 3)
    )
    # The symmetric 3x3 system per pixel by its adjugate: an order of magnitude faster than a batched solve.
    i00, i01, i02 = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    i11, i12, i22 = rr * bb - rb * rb, rg * rb - rr * gb, rr * gg - rg * rg
    determinant = rr * i00 + rg * i01 + rb * i02
    x, y, z = (c / determinant for c in covariance)
    a = [i00 * x + i01 * y + i02 * z, i01 * x + i11 * y + i12 * z, i02 * x + i12 * y + i22 * z]
    b = q_mean - sum(k * m for k, m in zip(a, g_mean, strict=True))
    a, b = cv2.resize(mean(cv2.merge(a)), (w, h)), cv2.resize(mean(b), (w, h))
    return cv2.transform(a * guide, np.ones((1, 3), np.float32)) + b


def head_mask(
    person: UInt8[np.ndarray, "h w"], landmarks_px: Float[np.ndarray, "478 d"], config: MaskConfig = MaskConfig()
) -> UInt8[np.ndarray, "h w"]:
    """The head within a person mask: face, ears and hair, down to the jaw; next to it, to a little below the mouth.

    Hair that hangs further lies on the shoulders. It stays with the body, as the neck does: it moves by ten px against
    a head that turns. Its cut is level: half of it is sharp, the other half, further down, is soft, since composition
    sees the frame through it. What does not hang from above (shoulders, collar) stays out. "Level" and "below" are in
    the head's own upright frame.
    """
    head = _Upright(landmarks_px, person.shape)
    hanging = _hanging(head.turn(person) > config.person, head)
    rows = np.arange(hanging.shape[0], dtype=np.float32)[:, None] + 0.5
    short = head.corner_y + config.mouth_margin * head.height
    soft = config.cut_soft * head.height
    long = _above(rows, short + config.hair_drop * head.height, config.hair_soft * head.height)
    outside = np.where(rows < short, _above(rows, short, soft), 0.5 * long)
    # The chin's own edge is in, and so is the wedge between jaw and ear.
    below = _above(rows, np.maximum(head.jaw_y + config.jaw_margin * head.height, short), soft)
    side = np.minimum(head.columns - head.left, head.right - head.columns)
    inside = np.clip(side / (config.side_soft * (head.right - head.left)) + 0.5, 0, 1)
    keep = (inside * below + (1 - inside) * outside) * (hanging | (inside > 0))
    keep = head.turn_back(cv2.GaussianBlur(to_uint8(keep), (0, 0), max(0.004 * head.height, 0.5)))
    mask = cv2.multiply(keep, person, scale=1 / 255)
    return _largest(np.maximum(mask, _oval(landmarks_px, person.shape)))


def _above(rows: np.ndarray, level: np.ndarray | float, soft: float) -> np.ndarray:
    """1 above a level, 0 below it, linear over `soft` rows."""
    return np.clip((level - rows) / soft + 0.5, 0, 1)


class _Upright:
    """The head's upright frame: the picture rotated until the eyes are level, on a grid that holds all of it."""

    def __init__(self, points: Float[np.ndarray, "478 d"], shape: tuple[int, int]):
        points = np.asarray(points, np.float64)[:, :2]
        across = points[LEFT_EYE_OUTER] - points[RIGHT_EYE_OUTER]
        angle = np.arctan2(across[1], across[0])
        self._shape = shape
        h, w = shape
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        corners = np.array([[0, 0], [w, 0], [0, h], [w, h]]) @ turn.T
        low, high = corners.min(0), corners.max(0)
        self.size = tuple(int(np.ceil(n)) for n in high - low)
        # Points are continuous, warps are by index: the half pixel is removed before the rotation and added after it.
        offset = turn @ [0.5, 0.5] - low - 0.5
        self.matrix = np.concatenate([turn, offset[:, None]], 1)
        oval = points @ turn.T - low
        self.columns = np.arange(self.size[0], dtype=np.float32) + 0.5
        self.left, self.right = oval[FACE_OVAL, 0].min(), oval[FACE_OVAL, 0].max()
        self.brow_y, self.chin_y = oval[FOREHEAD_TOP, 1], oval[JAW, 1].max()
        self.eye_y = oval[[LEFT_EYE_OUTER, RIGHT_EYE_OUTER], 1].mean()
        self.corner_y = oval[list(JAW_CORNERS), 1].mean()
        self.height = max(self.chin_y - self.brow_y, 1.0)
        jaw = oval[JAW][np.argsort(oval[JAW, 0])]
        self.jaw_y = np.interp(self.columns, jaw[:, 0], jaw[:, 1]).astype(np.float32)

    def turn(self, mask: np.ndarray) -> np.ndarray:
        """A mask in the upright frame."""
        return cv2.warpAffine(mask, self.matrix, self.size, flags=cv2.INTER_LINEAR)

    def turn_back(self, mask: np.ndarray) -> np.ndarray:
        """An upright mask in the picture."""
        h, w = self._shape
        return cv2.warpAffine(
            mask, self.matrix, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )


def _hanging(person: Bool[np.ndarray, "h w"], head: _Upright) -> Bool[np.ndarray, "h w"]:
    """The part of an upright person mask that hangs from above the eyes.

    Below them each row keeps what touches the row above. It may spread by one column every three rows, so that hair
    may spread and shoulders stay out.
    """
    out = person.copy()
    spread = np.ones(3, np.uint8)
    for y in range(max(int(head.eye_y), 1), len(out)):
        above = out[y - 1]
        if y % 3 == 0:
            above = cv2.dilate(above[None].astype(np.uint8), spread[None])[0] > 0
        out[y] &= above
    return out


def _oval(points: Float[np.ndarray, "478 d"], shape: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """The face's outline filled, soft over a pixel."""
    mask = np.zeros(shape, np.uint8)
    outline = np.round((np.asarray(points)[FACE_OVAL, :2] - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask, [outline], 255, lineType=cv2.LINE_AA, shift=4)
    return mask


def _largest(mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The largest connected part."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask > 5).astype(np.uint8))
    if count <= 2:
        return mask
    return mask * (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA]))
