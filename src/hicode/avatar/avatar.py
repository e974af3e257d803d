"""The avatar: everything needed to make one person speak, in one self-describing file.

It holds the canonical Gaussians with their deformation, the compositor, the speech models, and the driving track: the training part of the clip
(frames, head masks, poses, upper face) that gives a synthesised head its body, background, head motion and blinks.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from hicode.avatar.compositor import Box, Compositor, compose, face_mask, seam_box
from hicode.avatar.deformation import Deformation
from hicode.avatar.fast import FrameDeformer
from hicode.avatar.film_grain import FilmGrain
from hicode.camera import Camera
from hicode.errors import FileFormatError
from hicode.files import load_tensors, save_tensors
from hicode.gaussians import Gaussians
from hicode.media.images import Images
from hicode.motion import Motion
from hicode.render import Rendering, rasterize
from hicode.speech.faceformer import SpeechModels

SCHEMA, VERSION = "hicode-avatar", 2
MAX_DRIVING_FRAMES = 1500  # one minute: about 90 MB of JPEG; played back and forth, nobody sees it repeat


@dataclass(eq=False)
class Avatar:
    """A talking head. Frames are `camera.width` x `camera.height` crops at `driving.fps`.

    driving         t frames of motion: head pose, upper face and eyes of a synthesised head, played back and forth
    driving_frames, driving_masks  the t frames and soft head masks that composition pastes into
    plate           "h w 3" background behind the head
    mouth_expression "64", mouth_landmark_weight "478"  which control speech drives, copied from the head model
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
    plate: UInt8[np.ndarray, "h w 3"]
    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]
    compositor: Compositor | None = None
    film_grain: FilmGrain | None = None
    speech: SpeechModels | None = None
    source: dict = field(default_factory=dict)
    info: dict = field(default_factory=dict)

    def driving_frame(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        return self.driving_frames[t]

    def driving_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        return self.driving_masks[t]

    def to(self, device: torch.device | str) -> "Avatar":
        """This avatar with what renders (Gaussians, deformation, compositor) on a device; motion, speech models and pictures stay on the CPU.

        The two networks are moved, not copied.
        """
        compositor = None if self.compositor is None else self.compositor.to(device)
        gaussians = self.gaussians.map(lambda v: v.to(device))
        return replace(self, gaussians=gaussians, deformation=self.deformation.to(device), compositor=compositor)

    @property
    def hears(self) -> bool:
        """Whether speech features move it directly (Table 2's None): its motion must carry them."""
        return self.deformation.config.coarse == "audio"

    def landmark_actions(self) -> Float[Tensor, "64 478 3"]:
        """How the landmarks move with each of the 3DMM's actions."""
        if self.deformation.carrier is not None:
            return self.deformation.carrier.landmark_basis
        from hicode.tracking.head_model import HeadModel

        model = HeadModel.load()
        return model.landmarks(model.expression_basis)

    @torch.no_grad()
    def deformed(self, motion: Motion, t: int) -> Gaussians:
        """Eqs 7-8 at frame t of a motion."""
        deformer = self._deformer()
        if deformer is not None:
            expression, landmarks, _, turn = motion.control_at(t)
            return deformer(expression, landmarks, turn)
        return self.deformation.moved(self.gaussians, *motion.control_at(t, self.gaussians.means.device))

    def _deformer(self) -> FrameDeformer | None:
        """What deforms this cloud quickly, made once; None where only `Deformation` itself can."""
        known = self.__dict__.get("_known_deformer")
        if known is None or known.gaussians is not self.gaussians or known.deformation is not self.deformation:
            known = (
                FrameDeformer(self.deformation, self.gaussians) if FrameDeformer.supports(self.deformation) else None
            )
            self.__dict__["_known_deformer"] = known
        return known

    @torch.no_grad()
    def render(
        self, motion: Motion, t: int, background: Float[Tensor, "3"] | None = None, backend: str = "auto"
    ) -> Rendering:
        """The head at frame t of a motion, over a constant background (black where none is given)."""
        return self.rasterized(self.deformed(motion, t), motion, t, background, backend)

    @torch.no_grad()
    def rasterized(
        self,
        deformed: Gaussians,
        motion: Motion,
        t: int,
        background: Float[Tensor, "3"] | None = None,
        backend: str = "auto",
        within: Box | None = None,
    ) -> Rendering:
        """The second half of `render`; where nothing outside a box (px) is wanted, it is left black and uncovered."""
        background = torch.zeros(3) if background is None else background
        camera = self.camera.with_pose(motion.T_camera_head[t])
        if within is None:
            return rasterize(deformed, camera, background, backend=backend)
        x0, y0, x1, y1 = within
        part = rasterize(deformed, camera.cropped(x0, y0, x1 - x0, y1 - y0), background, backend=backend)
        rgb, alpha = (
            part.rgb.new_zeros(camera.height, camera.width, 3),
            part.alpha.new_zeros(camera.height, camera.width),
        )
        rgb[y0:y1, x0:x1], alpha[y0:y1, x0:x1] = part.rgb, part.alpha
        return Rendering(rgb, alpha)

    def landmarks_px(self, motion: Motion, t: int) -> Float[np.ndarray, "478 2"]:
        """Where the landmarks of frame t of a motion fall in the picture."""
        return self.camera.with_pose(motion.T_camera_head[t]).project(motion.landmarks[t])[0].numpy()

    def face_mask(
        self, motion: Motion, t: int, head_mask: UInt8[np.ndarray, "h w"], frame_motion: Motion, frame_t: int
    ) -> UInt8[np.ndarray, "h w"]:
        """The part of a frame's head mask that a face in its pose (frame t of a motion) and the frame's own (frame `frame_t` of `frame_motion`) take up."""
        return face_mask(head_mask, self.landmarks_px(motion, t), self.landmarks_px(frame_motion, frame_t))

    def composed(
        self, rendering: Rendering, motion: Motion, t: int, frame: UInt8[np.ndarray, "h w 3"], head_mask: UInt8[np.ndarray, "h w"], index: int,
        shown: UInt8[np.ndarray, "h w"] | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:  # fmt: skip
        """The head rendered at frame t of a motion, composited onto `frame` within its dilated head mask (Eqs 17-18); `index` tells one frame's grain
        from the next one's. `shown`: the part of the head mask that is
        composited (`face_mask`), all of it if not given."""
        grain = self.film_grain.layer(self.landmarks_px(motion, t), index) if self.film_grain is not None else None
        mask = head_mask if shown is None else shown
        return compose(rendering.rgb, rendering.alpha, frame, mask, self.plate, self.compositor, grain)

    def synthesize_frame(
        self, motion: Motion, t: int, frame: UInt8[np.ndarray, "h w 3"], head_mask: UInt8[np.ndarray, "h w"], backend: str = "auto",
        own: Motion | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]:  # fmt: skip
        """The final frame of frame t of a motion: rendered and composited; its grain is that of index t. Where the frame's own motion is given (of the same
        poses, at the same t), the face alone, else the head."""
        shown = None if own is None else self.face_mask(motion, t, head_mask, own, t)
        rendering = self.rasterized(
            self.deformed(motion, t), motion, t, backend=backend, within=None if shown is None else seam_box(shown)
        )
        return self.composed(rendering, motion, t, frame, head_mask, t, shown=shown)

    def save(self, path: Path | str) -> Path:
        """One file, written whole or not at all."""
        tensors: dict[str, Tensor] = {f"gaussians.{k}": v for k, v in self.gaussians.tensors().items()}
        deformation, deformation_config = self.deformation.state()
        # Indices are below 2^31 and anchors' count below 2^15: half the file of a long binding goes.
        tensors |= {
            f"deformation.{k}": v.to(torch.int32) if v.dtype == torch.int64 else v for k, v in deformation.items()
        }
        tensors |= {f"driving.{k}": v for k, v in self.driving.tensors().items()}
        tensors |= {"camera.K": self.camera.K, "plate": torch.from_numpy(self.plate)}
        tensors |= {
            "driving_frames.data": self.driving_frames.data,
            "driving_frames.offsets": self.driving_frames.offsets,
        }
        tensors |= {"driving_masks.data": self.driving_masks.data, "driving_masks.offsets": self.driving_masks.offsets}
        tensors |= {"mouth_expression": self.mouth_expression, "mouth_landmark_weight": self.mouth_landmark_weight}
        config = {
            "width": self.camera.width,
            "height": self.camera.height,
            "fps": self.driving.fps,
            "deformation": deformation_config,
            "source": self.source,
            "info": self.info,
        }
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
            return _assemble(tensors, config)
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"{path} is an avatar with parts missing or of the wrong shape ({error}). Train it anew."
            ) from error


def _assemble(tensors: dict[str, Tensor], config: dict) -> Avatar:
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
        tensors["plate"].numpy(),
        tensors["mouth_expression"],
        tensors["mouth_landmark_weight"],
        Compositor.from_state(part("compositor."), config["compositor"]) if "compositor" in config else None,
        FilmGrain.from_state(part("film_grain."), config["film_grain"]) if "film_grain" in config else None,
        SpeechModels.from_state(part("speech."), config["speech"]) if "speech" in config else None,
        config["source"],
        config["info"],
    )
