"""Rotations and rigid transforms.

Transforms read right to left: `p_camera = T_camera_head @ p_head`. Quaternions are wxyz and need not be normalised.
Everything here is batched over leading dimensions, differentiable, and keeps its input's float type.
"""

from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Numeric = TypeVar("Numeric", Tensor, np.ndarray, float)


def skew(vector: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """The matrix of the cross product: `skew(a) @ b = a x b`."""
    x, y, z = vector.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(*vector.shape[:-1], 3, 3)


def rotation_from_axis_angle(axis_angle: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """Rodrigues' formula, smooth through zero (gradients included)."""
    cross = skew(axis_angle)
    angle2 = (axis_angle * axis_angle).sum(-1)[..., None, None]
    small = angle2 < 1e-8
    safe2 = torch.where(small, torch.ones_like(angle2), angle2)  # keeps sqrt's gradient finite in the branch not taken
    angle = safe2.sqrt()
    first = torch.where(small, 1 - angle2 / 6, angle.sin() / angle)
    second = torch.where(small, 0.5 - angle2 / 24, (1 - angle.cos()) / safe2)
    eye = torch.eye(3, dtype=axis_angle.dtype, device=axis_angle.device)
    return eye + first * cross + second * (cross @ cross)


def right_jacobian(axis_angle: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 3 3"]:
    """J with exp(r + d) ≈ exp(r) exp(J d) for a small d (Sola et al. 2018, Eq. 143)."""
    cross = skew(axis_angle)
    angle = axis_angle.norm(dim=-1).clamp_min(1e-6)[..., None, None]
    first = (1 - angle.cos()) / angle**2
    second = (1 - angle.sin() / angle) / angle**2
    return torch.eye(3, dtype=axis_angle.dtype) - first * cross + second * (cross @ cross)


def axis_angle_from_rotation(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 3"]:
    """Inverse of `rotation_from_axis_angle` for angles below pi, through the quaternion."""
    quat = quat_from_rotation(rotation)
    quat = torch.where(quat[..., :1] < 0, -quat, quat)
    sin_half = quat[..., 1:].norm(dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sin_half, quat[..., :1])
    scale = torch.where(sin_half < 1e-7, 2 * torch.ones_like(angle), angle / sin_half.clamp_min(1e-12))
    return quat[..., 1:] * scale


def rotation_from_quat(quat: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b 3 3"]:
    """Rotation of a wxyz quaternion, normalised on the way."""
    w, x, y, z = torch.nn.functional.normalize(quat, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(*quat.shape[:-1], 3, 3)


def quat_from_rotation(rotation: Float[Tensor, "*b 3 3"]) -> Float[Tensor, "*b 4"]:
    """Unit wxyz quaternion of a rotation, stable for every angle: the divisor is the largest of four components."""
    m = rotation
    t0, t1, t2 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    four_squared = torch.stack([1 + t0 + t1 + t2, 1 + t0 - t1 - t2, 1 - t0 + t1 - t2, 1 - t0 - t1 + t2], -1)
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    d, e, f = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    s = four_squared
    candidates = torch.stack(
        [
            torch.stack([s[..., 0], a, b, c], -1),
            torch.stack([a, s[..., 1], d, e], -1),
            torch.stack([b, d, s[..., 2], f], -1),
            torch.stack([c, e, f, s[..., 3]], -1),
        ],
        -2,
    )
    best = four_squared.argmax(-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    return torch.nn.functional.normalize(candidates.gather(-2, index).squeeze(-2), dim=-1)


def rigid(rotation: Float[Tensor, "*b 3 3"], translation: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 4 4"]:
    """Homogeneous transform [R t; 0 1]."""
    top = torch.cat([rotation, translation[..., None]], -1)
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=top.dtype, device=top.device).expand(*top.shape[:-2], 1, 4)
    return torch.cat([top, bottom], -2)


def transform(T: Float[Tensor, "*b 4 4"], points: Float[Tensor, "*b n 3"]) -> Float[Tensor, "*b n 3"]:
    """Apply a rigid transform to points."""
    return points @ T[..., :3, :3].transpose(-1, -2) + T[..., None, :3, 3]


def similarity(source: Float[Tensor, "n 3"], target: Float[Tensor, "n 3"]) -> tuple[float, Tensor, Tensor]:
    """Least-squares scale s, rotation R, translation t with `target ≈ s * source @ R.T + t` (Umeyama 1991)."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    a, b = source - source_mean, target - target_mean
    u, singular, vt = torch.linalg.svd(b.T @ a)
    sign = torch.ones(3, dtype=source.dtype)
    sign[2] = torch.sign(torch.linalg.det(u @ vt))
    rotation = u @ torch.diag(sign) @ vt
    scale = float((singular * sign).sum() / (a * a).sum())
    return scale, rotation, target_mean - scale * rotation @ source_mean


def smoothstep(x: Numeric) -> Numeric:
    """3 x² - 2 x³ of x clamped to [0, 1]: rises from 0 to 1 and is flat at both ends."""
    y: Any = x.clamp(0, 1) if isinstance(x, Tensor) else np.clip(x, 0.0, 1.0)
    return y * y * (3 - 2 * y)
