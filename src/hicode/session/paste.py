"""Output at the source's size: the composited crop goes back into the video that the avatar came from."""

import tempfile
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8

from hicode.avatar.avatar import Avatar
from hicode.errors import InputError, OutputError
from hicode.media.video import probe, read_video

KEPT = [cv2.IMWRITE_JPEG_QUALITY, 97, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


class OriginalVideo:
    """The source video's frames with the head in them, a context manager.

    What composition changed of the crop is resized and pasted at the crop box; all else stays as sharp as the source.
    The driving track runs back and forth, a video only forward: frames that are needed again are kept, compressed, in a
    temporary file in `folder`. `frames` is how many are shown from driving frame `start` on. Raises InputError where
    the video is not there, or not the one that the avatar came from.
    """

    def __init__(self, avatar: Avatar, source_video: Path | None, start: int, frames: int, folder: Path):
        source = avatar.source
        path = source_video or source.get("path")
        if path is None:
            name = source.get("name", "a video that the avatar does not name")
            raise InputError(
                f"The avatar came from {name}, and does not say where that is. Name its place with --source-video."
            )
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(
                f"{self.path}, the video that the avatar came from, is gone. Name its new place with --source-video, "
                "or leave --original-size out."
            )
        if "crop_box" not in source:
            raise InputError(
                "The avatar does not know where its crop lies in the video. Train it anew, or leave --original-size "
                "out."
            )
        info = probe(self.path)
        self.size = info.width, info.height
        self.box = x0, y0, side = tuple(round(v) for v in source["crop_box"])
        if x0 < 0 or y0 < 0 or x0 + side > info.width or y0 + side > info.height:
            raise InputError(
                f"{self.path} is {info.width}x{info.height}, too small for the avatar's crop at ({x0}, {y0}), "
                f"{side} px wide: the avatar came from another video. Name that one with --source-video."
            )
        self._avatar, self._folder = avatar, folder
        self._first = int(source.get("first_frame", 0))
        self._again = start + frames > len(avatar.driving)

    def __enter__(self) -> "OriginalVideo":
        self._frames = read_video(self.path, float(self._avatar.driving.fps))
        self._next = -self._first  # driving frame that the video gives next
        self._kept = tempfile.TemporaryFile(dir=self._folder) if self._again else None
        self._offsets = [0]
        self._latest_t, self._latest = -1, np.zeros((0, 0, 3), np.uint8)
        return self

    def __exit__(self, *error) -> None:
        del self._frames  # closes the file
        if self._kept is not None:
            self._kept.close()

    def paste(self, t: int, crop: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The source frame of driving frame t with what is new in the crop."""
        x0, y0, side = self.box
        out = self._frame(t).copy()
        region = np.where((crop != self._avatar.driving_frame(t)).any(-1), np.uint8(255), np.uint8(0))
        # A rendered pixel may be the driving frame's by chance.
        region = cv2.morphologyEx(region, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
        if crop.shape[0] != side:
            # Area averages are right for reducing, Lanczos for enlarging. The region's edge becomes soft by a crop px.
            smaller = side < crop.shape[0]
            crop = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4)
            region = cv2.resize(region, (side, side), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
        weight = region[..., None].astype(np.float32) / 255
        target = out[y0 : y0 + side, x0 : x0 + side]
        pasted = target + weight * (crop.astype(np.float32) - target) + 0.5
        target[:] = np.where(weight > 0, pasted, target).astype(np.uint8)
        return out

    def _frame(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        while self._next <= t:
            frame = next(self._frames, None)
            if frame is None:
                raise InputError(f"{self.path} ends before driving frame {t}: the avatar came from another video.")
            if self._next >= 0:
                self._latest_t, self._latest = self._next, frame
                self._keep(frame)
            self._next += 1
        if self._latest_t != t:
            assert self._kept is not None, f"driving frame {t} is needed again and was not kept"
            self._kept.seek(self._offsets[t])
            data = np.frombuffer(self._kept.read(self._offsets[t + 1] - self._offsets[t]), np.uint8)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            assert image is not None, f"driving frame {t} was kept and cannot be read"
            self._latest_t, self._latest = t, np.ascontiguousarray(image[..., ::-1])
        return self._latest

    def _keep(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        if self._kept is None:
            return
        _, data = cv2.imencode(".jpg", np.ascontiguousarray(frame[..., ::-1]), KEPT)
        try:
            self._kept.seek(self._offsets[-1])
            self._kept.write(data.tobytes())
        except OSError as error:
            raise OutputError(
                f"Cannot keep the source's frames in {self._folder}: {error.strerror}. Free some space."
            ) from error
        self._offsets.append(self._offsets[-1] + len(data))
