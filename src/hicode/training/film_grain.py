"""Learning a recording's film grain (`hicode.avatar.film_grain`): fine detail that the renderings lack."""

from collections.abc import Callable

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8

from hicode.avatar.blend import compose
from hicode.avatar.film_grain import FilmGrain, lips_ellipse
from hicode.avatar.refiner import Compositor
from hicode.training.frames import RenderedFrame

FIELDS = 16  # frames that give a grain field
STRENGTH = 0.5  # of the recorded grain: LPIPS falls by a quarter, PSNR by about .1 dB
# Lengths in px at 512 px. The flow is smoother than pores, grain is finer than FINE_SIGMA, the head's edge has none.
FLOW_SIGMA, FINE_SIGMA, EDGE = 4.0, 3.0, 7.0
# Earrings and lashes that the rendering misses are no grain. Detail is clipped at PEAK times the median of its
# magnitude within PEAK_WINDOW px: Gaussian noise stays below that in nine pixels of ten.
PEAK, PEAK_WINDOW = 2.5, 61


def learn_film_grain(
    render: Callable[[int], RenderedFrame],
    frames: int,
    plate: UInt8[np.ndarray, "h w 3"],
    refiner: Compositor | None = None,
) -> FilmGrain:
    """Film grain of some of the training frames; `render(k)` gives the k-th one of `frames`, `plate` the background."""
    fields, places = [], []
    for k in np.unique(np.linspace(0, frames - 1, FIELDS).astype(int)):
        frame = render(int(k))
        composed = compose(frame.rgb, frame.alpha, frame.image, frame.head_mask, plate, refiner)
        fields.append(fine_detail(frame.image, composed, frame.head_mask, frame.landmarks_px))
        places.append(frame.landmarks_px)
    return FilmGrain.of(fields, torch.from_numpy(np.stack(places)), STRENGTH)


def fine_detail(
    frame: UInt8[np.ndarray, "h w 3"],
    render: UInt8[np.ndarray, "h w 3"],
    head_mask: UInt8[np.ndarray, "h w"],
    landmarks_px: Float[np.ndarray, "478 2"],
) -> Float32[np.ndarray, "h w"]:
    """High-pass of frame minus rendering, in grey levels; 0 outside the head and on the lips.

    The frame is first registered to the rendering by smoothed dense flow (DIS, Kroeger et al. 2016). Otherwise tracking
    errors of a pixel would appear along every edge.
    """
    h, w = head_mask.shape
    px = max(h, w) / 512
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (render, frame)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)  # pyright: ignore[reportAttributeAccessIssue]
    flow = dis.calc(*grey, None)
    flow = cv2.GaussianBlur(flow, (0, 0), FLOW_SIGMA * px)
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    aligned = cv2.remap(grey[1], x + flow[..., 0], y + flow[..., 1], cv2.INTER_LANCZOS4, None, cv2.BORDER_REPLICATE)
    detail = aligned.astype(np.float32) - grey[0]
    detail -= cv2.GaussianBlur(detail, (0, 0), FINE_SIGMA * px)
    magnitude = np.clip(8 * np.abs(detail), 0, 255).astype(np.uint8)
    limit = PEAK * (cv2.medianBlur(magnitude, _odd(PEAK_WINDOW * px)).astype(np.float32) / 8 + 0.125)
    detail = np.clip(detail, -limit, limit)
    kernel = np.ones((_odd(EDGE * px),) * 2, np.uint8)
    inside = cv2.erode(head_mask, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=255).astype(np.float32) / 255
    cx, cy, rx, ry = lips_ellipse(landmarks_px)
    off_lips = np.clip(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 - 0.5, 0, 0.5) * 2
    return (detail * inside * off_lips).astype(np.float32)


def _odd(length: float) -> int:
    """An odd number near `length`, at least 3."""
    return 2 * max(1, round(length / 2)) + 1
