"""`hicode pretrain`."""

from pathlib import Path
from typing import Annotated

import tyro

from hicode.cli import NoPrefix, Out
from research.pretrain.pretraining import PretrainingConfig, pretrain_folders


def command(
    folders: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER")]],
    out: Out,
    cache: Path,
    sources: Path | None = None,
    sync_out: Path | None = None,
    presence_out: Path | None = None,
    config: Annotated[PretrainingConfig, NoPrefix] = PretrainingConfig(),
) -> None:
    """Learn generic speech weights from your own videos of people who speak. `hicode train --speech-weights` uses them.

    Each video directly in a folder is one speaker; each sub-folder is one speaker with several clips. A run that was
    stopped goes on where it was when the same command is given again.

    Args:
        folders: Folders of videos with sound, of two speakers at least.
        out: The weights, ending in .safetensors; a report is written next to them.
        cache: Folder for landmarks, head motion and features, which are kept.
        sources: A manifest of speakers, patterns and terms (docs/weights.md); sources.toml in the folder if there is one.
        sync_out: Also write the sync model here; the manifest must name an anchor.
        presence_out: Also learn the voice-activity score, and write it here.
    """
    report = pretrain_folders(
        folders, out, cache, config, manifest=sources, sync_out=sync_out, presence_out=presence_out
    )
    for left in report["left_out"]:
        print(f"Left out: {left['speaker']}{', ' + left['clip'] if left['clip'] else ''}: {left['reason']}")
    speakers = len(report["learned_from"])
    print(f"{out}: {speakers} speakers, {report['seconds']:.0f} s. The report: {out.with_suffix('.md')}")
