"""From clips of people who speak to what speech models learn from: landmarks, head motion, the sound's offset, features.

t frames at 25 fps. A corpus is a folder; each step writes a file a clip and is left out where its file still holds: every file says what it was
made of, so another window of the encoder makes the examples anew and nothing else, and a video that changed is tracked again.

    points/SPEAKER~CLIP.safetensors     landmarks in px, or why there are none
    heads/SPEAKER.safetensors           identity and camera, fitted once for all of a speaker's clips
    motion/SPEAKER~CLIP.safetensors     expression and canonical landmarks under them
    offsets.json, sync.safetensors      how much later each mouth is than its sound; the sync model that says so of unseen speakers
    examples/SPEAKER~CLIP.safetensors   features in variants, expression, landmarks, speaking
    examples/synthetic/                 the same of synthetic speakers, with their phones
    corpus.json                         what the last build took and left out, and why

A clip that cannot be used (no face, no sound, sound and mouth that do not agree) is left out and named.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from hicode.audio import SAMPLES_PER_FEATURE
from hicode.errors import FileFormatError, InputError
from hicode.files import load_tensors, read_json, save_tensors, sha256_of, write_json
from hicode.media.audio import level_db, read_audio
from hicode.preparation.clip import shift_audio
from hicode.progress import progress_bar
from hicode.speech.encoder import AudioEncoder, create_encoder, match_frames
from hicode.speech.loudness import speech_level
from hicode.speech.sync import CHANCE_MARGIN, RELIABLE_MARGIN, SyncModel, SyncResult, estimate_offset, fit_sync
from hicode.tracking.fit import FitConfig, Person, fit_person, fit_track
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import SpeechExample, speaking_frames
from research.pretrain import espeak, synthetic
from research.pretrain.phones import Phone
from research.pretrain.sources import LeftOut, Source, Sources
from research.pretrain.synthetic import SyntheticExample

POINTS, HEADS, MOTION, EXAMPLE = "corpus-points", "corpus-head", "corpus-motion", "corpus-example"
SCHEMA, VERSION = "hicode-corpus", 1
CANVAS = 512  # px: every clip's longer side, so that a speaker's clips share a camera
SILENCE_DB = -60.0


@dataclass(frozen=True)
class Variant:
    """A sound as it might have been: so many times as loud, so many rows of 20 ms later against the encoder's windows, with white and with pink noise of
    these shares of its level."""

    level: float = 1.0
    delay_rows: int = 0
    noise: float = 0.0
    pink: float = 0.0


# The last is speech at 10 dB over a noisy room. One of four: with two, unseen speakers' openings in quiet lost .03 of correlation; with none, the noise cost .18.
VARIANTS = (Variant(), Variant(1.4, 1), Variant(0.7, 2, 0.003), Variant(1.0, 3, 0.0, 0.32))


@dataclass(frozen=True)
class BuildConfig:
    """What of the sources is used, and how."""

    clips: int = 300  # a speaker at most, drawn always alike
    shortest: int = 25  # frames of a clip
    found: float = 0.95  # share of a clip's frames that must have a face
    person_frames: int = 240  # frames, spread over a speaker's clips, that identity and camera are fitted to
    fit: FitConfig = FitConfig()
    variants: tuple[Variant, ...] = VARIANTS
    seed: int = 0  # of the variants' noise


@dataclass(frozen=True)
class Points:
    """Landmarks of a clip at 25 fps in px of pictures of this size, and where a face was seen."""

    points: Float[Tensor, "t 478 3"]
    found: Bool[Tensor, "t"]
    width: int
    height: int


@dataclass
class Step:
    """How long a step took, how many clips it made and how many it found made."""

    seconds: float = 0.0
    made: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Taken:
    """A clip of the corpus. frames: learned_frames of them may be learned from (none of a speaker whose terms say so)."""

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
        return f"{self.speaker}~{self.clip}.safetensors"


@dataclass(frozen=True)
class Built:
    """What a build took, what it left out, and how long its steps took."""

    taken: tuple[Taken, ...]
    left_out: tuple[LeftOut, ...]
    steps: dict[str, Step]


Tracker = Callable[[Path], Points]


def video_tracker() -> Tracker:
    """Landmarks of videos. Faster ones are tracked at their own rate and interpolated, so that motion stays even."""
    from hicode.media.video import probe, read_video
    from hicode.tracking.landmarks import FaceLandmarker, TrackConfig, track_faces

    landmarker = FaceLandmarker()

    def track(path: Path) -> Points:
        info = probe(path)
        fps = min(info.fps, 30.0) if info.fps > 25.5 else 25.0
        found = track_faces(read_video(path, fps=fps, max_size=CANVAS), landmarker, config=TrackConfig(crops=2))
        scale = min(1.0, CANVAS / max(info.width, info.height))
        at = np.arange(int(len(found) * 25 / fps)) * fps / 25
        points = np.stack([np.interp(at, np.arange(len(found)), c) for c in found.points_px.flatten(1).T.numpy()], 1)
        seen = found.found[np.clip(np.round(at).astype(int), 0, len(found) - 1)]
        return Points(
            torch.from_numpy(points).float().unflatten(1, (-1, 3)),
            torch.as_tensor(seen),
            round(info.width * scale),
            round(info.height * scale),
        )

    return track


def build(
    sources: Sources,
    cache: Path | str,
    config: BuildConfig = BuildConfig(),
    *,
    encoder: AudioEncoder | None = None,
    sync: SyncModel | None = None,
    tracker: Tracker | None = None,
    progress: bool = True,
) -> Built:
    """Make or complete the corpus in `cache`. The defaults are the embedded encoder, the shipped sync model and `video_tracker`.

    With an anchor, offsets are found together from these speakers (`fit_sync`), each judged by the others, and `cache/sync.safetensors` becomes a
    sync model of those that no evaluation clip shows; without one, `sync` says them. InputError where fewer than two speakers remain.
    """
    return _Builder(sources, Path(cache), config, encoder or create_encoder(), sync, tracker, progress).build()


class _Builder:
    def __init__(
        self, sources: Sources, cache: Path, config: BuildConfig, encoder: AudioEncoder, sync, tracker, visible: bool
    ):
        self.sources = [s.at_most(config.clips) for s in sources.speakers]
        self.anchor, self.cache, self.config, self.encoder, self.visible = (
            sources.anchor,
            cache,
            config,
            encoder,
            visible,
        )
        self.sync, self._tracker = sync, tracker
        self.left_out = list(sources.missing)
        self.steps: dict[str, Step] = {}
        self.frames: dict[tuple[str, str], int] = {}

    @cached_property
    def head(self) -> HeadModel:
        return HeadModel.load()

    def build(self) -> Built:
        for folder in ("points", "heads", "motion", "examples"):
            (self.cache / folder).mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        for name, step in (
            ("track", self._track),
            ("fit", self._fit),
            ("offsets", self._offsets),
            ("examples", self._examples),
        ):
            self.steps[name] = Step()
            step(self.steps[name])
            self.steps[name].seconds, started = round(time.perf_counter() - started, 1), time.perf_counter()
            self._require_two_speakers()
        built = Built(tuple(self.taken), tuple(self.left_out), self.steps)
        write_json(
            self.cache / "corpus.json",
            {
                "schema": SCHEMA,
                "version": VERSION,
                "encoder": encoder_key(self.encoder),
                "taken": [asdict(t) for t in built.taken],
                "left_out": [asdict(left) for left in built.left_out],
            },
        )
        return built

    def _leave_out(self, source: Source, clip: str, reason: str) -> None:
        """All of a speaker's clips where `clip` is empty."""
        self.left_out.append(LeftOut(source.speaker, clip, reason))
        # Of what is left by now: `source` may be from before others of its clips went.
        self.sources = [
            replace(s, clips={k: v for k, v in s.clips.items() if clip and k != clip})
            if s.speaker == source.speaker
            else s
            for s in self.sources
        ]
        self.sources = [s for s in self.sources if s.clips]

    def _require_two_speakers(self) -> None:
        learners = [s.speaker for s in self.sources if s.learn]
        why = (
            f" Left out: {'; '.join(map(str, self.left_out[:4]))}{'; ...' if len(self.left_out) > 4 else ''}."
            if self.left_out
            else ""
        )
        if len(learners) < 2:
            raise InputError(
                f"There is speech of {len(learners)} usable speaker{'s' * (len(learners) != 1)}, at least two are needed.{why}"
            )
        if self.anchor is not None and self.anchor not in learners:
            raise InputError(
                f"Nothing of the anchor {self.anchor} can be used. Name another in the manifest, or none.{why}"
            )

    def _clips(self) -> list[tuple[Source, str, Path]]:
        return [(source, name, path) for source in self.sources for name, path in source.clips.items()]

    def _file(self, kind: str, source: Source, clip: str) -> Path:
        return self.cache / kind / f"{source.speaker}~{clip}.safetensors"

    # --- landmarks -----------------------------------------------------------------------------------------------------------------------

    def _track(self, step: Step) -> None:
        clips = self._clips()
        with progress_bar("Tracking clips", self.visible) as report:
            for number, (source, name, path) in enumerate(clips):
                video, file = fingerprint(path), self._file("points", source, name)
                tensors, config = stored_tensors(file, POINTS)
                if config.get("video") == video:
                    step.kept += 1
                else:
                    tensors, config = self._look(path)
                    save_tensors(file, tensors, POINTS, 1, config | {"video": video})
                    step.made += 1
                if reason := config.get("reason") or self._unfit(source, tensors):
                    self._leave_out(source, name, reason)
                else:
                    self.frames[source.speaker, name] = len(tensors["points"])
                report(number + 1, len(clips))

    def _look(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """Landmarks of a video with sound, or nothing and the reason. Tracks of the tool that this command replaced are taken over."""
        nothing = {"points": torch.zeros(0, 478, 3), "found": torch.zeros(0, dtype=torch.bool)}
        try:
            samples = read_audio(path)
            if samples is None or level_db(samples) < SILENCE_DB:
                return nothing, {"reason": "no sound" if samples is None else "the sound is silent"}
            tensors, config = stored_tensors(self.cache / "points" / f"{path.stem}.safetensors", POINTS)
            if tensors and "video" not in config:
                return tensors, config
            self._tracker = self._tracker or video_tracker()
            found = self._tracker(path)
        except InputError as error:
            return nothing, {"reason": str(error)}
        return {"points": found.points, "found": found.found}, {"width": found.width, "height": found.height}

    def _unfit(self, source: Source, tensors: dict[str, Tensor]) -> str | None:
        if source.learn and len(tensors["found"]) > 0 and not source.learned_frames(len(tensors["found"])):
            return f"all of its {len(tensors['found'])} frames are kept for tests"
        frames, share = len(tensors["found"]), float(tensors["found"].float().mean()) if len(tensors["found"]) else 0.0
        if frames < self.config.shortest:
            return f"{frames} frames are too few, {self.config.shortest} are needed"
        return None if share > self.config.found else f"a face in only {100 * share:.0f} % of its frames"

    def _points(self, source: Source, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Landmarks "t 478 3" on the canvas, and where there is a face. The picture's centre, and so the camera's axis, is the canvas's."""
        tensors, config = load_tensors(self._file("points", source, name), POINTS, 1)
        points, found = tensors["points"].double().numpy(), tensors["found"].numpy()
        scale = CANVAS / max(config["width"], config["height"])
        shift = [CANVAS / 2 - scale * config["width"] / 2, CANVAS / 2 - scale * config["height"] / 2, 0]
        return scale * points + shift, found & np.isfinite(points).all((1, 2))

    # --- head motion ---------------------------------------------------------------------------------------------------------------------

    def _fit(self, step: Step) -> None:
        done, total = 0, sum(len(s.clips) for s in self.sources)
        with progress_bar("Fitting heads", self.visible) as report:
            for source in list(self.sources):
                digests = {name: sha256_of(self._file("points", source, name))[:16] for name in source.clips}
                person, key = self._person(source, digests)
                for name in source.clips:
                    file = self._file("motion", source, name)
                    made_of = {"points": digests[name], "person": key}
                    if _header(file, MOTION) == made_of:
                        step.kept += 1
                    else:
                        points, found = self._points(source, name)
                        train = range(source.learned_frames(len(points)) or len(points))
                        fitted = fit_track(
                            points, found, CANVAS, CANVAS, self.head, train, config=self.config.fit, person=person
                        )
                        save_tensors(file, fitted.motion.tensors(), MOTION, 1, made_of)
                        step.made += 1
                    done += 1
                    report(done, total)

    def _person(self, source: Source, digests: dict[str, str]) -> tuple[Person, str]:
        """The speaker's identity and camera, and what tells them from others. Clips that come later are fitted with the same; only where one that
        they were fitted to has changed are they found anew, since canonical landmarks of two identities cannot be compared."""
        file = self.cache / "heads" / f"{source.speaker}.safetensors"
        tensors, config = stored_tensors(file, HEADS)
        fitted_to, settings = config.get("points", {}), [asdict(self.config.fit), self.config.person_frames]
        if (
            config
            and config.get("settings") == settings
            and all(digests.get(name, digest) == digest for name, digest in fitted_to.items())
        ):
            return Person(tensors["identity"].numpy(), config["focal_px"]), sha256_of(file)[:16]
        frames = []
        for name in source.clips:
            points, found = self._points(source, name)
            used = points[: source.learned_frames(len(points)) or len(points)]
            frames.append(used[found[: len(used)]])
        frames = np.concatenate(frames)
        chosen = np.unique(
            np.linspace(0, len(frames) - 1, min(self.config.person_frames, len(frames))).round().astype(int)
        )
        person = fit_person(frames[chosen], CANVAS, CANVAS, self.head, self.config.fit)
        save_tensors(
            file,
            {"identity": person.identity},
            HEADS,
            1,
            {"points": digests, "focal_px": person.focal_px, "settings": settings},
        )
        return person, sha256_of(file)[:16]

    # --- offsets -------------------------------------------------------------------------------------------------------------------------

    def _offsets(self, step: Step) -> None:
        """self.offsets[speaker, clip]; clips whose offset cannot be believed are left out."""
        file, key = self.cache / "offsets.json", self._offsets_key()
        stored = read_json(file) if file.exists() else {}
        if stored.get("key") == key and (self.anchor is None or (self.cache / "sync.safetensors").exists()):
            results = {(s, c): SyncResult(**result) for s, c, result in stored["results"]}
            step.kept = len(results)
        else:
            results = self._together() if self.anchor is not None else self._one_by_one()
            step.made = len(results)
            write_json(file, {"key": key, "results": [[s, c, asdict(r)] for (s, c), r in results.items()]})
        self.offsets = results
        for source in list(self.sources):
            bad = {
                name: results[source.speaker, name]
                for name in source.clips
                if not self._believed(source, results[source.speaker, name])
            }
            if len(bad) == len(source.clips) and (self.anchor is not None or len(bad) == 1):
                self._leave_out(source, "", _disagreement(next(iter(bad.values()))))
                continue
            for name, result in bad.items():
                self._leave_out(source, name, _disagreement(result))

    def _believed(self, source: Source, result: SyncResult) -> bool:
        return result.reliable or source.speaker == self.anchor

    def _offsets_key(self) -> str:
        clips = [
            (
                s.speaker,
                c,
                fingerprint(p),
                sha256_of(self._file("motion", s, c))[:16],
                s.learn,
                s.evaluated,
                s.test_part,
            )
            for s, c, p in self._clips()
        ]
        model = None if self.anchor is not None else self._sync_model().learned_from
        return hashlib.sha256(json.dumps([encoder_key(self.encoder), self.anchor, model, clips]).encode()).hexdigest()

    def _sync_model(self) -> SyncModel:
        model = self.sync or SyncModel.load()
        if model.encoder != self.encoder.name:
            raise InputError(
                f"The sync model hears by {model.encoder}, not {self.encoder.name}. Name an anchor in a manifest."
            )
        return model

    def _pair(self, source: Source, name: str, path: Path) -> tuple[Tensor, Tensor]:
        """Features and landmarks of what may be looked at."""
        landmarks = load_tensors(self._file("motion", source, name), MOTION, 1)[0]["landmarks"]
        keep = source.learned_frames(len(landmarks)) or len(landmarks)
        return match_frames(self.encoder.encode(read_audio(path)), len(landmarks))[: 2 * keep], landmarks[:keep]

    def _pairs(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        out: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        clips = self._clips()
        with progress_bar("Comparing sound and mouth", self.visible) as report:
            for number, (source, name, path) in enumerate(clips):
                out.setdefault(source.speaker, {})[name] = self._pair(source, name, path)
                report(number + 1, len(clips))
        return out

    def _together(self) -> dict[tuple[str, str], SyncResult]:
        """One offset a speaker, from models of the other speakers; those who may not be learned from are only judged."""
        pairs = {s: tuple(map(torch.cat, zip(*clips.values()))) for s, clips in self._pairs().items()}
        learners, found = [s for s in self.sources if s.learn], {}
        while True:  # whoever is not in sync with the others must not be among those who judge them
            _, results = self._fit_sync(pairs, learners)
            results = dict(zip((s.speaker for s in learners), results))
            bad = [s for s in learners if not self._believed(s, results[s.speaker])]
            found |= results
            learners = [s for s in learners if s not in bad]
            if not bad or len(learners) < 2:
                break
        found[self.anchor] = replace(found[self.anchor], offset_frames=0.0)
        judges = [s for s in learners if not s.evaluated or s.speaker == self.anchor]
        judge, _ = self._fit_sync(pairs, judges if len(judges) > 1 else learners)
        judge.save(self.cache / "sync.safetensors")
        for source in self.sources:
            if not source.learn:
                found[source.speaker] = estimate_offset(*pairs[source.speaker], judge)
        return {(source.speaker, name): found[source.speaker] for source, name, _ in self._clips()}

    def _fit_sync(self, pairs, speakers: list[Source]) -> tuple[SyncModel, list[SyncResult]]:
        names = [s.speaker for s in speakers]
        return fit_sync([pairs[n] for n in names], self.encoder.name, tuple(names), anchor=names.index(self.anchor))

    def _one_by_one(self) -> dict[tuple[str, str], SyncResult]:
        """Each clip's own offset; where it is too short for one, that of all the speaker's clips together."""
        model, out = self._sync_model(), {}
        for speaker, clips in self._pairs().items():
            joined = estimate_offset(*map(torch.cat, zip(*clips.values())), model)
            for name, pair in clips.items():
                own = estimate_offset(*pair, model)
                out[speaker, name] = own if own.reliable or not joined.reliable else joined
        return out

    # --- examples ------------------------------------------------------------------------------------------------------------------------

    def _examples(self, step: Step) -> None:
        self.taken, clips = [], self._clips()
        with progress_bar("Making examples", self.visible) as report:
            for number, (source, name, path) in enumerate(clips):
                result, frames = self.offsets[source.speaker, name], self.frames[source.speaker, name]
                file, motion = self._file("examples", source, name), self._file("motion", source, name)
                config = {
                    "speaker": source.speaker,
                    "offset_frames": result.offset_frames,
                    "made_of": {
                        "encoder": encoder_key(self.encoder),
                        "variants": [asdict(v) for v in self.config.variants],
                        "seed": self.config.seed,
                        "video": fingerprint(path),
                        "motion": sha256_of(motion)[:16],
                    },
                }
                if _header(file, EXAMPLE) == config:
                    step.kept += 1
                else:
                    tensors, _ = load_tensors(motion, MOTION, 1)
                    samples = shift_audio(read_audio(path), result.offset_frames, frames)
                    rng = np.random.default_rng((self.config.seed, zlib.crc32(file.name.encode())))
                    features = encode_variants(self.encoder, samples, frames, rng, self.config.variants)
                    own = {
                        "features": features.half(),
                        "expression": tensors["expression"],
                        "landmarks": tensors["landmarks"],
                    }
                    save_tensors(file, own | {"speaking": speaking_frames(samples, frames)}, EXAMPLE, 1, config)
                    step.made += 1
                learned = source.learned_frames(frames) if source.learn else 0
                self.taken.append(
                    Taken(
                        source.speaker,
                        name,
                        source.terms,
                        frames,
                        learned,
                        source.evaluated,
                        result.offset_frames,
                        result.margin,
                    )
                )
                report(number + 1, len(clips))


def encode_variants(
    encoder: AudioEncoder,
    samples: Float32[np.ndarray, "n"],
    frames: int,
    rng: np.random.Generator,
    variants: tuple[Variant, ...] = VARIANTS,
) -> Float[Tensor, "v 2*frames d"]:
    """Features of a sound as it is, and as it might have been."""
    level, out = speech_level(samples), []
    for variant in variants:
        noise = variant.noise * rng.standard_normal(len(samples))
        if variant.pink:
            noise += variant.pink * synthetic.pink_noise(len(samples), rng)
        noisy = samples + (level * noise).astype(np.float32)
        delayed = np.concatenate([np.zeros(variant.delay_rows * SAMPLES_PER_FEATURE, np.float32), noisy])
        out.append(match_frames(encoder.encode(delayed, level / variant.level)[variant.delay_rows :], frames))
    return torch.stack(out)


# --- synthetic speakers ------------------------------------------------------------------------------------------------------------------


def synthesise(
    cache: Path | str,
    config: synthetic.CorpusConfig = synthetic.CorpusConfig(),
    *,
    encoder: AudioEncoder | None = None,
    variants: tuple[Variant, ...] = VARIANTS,
    progress: bool = True,
) -> Step:
    """Make `training.synthetic`'s corpus in the cache, unless it is there. InputError where espeak-ng is not installed."""
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
    """The synthetic examples of a corpus, with phones; none where it has none. Sound is kept in 16 bits."""
    folder, out = Path(cache) / "examples" / "synthetic", []
    for name in read_json(folder / "index.json")["files"] if (folder / "index.json").exists() else ():
        tensors, config = load_tensors(folder / name, EXAMPLE, 1)
        samples, classes = tensors.pop("samples").numpy().astype(np.float32) / 32767, tensors.pop("classes")
        example = SpeechExample(config["speaker"], **tensors | {"features": tensors["features"].float()})
        out.append(
            SyntheticExample(example, samples, classes, tuple(Phone(*p) for p in config["phones"]), config["language"])
        )
    return out


# --- what is read of a corpus ------------------------------------------------------------------------------------------------------------


def load_corpus(cache: Path | str) -> list[Taken]:
    """What the corpus holds. FileFormatError where no build of it is complete."""
    file = Path(cache) / "corpus.json"
    if not file.exists():
        raise FileFormatError(
            f"{file} does not exist: no corpus was completed there. Make it: hicode pretrain FOLDER --cache {cache}."
        )
    return [Taken(**row) for row in read_json(file, SCHEMA, VERSION)["taken"]]


def load_examples(cache: Path | str) -> dict[str, list[SpeechExample]]:
    """All clips of the last build by speaker, whole: also those, and those parts, that must not be learned from."""
    out: dict[str, list[SpeechExample]] = {}
    for taken in load_corpus(cache):
        out.setdefault(taken.speaker, []).append(_example(cache, taken))
    return out


def learnable(cache: Path | str, without: tuple[str, ...] = ()) -> list[SpeechExample]:
    """What may be learned from, without the speakers named: training parts only of clips with a test part, and nothing that terms forbid."""
    chosen = [t for t in load_corpus(cache) if t.learned_frames and t.speaker not in without]
    return [_example(cache, t)[: t.learned_frames] for t in chosen]


def _example(cache: Path | str, taken: Taken) -> SpeechExample:
    tensors, config = load_tensors(Path(cache) / "examples" / taken.file, EXAMPLE, 1)
    return SpeechExample(config["speaker"], **tensors | {"features": tensors["features"].float()})


# --- what files were made of -------------------------------------------------------------------------------------------------------------


def encoder_key(encoder: AudioEncoder) -> list:
    """Name, size, the window (rows of past, read at once, of future), and what else made it."""
    return [encoder.name, encoder.dim, list(encoder.window), encoder.variant]


def _disagreement(result: SyncResult) -> str:
    needed = max(RELIABLE_MARGIN, CHANCE_MARGIN / max(result.frames, 1) ** 0.5)
    return f"sound and mouth do not agree (sync margin {result.margin:.2f}, {needed:.2f} is needed at {result.frames / 25:.1f} s)"


def fingerprint(path: Path) -> str:
    """Of a video, cheaply: its size and the first and last mebibyte."""
    size, part = path.stat().st_size, 1 << 20
    with open(path, "rb") as f:
        digest = hashlib.sha256(f"{size} ".encode() + f.read(part))
        f.seek(max(size - part, 0))
        digest.update(f.read(part))
    return digest.hexdigest()[:16]


def stored_tensors(file: Path, schema: str) -> tuple[dict[str, Tensor], dict]:
    """A file of the corpus; nothing where it is not there or damaged, since it can be made anew."""
    try:
        return load_tensors(file, schema, 1)
    except FileFormatError:
        return {}, {}


def _header(file: Path, schema: str) -> dict:
    """Its config alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as f:
            found = f.metadata() or {}
        return json.loads(found.get("config", "{}")) if found.get("schema") == schema else {}
    except (SafetensorError, OSError, ValueError):
        return {}
