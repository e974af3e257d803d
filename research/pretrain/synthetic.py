"""A corpus without a camera: synthetic speakers with known phones, and sounds without speech over resting mouths.

t frames at 25 fps, n samples at 16 kHz. A speaker has a voice of espeak-ng, a face drawn from the 3DMM's population and
a style of articulation. They say sentences of one language (`sentences.txt`), at their own speed and pitch, in a quiet
room. The motion of the mouths follows the rules of `visemes.py`, calibrated on real speakers. Real speakers teach how
speech looks; these teach closures, fifteen languages, and silence in noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.errors import InputError
from hicode.motion import IDENTITY_DIM
from hicode.speech.loudness import speech_level
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import SpeechExample, speaking_frames
from research.pretrain.espeak import VARIANTS, Espeak, Utterance, sentences
from research.pretrain.phones import Phone, frame_classes
from research.pretrain.visemes import Style, as_tracked, rest_gap, viseme_expression

# inner lips, middle and sides: what `sync.mouth_measures` calls the opening
UPPER, LOWER = ([13, 82, 312], [14, 87, 317])
NEGATIVES = ("silence", "white", "pink", "hum", "breath", "chords", "drums", "clicks")
# English by the voices that espeak-ng has for it; every other language by its own.
_ACCENTS = {
    "en": ("en-us", "en", "en-gb-x-rp", "en-gb-scotland"),
    "pt": ("pt", "pt-br"),
    "es": ("es", "es-419"),
    "fr": ("fr", "fr-be"),
}


@dataclass(frozen=True)
class CorpusConfig:
    """What is said, and by how many."""

    minutes: float = 15.0  # of speech with its pauses; a few more, since sentences are finished
    speakers: int = 40
    languages: tuple[str, ...] = ()  # none: all that there are sentences of
    english: float = 0.4  # of the speakers, where English is among the languages
    negatives: float = 0.15  # seconds of other sounds per second of speech
    identity_spread: float = (
        0.7  # standard deviations of the population that faces are drawn with: outliers look like nobody
    )
    seed: int = 0


@dataclass(frozen=True)
class SyntheticExample:
    """A recording of a synthetic speaker with its labels.

    example   as of a real speaker. In a negative `speaking` is false: a speaker's template is of speech only
    samples   "n"  the sound
    classes   "t"  lip shape (index in phones.CLASSES) in the middle of each frame; silence in a negative
    phones    with times in this recording; none in a negative
    language  as in sentences.txt; of a negative its kind (one of NEGATIVES)
    """

    example: SpeechExample
    samples: Float32[np.ndarray, "n"]
    classes: Int[Tensor, "t"]
    phones: tuple[Phone, ...]
    language: str

    @property
    def negative(self) -> bool:
        """Whether it is a sound without speech."""
        return self.language in NEGATIVES


@dataclass(frozen=True)
class Speaker:
    """language: of the sentences; voice: of espeak-ng; identity: of the 3DMM; the rest as `Espeak.say` has it."""

    name: str
    language: str
    voice: str
    style: Style
    identity: Float[Tensor, "80"]
    words_per_minute: int
    pitch: int

    @staticmethod
    def sample(name: str, language: str, rng: np.random.Generator, spread: float = 0.7) -> "Speaker":
        """A random speaker. `spread`: standard deviation of the identity's coefficients."""
        accent = str(rng.choice(_ACCENTS.get(language, (language,))))
        return Speaker(
            name,
            language,
            f"{accent}+{rng.choice(VARIANTS)}",
            Style.sample(rng),
            _lips_that_meet(torch.from_numpy(spread * rng.standard_normal(IDENTITY_DIM)).float()),
            int(rng.integers(125, 190)),
            int(rng.integers(25, 75)),
        )

    def rest(self, head: HeadModel) -> Float[Tensor, "478 3"]:
        """Landmarks of the speaker's face at rest."""
        return head.landmarks(head.vertices(self.identity))


def _lips_that_meet(identity: Float[Tensor, "80"]) -> Float[Tensor, "80"]:
    """The nearest identity whose inner lips rest as those of the mean head.

    The population varies each lip by itself, so one may be 4 mm behind the other. Lips of people meet.
    """
    head = HeadModel.load()
    moved = head.landmarks(head.identity_basis)
    apart = (moved[:, UPPER] - moved[:, LOWER]).flatten(1)  # "80 9" by a deviation of each component
    return identity - torch.linalg.pinv(apart.T) @ (apart.T @ identity)


Encode = Callable[[Float32[np.ndarray, "n"], int], Float[Tensor, "v s d"]]


def corpus(
    encode: Encode, config: CorpusConfig = CorpusConfig(), progress: Callable[[float], None] | None = None
) -> list[SyntheticExample]:
    """Examples of speakers who speak, and of negatives with closed mouths. The same seed gives the same corpus.

    `encode(samples, frames)` returns the features "v 2*frames d" of a sound in v variants. Raises InputError if
    espeakng-loader is not installed, or if a language has no sentences.
    """
    texts = sentences()
    languages = config.languages or tuple(texts)
    missing = [l for l in languages if l not in texts]
    if missing:
        raise InputError(f"There are no sentences in {', '.join(missing)}. There are some in {', '.join(texts)}.")
    head, out = HeadModel.load(), []
    budget_s = 60 * config.minutes / config.speakers
    with Espeak() as espeak:
        for k in range(config.speakers):
            rng = np.random.default_rng((config.seed, k))
            language = _language(k, config, languages)
            speaker = Speaker.sample(f"espeak-{k:03d}-{language}", language, rng, config.identity_spread)
            spoken_s, order = 0.0, []
            while spoken_s < budget_s:
                order = order or [*rng.permutation(len(texts[language]))]
                said = espeak.say(texts[language][order.pop()], speaker.voice, speaker.words_per_minute, speaker.pitch)
                out.append(spoken(said, speaker, encode, rng, head))
                spoken_s += len(out[-1].samples) / SAMPLE_RATE_HZ
            silent_s = config.negatives * spoken_s
            for kind in rng.permutation(NEGATIVES)[: max(1, math.ceil(silent_s / 4))] if silent_s else ():
                seconds = min(4.0, silent_s)
                out.append(unspoken(str(kind), seconds, speaker, encode, rng, head))
            if progress:
                progress((k + 1) / config.speakers)
    return out


def _language(k: int, config: CorpusConfig, languages: tuple[str, ...]) -> str:
    """English for its share of the speakers, evenly among them; the others in turn."""
    others = [l for l in languages if l != "en"]
    if "en" not in languages or not others:
        return languages[k % len(languages)]
    english_before, english_now = math.floor(k * config.english), math.floor((k + 1) * config.english)
    return "en" if english_now > english_before else others[(k - english_before) % len(others)]


def recorded(utterance: Utterance, rng: np.random.Generator) -> tuple[Float32[np.ndarray, "n"], tuple[Phone, ...]]:
    """An utterance as recorded by a microphone, and its phones with times in it. A whole number of frames.

    Silence or a breath comes before, silence after, room noise below all, at a random level.
    """
    level = speech_level(utterance.samples)
    before_s, after_s = rng.uniform(0.3, 0.7, 2)
    before = np.zeros(round(before_s * SAMPLE_RATE_HZ), np.float32)
    if rng.random() < 0.4:
        before += (0.12 * level * _breath(len(before), rng)).astype(np.float32)
    samples = np.concatenate([before, utterance.samples, np.zeros(round(after_s * SAMPLE_RATE_HZ), np.float32)])
    samples = np.pad(samples, (0, -len(samples) % SAMPLES_PER_FRAME))
    samples += (level * 10 ** rng.uniform(-3.0, -1.6) * pink_noise(len(samples), rng)).astype(np.float32)
    samples *= np.float32(10 ** rng.uniform(-1.6, -0.9) / level)
    shift = len(before) / SAMPLE_RATE_HZ
    return samples.clip(-1, 1), tuple(Phone(p.start_s + shift, p.end_s + shift, p.ipa) for p in utterance.phones)


def spoken(
    utterance: Utterance, speaker: Speaker, encode: Encode, rng: np.random.Generator, head: HeadModel | None = None
) -> SyntheticExample:
    """An utterance as this speaker's recording."""
    samples, phones = recorded(utterance, rng)
    frames = len(samples) // SAMPLES_PER_FRAME
    example = _example(
        samples,
        phones,
        speaker,
        encode,
        head or HeadModel.load(),
        int(rng.integers(2**31)),
        speaking_frames(samples, frames),
    )
    return SyntheticExample(example, samples, torch.from_numpy(frame_classes(phones, frames)), phones, speaker.language)


def unspoken(
    kind: str, seconds: float, speaker: Speaker, encode: Encode, rng: np.random.Generator, head: HeadModel | None = None
) -> SyntheticExample:
    """A sound that is no speech (one of NEGATIVES), and the speaker's mouth at rest."""
    samples = negative(kind, max(1, round(25 * seconds)) * SAMPLES_PER_FRAME, rng)
    frames = len(samples) // SAMPLES_PER_FRAME
    nothing = torch.zeros(frames, dtype=torch.bool)
    example = _example(samples, (), speaker, encode, head or HeadModel.load(), int(rng.integers(2**31)), nothing)
    return SyntheticExample(example, samples, torch.zeros(frames, dtype=torch.long), (), kind)


def _example(
    samples, phones, speaker: Speaker, encode: Encode, head: HeadModel, seed: int, speaking: Tensor
) -> SpeechExample:
    frames = len(samples) // SAMPLES_PER_FRAME
    rest = speaker.rest(head)
    style = replace(speaker.style, seed=seed)
    expression = as_tracked(viseme_expression(phones, frames, style, rest_gap(rest)))
    landmarks = rest + torch.einsum("te,elc->tlc", expression, head.landmarks(head.expression_basis))
    features = encode(samples, frames)
    assert features.dim() == 3 and features.shape[1] == 2 * frames, (tuple(features.shape), frames)
    return SpeechExample(speaker.name, features, expression, landmarks, speaking)


# -------------------------------------------------------------------------------------------- sounds without speech


def negative(kind: str, n: int, rng: np.random.Generator) -> Float32[np.ndarray, "n"]:
    """n samples of one of NEGATIVES, at a level between a whisper's and loud speech's; no two alike."""
    time = np.arange(n) / SAMPLE_RATE_HZ
    if kind == "silence":
        return (1e-5 * rng.standard_normal(n)).astype(np.float32)
    if kind == "white":
        sound = rng.standard_normal(n)
    elif kind == "pink":
        sound = pink_noise(n, rng)
    elif kind == "hum":
        mains = rng.choice([50.0, 60.0, rng.uniform(80, 200)])
        sound = sum(rng.uniform(0, 1) / k * np.sin(2 * np.pi * (mains * k * time + rng.random())) for k in range(1, 12))
        sound = sound + 0.1 * pink_noise(n, rng)
    elif kind == "breath":
        sound = _breath(n, rng)
    elif kind == "chords":
        sound = _chords(time, rng)
    elif kind == "drums":
        sound = _struck(n, rng, every_s=(0.15, 0.5), decay_s=(0.04, 0.2))
    elif kind == "clicks":
        sound = _struck(n, rng, every_s=(0.05, 0.7), decay_s=(0.002, 0.01))
    else:
        raise AssertionError(kind)
    rms = math.sqrt(float((sound**2).mean()) + 1e-12)
    return (sound * 10 ** rng.uniform(-2.2, -0.9) / rms).clip(-1, 1).astype(np.float32)


def pink_noise(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n"]:
    """Noise whose power falls as 1/f, of unit variance."""
    spectrum = np.fft.rfft(rng.standard_normal(n + n % 2))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    spectrum[0] = 0
    sound = np.fft.irfft(spectrum)[:n]
    return sound / max(float(sound.std()), 1e-9)


def _breath(n: int, rng: np.random.Generator) -> Float[np.ndarray, "n"]:
    """Noise of a wide throat, 300 … 4000 Hz, that swells and fades for a second or so, with rests between."""
    from scipy.signal import butter, sosfilt

    low, high = rng.uniform(250, 600), rng.uniform(2500, 5000)
    sound = sosfilt(butter(2, [low, high], "bandpass", fs=SAMPLE_RATE_HZ, output="sos"), rng.standard_normal(n))
    envelope, at = np.zeros(n), int(rng.uniform(0, 0.2) * SAMPLE_RATE_HZ)
    while at < n:
        length = int(rng.uniform(0.3, 1.2) * SAMPLE_RATE_HZ)
        rise = rng.uniform(0.2, 0.8)
        x = np.linspace(0, 1, length)
        swell = np.where(x < rise, x / rise, (1 - x) / (1 - rise)) ** 1.5
        envelope[at : at + length] = swell[: n - at]
        at += length + int(rng.uniform(0.1, 0.8) * SAMPLE_RATE_HZ)
    sound = sound * envelope
    return sound / max(float(sound.std()), 1e-9)


def _chords(time: Float[np.ndarray, "n"], rng: np.random.Generator) -> Float[np.ndarray, "n"]:
    """Three notes at a time, each with harmonics, struck or bowed, changing every half second or so."""
    sound, at, last = np.zeros(len(time)), 0.0, time[-1] if len(time) else 0.0
    while at <= last:
        length = rng.uniform(0.2, 1.0)
        inside = (time >= at) & (time < at + 1.3 * length)
        t = time[inside] - at
        attack, decay = rng.choice([0.005, 0.15]), rng.uniform(0.3, 2.0)
        envelope = np.minimum(t / attack, 1) * np.exp(-t / decay)
        root = 110 * 2 ** (rng.integers(0, 30) / 12)
        for step in (0, int(rng.choice([3, 4])), 7):
            note = root * 2 ** (step / 12)
            for k in range(1, 9):
                if note * k < 7500:
                    sound[inside] += (
                        envelope * rng.uniform(0.3, 1) / k * np.sin(2 * np.pi * (note * k * t + rng.random()))
                    )
        at += length
    return sound


def _struck(
    n: int, rng: np.random.Generator, every_s: tuple[float, float], decay_s: tuple[float, float]
) -> Float[np.ndarray, "n"]:
    """Bursts of noise over a falling low tone, each dying away."""
    sound, at = np.zeros(n), 0
    while at < n:
        decay = rng.uniform(*decay_s)
        t = np.arange(min(int(6 * decay * SAMPLE_RATE_HZ), n - at)) / SAMPLE_RATE_HZ
        tone, share = rng.uniform(50, 220), rng.uniform(0, 1)
        hit = share * rng.standard_normal(len(t)) + (1 - share) * 2 * np.sin(2 * np.pi * tone * t * (1 - 0.3 * t))
        sound[at : at + len(t)] += rng.uniform(0.3, 1) * hit * np.exp(-t / decay)
        at += int(rng.uniform(*every_s) * SAMPLE_RATE_HZ) + 1
    return sound
