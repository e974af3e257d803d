"""The avatar: everything needed to make one person speak, in one self-describing file.

It holds the canonical Gaussians with their deformation, the compositor, the speech models, and the driving track: the
training part of the clip, which gives a spoken head its body, background, head motion and blinks.
"""

import copy
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hicode.avatar.blend import BlendRegion, Box, blend_box, compose, face_mask, face_room
from hicode.avatar.deformation import Deformation
from hicode.avatar.fast import FrameDeformer
from hicode.avatar.film_grain import FilmGrain
from hicode.avatar.refiner import Compositor
from hicode.camera import Camera
from hicode.errors import FileFormatError
from hicode.files import load_tensors, save_tensors
from hicode.gaussians import Gaussians
from hicode.media.images import Images
from hicode.motion import N_LANDMARKS, Motion, MotionFrame
from hicode.render import Backend, Rendering, rasterize
from hicode.speech.speech_model import SpeechModels

SCHEMA, VERSION = "hicode-avatar", 2
MAX_DRIVING_FRAMES = 1500  # one minute: about 90 MB of JPEG


@dataclass(eq=False)
class Avatar:
    """A talking head. Frames are `camera.width` x `camera.height` crops at `driving.fps`.

    Gaussians and deformation may not be changed in place or assigned: use `dataclasses.replace`.

    driving         t frames of motion: head pose, upper face and eyes of a spoken head, played back and forth
    driving_frames, driving_masks  the t frames and soft head masks that composition pastes into
    background_plate "h w 3" behind the head
    mouth_expression "64", mouth_landmark_weight "478"  which controls speech drives, copied from the head model
    film_grain      fine detail of the recording, given back to the composed head; None: none
    source          path, sha256 and crop box of the video it came from: for output at its original size
    info            how it was made: preset, seconds a stage, package version, commit, seed
    """

    gaussians: Gaussians
    deformation: Deformation
    camera: Camera
    driving: Motion
    driving_frames: Images
    driving_masks: Images
    background_plate: UInt8[np.ndarray, "h w 3"]
    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]
    compositor: Compositor | None = None
    film_grain: FilmGrain | None = None
    speech: SpeechModels | None = None
    source: dict = field(default_factory=dict)
    info: dict = field(default_factory=dict)
    _fast: FrameDeformer | None = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        supported = FrameDeformer.supports(self.deformation)
        self._fast = FrameDeformer(self.deformation, self.gaussians) if supported else None

    @property
    def sha256(self) -> str:
        """Of the canonical Gaussians: the avatar's name in the marks of its videos, whatever file holds it."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.gaussians.tensors().items()):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def driving_frame(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """Picture t of the driving track."""
        return _sized(self.driving_frames[t], self.background_plate.shape)

    def driving_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """Soft head mask t of the driving track."""
        return _sized(self.driving_masks[t], self.background_plate.shape[:2])

    def to(self, device: torch.device | str) -> "Avatar":
        """A copy whose Gaussians, deformation and compositor are on a device; all else stays on the CPU."""
        gaussians = self.gaussians.map(lambda v: v.to(device))
        deformation = copy.deepcopy(self.deformation).to(device)
        compositor = None if self.compositor is None else copy.deepcopy(self.compositor).to(device)
        return replace(self, gaussians=gaussians, deformation=deformation, compositor=compositor)

    @property
    def audio_driven(self) -> bool:
        """Whether speech features move it directly (Table 2's None): its motion must carry them."""
        return self.deformation.config.control == "speech"

    def landmark_actions(self) -> Float[Tensor, "64 478 3"]:
        """How the landmarks move with each of the 3DMM's expressions."""
        if self.deformation.rig is not None:
            return self.deformation.rig.landmark_basis
        from hicode.tracking.head_model import HeadModel

        model = HeadModel.load()
        return model.landmarks(model.expression_basis)

    @torch.no_grad()
    def deform(self, frame: MotionFrame) -> Gaussians:
        """The Gaussians at one frame (Eqs 7-8)."""
        if self._fast is not None:
            return self._fast(frame)
        return self.deformation.deform(self.gaussians, frame.to(self.gaussians.means.device))

    @torch.no_grad()
    def rasterize(
        self,
        deformed: Gaussians,
        T_camera_head: Float[Tensor, "4 4"],
        background: Float[Tensor, "3"] | None = None,
        backend: Backend = "auto",
        within: Box | BlendRegion | None = None,
    ) -> Rendering:
        """Deformed Gaussians in a head pose, over a colour (default black); outside `within` (px) nothing is drawn.

        Of a blend region, only what composition without a refiner reads.
        """
        background = torch.zeros(3) if background is None else background
        camera = self.camera.with_pose(T_camera_head)
        if within is None:
            return rasterize(deformed, camera, background, backend=backend)
        wanted = None
        if isinstance(within, BlendRegion):
            within, wanted = within.box, within.inside if self.compositor is None else None
        x0, y0, x1, y1 = within
        view = camera.cropped(x0, y0, x1 - x0, y1 - y0)
        part = rasterize(deformed, view, background, backend=backend, wanted=wanted)
        rgb = part.rgb.new_zeros(camera.height, camera.width, 3)
        alpha = part.alpha.new_zeros(camera.height, camera.width)
        rgb[y0:y1, x0:x1], alpha[y0:y1, x0:x1] = part.rgb, part.alpha
        return Rendering(rgb, alpha)

    def render(
        self,
        frame: MotionFrame,
        T_camera_head: Float[Tensor, "4 4"],
        background: Float[Tensor, "3"] | None = None,
        backend: Backend = "auto",
    ) -> Rendering:
        """The head at one frame of a motion in a head pose, over a colour (black if not given)."""
        return self.rasterize(self.deform(frame), T_camera_head, background, backend)

    def landmarks_px(self, motion: Motion, t: int) -> Float[np.ndarray, "478 2"]:
        """Where the landmarks of frame t of a motion fall in the picture."""
        return self.camera.with_pose(motion.T_camera_head[t]).project(motion.landmarks[t])[0].numpy()

    def face_mask(
        self, motion: Motion, t: int, room: Bool[np.ndarray, "h w"], frame_motion: Motion, frame_t: int
    ) -> UInt8[np.ndarray, "h w"]:
        """The part of a head mask (its `blend.face_room`) that two faces take up: that of frame t of a motion, and the
        frame's own (frame `frame_t` of `frame_motion`)."""
        return face_mask(room, self.landmarks_px(motion, t), self.landmarks_px(frame_motion, frame_t))

    def compose(
        self,
        rendering: Rendering,
        landmarks_px: Float[np.ndarray, "478 2"],
        frame: UInt8[np.ndarray, "h w 3"],
        mask: UInt8[np.ndarray, "h w"] | BlendRegion,
        index: int,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """A rendered head in a frame, within a head or face mask or its region; `index` chooses its film grain."""
        grain = None if self.film_grain is None else self.film_grain.layer(landmarks_px, index)
        if grain is not None:
            _sized(grain.field, self.background_plate.shape[:2])
        return compose(rendering.rgb, rendering.alpha, frame, mask, self.background_plate, self.compositor, grain)

    def synthesize_frame(
        self,
        motion: Motion,
        t: int,
        frame: UInt8[np.ndarray, "h w 3"],
        head_mask: UInt8[np.ndarray, "h w"],
        own: Motion | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:
        """Frame t of a motion, rendered and composed into a frame of the same head pose.

        With the frame's own motion `own` (same t), the face alone goes in; else the head.
        """
        mask = head_mask if own is None else self.face_mask(motion, t, face_room(head_mask), own, t)
        within = None if own is None else blend_box(mask)
        rendering = self.rasterize(self.deform(motion[t]), motion.T_camera_head[t], within=within)
        return self.compose(rendering, self.landmarks_px(motion, t), frame, mask, t)

    def save(self, path: Path | str) -> Path:
        """One file, written whole or not at all."""
        tensors: dict[str, Tensor] = {f"gaussians.{k}": v for k, v in self.gaussians.tensors().items()}
        deformation, deformation_config = self.deformation.state()
        # Indices fit 32 bits, which halves a long binding.
        tensors |= {
            f"deformation.{k}": v.to(torch.int32) if v.dtype == torch.int64 else v for k, v in deformation.items()
        }
        tensors |= {f"driving.{k}": v for k, v in self.driving.tensors().items()}
        tensors |= {"camera.K": self.camera.K, "background_plate": torch.from_numpy(self.background_plate)}
        tensors |= {
            "driving_frames.data": self.driving_frames.data,
            "driving_frames.offsets": self.driving_frames.offsets,
        }
        tensors |= {"driving_masks.data": self.driving_masks.data, "driving_masks.offsets": self.driving_masks.offsets}
        tensors |= {"mouth_expression": self.mouth_expression, "mouth_landmark_weight": self.mouth_landmark_weight}
        config = {
            "width": self.camera.width, "height": self.camera.height, "fps": self.driving.fps,
            "deformation": deformation_config, "source": self.source, "info": self.info,
        }  # fmt: skip
        for name in ("compositor", "film_grain", "speech"):
            part = getattr(self, name)
            if part is not None:
                part_tensors, config[name] = part.state()
                tensors |= {f"{name}.{k}": v for k, v in part_tensors.items()}
        save_tensors(path, tensors, SCHEMA, VERSION, config)
        return Path(path)

    @staticmethod
    def load(path: Path | str) -> "Avatar":
        """Read an avatar. Raises FileFormatError, naming the file and the reason, for anything else."""
        tensors, config = load_tensors(path, SCHEMA, VERSION)
        try:
            avatar = _assemble(tensors, config)
            _check(avatar, tensors)
            return avatar
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
            raise FileFormatError(
                f"{path} is an avatar with parts missing or of the wrong shape ({error!s:.200}). Train it anew."
            ) from error


_FLOATS, _INDICES, _BYTES = (torch.float32, torch.float16), (torch.int32, torch.int64), (torch.uint8,)
_DTYPES = {
    "deformation.binding.vertices": _INDICES, "deformation.binding.landmarks": _INDICES,
    "deformation.anchors.index": _INDICES, "driving_frames.data": _BYTES, "driving_masks.data": _BYTES,
    "film_grain.data": _BYTES, "driving_frames.offsets": _INDICES, "driving_masks.offsets": _INDICES,
    "film_grain.offsets": _INDICES, "background_plate": _BYTES, "mouth_expression": (torch.bool,),
}  # fmt: skip


def _check(avatar: Avatar, tensors: dict[str, Tensor]) -> None:
    """Finite numbers, shapes that fit each other, indices within their tables: compiled code checks none of them.

    Raises ValueError.
    """

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    for name, tensor in tensors.items():
        need(tensor.dtype in _DTYPES.get(name, _FLOATS), f"{name} is {tensor.dtype}")
        need(not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), f"{name} has no finite numbers")
    n, t, pictures = len(avatar.gaussians), len(avatar.driving), (avatar.driving_frames, avatar.driving_masks)
    widths = {"means": (3,), "log_scales": (3,), "quats": (4,), "colors": (3,), "view_dependent_color": (3, 3)}
    for name, tensor in avatar.gaussians.tensors().items():
        need(tensor.shape == (n, *widths.get(name, ())), f"gaussians.{name} is {tuple(tensor.shape)}")
    rig, binding, anchors = avatar.deformation.rig, avatar.deformation.binding, avatar.deformation.anchors
    tables = []
    if rig is not None:
        if binding is None:
            raise ValueError("the rig has no binding")
        landmarks = binding.landmarks, binding.landmark_weights, N_LANDMARKS
        tables += [(binding.vertices, binding.weights, rig.expression_basis.shape[1]), landmarks]
    if anchors is not None:
        tables.append((anchors.index, anchors.weight, len(anchors.points)))
    for index, weight, rows in tables:
        need(index.shape == weight.shape and index.ndim == 2 and len(index) == n, "an index has the wrong shape")
        need(not n or bool(((index >= 0) & (index < rows)).all()), "an index points outside its table")
    need(all(len(part) == t for part in pictures) and t > 0, "the driving track's parts differ in length")
    motion = avatar.driving
    need(motion.expression.shape == (t, 64) and motion.landmarks.shape == (t, N_LANDMARKS, 3), "the motion's shape")
    need(motion.T_camera_head.shape == (t, 4, 4) and avatar.camera.K.shape == (3, 3), "the poses' shape")
    height, width = avatar.camera.height, avatar.camera.width
    need(avatar.background_plate.shape == (height, width, 3) and avatar.background_plate.dtype == np.uint8, "the plate")
    need(avatar.mouth_expression.shape == (64,) and avatar.mouth_landmark_weight.shape == (N_LANDMARKS,), "the mouth")
    for images in (*pictures, *(() if avatar.film_grain is None else (avatar.film_grain.fields,))):
        edges = images.offsets.tolist()
        places = edges[0] >= 0 and edges == sorted(edges) and edges[-1] <= len(images.data)
        need(places, "the pictures' places")
    grain = avatar.film_grain
    need(grain is None or 0 < len(grain.landmarks_px) == len(grain.fields), "the film grain's parts differ in length")
    need(grain is None or 0 <= grain.strength <= 10, "the film grain's strength")


def _sized(picture: UInt8[np.ndarray, "h w *c"], shape: tuple[int, ...]) -> UInt8[np.ndarray, "h w *c"]:
    """The picture, if it has that shape: compiled code does not ask. Raises FileFormatError."""
    if picture.shape != shape:
        raise FileFormatError("A picture of the avatar has the wrong size. Train the avatar anew.")
    return picture


def _assemble(tensors: dict[str, Tensor], config: dict) -> Avatar:
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    deformation = {k: v.long() if v.dtype == torch.int32 else v for k, v in part("deformation.").items()}
    driving = part("driving.")
    camera = Camera(tensors["camera.K"], torch.eye(4), config["width"], config["height"])
    return Avatar(
        Gaussians(**part("gaussians.")),
        Deformation.from_state(deformation, config["deformation"]).eval().requires_grad_(False),
        camera,
        Motion(**driving, fps=config["fps"]),
        Images(**part("driving_frames.")),
        Images(**part("driving_masks.")),
        tensors["background_plate"].numpy(),
        tensors["mouth_expression"],
        tensors["mouth_landmark_weight"],
        Compositor.from_state(part("compositor."), config["compositor"]) if "compositor" in config else None,
        FilmGrain.from_state(part("film_grain."), config["film_grain"]) if "film_grain" in config else None,
        SpeechModels.from_state(part("speech."), config["speech"]) if "speech" in config else None,
        config["source"],
        config["info"],
    )
