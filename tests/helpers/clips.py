"""Clips as `prepare` would leave them, made from nothing."""

import numpy as np
import torch

from hicode.camera import Camera
from hicode.files import save_tensors, write_json
from hicode.media.audio import write_audio
from hicode.motion import FaceTrack, Motion
from hicode.preparation.clip import SCHEMA, VERSION, save_track, split, write_png
from hicode.speech.encoders import default_spec

SIZE = 32


def some_track(t: int, size: int = SIZE) -> FaceTrack:
    g = torch.Generator().manual_seed(0)
    motion = Motion(torch.rand(t, 64, generator=g), torch.rand(t, 478, 3, generator=g), torch.eye(4).repeat(t, 1, 1))
    camera = Camera.pinhole(900.0, size, size)
    return FaceTrack(
        motion, torch.rand(80, generator=g), camera, torch.rand(t, 478, 2, generator=g) * size, torch.ones(t)
    )


def write_clip(path, t: int = 60, size: int = SIZE, sound: bool = True, **changes):
    """A clip of noise with every file in its place. Returns (path, frames "t h w 3")."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (t, size, size, 3), dtype=np.uint8)
    for kind in ("frames", "masks/head", "masks/person"):
        (path / kind).mkdir(parents=True)
    for i in range(t):
        write_png(path / "frames" / f"{i:06d}.png", frames[i])
        write_png(path / "masks/head" / f"{i:06d}.png", frames[i, :, :, 0])
        write_png(path / "masks/person" / f"{i:06d}.png", frames[i, :, :, 1])
    save_track(path / "track.safetensors", some_track(t, size))
    save_tensors(
        path / "depth.safetensors",
        {"frames": np.zeros(1, np.int64), "depth": np.full((1, size, size), 8.0, np.float32)},
        "hicode-depth",
        2,
    )
    if sound:
        write_audio(path / "audio.wav", 0.3 * np.sin(np.arange(640 * t) / 9).astype(np.float32), 16000)
    train, test = split(t)
    config = {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": True,
        "fps": 25.0,
        "frame_count": t,
        "width": size,
        "height": size,
        "video": "noise.mp4",
        "source": {"name": "noise.mp4", "path": "/noise.mp4", "sha256": "0"},
        "train": [train.start, train.stop],
        "test": [test.start, test.stop],
        "crop_box": [0, 0, size],
        "start_s": 0.0,
        "audio_offset_frames": 0.0,
        "has_audio": sound,
        "report": {},
        "steps": {},
        "encoder": default_spec("embedded").to_json(),
    }
    write_json(path / "clip.json", {**config, **changes})
    return path, frames
