"""The audio-video offset: its sign, its resolution, its controls."""

import math

import numpy as np
import pytest
import torch

from hicode.speech import sync
from hicode.speech.sync import (
    RELIABLE_MARGIN,
    SyncModel,
    estimate_offset,
    fit_sync,
    in_context,
    lag_curve,
    mouth_measures,
    shuffled_control,
    sync_auc,
)  # fmt: skip

DIM = 6


def _clip(frames: int, later: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that drive a mouth's opening and width, which follow `later` frames after; and a face drifting through space."""
    rng = np.random.default_rng(seed)
    pad = 16
    sound = np.stack([np.convolve(rng.standard_normal(2 * (frames + 2 * pad) + 8), np.ones(5) / 5, "valid") for _ in range(DIM)], 1)
    sound = sound[: 2 * (frames + 2 * pad)]
    per_frame = sound.reshape(-1, 2, DIM).mean(1)
    opening, width = 0.3 + 0.3 * per_frame[:, 0], 1.0 + 0.2 * per_frame[:, 1]
    mouth = slice(pad - later, pad - later + frames)
    opening, width = opening[mouth].clip(0.0), width[mouth]
    points = np.zeros((frames, 478, 3))
    points[:, 33], points[:, 263] = [-0.5, 1, 0], [0.5, 1, 0]
    points[:, 1], points[:, 0] = [0, 0.5, 0.2], [0, 0.1, 0.1]
    for top, bottom, x in ((13, 14, 0.0), (82, 87, -0.1), (312, 317, 0.1)):
        points[:, top, 0] = points[:, bottom, 0] = x
        points[:, bottom, 1] = -opening
    points[:, 17, 1], points[:, 152, 1] = -opening - 0.1, -0.7 * opening - 0.8
    points[:, 78, 0], points[:, 308, 0] = -width / 2, width / 2
    points += rng.standard_normal((frames, 478, 3)) * 0.003
    points = 150 * points + np.linspace(0, 40, frames)[:, None, None]  # px, and a drift
    return torch.from_numpy(sound[2 * pad : 2 * (pad + frames)]).float(), torch.from_numpy(points).float()


@pytest.fixture(scope="module")
def model() -> SyncModel:
    return fit_sync([_clip(200, 0, seed) for seed in range(4)], "test", ("made up",))[0]


@pytest.mark.parametrize("later", [-6, -1, 0, 2, 5])
def test_positive_means_the_mouth_is_later(model, later):
    result = estimate_offset(*_clip(200, later, 9), model)
    assert result.offset_frames == pytest.approx(later, abs=0.3)
    assert result.reliable and result.correlation > 0.5


def test_offsets_of_training_clips_are_found_together():
    true = [0, -2, 3, 0, 1]
    _, offsets = fit_sync([_clip(250, lag, seed) for seed, lag in enumerate(true)], "test", (), anchor=3)
    assert offsets == pytest.approx(true, abs=0.3)


def test_moving_the_sound_moves_the_offset_as_much(model):
    features, landmarks = _clip(220, 0, 11)
    sooner = torch.cat([features[6:], features[-6:]])  # the sound comes 3 frames sooner, so the mouth is later
    assert estimate_offset(sooner, landmarks, model).offset_frames == pytest.approx(3, abs=0.3)


def test_shuffled_sound_has_no_margin(model):
    results = [shuffled_control(*_clip(200, 0, seed), model, seed) for seed in range(20, 30)]
    assert np.median([r.margin for r in results]) < RELIABLE_MARGIN
    assert estimate_offset(*_clip(200, 0, 20), model).margin > 2 * RELIABLE_MARGIN


def test_areas_tell_right_from_wrong_and_chance_is_a_half(model):
    features, landmarks = _clip(300, 2, 5)
    others = [_clip(300, 0, seed)[0] for seed in (6, 7)]
    shifted, mismatched = sync_auc(features, landmarks, others, 2, model=model)
    assert shifted > 0.95 and mismatched > 0.95
    unrelated = _clip(300, 0, 8)[0]
    assert 0.2 < sync_auc(unrelated, landmarks, others, 2, model=model)[1] < 0.8
    assert math.isnan(sync_auc(features, landmarks, [], 2, model=model)[1])


def test_nothing_to_go_by_gives_zero_without_a_margin(model):
    features, landmarks = _clip(200, 0, 3)
    for f, l in ((features[:60], landmarks), (torch.zeros_like(features), landmarks), (features, landmarks[:1].expand(200, -1, -1))):
        result = estimate_offset(f, l, model)
        assert result.offset_frames == 0 and not result.reliable


def test_measures_ignore_scale_place_and_pose():
    _, landmarks = _clip(20, 0, 1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    moved = 2.5 * landmarks @ turn.T + torch.tensor([10.0, -3.0, 7.0])
    torch.testing.assert_close(mouth_measures(moved), mouth_measures(landmarks), atol=1e-4, rtol=1e-4)


def test_context_repeats_the_ends():
    features = torch.arange(8.0)[:, None]
    assert in_context(features)[0].tolist() == [0.5, 0.5, 0.5, 2.5, 4.5, 6.5]
    assert in_context(features)[3].tolist() == [2.5, 4.5, 6.5, 6.5, 6.5, 6.5]


def test_lag_curve_is_a_correlation():
    x = torch.randn(100, 4)
    curve = lag_curve(x, 3 * x + 1)
    assert curve.argmax() == sync.MAX_LAG_FRAMES and curve.max() == pytest.approx(1, abs=1e-5)


def test_files_give_the_model_back(model, tmp_path):
    model.save(tmp_path / "sync.safetensors")
    again = SyncModel.load(tmp_path / "sync.safetensors")
    assert again.learned_from == ("made up",)
    # stored in half precision
    torch.testing.assert_close(again.weight, model.weight, atol=1e-3, rtol=2e-3)


def test_the_shipped_model_has_not_seen_the_evaluation_clips():
    learned = SyncModel.load().learned_from
    assert learned and not set(learned) & {"radio2", "markey", "khill", "german"}
