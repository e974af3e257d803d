"""Frames of a driving track with the mouth at rest, kept: an idle session costs next to nothing."""

import numpy as np
from jaxtyping import UInt8

from hicode.motion import Motion
from hicode.session.motion_source import Base, DrivingTrack
from hicode.session.rendering import FrameRenderer
from hicode.session.timings import Timings

MAX_BYTES = 256 << 20


class IdleFrames:
    """What differs from the driving frame, once rendered, up to `MAX_BYTES`; what is beyond is rendered each time.

    Any thread may ask. Frames whose eyes or pose are generated are not kept: none of them comes again.
    """

    def __init__(self, driving: DrivingTrack):
        self._driving = driving
        self._patches: dict[int, tuple[int, int, UInt8[np.ndarray, "h w 3"]]] = {}
        self._bytes = 0

    def image(
        self, renderer: FrameRenderer, base: Base, motion: Motion, timings: Timings
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The frame of a base with the mouth at rest; `motion` is both together."""
        t = base.driving_frame
        if not base.plain:
            return renderer.render(t, motion, base.number, timings)
        if t in self._patches:
            with timings.clocked("driving"):
                y, x, patch = self._patches[t]
                image = self._driving.frame(t).copy()
                image[y : y + patch.shape[0], x : x + patch.shape[1]] = patch
                return image
        # Numbered by the driving frame: it shows the same film grain whenever it comes.
        image = renderer.render(t, motion, t, timings)
        if self._bytes < MAX_BYTES:
            changed = (image != self._driving.frame(t)).any(-1)
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            y, x = (int(rows[0]), int(columns[0])) if len(rows) else (0, 0)
            patch = image[y : rows[-1] + 1, x : columns[-1] + 1].copy() if len(rows) else image[:0]
            self._patches[t] = y, x, patch
            self._bytes += patch.nbytes
        return image
