"""Learning voice activity: the score of `hicode.speech.voice_activity`.

n samples at 16 kHz, s = n / 320 rows of 20 ms. Labels "s": 1 speech, 0 none, -1 unknown (not used). A logistic
regression with equal weight of both classes, on speech as it is, in noise, over a telephone, and on sounds without
speech. It is seeded and takes seconds once the features are made. `learn_voice_activity` is a step of `hicode
pretrain`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int
from torch import Tensor

from hicode.audio import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FEATURE, SAMPLES_PER_FRAME
from hicode.errors import TrainingError
from hicode.progress import progress_bar
from hicode.speech.encoders import AudioEncoder
from hicode.speech.loudness import speech_level
from hicode.speech.voice_activity import SCHEMA, VoiceActivity
from research.pretrain import espeak
from research.pretrain.build import sound_of
from research.pretrain.corpus import Step, encoder_key, fingerprint, stored_tensors
from research.pretrain.espeak import Espeak, sentences
from research.pretrain.phones import Phone
from research.pretrain.synthetic import NEGATIVES, Speaker, negative, recorded

Labelled = tuple[Float32[np.ndarray, "n"], Int[np.ndarray, "s"]]
BABBLE_VOICES = 5
ROWS_PER_S = 50
CONDITIONS = ("as it is", "in noise", "over a telephone")
SYNTHETIC = "espeak"  # all synthetic voices count as this one speaker


@dataclass(frozen=True)
class VoiceActivityTraining:
    """How the voice-activity score is learned."""

    negatives_s: float = 25.0
    """seconds of each kind of sound without speech"""
    snr_db: tuple[float, float] = (3.0, 25.0)
    """range of the signal-to-noise ratio of the noisy copy of each recording"""
    level_db: float = 10.0
    """largest error of a live stream's estimate of the level"""
    weight_decay: float = 3e-3
    seconds: float = 600.0
    """of recordings at most, the same for each speaker"""
    speakers: int = 30
    """synthetic ones"""
    sentences: int = 2
    """of each synthetic speaker"""
    folds: int = 5
    """of the cross-validation over speakers, for the figures"""
    seed: int = 0


def rows_by_level(samples: Float32[np.ndarray, "n"]) -> Int[np.ndarray, "s"]:
    """Labels of a clean recording by its loudness: 1 speech, 0 none, -1 unknown.

    Speech is within 60 ms of a row above -20 dB of the speech level. None is farther than 160 ms from any row above
    -32 dB. A recording with room noise thus has no silence, only unknown rows.
    """
    rows = len(samples) // SAMPLES_PER_FEATURE
    rms = np.sqrt((samples[: rows * SAMPLES_PER_FEATURE].reshape(rows, -1).astype(np.float64) ** 2).mean(1))
    level = speech_level(samples)
    labels = np.full(rows, -1)
    labels[_near(rms > 0.1 * level, 3)] = 1
    labels[~_near(rms > 0.025 * level, 8)] = 0
    return labels


def rows_by_phones(phones: tuple[Phone, ...], rows: int) -> Int[np.ndarray, "s"]:
    """Labels of an utterance with known phones: speech from the first to the last, except pauses of 240 ms or more."""
    labels = np.zeros(rows, np.int64)
    for phone in phones:
        labels[int(phone.start_s * 50) : int(np.ceil(phone.end_s * 50))] = 1
    edges = np.flatnonzero(np.diff(np.concatenate([[1], labels, [1]])))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if begin > 0 and end < rows and end - begin < 12:
            labels[begin:end] = 1
    unknown = _near(labels == 1, 6) & (labels == 0)
    labels[unknown] = -1
    return labels


def _near(flags: np.ndarray, rows: int) -> np.ndarray:
    return np.convolve(flags, np.ones(2 * rows + 1), "same") > 0 if len(flags) else flags


def synthetic_speech(speakers: int, sentences_each: int, seed: int = 0) -> list[Labelled]:
    """Voices of espeak-ng, in turn in each language that has sentences, as recorded by a microphone."""
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


@dataclass(frozen=True)
class Rows:
    """Training rows of 20 ms.

    sound      index of the recording; -1 for a sound without speech
    condition  index in CONDITIONS
    """

    features: Float32[Tensor, "r d"]
    labels: Int[Tensor, "r"]
    sound: Int[Tensor, "r"]
    condition: Int[Tensor, "r"]

    def __getitem__(self, chosen: Tensor) -> "Rows":
        return Rows(self.features[chosen], self.labels[chosen], self.sound[chosen], self.condition[chosen])


def fit_voice_activity(
    sounds: list[Labelled],
    encoder: AudioEncoder,
    config: VoiceActivityTraining = VoiceActivityTraining(),
    progress: Callable[[float], None] | None = None,
) -> VoiceActivity:
    """Learn the score from recordings as they are, in noise, over a telephone (every other one), and from negatives.

    Raises TrainingError if no row is speech.
    """
    return fit_rows(encode_rows(sounds, encoder, config, progress), encoder.name, config)


def encode_rows(
    sounds: list[Labelled],
    encoder: AudioEncoder,
    config: VoiceActivityTraining,
    progress: Callable[[float], None] | None = None,
) -> Rows:
    """The training rows of `fit_voice_activity`. Encoding them takes most of the time."""
    rng = np.random.default_rng(config.seed)
    features, labels, origin = [], [], []

    def add(samples: np.ndarray, own: np.ndarray, sound: int, condition: int = 0) -> None:
        level = speech_level(samples) * 10 ** (rng.uniform(-config.level_db, config.level_db) / 20)
        features.append(encoder.encode(samples.astype(np.float32), level)[: len(own)])
        labels.append(own)
        origin.append(np.tile([sound, condition], (len(own), 1)))

    for i, (samples, own) in enumerate(sounds):
        add(samples, own, i)
        add(in_noise(samples, rng.uniform(*config.snr_db), rng, [s for s, _ in sounds]), own, i, 1)
        if i % 2:
            add(over_telephone(samples), own, i, 2)
        if progress:
            progress((i + 1) / (len(sounds) + len(NEGATIVES)))
    for i, kind in enumerate(NEGATIVES):
        for _ in range(round(config.negatives_s / 5)):
            add(negative(kind, 5 * SAMPLE_RATE_HZ, rng), np.zeros(5 * 50, np.int64), -1)
        if progress:
            progress((len(sounds) + i + 1) / (len(sounds) + len(NEGATIVES)))
    return Rows(
        torch.cat(features).float(), *map(torch.from_numpy, (np.concatenate(labels), *np.concatenate(origin).T.copy()))
    )


def fit_rows(rows: Rows, encoder: str, config: VoiceActivityTraining) -> VoiceActivity:
    """Logistic regression on the labelled rows. Raises TrainingError if none is speech."""
    known = rows.labels >= 0
    if not (rows.labels == 1).any():
        raise TrainingError("There is no speech to learn from in these recordings. Give some with speech.")
    return _logistic(rows.features[known], rows.labels[known].float(), config.weight_decay, encoder)


def cross_validate(rows: Rows, speakers: list[str], encoder: str, config: VoiceActivityTraining) -> list[dict]:
    """Errors on each speaker, by a score that was learned without this speaker. Empty for a single speaker.

    speakers  of each recording
    missed    by condition: share of speech rows that are taken for none
    taken     share of rows without speech, as recorded, that are taken for speech; None without such rows
    """
    names, out = list(dict.fromkeys(speakers)), []
    speaker_of_row = torch.tensor([*(names.index(s) for s in speakers), -1])[rows.sound]
    for fold in range(min(config.folds, len(names)) if len(names) > 1 else 0):
        tested = names[fold :: config.folds]
        kept = rows[~torch.isin(speaker_of_row, torch.tensor([names.index(s) for s in tested]))]
        if not (kept.labels == 1).any():
            continue
        score = fit_rows(kept, encoder, config)
        out += [_errors(score, rows[speaker_of_row == names.index(name)], name) for name in tested]
    return sorted(out, key=lambda row: names.index(row["speaker"]))


def _errors(score: VoiceActivity, rows: Rows, speaker: str) -> dict:
    positive = score(rows.features) > 0

    def share(chosen: Tensor, wrong: Tensor) -> float | None:
        return round(float(wrong[chosen].float().mean()), 4) if chosen.any() else None

    speech, clean = rows.labels == 1, rows.condition == 0
    return {
        "speaker": speaker,
        "speech_s": round(float((speech & clean).sum()) / ROWS_PER_S, 1),
        "missed": {name: share(speech & (rows.condition == k), ~positive) for k, name in enumerate(CONDITIONS)},
        "taken": share((rows.labels == 0) & clean, positive),
    }


def other_sounds(score: VoiceActivity, encoder: AudioEncoder, seed: int, seconds: float = 5.0) -> dict[str, float]:
    """For each kind of sound without speech: the share that is taken for speech."""
    rng = np.random.default_rng(seed)
    samples = {kind: negative(kind, round(seconds * SAMPLE_RATE_HZ), rng) for kind in NEGATIVES}
    return {k: round(float((score(encoder.encode(s)) > 0).float().mean()), 4) for k, s in samples.items()}


# ---------------------------------------------------------------------------------------------- step of pre-training


@dataclass(frozen=True)
class Recording:
    """A speaker's clip. Its first `frames` may be learned from."""

    speaker: str
    terms: str
    path: Path
    frames: int


def learn_voice_activity(
    clips: list[Recording],
    cache: Path | str,
    encoder: AudioEncoder,
    config: VoiceActivityTraining = VoiceActivityTraining(),
    synthetic: bool = True,
    progress: bool = True,
) -> tuple[Step, dict]:
    """Make `cache/voice_activity.safetensors`, unless it was made of the same clips, settings and encoder; its figures.

    `synthetic`: learn from voices of espeak-ng too, which must be installed.
    """
    file = Path(cache) / "voice_activity.safetensors"
    made_of = {
        "encoder": encoder_key(encoder),
        "config": asdict(config) | {"snr_db": list(config.snr_db)},
        "clips": [[c.speaker, fingerprint(c.path), c.frames] for c in clips],
        "espeak": metadata.version(espeak.PACKAGE) if synthetic else None,
    }
    _, header = stored_tensors(file, SCHEMA)
    if header.get("made_of") == made_of:
        return Step(kept=1), header["figures"]
    sounds, speakers = _recorded_sounds(clips, config)
    terms = {c.speaker: c.terms for c in clips}
    if synthetic:
        voices = synthetic_speech(config.speakers, config.sentences, config.seed)
        sounds += voices
        speakers += [SYNTHETIC] * len(voices)
        terms[SYNTHETIC] = f"{config.speakers} synthetic voices (espeak-ng), and synthetic noises"
    with progress_bar("Learning voice activity", progress) as report:
        rows = encode_rows(sounds, encoder, config, lambda done: report(round(90 * done), 100))
        score = fit_rows(rows, encoder.name, config)
        figures = {
            "speech_s": round(float(((rows.labels == 1) & (rows.condition == 0)).sum()) / ROWS_PER_S, 1),
            "speakers": cross_validate(rows, speakers, encoder.name, config),
            "other_sounds": other_sounds(score, encoder, config.seed + 1),
        }
        report(100, 100)
    score.save(file, terms, {"made_of": made_of, "figures": figures})
    return Step(made=1), figures


def _recorded_sounds(clips: list[Recording], config: VoiceActivityTraining) -> tuple[list[Labelled], list[str]]:
    """Labelled recordings, the same duration of each speaker at most; the speaker of each."""
    names = dict.fromkeys(c.speaker for c in clips)
    remaining_s = dict.fromkeys(names, config.seconds / max(1, len(names)))
    sounds, speakers = [], []
    for clip in clips:
        frames = round(min(FPS * remaining_s[clip.speaker], clip.frames))
        remaining_s[clip.speaker] -= frames / FPS
        if frames > 0:
            samples = sound_of(clip.path)[: SAMPLES_PER_FRAME * frames]
            sounds.append((samples, rows_by_level(samples)))
            speakers.append(clip.speaker)
    return sounds, speakers


def _logistic(x: Tensor, y: Tensor, decay: float, encoder: str) -> VoiceActivity:
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
    return VoiceActivity(w[:-1] / std, w[-1] - (w[:-1] * mean / std).sum(), encoder)


def in_noise(
    samples: Float32[np.ndarray, "n"],
    snr_db: float,
    rng: np.random.Generator,
    voices: Sequence[np.ndarray] = (),
    kind: str | None = None,
) -> Float32[np.ndarray, "n"]:
    """The sound with noise at a signal-to-noise ratio: one of NEGATIVES or babble of the `voices`; drawn, or `kind`."""
    kinds = [k for k in NEGATIVES if k != "silence"] + ["babble"] * bool(len(voices))
    kind = kind or str(rng.choice(kinds))
    noise = (
        babble(voices, len(samples), rng) if kind == "babble" else negative(kind, len(samples), rng).astype(np.float64)
    )
    return (samples + speech_level(samples) * 10 ** (-snr_db / 20) * noise / max(noise.std(), 1e-9)).astype(np.float32)


def babble(voices: Sequence[np.ndarray], n: int, rng: np.random.Generator) -> np.ndarray:
    """Five voices at once, equally loud, from random places of their recordings."""
    out = np.zeros(n)
    for k in rng.integers(len(voices), size=BABBLE_VOICES):
        begin = int(rng.integers(len(voices[k])))
        out += np.resize(np.roll(voices[k], -begin), n) / speech_level(voices[k])
    return out


def over_telephone(samples: Float32[np.ndarray, "n"]) -> Float32[np.ndarray, "n"]:
    """Band-passed to 300 … 3400 Hz."""
    from scipy.signal import butter, sosfilt

    band = butter(6, [300, 3400], "bandpass", fs=SAMPLE_RATE_HZ, output="sos")
    return np.asarray(sosfilt(band, samples), np.float32)
