"""A fake avatar with real speech models, and sound for it. It renders a disc whose colour tells the motion."""

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from hicode.audio import SAMPLE_RATE_HZ
from hicode.avatar.avatar import Avatar
from hicode.avatar.blend import compose
from hicode.camera import Camera
from hicode.motion import Motion, MotionFrame
from hicode.render import Rendering
from hicode.session.session import Frame
from hicode.speech.encoders import default_spec
from hicode.speech.faceformer import Faceformer, FaceformerConfig
from hicode.speech.speech_model import SpeechModels, Subject

SIZE = 64
DRIVING = 20
CAMERA = torch.tensor([[70.0, 0, 32], [0, 70, 32], [0, 0, 1]])


def motion_of(count: int, seed: int = 0) -> Motion:
    g = torch.Generator().manual_seed(seed)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, 0, 3] = torch.arange(count) / 100
    return Motion(torch.rand(count, 64, generator=g), torch.randn(count, 478, 3, generator=g), pose)


def speech_models(seed: int = 0) -> SpeechModels:
    """Real Faceformers over log-mel features, with random weights."""
    torch.manual_seed(seed)
    models = []
    for outputs in (64, 478 * 3):
        model = Faceformer(FaceformerConfig(feature_dim=160, outputs=outputs, components=8))
        torch.nn.init.normal_(model.output.weight, std=0.3)
        torch.nn.init.normal_(model.basis, std=0.1)
        models.append(model)
    subject = Subject(torch.zeros(64), torch.zeros(478, 3), torch.zeros(20, 478, 3))
    return SpeechModels(*models, default_spec("logmel"), subject)


@dataclass
class FakeAvatar(Avatar):
    """An avatar whose render is a disc: its colour tells the expression, its place the pose."""

    gaussians: None = None
    deformation: None = None
    camera: Camera = field(default_factory=lambda: Camera(CAMERA, torch.eye(4), SIZE, SIZE))
    driving: Motion = field(default_factory=lambda: motion_of(DRIVING))
    driving_frames: None = None
    driving_masks: None = None
    sha256: str = 64 * "a"
    info: dict = field(default_factory=dict)
    background_plate: np.ndarray = field(default_factory=lambda: np.full((SIZE, SIZE, 3), 60, np.uint8))
    mouth_expression: torch.Tensor = field(default_factory=lambda: torch.arange(64) < 40)
    mouth_landmark_weight: torch.Tensor = field(default_factory=lambda: torch.linspace(0, 1, 478))
    film_grain: object = None
    speech: SpeechModels | None = field(default_factory=speech_models)
    audio_driven: bool = False
    shown: list = field(default_factory=list)  # (motion, thread) of each rendered frame
    grains: list = field(default_factory=list)  # what grain each frame was composed with

    def __post_init__(self):
        """Nothing is deformed."""

    def landmark_actions(self) -> torch.Tensor:
        return torch.zeros(64, 478, 3)

    def driving_frame(self, t: int) -> np.ndarray:
        assert 0 <= t < len(self.driving)
        return np.full((SIZE, SIZE, 3), 60 + t % 190, np.uint8)

    def driving_mask(self, t: int) -> np.ndarray:
        y, x = np.mgrid[:SIZE, :SIZE]
        return np.where(np.hypot(x - 32, y - 30) < 14, 255, 0).astype(np.uint8)

    @property
    def rendered(self) -> int:
        return len(self.shown)

    def deform(self, frame: MotionFrame) -> MotionFrame:
        return frame

    def landmarks_px(self, motion: Motion, t: int) -> np.ndarray:
        return np.zeros((478, 2), np.float32)

    def face_mask(self, motion: Motion, t: int, room: np.ndarray, frame_motion: Motion, frame_t: int) -> np.ndarray:
        room = room & (np.hypot(*np.mgrid[-30 : SIZE - 30, -32 : SIZE - 32]) < 14)
        return np.where(room & (np.arange(SIZE)[:, None] >= 24), 255, 0).astype(np.uint8)  # all but the top of the head

    def rasterize(self, deformed: MotionFrame, pose: torch.Tensor, within: tuple | None = None) -> Rendering:
        self.shown.append((deformed, threading.get_ident()))
        alpha = torch.from_numpy(self.driving_mask(0) / 255.0).float()
        colour = torch.stack([deformed.expression[0], deformed.expression[50], deformed.landmarks[400, 0]]).sigmoid()
        return Rendering(alpha[..., None] * colour, alpha)

    def compose(
        self, rendering: Rendering, landmarks_px: np.ndarray, frame: np.ndarray, mask: np.ndarray, index: int
    ) -> np.ndarray:
        self.grains.append(self.film_grain)
        out = compose(rendering.rgb, rendering.alpha, frame, mask, self.background_plate)
        out[30, 32, 0] = index % 251  # as grain does, it tells one frame from the next
        return out


def expressions(frames: list[Frame]) -> torch.Tensor:
    """Of the frames' motion: "t 64"."""
    return torch.cat([frame.motion.expression for frame in frames])


def source_video(path, count=30, width=160, height=120):
    from hicode.media.video import VideoWriter

    with VideoWriter(path, width, height, crf=1) as video:
        for t in range(count):
            video.write(np.full((height, width, 3), 100 + 3 * t, np.uint8))


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = round(seconds * SAMPLE_RATE_HZ)
    syllables = np.clip(np.sin(2 * np.pi * 4 * np.arange(n) / SAMPLE_RATE_HZ), 0, 1)
    return (0.1 * syllables * rng.standard_normal(n)).astype(np.float32)
