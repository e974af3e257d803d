"""PSNR, SSIM and LPIPS of a frame against its truth, over the whole frame, the head and the mouth.

Images are uint8 RGB "h w 3", compared as [0, 1], before any lossy encoding. Per frame; a clip's figure is the mean of
its frames' figures. For PSNR that is not the PSNR of the mean error: one bad frame weighs less in the first.

    area     PSNR                    SSIM                      LPIPS
    frame    over all pixels         mean of the SSIM map      as published
    head     over the mask's pixels  map's mean over the mask  each layer's mean over the mask
    mouth    over the box's pixels   map's mean over the box   of the box alone, at least 64 px a side

SSIM maps end 5 px inside the frame, as scikit-image's means do. Head masks count from 128 on.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from hicode.errors import InputError
from hicode.perceptual import SMALLEST_SIDE_PX, lpips

Area = Literal["frame", "head", "mouth"]
AREAS: tuple[Area, ...] = ("frame", "head", "mouth")
Box = tuple[int, int, int, int]

WINDOW, SIGMA_PX = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(
    image: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"] | None = None
) -> float:
    """-10 log10 of the mean squared error, RGB in [0, 1], in dB. Infinite for equal images; NaN over an empty mask."""
    _check_same(image, truth)
    difference = image.astype(np.float64) - truth
    squares = difference * difference if mask is None else (difference * difference)[mask]
    if squares.size == 0:
        return float("nan")
    mse = squares.mean() / 255**2
    return float(-10 * np.log10(mse)) if mse > 0 else float("inf")


@dataclass(frozen=True, eq=False)
class Moments:
    """An image's own part of SSIM, computed once however many images it is compared with."""

    image: Float64[np.ndarray, "h w 3"]
    mean: Float64[np.ndarray, "h w 3"]
    variance: Float64[np.ndarray, "h w 3"]

    @staticmethod
    def of(image: UInt8[np.ndarray, "h w 3"]) -> "Moments":
        """Means and variances in every window."""
        values = image.astype(np.float64) / 255
        mean = _blur(values)
        return Moments(values, mean, _blur(values * values) - mean * mean)


def ssim_map(a: Moments, b: Moments) -> Float64[np.ndarray, "h2 w2"]:
    """SSIM of each place whose 11 x 11 window (Gaussian, σ 1.5) lies inside, mean over the channels; population
    covariances, data range 1."""
    covariance = _blur(a.image * b.image) - a.mean * b.mean
    top = (2 * a.mean * b.mean + C1) * (2 * covariance + C2)
    bottom = (a.mean * a.mean + b.mean * b.mean + C1) * (a.variance + b.variance + C2)
    edge = WINDOW // 2
    return (top / bottom).mean(2)[edge:-edge, edge:-edge]


def ssim(
    image: UInt8[np.ndarray, "h w 3"], truth: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"] | None = None
) -> float:
    """Mean of the SSIM map: scikit-image's value with gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1."""
    _check_same(image, truth)
    return _mean_over(ssim_map(Moments.of(image), Moments.of(truth)), mask)


def _mean_over(values: np.ndarray, mask: np.ndarray | None) -> float:
    if mask is None:
        return float(values.mean())
    edge = WINDOW // 2
    inside = values[mask[edge:-edge, edge:-edge]]
    return float(inside.mean()) if inside.size else float("nan")


def _blur(values: np.ndarray) -> np.ndarray:
    x = np.arange(WINDOW) - WINDOW // 2
    kernel = np.exp(-0.5 * (x / SIGMA_PX) ** 2)
    kernel /= kernel.sum()
    return cv2.sepFilter2D(values, cv2.CV_64F, kernel, kernel)


def _check_same(image: np.ndarray, truth: np.ndarray) -> None:
    for name, each in (("The image", image), ("The truth", truth)):
        if each.dtype != np.uint8 or each.ndim != 3 or each.shape[2] != 3:
            raise InputError(
                f"{name} is {each.dtype} of shape {each.shape}, not uint8 RGB. "
                "Compare frames as they are before encoding."
            )
    if image.shape != truth.shape:
        raise InputError(
            f"The image is {image.shape[1]}x{image.shape[0]}, the truth {truth.shape[1]}x{truth.shape[0]}. "
            "Resize neither: compare frames of one size."
        )


def box_mask(box: Box, height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """True inside the box."""
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def grown(box: Box, height: int, width: int, smallest: int = SMALLEST_SIDE_PX) -> Box:
    """The box, each side at least `smallest` px where the image allows, moved inside it."""
    x0, y0, x1, y1 = box
    w, h = min(max(x1 - x0, smallest), width), min(max(y1 - y0, smallest), height)
    left = min(max((x0 + x1 - w) // 2, 0), width - w)
    top = min(max((y0 + y1 - h) // 2, 0), height - h)
    return left, top, left + w, top + h


class Truth:
    """One frame's truth with its areas, to be compared with several images: its own part is computed once.

    Without a face there is no head and no mouth: None for their mask and box, NaN for what is measured there. `vgg`
    adds the whole frame's LPIPS by VGG16, `lpips_vgg`, at twenty times the other's cost. InputError for small frames.
    """

    def __init__(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        head_mask: UInt8[np.ndarray, "h w"] | None,
        mouth_box: Box | None,
        vgg: bool = False,
    ):
        _check_same(image, image)
        height, width = image.shape[:2]
        if min(height, width) < SMALLEST_SIDE_PX:
            raise InputError(
                f"Frames are {width}x{height}; LPIPS needs at least {SMALLEST_SIDE_PX} px a side. Give larger frames."
            )
        self.image, self.vgg = image, vgg
        nowhere = np.zeros((height, width), bool)
        self.masks: dict[Area, np.ndarray | None] = {
            "frame": None,
            "head": nowhere if head_mask is None else head_mask >= 128,
            "mouth": nowhere if mouth_box is None else box_mask(mouth_box, height, width),
        }
        self._head = torch.from_numpy(self.masks["head"])[None, None].float()
        self._mouth_box = None if mouth_box is None else grown(mouth_box, height, width)
        self._moments = Moments.of(image)
        self._features = self._deep(image)

    def perfect(self) -> dict[str, dict[str, float]]:
        """The figures of the truth itself."""
        return self._all(float("inf"), 1.0, 0.0)

    def unknown(self) -> dict[str, dict[str, float]]:
        """The figures of an image that is not there."""
        return self._all(float("nan"), float("nan"), float("nan"))

    def _all(self, psnr: float, ssim: float, lpips: float) -> dict[str, dict[str, float]]:
        out = {area: {"psnr": psnr, "ssim": ssim, "lpips": lpips} for area in AREAS}
        if self.vgg:
            out["frame"]["lpips_vgg"] = lpips
        return out

    def compare(self, image: UInt8[np.ndarray, "h w 3"]) -> dict[str, dict[str, float]]:
        """{area: {psnr, ssim, lpips}}, and the frame's lpips_vgg on request. NaN where an area has no pixels."""
        _check_same(image, self.image)
        places, features = ssim_map(Moments.of(image), self._moments), self._deep(image)
        distance: dict[Area, float] = dict.fromkeys(AREAS, float("nan"))
        with torch.inference_mode():
            alex = lpips("alexnet")
            distance["frame"] = float(alex.from_features(features["frame"], self._features["frame"]))
            if self._head.any():
                distance["head"] = float(alex.from_features(features["frame"], self._features["frame"], self._head))
            if self._mouth_box is not None:
                distance["mouth"] = float(alex.from_features(features["mouth"], self._features["mouth"]))
            out: dict[str, dict[str, float]] = {
                area: {"psnr": psnr(image, self.image, mask), "ssim": _mean_over(places, mask), "lpips": distance[area]}
                for area, mask in self.masks.items()
            }
            if self.vgg:
                out["frame"]["lpips_vgg"] = float(lpips("vgg16").from_features(features["vgg"], self._features["vgg"]))
        return out

    def _deep(self, image: np.ndarray) -> dict[str, list[Tensor]]:
        with torch.inference_mode():
            whole = to_tensor(image)
            features = {"frame": lpips("alexnet").normalized(whole)}
            if self._mouth_box is not None:
                x0, y0, x1, y1 = self._mouth_box
                features["mouth"] = lpips("alexnet").normalized(whole[..., y0:y1, x0:x1])
            if self.vgg:
                features["vgg"] = lpips("vgg16").normalized(whole)
        return features


def to_tensor(image: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 3 h w"]:
    """In [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def mean_of_frames(values: list[float]) -> float | None:
    """The mean over frames that have the figure; None where none has, or where it is infinite (a truth compared with
    itself)."""
    known = [v for v in values if not np.isnan(v)]
    mean = float(np.mean(known)) if known else float("nan")
    return mean if np.isfinite(mean) else None


def seam_error(
    image: UInt8[np.ndarray, "h w 3"],
    truth: UInt8[np.ndarray, "h w 3"],
    region: UInt8[np.ndarray, "h w"],
    band_px: int = 4,
) -> float:
    """Mean absolute difference of the gradients (one-pixel differences, RGB in [0, 1]) in a band around the region's
    boundary.

    `region` is what composition may change (255 inside); a paste that fits leaves no edge there that the truth has not.
    NaN without a boundary.
    """
    _check_same(image, truth)
    inside = (region >= 128).astype(np.uint8)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * band_px + 1, 2 * band_px + 1))
    band = cv2.dilate(inside, disc) != cv2.erode(inside, disc, borderValue=1)
    difference = (image.astype(np.float64) - truth) / 255
    across, down = np.abs(np.diff(difference, axis=1)).mean(2), np.abs(np.diff(difference, axis=0)).mean(2)
    values = np.concatenate([across[band[:, 1:]], down[band[1:]]])
    return float(values.mean()) if values.size else float("nan")
