"""Learning the sync model, and the benchmark that measures it on speakers it has not seen."""

from dataclasses import replace

import pytest
import torch
from research.benchmarks import sync as benchmark
from research.pretrain.sync_fit import fit_sync

from helpers.sync_clips import sync_clip
from hicode.files import save_tensors
from hicode.speech.sync import SyncModel


@pytest.fixture(scope="module")
def model() -> SyncModel:
    return fit_sync([sync_clip(200, 0, seed) for seed in range(4)], "test", ("made up",))[0]


def test_offsets_of_training_clips_are_found_together():
    true = [0, -2, 3, 0, 1]
    _, found = fit_sync([sync_clip(250, lag, seed) for seed, lag in enumerate(true)], "test", (), anchor=3)
    assert [f.offset_frames for f in found] == pytest.approx(true, abs=0.3)
    assert all(f.reliable and f.frames == 250 for f in found)


def test_a_training_clip_with_foreign_sound_is_not_reliable():
    pairs = [sync_clip(250, 0, seed) for seed in range(4)]
    pairs[2] = (sync_clip(250, 0, 99)[0], pairs[2][1])
    _, found = fit_sync(pairs, "test", ())
    assert [f.reliable for f in found] == [True, True, False, True]


def test_mouth_filters_are_uncorrelated_and_what_they_see_is_predicted_best(model):
    """On the training clips: unit variance each; correlations with the prediction fall from the last to the first."""
    clips = [sync_clip(200, 0, seed) for seed in range(4)]
    seen = torch.cat([model.embed_mouth(landmarks) for _, landmarks in clips]).double()
    heard = torch.cat([model.embed_sound(features) for features, _ in clips]).double()
    covariance = seen.T @ seen / len(seen)
    # The ridge of a hundredth of the mean variance takes some off the weak ones.
    assert covariance.diagonal().max() <= 1.0 + 1e-3 and covariance.diagonal()[-3:].min() > 0.9
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.1
    explained = (seen * heard).mean(0)
    assert (explained.diff() > -1e-3).all()


# ---------------------------------------------------------------------------------------------------- benchmarks/sync


@pytest.fixture
def corpus(tmp_path):
    """Four speakers, one of them in six short clips."""
    (tmp_path / "examples").mkdir()
    for seed, speaker in enumerate(["a", "b", "c", *["many"] * 6]):
        features, landmarks = sync_clip(80 if speaker == "many" else 240, seed % 2, 30 + seed)
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
