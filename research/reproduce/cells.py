"""A cell of a table: one clip, one configuration, one seed. It is trained, measured, and kept under a hash.

    OUT/clips/NAME-HASH.clip                a video, prepared once for all its cells
    OUT/clips/NAME-HASH.speech.safetensors  its speech models: a table does not vary them, so all its cells share them
    OUT/work/KEY/                           a cell in training; its checkpoint continues a stopped run
    OUT/cells/KEY.json                      a finished cell: figures, configuration, provenance; written last
    OUT/cells/KEY.frames/ROW/000000.png     its test frames, lossless, for `--check`

KEY is a hash of the clip's content, the configuration, the seed, the package's sources and the pretrained parts. So no
cell is computed twice, and a change of the code makes cells anew.
"""

import os
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hicode import assets
from hicode.audio import SAMPLES_PER_FRAME
from hicode.errors import InputError
from hicode.files import read_json, sha256_of, write_json
from hicode.preparation.clip import Clip, write_png
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.provenance import plain, provenance
from hicode.training.avatar import PARTS, TrainConfig, learn_speech, train
from hicode.training.stages import HeadConfig, Preset
from research.reproduce.sources import Source, code_version, digest

if TYPE_CHECKING:
    from hicode.avatar.avatar import Avatar

SCHEMA, VERSION = "hicode-cell", 2
KEPT_ROWS = ("audio", "tracked")
MAX_KEPT_FRAMES = 60  # test frames kept for a check, evenly spread: 60 of 512² are about 25 MB per row
CROSS_FRAMES = 100  # of the other clip's sound: four seconds, twice what the sync measure needs


@dataclass(frozen=True)
class Preparation:
    """A clip made ready for all its cells. `threads`: cores to use; all if None."""

    source: Source
    out: str
    code: str
    threads: int | None = None

    @property
    def key(self) -> str:
        """Hash of what the prepared clip depends on."""
        config = None if self.source.prepared else plain(PrepareConfig())
        return digest({"clip": self.source.sha256, "prepare": config, "code": self.code})

    @property
    def clip(self) -> Path:
        """Folder of the prepared clip."""
        return Path(self.source.path) if self.source.prepared else self._file("clip")

    @property
    def speech(self) -> Path:
        """File of the speech models."""
        return self._file("speech.safetensors")

    def _file(self, suffix: str) -> Path:
        return Path(self.out) / "clips" / f"{self.source.name}-{self.key[:8]}.{suffix}"


def run_preparation(preparation: Preparation) -> None:
    """Prepare the clip and adapt the speech models to it. What is done already stays."""
    _begin(preparation)
    source = preparation.source
    clip = Clip.open(preparation.clip) if source.prepared else prepare(source.path, preparation.clip, progress=False)
    if not preparation.speech.exists():
        learn_speech(clip, preparation.speech)


@dataclass(frozen=True)
class Cell:
    """One figure of a table: a row's configuration, on a clip, with a seed.

    row      the table's name of the configuration; not part of the key
    compose  train a refiner; otherwise the plain composite is used
    cross    another clip, whose sound the avatar also speaks
    syncnet  file of SyncNet's weights, for AVConf
    threads  cores to use, all if None; not part of the key
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
        """Hash of what the figures depend on."""
        return digest(
            {
                "version": VERSION,
                "clip": self.clip.key,
                "preset": self.preset if self.compose else None,  # only the refiner's schedule depends on it
                "head": plain(self.head),
                "seed": self.seed,
                "cross": self.cross and self.cross.key,
                "syncnet": self.syncnet and sha256_of(self.syncnet),
                "code": self.clip.code,
                "assets": {name: assets.ASSETS[name].package.sha256 for name in PARTS},
            }
        )

    @property
    def file(self) -> Path:
        """Its JSON file."""
        return Path(self.clip.out) / "cells" / f"{self.key}.json"

    @property
    def frames(self) -> Path:
        """Folder of its kept frames."""
        return self.file.with_suffix(".frames")

    @property
    def is_finished(self) -> bool:
        """Whether it was measured."""
        return self.file.exists()

    def read(self) -> dict:
        """The content of its file."""
        return read_json(self.file, SCHEMA, VERSION)


def run_cell(cell: Cell) -> None:
    """Train, measure and keep a cell, unless it is finished. It may be stopped at any time and called again."""
    from hicode.evaluation.config import EvaluateConfig
    from hicode.evaluation.report import evaluate

    if cell.is_finished:
        return
    _begin(cell.clip)
    clip = Clip.open(cell.clip.clip)
    work = Path(cell.clip.out) / "work" / cell.key
    avatar = _train(cell, clip, work)
    kept = {int(i) for i in np.linspace(0, len(clip.test) - 1, min(len(clip.test), MAX_KEPT_FRAMES))}
    images: dict[str, dict[int, np.ndarray]] = {}

    def keep(row: str, i: int, image: np.ndarray) -> None:
        if row in KEPT_ROWS and i in kept:
            images.setdefault(row, {})[i] = image

    report = evaluate(avatar, clip, EvaluateConfig(syncnet=cell.syncnet), keep, progress=False)
    cross = None if cell.cross is None else speak_other(avatar, Clip.open(cell.cross.clip), cell.cross.source.name)
    _write_frames(cell.frames, images)
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
                config=plain(replace(cell.head, seed=cell.seed)),
                seed=cell.seed,
                assets=(*PARTS, *filter(None, [cell.syncnet])),
            ),
        },
    )
    shutil.rmtree(work, ignore_errors=True)


def _train(cell: Cell, clip: Clip, work: Path) -> "Avatar":
    run = work / "run"
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "speech.safetensors").exists():
        shutil.copyfile(cell.clip.speech, run / "speech.tmp")
        os.replace(run / "speech.tmp", run / "speech.safetensors")
    config = TrainConfig(
        cell.preset, head=cell.head, run=run, seed=cell.seed, refiner=None if cell.compose else False, progress=False
    )
    return train(clip, work / "avatar.hicode", config)


def _begin(preparation: Preparation) -> None:
    if not Path(preparation.out).is_dir():
        raise InputError(
            f"{preparation.out} cannot be seen from this machine. Put -o on a folder that all machines of the cluster "
            "share."
        )
    if code_version() != preparation.code:
        raise InputError(
            "The package's sources here differ from those that the sweep began with. Run the same version everywhere, "
            "and again."
        )
    if preparation.threads:
        torch.set_num_threads(preparation.threads)


def _write_frames(place: Path, images: dict[str, dict[int, np.ndarray]]) -> None:
    temporary = place.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for row, frames in images.items():
        (temporary / row).mkdir(parents=True)
        for i, image in frames.items():
            write_png(temporary / row / f"{i:06d}.png", image)
    shutil.rmtree(place, ignore_errors=True)
    temporary.replace(place)


def speak_other(avatar: "Avatar", other: Clip, name: str) -> dict | None:
    """Sync and jitter of the avatar with another person's sound, which has no true frames; and of the other's video."""
    from hicode.evaluation.lips import detect, jitter
    from hicode.session.config import SpeakConfig
    from hicode.session.speak import synthesize
    from hicode.tracking.landmarks import FaceLandmarker

    sound = other.audio()
    if sound is None or avatar.speech is None:
        return None
    count = min(CROSS_FRAMES, len(other))
    features = other.speech_features(avatar.speech.encoder)
    assert features is not None  # there is sound
    landmarker = FaceLandmarker()
    spoken = (frame.image for frame in synthesize(avatar, sound[: SAMPLES_PER_FRAME * count], SpeakConfig()))
    rows = {
        "audio": (spoken, avatar.background_plate.shape[1]),
        "ground_truth": ((other.image(t) for t in range(count)), other.width),
    }
    out: dict = {"sound_of": name, "frames": count}
    for row, (frames, width) in rows.items():
        points = np.stack([detect([frame], landmarker)[0] for frame in frames])
        missed = int(np.isnan(points[:, 0, 0]).sum())
        out[row] = {"jitter_px": jitter(points, width), "missed_faces": missed} | _sync(features[: 2 * count], points)
    return plain(out)


def _sync(features: torch.Tensor, points: np.ndarray) -> dict:
    from hicode.evaluation.rows import MIN_SYNC_FRAMES, without_gaps
    from hicode.speech.sync import estimate_offset, shuffled_control

    complete = without_gaps(points)
    if len(points) < MIN_SYNC_FRAMES or complete is None:
        return {"sync_offset_frames": None, "sync_margin": None, "sync_margin_shuffled": None}
    landmarks = torch.from_numpy(complete)
    result = estimate_offset(features, landmarks)
    return {
        "sync_offset_frames": result.offset_frames if result.margin > 0 else None,
        "sync_margin": result.margin,
        "sync_margin_shuffled": shuffled_control(features, landmarks).margin,
    }
