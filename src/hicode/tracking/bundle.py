"""Bundle adjustment: poses of frames and depths of points on keyframes, from matches between them.

m frames, k keyframes, p points. T "4 4" takes head to camera; a twist ξ = (w, v) "6" moves it to T exp(ξ), w in rad and
v in dm about the head's own axes. A point is a pixel of its keyframe and a depth d along that ray.

    Σ ρ(π(T_t X) - measured)  +  Σ_t |ξ_t / σ_pose|²  +  Σ_p ((d_p - d_p⁰) / σ_depth)²,      X = T_k⁻¹ (d_p ray_p)

ρ is Cauchy's. ξ = 0 and d⁰ are the poses and depths of the priors. Depths are eliminated by Schur's complement (Triggs
et al. 2000, "Bundle Adjustment").
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hicode.camera import pinhole_jacobian
from hicode.geometry import axis_angle_from_rotation, rigid, rotation_from_axis_angle


@dataclass(frozen=True)
class BundleConfig:
    """Deviations of the priors and of a match, and the schedule."""

    noise_px: float = 0.6  # deviation of a match; larger residuals count less and less
    rotation_deg: float = 1.5  # deviation of the prior poses' rotation
    translation_mm: float = 3.0  # deviation of the prior poses' translation
    depth_mm: float = 12.0  # deviation of the prior depths
    steps: int = 12  # Gauss-Newton steps, at most

    @property
    def pose_precision(self) -> Float[np.ndarray, "6"]:
        """Of the twist between a pose and its prior."""
        return np.repeat([np.radians(self.rotation_deg), self.translation_mm * 0.01], 3) ** -2.0

    @property
    def depth_precision(self) -> float:
        """Of a depth (dm)."""
        return (self.depth_mm * 0.01) ** -2.0


@dataclass(frozen=True, eq=False)
class Pinhole:
    """Focal length and principal point in px."""

    focal: float
    centre: Float[np.ndarray, "2"]


@dataclass(frozen=True, eq=False)
class PointSet:
    """Points of keyframe t: pixels (centres at +0.5) and prior depths (dm)."""

    t: int
    pixels: Float[np.ndarray, "p 2"]
    depth: Float[np.ndarray, "p"]


@dataclass(frozen=True, eq=False)
class Match:
    """Which points of keyframe number `key` a frame shows, and where."""

    key: int
    rows: Int[np.ndarray, "n"]
    pixels: Float[np.ndarray, "n 2"]


@dataclass(frozen=True, eq=False)
class Bundle:
    """What an adjustment explains: `matches` by frame, for each of `frames`; `prior` poses of the same frames."""

    camera: Pinhole
    points: list[PointSet]
    frames: Int[np.ndarray, "m"]
    matches: dict[int, list[Match]]
    prior: Float[np.ndarray, "m 4 4"]


@dataclass(frozen=True, eq=False)
class Structure:
    """Poses of the bundle's frames; depths of each keyframe's points with their deviations (dm)."""

    poses: Float[np.ndarray, "m 4 4"]
    depths: list[Float[np.ndarray, "_"]]
    sigma: list[Float[np.ndarray, "_"]]


def adjust(
    bundle: Bundle, poses: Float[np.ndarray, "m 4 4"], depths: list[Float[np.ndarray, "_"]], config: BundleConfig
) -> Structure:
    """Gauss-Newton from `poses` and `depths` on, with the depths eliminated."""
    depths, sigma = list(depths), [np.zeros(len(d)) for d in depths]
    for _ in range(config.steps):
        equations = _linearise(bundle, poses, depths, config)
        delta, changes = equations.solve()
        for k, change in enumerate(changes):
            depths[k] = depths[k] + np.clip(change, -0.2, 0.2)
            sigma[k] = equations.by_depth[k] ** -0.5
        poses = _moved(poses, delta)
        if np.abs(delta).max() < 3e-4:
            break
    return Structure(poses, depths, sigma)


def resect(
    prior: Float[np.ndarray, "4 4"],
    pose: Float[np.ndarray, "4 4"],
    points: Float[np.ndarray, "n 3"],
    pixels: Float[np.ndarray, "n 2"],
    camera: Pinhole,
    config: BundleConfig,
) -> Float[np.ndarray, "4 4"]:
    """The pose, from `pose` on, that shows known points where they were measured, under the same prior."""
    precision = config.pose_precision
    for _ in range(config.steps):
        r, _, by_pose = residual(pose, points, pixels, camera)
        weight = 1 / (config.noise_px**2 + (r**2).sum(1))
        weighted = by_pose * weight[:, None, None]
        A = np.einsum("pai,paj->ij", weighted, by_pose) + np.diag(precision)
        delta = -np.linalg.solve(A, np.einsum("pai,pa->i", weighted, r) + precision * _twist(prior, pose))
        pose = _moved(pose, delta)
        if np.abs(delta).max() < 1e-5:
            break
    return pose


def head_points(
    points: PointSet, depth: Float[np.ndarray, "p"], pose: Float[np.ndarray, "4 4"], camera: Pinhole
) -> tuple[Float[np.ndarray, "p 3"], Float[np.ndarray, "p 3"]]:
    """(points in the head frame, their derivative by depth)."""
    ray = np.concatenate([(points.pixels - camera.centre) / camera.focal, np.ones((len(points.pixels), 1))], 1)
    return (ray * depth[:, None] - pose[:3, 3]) @ pose[:3, :3], ray @ pose[:3, :3]


def residual(
    pose: Float[np.ndarray, "4 4"], points: Float[np.ndarray, "n 3"], pixels: Float[np.ndarray, "n 2"], camera: Pinhole
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n 2 3"], Float[np.ndarray, "n 2 6"]]:
    """(residual, its derivative by the head point, by the pose's twist)."""
    seen, by_camera = pinhole_jacobian(points @ pose[:3, :3].T + pose[:3, 3], camera.focal)
    by_point = by_camera @ pose[:3, :3]
    return seen + camera.centre - pixels, by_point, np.concatenate([_cross(points[:, None], by_point), by_point], -1)


def _cross(a: Float[np.ndarray, "*b 3"], b: Float[np.ndarray, "*c 3"]) -> Float[np.ndarray, "*c 3"]:
    """The vector product; `numpy.cross` takes six times as long for as few points as a frame has."""
    (x, y, z), (u, v, w) = np.moveaxis(a, -1, 0), np.moveaxis(b, -1, 0)
    return np.stack([y * w - z * v, z * u - x * w, x * v - y * u], -1)


@dataclass(frozen=True, eq=False)
class _Equations:
    """Normal equations: H, g of the poses' twists; for each keyframe's points p their coupling, curvature and slope."""

    H: Float[np.ndarray, "m m 6 6"]
    g: Float[np.ndarray, "m 6"]
    coupling: list[Float[np.ndarray, "_ m 6"]]
    by_depth: list[Float[np.ndarray, "_"]]
    slope: list[Float[np.ndarray, "_"]]

    def solve(self) -> tuple[Float[np.ndarray, "m 6"], list[Float[np.ndarray, "_"]]]:
        """(twists, changes of the depths)."""
        m = len(self.g)
        S = self.H.transpose(0, 2, 1, 3).reshape(6 * m, 6 * m)
        s = self.g.reshape(-1)
        flat = [E.reshape(len(E), -1) for E in self.coupling]
        for E, curvature, slope in zip(flat, self.by_depth, self.slope, strict=True):
            coupled = np.flatnonzero(E.any(0))  # a keyframe is seen in few of the frames
            E = E[:, coupled]
            S[np.ix_(coupled, coupled)] -= (E / curvature[:, None]).T @ E
            s[coupled] -= E.T @ (slope / curvature)
        S[np.arange(6 * m), np.arange(6 * m)] *= 1 + 1e-6
        delta = -np.linalg.solve(S, s)
        changes = [-(d + E @ delta) / c for E, c, d in zip(flat, self.by_depth, self.slope, strict=True)]
        return delta.reshape(m, 6), changes


def _linearise(
    bundle: Bundle, poses: Float[np.ndarray, "m 4 4"], depths: list[Float[np.ndarray, "_"]], config: BundleConfig
) -> _Equations:
    m, place = len(bundle.frames), {int(t): i for i, t in enumerate(bundle.frames)}
    H = np.zeros((m, m, 6, 6))
    H[np.arange(m), np.arange(m)] += np.diag(config.pose_precision)
    equations = _Equations(
        H,
        config.pose_precision * _twist(bundle.prior, poses),
        [np.zeros((len(d), m, 6)) for d in depths],
        [np.full(len(d), config.depth_precision) for d in depths],
        [config.depth_precision * (d - p.depth) for d, p in zip(depths, bundle.points, strict=True)],
    )
    placed = [
        head_points(points, d, poses[place[points.t]], bundle.camera)
        for points, d in zip(bundle.points, depths, strict=True)
    ]
    for t, matches in bundle.matches.items():
        for match in matches:
            points, along = (values[match.rows] for values in placed[match.key])
            r, by_point, by_pose = residual(poses[place[t]], points, match.pixels, bundle.camera)
            weight = 1 / (config.noise_px**2 + (r**2).sum(1))
            by_depth = (by_point @ along[..., None])[..., 0]
            i, j = place[t], place[bundle.points[match.key].t]
            _add_match(equations, match, (i, j), weight, r, by_depth, by_pose)
    return equations


def _add_match(
    equations: _Equations,
    match: Match,
    places: tuple[int, int],
    weight: Float[np.ndarray, "n"],
    r: Float[np.ndarray, "n 2"],
    by_depth: Float[np.ndarray, "n 2"],
    by_pose: Float[np.ndarray, "n 2 6"],
) -> None:
    """Add one match between frame and keyframe (their places among the frames): its twists act with opposite signs."""
    (i, j), k, rows = places, match.key, match.rows
    weighted = by_pose * weight[:, None, None]
    block = np.einsum("pai,paj->ij", weighted, by_pose)
    step = np.einsum("pai,pa->i", weighted, r)
    equations.H[i, i] += block
    equations.H[j, j] += block
    equations.H[i, j] -= block
    equations.H[j, i] -= block
    equations.g[i] += step
    equations.g[j] -= step
    cross = np.einsum("pai,pa->pi", weighted, by_depth)
    equations.coupling[k][rows, i] += cross
    equations.coupling[k][rows, j] -= cross
    equations.by_depth[k][rows] += weight * (by_depth**2).sum(1)
    equations.slope[k][rows] += weight * (by_depth * r).sum(1)


def _moved(pose: Float[np.ndarray, "*b 4 4"], twist: Float[np.ndarray, "*b 6"]) -> Float[np.ndarray, "*b 4 4"]:
    """pose exp(twist), to first order in v and exactly in w."""
    move: Tensor = torch.from_numpy(twist)
    return pose @ rigid(rotation_from_axis_angle(move[..., :3]), move[..., 3:]).numpy()


def _twist(prior: Float[np.ndarray, "*b 4 4"], pose: Float[np.ndarray, "*b 4 4"]) -> Float[np.ndarray, "*b 6"]:
    """The twist that leads from `prior` to `pose`."""
    delta = np.linalg.inv(prior) @ pose
    w = axis_angle_from_rotation(torch.from_numpy(delta[..., :3, :3])).numpy()
    return np.concatenate([w, delta[..., :3, 3]], -1)
