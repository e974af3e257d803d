"""The audio-video offset: its sign, its resolution, its controls."""

import math

import numpy as np
import pytest
import torch
from research.pretrain.sync_fit import fit_sync

from helpers.sync_clips import sync_clip
from hicode.errors import FileFormatError, InputError
from hicode.files import save_tensors
from hicode.speech import sync
from hicode.speech.sync import (
    RELIABLE_MARGIN,
    SyncModel,
    SyncResult,
    area_under_curve,
    estimate_offset,
    in_context,
    lag_curve,
    mouth_measures,
    shuffled_control,
    sync_auc,
    window_scores,
    windowed_offsets,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SyncModel:
    return fit_sync([sync_clip(200, 0, seed) for seed in range(4)], "test", ("made up",))[0]


@pytest.mark.parametrize("later", [-6, -1, 0, 2, 5])
def test_positive_means_the_mouth_is_later(model, later):
    result = estimate_offset(*sync_clip(200, later, 9), model)
    assert result.offset_frames == pytest.approx(later, abs=0.3)
    assert result.reliable and result.correlation > 0.5


def test_moving_the_sound_moves_the_offset_as_much(model):
    features, landmarks = sync_clip(220, 0, 11)
    sooner = torch.cat([features[6:], features[-6:]])  # the sound comes 3 frames sooner, so the mouth is later
    assert estimate_offset(sooner, landmarks, model).offset_frames == pytest.approx(3, abs=0.3)


def test_shuffled_sound_has_no_margin(model):
    results = [shuffled_control(*sync_clip(200, 0, seed), model, seed) for seed in range(20, 30)]
    assert np.median([r.margin for r in results]) < RELIABLE_MARGIN
    assert estimate_offset(*sync_clip(200, 0, 20), model).margin > 2 * RELIABLE_MARGIN


def test_areas_tell_right_from_wrong_and_chance_is_a_half(model):
    features, landmarks = sync_clip(300, 2, 5)
    others = [sync_clip(300, 0, seed)[0] for seed in (6, 7)]
    shifted, mismatched = sync_auc(features, landmarks, others, 2, model=model)
    assert shifted > 0.95 and mismatched > 0.95
    unrelated = sync_clip(300, 0, 8)[0]
    assert 0.2 < sync_auc(unrelated, landmarks, others, 2, model=model)[1] < 0.8
    assert math.isnan(sync_auc(features, landmarks, [], 2, model=model)[1])


def test_an_offset_beyond_the_lags_is_refused(model):
    with pytest.raises(InputError, match="beyond ±10"):
        sync_auc(*sync_clip(300, 0, 5), offset_frames=11, model=model)


def test_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    right, wrong = torch.from_numpy(rng.integers(0, 6, 30)), torch.from_numpy(rng.integers(0, 5, (4, 9)))  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in right.tolist() for b in wrong.flatten().tolist()]
    assert area_under_curve(right, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_windows_show_where_the_offset_changes(model):
    features, landmarks = sync_clip(400, 0, 12)
    later = torch.cat([landmarks[:200], landmarks[196:396]])  # from frame 200 on, the mouth is 4 frames later
    found = windowed_offsets(features, later, model, step=10)
    assert [start for start, _ in found] == list(range(10, 341, 10))
    for start, result in found:
        if start + 50 <= 200 or start >= 200:
            assert result.offset_frames == pytest.approx(0 if start < 200 else 4, abs=0.5) and result.frames == 50


def test_a_window_reads_its_own_frames_and_no_others(model):
    """Everything else in disorder (the same frames, so that standardisation over the clip stays as it was), the score
    is the same.
    """
    features, landmarks = sync_clip(120, 0, 13)
    starts, scores = window_scores(model.embed_sound(features), model.embed_mouth(landmarks), step=25)
    order = np.random.default_rng(0).permutation([*range(35), *range(85, 120)])
    mixed = torch.tensor([*order[:35], *range(35, 85), *order[35:]])
    again = window_scores(
        model.embed_sound(features.unflatten(0, (-1, 2))[mixed].flatten(0, 1)),
        model.embed_mouth(landmarks[mixed]),
        step=25,
    )[1]
    middle, none = starts.index(35), sync.MAX_LAG_FRAMES
    assert float(again[middle, none]) == pytest.approx(float(scores[middle, none]), abs=1e-5)
    assert (again - scores).abs().max() > 0.05


def test_short_clips_have_no_windows(model):
    features, landmarks = sync_clip(69, 0, 3)
    assert windowed_offsets(features, landmarks, model) == []
    assert len(windowed_offsets(*sync_clip(70, 0, 3), model)) == 1


def test_a_shorter_clip_needs_a_larger_margin():
    assert SyncResult(0.0, 0.3, 0.5, 200).reliable and not SyncResult(0.0, 0.3, 0.5, 60).reliable
    assert SyncResult(0.0, 0.6, 0.5, 50).reliable and not SyncResult(0.0, 0.2, 0.5, 100_000).reliable


def test_nothing_to_go_by_gives_zero_without_a_margin(model):
    features, landmarks = sync_clip(200, 0, 3)
    for f, l in (
        (features[:60], landmarks),
        (torch.zeros_like(features), landmarks),
        (features, landmarks[:1].expand(200, -1, -1)),
    ):
        result = estimate_offset(f, l, model)
        assert result.offset_frames == 0 and not result.reliable


def test_measures_ignore_scale_place_and_pose():
    _, landmarks = sync_clip(20, 0, 1)
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


def test_files_of_another_version_are_refused(tmp_path):
    save_tensors(tmp_path / "old.safetensors", {"weight": torch.zeros(2, 4)}, "hicode-sync", 1, {})
    with pytest.raises(FileFormatError, match="version"):
        SyncModel.load(tmp_path / "old.safetensors")
