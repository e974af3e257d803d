"""The folder of a training run: what the run is, its logs, and a checkpoint or result per part.

`config.json` identifies the run by its configuration and by all that the head reads of the clip. A folder of another
run is renamed, never mixed. Sound and speech weights are not part of it: the speech models record what they were made
of.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path

import numpy as np

from hicode.errors import FileFormatError
from hicode.files import read_json, sha256_of, write_json
from hicode.preparation.clip import Clip
from hicode.provenance import provenance
from hicode.training.frames import learned_frames

SCHEMA, VERSION = "hicode-run", 4
LOG_EVERY = 25  # iterations


def open_run(folder: Path, clip: Clip, settings: dict) -> None:
    """Make the folder of a run, or find that it has the same run already; `settings` are JSON values."""
    description = {"schema": SCHEMA, "version": VERSION, "pictures": pictures_digest(clip), **settings}
    file = folder / "config.json"
    if file.exists():
        old = _read_run(file)
        if old == description:
            return
        names = chain([""], (f"-{i}" for i in count(2)))  # two runs may be renamed in one second
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = next(path for n in names if not (path := Path(f"{folder}.{stamp}{n}")).exists())
        folder.rename(aside)
        print(f"{folder} held another run ({_difference(old, description)}); it is now {aside}.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "environment.json", provenance())
    write_json(file, description)


def _read_run(file: Path) -> dict:
    try:
        old = read_json(file)
    except FileFormatError:
        return {}
    return old if isinstance(old, dict) and old.get("schema") == SCHEMA else {}


def _difference(old: dict, new: dict) -> str:
    """Why the old run is not the new one, for the terminal."""
    if not old:
        return "its config.json is damaged"
    if old.get("version") != new["version"]:
        return "made by another version of hicode"
    names = {"config": "configuration", "pictures": "pictures, masks, split, track or depth"}
    return "other " + ", ".join(names.get(key) or key for key in new if old.get(key) != new[key])


def pictures_digest(clip: Clip) -> str:
    """A hash of all that the head reads of a clip: training frames, head masks, track, depth, split, defects, driving
    speech."""
    digest = hashlib.sha256(json.dumps([clip.width, clip.height, clip.train.start, clip.train.stop]).encode())
    pictures = [clip.path / kind / f"{t:06d}.png" for kind in ("frames", "masks/head") for t in learned_frames(clip)]
    for file in (clip.path / "track.safetensors", clip.path / "depth.safetensors", *pictures):
        try:
            digest.update(bytes.fromhex(sha256_of(file)))
        except OSError as error:
            raise FileFormatError(
                f"{file} is missing or damaged ({error.strerror}). Run hicode prepare again."
            ) from error
    digest.update(repr([clip.defects, learned_frames(clip)]).encode())
    if clip.track.motion.speech is not None:
        digest.update(clip.track.motion.speech.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class RunLog:
    """`metrics.jsonl` and TensorBoard events in a run's folder, and the seconds of each part."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.seconds: dict[str, float] = {}
        self._lines = (folder / "metrics.jsonl").open("a", buffering=1)
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self._lines.close()
        self._writer.close()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Measure the seconds of a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - started, 1)

    def scalars(self, part: str, iteration: int, total: int, values: dict[str, float]) -> None:
        """Log an iteration's values, every 25 iterations and at the end."""
        if iteration % LOG_EVERY and iteration != total:
            return
        line = {"part": part, "iteration": iteration, "time": round(time.time(), 2)} | values
        self._lines.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(f"{part}/{name}", value, iteration)

    def image(self, name: str, iteration: int, image: np.ndarray) -> None:
        """Log an image "h w 3" to TensorBoard."""
        self._writer.add_image(name, image, iteration, dataformats="HWC")
