"""Landmarks on a drawn head whose skin does not move: what the network makes up is taken back, and only that."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.tracked_head import FRAMES, KEYS, PX_PER_DM, TRAIN, drawn_head, swings, tracked
from hicode.motion import FACE_OVAL, IRISES, LIPS
from hicode.tracking import keyframes
from hicode.tracking.head_model import HeadModel
from hicode.tracking.landmark_drift import DriftConfig, correct_landmark_drift, solve_keyframes
from hicode.tracking.rigid_pose import RigidPoints

# the drawn head's landmarks lie anywhere: none is an outline
CONFIG = DriftConfig(structure_frames=12, outline_mm=1e-6)


@pytest.fixture
def follow(monkeypatch):
    """`correct_landmark_drift` where the network's landmarks are `slide` "t 3" (dm, head frame) off the skin."""
    poses, drawn = drawn_head()
    monkeypatch.setattr(keyframes, "head_depth", lambda model, track, t, mask: drawn[t][1])

    def run(slide, images=None, confidence=None, config=CONFIG):
        track = tracked(poses, poses, confidence=confidence)
        landmarks = track.motion.landmarks + slide[:, None]
        track = replace(track, motion=replace(track.motion, landmarks=landmarks))
        rigid = RigidPoints(torch.zeros(len(KEYS), 3), torch.zeros(len(KEYS)), KEYS)
        pictures = images or [d[0] for d in drawn]
        mask = lambda t: np.isfinite(drawn[t][1]).astype(np.uint8) * 255
        frames = SimpleNamespace(image=lambda t: pictures[t], head_mask=mask)
        return correct_landmark_drift(frames, track, rigid, HeadModel.load(), TRAIN, config), track

    return run


def wandering_px(track):
    """Mean distance (px) of the front's landmarks from their mean places on the head."""
    x = track.motion.landmarks
    front = track.motion.landmarks.mean(0)[:, 2] > 0.6
    return float((x - x.mean(0))[:, front, :2].norm(dim=-1).mean()) * PX_PER_DM


def test_what_slides_over_the_skin_is_put_back(follow):
    (found, report), track = follow(swings())
    assert wandering_px(track) > 1.5
    assert wandering_px(found) < 0.35 * wandering_px(track)
    assert report.matches > 1 and report.moved_px > 0.5
    assert torch.equal(found.landmarks_px, track.landmarks_px) and torch.equal(
        found.motion.T_camera_head, track.motion.T_camera_head
    )


def test_landmarks_that_stay_on_the_skin_are_left_there(follow):
    (found, _), track = follow(torch.zeros(FRAMES, 3))
    assert float((found.motion.landmarks - track.motion.landmarks).norm(dim=-1).mean()) * PX_PER_DM < 0.15


def test_lips_lids_and_irises_go_with_the_skin_about_them(follow):
    (found, _), track = follow(swings())
    moved = found.motion.landmarks - track.motion.landmarks
    for part in (LIPS, IRISES):
        wanted = -(swings() - swings().mean(0))
        left = (moved[:, part].mean(1) - moved[:, part].mean((0, 1)) - wanted)[:, :2].norm(dim=-1).mean()
        assert left < 0.5 * wanted.norm(dim=-1).mean(), (part, left)


def test_corrections_fade_at_the_outline(follow):
    (found, _), track = follow(swings(), config=replace(CONFIG, outline_mm=40.0))
    moved = (found.motion.landmarks - track.motion.landmarks).norm(dim=-1).mean(0)
    assert float(moved[torch.from_numpy(FACE_OVAL)].max()) == 0 and float(moved.max()) > 0.005


def test_no_training_landmark_depends_on_a_test_frame(follow):
    images = [d[0] for d in drawn_head()[1]]
    rng = np.random.default_rng(1)
    other = [im if t in TRAIN else rng.integers(0, 255, im.shape, dtype=np.uint8) for t, im in enumerate(images)]
    (a, _), _ = follow(swings())
    (b, _), _ = follow(swings(), images=other)
    assert torch.equal(a.motion.landmarks[: TRAIN.stop], b.motion.landmarks[: TRAIN.stop])
    assert not torch.equal(a.motion.landmarks, b.motion.landmarks)


def test_frames_without_a_face_are_left_alone(follow):
    confidence = torch.ones(FRAMES)
    confidence[[4, 5, 22]] = 0
    (found, _), track = follow(swings(), confidence=confidence)
    assert torch.equal(found.motion.landmarks[[4, 5, 22]], track.motion.landmarks[[4, 5, 22]])


def test_pictures_without_texture_change_nothing(follow):
    flat = [np.full((192, 192, 3), 128, np.uint8)] * FRAMES
    (found, _), track = follow(swings(), images=flat)
    assert float((found.motion.landmarks - track.motion.landmarks).abs().max()) < 1e-3


def test_eliminating_frames_gives_the_whole_systems_solution():
    """Against the dense least squares over all frames, one reweighting."""
    rng = np.random.default_rng(0)
    s, k, n = 9, 3, 5
    rows = np.array([1, 4, 6])
    e = rng.normal(0, 0.01, (s, k, n, 3)).astype(np.float32)
    e[rng.random((s, k, n)) < 0.3] = np.nan
    for j, row in enumerate(rows):
        e[row, j] = np.nan  # a keyframe is not matched to itself
    config = DriftConfig(rounds=1)
    found = solve_keyframes(e, rows, 1.0, config)
    for i in range(n):
        A, b = config.network * np.eye(s), np.zeros((s, 3))
        for t in range(s):
            for j, row in enumerate(rows):
                if np.isfinite(e[t, j, i, 0]):
                    w = 1 / (1 + (np.linalg.norm(e[t, j, i]) / config.noise_px) ** 2) ** 2
                    d = np.zeros(s)
                    d[t], d[row] = 1, -1
                    A += w * np.outer(d, d)
                    b += w * np.outer(d, e[t, j, i])
        np.testing.assert_allclose(found[:, i], np.linalg.solve(A, b)[rows], atol=1e-6)


def test_a_head_without_rigid_points_keeps_its_landmarks(monkeypatch):
    poses, drawn = drawn_head()
    track = tracked(poses, poses)
    nothing = RigidPoints(torch.zeros(0, 3), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    pictures = SimpleNamespace(
        image=lambda t: drawn[t][0], head_mask=lambda t: np.isfinite(drawn[t][1]).astype(np.uint8)
    )
    found, report = correct_landmark_drift(pictures, track, nothing, HeadModel.load(), TRAIN, CONFIG)
    assert torch.equal(found.motion.landmarks, track.motion.landmarks) and report.matches == 0
