"""Deformation of canonical Gaussians by facial motion (HiCoDe, Eqs 7-8).

n Gaussians, m anchors. Everything is in the canonical head frame; the head pose is applied by the camera. A frame moves
a Gaussian by the mesh rig (`rig.py`, ours) plus the offsets of the learned control: the paper's (`hfec.py`), or another
row's of Table 2 (`research/reproduce/controls.py` of a clone). Either may be absent. The control is a smooth field over
canonical space: it is evaluated on anchors and interpolated, or (`anchors=0`, the paper) evaluated on every Gaussian.
"""

from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hicode.avatar.anchors import Anchors, choose_anchors
from hicode.avatar.config import DeformationConfig
from hicode.avatar.hfec import HFEC, AnchorCache, LandmarkAttention, StaticAttention, nearness
from hicode.avatar.rig import Binding, MeshRig
from hicode.avatar.signals import Normalization
from hicode.gaussians import Gaussians
from hicode.motion import Motion, MotionFrame
from hicode.runtime import find_research

ROTATION_UNIT = 0.1  # sine of a common head rotation: the input of view-dependent colours is of order 1


class Offsets(NamedTuple):
    """(Δl, Δr, Δs) of Eq. 7, and the colours' (zero without `color_offset`)."""

    means: Float[Tensor, "n 3"]
    quats: Float[Tensor, "n 4"]
    log_scales: Float[Tensor, "n 3"]
    colors: Float[Tensor, "n 3"]


def _create_control(config: DeformationConfig) -> nn.Module | None:
    """The control of that name, a `Control`. Raises InputError for a row of Table 2 outside of a clone."""
    if config.control in ("none", "hfec"):
        return HFEC(config) if config.control == "hfec" else None
    find_research()
    from research.reproduce.controls import CONTROLS

    return CONTROLS[config.control](config)


class Deformation(nn.Module):
    """F_Δ of Eq. 7 for one person: rig, control, and what depends on the cloud (binding, anchors)."""

    def __init__(self, config: DeformationConfig, normalization: Normalization, rig: MeshRig | None):
        super().__init__()
        assert (rig is not None) == config.rig, "a rig is given if and only if the config has one"
        self.config = config
        self.normalization = normalization
        self.control = _create_control(config)
        parts = [] if self.control is None else self.control.modules()
        self._attends = any(isinstance(m, LandmarkAttention) for m in parts)
        self.rig = rig
        self.binding: Binding | None = None
        self.anchors: Anchors | None = None
        self._anchor_cache: AnchorCache | None = None

    @staticmethod
    def create(
        config: DeformationConfig,
        identity: Float[Tensor, "80"],
        center: Float[Tensor, "3"],
        radius: float,
        rig: MeshRig | None = None,
    ) -> "Deformation":
        """`center` and `radius` (head units) map the head into [-1, 1]^3."""
        speech_dim = config.speech_dim if config.control == "speech" else 0
        return Deformation(config, Normalization(identity, center, radius, config.expression_reach, speech_dim), rig)

    def _apply(self, fn, recurse=True):
        """What `.to(device)` does, to binding and anchors too."""
        if self.binding is not None:
            self.binding = Binding(**{k: fn(v) for k, v in self.binding.tensors().items()})
        if self.anchors is not None:
            self.anchors = Anchors(**{k: fn(v) for k, v in self.anchors.tensors().items()})
        self._anchor_cache = None
        return super()._apply(fn, recurse)

    def fit(self, motion: Motion) -> None:
        """Statistics of the training frames: normalisation of the signals, and the rig's mean residual."""
        self._anchor_cache = None
        self.normalization.fit(motion)
        if self.rig is not None:
            self.rig.fit(motion)

    def place_anchors(self, means: Float[Tensor, "n 3"]) -> None:
        """Choose anchors for the cloud. Call again after points were added, removed, or moved far."""
        self._anchor_cache = self.anchors = None
        if self.control is not None and self.config.anchors and len(means) > self.config.anchors:
            self.anchors = choose_anchors(means, self._importance(means), self.config.anchors)

    def _importance(self, means: Float[Tensor, "n 3"]) -> Float[Tensor, "n"]:
        """Three times denser where landmarks move most (lips, eyelids), fading over 30 mm; the face twice as dense as
        hair."""
        from scipy.spatial import KDTree

        landmarks, motion = (
            v.cpu().numpy() for v in (self.normalization.landmark_mean, self.normalization.landmark_motion)
        )
        distance, index = KDTree(landmarks).query(means.detach().cpu().numpy(), k=4)
        near = np.exp(-((distance[:, 0] / 0.3) ** 2))
        busy = motion[index].mean(1) / max(motion.max(), 1e-6)
        return torch.from_numpy((1 + near * (1 + 2 * busy)).astype(np.float32))

    def anchor_cache(self, means: Float[Tensor, "n 3"]) -> AnchorCache:
        """What the control needs of its points: the anchors, kept until they change, or the cloud itself."""
        if self.anchors is None:
            points = means if self.config.position_gradient else means.detach()
            return AnchorCache(self.normalization.positions(points), self._attention(points.detach()))
        if self._anchor_cache is None:
            points = self.anchors.points
            self._anchor_cache = AnchorCache(self.normalization.positions(points), self._attention(points))
        return self._anchor_cache

    def _attention(self, points: Float[Tensor, "m 3"]) -> StaticAttention | Float[Tensor, "m 478"] | None:
        if not self._attends:
            return None
        scores = [nearness(points, self.normalization.landmark_mean, r) for r in self.config.attention_reaches]
        if self.config.attention == "nearness":
            return StaticAttention(tuple(torch.softmax(score, -1) for score in scores))
        return scores[0] if scores else None

    def rig_displacement(self, frame: MotionFrame) -> Float[Tensor, "n 3"] | float:
        """Displacement by the rig; 0 without one."""
        if self.rig is None:
            return 0.0
        assert self.binding is not None, "the rig's Gaussians are not bound"
        return self.rig(self.binding, frame)

    def forward(self, means: Float[Tensor, "n 3"], frame: MotionFrame) -> Offsets:
        """Eq. 7 for canonical positions. InputError where the control needs speech features and the frame has none."""
        d_means, zeros = self.rig_displacement(frame), torch.zeros_like(means)
        if self.control is None:
            return Offsets(zeros + d_means, means.new_zeros(len(means), 4), zeros, zeros)
        delta = self.control(self.anchor_cache(means), self.normalization(frame))
        if self.anchors is not None:
            delta = self.anchors.interpolate(delta)
        means, quats, log_scales, *colors = delta.split([3, 4, 3, 3][: 4 if self.config.color_offset else 3], 1)
        return Offsets(means * self.config.max_offset + d_means, quats, log_scales, colors[0] if colors else zeros)

    def deform(self, gaussians: Gaussians, frame: MotionFrame) -> Gaussians:
        """The cloud at one frame (Eqs 7-8), its colours as seen at the frame's head rotation."""
        moved = gaussians.deformed(*self(gaussians.means, frame))
        return moved.seen_at(self.relative_rotation(frame.head_rotation))

    def relative_rotation(self, head_rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "3"]:
        """The head's rotation from the training frames' mean: sine times axis, over ROTATION_UNIT."""
        r = self.normalization.rotation_mean.T @ head_rotation
        return torch.stack([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]]) / (2 * ROTATION_UNIT)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, config) from which `from_state` makes the same deformation."""
        tensors = {f"net.{k}": v for k, v in self.state_dict().items()}
        if self.binding is not None:
            tensors |= {f"binding.{k}": v for k, v in self.binding.tensors().items()}
        if self.anchors is not None:
            tensors |= {f"anchors.{k}": v for k, v in self.anchors.tensors().items()}
        return tensors, asdict(self.config)

    @staticmethod
    def from_state(tensors: dict[str, Tensor], config: dict) -> "Deformation":
        """The inverse of `state`."""
        values: dict[str, Any] = config | {"attention_reaches": tuple(config["attention_reaches"])}
        cfg = DeformationConfig(**values)
        part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        net = part("net.")
        rig = None
        if cfg.rig:
            rig = MeshRig(*(net[f"rig.{k}"] for k in ("expression_basis", "landmark_neutral", "landmark_basis")))
        identity, center, radius = (net[f"normalization.{k}"] for k in ("identity", "center", "radius"))
        deformation = Deformation.create(cfg, identity, center, float(radius), rig)
        deformation.load_state_dict(net)
        if binding := part("binding."):
            deformation.binding = Binding(**binding)
        if anchors := part("anchors."):
            deformation.anchors = Anchors(**anchors)
        return deformation
