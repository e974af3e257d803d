"""Compressed pictures as they lie in an avatar's file."""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from hicode.errors import FileFormatError

JPEG_QUALITY = 95


@dataclass(frozen=True, eq=False)
class Images:
    """A sequence of compressed images in one buffer: frame t is `data[offsets[t]:offsets[t + 1]]` (JPEG or PNG)."""

    data: UInt8[Tensor, "b"]
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @staticmethod
    def encode(images, suffix: str) -> "Images":
        """RGB or grey images, ".jpg" (4:4:4) or ".png"."""
        options = [
            cv2.IMWRITE_JPEG_QUALITY,
            JPEG_QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ]
        chunks = []
        for image in images:
            ok, chunk = cv2.imencode(
                suffix, image[..., ::-1] if image.ndim == 3 else image, options if suffix == ".jpg" else []
            )
            assert ok, f"could not encode an image of shape {image.shape} as {suffix}"
            chunks.append(chunk.ravel())
        offsets = np.concatenate([[0], np.cumsum([len(c) for c in chunks])]).astype(np.int64)
        return Images(
            torch.from_numpy(np.concatenate(chunks) if chunks else np.zeros(0, np.uint8)), torch.from_numpy(offsets)
        )

    def __getitem__(self, t: int) -> UInt8[np.ndarray, "h w *c"]:
        chunk = self.data[int(self.offsets[t]) : int(self.offsets[t + 1])].numpy()
        image = cv2.imdecode(chunk, cv2.IMREAD_UNCHANGED)
        if image is None:
            raise FileFormatError(f"Picture {t} of the avatar is damaged. Train the avatar anew.")
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if image.ndim == 3 else image
