"""A drawn clip: the fitted head model itself, shaded, seen by a small camera; a head that trains on it in seconds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from helpers.clips import write_clip
from hicode.avatar.avatar import Avatar
from hicode.avatar.config import DeformationConfig
from hicode.camera import Camera
from hicode.files import save_tensors
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.media.images import Images
from hicode.motion import FaceTrack, Motion
from hicode.preparation.clip import Clip, save_track, write_png
from hicode.render import rasterize
from hicode.render.mesh import rasterize_mesh
from hicode.tracking.head_model import HeadModel
from hicode.training import head as training
from hicode.training.density import DensityConfig
from hicode.training.losses import LossWeights
from hicode.training.stages import HeadConfig

SIZE, FRAMES = 96, 12


class DrawnClip(Clip):
    """A clip in memory; the last two frames are the test part. `shown` lists the frames whose image was read."""

    def __init__(self, track: FaceTrack, images: list, masks: list, depths: dict):
        self.track, self.images, self.masks, self.depth_maps = track, images, masks, depths
        self.train, self.test = range(len(track) - 2), range(len(track) - 2, len(track))
        self.width = self.height = SIZE
        self.frame_count, self.defects, self.chosen_runs = len(track), [], [[0, len(track)]]
        self.shown: list[int] = []

    def image(self, t):
        self.shown.append(t)
        return self.images[t]

    def head_mask(self, t):
        return self.masks[t]

    def depths(self):
        return self.depth_maps


def draw_clip(model: HeadModel) -> DrawnClip:
    """12 frames of a head that turns and opens its mouth; the last two are the test part."""
    g = torch.Generator().manual_seed(0)
    identity = torch.randn(80, generator=g) * 0.5
    expression = torch.zeros(FRAMES, 64)
    jaw = model.expression_names.index("jawOpen")
    expression[:, jaw] = 0.3 + 0.3 * torch.sin(torch.arange(FRAMES) * 0.9)
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    turns = rotation_from_axis_angle(
        torch.stack([torch.tensor([0.0, 0.15 * float(np.sin(t)), 0.0]) for t in range(FRAMES)])
    )
    poses = rigid(flip @ turns, torch.tensor([0.0, 0.1, 9.0]).expand(FRAMES, 3))
    camera = Camera.pinhole(290.0, SIZE, SIZE)
    vertices = model.vertices(identity, expression)
    landmarks = model.landmarks(vertices)
    skin = np.array([0.8, 0.6, 0.5])
    images, masks, depths, points = [], [], [], []
    for t in range(FRAMES):
        px, depth = camera.with_pose(poses[t]).project(vertices[t])
        seen = rasterize_mesh(px.numpy(), depth.numpy(), model.triangles.numpy(), SIZE, SIZE)
        shade = np.where(np.isfinite(seen.depth), 1.6 - 0.1 * (seen.depth - 8) ** 2, 0)[..., None]
        stripes = 0.8 + 0.2 * np.sin(40 * seen.barycentric[..., :1])  # texture that rides on the mesh
        images.append((np.clip(skin * shade * stripes, 0, 1) * 255).astype(np.uint8))
        masks.append(np.where(np.isfinite(seen.depth), 255, 0).astype(np.uint8))
        depths.append(np.where(np.isfinite(seen.depth), seen.depth, np.nan).astype(np.float32))
        points.append(camera.with_pose(poses[t]).project(landmarks[t])[0])
    track = FaceTrack(Motion(expression, landmarks, poses), identity, camera, torch.stack(points), torch.ones(FRAMES))
    return DrawnClip(track, images, masks, {t: depths[t] for t in (0, 5, 2)})  # ahead, to one side, to the other


def a_config(**changes) -> HeadConfig:
    """40 iterations of a small network, with density control."""
    config = HeadConfig(
        initialise=8,
        deform=12,
        refine=20,
        gaussians=900,
        mouth_gaussians=60,
        loss=LossWeights(vgg=0.0),
        deformation=DeformationConfig(channels=8, hidden=16, anchors=128),
        density=DensityConfig(every=4, start=4, budget=1000, grad_threshold=0.0),
    )
    return replace(config, **changes)


def short(**changes) -> HeadConfig:
    """10 iterations of few Gaussians: the stand-in for gsplat is dense."""
    density = DensityConfig(every=2, start=2, budget=170, grad_threshold=0.0)
    lengths = {"initialise": 3, "deform": 4, "refine": 3}
    return a_config(**lengths, gaussians=150, mouth_gaussians=20, density=density, **changes)


def psnr(clip, head, t) -> float:
    """Of a trained head (or a state) over black, at frame t of the clip."""
    gaussians = head.gaussians() if callable(head.gaussians) else head.gaussians
    with torch.no_grad():
        moved = training.deform(gaussians, head.deformation, clip.track.motion, t)
        image = rasterize(moved, clip.track.camera_at(t), torch.zeros(3)).rgb.numpy()
    truth = clip.image(t) / 255 * (clip.head_mask(t)[..., None] > 0)
    return -10 * np.log10(((image - truth) ** 2).mean())


def drawn_avatar(clip, model: HeadModel, head: training.TrainedHead) -> Avatar:
    """A trained head as an avatar, without speech, refiner and film grain."""
    frames, masks = (clip.image(t) for t in clip.train), (clip.head_mask(t) for t in clip.train)
    plate = np.full((SIZE, SIZE, 3), 90, np.uint8)
    return Avatar(
        head.gaussians,
        head.deformation,
        clip.track.camera,
        head.motion,
        Images.encode(frames, ".jpg"),
        Images.encode(masks, ".png"),
        plate,
        model.mouth_expression,
        model.mouth_landmark_weight,
        source={"name": "drawn"},
    )


def clip_on_disk(path: Path, drawn, seconds: int = 2) -> Path:
    """The drawn clip, repeated, as a folder with sound."""
    t = 25 * seconds
    write_clip(path, t=t, size=SIZE)
    order = np.arange(t) % len(drawn.track)
    for i, k in enumerate(order):
        write_png(path / "frames" / f"{i:06d}.png", drawn.image(int(k)))
        write_png(path / "masks/head" / f"{i:06d}.png", drawn.head_mask(int(k)))
    track = drawn.track
    save_track(
        path / "track.safetensors",
        FaceTrack(
            track.motion[order], track.identity, track.camera, track.landmarks_px[order], track.confidence[order]
        ),
    )
    save_tensors(
        path / "depth.safetensors",
        {"frames": torch.tensor(list(drawn.depths())), "depth": np.stack(list(drawn.depths().values()))},
        "hicode-depth",
        2,
    )
    config = json.loads((path / "clip.json").read_text())
    config["test"] = [t - 3, t]
    (path / "clip.json").write_text(json.dumps(config))
    return path
