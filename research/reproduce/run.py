"""The paper's tables from a folder of clips, on one machine or many.

OUT holds everything. Only the finished cells are needed to go on: the same command computes what is missing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from hicode.errors import FileFormatError, InputError, OutputError
from hicode.files import atomic_path, read_json, write_json
from hicode.progress import progress_bar
from hicode.provenance import plain, provenance
from hicode.sweep import SweepConfig, Task, execute
from hicode.training.avatar import PARTS
from hicode.training.stages import Preset, head_preset
from research.compare.syncnet import SyncNet
from research.reproduce.ablations import ABLATIONS
from research.reproduce.cells import Cell, Preparation, run_cell, run_preparation
from research.reproduce.rescore import Difference, check_cell
from research.reproduce.show import latex, markdown, plot
from research.reproduce.sources import Source, code_version, find_sources
from research.reproduce.tables import Made, table1, table2

MEASURES = (
    "Means over clips, then mean ± sample standard deviation over seeds. SSIM, PSNR and LPIPS (AlexNet) are of the "
    "whole frame. LMD is by MediaPipe's landmarks, in px at 512. The sync margin is that of hicode.speech.sync; AVConf "
    "needs SyncNet's own weights (--syncnet)."
)
TABLE2_NOTE = (
    "Rows share budget, losses, seeds and speech models. They differ in the control alone. No row has a trained "
    "refiner. docs/equations.md defines the rows."
)
Table = Literal["table1", "table2"]
SCHEMA, VERSION = "hicode-table", 2
WRITE_PAUSE_SECONDS = (
    5.0  # between two writings of the tables: on many machines cells finish faster than a plot is drawn
)
SEEDS = {"table1": 1, "table2": 2}  # two is the least that shows a spread


@dataclass(frozen=True)
class ReproduceConfig:
    """What a table is made of, and where its cells run."""

    preset: tuple[Preset, ...] = ("draft",)
    """Training presets. table1: a block of rows for each. table2: exactly one."""
    seeds: int | None = None
    """Cells per row and clip, seeds 0 to SEEDS - 1. If not given: 1 for table1, 2 for table2."""
    rows: tuple[str, ...] = ()
    """Rows of table2 to make. All if none is named."""
    iterations_scale: float = 1.0
    """Train the head for this share of the preset's iterations."""
    syncnet: Path | None = None
    """SyncNet's own weights, syncnet_v2.model. With them, AVConf is measured."""
    ray: str | None = None
    """Run cells on Ray: local (processes of this machine) or a cluster's address. If not given: one after the other."""
    workers: int | None = None
    """With --ray local: cells at a time. If not given: as many as there are cores for."""
    cpus: int = 1
    """With --ray: cores per cell."""

    def __post_init__(self):
        if self.seeds is not None and self.seeds < 1:
            raise InputError(f"There is nothing to do for {self.seeds} seeds. Give 1 or more.")
        if not 0 < self.iterations_scale <= 1:
            raise InputError(f"The scale of the iterations is {self.iterations_scale}. Give a number above 0, up to 1.")
        if unknown := [r for r in self.rows if r not in ABLATIONS]:
            raise InputError(f"No row is called {unknown[0]!r}. There are: {', '.join(ABLATIONS)}.")

    @property
    def sweep(self) -> SweepConfig:
        """Where the cells run."""
        return SweepConfig(self.ray, self.workers, self.cpus)

    @property
    def figures(self) -> dict:
        """The settings that the figures depend on, for the table's JSON."""
        keys = ("preset", "seeds", "rows", "iterations_scale")
        return {key: value for key, value in asdict(self).items() if key in keys}


def reproduce(
    table: Table, clips: Path | str, out: Path | str, config: ReproduceConfig = ReproduceConfig(), progress: bool = True
) -> dict:
    """Make a table, or go on with it: OUT/TABLE.md, .tex, .png and .json, written anew after each finished cell.

    `clips` is a folder of videos or prepared clips, or one of them. Returns the content of the JSON file. Raises
    InputError if the table cannot be made, and, after all other cells, if a cell failed.
    """
    out = Path(out)
    config = replace(config, seeds=config.seeds or SEEDS[table])
    cells = plan(table, find_sources(clips), out, config)
    with _exclusive(out):
        return _Run(table, cells, out, config).sweep(progress)


def plan(table: Table, sources: Sequence[Source], out: Path, config: ReproduceConfig) -> list[Cell]:
    """The cells of a table in the order of work: every row of the first seed comes before the second seed."""
    if table == "table2" and len(config.preset) != 1:
        raise InputError(
            f"Table 2 has one preset, {len(config.preset)} are given. Give one; run the command again for another, "
            "with another -o."
        )
    if table == "table1" and config.rows:
        raise InputError("Rows can be chosen in table2 only. Leave --rows out.")
    syncnet = None
    if config.syncnet is not None:
        SyncNet.load(config.syncnet)  # refused before the long work
        syncnet = str(Path(config.syncnet).resolve())
    code, threads = code_version(), config.cpus if config.ray else None
    clips = [Preparation(source, str(out.resolve()), code, threads) for source in sources]
    cells = []
    for seed in range(config.seeds or SEEDS[table]):
        for preset in config.preset:
            head = head_preset(preset).scaled(config.iterations_scale)
            if table == "table1":
                for clip, following in zip(clips, clips[1:] + clips[:1], strict=True):
                    cross = following if len(clips) > 1 else None
                    cells.append(Cell(clip, preset, preset, head, seed, True, cross, syncnet, threads))
                continue
            for row in config.rows or ABLATIONS:
                # No row of Table 2 is about composition: none trains a refiner, which saves its time.
                ablated = ABLATIONS[row].apply(head)
                cells += [Cell(clip, row, preset, ablated, seed, False, None, syncnet, threads) for clip in clips]
    return cells


@dataclass
class _Run:
    """A table under way: its cells, what is read of them, what failed."""

    table: Table
    cells: list[Cell]
    out: Path
    config: ReproduceConfig
    finished: dict[str, dict] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def sweep(self, progress: bool) -> dict:
        """Run the cells that are missing, and write the tables as they finish."""
        missing = {c.key: c for c in self.cells if not c.is_finished}
        ended, written = 0, time.perf_counter()

        def end(key: str) -> None:
            nonlocal ended, written
            if key not in missing:
                return
            ended += 1
            if time.perf_counter() - written >= WRITE_PAUSE_SECONDS:
                self.write()
                written = time.perf_counter()
            show(ended, len(missing))

        def fail(key: str, reason: str) -> None:
            self.failures[key] = reason
            end(key)

        done_before = len(self.cells) - sum(not c.is_finished for c in self.cells)
        with progress_bar(f"{self.table}: {done_before} of {len(self.cells)} cells were there", progress) as show:
            self.write()
            execute(_tasks(missing), end, fail, self.config.sweep)
        data = self.write()
        failed = [c for c in self.cells if c.key in self.failures]
        if failed:
            first = failed[0]
            raise InputError(
                f"{len(failed)} of {len(self.cells)} cells failed, first {first.clip.source.name}, {first.row}: "
                f"{self.failures[first.key]} The others are in {self.out}/{self.table}.md; mend this and run the "
                "command again."
            )
        return data

    def write(self) -> dict:
        """Write the table's files from the cells that are finished; the content of the JSON file."""
        self.finished.update({c.key: c.read() for c in self.cells if c.key not in self.finished and c.is_finished})
        # A cell may have been made for another table: the row and preset of this one count.
        cells = [
            self.finished[c.key] | {"row": c.row, "preset": c.preset} for c in self.cells if c.key in self.finished
        ]
        made = table1(cells, self.config.preset) if self.table == "table1" else table2(cells)
        data = plain(self._data(made, len(cells)))
        self.out.mkdir(parents=True, exist_ok=True)
        status = self._status(len(cells))
        for suffix, text in ((".md", markdown(made, status)), (".tex", latex(made, status))):
            with atomic_path(self.out / f"{self.table}{suffix}") as file:
                file.write_text(text, encoding="utf-8")
        if png := plot(made):
            with atomic_path(self.out / f"{self.table}.png") as file:
                file.write_bytes(png)
        write_json(self.out / f"{self.table}.json", data)
        return data

    def _data(self, made: Made, finished: int) -> dict:
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "table": self.table,
            "config": self.config.figures,
            "finished": finished,
            "cells": [
                {
                    "key": c.key, "clip": c.clip.source.name, "row": c.row, "preset": c.preset, "seed": c.seed,
                    "finished": c.key in self.finished,
                }
                for c in self.cells
            ],
            "failed": {c.key: self.failures[c.key] for c in self.cells if c.key in self.failures},
            "blocks": [asdict(block) for block in made.blocks],
            "figures": made.data,
            "agreement": list(made.lines),
            "seconds": round(time.perf_counter() - self.started, 1),
            "provenance": provenance(config=self.config.figures, assets=PARTS),
        }  # fmt: skip

    def _status(self, finished: int) -> list[str]:
        names, config = sorted({c.clip.source.name for c in self.cells}), self.config
        scale = f", iterations times {config.iterations_scale:g}" if config.iterations_scale != 1 else ""
        status = [
            f"{finished} of {len(self.cells)} cells finished: {len(names)} clip{'s' * (len(names) != 1)} "
            f"({', '.join(names)}), preset {' and '.join(config.preset)}, seeds 0 … {(config.seeds or 1) - 1}{scale}. "
            "Test parts are each clip's last 1/11. No model has seen them in training.",
            MEASURES,
        ]
        if self.table == "table2":
            status.append(TABLE2_NOTE)
        if finished < len(self.cells):
            status.append("Partial: rows are means over the finished cells, and change until all are finished.")
        if find_spec("matplotlib") is None:
            status.append("No plots: matplotlib is not installed (pip install 'hicode[research]').")
        status += [
            f"Failed: {c.clip.source.name}, {c.row}, seed {c.seed}: {self.failures[c.key]}"
            for c in self.cells
            if c.key in self.failures
        ]
        return status


def _tasks(cells: dict[str, Cell]) -> list[Task]:
    """The preparation of each clip once, then the cells."""
    preparations = {p.key: p for c in cells.values() for p in (c.clip, c.cross) if p is not None}
    tasks = [Task(f"prepare {p.key}", run_preparation, p) for p in preparations.values()]
    for c in cells.values():
        after = tuple(f"prepare {p.key}" for p in (c.clip, c.cross) if p)
        tasks.append(Task(c.key, run_cell, c, after))
    return tasks


@contextmanager
def _exclusive(out: Path) -> Iterator[None]:
    """Refuse a second sweep into the same folder: both would train the same cells."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 - held until the sweep ends
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}. Choose another place with -o.") from error
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError as error:
            raise InputError(
                f"Another sweep is writing into {out}. Wait for it, or choose another place with -o."
            ) from error
        yield


# ------------------------------------------------------------------------------------------------------------ checking


@dataclass(frozen=True)
class Check:
    """Result of scoring the saved frames of a table again."""

    cells: int
    figures: int
    differences: tuple[Difference, ...]


def check(out: Path | str, progress: bool = True) -> Check:
    """Score the saved frames of every cell that OUT's tables name, and compare with the stored figures.

    Raises FileFormatError if there is no table, or if a cell's files are missing.
    """
    out = Path(out)
    tables = [out / f"{t}.json" for t in ("table1", "table2") if (out / f"{t}.json").exists()]
    if not tables:
        raise FileFormatError(
            f"{out} holds no table1.json or table2.json. Give the folder that hicode reproduce wrote."
        )
    keys = dict.fromkeys(c["key"] for t in tables for c in read_json(t, SCHEMA, VERSION)["cells"] if c["finished"])
    differences: list[Difference] = []
    figures = 0
    with progress_bar("Checking", progress) as show:
        for i, key in enumerate(keys):
            compared, different = check_cell(out / "cells" / f"{key}.json")
            figures += compared
            differences += different
            show(i + 1, len(keys))
    return Check(len(keys), figures, tuple(differences))
