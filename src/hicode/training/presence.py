"""Learning whether somebody speaks: the score of `speech/presence.py`, from speech as it is, in noise and over a telephone, and from what is no speech.

n samples at 16 kHz, s = n / 320 rows of 20 ms. Labels "s": 1 speech, 0 none, -1 unknown (learned from by nobody). A logistic regression, both
classes weighing the same; seeded, seconds of work once the features are made.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int
from torch import Tensor

from hicode.errors import TrainingError
from hicode.speech.encoder import SAMPLES_PER_FEATURE, AudioEncoder, speech_level
from hicode.speech.espeak import RATE_HZ, Espeak, sentences
from hicode.speech.phones import Phone
from hicode.speech.presence import Presence
from hicode.training.synthetic import NEGATIVES, Speaker, negative, recorded

Labelled = tuple[Float32[np.ndarray, "n"], Int[np.ndarray, "s"]]
BABBLE_VOICES = 5


@dataclass(frozen=True)
class PresenceConfig:
    """How the score is learned."""

    negatives_s: float = 25.0  # of each kind of sound that is no speech
    snr_db: tuple[float, float] = (3.0, 25.0)  # of the noise that a copy of every recording is given
    level_db: float = 10.0  # by how much at most a live stream's estimate of the level may be off
    weight_decay: float = 3e-3
    seed: int = 0


def rows_by_level(samples: Float32[np.ndarray, "n"]) -> Int[np.ndarray, "s"]:
    """Labels of a clean recording by its loudness: speech within 60 ms of a row above -20 dB of the speech level, none 160 ms away from any above
    -32 dB. A recording with a noisy room has no silence by this, only unknown rows."""
    rows = len(samples) // SAMPLES_PER_FEATURE
    rms = np.sqrt((samples[: rows * SAMPLES_PER_FEATURE].reshape(rows, -1).astype(np.float64) ** 2).mean(1))
    level = speech_level(samples)
    labels = np.full(rows, -1)
    labels[_near(rms > 0.1 * level, 3)] = 1
    labels[~_near(rms > 0.025 * level, 8)] = 0
    return labels


def rows_by_phones(phones: tuple[Phone, ...], rows: int) -> Int[np.ndarray, "s"]:
    """Labels of an utterance whose phones are known: speech from the first to the last but for pauses of a quarter second."""
    labels = np.zeros(rows, np.int64)
    for phone in phones:
        labels[int(phone.start_s * 50) : int(np.ceil(phone.end_s * 50))] = 1
    edges = np.flatnonzero(np.diff(np.concatenate([[1], labels, [1]])))
    for begin, end in zip(edges[::2], edges[1::2]):
        if begin > 0 and end < rows and end - begin < 12:
            labels[begin:end] = 1
    unknown = _near(labels == 1, 6) & (labels == 0)
    labels[unknown] = -1
    return labels


def _near(flags: np.ndarray, rows: int) -> np.ndarray:
    return np.convolve(flags, np.ones(2 * rows + 1), "same") > 0 if len(flags) else flags


def synthetic_speech(speakers: int, sentences_each: int, seed: int = 0) -> list[Labelled]:
    """Voices of espeak-ng in all languages that there are sentences of, in turn, as microphones hear them."""
    texts, out = sentences(), []
    languages = list(texts)
    with Espeak() as espeak:
        for k in range(speakers):
            rng = np.random.default_rng((seed, k))
            speaker = Speaker.sample(f"espeak-{k:03d}", languages[k % len(languages)], rng)
            for i in rng.permutation(len(texts[speaker.language]))[:sentences_each]:
                said = espeak.say(texts[speaker.language][i], speaker.voice, speaker.words_per_minute, speaker.pitch)
                samples, phones = recorded(said, rng)
                out.append((samples, rows_by_phones(phones, len(samples) // SAMPLES_PER_FEATURE)))
    return out


def fit_presence(
    sounds: list[Labelled],
    encoder: AudioEncoder,
    config: PresenceConfig = PresenceConfig(),
    progress: Callable[[float], None] | None = None,
) -> Presence:
    """The score of `encoder`'s features, learned from recordings as they are, a copy of each in noise, of every other one over a telephone, and
    from `training.synthetic`'s negatives. TrainingError where there is no row of speech."""
    rng = np.random.default_rng(config.seed)
    features, labels = [], []

    def add(samples: np.ndarray, own: np.ndarray) -> None:
        level = speech_level(samples) * 10 ** (rng.uniform(-config.level_db, config.level_db) / 20)
        features.append(encoder.encode(samples.astype(np.float32), level)[: len(own)])
        labels.append(own)

    for i, (samples, own) in enumerate(sounds):
        add(samples, own)
        add(in_noise(samples, rng.uniform(*config.snr_db), rng, [s for s, _ in sounds]), own)
        if i % 2:
            add(over_telephone(samples), own)
        if progress:
            progress((i + 1) / (len(sounds) + len(NEGATIVES)))
    for i, kind in enumerate(NEGATIVES):
        for _ in range(round(config.negatives_s / 5)):
            add(negative(kind, 5 * RATE_HZ, rng), np.zeros(5 * 50, np.int64))
        if progress:
            progress((len(sounds) + i + 1) / (len(sounds) + len(NEGATIVES)))
    x, y = torch.cat(features), torch.from_numpy(np.concatenate(labels))
    if not (y == 1).any():
        raise TrainingError("There is no speech to learn from in these recordings. Give some with speech.")
    return _logistic(x[y >= 0].float(), y[y >= 0].float(), config.weight_decay, encoder.name)


def _logistic(x: Tensor, y: Tensor, decay: float, encoder: str) -> Presence:
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / std
    weight = torch.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    w = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([w], max_iter=80, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        error = F.binary_cross_entropy_with_logits(x @ w[:-1] + w[-1], y, weight)
        loss = error + decay * w[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    w = w.detach()
    return Presence(w[:-1] / std, w[-1] - (w[:-1] * mean / std).sum(), encoder)


def in_noise(
    samples: Float32[np.ndarray, "n"], snr_db: float, rng: np.random.Generator, voices: list[np.ndarray] = (), kind: str | None = None
) -> Float32[np.ndarray, "n"]:
    """The sound under one of NEGATIVES or, where there are `voices` to make it of, babble (of five): at random, or `kind`."""
    kinds = [k for k in NEGATIVES if k != "silence"] + ["babble"] * bool(len(voices))
    kind = kind or str(rng.choice(kinds))
    noise = babble(voices, len(samples), rng) if kind == "babble" else negative(kind, len(samples), rng).astype(np.float64)
    return (samples + speech_level(samples) * 10 ** (-snr_db / 20) * noise / max(noise.std(), 1e-9)).astype(np.float32)


def babble(voices: list[np.ndarray], n: int, rng: np.random.Generator) -> np.ndarray:
    """Five voices at once, each of the same loudness, from anywhere in their recordings."""
    out = np.zeros(n)
    for k in rng.integers(len(voices), size=BABBLE_VOICES):
        begin = int(rng.integers(len(voices[k])))
        out += np.resize(np.roll(voices[k], -begin), n) / speech_level(voices[k])
    return out


def over_telephone(samples: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """Nothing but 300 to 3400 Hz."""
    from scipy.signal import butter, sosfilt

    return sosfilt(butter(6, [300, 3400], "bandpass", fs=RATE_HZ, output="sos"), samples).astype(np.float32)
