"""Where media comes from: any path, pipe, bytes or file object, as a file that FFmpeg can open."""

import io
import os
import shutil
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Protocol, cast, runtime_checkable

import av
import av.container
import av.error

from hicode.errors import InputError, OutputError
from hicode.files import temporary_folder

_COPY_BYTES = 1 << 20
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
        container = av.open(url)
    except (av.error.FFmpegError, ValueError) as error:
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


def joined_parts(path: Path | str) -> list[tuple[int, int]]:
    """Begin and end in bytes of each file that was joined into this one, as by `cat`; one for any other file.

    WAV and MP4 are recognised: their readers stop at the end of the first file.
    """
    size = os.stat(path).st_size
    with open(path, "rb") as f:
        head = f.read(12)
        if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
            begins = _wav_begins(f, size)
        elif head[4:8] == b"ftyp":
            begins = _mp4_begins(f, size)
        else:
            begins = [0]
    return list(zip(begins, [*begins[1:], size], strict=True))


def _wav_begins(f: BinaryIO, size: int) -> list[int]:
    begins, at = [], 0
    while at + 12 <= size:
        f.seek(at)
        head = f.read(12)
        if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
            break
        begins.append(at)
        at += 8 + struct.unpack("<I", head[4:8])[0]
        f.seek(min(at, size))
        at += f.read(1) == b"\0"  # an odd chunk is padded
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
