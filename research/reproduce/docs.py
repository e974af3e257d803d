"""Fill the tables of a page of the docs from JSON files.

    python -m research.reproduce.docs            write docs/results.md
    python -m research.reproduce.docs --check    only say which tables are out of date; exit status 1 if one is

A section `<!-- table: NAME -->` … `<!-- end -->` of the page gets the table of `docs/results/NAME.json`. A file is
either what `hicode reproduce` writes (table1.json, table2.json), or a `hicode-results` file: columns and rows of any
other measurement (`save_results`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hicode.errors import FileFormatError, HicodeError
from hicode.files import atomic_path, read_json, write_json
from research.reproduce import run
from research.reproduce.tables import METRICS, Figure

SCHEMA, VERSION = "hicode-results", 1
SECTION = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DIGITS = {metric.title: metric.digits for metric in METRICS}
# What the docs show of Table 2: the product's own mode first, then the renderer. (driving mode, metric, heading)
TABLE2_COLUMNS = (
    ("audio", "LMD px", "LMD px"), ("audio", "mouth PSNR", "mouth dB"), ("audio", "opening CCC", "opening CCC"),
    ("audio", "opening amplitude", "amplitude"), ("audio", "closed", "closed"),
    ("tracked", "head PSNR", "tracked: head dB"), ("tracked", "LPIPS", "LPIPS"), ("tracked", "LMD px", "LMD px"),
)  # fmt: skip
TABLE1_COLUMNS = ("LMD px", "mouth PSNR", "opening CCC", "opening amplitude", "closed", "head PSNR", "LPIPS", "SSIM")


@dataclass(frozen=True)
class Grid:
    """A table of text."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown."""
        head, *rows = (f"| {' | '.join(line)} |\n" for line in (self.columns, *self.rows))
        return head + "|" + "---|" * len(self.columns) + "\n" + "".join(rows)


def save_results(file: Path, columns: Sequence[str], rows: Sequence[Sequence[str | float]], command: str) -> None:
    """Write a `hicode-results` file: a table of any measurement, and the command that made it."""
    assert all(len(row) == len(columns) for row in rows), "each row has a value for every column"
    content = {"columns": list(columns), "rows": [list(row) for row in rows], "command": command}
    write_json(file, {"schema": SCHEMA, "version": VERSION, **content})


def load_grid(file: Path) -> Grid:
    """The table that the docs show of a file. Raises FileFormatError if it is of neither kind."""
    schema = read_json(file).get("schema")
    if schema == run.SCHEMA:
        content = read_json(file, run.SCHEMA, run.VERSION)
        show = {"table1": _table1, "table2": _table2}
        return show[content["table"]](content["figures"])
    content = read_json(file, SCHEMA, VERSION)
    rows = tuple(tuple(map(str, row)) for row in content["rows"])
    return Grid(tuple(content["columns"]), rows)


def _table1(figures: dict) -> Grid:
    rows = figures["same_identity"]
    extra = [name for name in ("training", "FPS") if any(name in row for row in rows)]
    lines = [
        (row["title"], *(_text(row, metric) for metric in TABLE1_COLUMNS), *(row.get(name, "–") for name in extra))
        for row in rows
    ]
    return Grid(("", *TABLE1_COLUMNS, *extra), tuple(lines))


def _table2(figures: dict) -> Grid:
    modes = {
        mode: {row["key"]: row for row in (*figures[mode]["control"], *figures[mode]["rows"])}
        for mode in ("audio", "tracked")
    }
    lines = [
        (
            row["title"],
            *(_text(modes[mode][key], metric) for mode, metric, _ in TABLE2_COLUMNS),
            row.get("training", "–"),
        )
        for key, row in modes["audio"].items()
    ]
    return Grid(("", *(heading for _, _, heading in TABLE2_COLUMNS), "training"), tuple(lines))


def _text(row: dict, metric: str) -> str:
    stored = row["figures"].get(metric)
    if stored is None:
        return "–"
    return Figure(tuple(stored["seeds"]), stored["mean"], stored["spread"]).text(DIGITS[metric])


@dataclass(frozen=True)
class Filled:
    """A page with its tables filled: the text, names of the tables that changed, names that have no file."""

    text: str
    changed: tuple[str, ...]
    missing: tuple[str, ...]


def fill(page: str, results: Path) -> Filled:
    """Put the table of `results`/NAME.json into each section of a page. A section without a file stays as it is."""
    changed, missing = [], []

    def table(section: re.Match) -> str:
        start, name, old, end = section.groups()
        file = results / f"{name}.json"
        if not file.exists():
            missing.append(name)
            return section[0]
        new = load_grid(file).markdown()
        if new != old:
            changed.append(name)
        return f"{start}{new}{end}"

    text = SECTION.sub(table, page)
    if (opened := page.count("<!-- table:")) != len(SECTION.findall(page)):
        raise FileFormatError(f"The page opens {opened} tables, but not each one ends. Add <!-- end --> after it.")
    return Filled(text, tuple(changed), tuple(missing))


def main(
    page: Annotated[Path, tyro.conf.arg(help="the page")] = Path("docs/results.md"),
    results: Annotated[Path, tyro.conf.arg(help="folder of the JSON files")] = Path("docs/results"),
    check: Annotated[bool, tyro.conf.arg(help="change nothing; exit status 1 if a table is out of date")] = False,
) -> int:
    """Fill the tables of the docs from JSON files."""
    try:
        filled = fill(page.read_text(encoding="utf-8"), results)
    except HicodeError as error:
        print(error)
        return 2
    for name in filled.missing:
        print(f"{results / name}.json does not exist: its table stays as it is.")
    for name in filled.changed:
        print(f"{page}, {name}: {'out of date' if check else 'written'}")
    if check:
        return 1 if filled.changed else 0
    if filled.changed:
        with atomic_path(page) as file:
            file.write_text(filled.text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(tyro.cli(main, prog="python -m research.reproduce.docs"))
