"""An avatar of everybody in a folder of videos: `prepare` and `train` for each, one after the other or on Ray.

A person's files carry the name of the video and 8 digits of the hash of its content: OUT/clips/NAME-HASH.clip, the run
OUT/runs/NAME-HASH, and a record OUT/clips/NAME-HASH.json once OUT/NAME.hicode is whole. The record holds the hashes of
the avatar and of all that it depends on. So a rerun does what is missing or has changed, and goes on from checkpoints.
"""

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from hicode.errors import FileFormatError, HicodeError, InputError
from hicode.files import read_json, sha256_of, write_json
from hicode.preparation import clip as clip_schema
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.progress import progress_bar
from hicode.provenance import plain
from hicode.runtime import resolve_device
from hicode.sweep import SweepConfig, Task, execute
from hicode.training.adaptation import load_generic
from hicode.training.avatar import TrainConfig, train

SCHEMA, VERSION = "hicode-learned", 1
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")


@dataclass(frozen=True)
class LearnConfig:
    """How everybody is learned, and where."""

    ray: str | None = None
    """Learn on Ray: local (processes of this machine) or a cluster's address. If not given: one after the other."""
    workers: int | None = None  # With --ray local: people at a time. If not given: as many as there are cores for.
    cpus: int = 1  # With --ray: cores a person.
    prepare: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Person:
    """A video, and where its results go. `threads`: cores to use, all if None."""

    video: str
    sha256: str
    out: str
    prepare: PrepareConfig
    train: TrainConfig
    threads: int | None = None

    @property
    def name(self) -> str:
        """Of the video, without its ending."""
        return Path(self.video).stem

    @property
    def key(self) -> str:
        """Hash of what the avatar depends on."""
        weights = self.train.speech_weights
        made_of = [
            self.sha256, plain(self.prepare), plain(self.train.head_config()), plain(self.train.refiner_config()),
            self.train.preset, self.train.consent, None if weights is None else sha256_of(weights),
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def avatar(self) -> Path:
        """Its file."""
        return Path(self.out) / f"{self.name}.hicode"

    def file(self, folder: str, suffix: str) -> Path:
        """A file or folder of this video's content."""
        return Path(self.out) / folder / f"{self.name}-{self.sha256[:8]}{suffix}"

    def record(self) -> dict[str, Any] | None:
        """What was learned; None where it is missing, or was made of something else."""
        try:
            record = read_json(self.file("clips", ".json"), SCHEMA, VERSION)
        except FileFormatError:
            return None
        whole = self.avatar.exists() and record["avatar"] == sha256_of(self.avatar)
        return record if whole and record["key"] == self.key else None


def learn_person(person: Person) -> None:
    """Prepare and train, unless it is done. May be stopped and called again. Raises HicodeError with the reason."""
    if person.record():
        return
    if person.threads:
        torch.set_num_threads(person.threads)
    started, progress = time.perf_counter(), person.threads is None
    try:
        clip = prepare(person.video, person.file("clips", ".clip"), person.prepare, progress)
        training = replace(person.train, run=person.file("runs", ""), progress=progress)
        train(clip, person.avatar, training)
        report = read_json(clip.path / "clip.json", clip_schema.SCHEMA, clip_schema.VERSION)["report"]["items"]
    except HicodeError:
        raise
    except Exception as error:  # one video's defect does not stop the others
        raise HicodeError(f"{type(error).__name__}: {error}. This is a defect of hicode; please report it.") from error
    seconds = round(time.perf_counter() - started, 1)
    record = {"key": person.key, "avatar": sha256_of(person.avatar), "seconds": seconds, "report": report}
    write_json(person.file("clips", ".json"), {"schema": SCHEMA, "version": VERSION} | record)


def find_people(folder: Path, out: Path, config: LearnConfig) -> list[Person]:
    """One for each video directly in a folder, by name; of two with one content the first.

    Raises InputError where there is none, or two have one name.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder. Give a folder of videos, one person each.")
    videos = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
    if not videos:
        raise InputError(f"{folder} holds no video ({', '.join(VIDEOS)}). Give a folder of videos, one person each.")
    names = [video.stem for video in videos]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{folder} holds two videos called {twice[0]}. Rename one: avatars are named by it.")
    threads, people = config.cpus if config.ray else None, {}
    for video in videos:
        sha256, place = sha256_of(video), str(out.resolve())
        person = Person(str(video.resolve()), sha256, place, config.prepare, config.train, threads)
        first = people.setdefault(sha256, person)
        if first is not person:
            print(f"{video.name} has the content of {Path(first.video).name}: it is left out.")
    return list(people.values())


def learn(folder: Path | str, out: Path | str, config: LearnConfig = LearnConfig(), progress: bool = True) -> dict:
    """Learn everybody in a folder of videos: OUT/NAME.hicode each, and OUT/learned.json, rewritten as they come.

    Returns its content. Raises InputError at the end where somebody could not be learned: the others are.
    """
    out = Path(out)
    resolve_device(config.train.device)
    if config.train.speech_weights is not None:
        load_generic(config.train.speech_weights)
    people = find_people(Path(folder), out, config)
    (out / "clips").mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {person.name: {"done": person.record() is not None} for person in people}
    missing = {person.name: person for person in people if not found[person.name]["done"]}
    with progress_bar(f"{len(people)} videos, {len(people) - len(missing)} done before", progress) as report:

        def end(name: str, reason: str | None = None) -> None:
            found[name] = {"done": reason is None} | ({} if reason is None else {"failed": reason})
            _write(people, found, out)
            report(sum("failed" in f or f["done"] for f in found.values()), len(people))
            if progress:
                print(f"{name}: {reason or missing[name].avatar}", flush=True)

        tasks = [Task(name, learn_person, person) for name, person in missing.items()]
        execute(tasks, end, end, SweepConfig(config.ray, config.workers, config.cpus))
    result = _write(people, found, out)
    if progress:
        _print_table(result)
    failed = {name: f["failed"] for name, f in found.items() if "failed" in f}
    if failed:
        name, reason = next(iter(failed.items()))
        raise InputError(
            f"{len(failed)} of {len(people)} videos failed, first {name}: {reason} The others are in {out}. Mend this, "
            "and give the command again: it does what is missing."
        )
    return result


def _write(people: list[Person], found: dict[str, dict], out: Path) -> dict:
    """Write OUT/learned.json; its content: of each person whether it is done, seconds, capture report, or why not."""
    rows = {person.name: found[person.name] | _figures(person, found[person.name]["done"]) for person in people}
    result = {"schema": SCHEMA, "version": VERSION, "people": rows}
    write_json(out / "learned.json", result)
    return result


def _figures(person: Person, done: bool) -> dict:
    record = (person.record() if done else None) or {}
    return {key: record[key] for key in ("seconds", "report") if key in record}


def _print_table(result: dict) -> None:
    """Everybody's capture report in a row: how much is well, what would help, or why it failed."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("video", "s", "capture report"):
        table.add_column(column)
    for name, person in result["people"].items():
        items = person.get("report", [])
        advice = " ".join(f"{item['name']} {item['value']}: {item['advice']}" for item in items if item["advice"])
        says = person.get("failed") or advice or ("good" if person["done"] else "waits")
        table.add_row(name, f"{person.get('seconds', 0):.0f}", says)
    Console(stderr=True).print(table)
