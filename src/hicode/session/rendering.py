"""Motion to picture: one frame of a head, rendered and composited into its driving frame by one thread."""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8

from hicode.avatar.avatar import Avatar
from hicode.avatar.blend import Region, blend_region, face_room
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
        self._rooms: dict[int, np.ndarray] = {}  # `face_room` by driving frame, eight pixels a byte

    @torch.inference_mode()
    def render(self, t: int, motion: Motion, number: int, timings: Timings) -> UInt8[np.ndarray, "h w 3"]:
        """Driving frame t with the head at the motion "1 ..."; `number` tells one frame's film grain from another's."""
        avatar = self._avatar
        with timings.clocked("driving"):
            frame = self._driving.frame(t)
            region = blend_region(self._mask(t, motion, frame.shape[:2]))
        if region is None:
            return frame.copy()
        with timings.clocked("deform"):
            deformed = avatar.deform(motion[0])
        with timings.clocked("rasterise"):
            rendering = avatar.rasterize(deformed, motion.T_camera_head[0], within=region)
        with timings.clocked("composite"):
            image = avatar.compose(rendering, avatar.landmarks_px(motion, 0), frame, region, number)
        timings.count()
        return image

    def _mask(self, t: int, motion: Motion, shape: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
        """What is rendered of driving frame t."""
        if self._region == "head":
            return self._driving.mask(t)
        if (room := self._rooms.get(t)) is None:
            room = self._rooms[t] = np.packbits(face_room(self._driving.mask(t)))
        room = np.unpackbits(room, count=shape[0] * shape[1]).reshape(shape).view(bool)
        return self._avatar.face_mask(motion, 0, room, self._driving.motion, t)
