"""A disc of a head with landmarks, smooth pictures of it, and noise as film grain."""

import cv2
import numpy as np

from hicode.motion import LIPS

SIZE = 160
rng = np.random.default_rng(0)
# Landmarks over a disc of a head, lips in a patch of their own below the middle.
LANDMARKS = np.stack(
    [
        SIZE / 2 + 0.3 * SIZE * np.sqrt(rng.random(478)) * np.cos(a := 7 * np.arange(478)),
        SIZE / 2 + 0.3 * SIZE * np.sin(a),
    ],
    1,
)
LANDMARKS[LIPS] = [SIZE / 2, 0.65 * SIZE] + rng.uniform(-1, 1, (len(LIPS), 2)) * [12, 5]
MASK = np.where(np.hypot(*(np.mgrid[:SIZE, :SIZE] - SIZE / 2)) < 0.4 * SIZE, 255, 0).astype(np.uint8)


def smooth(seed: int = 1) -> np.ndarray:
    """A picture without fine detail."""
    coarse = np.random.default_rng(seed).uniform(60, 190, (6, 6, 3)).astype(np.float32)
    return cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC).clip(20, 235).astype(np.uint8)


def noisy(picture: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, deviation, picture.shape[:2])[..., None]
    return np.clip(picture + noise + 0.5, 0, 255).astype(np.uint8)
