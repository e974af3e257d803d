"""Expressions and canonical landmarks under given poses."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.geometry import axis_angle_from_rotation, smoothstep
from hicode.motion import FACE_OVAL, FaceTrack
from hicode.tracking.fit.problem import FLIP, POSE_DIM, FitConfig, Observations, Problem, State, initial_state, track_of
from hicode.tracking.fit.solver import fit_frames
from hicode.tracking.head_model import HeadModel


def refit_expressions(
    track: FaceTrack,
    poses: Float[Tensor, "t 4 4"],
    observed: Observations,
    model: HeadModel,
    train: range,
    config: FitConfig = FitConfig(),
    progress: Callable[[float], None] = lambda done: None,
) -> FaceTrack:
    """The track under other poses (`hicode.tracking.rigid_pose`): expressions, biases and canonical landmarks anew.

    Biases are larger here than in `fit_track`, a px or two for seconds: not the network's jitter, but the face against
    the rigid head. A bias would move rendered lips off the place where they are seen. So landmarks inside the face are
    placed where `track` sees them, from which flow has removed the jitter. Those on the outline lose the bias: they lie
    on a silhouette, and ears, hair and neck, which follow the rigid head better, hang on them.

    Identity and focal length are the track's. Training and test frames are separate segments, as in `fit_track`.
    """
    config = replace(config, frame_steps=config.refit_steps)
    problem = Problem.of(observed, model, config)
    state = _state_under(problem, track, poses)
    fit_frames(problem, state, train, progress)
    refitted = track_of(problem, state)
    old = track.camera.expand(track.motion.T_camera_head)
    new = track.camera.expand(refitted.motion.T_camera_head)
    seen, _ = old.project(track.motion.landmarks)
    # The new depth: poses of the two tracks differ by millimetres along the ray, which would shake the landmarks.
    placed = new.unproject(seen, new.project(refitted.motion.landmarks)[1])
    inside = _inside_face(problem, state.identity, config.outline_mm * 0.01)
    landmarks = torch.lerp(refitted.motion.landmarks, placed, inside[:, None])
    return replace(refitted, motion=replace(refitted.motion, landmarks=landmarks))


def _state_under(problem: Problem, track: FaceTrack, poses: Float[Tensor, "t 4 4"]) -> State:
    """The track's identity and expressions under fixed poses."""
    state = initial_state(problem, float(track.camera.K[0, 0]))
    state.identity = track.identity.double().numpy()
    T = poses.double()
    state.q[:, :3] = axis_angle_from_rotation(torch.from_numpy(FLIP)[:, None] * T[:, :3, :3]).numpy()
    shift = T[:, :3, 3].numpy()
    depth_scale = shift[:, 2] / state.focal
    state.q[:, 3:5] = shift[:, :2] / depth_scale[:, None]
    state.q[:, 5] = np.log(depth_scale)
    state.q[:, POSE_DIM:] = track.motion.expression.double().numpy()
    state.unit_px = problem.config.noise_mm * 0.01 / depth_scale
    state.fixed_poses = True
    return state


def _inside_face(problem: Problem, identity: Float[np.ndarray, "80"], reach_dm: float) -> Float[Tensor, "478"]:
    """0 on the face's outline, 1 from `reach_dm` inside it on, a cubic step between."""
    rest = torch.from_numpy(problem.basis.neutral(identity)).float()
    return smoothstep(torch.cdist(rest, rest[torch.from_numpy(FACE_OVAL)]).amin(1) / reach_dm)
