"""Where media comes from: any path, pipe, bytes or file object, as a file that FFmpeg can open."""

import io
import mmap
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO, Protocol, cast, runtime_checkable

import av
import av.container
import av.error

from hicode.errors import InputError, OutputError
from hicode.files import temporary_folder

_COPY_BYTES = 1 << 20
# What names other files, devices or servers, and text that FFmpeg would draw or play. A stranger's file may be one.
_NO_MEDIA = set(
    "adf alsa bin concat dash fbdev ffmetadata hds hls idf image2 image2pipe kmsgrab lavfi oss rtp rtsp sap sbg sdp "
    "tty video4linux2,v4l2 vobsub webm_dash_manifest x11grab xbin".split()
)
INPUT_OPTIONS = {
    "format_whitelist": ",".join(sorted(av.formats_available - _NO_MEDIA)),
    "protocol_whitelist": "file,subfile",
}
"""For FFmpeg, with every file that is read: it opens that file alone."""
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@runtime_checkable
class Readable(Protocol):
    """An open binary file, or what reads like one."""

    def read(self, count: int = -1, /) -> bytes: ...  # noqa: D102 - as of any file


FileSource = Path | str | bytes | bytearray | memoryview | Readable


def media_url(path: Path | str) -> str:
    """The path as FFmpeg takes it literally: without the prefix, "take1:2.wav" is a file of a protocol "take1"."""
    return f"file:{path}"


@contextmanager
def open_media(path: Path | str, part: tuple[int, int] | None = None) -> Iterator[av.container.InputContainer]:
    """The opened container; of a file that joins several, `part` is one of `joined_parts`.

    Raises InputError where the path is no media file: its message says why.
    """
    path = Path(path)
    _check(path)
    url = media_url(path) if part is None else f"subfile,,start,{part[0]},end,{part[1]},,:{media_url(path)}"
    try:
        container = av.open(url, options=INPUT_OPTIONS)
    except (av.error.FFmpegError, ValueError) as error:
        with path.open("rb") as file:
            if file.read(3) == b"\xff\xd8\xff":  # FFmpeg takes JPEG for a sequence of files, which is not opened
                raise InputError(f"{path} is a picture, not a video. Give a video of at least 2 seconds.") from error
        raise InputError(
            f"{path} is not a readable video or sound file ({getattr(error, 'strerror', None) or error}). It may be "
            "cut off or of another kind: copy it again, or export it as MP4 (a sound: as WAV)."
        ) from error
    with container:
        yield container


def _check(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InputError(f"{path} does not exist. Check the path.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Change its rights, or copy it.") from error
    if stat.S_ISDIR(mode) and any(file.suffix.lower() in _PICTURES for file in path.iterdir()):
        raise InputError(
            f"{path} is a folder of pictures, which have no times. Make a video of them, with its frame rate: "
            "ffmpeg -framerate 25 -i %06d.png -crf 12 video.mp4"
        )
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder, not a video or sound file. Name the file itself.")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a pipe or a device, which can be read only once. Copy it to a file first.")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} cannot be read: no permission. Change its rights, or copy it.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes). Copy or record it again.")


@contextmanager
def as_file(source: FileSource) -> Iterator[Path]:
    """The path of a regular file. A pipe, bytes or a file object are first read into a temporary one, to their end.

    Raises InputError where that cannot be read, or is empty, OutputError where it does not fit on the disk.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_fifo() and not path.is_char_device() and not path.is_socket():
            yield path
            return
        if not path.is_fifo():
            raise InputError(f"{path} is a device or a terminal, not a file. Give a file, or a pipe that ends.")
        with _copied(path) as copy:
            yield copy
        return
    with _copied(io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source) as copy:
        yield copy


@contextmanager
def _copied(source: Path | Readable) -> Iterator[Path]:
    name = str(source) if isinstance(source, Path) else "The file object"
    with temporary_folder() as folder:
        copy = folder / "input"
        try:
            with copy.open("wb") as target:
                if isinstance(source, Path):
                    with source.open("rb") as pipe:
                        shutil.copyfileobj(pipe, target, _COPY_BYTES)
                else:
                    shutil.copyfileobj(cast(IO[bytes], source), target, _COPY_BYTES)
        except OSError as error:
            raise OutputError(
                f"{name} cannot be copied to {folder}: {error.strerror or error}. Free some space, or set TMPDIR."
            ) from error
        except (TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be read as bytes ({error}). Open it in binary mode.") from error
        if copy.stat().st_size == 0:
            raise InputError(f"{name} is empty (0 bytes). Copy or record it again.")
        yield copy


# How a file of a kind begins: a literal, then another at some distance. Readers stop where the second file begins.
_HEADS = (
    (b"RIFF", 8, b"WAVE"), (b"RF64", 8, b"WAVE"), (b"FORM", 8, b"AIF"), (b"riff\x2e\x91\xcf\x11", 24, b"wave"),
    (b"caff\0\1\0\0", 8, b"desc"), (b"FLV\1", 5, b"\0\0\0\t"), (b"fLaC", 4, b"\0\0\0\x22"),
)  # fmt: skip


def joined_parts(path: Path | str) -> list[tuple[int, int]]:
    """Begin and end in bytes of each file that was joined into this one, as by `cat`; one for any other file.

    Recognised are those whose readers stop at the end of the first file: WAV, AIFF, Wave64, CAF, FLAC, FLV, MP4.
    """
    found = os.stat(path)
    return _joined_parts(path, found.st_size, found.st_mtime_ns)


@lru_cache(64)
def _joined_parts(path: Path | str, size: int, _changed_ns: int) -> list[tuple[int, int]]:
    begins = [0]
    with open(path, "rb") as f:
        head = f.read(32)
        if head[4:8] == b"ftyp":
            begins = _mp4_begins(f, size)
        for literal, distance, second in _HEADS:
            if head.startswith(literal) and head.startswith(second, distance):
                begins = _begins(f, literal, distance, second)
    return list(zip(begins, [*begins[1:], size], strict=True))


def _begins(f: BinaryIO, literal: bytes, distance: int, second: bytes) -> list[int]:
    with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begins, at = [], 0
        while at >= 0:
            if data[at + distance : at + distance + len(second)] == second:
                begins.append(at)
            at = data.find(literal, at + 1)
        return begins


def _mp4_begins(f: BinaryIO, size: int) -> list[int]:
    begins, at = [], 0
    while at + 8 <= size:
        f.seek(at)
        length, kind = struct.unpack(">I4s", f.read(8))
        if kind == b"ftyp":
            begins.append(at)
        if length == 1:
            length = int.from_bytes(f.read(8), "big")
        if length < 8:
            break
        at += length
    return begins
