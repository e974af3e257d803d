"""The audio-video offset: its sign, its resolution, its controls."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from research.benchmarks import sync as benchmark

from hicode.errors import FileFormatError, InputError
from hicode.files import save_tensors
from hicode.speech import sync
from hicode.speech.sync import (
    RELIABLE_MARGIN,
    SyncModel,
    SyncResult,
    area_under_curve,
    estimate_offset,
    fit_sync,
    in_context,
    lag_curve,
    mouth_measures,
    shuffled_control,
    sync_auc,
    window_scores,
    windowed_offsets,
)  # fmt: skip

DIM = 6


def _clip(frames: int, later: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that drive a mouth's opening and width, which follow `later` frames after; and a face drifting through space."""
    rng = np.random.default_rng(seed)
    pad = 16
    sound = np.stack(
        [np.convolve(rng.standard_normal(2 * (frames + 2 * pad) + 8), np.ones(5) / 5, "valid") for _ in range(DIM)], 1
    )
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
    _, found = fit_sync([_clip(250, lag, seed) for seed, lag in enumerate(true)], "test", (), anchor=3)
    assert [f.offset_frames for f in found] == pytest.approx(true, abs=0.3)
    assert all(f.reliable and f.frames == 250 for f in found)


def test_a_training_clip_with_foreign_sound_is_not_reliable():
    pairs = [_clip(250, 0, seed) for seed in range(4)]
    pairs[2] = (_clip(250, 0, 99)[0], pairs[2][1])
    _, found = fit_sync(pairs, "test", ())
    assert [f.reliable for f in found] == [True, True, False, True]


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


def test_an_offset_beyond_the_lags_is_refused(model):
    with pytest.raises(InputError, match="beyond ±10"):
        sync_auc(*_clip(300, 0, 5), offset_frames=11, model=model)


def test_area_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    right, wrong = torch.from_numpy(rng.integers(0, 6, 30)), torch.from_numpy(rng.integers(0, 5, (4, 9)))  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in right.tolist() for b in wrong.flatten().tolist()]
    assert area_under_curve(right, wrong) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_windows_show_where_the_offset_changes(model):
    features, landmarks = _clip(400, 0, 12)
    later = torch.cat([landmarks[:200], landmarks[196:396]])  # from frame 200 on, the mouth is 4 frames later
    found = windowed_offsets(features, later, model, step=10)
    assert [start for start, _ in found] == list(range(10, 341, 10))
    for start, result in found:
        if start + 50 <= 200 or start >= 200:
            assert result.offset_frames == pytest.approx(0 if start < 200 else 4, abs=0.5) and result.frames == 50


def test_a_window_reads_its_own_frames_and_no_others(model):
    """Everything else in disorder (the same frames, so that standardisation over the clip stays as it was), the score is the same."""
    features, landmarks = _clip(120, 0, 13)
    starts, scores = window_scores(model.hear(features), model.see(landmarks), step=25)
    order = np.random.default_rng(0).permutation([*range(35), *range(85, 120)])
    mixed = torch.tensor([*order[:35], *range(35, 85), *order[35:]])
    again = window_scores(
        model.hear(features.unflatten(0, (-1, 2))[mixed].flatten(0, 1)), model.see(landmarks[mixed]), step=25
    )[1]
    middle, none = starts.index(35), sync.MAX_LAG_FRAMES
    assert float(again[middle, none]) == pytest.approx(float(scores[middle, none]), abs=1e-5)
    assert (again - scores).abs().max() > 0.05


def test_short_clips_have_no_windows(model):
    features, landmarks = _clip(69, 0, 3)
    assert windowed_offsets(features, landmarks, model) == []
    assert len(windowed_offsets(*_clip(70, 0, 3), model)) == 1


def test_a_shorter_clip_needs_a_larger_margin():
    assert SyncResult(0.0, 0.3, 0.5, 200).reliable and not SyncResult(0.0, 0.3, 0.5, 60).reliable
    assert SyncResult(0.0, 0.6, 0.5, 50).reliable and not SyncResult(0.0, 0.2, 0.5, 100_000).reliable


def test_mouth_filters_are_uncorrelated_and_what_they_see_is_predicted_best(model):
    """On the training clips: unit variance each; correlations with the prediction fall from the last to the first."""
    clips = [_clip(200, 0, seed) for seed in range(4)]
    seen = torch.cat([model.see(landmarks) for _, landmarks in clips]).double()
    heard = torch.cat([model.hear(features) for features, _ in clips]).double()
    covariance = seen.T @ seen / len(seen)
    # The ridge of a hundredth of the mean variance takes some off the weak ones.
    assert covariance.diagonal().max() <= 1.0 + 1e-3 and covariance.diagonal()[-3:].min() > 0.9
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.1
    explained = (seen * heard).mean(0)
    assert (explained.diff() > -1e-3).all()


def test_nothing_to_go_by_gives_zero_without_a_margin(model):
    features, landmarks = _clip(200, 0, 3)
    for f, l in (
        (features[:60], landmarks),
        (torch.zeros_like(features), landmarks),
        (features, landmarks[:1].expand(200, -1, -1)),
    ):
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


def test_files_of_another_version_are_refused(tmp_path):
    save_tensors(tmp_path / "old.safetensors", {"weight": torch.zeros(2, 4)}, "hicode-sync", 1, {})
    with pytest.raises(FileFormatError, match="version"):
        SyncModel.load(tmp_path / "old.safetensors")


# ---------------------------------------------------------------------------------------------------- benchmarks/sync


@pytest.fixture
def corpus(tmp_path):
    """Four speakers, one of them in six short clips."""
    (tmp_path / "examples").mkdir()
    for seed, speaker in enumerate(["a", "b", "c", *["many"] * 6]):
        features, landmarks = _clip(80 if speaker == "many" else 240, seed % 2, 30 + seed)
        tensors = {"features": torch.stack([features, 0 * features]).half(), "landmarks": landmarks}
        save_tensors(
            tmp_path / "examples" / f"{speaker}~{seed}.safetensors",
            tensors,
            "corpus-example",
            1,
            {"speaker": speaker, "offset_frames": 0.0},
        )
    return tmp_path


def test_the_benchmark_tells_truth_from_shuffled_sound(corpus):
    lines, pooled = benchmark.measure(benchmark.load_corpus(corpus, (), 60), None, ())
    windows, shifted, mismatched, nearest, _, _ = pooled.figures()
    assert windows > 30 and min(shifted, mismatched) > 0.98 and nearest == 1
    names = [cells[0] for cells in lines]
    assert names[1:5] == ["· a", "· b", "· c", "· many"] and names[5].startswith("shuffled")
    assert 0.2 < float(lines[5][2]) < 0.8 and float(lines[5][4]) < 60


def test_a_half_that_is_scored_does_not_say_its_own_offset(corpus, model):
    clips = benchmark.load_corpus(corpus, (), 60)["a"]
    (_, first, by_second), _ = benchmark.judged(clips, model)
    spoilt = replace(
        clips[0], landmarks=torch.cat([clips[0].landmarks[: len(first)].flip(0), clips[0].landmarks[len(first) :]])
    )
    assert benchmark.judged([spoilt], model)[0][2] == by_second
    assert benchmark.judged([spoilt], model)[1][2] != benchmark.judged(clips, model)[1][2]


def test_the_benchmark_keeps_scored_only_speakers_out_of_every_model(corpus):
    judges = benchmark.models(benchmark.load_corpus(corpus, (), 60), ("b",))
    assert judges["a"].learned_from == ("c", "many") and judges["b"].learned_from == ("a", "c", "many")


def test_without_a_corpus_the_benchmark_says_how_to_make_one(tmp_path):
    with pytest.raises(SystemExit, match="hicode pretrain FOLDER"):
        benchmark.load_corpus(tmp_path, (), 60)
