"""Learning voice activity, and what the shipped weights say of speech and of other sound."""

import numpy as np
import pytest
import torch
from research.pretrain import espeak
from research.pretrain.phones import Phone
from research.pretrain.synthetic import NEGATIVES, negative
from research.pretrain.voice_activity import (
    Rows,
    VoiceActivityTraining,
    cross_validate,
    fit_rows,
    fit_voice_activity,
    in_noise,
    over_telephone,
    rows_by_level,
    rows_by_phones,
    synthetic_speech,
)

from hicode.errors import AssetError, InputError, TrainingError
from hicode.media.audio import read_audio
from hicode.speech.encoders import create_encoder
from hicode.speech.loudness import speech_level
from hicode.speech.voice_activity import VoiceActivity

# --- labels and learning ----------------------------------------------------------------------------------------------


def test_rows_by_level_know_speech_from_silence_and_admit_the_rest():
    loud = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    labels = rows_by_level(np.concatenate([loud, np.zeros(16000, np.float32), loud]))
    assert (labels[:50] == 1).all() and (labels[60:90] == 0).all() and (labels[-50:] == 1).all() and -1 in labels


def test_rows_by_phones_bridge_short_pauses_only():
    phones = (Phone(0.5, 1.0, "a"), Phone(1.1, 1.5, "a"), Phone(2.5, 3.0, "a"))
    labels = rows_by_phones(phones, 200)
    assert (labels[25:75] == 1).all()  # a pause of .1 s
    assert (labels[85:115] == 0).all() and labels[76] == -1 and (labels[:18] == 0).all()


def test_noise_comes_at_the_ratio_asked_for():
    voice = (0.1 * np.random.default_rng(0).standard_normal(32000)).astype(np.float32)
    for kind in ("pink", "babble"):
        noise = in_noise(voice, 10.0, np.random.default_rng(1), [voice[::-1].copy()], kind) - voice
        assert 20 * np.log10(speech_level(voice) / noise.std()) == pytest.approx(10, abs=0.1)


def test_a_telephone_keeps_300_to_3400_hz():
    time = np.arange(16000) / 16000
    kept = {
        hz: over_telephone(np.sin(2 * np.pi * hz * time).astype(np.float32))[4000:].std() * 2**0.5
        for hz in (100, 1000, 5000)
    }
    assert kept[1000] == pytest.approx(1, abs=0.05) and kept[100] < 0.01 and kept[5000] < 0.02


def test_the_score_is_learned_from_synthetic_voices():
    """By log-mel features and seconds of sound, to be quick: other voices and other noises, told apart by each row
    alone. Guessing gets half.
    """
    if not espeak.installed():  # asked without loading it into this process
        pytest.skip(f"{espeak.PACKAGE} is not installed: pip install 'hicode[research]'")
    encoder = create_encoder("logmel")
    presence = fit_voice_activity(synthetic_speech(8, 1, seed=1), encoder, VoiceActivityTraining(negatives_s=5.0))
    right = []
    for samples, labels in synthetic_speech(4, 1, seed=2):
        score = presence(encoder.encode(samples)).numpy()[: len(labels)]
        right += [(score[labels == 1] > 0).mean(), (score[labels == 0] < 0).mean()]
    rng = np.random.default_rng(3)
    right += [(presence(encoder.encode(negative(kind, 32000, rng))) < 0).float().mean() for kind in NEGATIVES]
    assert np.mean(right) > 0.8


def test_learning_without_speech_is_refused():
    with pytest.raises(TrainingError, match="no speech to learn from"):
        fit_voice_activity([], create_encoder("logmel"), VoiceActivityTraining(negatives_s=5.0))


def test_figures_are_of_speakers_left_out():
    """Each speaker's speech shows in a feature of their own, so whoever has learned from them knows it all, and whoever
    has not knows nothing.
    """
    speaker, speech = (v.flatten() for v in torch.meshgrid(torch.arange(3), torch.arange(40) % 2, indexing="ij"))
    features = torch.nn.functional.one_hot(speaker, 3) * (2.0 * speech[:, None] - 1)
    rows = Rows(features, speech, speaker, torch.zeros(120, dtype=torch.long))
    own = fit_rows(rows, "embedded", VoiceActivityTraining())(features) > 0
    assert torch.equal(own, speech == 1)
    for row in cross_validate(rows, ["ann", "bob", "cat"], "embedded", VoiceActivityTraining(folds=2)):
        assert (row["missed"]["as it is"], row["taken"]) in ((1.0, 0.0), (0.0, 1.0)) and row["missed"][
            "in noise"
        ] is None
    assert cross_validate(rows, ["ann"] * 3, "embedded", VoiceActivityTraining()) == [], "nobody is left to learn from"


# --- the shipped weights ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    try:
        encoder = create_encoder("embedded")
    except (AssetError, InputError) as error:
        pytest.skip(f"the embedded encoder's package cannot be had here: {error}")
    presence = VoiceActivity.load()
    assert presence.encoder == encoder.name
    return lambda samples: presence.frames(encoder.encode(samples))


@pytest.mark.parametrize("kind", NEGATIVES)
def test_no_other_sound_is_taken_for_speech(shipped, kind):
    """Sounds drawn by another seed than training's. The first and last frames, which hear silence beside the sound,
    included.
    """
    scores = shipped(negative(kind, 32000, np.random.default_rng(100)))
    assert (scores < -1).mean() > 0.9  # -1: from where on the gate begins to close


@pytest.mark.parametrize("name", ["de.wav", "es.wav", "fr.wav"])
def test_no_language_is_taken_for_noise(shipped, data_dir, name):
    """Speakers whom training has not heard, as they are and over a telephone in pink noise at 10 dB."""
    samples = read_audio(data_dir / "speech" / name)[:64000]
    speech = rows_by_level(samples)[::2] == 1
    noisy = in_noise(over_telephone(samples), 10.0, np.random.default_rng(0), kind="pink")
    for sound, missed in ((samples, 0.02), (noisy, 0.15)):
        scores = shipped(sound)[: len(speech)]
        assert (scores[speech] < -1).mean() <= missed
