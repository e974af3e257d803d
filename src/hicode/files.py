"""Files: written whole or not at all, versioned, self-describing, never pickles.

A `*.safetensors` file written here has a header with `schema`, `version`, `config` (JSON) and the SHA-256 of all its
bytes. A file that is damaged, of another kind or of another version is refused; the error names the file and the
reason.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hicode.errors import FileFormatError, OutputError

CHECKSUM = "checksum"  # SHA-256, in the header of a safetensors file and in a sealed JSON file
_NO_CHECKSUM = 64 * "0"
TEMPORARY = ".hicode-tmp-"  # how the names of temporary folders begin

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def _os_error(path: Path, error: OSError) -> OutputError:
    if error.errno == errno.ENOSPC:
        return OutputError(f"Disk full while writing {path}. Free some space, or write elsewhere.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"Cannot write {path}: no permission. Choose another place with -o.")
    return OutputError(f"Cannot write {path}: {error.strerror or error}. Choose another place with -o.")


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A path of the same name in a temporary folder next to `path`. On success what is there is synced and renamed to
    `path`; on failure it is removed.

    Raises OutputError if the place is not writable.
    """
    path = Path(path)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(temporary_folder(path.parent)) / path.name
        except OSError as error:
            raise _os_error(path, error) from error
        try:
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or error.errno is None:
                raise
            raise _os_error(path, error) from error


@contextmanager
def temporary_folder(parent: Path | str | None = None) -> Iterator[Path]:
    """A hidden folder in `parent`, or in the system's place for temporary files; removed at the end.

    It is locked, and the lock ends with the process: those that killed processes left are removed first. Raises OSError
    where none can be made.
    """
    place = Path(parent or tempfile.gettempdir())
    remove_leftovers(place)
    folder, lock = _new_folder(place)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _new_folder(place: Path) -> tuple[Path, int | None]:
    """A new temporary folder, and the open descriptor that holds its lock, where there are locks."""
    while True:
        folder = place / f"{TEMPORARY}{secrets.token_hex(6)}"
        folder.mkdir(0o700)
        if fcntl is None:
            return folder, None
        with suppress(FileNotFoundError):  # taken for a leftover before it was locked
            lock = os.open(folder, os.O_RDONLY)
            if _lock(lock):
                return folder, lock
            os.close(lock)


def remove_leftovers(place: Path) -> None:
    """Remove temporary folders whose process was killed: nobody holds their locks."""
    if fcntl is None:
        return
    for old in place.glob(f"{TEMPORARY}{12 * '[0-9a-f]'}"):
        with suppress(OSError):
            descriptor = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file, which ends with the process; False if another has it. Without locks, True."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextmanager
def in_use(folder: Path | str) -> Iterator[None]:
    """Hold a folder, which may be still to be made, for this process.

    A lock file next to it names the process. Raises OutputError where another process holds the folder. Where no lock
    file can be made, nothing is held.
    """
    folder = Path(os.path.abspath(folder))
    file = folder.parent / f".{folder.name}.lock"
    descriptor = _open_lock(file)
    if descriptor is None:
        yield  # what is wrong with the place is said by who writes there
        return
    held = _lock(descriptor)
    try:
        if not held:
            other = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            raise OutputError(
                f"{folder} is in use by another hicode (process {other}). Wait for it, or choose another place with -o."
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        if held:
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _open_lock(file: Path) -> int | None:
    """The descriptor of a lock file; None where none can be made."""
    if fcntl is None:
        return None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        return os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:
        return None


def check_writable(path: Path | str) -> None:
    """Raise OutputError if `path` cannot be written: call it before long work."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, not a file. Give a file name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(path.parent) as folder:
            (folder / path.name).touch()
    except OSError as error:
        raise _os_error(path, error) from error


def check_free_space(folder: Path, need_bytes: int) -> None:
    """Raise OutputError if the disk of `folder` has less than `need_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise OutputError(
            f"{folder} has {free / 1e6:.0f} MB free, {need_bytes / 1e6:.0f} MB are needed. Free some space."
        )


def sha256_of(path: Path | str) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: Path | str, value, sealed: bool = False) -> None:
    """Write a value as JSON, atomically. NaN and infinity are refused (ValueError).

    A sealed object has a checksum of its contents, which `read_json` checks.
    """
    if sealed:
        value = value | {CHECKSUM: _json_checksum(value)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def _json_checksum(value: dict) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path | str, schema: str | None = None, version: int = 1) -> dict:
    """Parsed JSON. With `schema`, checks the fields `schema` and `version`. Raises FileFormatError."""
    path = Path(path)
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileFormatError(f"{path} does not exist. Check the path.") from error
    except (ValueError, RecursionError, OSError) as error:
        raise FileFormatError(f"{path} is not readable JSON ({error}). The file is damaged: make it anew.") from error
    if isinstance(value, dict) and CHECKSUM in value:
        stated = value.pop(CHECKSUM)
        if stated != _json_checksum(value):
            raise FileFormatError(f"{path} is damaged or was edited: its checksum differs. Make it anew.")
    if schema is not None:
        _check(path, value if isinstance(value, dict) else {}, schema, version)
    return value


def save_tensors(
    path: Path | str,
    tensors: Mapping[str, Tensor] | Mapping[str, np.ndarray] | Mapping[str, Tensor | np.ndarray],
    schema: str,
    version: int,
    config: dict | None = None,
) -> None:
    """Write one safetensors file, atomically; its header has schema, version, config and checksum.

    Equal contents give equal bytes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save, save_file

    header = {"schema": schema, "version": str(version), "config": json.dumps(config or {}, sort_keys=True)}
    header[CHECKSUM] = _NO_CHECKSUM
    out = {k: torch.as_tensor(v).detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            if _is_utf8(temporary):
                save_file(out, str(temporary), metadata=header)
            else:  # the library takes no other name
                temporary.write_bytes(save(out, header))
        except SafetensorError as error:  # it says the system's error in words only
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
        _finish_header(temporary)


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _finish_header(path: Path) -> None:
    """Sort the metadata of the header in place, and put in the checksum.

    The library writes it in a random order, so files with equal contents would have different hashes.
    """
    with open(path, "rb+") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length, (len(text), length)  # a reordering is as long as what it reorders
        f.seek(8)
        f.write(text)
        f.seek(0)
        checksum = hashlib.file_digest(f, "sha256").hexdigest()
        header["__metadata__"][CHECKSUM] = checksum
        f.seek(8)
        f.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def is_intact(path: Path) -> bool:
    """Whether a safetensors file has the checksum that it states. Without one, or a header at all, True."""
    with open(path, "rb") as f:
        start = f.read(8)
        text = f.read(min(int.from_bytes(start, "little"), os.fstat(f.fileno()).st_size))
        try:
            stated = json.loads(text)["__metadata__"][CHECKSUM]
        except (ValueError, KeyError, TypeError, RecursionError):
            return True  # an older or another file: what is wrong with it is found by who parses it
        zeros = text.replace(str(stated).encode(), _NO_CHECKSUM.encode(), 1)
        digest = hashlib.sha256(start + zeros)
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == stated


def load_tensors(path: Path | str, schema: str, version: int) -> tuple[dict[str, Tensor], dict]:
    """(tensors, config) of a file that `save_tensors` wrote. Raises FileFormatError for any other file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.exists():
        raise FileFormatError(f"{path} does not exist. Check the path.")
    if path.is_dir():
        raise FileFormatError(f"{path} is a folder, not a {schema} file. Name the file itself.")
    if not path.is_file():
        raise FileFormatError(f"{path} is a pipe or a device, not a {schema} file. Copy it to a file first.")
    try:
        if not is_intact(path):
            raise FileFormatError(f"{path} is damaged: its checksum differs. Delete it, and make it anew.")
        with (
            open(path, "rb") as file,
            safe_open(str(path) if _is_utf8(path) else f"/dev/fd/{file.fileno()}", framework="pt") as f,
        ):
            header = f.metadata() or {}
            _check(path, header, schema, version)
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(header.get("config", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is damaged or not a {schema} file ({error}). Give the right file, or make it anew."
        ) from error


def _check(path: Path, header: dict, schema: str, version: int) -> None:
    found = header.get("schema")
    if found != schema:
        raise FileFormatError(f"{path} is not a {schema} file (it says: {found or 'nothing'}). Give the right file.")
    try:
        number = int(header.get("version", ""))
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path} names no version. The file is damaged: make it anew.") from error
    if number > version:
        raise FileFormatError(f"{path} is {schema} version {number}; this hicode reads up to {version}. Update hicode.")
    if number < version:
        raise FileFormatError(
            f"{path} is {schema} version {number}, older than {version} and without an upgrade. Make it anew."
        )
