"""`hicode pretrain`."""

from pathlib import Path
from typing import Annotated

import tyro

from hicode.commands import NoPrefix, Out
from research.pretrain.pretraining import PretrainConfig, pretrain_folders
from research.pretrain.sources import LeftOut

Folders = tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER")]]


def command(
    folders: Folders, out: Out, cache: Path, config: Annotated[PretrainConfig, NoPrefix] = PretrainConfig()
) -> None:
    """Learn generic speech weights from your own videos of people who speak. `hicode train --speech-weights` uses them.

    Each video directly in a folder is one speaker; each sub-folder is one speaker with several clips. A run that was
    stopped goes on where it was when the same command is given again.

    Args:
        folders: Folders of videos with sound, of two speakers at least.
        out: The weights, ending in .safetensors; a report is written next to them.
        cache: Folder for landmarks, head motion and features, which are kept.
    """
    report = pretrain_folders(folders, out, cache, config)
    for item in report["left_out"]:
        print(f"Left out: {LeftOut(**item)}")
    speakers = len(report["learned_from"])
    print(f"{out}: {speakers} speakers, {report['seconds']:.0f} s. The report: {out.with_suffix('.md')}")
