"""Options of speaking: `SpeakConfig` of a session, `VideoConfig` of a video that `speak` writes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from hicode.audio import FPS, SAMPLE_RATE_HZ
from hicode.avatar.blend import Region
from hicode.errors import InputError
from hicode.trust.marks import MarkConfig


@dataclass(frozen=True)
class SpeakConfig:
    """How an avatar speaks. Raises InputError for values that cannot be used."""

    start: int | None = None
    """Driving frame to begin with. Default: the first; with --still, one with open eyes and a quiet head."""
    rest: bool = True  # Rest the lips in silence.
    still: bool = False  # Hold one driving frame; blinks, gaze and small head movements are generated.
    blinks: bool = True  # Add blinks where the driving video has none for several seconds.
    seed: int = 0  # Of generated blinks, gaze and head movements.
    region: Region = "face"
    """Part of the rendered head that goes into the driving frame. With --still always the whole head."""
    encoder_weights: Path | None = None
    """Where the weights of the avatar's speech encoder lie, if they have moved (hubert only)."""
    film_grain: bool = True  # Add the recording's own grain to the rendered head.
    mark: Annotated[MarkConfig, tyro.conf.arg(name="")] = field(default_factory=MarkConfig)
    """Marks of the videos that `speak` writes. A session's frames carry none; `trust.marks.FrameMarker` adds them."""
    level: Annotated[float | None, tyro.conf.Suppress] = None
    """RMS of the speech, where it is known in advance. Default: a running estimate."""
    output_rate_hz: Annotated[int, tyro.conf.Suppress] = SAMPLE_RATE_HZ
    """Sample rate of `Frame.audio`. At the rate that is pushed, samples pass unchanged."""
    max_waiting_s: Annotated[float, tyro.conf.Suppress] = 600.0
    """Most sound that may wait for its frames, s. `push_audio` refuses more."""

    def __post_init__(self):
        if self.region not in ("face", "head"):
            raise InputError(f"There is no region {self.region!r} of the head to render. Choose face or head.")
        if self.level is not None and not self.level > 0:
            raise InputError(f"A speech level of {self.level} is not positive. Leave it out to have it estimated.")
        if self.output_rate_hz <= 0 or self.output_rate_hz % FPS:
            raise InputError(
                f"{self.output_rate_hz} Hz is no whole number of samples a frame. Choose a multiple of {FPS:.0f} Hz."
            )


@dataclass(frozen=True)
class VideoConfig:
    """What kind of video `speak` writes."""

    original_size: bool = False  # Paste the head back into the video that the avatar came from, at that video's size.
    source_video: Path | None = None  # Where that video is, if it has moved.
