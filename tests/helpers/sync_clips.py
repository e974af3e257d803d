"""A made-up clip whose sound drives its mouth."""

import numpy as np
import torch

DIM = 6


def sync_clip(frames: int, later: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that drive a mouth's opening and width, which follow `later` frames after; and a face drifting through
    space.
    """
    rng = np.random.default_rng(seed)
    pad = 16
    sound = np.stack(
        [np.convolve(rng.standard_normal(2 * (frames + 2 * pad) + 8), np.ones(5) / 5, "valid") for _ in range(DIM)], 1
    )
    sound = sound[: 2 * (frames + 2 * pad)]
    per_frame = sound.reshape(-1, 2, DIM).mean(1)
    opening, width = 0.3 + 0.3 * per_frame[:, 0], 1.0 + 0.2 * per_frame[:, 1]
    mouth = slice(pad - later, pad - later + frames)
    opening, width = opening[mouth].clip(0.0), width[mouth]
    points = np.zeros((frames, 478, 3))
    points[:, 33], points[:, 263] = [-0.5, 1, 0], [0.5, 1, 0]
    points[:, 1], points[:, 0] = [0, 0.5, 0.2], [0, 0.1, 0.1]
    for top, bottom, x in ((13, 14, 0.0), (82, 87, -0.1), (312, 317, 0.1)):
        points[:, top, 0] = points[:, bottom, 0] = x
        points[:, bottom, 1] = -opening
    points[:, 17, 1], points[:, 152, 1] = -opening - 0.1, -0.7 * opening - 0.8
    points[:, 78, 0], points[:, 308, 0] = -width / 2, width / 2
    points += rng.standard_normal((frames, 478, 3)) * 0.003
    points = 150 * points + np.linspace(0, 40, frames)[:, None, None]  # px, and a drift
    return torch.from_numpy(sound[2 * pad : 2 * (pad + frames)]).float(), torch.from_numpy(points).float()
