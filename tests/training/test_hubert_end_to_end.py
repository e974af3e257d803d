"""HuBERT from a local folder of weights: a clip's features, the person's models, their file, and a live stream."""

import shutil

import numpy as np
import pytest
import torch

from helpers.clips import write_clip
from helpers.hubert import tiny_hubert
from hicode.errors import AssetError, InputError
from hicode.files import load_tensors
from hicode.media.audio import write_audio
from hicode.preparation.clip import Clip
from hicode.preparation.pipeline import PrepareConfig, _check_config
from hicode.preparation.sound import store_features
from hicode.speech.speech_model import SpeechModels
from hicode.training.adaptation import SCHEMA, VERSION
from hicode.training.avatar import learn_speech
from hicode.training.faceformer import mouth_metrics


def syllables(seconds: float) -> np.ndarray:
    t = np.arange(round(16000 * seconds)) / 16000
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.1 * np.clip(np.sin(2 * np.pi * 3 * t), 0, 1) * noise).astype(np.float32)


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    """(folder of weights, clip prepared with them)."""
    try:
        mouth_metrics()
    except AssetError as error:
        pytest.skip(f"the head model's package cannot be had here: {error}")
    folder = tmp_path_factory.mktemp("hubert")
    weights = tiny_hubert(folder / "weights")
    path, _ = write_clip(folder / "a.clip", t=100)
    write_audio(path / "audio.wav", syllables(4), 16000)
    stored = store_features(path, "hubert", weights, 100, 0.0)
    shutil.rmtree(path)
    path, _ = write_clip(path, t=100, encoder=stored.encoder)
    write_audio(path / "audio.wav", syllables(4), 16000)
    store_features(path, "hubert", weights, 100, 0.0)
    return weights, Clip.open(path)


def test_a_clip_knows_its_encoder_and_needs_no_weights_for_stored_features(hubert):
    weights, clip = hubert
    assert clip.encoder.name == "hubert" and clip.encoder.weights == str(weights) and clip.encoder.dim == 32
    moved = weights.rename(weights.with_name("elsewhere"))
    assert clip.speech_features().shape == (200, 32)
    moved.rename(weights)


def test_hubert_trains_and_speaks(hubert, tmp_path, capsys):
    weights, clip = hubert
    models = learn_speech(clip, tmp_path / "speech.safetensors")
    assert "learned from this clip alone" in capsys.readouterr().out
    assert models.encoder == clip.encoder
    again = SpeechModels.from_state(*load_tensors(tmp_path / "speech.safetensors", SCHEMA, VERSION))
    sound = syllables(3)
    features = again.encoder_for().encode(sound, 0.05)
    whole = again.predict(features)
    stream, speech, parts = again.encoder_for(weights).stream(0.05), again.stream(), []
    for piece in np.array_split(sound, 7):
        parts.append(speech.push(stream.push(piece)))
    parts += [speech.push(stream.finish()), speech.finish()]
    streamed = torch.cat([p.landmarks for p in parts])
    assert streamed.shape == (75, 478, 3)
    torch.testing.assert_close(streamed, whole.landmarks, atol=1e-4, rtol=1e-4)
    assert (streamed.std(0) > 0).any()


def test_learning_again_reads_what_was_learned(hubert, tmp_path):
    file = tmp_path / "speech.safetensors"
    learn_speech(hubert[1], file)
    written = file.stat().st_mtime_ns
    learn_speech(hubert[1], file)
    assert file.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    "config, words",
    [
        (dict(encoder="hubert"), "needs its weights"),
        (dict(encoder="hubert", encoder_weights="nowhere"), "No HuBERT model"),
        (dict(encoder="logmel", encoder_weights="nowhere"), "takes no --encoder-weights"),
    ],
)
def test_an_encoder_without_its_weights_is_refused_before_any_work(config, words):
    with pytest.raises(InputError, match=words):
        _check_config(PrepareConfig(**config))
