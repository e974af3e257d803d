"""A corpus: what speech models learn from, as files in a folder.

t frames at 25 fps. `research.pretrain.build` makes a corpus from videos, step by step. Each step writes one file per
clip. Each file says what it was made of, and is kept as long as that holds.

    points/SPEAKER~CLIP.safetensors     landmarks in px, or the reason why there are none
    heads/SPEAKER.safetensors           identity and focal length, fitted once to all clips of a speaker
    motion/SPEAKER~CLIP.safetensors     expression and canonical landmarks
    offsets.json, sync.safetensors      offset of each mouth from its sound; the sync model for unseen speakers
    examples/SPEAKER~CLIP.safetensors   features of each variant, expression, landmarks, speaking
    examples/synthetic/                 the same of synthetic speakers, with their phones
    corpus.json                         clips of the last build, and what was left out and why
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hicode.audio import SAMPLES_PER_FEATURE
from hicode.errors import FileFormatError
from hicode.files import load_tensors, read_json, save_tensors, write_json
from hicode.progress import progress_bar
from hicode.speech.encoders import AudioEncoder, create_encoder, match_frames
from hicode.speech.loudness import speech_level
from hicode.training.adaptation import SpeechExample
from research.pretrain import espeak, synthetic
from research.pretrain.phones import Phone
from research.pretrain.synthetic import SyntheticExample

EXAMPLE = "corpus-example"
SCHEMA, VERSION = "hicode-corpus", 1


@dataclass(frozen=True)
class Variant:
    """A change of a sound, for augmentation."""

    level: float = 1.0
    """factor of the loudness"""
    delay_rows: int = 0
    """delay against the encoder's windows, in rows of 20 ms"""
    noise: float = 0.0
    """white noise, as a share of the speech level"""
    pink: float = 0.0
    """pink noise, as a share of the speech level"""


# The last one is speech at 10 dB above room noise. With two of four like it, openings of unseen speakers in quiet lost
# .03 of correlation. With none, noise cost .18.
VARIANTS = (Variant(), Variant(1.4, 1), Variant(0.7, 2, 0.003), Variant(1.0, 3, 0.0, 0.32))


@dataclass
class Step:
    """A step's duration, and how many files it made and kept."""

    seconds: float = 0.0
    made: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Taken:
    """A clip of the corpus. Its first `learned_frames` may be learned from (none if the speaker's terms forbid it)."""

    speaker: str
    clip: str
    terms: str
    frames: int
    learned_frames: int
    evaluated: bool
    offset_frames: float
    margin: float

    @property
    def file(self) -> str:
        """Name of the example's file."""
        return f"{self.speaker}~{self.clip}.safetensors"


def encode_variants(
    encoder: AudioEncoder,
    samples: Float32[np.ndarray, "n"],
    frames: int,
    rng: np.random.Generator,
    variants: tuple[Variant, ...] = VARIANTS,
) -> Float[Tensor, "v 2*frames d"]:
    """Features of each variant of a sound."""
    level, out = speech_level(samples), []
    for variant in variants:
        noise = variant.noise * rng.standard_normal(len(samples))
        if variant.pink:
            noise += variant.pink * synthetic.pink_noise(len(samples), rng)
        noisy = samples + (level * noise).astype(np.float32)
        delayed = np.concatenate([np.zeros(variant.delay_rows * SAMPLES_PER_FEATURE, np.float32), noisy])
        out.append(match_frames(encoder.encode(delayed, level / variant.level)[variant.delay_rows :], frames))
    return torch.stack(out)


# ------------------------------------------------------------------------------------------------ synthetic speakers


def synthesise(
    cache: Path | str,
    config: synthetic.CorpusConfig = synthetic.CorpusConfig(),
    *,
    encoder: AudioEncoder | None = None,
    variants: tuple[Variant, ...] = VARIANTS,
    progress: bool = True,
) -> Step:
    """Make the synthetic speakers' examples in the cache, unless they are there.

    Raises InputError if espeak-ng is not installed.
    """
    encoder, folder, started = encoder or create_encoder(), Path(cache) / "examples" / "synthetic", time.perf_counter()
    key = {
        "config": asdict(config) | {"languages": list(config.languages)},
        "encoder": encoder_key(encoder),
        "variants": [asdict(v) for v in variants],
        "espeak": metadata.version(espeak.PACKAGE) if espeak.installed() else None,
    }
    index = folder / "index.json"
    if index.exists():
        stored = read_json(index)
        if stored["key"] == key:
            return Step(kept=len(stored["files"]))
        index.unlink()
    rng = np.random.default_rng((config.seed, 1))
    with progress_bar("Synthesising speech", progress) as report:
        made = synthetic.corpus(
            lambda samples, frames: encode_variants(encoder, samples, frames, rng, variants).half(),
            config,
            lambda done: report(round(100 * done), 100),
        )
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.safetensors"):
        old.unlink()
    files = []
    for number, item in enumerate(made):
        e = item.example
        tensors = {"features": e.features, "expression": e.expression, "landmarks": e.landmarks, "speaking": e.speaking}
        tensors |= {
            "classes": item.classes,
            "samples": np.round(item.samples * 32767).clip(-32768, 32767).astype(np.int16),
        }
        phones = [[p.start_s, p.end_s, p.ipa] for p in item.phones]
        files.append(f"{number:04d}~{e.speaker}.safetensors")
        save_tensors(
            folder / files[-1], tensors, EXAMPLE, 1, {"speaker": e.speaker, "language": item.language, "phones": phones}
        )
    write_json(index, {"key": key, "files": files})
    return Step(round(time.perf_counter() - started, 1), len(files), 0)


def load_synthetic(cache: Path | str) -> list[SyntheticExample]:
    """The synthetic examples of a corpus, with phones. Empty if there are none. Sound is stored in 16 bits."""
    folder, out = Path(cache) / "examples" / "synthetic", []
    for name in read_json(folder / "index.json")["files"] if (folder / "index.json").exists() else ():
        tensors, config = load_tensors(folder / name, EXAMPLE, 1)
        samples, classes = tensors.pop("samples").numpy().astype(np.float32) / 32767, tensors.pop("classes")
        example = SpeechExample(config["speaker"], **tensors | {"features": tensors["features"].float()})
        out.append(
            SyntheticExample(example, samples, classes, tuple(Phone(*p) for p in config["phones"]), config["language"])
        )
    return out


# ----------------------------------------------------------------------------------------------------------- reading


def load_corpus(cache: Path | str) -> list[Taken]:
    """The clips of the corpus. Raises FileFormatError if no build of it is complete."""
    file = Path(cache) / "corpus.json"
    if not file.exists():
        raise FileFormatError(
            f"{file} does not exist: no corpus was completed there. Make it: hicode pretrain FOLDER --cache {cache}."
        )
    return [Taken(**row) for row in read_json(file, SCHEMA, VERSION)["taken"]]


def load_examples(cache: Path | str) -> dict[str, list[SpeechExample]]:
    """All clips of the last build by speaker, whole. They include parts that must not be learned from."""
    out: dict[str, list[SpeechExample]] = {}
    for taken in load_corpus(cache):
        out.setdefault(taken.speaker, []).append(_example(cache, taken))
    return out


def learnable(cache: Path | str, without: tuple[str, ...] = ()) -> list[SpeechExample]:
    """What may be learned from, without some speakers: no test parts, and nothing that terms forbid."""
    chosen = [t for t in load_corpus(cache) if t.learned_frames and t.speaker not in without]
    return [_example(cache, t)[: t.learned_frames] for t in chosen]


def _example(cache: Path | str, taken: Taken) -> SpeechExample:
    tensors, config = load_tensors(Path(cache) / "examples" / taken.file, EXAMPLE, 1)
    return SpeechExample(config["speaker"], **tensors | {"features": tensors["features"].float()})


# -------------------------------------------------------------------------------------------- what files are made of


def encoder_key(encoder: AudioEncoder) -> list:
    """Name, size, window (rows of past, step, future) and variant."""
    return [encoder.name, encoder.dim, list(encoder.window), encoder.variant]


def fingerprint(path: Path) -> str:
    """A fast hash of a video: of its size, and of its first and last mebibyte."""
    size, part = path.stat().st_size, 1 << 20
    with open(path, "rb") as f:
        digest = hashlib.sha256(f"{size} ".encode() + f.read(part))
        f.seek(max(size - part, 0))
        digest.update(f.read(part))
    return digest.hexdigest()[:16]


def stored_tensors(file: Path, schema: str) -> tuple[dict[str, Tensor], dict]:
    """A file of the corpus. Empty if it does not exist or is damaged, since it can be made anew."""
    try:
        return load_tensors(file, schema, 1)
    except FileFormatError:
        return {}, {}


def header_of(file: Path, schema: str) -> dict:
    """The config of a file of the corpus, without its tensors. Empty if there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as f:
            metadata = f.metadata() or {}
        return json.loads(metadata.get("config", "{}")) if metadata.get("schema") == schema else {}
    except (SafetensorError, OSError, ValueError):
        return {}
