"""Learning whether somebody speaks: the score of `speech/voice_activity.py`, from speech as it is, in noise and over a telephone, and from what is no speech.

n samples at 16 kHz, s = n / 320 rows of 20 ms. Labels "s": 1 speech, 0 none, -1 unknown (learned from by nobody). A logistic regression, both
classes weighing the same; seeded, seconds of work once the features are made. `learn_presence` is the step of `hicode pretrain` that makes the
weights that ship; its figures are of speakers left out.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int
from torch import Tensor

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FEATURE
from hicode.errors import TrainingError
from hicode.media.audio import read_audio
from hicode.progress import progress_bar
from hicode.speech.encoder import AudioEncoder
from hicode.speech.loudness import speech_level
from hicode.speech.voice_activity import SCHEMA, VoiceActivity
from research.pretrain import espeak
from research.pretrain.corpus import Step, encoder_key, fingerprint, stored_tensors
from research.pretrain.espeak import Espeak, sentences
from research.pretrain.phones import Phone
from research.pretrain.synthetic import NEGATIVES, Speaker, negative, recorded

Labelled = tuple[Float32[np.ndarray, "n"], Int[np.ndarray, "s"]]
BABBLE_VOICES = 5
CONDITIONS = ("as it is", "in noise", "over a telephone")
SYNTHETIC = "espeak"  # whom the synthetic voices count as


@dataclass(frozen=True)
class PresenceConfig:
    """How the score is learned."""

    negatives_s: float = 25.0  # of each kind of sound that is no speech
    snr_db: tuple[float, float] = (3.0, 25.0)  # of the noise that a copy of every recording is given
    level_db: float = 10.0  # by how much at most a live stream's estimate of the level may be off
    weight_decay: float = 3e-3
    seconds: float = 600.0  # of recordings at most, the same of each speaker
    speakers: int = 30  # synthetic ones
    sentences: int = 2  # that each of them says
    folds: int = 5  # that speakers are left out in for the figures
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


@dataclass(frozen=True)
class Rows:
    """What a score is learned from: whose each row is (-1: a sound that is no speech) and how it sounds (an index of CONDITIONS)."""

    features: Float32[Tensor, "r d"]
    labels: Int[Tensor, "r"]
    sound: Int[Tensor, "r"]
    condition: Int[Tensor, "r"]

    def __getitem__(self, chosen: Tensor) -> "Rows":
        return Rows(self.features[chosen], self.labels[chosen], self.sound[chosen], self.condition[chosen])


def fit_presence(
    sounds: list[Labelled],
    encoder: AudioEncoder,
    config: PresenceConfig = PresenceConfig(),
    progress: Callable[[float], None] | None = None,
) -> VoiceActivity:
    """The score of `encoder`'s features, learned from recordings as they are, a copy of each in noise, of every other one over a telephone, and
    from `training.synthetic`'s negatives. TrainingError where there is no row of speech."""
    return fit_rows(hear(sounds, encoder, config, progress), encoder.name, config)


def hear(
    sounds: list[Labelled],
    encoder: AudioEncoder,
    config: PresenceConfig,
    progress: Callable[[float], None] | None = None,
) -> Rows:
    """The rows that `fit_presence` learns from: what takes the time."""
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


def fit_rows(rows: Rows, encoder: str, config: PresenceConfig) -> VoiceActivity:
    known = rows.labels >= 0
    if not (rows.labels == 1).any():
        raise TrainingError("There is no speech to learn from in these recordings. Give some with speech.")
    return _logistic(rows.features[known], rows.labels[known].float(), config.weight_decay, encoder)


def held_out(rows: Rows, speakers: list[str], encoder: str, config: PresenceConfig) -> list[dict]:
    """How well a score tells speakers that it has not learned from, the recordings' `speakers` in turn: by condition the share of their speech that is
    missed, and the share of the rest, as recorded, that is taken for speech (None without such rows). None of them where there is but one speaker."""
    names, out = list(dict.fromkeys(speakers)), []
    number = torch.tensor([*(names.index(s) for s in speakers), -1])[
        rows.sound
    ]  # of each row's speaker; sounds that are no speech have -1
    for fold in range(min(config.folds, len(names)) if len(names) > 1 else 0):
        left_out = names[fold :: config.folds]
        kept = rows[~torch.isin(number, torch.tensor([names.index(s) for s in left_out]))]
        if not (kept.labels == 1).any():
            continue
        presence = fit_rows(kept, encoder, config)
        for speaker in left_out:
            own = rows[number == names.index(speaker)]
            heard = presence(own.features) > 0
            share = lambda chosen, wrong: round(float(wrong[chosen].float().mean()), 4) if chosen.any() else None
            missed = {
                name: share((own.labels == 1) & (own.condition == k), ~heard) for k, name in enumerate(CONDITIONS)
            }
            seconds = round(float(((own.labels == 1) & (own.condition == 0)).sum()) / 50, 1)
            out.append(
                {
                    "speaker": speaker,
                    "speech_s": seconds,
                    "missed": missed,
                    "taken": share((own.labels == 0) & (own.condition == 0), heard),
                }
            )
    return sorted(out, key=lambda row: names.index(row["speaker"]))


def other_sounds(presence: VoiceActivity, encoder: AudioEncoder, seed: int, seconds: float = 5.0) -> dict[str, float]:
    """The share of each kind of sound that is no speech, drawn from this seed, that is taken for speech."""
    rng = np.random.default_rng(seed)
    scores = {
        kind: presence(encoder.encode(negative(kind, round(seconds * SAMPLE_RATE_HZ), rng))) for kind in NEGATIVES
    }
    return {kind: round(float((s > 0).float().mean()), 4) for kind, s in scores.items()}


# --- a step of pretraining ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recording:
    """A speaker's clip; `frames` of it, from its beginning, may be learned from."""

    speaker: str
    terms: str
    path: Path
    frames: int


def learn_presence(
    clips: list[Recording],
    cache: Path | str,
    encoder: AudioEncoder,
    config: PresenceConfig = PresenceConfig(),
    synthetic: bool = True,
    progress: bool = True,
) -> tuple[Step, dict]:
    """Make `cache/presence.safetensors`, unless it holds what these clips, settings and encoder give; its figures.

    `synthetic`: also from voices of espeak-ng, which must be installed.
    """
    file = Path(cache) / "presence.safetensors"
    made_of = {
        "encoder": encoder_key(encoder),
        "config": asdict(config) | {"snr_db": list(config.snr_db)},
        "clips": [[c.speaker, fingerprint(c.path), c.frames] for c in clips],
        "espeak": metadata.version(espeak.PACKAGE) if synthetic else None,
    }
    _, header = stored_tensors(file, SCHEMA)
    if header.get("made_of") == made_of:
        return Step(kept=1), header["figures"]
    sounds, speakers, left = (
        [],
        [],
        dict.fromkeys((c.speaker for c in clips), config.seconds / max(1, len({c.speaker for c in clips}))),
    )
    for clip in clips:
        wanted = round(min(25 * left[clip.speaker], clip.frames))
        left[clip.speaker] -= wanted / 25
        if wanted > 0:
            samples = read_audio(clip.path)[: 640 * wanted]
            sounds.append((samples, rows_by_level(samples)))
            speakers.append(clip.speaker)
    terms = {c.speaker: c.terms for c in clips}
    if synthetic:
        voices = synthetic_speech(config.speakers, config.sentences, config.seed)
        sounds += voices
        speakers += [SYNTHETIC] * len(voices)
        terms[SYNTHETIC] = f"{config.speakers} synthetic voices (espeak-ng), and synthetic noises"
    with progress_bar("Telling speech from noise", progress) as report:
        rows = hear(sounds, encoder, config, lambda done: report(round(90 * done), 100))
        presence = fit_rows(rows, encoder.name, config)
        figures = {
            "speech_s": round(float(((rows.labels == 1) & (rows.condition == 0)).sum()) / 50, 1),
            "speakers": held_out(rows, speakers, encoder.name, config),
            "other_sounds": other_sounds(presence, encoder, config.seed + 1),
        }
        report(100, 100)
    presence.save(file, terms, {"made_of": made_of, "figures": figures})
    return Step(made=1), figures


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
    voices: list[np.ndarray] = (),
    kind: str | None = None,
) -> Float32[np.ndarray, "n"]:
    """The sound under one of NEGATIVES or, where there are `voices` to make it of, babble (of five): at random, or `kind`."""
    kinds = [k for k in NEGATIVES if k != "silence"] + ["babble"] * bool(len(voices))
    kind = kind or str(rng.choice(kinds))
    noise = (
        babble(voices, len(samples), rng) if kind == "babble" else negative(kind, len(samples), rng).astype(np.float64)
    )
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

    return sosfilt(butter(6, [300, 3400], "bandpass", fs=SAMPLE_RATE_HZ, output="sos"), samples).astype(np.float32)
