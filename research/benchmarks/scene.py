"""The head model itself, drawn as a clip, as a training state and as an avatar: to be measured on every machine.

n Gaussians lie on the model's surface. They shrink as n grows, as in a trained head. Nothing is trained: the costs do
not depend on what is shown.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from hicode.avatar.avatar import Avatar
from hicode.avatar.deformation import Deformation
from hicode.avatar.hfec import HFEC
from hicode.avatar.refiner import Compositor
from hicode.avatar.rig import MeshRig, bind
from hicode.camera import Camera
from hicode.gaussians import Gaussians, gaussians_from_points
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.media.images import Images
from hicode.motion import FaceTrack, Motion
from hicode.preparation.clip import Clip
from hicode.render.mesh import rasterize_mesh
from hicode.speech.encoders import default_spec
from hicode.speech.faceformer import Faceformer, FaceformerConfig
from hicode.speech.speech_model import SpeechModels, Subject
from hicode.tracking.head_model import HeadModel
from hicode.training.checkpoint import HeadState, PoseRefinement, head_optimizer
from hicode.training.density import GradientStatistics
from hicode.training.frames import TrainingFrames
from hicode.training.stages import HeadConfig

HEAD_FOCAL = 2.75  # focal length over the image's side: the head fills about 45 % of the picture
SKIN = np.array([0.8, 0.6, 0.5])


@cache
def head_model() -> HeadModel:
    return HeadModel.load()


@cache
def drawn_clip(size: int = 512, frames: int = 8) -> SimpleNamespace:
    """What training reads of a clip: `frames` pictures of a head that turns and opens its mouth."""
    model = head_model()
    identity = 0.5 * torch.randn(80, generator=torch.Generator().manual_seed(0))
    t = torch.arange(frames)
    expression = torch.zeros(frames, 64)
    expression[:, model.expression_names.index("jawOpen")] = 0.3 + 0.3 * torch.sin(0.9 * t)
    angles = torch.stack([0 * t, 0.15 * torch.sin(t.float()), 0 * t], 1)
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    poses = rigid(flip @ rotation_from_axis_angle(angles), torch.tensor([0.0, 0.1, 9.0]).expand(frames, 3))
    camera = Camera.pinhole(HEAD_FOCAL * size, size, size)
    vertices = model.vertices(identity, expression)
    landmarks = model.landmarks(vertices)
    grain = np.random.default_rng(0).normal(0, 2, (size, size, 3))
    images, masks, depths, points = [], [], [], []
    for k in range(frames):
        px, depth = camera.with_pose(poses[k]).project(vertices[k])
        seen = rasterize_mesh(px.numpy(), depth.numpy(), model.triangles.numpy(), size, size)
        head = np.isfinite(seen.depth)
        shade = np.where(head, 1.6 - 0.1 * (seen.depth - 8) ** 2, 0)[..., None]
        images.append(np.clip(np.where(head[..., None], 255 * SKIN * shade, 90) + grain, 0, 255).astype(np.uint8))
        masks.append(np.where(head, 255, 0).astype(np.uint8))
        depths.append(np.where(head, seen.depth, np.nan).astype(np.float32))
        points.append(camera.with_pose(poses[k]).project(landmarks[k])[0])
    track = FaceTrack(Motion(expression, landmarks, poses), identity, camera, torch.stack(points), torch.ones(frames))
    return SimpleNamespace(
        train=range(frames),
        chosen=np.ones(frames, bool),
        usable=np.ones(frames, bool),
        track=track,
        width=size,
        height=size,
        image=lambda k: images[k],
        head_mask=lambda k: masks[k],
        depths=lambda: {0: depths[0]},
    )


def drawn_cloud(n: int, clip: SimpleNamespace, config: HeadConfig) -> tuple[Gaussians, Deformation]:
    """n Gaussians on the model's surface and the deformation that carries them, its control no longer the identity."""
    model, motion, identity = head_model(), clip.track.motion, clip.track.identity
    rng = np.random.default_rng(0)
    neutral = model.vertices(identity)
    corners = neutral[model.triangles.long()]
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=1).double().numpy()
    pick = rng.choice(len(corners), n, p=area / area.sum())
    weights = torch.from_numpy(rng.dirichlet([1, 1, 1], n).astype(np.float32))
    points = (corners[pick] * weights[..., None]).sum(1)
    colors = torch.from_numpy(SKIN.astype(np.float32)).expand(n, 3) + 0.1 * torch.randn(n, 3)
    cloud = gaussians_from_points(points, colors, 0.5, max_scale=0.1)
    landmarks = model.landmarks(neutral)
    basis = torch.stack([model.landmarks(neutral + b) - landmarks for b in model.expression_basis])
    torch.manual_seed(0)
    center = neutral.mean(0)
    radius = float((points - center).norm(dim=1).quantile(0.99))
    rig = MeshRig(model.expression_basis, landmarks, basis) if config.deformation.rig else None
    deformation = Deformation.create(config.deformation, identity, center, radius, rig)
    deformation.fit(motion)
    offsets = cast(HFEC, deformation.control).offsets
    torch.nn.init.normal_(cast(torch.nn.Linear, offsets[-1]).weight, std=0.01)
    if rig is not None:
        deformation.binding = bind(points, neutral, model.triangles, landmarks)
    deformation.place_anchors(cloud.means)
    return cloud, deformation


def training_state(n: int, size: int, config: HeadConfig) -> tuple[HeadState, TrainingFrames, HeadConfig]:
    """A training in its refining stage, its networks included."""
    config = replace(config, initialise=0, deform=0, refine=1_000_000, vgg_start=0.0)
    clip = drawn_clip(size)
    cloud, deformation = drawn_cloud(n, clip, config)
    params = {k: torch.nn.Parameter(v.clone()) for k, v in cloud.tensors().items()}
    frames = TrainingFrames(cast(Clip, clip), config.preload_bytes)
    poses, statistics = PoseRefinement.zeros(len(frames)), GradientStatistics.zeros(n)
    optimizer = head_optimizer(params, deformation, config)
    return HeadState(params, deformation, optimizer, poses, statistics, iteration=1), frames, config


def drawn_avatar(n: int, size: int, config: HeadConfig, encoder: str = "embedded", compositor: bool = True) -> Avatar:
    """An avatar that can speak, with every part it may have."""
    clip, model = drawn_clip(size), head_model()
    cloud, deformation = drawn_cloud(n, clip, config)
    frames = [clip.image(k) for k in clip.train]
    generator = None
    if compositor:
        generator = Compositor()
        torch.nn.init.normal_(generator.out.weight, std=0.01)
        generator.for_inference()
    models, spec = [], default_spec(encoder)
    for outputs in (64, 478 * 3):
        faceformer = Faceformer(FaceformerConfig(feature_dim=spec.dim, outputs=outputs))
        torch.nn.init.normal_(faceformer.output.weight, std=0.02)
        models.append(faceformer)
    landmarks = clip.track.motion.landmarks.mean(0)
    speech = SpeechModels(models[0], models[1], spec, Subject(torch.zeros(64), landmarks, landmarks.expand(20, 478, 3)))
    return Avatar(
        cloud,
        deformation.eval().requires_grad_(False),
        clip.track.camera,
        clip.track.motion,
        Images.encode(frames, ".jpg"),
        Images.encode([clip.head_mask(k) for k in clip.train], ".png"),
        frames[0],
        model.mouth_expression,
        model.mouth_landmark_weight,
        generator,
        speech=speech,
    )


def speechlike(seconds: float) -> np.ndarray:
    """Noise in syllables, 16 kHz."""
    n = round(16000 * seconds)
    syllables = np.clip(np.sin(2 * np.pi * 4 * np.arange(n) / 16000), 0, 1)
    return (0.1 * syllables * np.random.default_rng(0).standard_normal(n)).astype(np.float32)
