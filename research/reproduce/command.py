"""`hicode reproduce`."""

from pathlib import Path
from typing import Annotated

import tyro

from hicode.commands import NoPrefix
from hicode.errors import InputError
from research.reproduce.run import ReproduceConfig, Table, check, reproduce

MaybeTable = tyro.conf.Positional[Annotated[Table | None, tyro.conf.arg(metavar="TABLE")]]
MaybeClips = tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="CLIPS")]]
MaybeOut = Annotated[Path | None, tyro.conf.arg(aliases=("-o",))]


def command(
    table: MaybeTable = None,
    clips: MaybeClips = None,
    out: MaybeOut = None,
    check_folder: Annotated[Path | None, tyro.conf.arg(name="check")] = None,
    config: Annotated[ReproduceConfig, NoPrefix] = ReproduceConfig(),
) -> None:
    """Make the paper's Table 1 (the system, per preset) or Table 2 (the ablations) from a folder of clips.

    Writes Markdown, LaTeX, a plot and JSON, anew after each finished cell. A run that was stopped goes on when the
    same command is given again. No finished cell is computed twice.

    Args:
        table: table1 or table2.
        clips: A folder of videos or of clips that hicode prepare made, or one of them.
        out: Folder of the tables and of their cells.
        check_folder: Make no table. Score the saved frames of the table in this folder again and compare.
    """
    if check_folder is not None:
        if table is not None:
            raise InputError("--check makes no table. Give hicode reproduce --check FOLDER alone.")
        _check(check_folder)
        return
    if table is None or clips is None or out is None:
        raise InputError(
            "Missing: a table, a folder of clips and -o. Give hicode reproduce table1|table2 CLIPS -o OUT."
        )
    reproduce(table, clips, out, config)
    print((out / f"{table}.md").read_text(encoding="utf-8"))


def _check(folder: Path) -> None:
    result = check(folder)
    for difference in result.differences:
        print(difference)
    print(f"{folder}: {result.figures} figures of {result.cells} cells scored again, {len(result.differences)} differ")
    if result.differences:
        raise InputError(f"{folder} holds figures that its frames do not give (listed above). Make these cells anew.")
