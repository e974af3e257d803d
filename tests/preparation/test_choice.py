"""The seconds that a head learns from: short clips whole, long ones where something happens; the rest follows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.clips import some_track
from hicode.geometry import rigid, rotation_from_axis_angle
from hicode.preparation.choice import BLOCK, Choice, ChoiceConfig, choose, completed, hidden

CONFIG = ChoiceConfig(seconds=6.0, run_s=3.0)
SHARP = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
TRAIN, COUNT = range(20 * BLOCK), 22 * BLOCK


def still_track(count: int):
    track = some_track(count)
    return replace(track, motion=replace(track.motion, landmarks=track.motion.landmarks[:1].repeat(count, 1, 1)))


def moving(seconds: dict[int, float]):
    """A head that keeps still but in some seconds, in each of which it looks in its own direction (rad)."""
    angles = torch.zeros(COUNT, 3)
    for second, angle in seconds.items():
        angles[second * BLOCK : (second + 1) * BLOCK, 1] = angle * torch.linspace(0, 1, BLOCK)
    track = still_track(COUNT)
    turned = track.motion.T_camera_head @ rigid(rotation_from_axis_angle(angles), torch.zeros(COUNT, 3))
    return replace(track, motion=replace(track.motion, T_camera_head=turned))


def chosen_seconds(choice: Choice) -> set[int]:
    return set(np.flatnonzero(choice.mask(COUNT)[: TRAIN.stop].reshape(-1, BLOCK).all(1)).tolist())


def test_a_short_clip_is_learned_from_as_a_whole():
    choice = choose(still_track(COUNT), TRAIN, np.ones(COUNT, bool), lambda t: SHARP, replace(CONFIG, seconds=20.0))
    assert choice == Choice([[0, COUNT]], 20.0)


def test_the_long_run_is_where_the_head_moves_and_rare_poses_are_added():
    track = moving({4: 0.5, 5: -0.5, 6: 0.5, 10: 0.7, 17: -0.6})
    choice = choose(track, TRAIN, np.ones(COUNT, bool), lambda t: SHARP, CONFIG)
    assert {4, 5, 6, 10, 17} <= chosen_seconds(choice) and len(chosen_seconds(choice)) == 6 == choice.seconds
    assert choice.mask(COUNT)[TRAIN.stop :].all()  # the test part is tracked as a whole


def test_seconds_with_defects_are_never_chosen_and_blurred_ones_come_last():
    track = moving({4: 0.5, 5: -0.5, 6: 0.5, 10: 0.7, 17: -0.6})
    good = np.ones(COUNT, bool)
    good[10 * BLOCK + 3] = False
    blurred = np.full((64, 64), 100, np.uint8)
    choice = choose(track, TRAIN, good, lambda t: blurred if t // BLOCK == 17 else SHARP, CONFIG)
    assert 10 not in chosen_seconds(choice)
    tight = replace(CONFIG, seconds=4.0)
    assert 17 in chosen_seconds(choose(track, TRAIN, good, lambda t: SHARP, tight))
    track = moving({4: 0.5, 5: -0.5, 6: 0.5, 12: 0.65, 17: -0.7})
    assert 12 in chosen_seconds(choose(track, TRAIN, good, lambda t: blurred if t // BLOCK == 17 else SHARP, tight))


def test_frames_that_were_not_chosen_take_the_mean_correction():
    before, chosen = still_track(4), np.array([True, False, True, False])
    moved = before.motion.landmarks + torch.tensor([0.1, 0.0, 0.3, 9.0])[:, None, None]
    after = completed(hidden(replace(before, motion=replace(before.motion, landmarks=moved)), chosen), before, chosen)
    shift = (after.motion.landmarks - before.motion.landmarks)[:, 0, 0]
    assert shift.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.2], abs=1e-6)
    assert torch.equal(after.confidence, before.confidence)


def test_frames_that_were_not_chosen_count_as_without_a_face():
    track = hidden(still_track(3), np.array([True, False, True]))
    assert (track.confidence > 0).tolist() == [True, False, True]
