"""Video in and out: any file that FFmpeg reads, as upright RGB frames at a constant rate; H.264 with sound, written
whole or not at all.

Time is presentation time in seconds from the video's first frame. Reading is by timestamps, never by counting, so
variable and odd frame rates neither drift nor bunch: output frame i is the decoded frame whose presentation time is
nearest to i / fps. Memory is constant: two decoded frames and the decoder's own.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import av.container
import av.error
import av.stream
import av.video.stream
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8

from hicode.audio import FPS, SAMPLE_RATE_HZ
from hicode.errors import InputError, OutputError
from hicode.files import atomic_path
from hicode.media.source import joined_parts, media_url, open_media
from hicode.media.timeline import Timeline, cut_off, extent, packets

# Accurate rounding alone changes pixels by 1.2 of 255 on average (29 at most) on HDTF frames: worth its 1.6 ms a frame.
_ENLARGE = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_REDUCE = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_UNSPECIFIED_MATRIX = 2  # AVCOL_SPC_UNSPECIFIED
_SMEARED_S = 1.0  # how long damage lasts, where no key frame ends it: blocks are renewed bit by bit
_HDR_TRANSFERS = (16, 18)  # AVCOL_TRC_SMPTE2084 (PQ), AVCOL_TRC_ARIB_STD_B67 (HLG)


@dataclass(frozen=True)
class VideoInfo:
    """What a file says and what its first frame shows. Sizes are upright, with square pixels; times in seconds."""

    path: Path
    width: int
    height: int
    fps: float  # average, as declared
    duration_s: float  # of the pictures, by their packets: a declared length may be missing, or another track's
    start_s: float  # presentation time of the first frame on the container's clock
    codec: str
    pixel_format: str
    rotation_deg: int  # how far the stored picture is turned, counter-clockwise, to stand upright
    mirrored: bool
    interlaced: bool
    hdr: bool  # PQ or HLG transfer: colours come out flat, because no tone mapping is done
    has_audio: bool  # that can be decoded
    notes: tuple[str, ...] = ()  # what is unusual: sentences for the user


def video_stream(container: av.container.InputContainer, path: Path | str) -> av.video.stream.VideoStream:
    """The track of moving pictures that a player shows: the default one, of several the largest.

    Cover art does not count. Raises InputError where there is none, or none that can be decoded.
    """
    if container.format.name.endswith("_pipe") or container.format.name == "image2":
        raise InputError(f"{path} is a picture, not a video. Give a video of at least 2 seconds.")
    streams = _moving_pictures(container)
    if not streams:
        raise InputError(f"{path} holds no moving pictures, only {_kinds(container)}. Give a video.")
    decodable = [s for s in streams if s.codec_context is not None]
    if not decodable:
        raise InputError(f"The pictures of {path} are of a kind that has no decoder here. Export it as MP4 (H.264).")
    default = av.stream.Disposition.default
    return max(decodable, key=lambda s: (bool(s.disposition & default), s.width * s.height))


def _moving_pictures(container: av.container.InputContainer) -> list[av.video.stream.VideoStream]:
    return [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]


def _kinds(container: av.container.InputContainer) -> str:
    kinds = {"audio": "sound", "video": "a cover picture", "subtitle": "subtitles"}
    names = dict.fromkeys(kinds.get(s.type, str(s.type)) for s in container.streams)
    return " and ".join(names) or "nothing"


@dataclass(frozen=True)
class _Orientation:
    """The display matrix, reduced to what a camera can do: transpose first, then flips."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        if self.transpose:
            image = image.swapaxes(0, 1)
        return np.ascontiguousarray(image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1])

    @property
    def mirrored(self) -> bool:
        return self.transpose ^ self.flip_x ^ self.flip_y

    @property
    def rotation_deg(self) -> int:
        if self.transpose:
            return 90 if self.flip_y else 270
        return 180 if self.flip_y else 0


def _orientation(frame: av.VideoFrame) -> _Orientation:
    """From the frame's display matrix: a row vector (x, y, 1) times [[a b u] [c d v] [x y w]] in 16.16 fixed point is
    where a pixel goes.
    """
    data = frame.side_data.get(SideData.DISPLAYMATRIX)  # pyright: ignore - PyAV takes the enum, its stub a str
    if data is None:
        return _Orientation()
    m = np.frombuffer(bytes(data), np.int32)[:9].astype(np.float64) / 65536
    a, b, c, d = m[0], m[1], m[3], m[4]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return _Orientation(False, bool(a < 0), bool(d < 0))
    return _Orientation(True, bool(c < 0), bool(b < 0))


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A frame, its presentation time, and whether its packet, or one that it builds on, is damaged."""

    time_s: float
    frame: av.VideoFrame
    damaged: bool


def _decoded(container, stream, path: Path) -> Iterator[_Decoded]:
    """Frames in order. Times always rise: a missing or repeated stamp counts as one nominal frame on.

    InputError where nothing decodes, or where the file ends well before the length it declares.
    """
    stream.thread_type = "AUTO"
    nominal_s = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    timeline, last_s, lost, lost_s = Timeline(), None, 0, None
    for packet in packets(container, timeline):
        if packet.stream.index != stream.index:
            continue
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            lost, lost_s = lost + 1, last_s
            continue
        except av.error.FFmpegError as error:
            raise InputError(f"{path} cannot be decoded ({error.strerror}). Export it again as MP4 (H.264).") from error
        for frame in frames:
            time_s = frame.time
            if time_s is None or (last_s is not None and time_s <= last_s):
                time_s = 0.0 if last_s is None else last_s + nominal_s
            last_s = time_s
            if frame.is_corrupt:
                lost_s = time_s
            elif frame.key_frame or (lost_s is not None and time_s > lost_s + _SMEARED_S):
                lost_s = None
            yield _Decoded(time_s, frame, lost_s is not None)
    if last_s is None:
        raise InputError(f"{path} holds no decodable picture ({lost} damaged packets). Export it again as MP4 (H.264).")
    if missing := cut_off(container, timeline.reached_s):
        raise InputError(
            f"{path} is cut off: {missing[0]:.1f} of its {missing[1]:.1f} s are there. Copy it again, or re-export the "
            "part that plays."
        )


class _Converter:
    """Decoded frames to upright RGB with square pixels, none longer than `max_size`; a size change midway is scaled to
    the first frame's.
    """

    def __init__(self, stream, max_size: int | None):
        self._reformatter = VideoReformatter()
        self._aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        self._max_size = max_size
        self._size: tuple[int, int] | None = None

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Stored width and height after scaling, before turning."""
        if self._size is None:
            width, height = frame.width * max(self._aspect, 1.0), frame.height / min(self._aspect, 1.0)
            scale = min(1.0, self._max_size / max(width, height)) if self._max_size else 1.0
            self._size = max(1, round(width * scale)), max(1, round(height * scale))
        return self._size

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self.size(frame)
        # Untagged: the convention is BT.709 from 720 lines on, BT.601 below. FFmpeg itself would take BT.601
        # throughout.
        untagged_hd = int(frame.colorspace) == _UNSPECIFIED_MATRIX and min(frame.width, frame.height) >= 720
        rgb = self._reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=Colorspace.ITU709 if untagged_hd else None,
            dst_color_range=ColorRange.JPEG,
            interpolation=_REDUCE if width < frame.width or height < frame.height else _ENLARGE,
        )
        return _orientation(frame).apply(rgb.to_ndarray())


def probe(path: Path | str) -> VideoInfo:
    """Look at a video: decode its first frame, and read all packets for its length. InputError where it is not one."""
    path = Path(path)
    with open_media(path) as container:
        stream = video_stream(container, path)
        first = next(_decoded(container, stream, path))
        time_s, frame = first.time_s, first.frame
        width, height = _Converter(stream, None).size(frame)
        orientation = _orientation(frame)
        if orientation.transpose:
            width, height = height, width
        info = VideoInfo(
            path=path,
            width=width,
            height=height,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            duration_s=0.0,
            start_s=time_s,
            codec=stream.codec_context.name,
            pixel_format=frame.format.name,
            rotation_deg=orientation.rotation_deg,
            mirrored=orientation.mirrored,
            interlaced=frame.interlaced_frame,
            hdr=int(frame.color_trc) in _HDR_TRANSFERS,
            has_audio=any(s.codec_context is not None for s in container.streams.audio),
        )
        notes, track = _picture_notes(container, stream, frame), stream.index
    with open_media(path) as container:
        found = extent(container)
        span = found.spans.get(track)
    jumps = [
        f"The clock jumps by {size_s:.1f} s at {at_s - time_s:.2f} s: taken as continuous."
        for at_s, size_s in found.jumps
    ]
    if len(jumps) > 3:
        jumps = [*jumps[:3], f"The clock jumps {len(jumps) - 3} times more."]
    if len(joined_parts(path)) > 1:
        jumps.append("Several files are joined in this one: the pictures of the first are used.")
    duration_s = 0.0 if span is None else span.end_s - span.begin_s
    return replace(info, duration_s=duration_s, notes=(*notes, *jumps))


def _picture_notes(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, frame: av.VideoFrame
) -> list[str]:
    """What of the file's pictures is not used."""
    notes = []
    others = len(_moving_pictures(container)) - 1
    if others:
        size = f"{stream.width}x{stream.height}"
        notes.append(f"{others + 1} picture tracks: {_number(container.streams.video, stream)} is used ({size}).")
    layer = any(key.lower() == "alpha_mode" and value == "1" for key, value in stream.metadata.items())
    if layer or any(component.is_alpha for component in frame.format.components):
        notes.append("Transparency is dropped: what lies under it is seen.")
    return notes


def _number(streams, stream) -> int:
    return 1 + [s.index for s in streams].index(stream.index)


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame at a constant rate; `damaged`: blocks of it are missing or smeared, because packets are."""

    rgb: UInt8[np.ndarray, "h w 3"]
    damaged: bool


def read_video(path: Path | str, fps: float = FPS, max_size: int | None = None) -> Iterator[np.ndarray]:
    """The images of `read_pictures`."""
    return (picture.rgb for picture in read_pictures(path, fps, max_size))


def read_pictures(path: Path | str, fps: float = FPS, max_size: int | None = None) -> Iterator[Picture]:
    """Frames as uint8 RGB "h w 3", upright, at constant `fps`; the longer side at most `max_size` px.

    Frame i is the decoded frame nearest in presentation time to i / fps (the earlier one of two equally near), so
    faster videos lose frames and slower ones repeat some; a gap in the stream repeats its last frame. InputError where
    the file is not a video, or ends before the length it declares.
    """
    path = Path(path)
    with open_media(path) as container:
        stream = video_stream(container, path)
        convert = _Converter(stream, max_size)
        count = 0
        start_s: float | None = None
        held: _Decoded | None = None
        held_rgb: np.ndarray | None = None
        frame_s = 1 / fps

        def emit_until(next_s: float) -> Iterator[Picture]:
            nonlocal count, held_rgb
            assert held is not None
            while count / fps < next_s:
                # Converted once and only where it is shown; repeats are copies, so that a caller may write into what it
                # gets.
                repeated = held_rgb is not None
                held_rgb = convert(held.frame) if held_rgb is None else held_rgb
                yield Picture(held_rgb.copy() if repeated else held_rgb, held.damaged)
                count += 1

        for decoded in _decoded(container, stream, path):
            if start_s is None or held is None:
                start_s = decoded.time_s
            else:
                # The nearer frame changes in the middle between two; 1 µs absorbs the rounding of time stamps.
                frame_s = decoded.time_s - held.time_s
                yield from emit_until((held.time_s + decoded.time_s) / 2 - start_s + 1e-6)
            held, held_rgb = decoded, None
        assert start_s is not None and held is not None  # otherwise _decoded has raised
        # The last frame lasts as long as it says, or as long as the one before it, but no longer than a second.
        last = held.frame
        last_s = float(last.duration * last.time_base) if last.duration and last.time_base else frame_s
        yield from emit_until(held.time_s + min(last_s, 1.0) - start_s - 0.5 / fps)


class VideoWriter:
    """H.264 (yuv420p, BT.709) with AAC sound in an MP4 that starts to play before it is whole; sound and picture both
    start at 0.

        with VideoWriter("out.mp4", 512, 512, audio=samples) as video:
            video.write(frame)

    `audio` is float "n" in [-1, 1], or an iterable of such pieces for sound of any length in constant memory; it is
    interleaved as the frames come, and what is left is written at the end. Odd sizes grow by one repeated row or
    column. `crf`, `preset` and `threads` are x264's. On an exception, or a full disk (OutputError), no file stays.
    """

    def __init__(  # noqa: PLR0913 - the last three are x264's own options
        self,
        path: Path | str,
        width: int,
        height: int,
        fps: float = FPS,
        audio: np.ndarray | Iterable[np.ndarray] | None = None,
        audio_rate_hz: int = SAMPLE_RATE_HZ,
        crf: int = 16,
        preset: str = "veryfast",
        threads: int | None = None,
    ):
        if Path(path).suffix.lower() not in (".mp4", ".m4v", ".mov"):
            raise OutputError(
                f"{path} does not end in .mp4, .m4v or .mov, the kinds of video written here. Choose such a name "
                "with -o."
            )
        assert width > 0 and height > 0, (width, height)
        self.path = Path(path)
        self.width, self.height, self.fps = width, height, fps
        self.frames_written = 0
        self._audio = iter([audio] if isinstance(audio, np.ndarray) else audio) if audio is not None else None
        self._audio_rate_hz = audio_rate_hz
        self._crf, self._preset, self._threads = crf, preset, threads
        self._samples_written = 0
        self._stack = ExitStack()

    def __enter__(self) -> "VideoWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path))
            self._container = av.open(media_url(temporary), "w", options={"movflags": "+faststart"})
            stack.push(self._close)
            rate = Fraction(self.fps).limit_denominator(1001)
            try:
                self._video = self._container.add_stream(
                    "libx264", rate=rate, options={"crf": str(self._crf), "preset": self._preset}
                )
            except (av.error.FFmpegError, ValueError) as error:
                raise OutputError(
                    "This PyAV has no H.264 encoder (libx264). Install the wheel: pip install --force-reinstall av"
                ) from error
            self._video.width, self._video.height = self.width + self.width % 2, self.height + self.height % 2
            self._video.pix_fmt = "yuv420p"
            context = self._video.codec_context
            if self._threads is not None:
                context.thread_count = self._threads
            context.time_base = 1 / rate
            context.colorspace = context.color_primaries = context.color_trc = (
                1  # BT.709, said outright: players guess differently
            )
            context.color_range = ColorRange.MPEG
            self._reformatter = VideoReformatter()
            self._sound = None
            if self._audio is not None:
                self._sound = self._container.add_stream("aac", rate=self._audio_rate_hz, layout="mono")
                self._sound.bit_rate = 128_000
            self._stack = stack.pop_all()
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append one frame, uint8 RGB "h w 3"."""
        assert frame.shape == (self.height, self.width, 3) and frame.dtype == np.uint8, (frame.shape, frame.dtype)
        if self.width % 2 or self.height % 2:
            frame = np.pad(frame, ((0, self.height % 2), (0, self.width % 2), (0, 0)), mode="edge")
        picture = self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_ENLARGE,
        )
        picture.pts = self.frames_written
        picture.time_base = self._video.codec_context.time_base
        self._container.mux(self._video.encode(picture))
        self.frames_written += 1
        self._write_sound_until(self.frames_written / self.fps)

    def _write_sound_until(self, end_s: float) -> None:
        while self._audio is not None and self._samples_written < end_s * self._audio_rate_hz:
            piece = next(self._audio, None)
            if piece is None:
                self._audio = None
                return
            for start in range(0, len(piece), self._audio_rate_hz):
                samples = np.clip(piece[start : start + self._audio_rate_hz], -1, 1).astype(np.float32)
                sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
                sound.sample_rate = self._audio_rate_hz
                sound.time_base = Fraction(1, self._audio_rate_hz)
                sound.pts = self._samples_written
                assert self._sound is not None
                self._container.mux(self._sound.encode(sound))
                self._samples_written += len(samples)

    def _close(self, kind, error, trace) -> None:
        if kind is None:
            self._write_sound_until(math.inf)
            self._container.mux(self._video.encode(None))
            if self._sound is not None:
                self._container.mux(self._sound.encode(None))
            self._container.close()
            return
        with suppress(Exception):  # the first error is the one to tell; the file is removed anyway
            self._container.close()

    def __exit__(self, kind, error, trace) -> None:
        self._stack.__exit__(kind, error, trace)
