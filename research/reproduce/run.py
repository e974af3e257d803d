"""`hicode reproduce`: the paper's tables from a folder of clips, on one machine or many; partial while it runs, checked on request.

Everything is under OUT, and nothing in it is needed to go on but the finished cells: the same command continues, and computes only what is missing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from hicode.errors import FileFormatError, InputError, OutputError
from hicode.evaluation.syncnet import SyncNet
from hicode.files import atomic_path, read_json, write_json
from hicode.progress import progress_bar
from hicode.provenance import plain, provenance
from hicode.training.avatar import PARTS
from hicode.training.stages import ABLATIONS, HeadConfig, Preset, head_preset
from research.reproduce.cells import (
    Cell,
    Difference,
    Preparation,
    Source,
    check_cell,
    code_version,
    find_sources,
    run_cell,
    run_preparation,
)
from research.reproduce.sweep import Task, execute
from research.reproduce.tables import latex, markdown, plot, table1, table2

MEASURES = (
    "Means over clips, then mean ± sample standard deviation over seeds. SSIM, PSNR, LPIPS (AlexNet) are of the whole frame, LMD by MediaPipe's "
    "landmarks in px at 512. The sync margin is hicode.speech.sync's; only SyncNet's own weights (--syncnet) give AVConf."
)
Table = Literal["table1", "table2"]
SCHEMA, VERSION = "hicode-table", 1
WRITE_REST_SECONDS = (
    5.0  # between two writings of the tables: with a hundred machines cells end faster than a plot is drawn
)
SEEDS = {"table1": 1, "table2": 2}  # two are the fewest that show a spread


def reproduce(
    table: Table,
    clips: Path | str,
    out: Path | str,
    presets: Sequence[Preset] = ("draft",),
    *,
    seeds: int | None = None,
    rows: Sequence[str] = (),
    iterations_scale: float = 1.0,
    ray: str | None = None,
    workers: int | None = None,
    cpus: int = 1,
    syncnet: Path | str | None = None,
    progress: bool = True,
) -> dict:
    """Make a table, or go on with it: OUT/TABLE.md, .tex, .png and .json, written anew after each cell.

    clips   a folder of videos or prepared clips, or one of them
    presets table1: one block of rows each; table2: one
    seeds   cells of each row and clip, seeds 0 … seeds - 1; 1 for table1, 2 for table2 if not given
    rows    of table2 (names in ABLATIONS); all if none is named
    iterations_scale  multiplies the head's iterations: a sweep that is quicker and less than the preset
    syncnet SyncNet's own weights, syncnet_v2.model: adds AVConf
    ray, workers, cpus  as `research.reproduce.sweep.execute`; without `ray` one cell after the other, each on all cores

    Returns what the JSON file holds. InputError for what cannot be done at all, and, after all other cells, where a cell failed.
    """
    out = Path(out)
    config = {
        "table": table,
        "presets": list(presets),
        "seeds": seeds or SEEDS[table],
        "rows": list(rows),
        "iterations_scale": iterations_scale,
    }
    sources = find_sources(clips)
    cells = plan(
        table,
        sources,
        out,
        tuple(presets),
        config["seeds"],
        tuple(rows),
        iterations_scale,
        cpus if ray else None,
        syncnet,
    )
    with _only_one(out):
        return _sweep(table, cells, out, config, ray, workers, cpus, progress)


def plan(
    table: Table,
    sources: Sequence[Source],
    out: Path,
    presets: Sequence[Preset],
    seeds: int,
    rows: Sequence[str] = (),
    iterations_scale: float = 1.0,
    threads: int | None = None,
    syncnet: Path | str | None = None,
) -> list[Cell]:
    """The cells of a table, in the order in which they are best made: a first look at every row before the second seed."""
    if seeds < 1:
        raise InputError(f"There is nothing to do for {seeds} seeds. Give 1 or more.")
    if not 0 < iterations_scale <= 1:
        raise InputError(f"The scale of the iterations is {iterations_scale}. Give a number above 0, up to 1.")
    if unknown := [r for r in rows if r not in ABLATIONS]:
        raise InputError(f"No row is called {unknown[0]!r}. There are: {', '.join(ABLATIONS)}.")
    if table == "table2" and len(presets) != 1:
        raise InputError(
            f"Table 2 has one preset, {len(presets)} are given. Give one; run the command again for another, with another -o."
        )
    if table == "table1" and rows:
        raise InputError("Rows can be chosen in table2 only. Leave --rows out.")
    if syncnet is not None:
        SyncNet.load(syncnet)  # refused before the long work
        syncnet = str(Path(syncnet).resolve())
    code = code_version()
    ready = [Preparation(source, str(out.resolve()), code, threads) for source in sources]
    cells = []
    for seed in range(seeds):
        for preset in presets:
            base = _scaled(head_preset(preset), iterations_scale)
            if table == "table1":
                for i, clip in enumerate(ready):
                    cross = ready[(i + 1) % len(ready)] if len(ready) > 1 else None
                    cells.append(Cell(clip, preset, preset, base, seed, True, cross, syncnet, threads))
                continue
            for name in rows or ABLATIONS:
                # No row of Table 2 concerns composition: the plain composite does for all, and its training is saved.
                cells += [
                    Cell(clip, name, preset, ABLATIONS[name].apply(base), seed, False, None, syncnet, threads)
                    for clip in ready
                ]
    return cells


def _scaled(config: HeadConfig, scale: float) -> HeadConfig:
    return replace(
        config, stages=tuple(replace(s, iterations=max(1, round(scale * s.iterations))) for s in config.stages)
    )


def _sweep(
    table: Table,
    cells: list[Cell],
    out: Path,
    config: dict,
    ray: str | None,
    workers: int | None,
    cpus: int,
    progress: bool,
) -> dict:
    missing = [c for c in cells if not c.is_finished]
    preparations = {p.key: p for c in missing for p in (c.clip, c.cross) if p is not None}
    tasks = [Task(f"prepare {p.key}", run_preparation, p) for p in preparations.values()]
    wanted = {c.key: c for c in missing}
    tasks += [
        Task(c.key, run_cell, c, after=tuple(f"prepare {p.key}" for p in (c.clip, c.cross) if p))
        for c in wanted.values()
    ]
    failures: dict[str, str] = {}
    started, done_before = time.perf_counter(), len(cells) - len(missing)
    known: dict[str, dict] = {}
    rested = -WRITE_REST_SECONDS

    def write() -> dict:
        nonlocal rested
        known.update({c.key: c.read() for c in cells if c.key not in known and c.is_finished})
        made = _write(table, cells, known, out, config, failures, time.perf_counter() - started)
        rested = time.perf_counter()
        return made

    with progress_bar(f"{table}: {done_before} of {len(cells)} cells were there", progress) as show:
        ended = 0

        def end(key: str) -> None:
            nonlocal ended
            if key in wanted:
                ended += 1
                if time.perf_counter() - rested >= WRITE_REST_SECONDS:
                    write()
                show(ended, len(missing))

        def failed(key: str, why: str) -> None:
            failures[key] = why
            end(key)

        write()
        execute(tasks, end, failed, ray=ray, workers=workers, cpus=cpus)
    made = write()
    lost = [c for c in cells if c.key in failures]
    if lost:
        first = lost[0]
        raise InputError(
            f"{len(lost)} of {len(cells)} cells failed, first {first.clip.source.name}, {first.row}: {failures[first.key]} "
            f"The others are in {out}/{table}.md; mend this and run the command again."
        )
    return made


def _write(
    table: Table,
    cells: Sequence[Cell],
    known: dict[str, dict],
    out: Path,
    config: dict,
    failures: dict[str, str],
    seconds: float,
) -> dict:
    # A cell may have been made for another table: what this one calls it counts.
    finished = [known[c.key] | {"row": c.row, "preset": c.preset} for c in cells if c.key in known]
    made = table1(finished, config["presets"]) if table == "table1" else table2(finished)
    names = sorted({c.clip.source.name for c in cells})
    status = [
        f"{len(finished)} of {len(cells)} cells finished: {len(names)} clip{'s' * (len(names) != 1)} ({', '.join(names)}), "
        f"preset {' and '.join(config['presets'])}, seeds 0 … {config['seeds'] - 1}"
        + (f", iterations times {config['iterations_scale']:g}" if config["iterations_scale"] != 1 else "")
        + ". Test parts are each clip's last 1/11, which nothing has learned from.",
        MEASURES,
    ]
    if table == "table2":
        status.append(
            "All rows but the last are without the mesh carrier, which would bring the ablated signals back; none has a trained compositor. "
            "Identical budgets, losses and seeds. docs/equations.md says what each row is."
        )
    if len(finished) < len(cells):
        status.append("Partial: rows are means over the cells that are there, and change until all are.")
    if find_spec("matplotlib") is None:
        status.append("No plots: matplotlib is not installed (pip install 'hicode[reproduce]').")
    status += [
        f"Failed: {c.clip.source.name}, {c.row}, seed {c.seed}: {failures[c.key]}" for c in cells if c.key in failures
    ]
    data = {
        "schema": SCHEMA,
        "version": VERSION,
        "table": table,
        "config": config,
        "finished": len(finished),
        "cells": [
            {
                "key": c.key,
                "clip": c.clip.source.name,
                "row": c.row,
                "preset": c.preset,
                "seed": c.seed,
                "finished": c.key in known,
            }
            for c in cells
        ],
        "failed": {c.key: failures[c.key] for c in cells if c.key in failures},
        "figures": made.data,
        "agreement": list(made.lines),
        "seconds": round(seconds, 1),
        "provenance": provenance(config=config, assets=PARTS),
    }
    data = plain(data)
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".md", markdown(made, status)), (".tex", latex(made, status))):
        with atomic_path(out / f"{table}{suffix}") as file:
            file.write_text(text, encoding="utf-8")
    if png := plot(made):
        with atomic_path(out / f"{table}.png") as file:
            file.write_bytes(png)
    write_json(out / f"{table}.json", data)
    return data


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Two sweeps into one folder would train the same cells: the second is told."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
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


# ----------------------------------------------------------------------------------------------------------------- checking


def check(out: Path | str, progress: bool = True) -> dict:
    """Score the saved frames of every cell that OUT's tables name, and compare with the stored figures.

    Returns {"cells", "figures", "differences": [...]}. FileFormatError where there is no table, or a cell's files are missing.
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
            compared, wrong = check_cell(out / "cells" / f"{key}.json")
            figures += compared
            differences += wrong
            show(i + 1, len(keys))
    return {"cells": len(keys), "figures": figures, "differences": differences}
