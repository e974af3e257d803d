"""The speakers of pre-training: a manifest, or any folder of videos.

A manifest is TOML. Patterns are relative to the folders it is used with:

    anchor = "grid-s1"                    # optional: a speaker in sync; offsets of the others are measured against it

    [[source]]
    speaker = "jane"
    pattern = "jane/*.mp4"
    terms = "CC BY 4.0"
    evaluated = false                     # is in an evaluation clip: not used for the sync model
    learn = true                          # the terms allow learning weights from it
    test_part = false                     # the last 1/11 of each clip is never learned from

Without a manifest, each video directly in a folder is one speaker, each sub-folder is one speaker with several clips.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from hicode.errors import InputError
from hicode.preparation.clip import split

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp")
OWN_TERMS = "the user's own"
MANIFEST = "sources.toml"
_KEYS = {"speaker": str, "pattern": str, "terms": str, "evaluated": bool, "learn": bool, "test_part": bool}


@dataclass(frozen=True)
class LeftOut:
    """What is not learned from, and why. clip: "" where it is all of the speaker's."""

    speaker: str
    clip: str
    reason: str

    def __str__(self) -> str:
        return f"{self.speaker}{f', {self.clip}' if self.clip else ''}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """One speaker: clips by name, terms, and what may be done with them (see the module)."""

    speaker: str
    clips: dict[str, Path]
    terms: str = OWN_TERMS
    evaluated: bool = False
    learn: bool = True
    test_part: bool = False

    def learned_frames(self, frames: int) -> int:
        """How many of a clip's frames may be learned from."""
        return len(split(frames)[0]) if self.test_part else frames

    def at_most(self, clips: int) -> "Source":
        """So many of the clips, always the same ones."""
        if len(self.clips) <= clips:
            return self
        names = list(self.clips)
        return replace(
            self,
            clips={names[i]: self.clips[names[i]] for i in np.random.default_rng(0).permutation(len(names))[:clips]},
        )


@dataclass(frozen=True)
class Sources:
    """Speakers, who of them is in sync by definition, and what could not be found."""

    speakers: tuple[Source, ...]
    anchor: str | None = None
    missing: tuple[LeftOut, ...] = field(default=())


def find_sources(folders: Sequence[Path | str], manifest: Path | str | None = None) -> Sources:
    """The speakers in folders, by a manifest (given, or sources.toml in the only folder), or else one per video or
    sub-folder.

    Raises InputError if a folder does not exist or the manifest is wrong.
    """
    folders = [Path(f) for f in folders]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{folder} is {'not a folder' if folder.exists() else 'not there'}. Give folders of videos."
            )
    if not folders:
        raise InputError("No folder to learn from. Give one or more folders of videos.")
    if manifest is None and len(folders) == 1 and (folders[0] / MANIFEST).is_file():
        manifest = folders[0] / MANIFEST
    return read_manifest(manifest, folders) if manifest is not None else by_folder(folders)


def read_manifest(file: Path | str, folders: Sequence[Path]) -> Sources:
    """The sources that a manifest names, as far as the folders have them."""
    file = Path(file)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}). Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not TOML ({error}). Repair that line.") from error
    unknown = sorted(table.keys() - {"anchor", "source"})
    if unknown:
        raise InputError(f"{file} has {unknown[0]!r}, which means nothing here. There are: anchor, [[source]].")
    rows = table.get("source", [])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file} names no source. Add [[source]] with speaker, pattern and terms.")
    speakers, missing, seen = [], [], set()
    for number, row in enumerate(rows, 1):
        where = f"Source {number} of {file}"
        if unknown := sorted(row.keys() - _KEYS.keys()):
            raise InputError(f"{where} has {unknown[0]!r}, which means nothing here. There are: {', '.join(_KEYS)}.")
        for key, kind in _KEYS.items():
            if key in row and not isinstance(row[key], kind):
                raise InputError(
                    f"{where} has {key} = {row[key]!r}. Write {'true or false' if kind is bool else 'a text'}."
                )
            if kind is str and not row.get(key, "").strip():
                raise InputError(f"{where} does not say its {key}. Add {key} = ...")
        speaker, pattern = _name(row["speaker"]), row["pattern"]
        if speaker in seen:
            raise InputError(f"{where} names the speaker {row['speaker']!r} a second time. Join both, or rename one.")
        seen.add(speaker)
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise InputError(f"{where} has the pattern {pattern!r}, which leaves the folder. Give one relative to it.")
        paths = [p for folder in folders for p in sorted(folder.glob(pattern)) if p.suffix.lower() in VIDEO_SUFFIXES]
        if paths:
            speakers.append(
                Source(speaker, _named(paths), **{k: v for k, v in row.items() if k not in ("speaker", "pattern")})
            )
        else:
            missing.append(LeftOut(speaker, "", f"no video matches {pattern}"))
    anchor = table.get("anchor")
    if anchor is not None:
        named = {_name(row["speaker"]): row for row in rows}
        if not isinstance(anchor, str) or _name(anchor) not in named:
            raise InputError(
                f"{file} has the anchor {anchor!r}, which is none of its speakers. Name one of them, or none."
            )
        if not named[_name(anchor)].get("learn", True):
            raise InputError(f"{file} has the anchor {anchor!r}, which may not be learned from. Name another, or none.")
        anchor = _name(anchor)
    return Sources(tuple(speakers), anchor, tuple(missing))


def by_folder(folders: Sequence[Path]) -> Sources:
    """Videos directly in a folder are a speaker each, sub-folders are a speaker each."""
    found: list[tuple[Path, str, list[Path]]] = []
    for folder in folders:
        inside = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".")]
        found += [(folder, p.stem, [p]) for p in inside if p.is_file() and p.suffix.lower() in VIDEO_SUFFIXES]
        for sub in (p for p in inside if p.is_dir()):
            videos = [p for p in sorted(sub.rglob("*")) if p.is_file() and p.suffix.lower() in VIDEO_SUFFIXES]
            found += [(folder, sub.name, videos)] if videos else []
    if not found:
        raise InputError(
            f"No video in {', '.join(map(str, folders))}. Give folders of videos ({', '.join(VIDEO_SUFFIXES[:6])}, "
            "...)."
        )
    names = [name for _, name, _ in found]
    speakers: dict[str, Source] = {}
    for folder, name, paths in found:
        speaker = _name(name if names.count(name) == 1 else f"{folder.resolve().name}-{name}")
        if speaker in speakers:
            raise InputError(f"Two speakers are called {speaker!r} (one is {paths[0]}). Rename a file or a folder.")
        speakers[speaker] = Source(speaker, _named(paths))
    return Sources(tuple(speakers.values()))


def _name(text: str) -> str:
    """A speaker's or clip's name as part of a file's: `~` parts the two."""
    return "".join("-" if c in '~/\\:*?"<>|\0' else c for c in text.strip())


def _named(paths: list[Path]) -> dict[str, Path]:
    """Clips by their stems; by more of their path where two have the same."""
    stems = [p.stem for p in paths]
    out: dict[str, Path] = {}
    for path in paths:
        name = _name(path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}-{path.name}")
        while name in out:
            name += "-2"
        out[name] = path
    return out
