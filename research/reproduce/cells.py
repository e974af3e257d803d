"""A cell of a table: one clip, one configuration, one seed; trained, measured, and kept under the hash of all that it
depends on.

    OUT/clips/NAME-HASH.clip            a video, prepared once for all its cells
    OUT/clips/NAME-HASH.speech.safetensors   its speech models: they have no part in what a table varies, so one pair
                                             serves all its cells
    OUT/work/KEY/                       a cell being trained: its run, from whose checkpoint a killed one goes on
    OUT/cells/KEY.json                  a finished cell: figures, configuration, provenance; written last, whole or not
                                        at all
    OUT/cells/KEY.frames/MODE/000000.png    its test frames, lossless, for `--check`

KEY is a hash of the clip's content, the configuration, the seed, the package's sources and the pretrained parts. The
same cell is thus never computed twice, and one whose code has changed always is.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import hicode
from hicode import assets
from hicode.errors import InputError
from hicode.files import read_json, sha256_of, write_json
from hicode.preparation.clip import Clip, write_png
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.provenance import plain, provenance
from hicode.runtime import tune_allocator
from hicode.training.avatar import PARTS, TrainConfig, learn_speech, train
from hicode.training.stages import HeadConfig, Preset

SCHEMA, VERSION = "hicode-cell", 1
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
KEPT_ROWS = ("audio", "tracked")
MAX_KEPT_FRAMES = 60  # test frames kept for a later check, spread evenly: 60 of 512² are some 25 MB a driving mode
CROSS_FRAMES = 100  # of the other clip's sound, from its beginning: four seconds, twice what the sync measure needs
# Sources that no figure can depend on: what people see and type. Whatever else changes makes every cell anew.
SURFACES = {
    "cli.py", "demo.py", "doctor.py", "progress.py", "viewer.py", "server.py",
    "arguments.py", "__main__.py", "evaluation/page.py", "evaluation/show.py",
}  # fmt: skip
# What a re-score may differ by: another machine's convolutions sum in another order.
TOLERANCES = {"psnr": 2e-3, "ssim": 1e-4, "lpips": 1e-3, "lmd_px": 0.02}


@dataclass(frozen=True)
class Source:
    """A member of the set of clips: a video, or a clip that is prepared already."""

    name: str
    path: str
    sha256: str
    prepared: bool

    @staticmethod
    def of(path: Path) -> "Source":
        prepared = path.is_dir()
        return Source(path.stem, str(path.resolve()), _folder_hash(path) if prepared else sha256_of(path), prepared)


def find_sources(place: Path | str) -> list[Source]:
    """The clips of a folder by name: videos and prepared clips directly inside it; or the one that `place` itself is.
    InputError where there is none.
    """
    place = Path(place)
    if not place.exists():
        raise InputError(f"{place} does not exist. Give a folder of videos or prepared clips.")
    is_clip = lambda p: (p / "clip.json").exists() if p.is_dir() else p.suffix.lower() in VIDEO_SUFFIXES
    found = [place] if is_clip(place) else sorted(filter(is_clip, place.iterdir())) if place.is_dir() else []
    if not found:
        raise InputError(
            f"{place} holds no video ({', '.join(VIDEO_SUFFIXES)}) and no prepared clip. Give a folder that does."
        )
    sources = [Source.of(path) for path in found]
    names = [s.name for s in sources]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"{place} holds two clips called {twice[0]}. Rename one: tables name clips by it.")
    return sources


@dataclass(frozen=True)
class Preparation:
    """A clip made ready for all its cells."""

    source: Source
    out: str
    code: str
    threads: int | None = None

    @property
    def key(self) -> str:
        return digest(
            {
                "clip": self.source.sha256,
                "prepare": None if self.source.prepared else plain(PrepareConfig()),
                "code": self.code,
            }
        )

    @property
    def clip(self) -> Path:
        return (
            Path(self.source.path)
            if self.source.prepared
            else Path(self.out) / "clips" / f"{self.source.name}-{self.key[:8]}.clip"
        )

    @property
    def speech(self) -> Path:
        return Path(self.out) / "clips" / f"{self.source.name}-{self.key[:8]}.speech.safetensors"


def run_preparation(wanted: Preparation) -> None:
    """Prepare the clip and adapt the speech models to it, or find both done."""
    _begin(wanted.out, wanted.code, wanted.threads)
    clip = (
        Clip.open(wanted.clip) if wanted.source.prepared else prepare(wanted.source.path, wanted.clip, progress=False)
    )
    if not wanted.speech.exists():
        learn_speech(clip, wanted.speech)


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a row's configuration, on a clip, with a seed.

    row     what the table calls the configuration; not part of the key
    compose whether a compositor is trained; without, the plain composite
    cross   the clip whose sound the avatar is also made to speak; None for none
    syncnet file of SyncNet's weights, for AVConf; None without
    threads cores to use; all where None; not part of the key
    """

    clip: Preparation
    row: str
    preset: Preset
    head: HeadConfig
    seed: int
    compose: bool
    cross: Preparation | None = None
    syncnet: str | None = None
    threads: int | None = None

    @cached_property
    def key(self) -> str:
        return digest(
            {
                "version": VERSION,
                "clip": self.clip.key,
                "preset": self.preset if self.compose else None,  # of it only the compositor's schedule is left
                "head": plain(self.head),
                "seed": self.seed,
                "cross": self.cross and self.cross.key,
                "syncnet": self.syncnet and sha256_of(Path(self.syncnet)),
                "code": self.clip.code,
                "assets": {name: assets.ASSETS[name].package.sha256 for name in PARTS},
            }
        )

    @property
    def file(self) -> Path:
        return Path(self.clip.out) / "cells" / f"{self.key}.json"

    @property
    def frames(self) -> Path:
        return Path(self.clip.out) / "cells" / f"{self.key}.frames"

    @property
    def is_finished(self) -> bool:
        return self.file.exists()

    def read(self) -> dict:
        return read_json(self.file, SCHEMA, VERSION)


def run_cell(cell: Cell) -> None:
    """Train, measure, keep; or find it done. May be stopped at any time and called again."""
    from hicode.evaluation.config import EvaluateConfig
    from hicode.evaluation.report import evaluate

    if cell.is_finished:
        return
    _begin(cell.clip.out, cell.clip.code, cell.threads)
    clip = Clip.open(cell.clip.clip)
    work = Path(cell.clip.out) / "work" / cell.key
    (work / "run").mkdir(parents=True, exist_ok=True)
    if not (work / "run" / "speech.safetensors").exists():
        shutil.copyfile(cell.clip.speech, work / "run" / "speech.tmp")
        os.replace(work / "run" / "speech.tmp", work / "run" / "speech.safetensors")
    head = replace(cell.head, seed=cell.seed)
    refiner = None if cell.compose else False  # the preset's choice
    config = TrainConfig(cell.preset, cell.seed, head, refiner, run=work / "run", progress=False)
    avatar = train(clip, work / "avatar.hicode", config)
    kept, images = _kept(len(clip.test)), {}

    def keep(row: str, i: int, image: np.ndarray) -> None:
        if row in KEPT_ROWS and i in kept:
            images.setdefault(row, {})[i] = image

    report = evaluate(avatar, clip, EvaluateConfig(syncnet=cell.syncnet), keep, progress=False)
    cross = None if cell.cross is None else _speak_for(avatar, Clip.open(cell.cross.clip), cell.cross.source.name)
    _keep(cell.frames, images)
    write_json(
        cell.file,
        {
            "schema": SCHEMA,
            "version": VERSION,
            "key": cell.key,
            "clip": {
                "name": cell.clip.source.name,
                "sha256": cell.clip.source.sha256,
                "folder": os.path.relpath(cell.clip.clip, cell.clip.out),
            },
            "row": cell.row,
            "preset": cell.preset,
            "compose": cell.compose,
            "seed": cell.seed,
            "code": cell.clip.code,
            "report": report,
            "cross": cross,
            "kept_frames": {row: sorted(frames) for row, frames in images.items()},
            "provenance": provenance(
                config=plain(head), seed=cell.seed, assets=(*PARTS, *filter(None, [cell.syncnet]))
            ),
        },
    )
    shutil.rmtree(work, ignore_errors=True)


def _begin(out: str, code: str, threads: int | None) -> None:
    tune_allocator()
    if not Path(out).is_dir():
        raise InputError(
            f"{out} cannot be seen from this machine. Put -o on a folder that all machines of the cluster share."
        )
    if code_version() != code:
        raise InputError(
            "The package's sources here differ from those that the sweep began with. Run the same version everywhere, "
            "and again."
        )
    if threads:
        torch.set_num_threads(threads)


def _kept(count: int) -> set[int]:
    return {int(i) for i in np.linspace(0, count - 1, min(count, MAX_KEPT_FRAMES))}


def _keep(place: Path, frames: dict[str, dict[int, np.ndarray]]) -> None:
    temporary = place.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for mode, images in frames.items():
        (temporary / mode).mkdir(parents=True)
        for i, image in images.items():
            write_png(temporary / mode / f"{i:06d}.png", image)
    shutil.rmtree(place, ignore_errors=True)
    temporary.replace(place)


def _speak_for(avatar, other: Clip, name: str) -> dict | None:
    """The avatar speaking another person's sound, which has no true frames: sync and steadiness only, beside those of
    the other's own video.
    """
    from hicode.evaluation.lips import detect, jitter
    from hicode.session.config import SpeakConfig
    from hicode.session.speak import synthesize
    from hicode.tracking.landmarks import FaceLandmarker

    sound = other.audio()
    if sound is None or avatar.speech is None:
        return None
    count = min(CROSS_FRAMES, len(other))
    features = other.speech_features(avatar.speech.encoder)[: 2 * count]
    landmarker = FaceLandmarker()
    out = {"sound_of": name, "frames": count}
    spoken = (frame.image for frame in synthesize(avatar, sound[: 640 * count], SpeakConfig(region="head")))
    for row, frames, width in (
        ("audio", spoken, avatar.background_plate.shape[1]),
        ("ground_truth", (other.image(t) for t in range(count)), other.width),
    ):
        points = np.stack([detect([frame], landmarker)[0] for frame in frames])
        missed = int(np.isnan(points[:, 0, 0]).sum())
        out[row] = {"jitter_px": jitter(points, width), "missed_faces": missed} | _sync(features, points)
    return plain(out)


def _sync(features, points: np.ndarray) -> dict:
    from hicode.evaluation.rows import MIN_SYNC_FRAMES, without_gaps
    from hicode.speech.sync import estimate_offset, shuffled_control

    filled = without_gaps(points)
    if len(points) < MIN_SYNC_FRAMES or filled is None:
        return {"sync_offset_frames": None, "sync_margin": None, "sync_margin_shuffled": None}
    landmarks = torch.from_numpy(filled)
    found = estimate_offset(features, landmarks)
    return {
        "sync_offset_frames": found.offset_frames if found.margin > 0 else None,
        "sync_margin": found.margin,
        "sync_margin_shuffled": shuffled_control(features, landmarks).margin,
    }


# ------------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Difference:
    """A stored figure that its saved frames do not give."""

    key: str
    figure: str
    stored: float | None
    again: float | None

    def __str__(self) -> str:
        return f"cell {self.key}: {self.figure} is stored as {self.stored}, its frames give {self.again}"


def check_cell(file: Path) -> tuple[int, list[Difference]]:
    """Score a cell's saved frames anew: (how many figures were compared, those that differ by more than TOLERANCES).

    Each kept frame's figures against the stored ones of that frame; where every test frame was kept also the means that
    the tables show. FileFormatError where frames or clip are missing. Cross-identity rows and timings keep no frames
    and are not compared.
    """
    from hicode.evaluation.images import REGIONS, Truth, mean_of_frames
    from hicode.evaluation.lips import detect, lip_distances
    from hicode.tracking.landmarks import FaceLandmarker

    stored = read_json(file, SCHEMA, VERSION)
    out, report = file.parent.parent, stored["report"]
    clip = Clip.open(out / stored["clip"]["folder"])
    landmarker = FaceLandmarker()
    compared, wrong = 0, []

    def compare(figure: str, kind: str, old: float | None, new: float | None) -> None:
        nonlocal compared
        compared += 1
        known = [v is not None and np.isfinite(v) for v in (old, new)]
        if known[0] != known[1] or (all(known) and abs(old - new) > TOLERANCES[kind]):
            wrong.append(Difference(stored["key"], figure, old, new))

    truths: dict[int, tuple[Truth, np.ndarray]] = {}
    for mode, kept in stored["kept_frames"].items():
        scores, distances = [], []
        for i in kept:
            place = file.with_suffix(".frames") / mode / f"{i:06d}.png"
            image = read_png(place, grey=False)
            if i not in truths:
                t = clip.test[i]
                truths[i] = (
                    Truth(clip.image(t), clip.head_mask(t), clip.track.mouth_box(t)),
                    detect([clip.image(t)], landmarker),
                )
            truth, points = truths[i]
            scores.append(truth.compare(image))
            distances.append(float(lip_distances(detect([image], landmarker), points)[0][0]) * 512 / clip.width)
            per_frame = report["per_frame"][mode]
            for name, kind, new in (
                ("psnr_head", "psnr", scores[-1]["head"]["psnr"]),
                ("psnr_mouth", "psnr", scores[-1]["mouth"]["psnr"]),
                ("lpips_frame", "lpips", scores[-1]["frame"]["lpips"]),
                ("lmd_px", "lmd_px", distances[-1]),
            ):
                compare(f"{mode} {name} of test frame {i}", kind, per_frame[name][i], new)
        if len(kept) == len(clip.test):
            for region in REGIONS:
                for kind in ("psnr", "ssim", "lpips"):
                    again = mean_of_frames([s[region][kind] for s in scores])
                    compare(f"{mode} {region} {kind}", kind, report[mode][region][kind], again)
            found = [d for d in distances if np.isfinite(d)]
            compare(f"{mode} lmd_px", "lmd_px", report[mode]["lmd_px"], float(np.mean(found)) if found else None)
    return compared, wrong


# --------------------------------------------------------------------------------------------------------------- hashes


def digest(value) -> str:
    """20 hex digits of JSON-able content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:20]


def code_version() -> str:
    """Hash of the package's sources and shipped weights as they stand on disk, surfaces aside."""
    root = Path(hicode.__file__).parent
    files = [
        p
        for p in sorted(root.rglob("*"))
        if p.suffix in (".py", ".safetensors", ".json") and str(p.relative_to(root).as_posix()) not in SURFACES
    ]
    return digest({str(p.relative_to(root).as_posix()): sha256_of(p) for p in files})


def _folder_hash(path: Path) -> str:
    """Of all that a prepared clip holds but its speech features, which are made on first use from the sound."""
    files = [
        p
        for p in sorted(path.rglob("*"))
        if p.is_file() and not (p.name.startswith("audio.") and p.suffix == ".safetensors")
    ]
    return hashlib.sha256(
        "".join(f"{p.relative_to(path).as_posix()} {sha256_of(p)}\n" for p in files).encode()
    ).hexdigest()
