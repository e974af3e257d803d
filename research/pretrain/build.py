"""Build a corpus from videos: landmarks, head motion, offsets of the sound, examples.

A clip that cannot be used (no face, no sound, sound and mouth that do not agree) is left out and named.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from hicode.errors import InputError
from hicode.files import load_tensors, read_json, save_tensors, sha256_of, write_json
from hicode.media.audio import level_db, read_audio
from hicode.preparation.clip import shift_audio
from hicode.progress import progress_bar
from hicode.speech.encoders import AudioEncoder, create_encoder, match_frames
from hicode.speech.sync import CHANCE_MARGIN, RELIABLE_MARGIN, SyncModel, SyncResult, estimate_offset
from hicode.tracking.fit import FitConfig, Observations, Person, fit_person, fit_track
from hicode.tracking.head_model import HeadModel
from hicode.training.adaptation import speaking_frames
from research.pretrain.corpus import (
    EXAMPLE,
    SCHEMA,
    VARIANTS,
    VERSION,
    Step,
    Taken,
    Variant,
    encode_variants,
    encoder_key,
    fingerprint,
    header_of,
    stored_tensors,
)
from research.pretrain.sources import LeftOut, Source, Sources
from research.pretrain.sync_fit import fit_sync

POINTS, HEADS, MOTION = "corpus-points", "corpus-head", "corpus-motion"
CANVAS = 512  # px: the longer side of every clip, so that all clips of a speaker share a camera
SILENCE_DB = -60.0


@dataclass(frozen=True)
class BuildConfig:
    """Which clips are used, and how."""

    clips: int = 300
    """clips per speaker at most; the choice is always the same"""
    shortest: int = 25
    """frames of a clip at least"""
    found: float = 0.95
    """share of a clip's frames that must have a face"""
    person_frames: int = 240
    """frames, spread over a speaker's clips, that identity and focal length are fitted to"""
    fit: FitConfig = field(default_factory=FitConfig)
    variants: tuple[Variant, ...] = VARIANTS
    seed: int = 0
    """of the variants' noise"""


@dataclass(frozen=True)
class Points:
    """Landmarks of a clip at 25 fps, in px of images of this size, and the frames with a face."""

    points: Float[Tensor, "t 478 3"]
    found: Bool[Tensor, "t"]
    width: int
    height: int


@dataclass(frozen=True)
class Built:
    """Clips that a build took, what it left out, durations of its steps."""

    taken: tuple[Taken, ...]
    left_out: tuple[LeftOut, ...]
    steps: dict[str, Step]


Tracker = Callable[[Path], Points]


def video_tracker() -> Tracker:
    """Landmarks of videos. Above 25 fps they are tracked at the video's rate and interpolated, so motion is smooth."""
    from hicode.media.video import probe, read_video
    from hicode.tracking.face_tracker import LandmarkConfig, track_faces
    from hicode.tracking.landmarks import FaceLandmarker

    landmarker = FaceLandmarker()

    def points_of(path: Path) -> Points:
        info = probe(path)
        fps = min(info.fps, 30.0) if info.fps > 25.5 else 25.0
        track = track_faces(read_video(path, fps=fps, max_size=CANVAS), landmarker, config=LandmarkConfig(crops=2))
        scale = min(1.0, CANVAS / max(info.width, info.height))
        at = np.arange(int(len(track) * 25 / fps)) * fps / 25
        points = np.stack([np.interp(at, np.arange(len(track)), c) for c in track.points_px.flatten(1).T.numpy()], 1)
        seen = track.found[np.clip(np.round(at).astype(int), 0, len(track) - 1)]
        return Points(
            torch.from_numpy(points).float().unflatten(1, (-1, 3)),
            torch.as_tensor(seen),
            round(info.width * scale),
            round(info.height * scale),
        )

    return points_of


@dataclass(frozen=True)
class BuildParts:
    """Exchangeable parts of a build, and whether progress is shown.

    encoder  None: the embedded one
    sync     the sync model that tells offsets if there is no anchor; None: the shipped one
    tracker  None: `video_tracker()`
    """

    encoder: AudioEncoder | None = None
    sync: SyncModel | None = None
    tracker: Tracker | None = None
    progress: bool = True


def build(
    sources: Sources, cache: Path | str, config: BuildConfig = BuildConfig(), parts: BuildParts = BuildParts()
) -> Built:
    """Make or complete the corpus in `cache`.

    With an anchor, each speaker's offset is estimated by a sync model of the other speakers (`fit_sync`), and
    `cache/sync.safetensors` is a sync model of the speakers that no evaluation clip shows. Without an anchor,
    `parts.sync` estimates the offsets. Raises InputError if fewer than two speakers remain.
    """
    return _Builder(sources, Path(cache), config, parts.encoder or create_encoder(), parts).build()


class _Builder:
    def __init__(self, sources: Sources, cache: Path, config: BuildConfig, encoder: AudioEncoder, parts: "BuildParts"):
        self.sources = [s.at_most(config.clips) for s in sources.speakers]
        self.anchor, self.cache, self.config, self.encoder = sources.anchor, cache, config, encoder
        self.sync, self._tracker, self.visible = parts.sync, parts.tracker, parts.progress
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
                f"There is speech of {len(learners)} usable speaker{'s' * (len(learners) != 1)}, at least two are "
                f"needed.{why}"
            )
        if self.anchor is not None and self.anchor not in learners:
            raise InputError(
                f"Nothing of the anchor {self.anchor} can be used. Name another in the manifest, or none.{why}"
            )

    def _clips(self) -> list[tuple[Source, str, Path]]:
        return [(source, name, path) for source in self.sources for name, path in source.clips.items()]

    def _file(self, kind: str, source: Source, clip: str) -> Path:
        return self.cache / kind / f"{source.speaker}~{clip}.safetensors"

    # --- landmarks

    def _track(self, step: Step) -> None:
        clips = self._clips()
        with progress_bar("Tracking clips", self.visible) as report:
            for number, (source, name, path) in enumerate(clips):
                video, file = fingerprint(path), self._file("points", source, name)
                tensors, config = stored_tensors(file, POINTS)
                if config.get("video") == video:
                    step.kept += 1
                else:
                    tensors, config = self._landmarks(path)
                    save_tensors(file, tensors, POINTS, 1, config | {"video": video})
                    step.made += 1
                if reason := config.get("reason") or self._unfit(source, tensors):
                    self._leave_out(source, name, reason)
                else:
                    self.frames[source.speaker, name] = len(tensors["points"])
                report(number + 1, len(clips))

    def _landmarks(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """Landmarks of a video with sound; or none, and the reason."""
        nothing = {"points": torch.zeros(0, 478, 3), "found": torch.zeros(0, dtype=torch.bool)}
        try:
            samples = read_audio(path)
            if samples is None or level_db(samples) < SILENCE_DB:
                return nothing, {"reason": "no sound" if samples is None else "the sound is silent"}
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
        """Landmarks "t 478 3" on the canvas, and the frames with a face. The image centre is at the centre of the
        canvas.
        """
        tensors, config = load_tensors(self._file("points", source, name), POINTS, 1)
        points, found = tensors["points"].double().numpy(), tensors["found"].numpy()
        scale = CANVAS / max(config["width"], config["height"])
        shift = [CANVAS / 2 - scale * config["width"] / 2, CANVAS / 2 - scale * config["height"] / 2, 0]
        return scale * points + shift, found & np.isfinite(points).all((1, 2))

    # --- head motion

    def _fit(self, step: Step) -> None:
        done, total = 0, sum(len(s.clips) for s in self.sources)
        with progress_bar("Fitting heads", self.visible) as report:
            for source in list(self.sources):
                digests = {name: sha256_of(self._file("points", source, name))[:16] for name in source.clips}
                person, key = self._person(source, digests)
                for name in source.clips:
                    file = self._file("motion", source, name)
                    made_of = {"points": digests[name], "person": key}
                    if header_of(file, MOTION) == made_of:
                        step.kept += 1
                    else:
                        points, found = self._points(source, name)
                        train = range(source.learned_frames(len(points)) or len(points))
                        observed = Observations(points, found, CANVAS, CANVAS)
                        fitted = fit_track(observed, self.head, train, self.config.fit, person)
                        save_tensors(file, fitted.motion.tensors(), MOTION, 1, made_of)
                        step.made += 1
                    done += 1
                    report(done, total)

    def _person(self, source: Source, digests: dict[str, str]) -> tuple[Person, str]:
        """The speaker's identity and focal length, and a key of them.

        Clips that are added later use the same. If a clip that they were fitted to has changed, they are fitted anew:
        canonical landmarks of two identities cannot be compared.
        """
        file = self.cache / "heads" / f"{source.speaker}.safetensors"
        tensors, config = stored_tensors(file, HEADS)
        settings = [asdict(self.config.fit), self.config.person_frames]
        unchanged = all(digests.get(name, digest) == digest for name, digest in config.get("points", {}).items())
        if config and config["settings"] == settings and unchanged:
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

    # --- offsets

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
                s.speaker, c, fingerprint(p), sha256_of(self._file("motion", s, c))[:16], s.learn, s.evaluated,
                s.test_part,
            )
            for s, c, p in self._clips()
        ]  # fmt: skip
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
        features = match_frames(self.encoder.encode(sound_of(path)), len(landmarks))
        return features[: 2 * keep], landmarks[:keep]

    def _pairs(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        out: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        clips = self._clips()
        with progress_bar("Comparing sound and mouth", self.visible) as report:
            for number, (source, name, path) in enumerate(clips):
                out.setdefault(source.speaker, {})[name] = self._pair(source, name, path)
                report(number + 1, len(clips))
        return out

    def _together(self) -> dict[tuple[str, str], SyncResult]:
        """One offset per speaker, from models of the other speakers. Speakers who may not be learned from are only
        tested.
        """
        pairs = {s: tuple(map(torch.cat, zip(*clips.values(), strict=True))) for s, clips in self._pairs().items()}
        learners, found = [s for s in self.sources if s.learn], {}
        while True:  # whoever is not in sync with the others must not be among those who judge them
            _, results = self._fit_sync(pairs, learners)
            results = dict(zip((s.speaker for s in learners), results, strict=True))
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
                features, landmarks = pairs[source.speaker]
                found[source.speaker] = estimate_offset(features, landmarks, judge)
        return {(source.speaker, name): found[source.speaker] for source, name, _ in self._clips()}

    def _fit_sync(self, pairs, speakers: list[Source]) -> tuple[SyncModel, list[SyncResult]]:
        names = [s.speaker for s in speakers]
        assert self.anchor is not None
        return fit_sync([pairs[n] for n in names], self.encoder.name, tuple(names), anchor=names.index(self.anchor))

    def _one_by_one(self) -> dict[tuple[str, str], SyncResult]:
        """Each clip's own offset; where it is too short for one, that of all the speaker's clips together."""
        model, out = self._sync_model(), {}
        for speaker, clips in self._pairs().items():
            features, landmarks = map(torch.cat, zip(*clips.values(), strict=True))
            joined = estimate_offset(features, landmarks, model)
            for name, pair in clips.items():
                own = estimate_offset(*pair, model)
                out[speaker, name] = own if own.reliable or not joined.reliable else joined
        return out

    # --- examples

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
                if header_of(file, EXAMPLE) == config:
                    step.kept += 1
                else:
                    tensors, _ = load_tensors(motion, MOTION, 1)
                    samples = shift_audio(sound_of(path), result.offset_frames, frames)
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


def sound_of(path: Path) -> Float32[np.ndarray, "n"]:
    """The sound of a video that was found to have one."""
    samples = read_audio(path)
    assert samples is not None, path
    return samples


def _disagreement(result: SyncResult) -> str:
    needed = max(RELIABLE_MARGIN, CHANCE_MARGIN / max(result.frames, 1) ** 0.5)
    return (
        f"sound and mouth do not agree (sync margin {result.margin:.2f}, {needed:.2f} is needed at "
        f"{result.frames / 25:.1f} s)"
    )
