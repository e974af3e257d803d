"""Frames, masks and tracked quantities of a clip's training part, cropped to the window that the head occupies."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hicode.avatar.avatar import Avatar
from hicode.camera import Camera
from hicode.errors import InputError
from hicode.motion import Motion
from hicode.preparation.clip import Clip
from hicode.training.losses import Box

WINDOW_MARGIN_PX = 12


class TrainingFrames:
    """Frames are named by the clip's frame index t. Decoded frames stay in memory up to `preload_bytes`.

    frames        of the training part
    learned       those that are chosen, without a defect
    depth_frames  those with a depth map, which give the initial points
    window        the box that all renderings and targets cover, px of the clip's frames
    """

    def __init__(self, clip: Clip, preload_bytes: int):
        self.clip, self.frames = clip, list(clip.train)
        self.learned = learned_frames(clip)
        depths = list(clip.depths())
        self.depth_frames = [t for t in depths if clip.chosen[t]] or depths
        self.window = head_window([clip.head_mask(t) for t in self.learned[:: max(1, len(self.learned) // 100)]])
        x0, y0, x1, y1 = self.window
        self._capacity = preload_bytes // ((x1 - x0) * (y1 - y0) * 4)  # frames with their masks
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.frames)

    def image_and_mask(self, t: int) -> tuple[UInt8[Tensor, "3 h w"], UInt8[Tensor, "h w"]]:
        """The frame and its soft head mask, within the window."""
        if t in self._cache:
            return self._cache[t]
        x0, y0, x1, y1 = self.window
        image = torch.from_numpy(np.ascontiguousarray(self.clip.image(t)[y0:y1, x0:x1].transpose(2, 0, 1)))
        mask = torch.from_numpy(np.ascontiguousarray(self.clip.head_mask(t)[y0:y1, x0:x1]))
        if len(self._cache) < self._capacity:
            self._cache[t] = image, mask
        return image, mask

    def view(self, t: int) -> "TrainingView":
        """Frame t."""
        x0, y0, x1, y1 = self.window
        camera = self.clip.track.camera_at(t).cropped(x0, y0, x1 - x0, y1 - y0)
        image, mask = self.image_and_mask(t)
        landmarks_px = self.clip.track.landmarks_px[t] - torch.tensor(self.window[:2])
        a, b, c, d = self.clip.track.mouth_box(t, padding=0.2)
        a, c = np.clip((a - x0, c - x0), 0, x1 - x0)
        b, d = np.clip((b - y0, d - y0), 0, y1 - y0)
        mouth = int(a), int(b), int(max(c, a + 1)), int(max(d, b + 1))
        return TrainingView(camera, image, mask, mouth, landmarks_px.float())


@dataclass(frozen=True, eq=False)
class TrainingView:
    """A training frame within the window.

    camera        as tracked, for the window
    mouth_box     in px of the window, clipped to it, never empty
    landmarks_px  as tracked
    """

    camera: Camera
    image: UInt8[Tensor, "3 h w"]
    mask: UInt8[Tensor, "h w"]
    mouth_box: Box
    landmarks_px: Float[Tensor, "478 2"]

    def target(self, background: Float[Tensor, "3"]) -> Float[Tensor, "h w 3"]:
        """The head over a constant colour, on the colour's device. Random colours teach where the head ends."""
        alpha, behind = self.mask.to(background.device) / 255, background[:, None, None]
        over = self.image.to(background.device).float().div_(255).sub_(behind).mul_(alpha).add_(behind)
        return over.permute(1, 2, 0)


def learned_frames(clip: Clip) -> list[int]:
    """The training part's frames that the head learns from."""
    return [t for t in clip.train if clip.chosen[t]]


def head_window(masks: list[UInt8[np.ndarray, "h w"]]) -> Box:
    """The box around all masks, with a margin. Raises InputError if no mask shows a head."""
    covered = np.max(np.stack(masks), 0) > 0
    if not covered.any():
        raise InputError("No head in any training frame's mask. Prepare the clip again with a video that shows one.")
    h, w = covered.shape
    ys, xs = np.where(covered.any(1))[0], np.where(covered.any(0))[0]
    m = WINDOW_MARGIN_PX
    return max(0, int(xs[0]) - m), max(0, int(ys[0]) - m), min(w, int(xs[-1]) + 1 + m), min(h, int(ys[-1]) + 1 + m)


@dataclass(frozen=True, eq=False)
class RenderedFrame:
    """A training frame, and the head rendered over black in its motion.

    rgb and alpha are in [0, 1]; landmarks_px are those of the motion, projected.
    """

    rgb: Float[Tensor, "h w 3"]
    alpha: Float[Tensor, "h w"]
    image: UInt8[np.ndarray, "h w 3"]
    head_mask: UInt8[np.ndarray, "h w"]
    landmarks_px: Float[np.ndarray, "478 2"]


def rendered_frame(avatar: Avatar, clip: Clip, motion: Motion, t: int) -> RenderedFrame:
    """Frame t of the clip; `motion` is the training part's, with refined poses."""
    k = t - clip.train.start
    rendering, landmarks_px = avatar.render(motion[k], motion.T_camera_head[k]), avatar.landmarks_px(motion, k)
    return RenderedFrame(rendering.rgb, rendering.alpha, clip.image(t), clip.head_mask(t), landmarks_px)
