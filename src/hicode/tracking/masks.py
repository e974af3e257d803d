"""Person and head masks: MediaPipe's selfie segmentation with edges drawn to the picture, and the head cut out of it by the landmarks.

Masks are uint8 "h w", 0 … 255, soft at the edges. The head is the face, the ears and the hair; neck and torso stay out. What the landmarks
cannot see (ears, hair, the outline) comes from the person mask; where the head ends inside the person comes from the landmarks.
"""

from collections.abc import Iterable, Iterator

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import nn

from hicode import assets
from hicode.motion import FACE_OVAL, LEFT_EYE_OUTER, RIGHT_EYE_OUTER
from hicode.tracking.tflite import TfliteGraph

# The lower half of the face oval, ear to ear along the jaw and the chin, from the subject's right to the left.
JAW = np.array([234, 93, 132, 58, 172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 288, 361, 323, 454])
_JAW_CORNERS = (132, 361)  # at the height of the mouth
_BROW, _CHIN = 10, 152


class Segmenter(nn.Module):
    """MediaPipe's selfie segmentation (general model) with its weights; holds no state of a video."""

    def __init__(self):
        super().__init__()
        self.net = TfliteGraph(assets.path("person_mask"))

    def person(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
        """The person's soft mask at the frame's size.

        The network sees the frame as 256x256; a guided filter (He et al. 2013) then moves its edge onto the picture's.
        """
        return _at_full_size(self._small(frame)[0], frame)

    def persons(self, frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Iterator[UInt8[np.ndarray, "h w"]]:
        """`person` over a video: each frame's answer is averaged with the last one's, moved along by optical flow.

        The network judges frames singly and its edge flickers: this takes 13-30 % of the change along the flow away.
        """
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        h, w = self.net.input_size
        here = np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
        last = None
        for frame in frames:
            mask, grey = self._small(frame)
            if last is not None:
                come_from = here + flow.calc(grey, last[1], None)
                mask = (
                    mask + cv2.remap(last[0], come_from, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
                ) / 2
            last = mask, grey
            yield _at_full_size(mask, frame)

    @torch.inference_mode()
    def _small(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The network's answer and the frame in grey, both in the network's size."""
        small = cv2.resize(frame, self.net.input_size[::-1], interpolation=cv2.INTER_AREA)
        (mask,) = self.net(torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255).values()
        return mask[0, 0].numpy().copy(), cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)


def _at_full_size(mask: np.ndarray, frame: np.ndarray) -> np.ndarray:
    h, w = frame.shape[:2]
    return to_uint8(refine_edge(cv2.resize(mask, (w, h), interpolation=cv2.INTER_LINEAR), frame))


def to_uint8(mask: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    return (np.clip(mask, 0, 1) * 255 + 0.5).astype(np.uint8)


def refine_edge(
    mask: Float[np.ndarray, "h w"], frame: UInt8[np.ndarray, "h w 3"], radius: int = 0
) -> Float[np.ndarray, "h w"]:
    """The mask as a locally affine function of the picture's colour (guided filter), so that its edge follows hair and skin.

    radius of the windows in px; 0 takes 1.5 % of the frame. Far from the edge the mask is unchanged.
    """
    radius = radius or max(2, round(0.015 * max(mask.shape)))
    guide = frame.astype(np.float32) / 255
    alpha = _guided(mask, guide, radius, 1e-4)
    alpha = np.clip((alpha - 0.15) / 0.7, 0, 1)  # the tails: haze of background in, holes in the hair
    return alpha


def _guided(
    p: Float[np.ndarray, "h w"], guide: Float[np.ndarray, "h w 3"], radius: int, eps: float
) -> Float[np.ndarray, "h w"]:
    """The guided filter with a colour guide: p ≈ a · colour + b in every window. The coefficients are found at half size."""
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


def head_mask(person: UInt8[np.ndarray, "h w"], landmarks_px: Float[np.ndarray, "478 d"]) -> UInt8[np.ndarray, "h w"]:
    """The head within a person mask: face, ears and hair, down to the jaw; beside the jaw down to a little below the mouth.

    Hair that hangs further lies on the shoulders: it stays with the body, as the neck does, and moves by ten px against a head that turns. Its cut is level
    and long drawn: half of it within 1 % of the face's height, the other half, below one half, where composition sees the frame through it, over 6 %.
    What does not hang from above (shoulders, collar) stays out. "Level" and "below" are in the head's own upright.
    """
    head = _Upright(landmarks_px, person.shape)
    hanging = _hanging(head.turn(person) > 20, head)
    rows = np.arange(hanging.shape[0], dtype=np.float32)[:, None] + 0.5
    short = head.corner_y + 0.05 * head.height
    soft = 0.012 * head.height
    beside = np.where(
        rows < short, _above(rows, short, soft), 0.5 * _above(rows, short + 0.03 * head.height, 0.06 * head.height)
    )
    # The chin's own edge is in, and so is the wedge between jaw and ear.
    below = _above(rows, np.maximum(head.jaw_y + 0.015 * head.height, short), soft)
    inside = np.clip(
        np.minimum(head.columns - head.left, head.right - head.columns) / (0.03 * (head.right - head.left)) + 0.5, 0, 1
    )
    keep = (inside * below + (1 - inside) * beside) * (hanging | (inside > 0))
    keep = cv2.GaussianBlur(keep.astype(np.float32), (0, 0), max(0.004 * head.height, 0.5))
    mask = head.turn_back(keep) * (person.astype(np.float32) / 255)
    mask = np.maximum(mask, _oval(landmarks_px, person.shape))
    return to_uint8(_largest(mask))


def _above(rows: np.ndarray, level: np.ndarray | float, soft: float) -> np.ndarray:
    """1 above a level, 0 below it, linear over `soft` rows."""
    return np.clip((level - rows) / soft + 0.5, 0, 1)


class _Upright:
    """The head's upright frame: the picture turned about the face's centre so that the line of the eyes is level, on a grid that holds it all."""

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
        # Points are continuous, warps are by index: the half pixel is taken off before the turn and put back after it.
        offset = turn @ [0.5, 0.5] - low - 0.5
        self.matrix = np.concatenate([turn, offset[:, None]], 1)
        oval = points @ turn.T - low
        self.columns = np.arange(self.size[0], dtype=np.float32) + 0.5
        self.left, self.right = oval[FACE_OVAL, 0].min(), oval[FACE_OVAL, 0].max()
        self.brow_y, self.chin_y = oval[_BROW, 1], oval[JAW, 1].max()
        self.eye_y = oval[[LEFT_EYE_OUTER, RIGHT_EYE_OUTER], 1].mean()
        self.corner_y = oval[list(_JAW_CORNERS), 1].mean()
        self.height = max(self.chin_y - self.brow_y, 1.0)
        jaw = oval[JAW][np.argsort(oval[JAW, 0])]
        self.jaw_y = np.interp(self.columns, jaw[:, 0], jaw[:, 1]).astype(np.float32)

    def turn(self, mask: np.ndarray) -> np.ndarray:
        return cv2.warpAffine(mask, self.matrix, self.size, flags=cv2.INTER_LINEAR)

    def turn_back(self, mask: np.ndarray) -> np.ndarray:
        h, w = self._shape
        return cv2.warpAffine(
            mask, self.matrix, (w, h), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )


def _hanging(person: np.ndarray, head: _Upright) -> np.ndarray:
    """What of an upright person mask hangs from above the eyes: from there each row keeps what touches the row above, one column
    aside for three rows down, so that hair may spread and shoulders do not come in."""
    out = person.copy()
    spread = np.ones(3, np.uint8)
    for y in range(max(int(head.eye_y), 1), len(out)):
        above = out[y - 1]
        if y % 3 == 0:
            above = cv2.dilate(above[None].astype(np.uint8), spread[None])[0] > 0
        out[y] &= above
    return out


def _oval(points: Float[np.ndarray, "478 d"], shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """The face's outline filled, soft over a pixel."""
    mask = np.zeros(shape, np.uint8)
    outline = np.round((np.asarray(points)[FACE_OVAL, :2] - 0.5) * 16).astype(np.int32)
    cv2.fillPoly(mask, [outline], 255, lineType=cv2.LINE_AA, shift=4)
    return mask.astype(np.float32) / 255


def _largest(mask: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """The largest connected part."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((mask > 0.02).astype(np.uint8))
    if count <= 2:
        return mask
    return mask * (labels == 1 + np.argmax(stats[1:, cv2.CC_STAT_AREA]))
