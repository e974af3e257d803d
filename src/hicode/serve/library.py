"""The folder of avatars: names, thumbnails, renaming, deleting, uploads. Nothing outside the folder is ever touched."""

import io
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from hicode.errors import HicodeError, InputError

SUFFIX = ".hicode"
THUMBNAIL_FRAMES, THUMBNAIL_SIZE = 12, 192
_NAME = re.compile(r"[\w][\w .'()+-]{0,63}", re.UNICODE)
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def checked_name(name: object) -> str:
    """A name that is one file's, in this folder. InputError for anything else."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _RESERVED.fullmatch(name) or name.rstrip(". ") != name:
        raise InputError("This name cannot be used. Choose letters, digits, spaces and -, at most 64.")
    return name


@dataclass(frozen=True)
class Entry:
    """One avatar of the gallery; `problem` says why it cannot be used."""

    name: str
    seconds: float
    consent: str
    problem: str = ""

    def to_dict(self) -> dict:
        """For the page."""
        thumbnail = f"/api/avatars/{quote(self.name)}/thumbnail"
        return {**self.__dict__, "thumbnail": "" if self.problem else thumbnail}


class Library:
    """The avatars in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._entries: dict[tuple[str, int], Entry] = {}
        self._thumbnails: dict[tuple[str, int], bytes] = {}
        self._lock = threading.Lock()

    def path(self, name: object) -> Path:
        """The file of an avatar. InputError where there is none."""
        path = self.folder / (checked_name(name) + SUFFIX)
        if not path.is_file():
            raise InputError(f"There is no avatar {name!r} here. Choose one of the gallery.")
        return path

    def entries(self) -> list[Entry]:
        """All avatars, by name; those that cannot be used say why."""
        out = []
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if _NAME.fullmatch(path.stem) and path.is_file():
                key = path.stem, path.stat().st_mtime_ns
                if key not in self._entries:
                    self._entries[key] = _describe(path)
                out.append(self._entries[key])
        return out

    def thumbnail(self, name: object) -> bytes:
        """A moving WebP of the driving frames."""
        path = self.path(name)
        key = path.stem, path.stat().st_mtime_ns
        with self._lock:
            if key not in self._thumbnails:
                self._thumbnails[key] = _thumbnail(path)
        return self._thumbnails[key]

    def rename(self, name: object, to: object) -> None:
        """Give an avatar another name, which must be free."""
        path, target = self.path(name), self.folder / (checked_name(to) + SUFFIX)
        if target.exists():
            raise InputError(f"There is an avatar {to!r} already. Choose another name.")
        path.rename(target)

    def delete(self, name: object) -> None:
        """Remove an avatar's file."""
        self.path(name).unlink()


def _describe(path: Path) -> Entry:
    from hicode.avatar.avatar import Avatar

    try:
        avatar = Avatar.load(path)
    except HicodeError as error:
        return Entry(path.stem, 0.0, "", str(error).replace(str(path), path.name))
    consent = (avatar.info.get("consent") or {}).get("statement", "not stated")
    problem = "" if avatar.speech is not None else "It has no speech models: its video had no sound."
    return Entry(path.stem, round(len(avatar.driving) / avatar.driving.fps, 1), consent, problem)


def _thumbnail(path: Path) -> bytes:
    import av

    from hicode.avatar.avatar import Avatar

    avatar = Avatar.load(path)
    out = io.BytesIO()
    with av.open(out, "w", format="webp", options={"loop": "0"}) as container:
        stream = container.add_stream("libwebp_anim", rate=8, options={"quality": "60"})
        stream.width = stream.height = THUMBNAIL_SIZE
        stream.pix_fmt = "yuv420p"
        frames = min(len(avatar.driving), 3 * THUMBNAIL_FRAMES)
        for t in range(0, frames, 3):
            frame = av.VideoFrame.from_ndarray(avatar.driving_frame(t), format="rgb24")
            container.mux(stream.encode(frame.reformat(THUMBNAIL_SIZE, THUMBNAIL_SIZE, "yuv420p")))
        container.mux(stream.encode(None))
    return out.getvalue()
