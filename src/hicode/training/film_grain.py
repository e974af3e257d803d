"""Learning a subject's film grain (`hicode.avatar.film_grain`): the fine detail that training frames have over their renders."""

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8

from hicode.avatar.avatar import Avatar
from hicode.avatar.blend import compose
from hicode.avatar.film_grain import FilmGrain, lips_ellipse
from hicode.motion import Motion
from hicode.training.refiner import Samples

FIELDS = 16
STRENGTH = 0.5  # of the recording's grain: it lowers LPIPS by a quarter and costs about .1 dB of PSNR
# Lengths in px at 512: a registration smoother than pores, finer than a face; what counts as fine; the head's soft edge, which is no grain.
FLOW_SIGMA, FINE_SIGMA, EDGE = 4.0, 3.0, 7.0
# What stands out of the grain about it is no grain but an earring, a lash, a nostril's edge that the render has elsewhere: it is cut down to the highest
# that Gaussian noise of the same median reaches in nine pixels of ten. Length in px at 512.
PEAK, ABOUT = 2.5, 61


def learn_film_grain(avatar: Avatar, samples: Samples, motion: Motion) -> FilmGrain:
    """The film grain of training frames: `samples` gives their renders, `motion` is that of the same frames."""
    fields, places = [], []
    for k in np.unique(np.linspace(0, len(samples) - 1, FIELDS).astype(int)):
        rgb, alpha, frame, mask = samples(int(k), None)
        render = compose(rgb, alpha, frame, mask, avatar.background_plate, avatar.compositor)
        places.append(avatar.landmarks_px(motion, int(k)))
        fields.append(fine_detail(frame, render, mask, places[-1]))
    return FilmGrain.of(fields, torch.from_numpy(np.stack(places)), STRENGTH)


def fine_detail(
    frame: UInt8[np.ndarray, "h w 3"],
    render: UInt8[np.ndarray, "h w 3"],
    head_mask: UInt8[np.ndarray, "h w"],
    landmarks_px: Float[np.ndarray, "478 2"],
) -> Float32[np.ndarray, "h w"]:
    """Grey levels that the frame has over its render, once it is registered to it: fine detail inside the head, nothing on the lips.

    Registered by dense flow (DIS, Kroeger et al. 2016), smoothed: what is left over is not the tracker's error of a pixel or two, which would stand
    beside every edge.
    """
    h, w = head_mask.shape
    px = max(h, w) / 512
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (render, frame)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)
    flow = cv2.GaussianBlur(flow, (0, 0), FLOW_SIGMA * px)
    x, y = np.meshgrid(np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32))
    there = cv2.remap(grey[1], x + flow[..., 0], y + flow[..., 1], cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
    detail = there.astype(np.float32) - grey[0]
    fine = detail - cv2.GaussianBlur(detail, (0, 0), FINE_SIGMA * px)
    edge = 2 * max(1, round(EDGE * px / 2)) + 1
    inside = (
        cv2.erode(head_mask, np.ones((edge, edge), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=255).astype(
            np.float32
        )
        / 255
    )
    cx, cy, rx, ry = lips_ellipse(landmarks_px)
    usual = (
        cv2.medianBlur(
            np.clip(8 * np.abs(fine), 0, 255).astype(np.uint8), 2 * max(1, round(ABOUT * px / 2)) + 1
        ).astype(np.float32)
        / 8
    )
    fine = np.clip(fine, -PEAK * (usual + 0.125), PEAK * (usual + 0.125))
    beyond_lips = np.clip(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 - 0.5, 0, 0.5) * 2
    return (fine * inside * beyond_lips).astype(np.float32)
