"""What a table is made from: clips, and the version of the code. Both are known by hashes."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import hicode
from hicode.errors import InputError
from hicode.files import sha256_of

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
# Sources that no figure depends on. A change of any other source makes every cell anew.
SURFACES = {
    *("__main__.py", "arguments.py", "cli.py", "commands.py", "demo.py", "doctor.py", "progress.py"),
    *("evaluation/page.py", "evaluation/show.py"),
}


@dataclass(frozen=True)
class Source:
    """A video, or a prepared clip."""

    name: str
    path: str
    sha256: str
    prepared: bool

    @staticmethod
    def of(path: Path) -> "Source":
        """The source at a path."""
        prepared = path.is_dir()
        return Source(path.stem, str(path.resolve()), _folder_hash(path) if prepared else sha256_of(path), prepared)


def find_sources(place: Path | str) -> list[Source]:
    """The videos and prepared clips directly in a folder, by name; or the one that `place` is.

    Raises InputError if there is none.
    """
    place = Path(place)
    if not place.exists():
        raise InputError(f"{place} does not exist. Give a folder of videos or prepared clips.")
    is_clip = lambda p: (p / "clip.json").exists() if p.is_dir() else p.suffix.lower() in VIDEO_SUFFIXES
    paths = [place] if is_clip(place) else sorted(filter(is_clip, place.iterdir())) if place.is_dir() else []
    if not paths:
        raise InputError(
            f"{place} holds no video ({', '.join(VIDEO_SUFFIXES)}) and no prepared clip. Give a folder that does."
        )
    sources = [Source.of(path) for path in paths]
    names = [s.name for s in sources]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise InputError(f"{place} holds two clips called {twice[0]}. Rename one: tables name clips by it.")
    return sources


def code_version() -> str:
    """Hash of the package's sources and weights on disk, without SURFACES."""
    root = Path(hicode.__file__).parent
    files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*"))}
    kinds = (".py", ".safetensors", ".json")
    return digest({name: sha256_of(p) for name, p in files.items() if p.suffix in kinds and name not in SURFACES})


def digest(value: object) -> str:
    """20 hex digits of JSON content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:20]


def _folder_hash(path: Path) -> str:
    """Hash of a prepared clip without its speech features, which are made from the sound on first use."""
    features = lambda p: p.name.startswith("audio.") and p.suffix == ".safetensors"
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not features(p)]
    lines = "".join(f"{p.relative_to(path).as_posix()} {sha256_of(p)}\n" for p in files)
    return hashlib.sha256(lines.encode()).hexdigest()
