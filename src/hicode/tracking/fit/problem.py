"""The objective of the head fit: observations, unknowns, landmark residuals and their derivatives.

t frames, l = 478 landmarks. A frame's unknowns are q = (r, u, v, s, e): axis-angle r of the head's rotation, image
position (u, v) in px of the head's origin from the principal point, s = log(depth / focal) and the expression e "64".
A landmark x of the head frame projects to

    X = F exp(r) x + T,  F = diag(1, -1, -1),  T = (u σ, v σ, f σ),  σ = exp(s),  pixel = f X_xy / X_z + centre

so (u, v, s) keep their meaning when the focal length f changes. The objective, in units of the landmark noise
(`noise_mm` at the head's depth):

    Σ_t Σ_l w_l Huber(|pixel - measured|) + weak depth term        landmarks, at the frames with a face
  + Σ_t Σ_i ρ(motion of a surface point from t to t+1 - its optical flow)      where flow was measured
  + Σ_t Σ_d ρ(second difference of pose)                           robust: dropped frames are jumps, not noise
  + Σ_t    |second difference of expression|²
  + Σ_t    ridge |e|² + sparse Σ e + bound |e outside its range|²  actions are few, one-sided and bounded
  + t ridge |identity|² + prior on log f

ρ is Cauchy's. A landmark network errs in every frame by a common rigid motion of about a pixel, which smoothing cannot
tell from real motion. So each frame has a *landmark bias*: six numbers that are added to the pose in the landmark term
only. Flow, exact to a tenth of a pixel, ties the poses of neighbouring frames; the landmarks say where the head is on
average. Canonical landmarks are taken under pose + bias, so the bias reaches neither them nor the expression.

The bounds are soft: with hard ones each step would end where the first of many actions meets its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int
from numba import njit
from torch import Tensor

from hicode.camera import Camera, pinhole_jacobian
from hicode.geometry import axis_angle_from_rotation, right_jacobian, rigid, rotation_from_axis_angle, similarity
from hicode.motion import (
    EXPRESSION_DIM,
    FACE_OVAL,
    IDENTITY_DIM,
    LEFT_EYE_RING,
    LIPS,
    N_LANDMARKS,
    RIGHT_EYE_RING,
    FaceTrack,
    Motion,
)
from hicode.tracking.head_model import HeadModel

if TYPE_CHECKING:
    from hicode.tracking.fit.flow import Flow

POSE_DIM = 6
FRAME_DIM = POSE_DIM + EXPRESSION_DIM
FLIP = np.array([1.0, -1.0, -1.0])  # head axes (y up, z towards the camera) to camera axes


@dataclass(frozen=True)
class FitConfig:
    """Weights and schedule of the fit. Lengths are mm on the head; weights count against one landmark coordinate."""

    noise_mm: float = 1.2  # landmark noise: the unit of every residual
    huber: float = 3.0  # residuals beyond this many noise units grow linearly
    lips_weight: float = 2.0  # weight of the lips' landmarks
    eyes_weight: float = 1.5  # weight of the eyes' landmarks
    oval_weight: float = 0.4  # weight of the face oval, which slides along the silhouette
    depth_weight: float = 0.02  # weight of the network's z, which is a guess
    expression_ridge: float = 5.0  # ridge on expression coefficients
    expression_sparse: float = 4.0  # slope of the sparsity term on one-sided actions
    expression_bound: float = 300.0  # weight of the soft bounds of an action's range
    expression_smooth: float = 6.0  # weight of second differences of the expression
    pose_smooth: float = 20.0  # weight of second differences of the pose, in noise units of landmark motion
    pose_jump: float = 0.4  # second differences beyond this many noise units count as motion, not noise
    landmark_bias: float = 0.3  # deviation of the landmarks' common error in a frame, in noise units
    flow_noise: float = 0.12  # deviation of one flow vector, in noise units; larger residuals count less
    flow_weight: float = 0.2  # weight of one flow vector: neighbouring vectors err alike
    identity_ridge: float = 1.0  # ridge on identity coefficients, times the number of frames
    focal_px: float = 1400.0  # prior of the focal length for a crop 512 px wide
    focal_spread: float = 0.3  # deviation of the prior in log f
    identity_frames: int = 96  # training frames from which identity and focal length are fitted
    identity_steps: int = 10  # Gauss-Newton steps for identity and focal length
    frame_steps: int = 8  # Gauss-Newton steps for poses and expressions
    refit_steps: int = 4  # the same under given poses, from expressions that fit already
    flow_from_step: int = 3  # first step with the flow term: flow needs the mesh about in place
    window: int = 1000  # frames solved at once; bounds memory
    outline_mm: float = 20.0  # landmarks this far inside the outline keep their place in the picture in a refit


@dataclass(frozen=True, eq=False)
class Observations:
    """What a fit explains.

    points_px "t 478 3"  landmarks in px (pixel centres at +0.5); z in px, smaller is nearer
    found     "t"        whether the frame shows a face
    width, height        of the frames in px
    flow                 optical flow between the same frames (`track_flow`); without it poses are less steady
    """

    points_px: Float[Tensor, "t 478 3"] | Float[np.ndarray, "t 478 3"]
    found: Bool[Tensor, "t"] | Bool[np.ndarray, "t"]
    width: int
    height: int
    flow: "Flow | None" = None


@dataclass(frozen=True, eq=False)
class LandmarkBasis:
    """The head model at its landmarks: rest "l 3", identity "80 l 3", expression "64 l 3"."""

    rest: Float[np.ndarray, "l 3"]
    identity: Float[np.ndarray, "80 l 3"]
    expression: Float[np.ndarray, "64 l 3"]

    @staticmethod
    def of(model: HeadModel) -> "LandmarkBasis":
        """The bases of a head model, in double precision."""
        bases = (model.mean, model.identity_basis, model.expression_basis)
        return LandmarkBasis(*(model.landmarks(basis).double().numpy() for basis in bases))

    def neutral(self, identity: Float[np.ndarray, "80"]) -> Float[np.ndarray, "l 3"]:
        """The landmarks of an identity at rest."""
        return self.rest + np.tensordot(identity, self.identity, 1)


@dataclass(frozen=True, eq=False)
class Problem:
    """What stays fixed during a fit.

    points "t l 3"  px, x and y from the image's centre; 0 where no face was found
    low, high "64"  range of each action;  sparse "64" slope of the sparsity term, 0 for two-sided actions
    weight "l"      of each landmark
    """

    points: Float[np.ndarray, "t 478 3"]
    found: Bool[np.ndarray, "t"]
    basis: LandmarkBasis
    low: Float[np.ndarray, "64"]
    high: Float[np.ndarray, "64"]
    sparse: Float[np.ndarray, "64"]
    weight: Float[np.ndarray, "478"]
    model: HeadModel
    width: int
    height: int
    config: FitConfig
    flow: "Flow | None"

    @staticmethod
    def of(observed: Observations, model: HeadModel, config: FitConfig) -> "Problem":
        """Observations with NaN count as frames without a face."""
        points = np.asarray(observed.points_px, np.float64)
        found = np.asarray(observed.found, bool) & np.isfinite(points).all((1, 2))
        points = np.where(found[:, None, None], points, 0.0) - [observed.width / 2, observed.height / 2, 0]
        assert points.shape == (len(found), N_LANDMARKS, 3), points.shape
        flow = observed.flow
        assert flow is None or len(flow.start_px) == len(found) - 1, (len(flow.start_px), len(found))
        weight = np.ones(N_LANDMARKS)
        weight[LIPS] = config.lips_weight
        weight[np.concatenate([RIGHT_EYE_RING, LEFT_EYE_RING])] = config.eyes_weight
        weight[FACE_OVAL] = config.oval_weight
        low, high = model.expression_low.double().numpy(), model.expression_high.double().numpy()
        sparse = np.where(low < 0, 0.0, config.expression_sparse)
        return Problem(
            points, found, LandmarkBasis.of(model), low, high, sparse, weight, model,
            observed.width, observed.height, config, flow,
        )  # fmt: skip

    @property
    def centre(self) -> Float[np.ndarray, "2"]:
        """The principal point, px."""
        return np.array([self.width / 2, self.height / 2])


@dataclass(eq=False)
class State:
    """The unknowns during a fit.

    q "t 70"            r, u, v, s, e of each frame
    identity "80"       coefficients of the 3DMM
    offset "l 3"        constant offset (dm) of this person's landmarks from the model's
    unit_px "t"         one noise unit in px at the head's depth
    bias "t 6"          the landmarks' common error, added to the pose in the landmark term
    fixed_poses         poses stay as they are
    flow_depth "t-1 k"  depth of the flow points as a multiple of the head's, NaN off the head
    """

    q: Float[np.ndarray, "t 70"]
    identity: Float[np.ndarray, "80"]
    focal: float
    offset: Float[np.ndarray, "478 3"]
    unit_px: Float[np.ndarray, "t"]
    bias: Float[np.ndarray, "t 6"]
    fixed_poses: bool = False
    flow_depth: Float[np.ndarray, "s k"] | None = None


def initial_state(problem: Problem, focal: float) -> State:
    """Weak-perspective pose of each frame from the mean head; frames without a face are interpolated."""
    count = len(problem.points)
    q = np.zeros((count, FRAME_DIM))
    rest = torch.from_numpy(problem.basis.rest[:468])
    seen = np.flatnonzero(problem.found)
    for t in seen:
        scale, rotation, shift = similarity(rest, torch.from_numpy(problem.points[t, :468] * FLIP))
        q[t, :3] = axis_angle_from_rotation(rotation).numpy()
        q[t, 3:5] = shift.numpy()[:2] * FLIP[:2]
        q[t, 5] = -np.log(scale)
    for d in range(POSE_DIM):
        q[:, d] = np.interp(np.arange(count), seen, q[seen, d])
    unit_px = problem.config.noise_mm * 0.01 / np.exp(q[:, 5])
    return State(q, np.zeros(IDENTITY_DIM), focal, np.zeros((N_LANDMARKS, 3)), unit_px, np.zeros((count, POSE_DIM)))


def rotations(axis_angle: Float[np.ndarray, "t 3"]) -> tuple[Float[np.ndarray, "t 3 3"], Float[np.ndarray, "t 3 3"]]:
    """(F exp(r), J) with exp(r + d) ≈ exp(r) exp(J d)."""
    r = torch.from_numpy(axis_angle)
    return FLIP[:, None] * rotation_from_axis_angle(r).numpy(), right_jacobian(r).numpy()


def translations(q: Float[np.ndarray, "t n"], focal: float) -> Float[np.ndarray, "t 3"]:
    """T = (u σ, v σ, f σ) of poses or frames."""
    return np.stack([q[:, 3], q[:, 4], np.full(len(q), focal)], 1) * np.exp(q[:, 5:6])


# ---- linearisation ----


@dataclass(frozen=True, eq=False)
class Linear:
    """Weighted residuals of some frames (two image axes and depth, noise units) and their derivatives.

    by_frame by the frame's unknowns · by_shape by the landmark's place in the head frame · by_focal by log f
    """

    residual: Float[np.ndarray, "t l 3"]
    by_frame: Float32[np.ndarray, "t r 70"]
    by_shape: Float32[np.ndarray, "t l 3 3"]
    by_focal: Float[np.ndarray, "t l 3"]


@dataclass(frozen=True, eq=False)
class _Projection:
    """The model's landmarks of some frames under pose and bias, and what their derivatives need.

    shape "t l 3" head frame · rotated "t l 3" = F exp(r) shape · pixel "t l 2" and its derivative by the camera point
    """

    shape: Float[np.ndarray, "t l 3"]
    rotated: Float[np.ndarray, "t l 3"]
    rotation: Float[np.ndarray, "t 3 3"]
    jacobian: Float[np.ndarray, "t 3 3"]
    translation: Float[np.ndarray, "t 3"]
    depth_scale: Float[np.ndarray, "t"]
    depth: Float[np.ndarray, "t l"]
    pixel: Float[np.ndarray, "t l 2"]
    by_camera: Float[np.ndarray, "t l 2 3"]


def _project(problem: Problem, state: State, frames: Int[np.ndarray, "t"]) -> _Projection:
    basis = problem.basis
    q = state.q[frames].copy()
    q[:, :POSE_DIM] += state.bias[frames]
    shape = basis.neutral(state.identity) + state.offset
    expression = q[:, POSE_DIM:] @ basis.expression.reshape(EXPRESSION_DIM, -1)
    shape = shape + expression.reshape(len(frames), N_LANDMARKS, 3)
    rotation, jacobian = rotations(q[:, :3])
    translation = translations(q, state.focal)
    rotated = shape @ rotation.transpose(0, 2, 1)
    points = rotated + translation[:, None]
    points[..., 2] = np.maximum(points[..., 2], 0.1 * translation[:, None, 2])
    pixel, by_camera = pinhole_jacobian(points, state.focal)
    return _Projection(
        shape, rotated, rotation, jacobian, translation, np.exp(q[:, 5]), points[..., 2], pixel, by_camera
    )


def linearise(problem: Problem, state: State, frames: Int[np.ndarray, "t"]) -> Linear:
    """Residuals and single-precision Jacobian at frames with a face; robust weights are folded in."""
    view = _project(problem, state, frames)
    n, unit = len(frames), state.unit_px[frames][:, None]
    depth_unit = 1 / view.depth_scale[:, None] / unit
    residual = np.empty((n, N_LANDMARKS, 3))
    residual[..., :2] = (view.pixel - problem.points[frames, :, :2]) / unit[..., None]
    residual[..., 2] = (view.rotated[..., 2] / view.depth_scale[:, None] - problem.points[frames, :, 2]) / unit

    by_camera = np.zeros((n, N_LANDMARKS, 3, 3), np.float32)  # of (pixel, depth) by the camera point
    by_camera[..., :2, :] = view.by_camera / unit[..., None, None]
    by_camera[..., 2, 2] = depth_unit
    by_shape = by_camera @ view.rotation.astype(np.float32)[:, None]
    by_frame = _by_frame(problem, view, by_camera, by_shape, depth_unit)
    by_focal = np.zeros((n, N_LANDMARKS, 3))
    by_focal[..., :2] = view.pixel * (view.rotated[..., 2] / view.depth)[..., None] / unit[..., None]

    # MediaPipe's z has a free origin in each frame: its mean is taken out.
    for value in (residual, by_frame, by_shape, by_focal):
        value[:, :, 2] -= value[:, :, 2].mean(1, keepdims=True)
    root = _root_weights(problem, residual)
    residual *= root
    by_focal *= root
    root = root.astype(np.float32)
    by_frame *= root[..., None]
    by_shape *= root[..., None]
    return Linear(residual, by_frame.reshape(n, -1, FRAME_DIM), by_shape, by_focal)


def _by_frame(
    problem: Problem,
    view: _Projection,
    by_camera: Float32[np.ndarray, "t l 3 3"],
    by_shape: Float32[np.ndarray, "t l 3 3"],
    depth_unit: Float[np.ndarray, "t 1"],
) -> Float32[np.ndarray, "t l 3 70"]:
    """Derivatives of the residuals by the frame's unknowns."""
    out = np.empty((*by_shape.shape[:3], FRAME_DIM), np.float32)
    out[..., :3] = (
        np.cross(view.shape.astype(np.float32)[:, :, None], by_shape) @ view.jacobian.astype(np.float32)[:, None]
    )
    out[..., 3] = by_camera[..., 0] * view.depth_scale[:, None, None]
    out[..., 4] = by_camera[..., 1] * view.depth_scale[:, None, None]
    out[..., :2, 5] = (by_camera[..., :2, :] @ view.translation.astype(np.float32)[:, None, :, None])[..., 0]
    out[..., 2, 5] = -view.rotated[..., 2] * depth_unit
    out[..., 2, 3:5] = 0
    expression = problem.basis.expression.transpose(1, 2, 0).astype(np.float32)  # "l 3 64"
    apply_basis(by_shape, np.ascontiguousarray(expression), out, POSE_DIM)
    return out


@njit(cache=True, fastmath=True)
@no_type_check
def apply_basis(by_shape, basis, out, first):
    """out[t, l, a, first + k] = Σ_c by_shape[t, l, a, c] basis[l, c, k], over t, l, a < 3 and k."""
    for t in range(out.shape[0]):
        for i in range(out.shape[1]):
            for a in range(3):
                x, y, z = by_shape[t, i, a, 0], by_shape[t, i, a, 1], by_shape[t, i, a, 2]
                for k in range(basis.shape[2]):
                    out[t, i, a, first + k] = x * basis[i, 0, k] + y * basis[i, 1, k] + z * basis[i, 2, k]


def _root_weights(problem: Problem, residual: Float[np.ndarray, "t l 3"]) -> Float[np.ndarray, "t l 3"]:
    """Square roots of the landmarks' weights, Huber's for large residuals included."""
    config = problem.config
    length = np.linalg.norm(residual[..., :2], axis=-1)
    image = problem.weight / np.maximum(1.0, length / config.huber)
    depth = problem.weight * config.depth_weight / np.maximum(1.0, np.abs(residual[..., 2]) / (3 * config.huber))
    return np.sqrt(np.stack([image, image, depth], -1))


def expression_prior(
    problem: Problem, expression: Float[np.ndarray, "t 64"]
) -> tuple[Float[np.ndarray, "t 64"], Float[np.ndarray, "t 64"]]:
    """(curvature, gradient) of ridge, sparsity (linear: those actions are one-sided) and soft bounds."""
    config = problem.config
    outside = expression - np.clip(expression, problem.low, problem.high)
    curvature = config.expression_ridge + config.expression_bound * (outside != 0)
    return curvature, config.expression_ridge * expression + problem.sparse / 2 + config.expression_bound * outside


# ---- the result ----

_TRACK_CHUNK = 1000  # frames that are turned into landmarks at once: a long clip's doubles would take gigabytes


def track_of(problem: Problem, state: State) -> FaceTrack:
    """The track. Landmarks are measured pixels at the fitted depth, which keeps what the model cannot express."""
    camera = Camera.pinhole(state.focal, problem.width, problem.height)
    neutral = torch.from_numpy(problem.basis.neutral(state.identity) + state.offset)
    basis, centre = torch.from_numpy(problem.basis.expression), torch.from_numpy(problem.centre)
    seen = torch.from_numpy(problem.found)

    def landmarks_of(frames: slice) -> tuple[Tensor, Tensor]:
        """In px, and in the head frame."""
        shape = neutral + torch.tensordot(torch.from_numpy(state.q[frames, POSE_DIM:]), basis, 1)
        poses = _poses(state.q[frames, :POSE_DIM] + state.bias[frames], state.focal)
        views = Camera(camera.K.double().expand(len(shape), 3, 3), poses, problem.width, problem.height)
        modelled, depth = views.project(shape)
        measured = torch.from_numpy(problem.points[frames, :, :2]) + centre
        pixels = torch.where(seen[frames, None, None], measured, modelled)
        return pixels.float(), views.unproject(pixels, depth).float()

    chunks = [slice(start, start + _TRACK_CHUNK) for start in range(0, len(seen), _TRACK_CHUNK)]
    pixels, landmarks = (torch.cat(parts) for parts in zip(*map(landmarks_of, chunks), strict=True))
    expression = torch.from_numpy(state.q[:, POSE_DIM:]).float()
    motion = Motion(expression, landmarks, _poses(state.q[:, :POSE_DIM], state.focal).float())
    return FaceTrack(motion, torch.from_numpy(state.identity).float(), camera, pixels, seen.float())


def _poses(q: Float[np.ndarray, "t 6"], focal: float) -> Float[Tensor, "t 4 4"]:
    rotation = torch.from_numpy(FLIP)[:, None] * rotation_from_axis_angle(torch.from_numpy(q[:, :3]))
    return rigid(rotation, torch.from_numpy(translations(q, focal)))


def segments(count: int, train: range) -> Sequence[Int[np.ndarray, "n"]]:
    """Frames before, in and after the training part: each is smoothed by itself."""
    return np.split(np.arange(count), [t for t in (train.start, train.stop) if 0 < t < count])
