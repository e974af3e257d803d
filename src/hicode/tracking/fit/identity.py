"""Identity and focal length: what stays the same over a person's frames."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

from hicode.motion import IDENTITY_DIM
from hicode.tracking.fit.problem import (
    FRAME_DIM,
    POSE_DIM,
    FitConfig,
    Linear,
    Observations,
    Problem,
    State,
    apply_basis,
    expression_prior,
    initial_state,
    linearise,
)
from hicode.tracking.head_model import HeadModel

CHUNK = 4  # frames linearised at once: their derivatives stay in the second-level cache


@dataclass(frozen=True, eq=False)
class Person:
    """What stays the same over a person's clips by one camera: identity of the 3DMM, focal length in px."""

    identity: Float[np.ndarray, "80"]
    focal_px: float


def fit_person(
    points_px: Float[np.ndarray, "t 478 3"], width: int, height: int, model: HeadModel, config: FitConfig = FitConfig()
) -> Person:
    """Identity and focal length that frames with a face agree on.

    The frames may come from several clips by one camera, in any order.
    """
    _, state = fit_frames_of_person(points_px, width, height, model, config)
    return Person(state.identity, state.focal)


def fit_frames_of_person(
    points_px: Float[np.ndarray, "t 478 3"], width: int, height: int, model: HeadModel, config: FitConfig
) -> tuple[Problem, State]:
    """The problem of some frames of one person, and its solution."""
    problem = Problem.of(Observations(points_px, np.ones(len(points_px), bool), width, height), model, config)
    state = initial_state(problem, config.focal_px * width / 512)
    fit_identity(problem, state, np.arange(len(points_px)), lambda done: None)
    return problem, state


def fit_identity(
    problem: Problem, state: State, frames: Int[np.ndarray, "n"], progress: Callable[[float], None]
) -> None:
    """Fit identity and log f jointly with the frames' own unknowns."""
    steps = problem.config.identity_steps
    for step in range(steps):
        identity_step(problem, state, frames, damping=0.1 if step < 3 else 1e-3)
        progress((step + 1) / steps)


def identity_step(
    problem: Problem, state: State, frames: Int[np.ndarray, "n"], damping: float, shape: bool = True
) -> None:
    """One joint Gauss-Newton step; the Schur complement eliminates the frames. Without `shape`, frames alone move."""
    config = problem.config
    k, n = IDENTITY_DIM + 1, len(frames)
    C, h = np.zeros((k, k)), np.zeros(k)
    C[:-1, :-1] = np.eye(IDENTITY_DIM) * config.identity_ridge * n
    h[:-1] = config.identity_ridge * n * state.identity
    focal_prior = n / config.focal_spread**2  # one frame's residuals are not independent, nor are the frames
    C[-1, -1] = focal_prior
    h[-1] = focal_prior * (np.log(state.focal) - np.log(config.focal_px * problem.width / 512))
    eliminated = []
    for start in range(0, n, CHUNK):
        chunk = frames[start : start + CHUNK]
        linear = linearise(problem, state, chunk)
        G = _by_identity(problem, linear)
        r = linear.residual.reshape(len(chunk), -1, 1).astype(np.float32)
        Jt, Gt = linear.by_frame.transpose(0, 2, 1), G.transpose(0, 2, 1)
        A, B = (Jt @ linear.by_frame).astype(np.float64), (Jt @ G).astype(np.float64)
        g = (Jt @ r)[..., 0].astype(np.float64)
        damp_and_add_prior(problem, state, chunk, A, g, damping)
        C += (Gt @ G).sum(0)
        h += (Gt @ r).sum(0)[:, 0]
        solved = np.linalg.solve(A, np.concatenate([B, g[..., None]], -1))
        eliminated.append((chunk, solved))
        C -= (B.transpose(0, 2, 1) @ solved[..., :-1]).sum(0)
        h -= (B.transpose(0, 2, 1) @ solved[..., -1:]).sum(0)[:, 0]
    move = -np.linalg.solve(C, h) if shape else np.zeros(k)
    move[-1] = np.clip(move[-1], -0.2, 0.2)
    for chunk, solved in eliminated:
        state.q[chunk] = step_frames(state.q[chunk], -(solved[..., -1] + solved[..., :-1] @ move))
    state.identity += move[:-1]
    state.focal *= float(np.exp(move[-1]))


def _by_identity(problem: Problem, linear: Linear) -> Float32[np.ndarray, "t r 81"]:
    """Derivatives of the residuals by identity and log f."""
    basis = problem.basis.identity.transpose(1, 2, 0).astype(np.float32)
    G = np.empty((*linear.residual.shape, IDENTITY_DIM + 1), np.float32)
    apply_basis(linear.by_shape, np.ascontiguousarray(basis), G, 0)
    G[..., -1] = linear.by_focal
    return G.reshape(len(G), -1, IDENTITY_DIM + 1)


def damp_and_add_prior(
    problem: Problem, state: State, frames: np.ndarray, A: np.ndarray, g: np.ndarray, damping: float
) -> None:
    """Damp the frames' normal equations A "n 70 70", g "n 70" and add the expression's prior, in place."""
    curvature, slope = expression_prior(problem, state.q[frames, POSE_DIM:])
    diagonal = np.arange(FRAME_DIM)
    A[:, diagonal, diagonal] *= 1 + damping
    A[:, diagonal[POSE_DIM:], diagonal[POSE_DIM:]] += curvature
    g[:, POSE_DIM:] += slope


def step_frames(q: Float[np.ndarray, "n 70"], delta: Float[np.ndarray, "n 70"]) -> Float[np.ndarray, "n 70"]:
    """q + delta, with rotation, log-scale and expression changing by at most a quarter."""
    delta[:, :3] = np.clip(delta[:, :3], -0.25, 0.25)
    delta[:, 5:] = np.clip(delta[:, 5:], -0.25, 0.25)
    return q + delta
