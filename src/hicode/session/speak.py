"""Files: `speak` writes a video of an avatar that speaks a sound; `synthesize` gives its frames. Both drain
a `Session`.

Memory does not grow with the sound: it is read a little at a time, and frames are taken as they come.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from hicode.audio import (
    FPS,
    SAMPLE_RATE_HZ,
    SAMPLES_PER_FEATURE,
    SAMPLES_PER_FRAME,
    VIDEO_SAMPLE_RATE_HZ,
    DcBlocker,
    Samples,
    as_samples,
    checked_sound,
    frame_rms,
    resample,
)
from hicode.avatar.avatar import Avatar
from hicode.errors import InputError, OutputError
from hicode.files import atomic_path, check_writable
from hicode.media.audio import sound_notes, stream_speech
from hicode.media.source import Readable, as_file
from hicode.media.video import VideoWriter
from hicode.progress import progress_bar, say_notes
from hicode.runtime import Device, resolve_device
from hicode.session.config import SpeakConfig, VideoConfig
from hicode.session.motion_source import PIECE, DrivingTrack
from hicode.session.paste import OriginalVideo
from hicode.session.session import Frame, Session
from hicode.session.timings import Timings
from hicode.speech.loudness import level_of_frames, speech_level
from hicode.trust.consent import ConsentRecord
from hicode.trust.machine_key import MachineKey
from hicode.trust.marks import FrameMarker, VideoRecord, log_unmarked, sign_video

SoundSource = Any
"""A path, a pipe, an open binary file, a file's bytes, or samples: an array, a tensor, a list, or one with its rate."""
SILENT_DB = -60.0
READ_AHEAD = 2 * PIECE  # samples pushed at a time: bounds the motion that waits for its frames
# x264 for spoken videos: 5 ms a 512² frame instead of "veryfast"'s 8; at this factor as good as that at 16, a fifth
# larger. One thread, the caller's, while the others render.
VIDEO_ENCODING = {"preset": "superfast", "crf": 17, "threads": 1}
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov")


@dataclass(frozen=True)
class SpeakResult:
    """What `speak` wrote: `frames` at 25 fps in `seconds` of work; `timings` says where they went."""

    path: Path
    frames: int
    seconds: float
    timings: Timings

    @property
    def fps(self) -> float:
        """Frames a second of work."""
        return self.frames / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.frames} frames ({self.frames / FPS:.1f} s) at {self.fps:.1f} frames a second "
            f"({self.timings})"
        )


def synthesize(
    avatar: Avatar,
    audio: Shaped[np.ndarray, "n"],
    config: SpeakConfig = SpeakConfig(),
    driving: DrivingTrack | None = None,
) -> Iterator[Frame]:
    """The frames of a whole sound at 16 kHz, ceil(n / 640) of them, with its level measured where `config` has none.

    Raises InputError where the sound is empty, not finite, not mono, or the avatar cannot speak.
    """
    audio = checked_sound(audio)
    if len(audio) == 0:
        raise InputError("The sound is empty. Give a file with speech.")
    if config.level is None:
        config = replace(config, level=speech_level(audio))
    session = Session(avatar, config, driving)
    return drained(session, iter([audio]))


def drained(session: Session, pieces: Iterator[Float32[np.ndarray, "n"]]) -> Iterator[Frame]:
    """The frames of a sound in pieces at 16 kHz, read while others are rendered; closes the session."""
    with session:
        for piece in pieces:
            for begin in range(0, len(piece), READ_AHEAD):
                session.push_audio(piece[begin : begin + READ_AHEAD])
                yield from session.drain(keep=session.ahead)
        session.end_utterance()
        yield from session.drain()


def speak(
    avatar: Avatar | Path | str,
    audio: SoundSource,
    out: Path | str,
    config: SpeakConfig = SpeakConfig(),
    video: VideoConfig = VideoConfig(),
    device: Device = "auto",
    progress: bool = True,
) -> SpeakResult:
    """Write an MP4 (H.264 and AAC, 25 fps) of the avatar speaking `audio`.

    It is a sound or video file (a path, a pipe, an open file, its bytes), or samples as `as_samples` takes them.

    Frames are marked after composition, the file is signed (`config.mark`).

    `device`: where the head is rendered; speech and video stay on the CPU. The file appears when it is whole. Raises
    InputError for a sound or a source that cannot be used, OutputError where `out` cannot be written: both before any
    work.
    """
    check_video_path(Path(out), avatar, audio, video.source_video)
    with _source(audio) as source:
        return _speak(avatar, source, Path(out), config, video, device, progress)


def _speak(
    avatar: Avatar | Path | str,
    source: Path | Samples,
    out: Path,
    config: SpeakConfig,
    video: VideoConfig,
    device: Device,
    progress: bool,
) -> SpeakResult:
    if isinstance(avatar, (str, Path)):
        avatar = Avatar.load(avatar)
    if (place := resolve_device(device)) != "cpu":
        avatar = avatar.to(place)
    record = video_record(avatar)
    key = MachineKey.load() if config.mark.mark == "full" else None
    marker = FrameMarker(config.mark, record, avatar.driving.fps)
    sound = _Sound.measured(source)
    if progress and isinstance(source, Path):
        say_notes(source, sound_notes(source))
    session = Session(avatar, replace(config, level=config.level or sound.level))
    total = -(-sound.length // SAMPLES_PER_FRAME)
    original = None
    if video.original_size:
        shown = 1 if config.still else total
        original = OriginalVideo(avatar, video.source_video, session.start, shown, out.parent)
    height, width = avatar.background_plate.shape[:2]
    size = (width, height) if original is None else original.size
    started = time.perf_counter()
    with atomic_path(out) as whole:
        with ExitStack() as stack:
            if original is not None:
                stack.enter_context(original)
            report = stack.enter_context(progress_bar("Speaking", progress))
            pieces, rate_hz = sound.pieces(sound.video_rate_hz), sound.video_rate_hz
            writer = VideoWriter(whole, *size, avatar.driving.fps, pieces, rate_hz, **VIDEO_ENCODING)
            stack.enter_context(writer)
            for done, frame in enumerate(drained(session, sound.pieces(SAMPLE_RATE_HZ)), 1):
                with session.timings.clocked("encode"):
                    image = frame.image if original is None else original.paste(frame.driving_frame, frame.image)
                    writer.write(marker(image))
                report(done, total)
        if key is not None:
            sign_video(whole, record, key)
        log_unmarked(config.mark, record, out)  # before the video has its name: none is without its line
    return SpeakResult(out, total, time.perf_counter() - started, session.timings)


def video_record(avatar: "Avatar") -> VideoRecord:
    """What the marks of an avatar's videos say. FileFormatError where its record of consent is damaged."""
    consent = ConsentRecord.from_dict(avatar.info.get("consent"))
    return VideoRecord(avatar.sha256, consent, str(avatar.source.get("sha256", "")))


def check_video_path(out: Path, *inputs: object) -> None:
    """Raises OutputError where `out` is no video's name, cannot be written, or is one of the inputs."""
    if out.suffix.lower() not in VIDEO_SUFFIXES:
        raise OutputError(
            f"{out} does not end in .mp4, .m4v or .mov, the kinds of video written here. Choose such a name with -o."
        )
    check_writable(out)
    for path in inputs:
        if isinstance(path, (str, Path)) and out.exists() and Path(path).exists() and out.samefile(path):
            raise OutputError(f"{out} is also the input, which would be lost. Choose another name with -o.")


@dataclass(frozen=True, eq=False)
class _Sound:
    """Sound to speak: a file, read as often as needed and never held, or samples.

    length  samples at 16 kHz
    level   RMS of its speech
    """

    source: Path | Samples
    length: int
    level: float

    @staticmethod
    def measured(source: Path | Samples) -> "_Sound":
        """Read once. Raises InputError where it cannot be used, is empty or silent."""
        name = str(source) if isinstance(source, Path) else "The sound"
        count, rms, rest, blocker = 0, [], np.zeros(0, np.float32), DcBlocker()
        for piece in _Sound(source, 0, 0.0).pieces(SAMPLE_RATE_HZ):
            count += len(piece)
            piece = np.concatenate([rest, blocker(piece)])
            whole = len(piece) // SAMPLES_PER_FEATURE * SAMPLES_PER_FEATURE
            rms.append(frame_rms(piece[:whole], SAMPLES_PER_FEATURE))
            rest = piece[whole:]
        levels = np.concatenate([*rms, frame_rms(rest, SAMPLES_PER_FEATURE)])
        if count == 0:
            raise InputError(f"{name} holds no sound at all. Give a file with speech.")
        loudest_db = 20 * np.log10(max(levels.max(), 1e-6))
        if loudest_db < SILENT_DB:
            raise InputError(f"{name} is silent (loudest 20 ms at {loudest_db:.0f} dB). Give a file with speech.")
        return _Sound(source, count, level_of_frames(levels))

    @property
    def video_rate_hz(self) -> int:
        """The rate of the video's sound: samples at 16 kHz as they are, anything else in full quality."""
        as_is = isinstance(self.source, Samples) and self.source.rate_hz == SAMPLE_RATE_HZ
        return SAMPLE_RATE_HZ if as_is else VIDEO_SAMPLE_RATE_HZ

    def pieces(self, rate_hz: int) -> Iterator[Float32[np.ndarray, "n"]]:
        if isinstance(self.source, Samples):
            return iter([resample(self.source.samples, self.source.rate_hz, rate_hz)])
        return stream_speech(self.source, rate_hz)


@contextmanager
def _source(audio: SoundSource) -> Iterator[Path | Samples]:
    """A regular file, or checked samples. Raises InputError for anything that is no sound."""
    if isinstance(audio, (str, Path, bytes, bytearray, memoryview, Readable)):
        with as_file(audio) as file:
            yield file
    else:
        yield as_samples(audio)
