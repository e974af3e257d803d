"""Steps whose results stay in the clip's folder until something they depend on changes.

`clip.json` records for each step its settings, the steps it follows, how long it took (by the clock, and of all
cores), its result and fingerprints of its files. A rerun skips every step whose record still holds and whose files are
undamaged; a killed run continues after its last finished step. A step's files appear under their names only when they
are whole.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hicode.errors import FileFormatError, OutputError
from hicode.files import read_json, remove_leftovers, sha256_of, write_json
from hicode.preparation.clip import SCHEMA, VERSION, is_whole_png
from hicode.provenance import plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Result = TypeVar("Result", bound=DataclassInstance)


_PROBE = ".writable"


@dataclass(frozen=True)
class Step:
    """What a step's result depends on.

    version  counts changes of the code that alter results
    settings dataclasses or JSON values by name: everything that the step reads of the configuration
    after    steps whose results it reads
    files    files, or folders of pictures, that it leaves in the clip
    """

    name: str
    version: int
    settings: dict[str, Any]
    after: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


class StepCache:
    """The records of one clip folder. `state` is the content of `clip.json`, written after each step."""

    def __init__(self, folder: Path, state: dict[str, Any]):
        self.folder = folder
        self.state = state

    def run(self, step: Step, kind: "type[Result]", work: "Callable[[], Result]") -> "Result":
        """The recorded result where settings, code, inputs and files are unchanged; else do the work and record it."""
        steps = self.state["steps"]
        settings = plain(step.settings)
        upstream = {other: steps[other]["id"] for other in step.after}
        described = json.dumps([step.name, step.version, settings, upstream], sort_keys=True)
        identity = hashlib.sha256(described.encode()).hexdigest()[:16]
        record = steps.get(step.name)
        if record and record["id"] == identity and record.get("files") == self._fingerprints(step):
            return kind(**record["result"])
        if self.state["complete"]:
            self.state["complete"] = False
            self.save()
        started, core_started = time.perf_counter(), time.process_time()
        result = work()
        steps[step.name] = {
            "id": identity,
            "version": step.version,
            "settings": settings,
            "after": sorted(step.after),
            "seconds": round(time.perf_counter() - started, 2),
            "core_seconds": round(time.process_time() - core_started, 2),
            "result": asdict(result),
            "files": self._fingerprints(step),
        }
        self.save()
        return result

    def _fingerprints(self, step: Step) -> dict[str, str | int | None]:
        """Of each file its SHA-256, of each folder how many undamaged pictures it has; None where there is neither."""
        found: dict[str, str | int | None] = {}
        for name in step.files:
            place = self.folder / name
            if place.is_dir():
                found[name] = sum(is_whole_png(file.read_bytes()) for file in place.iterdir())
            else:
                found[name] = sha256_of(place) if place.exists() else None
        return found

    def save(self) -> None:
        """Write `clip.json`."""
        write_json(self.folder / "clip.json", self.state, sealed=True)


def open_state(out: Path, video: Path, source: dict[str, str]) -> dict[str, Any]:
    """The records of an earlier run in this folder, or fresh ones.

    Raises OutputError for folders with other contents, and for the clip of another video.
    """
    fresh = {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": False,
        "video": str(video),
        "source": source,
        "steps": {},
    }
    if not out.exists():
        return fresh
    if not out.is_dir():
        raise OutputError(f"{out} is a file; a clip is a folder. Choose another name with -o.")
    remove_leftovers(out)  # of a run that was killed before its first record
    if not (out / "clip.json").exists():
        if any(place.name != _PROBE for place in out.iterdir()):
            raise OutputError(f"{out} is a folder with other things in it. Choose another name with -o.")
        return fresh
    try:
        state = read_json(out / "clip.json", SCHEMA, VERSION)
    except FileFormatError as error:
        raise OutputError(f"{error} Or choose another name with -o.") from error
    if state["source"]["sha256"] != source["sha256"]:
        raise OutputError(
            f"{out} is the clip of another video ({state['source']['name']}). Choose another name with -o, or delete "
            "it."
        )
    state.update(video=str(video), source=source)
    return state


def make_folder(out: Path) -> None:
    """Make the clip's folder. Raises OutputError where nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / _PROBE
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}. Choose another place with -o.") from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder` when it is whole; an older one of that name is replaced."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
