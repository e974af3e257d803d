"""Options of an evaluation."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hicode.avatar.blend import Region
from hicode.errors import InputError
from hicode.files import check_writable
from hicode.runtime import Device

Mode = Literal["audio", "tracked"]


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured, and where the report goes. Raises InputError for values that cannot be used."""

    json: Path | str | None = None
    """File for the figures."""
    html: Path | str | None = None
    """File for the page."""
    vgg: bool = False
    """LPIPS by VGG16 too: a second or two a frame."""
    syncnet: Path | str | None = None
    """SyncNet's own weights, syncnet_v2.model, if you have them: adds AVConf."""
    alignment: Path | str | None = None
    """When p, b and m are spoken (lines of start, end, phone in seconds; or GRID's .align): adds lip closure."""
    region: Region = "face"
    """Part of the rendered head that is measured in the row driven by sound. Figures of the two do not compare."""
    modes: tuple[Mode, ...] = ("audio", "tracked")
    """Rows of an avatar: driven by sound, and by the motion tracked in the test frames."""
    device: Device = "auto"
    """Where to render: cpu, or cuda for an NVIDIA GPU with gsplat; auto is the CPU."""

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
