"""Frames at 25 a second from a video file or a folder of pictures, and what they are called in a report."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

from hicode.audio import FPS
from hicode.errors import InputError
from hicode.files import sha256_of
from hicode.media.audio import read_audio
from hicode.media.video import probe, read_video

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class Footage:
    """A video file, or a folder of pictures in the order of their names; read as often as needed, never held.

    Raises InputError where it is neither, or its frames have several sizes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.scale_to: tuple[int, int] | None = None  # width, height
        self._pictures: list[Path] | None = None
        if path.is_dir():
            self._pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not self._pictures:
                raise InputError(f"{path} is a folder without pictures. Give a video, or a folder of numbered PNGs.")
            self.height, self.width = read_picture(self._pictures[0]).shape[:2]
            self.fps = FPS
        else:
            info = probe(path)
            self.width, self.height, self.fps = info.width, info.height, info.fps

    def frames(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """All of them, at the size that is asked for."""
        source = read_video(self.path, FPS) if self._pictures is None else map(read_picture, self._pictures)
        for i, frame in enumerate(source):
            if frame.shape[:2] != (self.height, self.width):
                raise InputError(
                    f"{self.path} is {self.width}x{self.height} at first and {frame.shape[1]}x{frame.shape[0]} at "
                    f"frame {i}. Give frames of one size."
                )
            if self.scale_to:
                shrinks = self.scale_to[0] < frame.shape[1]
                frame = cv2.resize(frame, self.scale_to, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
            yield frame

    def sound(self) -> Float32[np.ndarray, "n"] | None:
        """A file's sound at 16 kHz; None without."""
        return None if self._pictures is not None else read_audio(self.path)

    def described(self) -> dict:
        """For the provenance: name, sha256 (of a folder: of its pictures' own, in order), size, rate."""
        sums = [sha256_of(file) for file in self._pictures or [self.path]]
        whole = sums[0] if self._pictures is None else hashlib.sha256("".join(sums).encode()).hexdigest()
        kind = "video" if self._pictures is None else "pictures"
        size = {"width": self.width, "height": self.height, "fps": self.fps}
        return {"name": self.path.name, "sha256": whole, "kind": kind, **size}


def read_picture(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Raises InputError where the file is no picture."""
    picture = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR) if file.stat().st_size else None
    if picture is None:
        raise InputError(f"{file} is not a readable picture. Export it again as PNG.")
    return np.ascontiguousarray(picture[..., ::-1])
