"""Options of an evaluation, and of a comparison of two videos."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float, Float32, UInt8

from hicode.avatar.blend import Region
from hicode.errors import InputError
from hicode.files import check_writable
from hicode.runtime import Device, find_research

Mode = Literal["audio", "tracked"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and where the report goes. Raises InputError for values that cannot be used."""

    json: Path | str | None = None  # File for the figures.
    html: Path | str | None = None  # File for the page.
    vgg: bool = False  # LPIPS by VGG16 too: a second or two a frame.
    syncnet: Path | str | None = None
    """SyncNet's own weights, syncnet_v2.model, if you have them: adds AVConf. In a clone only."""
    alignment: Path | str | None = None
    """When p, b and m are spoken (lines of start, end, phone in seconds; or GRID's .align): adds lip closure."""
    region: Region = "face"
    """Part of the rendered head that is measured in the row driven by sound. Figures of the two do not compare."""
    modes: tuple[Mode, ...] = ("audio", "tracked")
    """Rows of an avatar: driven by sound, and by the motion tracked in the test frames."""
    device: Device = "auto"  # Where to render: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU.

    def __post_init__(self):
        if self.region not in ("head", "face"):
            raise InputError(f"There is no region {self.region!r} of the head to render. Choose head or face.")
        unknown = [mode for mode in self.modes if mode not in ("audio", "tracked")]
        if unknown:
            raise InputError(f"There is no driving mode {unknown[0]!r}. Choose tracked, audio or both.")

    def check_outputs(self) -> None:
        """Raises OutputError where a file cannot be written."""
        for place in self.outputs():
            check_writable(place)

    def outputs(self) -> Iterator[Path]:
        """The files that are asked for."""
        return (Path(place) for place in (self.json, self.html) if place)

    def lip_scores(self) -> "LipScores | None":
        """AVConf by the weights given; None without. Raises FileFormatError for another file."""
        if not self.syncnet:
            return None
        find_research()
        from research.compare.syncnet import SyncNet

        return SyncNet.load(self.syncnet)


class LipStream(Protocol):
    """Scores one row's lips against its sound."""

    def push(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """The row's next frame."""
        ...

    def score(self, samples: Float32[np.ndarray, "n"]) -> dict | str:
        """The score with the sound of the frames pushed; or why there is none."""
        ...


class LipScores(Protocol):
    """What makes such streams."""

    def stream(self, points: Float[np.ndarray, "t 478 c"]) -> LipStream:
        """For a row, whose faces are where the truth's landmarks (px) are."""
        ...


@dataclass(frozen=True)
class CompareConfig:
    """What may differ between the two videos. Raises InputError for values that cannot be used."""

    max_left_out: int = 5  # Frames that one may be longer; they are left out at the end and counted.
    resize: bool = False  # Scale the video to the reference's size; every figure then includes the scaling.
    resample: bool = False  # Accept other frame rates: each frame at 25 a second is then the nearest one in time.

    def __post_init__(self):
        if self.max_left_out < 0:
            raise InputError(f"--max-left-out {self.max_left_out} is negative. Give a number of frames; usual are 5.")
