"""Motion to picture: one frame of a head, rendered and composited into its driving frame by one thread."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8

from hicode.avatar.avatar import Avatar
from hicode.avatar.blend import Region, blend_box
from hicode.motion import Motion
from hicode.session.motion_source import DrivingTrack
from hicode.session.timings import Timings


class FrameRenderer:
    """Renders frames of an avatar over a driving track; any thread may call it.

    `region`: what of the rendered head goes into the driving frame.
    """

    def __init__(self, avatar: Avatar, driving: DrivingTrack, region: Region, film_grain: bool = True):
        self._avatar = avatar if film_grain else replace(avatar, film_grain=None)
        self._driving, self._region = driving, region

    @torch.inference_mode()
    def render(self, t: int, motion: Motion, number: int, timings: Timings) -> UInt8[np.ndarray, "h w 3"]:
        """Driving frame t with the head at the motion "1 ..."; `number` tells one frame's film grain from another's."""
        avatar = self._avatar
        with timings.clocked("driving"):
            frame, mask = self._driving.frame(t), self._driving.mask(t)
            if self._region == "face":
                mask = avatar.face_mask(motion, 0, mask, self._driving.motion, t)
        with timings.clocked("deform"):
            deformed = avatar.deform(motion[0])
        with timings.clocked("rasterise"):
            within = blend_box(mask) if self._region == "face" else None
            rendering = avatar.rasterize(deformed, motion.T_camera_head[0], within=within)
        with timings.clocked("composite"):
            image = avatar.compose(rendering, avatar.landmarks_px(motion, 0), frame, mask, number)
        timings.count()
        return image
