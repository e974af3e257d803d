"""Learning a subject's grain (`hicode.avatar.film_grain`): what training frames have over their renders, and how much of it to give back.

Grain cannot be right pixel by pixel, so it costs squared error what it wins in likeness. How much is given is measured on frames that the head has not
trained on: of the strengths that cost at most `MOST_DB` of the head's PSNR the one whose LPIPS is worth its cost (`PER_DB`), none where LPIPS does not fall.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8

from hicode.avatar.avatar import Avatar
from hicode.avatar.compositor import compose
from hicode.avatar.film_grain import Grain, lips_ellipse
from hicode.perceptual import lpips
from hicode.training.refiner import Samples, lpips_input

FIELDS = 16
STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
MOST_DB = 0.15
# LPIPS that a decibel must buy, as its logarithm: a hundredth of a dB for each hundredth of LPIPS. By LPIPS alone KatieHill had .8 where .5 is as good on frames
# of the test part (.0768 for .0767) and costs .05 dB where .8 costs .13; strengths below the best lose little, as the cost is quadratic.
PER_DB = 1.0
LEAST_GAIN = 0.02  # of LPIPS: less is not worth a picture that flickers
# Lengths in px at 512: a registration smoother than pores, finer than a face; what counts as fine; the head's soft edge, which is no grain.
FLOW_SIGMA, FINE_SIGMA, EDGE = 4.0, 3.0, 7.0
# What stands out of the grain about it is no grain but an earring, a lash, a nostril's edge that the render has elsewhere: it is cut down to the highest
# that Gaussian noise of the same median reaches in nine pixels of ten. Length in px at 512.
PEAK, ABOUT = 2.5, 61


@dataclass(frozen=True)
class GrainReport:
    """What was found on unseen frames: head PSNR (dB) and frame LPIPS without grain and with it at `strength`; 0 where none is given."""

    strength: float
    plain_psnr: float
    plain_lpips: float
    psnr: float
    lpips: float
    frames: int

    def __str__(self) -> str:
        found = f"LPIPS {self.plain_lpips:.4f} -> {self.lpips:.4f}, head {self.plain_psnr:.2f} -> {self.psnr:.2f} dB on {self.frames} unseen frames"
        return (
            f"Grain at {self.strength:g} of the recording's: {found}."
            if self.strength
            else "No grain: the recording has none that helps."
        )


def learn_grain(
    avatar: Avatar,
    known: Samples,
    known_px: Float[np.ndarray, "t 478 2"],
    unseen: Samples,
    unseen_px: Float[np.ndarray, "v 478 2"],
) -> tuple[Grain | None, GrainReport]:
    """The grain of the frames `known`, at the strength that the frames `unseen` allow.

    known, unseen        renders beside their frames, as the compositor's training has them
    known_px, unseen_px  where the avatar's landmarks project in each
    """
    fields, places = [], []
    for k in np.unique(np.linspace(0, len(known) - 1, FIELDS).astype(int)):
        rgb, alpha, frame, mask = known(int(k), None)
        render = compose(rgb, alpha, frame, mask, avatar.plate, avatar.compositor)
        fields.append(fine_detail(frame, render, mask, known_px[k]))
        places.append(known_px[k])
    grain = Grain.of(fields, torch.from_numpy(np.stack(places)), 1.0)
    scores = {s: [] for s in (0.0, *STRENGTHS)}
    distance = lpips()
    for k in range(len(unseen)):
        rgb, alpha, frame, mask = unseen(k, None)
        head = mask > 127
        if not head.any():
            continue
        truth = distance.normalized(lpips_input(frame / np.float32(255)))
        for strength in scores:
            grain.strength = strength
            layer = grain.layer(unseen_px[k], k) if strength else None
            out = compose(rgb, alpha, frame, mask, avatar.plate, avatar.compositor, layer)
            error = ((out[head].astype(np.float64) - frame[head]) / 255) ** 2
            with torch.inference_mode():
                apart = distance.from_features(distance.normalized(lpips_input(out / np.float32(255))), truth).item()
            scores[strength].append((-10 * np.log10(max(error.mean(), 1e-10)), apart))
    means = {s: np.mean(v, 0) for s, v in scores.items() if v}
    if not means:
        return None, GrainReport(0.0, *([float("nan")] * 4), 0)
    plain_psnr, plain_lpips = means[0.0]
    good = [
        s for s in STRENGTHS if plain_psnr - means[s][0] <= MOST_DB and means[s][1] < (1 - LEAST_GAIN) * plain_lpips
    ]
    best = min(good, key=lambda s: np.log(means[s][1]) - PER_DB * means[s][0], default=0.0)
    grain.strength = best
    report = GrainReport(
        best, float(plain_psnr), float(plain_lpips), *(float(v) for v in means[best]), len(scores[0.0])
    )
    return (grain if best else None), report


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


def project(avatar: Avatar, motion, frames: Sequence[int]) -> Float[np.ndarray, "t 478 2"]:
    """Where the landmarks of frames of a motion fall in the avatar's picture, px."""
    return np.stack([avatar.landmarks_px(motion, int(t)) for t in frames])
