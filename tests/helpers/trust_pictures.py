"""Pictures to mark."""

import numpy as np


def pictures(count: int = 2, size: int = 384, seed: int = 0) -> list[np.ndarray]:
    """Colour pictures with a spectrum like that of photographs (amplitude 1/f), each moved a little."""
    rng = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij"))
    f[0, 0] = 1
    spectrum = np.exp(2j * np.pi * rng.random((3, *f.shape))) / f
    planes = np.fft.irfft2(spectrum, (size, size))
    image = np.clip(127 + 45 * planes / planes.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return [np.roll(image, 3 * i, axis=1) for i in range(count)]
