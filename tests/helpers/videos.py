"""Small videos and sounds, made from nothing or from a photograph."""

import cv2
import numpy as np
import skimage.data

from hicode.media.video import VideoWriter


def portrait(size: int = 256) -> np.ndarray:
    """The astronaut's head and shoulders."""
    return cv2.resize(skimage.data.astronaut()[:300, 70:370], (size, size), interpolation=cv2.INTER_AREA)


def write_video(path, frames, audio=None):
    frames = list(frames)
    with VideoWriter(path, frames[0].shape[1], frames[0].shape[0], audio=audio) as video:
        for frame in frames:
            video.write(frame)
    return path


def swaying(count: int, scene: np.ndarray, amount: float = 4.0):
    """The scene, swaying a few px, so that frames differ as a person's do."""
    for t in range(count):
        shift = np.float32([[1, 0, amount * np.sin(t / 6)], [0, 1, amount * np.sin(t / 9)]])
        yield cv2.warpAffine(scene, shift, scene.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)


def speech_like(seconds: float) -> np.ndarray:
    t = np.arange(int(seconds * 16000)) / 16000
    return (0.2 * np.sin(2 * np.pi * 180 * t) * (1 + np.sin(2 * np.pi * 3 * t)) / 2).astype(np.float32)
