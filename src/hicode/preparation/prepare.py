"""From a video file to a `Clip`: decode, crop, landmarks, track, masks, depth, sound, capture report.

Each step writes its result and records in `clip.json` the settings and the upstream steps that made it. A rerun skips
every step whose record still holds; a killed run goes on after its last finished step. A step's files appear under
their names only when they are whole.

t frames at 25 fps. "Source" pixels are the upright video's, "crop" pixels those of the square that is kept: one box per
clip, so it cannot jitter.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8

from hicode.audio import FPS, SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.errors import FileFormatError, HicodeError, InputError, OutputError
from hicode.files import check_free_space, load_tensors, read_json, save_tensors, sha256_of, write_json
from hicode.media.audio import level_db, read_audio, write_audio
from hicode.media.video import VideoInfo, probe, read_video
from hicode.motion import LEFT_EYE_OUTER, LOWER_LIP_INNER, RIGHT_EYE_OUTER, UPPER_LIP_INNER, FaceTrack
from hicode.motion import MOUTH_CORNERS_INNER as MOUTH_CORNERS
from hicode.preparation.clip import (
    FEATURES_SCHEMA,
    SCHEMA,
    VERSION,
    Clip,
    frame_features,
    load_track,
    read_png,
    save_track,
    shift_audio,
    split,
    write_png,
)  # fmt: skip
from hicode.progress import progress_bar
from hicode.runtime import require_memory_for_frames, tune_allocator

_SILENT_DB = -60.0
_QUIET_FRAME_DB = -45.0


@dataclass(frozen=True)
class PrepareConfig:
    """How a video becomes a clip."""

    size: int = 512
    """Side of the square crop in px. A multiple of 16."""
    start: float = 0.0
    """Seconds to leave out at the beginning."""
    duration: float | None = None
    """Seconds to use; the whole video if not given."""
    encoder: Literal["embedded", "hubert", "logmel"] = "embedded"
    """Whose speech features are stored beside the clip."""
    max_missing: float = 0.1
    """Largest share of frames that may lack a face; they are interpolated."""
    max_light: float = 1.6
    """Largest factor by which the face's brightness may change along the video: one colour a place is learned."""
    min_seconds: float = 2.0
    """Shortest video that is accepted."""
    min_face: int = 100
    """Faces smaller than this many source px are warned about."""


@dataclass
class _Work:
    """One run: where it writes, what holds, what it says."""

    folder: Path
    config: PrepareConfig
    state: dict
    show: bool

    def step(
        self,
        name: str,
        version: int,
        settings: dict,
        after: tuple[str, ...],
        files: tuple[str, ...],
        work: Callable[[], dict],
    ) -> dict:
        """The step's recorded result where its settings, its upstream steps and its files are the same as then; else do
        it and record it.

        `version` counts changes of the code that alter results.
        """
        steps = self.state["steps"]
        described = {"version": version, **settings}
        upstream = {other: steps[other]["id"] for other in after}
        identity = hashlib.sha256(json.dumps([name, described, upstream], sort_keys=True).encode()).hexdigest()[:16]
        record = steps.get(name)
        if record and record["id"] == identity and all((self.folder / f).exists() for f in files):
            return record["result"]
        if self.state["complete"]:
            self.state["complete"] = False
            self.save()
        started = time.perf_counter()
        result = work()
        seconds = round(time.perf_counter() - started, 2)
        steps[name] = {
            "id": identity,
            "settings": described,
            "after": sorted(after),
            "seconds": seconds,
            "result": result,
        }
        self.save()
        return result

    def save(self) -> None:
        write_json(self.folder / "clip.json", self.state)


def prepare(video: Path | str, out: Path | str, config: PrepareConfig = PrepareConfig(), progress: bool = True) -> Clip:
    """Make the clip `out` from a video, or finish one that was begun; returns it opened.

    Raises InputError where the video cannot serve (its message says why and what helps), OutputError where `out` cannot
    be written. A new folder that failed is removed; an interrupted one stays, and the same call goes on with it.
    """
    video, out = Path(video), Path(out)
    _check_config(config)
    info = probe(video)
    _check_length(info, config)
    _check_memory(info, config)
    tune_allocator()
    source = {"name": video.name, "path": str(video.resolve()), "sha256": sha256_of(video)}
    created = not out.exists()
    state = _open_state(out, video, source)
    work = _Work(out, config, state, progress)
    try:
        _make_folder(out)
        _steps(work, video, info, source)
    except HicodeError:
        if created:
            shutil.rmtree(out, ignore_errors=True)
        raise
    except OSError as error:
        if created:
            shutil.rmtree(out, ignore_errors=True)
        raise OutputError(
            f"Cannot write {out}: {error.strerror or error}. Free some space, or choose another place with -o."
        ) from error
    if progress:
        print_report(work.state["report"])
    return Clip.open(out)


def _steps(work: _Work, video: Path, info: VideoInfo, source: dict) -> None:
    config, state = work.config, work.state
    cut = {"start": config.start, "duration": config.duration, "sha256": source["sha256"]}

    faces = work.step("faces", 1, cut, (), (), lambda: _find_faces(work, video, info))
    _check_light(faces["light"], video, config)
    crop_settings = {"size": config.size}
    crop = work.step("crop", 1, crop_settings, ("faces",), ("frames",), lambda: _write_frames(work, video, info, faces))
    count = crop["frame_count"]
    train, test = split(count)
    state.update(
        fps=FPS,
        frame_count=count,
        width=config.size,
        height=config.size,
        train=[train.start, train.stop],
        test=[test.start, test.stop],
        crop_box=crop["box"],
    )
    limits = {"max_missing": config.max_missing}
    found = work.step(
        "landmarks", 2, limits, ("crop",), ("landmarks.safetensors",), lambda: _find_landmarks(work, video, count)
    )
    fitted = work.step("fit", 1, {}, ("landmarks",), ("fit.safetensors",), lambda: _fit(work, train))
    work.step("masks", 2, {}, ("fit",), ("masks/person", "masks/head"), lambda: _segment(work, train, count))
    aligned = ("track.safetensors", "skull.safetensors")
    work.step("track", 6, {}, ("fit", "masks"), aligned, lambda: _align(work, train))
    work.step("depth", 3, {}, ("track",), ("depth.safetensors",), lambda: _depth(work, train))
    sound = work.step("sound", 1, cut, ("crop",), (), lambda: _sound(work, video, count))
    state.update(has_audio=sound["usable"], audio_offset_frames=0.0)
    if sound["usable"]:
        encoder = {"encoder": config.encoder}
        offset = work.step("offset", 4, {}, ("sound", "track"), (), lambda: _offset(work, train))
        state["audio_offset_frames"] = offset["frames"]
        features = f"audio.{config.encoder}.safetensors"
        work.step(
            "features", 3, encoder, ("sound", "offset"), (features,), lambda: _features(work, count, offset["frames"])
        )
    else:
        offset = None
    report = work.step(
        "report", 2, {"min_face": config.min_face}, ("track", "masks", "sound", *(("offset",) if offset else ())), (),
        lambda: _report(work, info, faces, crop, found, fitted, sound, offset),
    )  # fmt: skip
    state.update(report=report, complete=True)
    work.save()


# --- before anything is written ---------------------------------------------------------------------------------------


def _check_config(config: PrepareConfig) -> None:
    if config.size % 16 or not 128 <= config.size <= 1024:
        raise InputError(f"--size {config.size} is not a multiple of 16 from 128 to 1024. The usual size is 512.")
    if not config.max_light >= 1:
        raise InputError(f"--max-light {config.max_light} is not a factor from 1 on. The usual factor is 1.6.")
    if not 0 <= config.max_missing < 1:
        raise InputError(
            f"--max-missing {config.max_missing} is not a share of frames from 0 to 1. The usual share is 0.1."
        )
    if config.start < 0:
        raise InputError(f"--start {config.start} is negative. Give seconds from the beginning.")
    if config.duration is not None and config.duration < config.min_seconds:
        raise InputError(
            f"--duration {config.duration} is shorter than {config.min_seconds:g} s. Use more of the video."
        )
    encoders = get_args(get_type_hints(PrepareConfig)["encoder"])
    if config.encoder not in encoders:
        raise InputError(f"No speech encoder is called {config.encoder!r}. There are: {', '.join(encoders)}.")


def _check_length(info: VideoInfo, config: PrepareConfig) -> None:
    if info.duration_s is not None and info.duration_s - config.start < config.min_seconds - 0.5 / FPS:
        rest = f" after --start {config.start:g}" if config.start else ""
        raise InputError(
            f"{info.path} is {max(info.duration_s - config.start, 0):.1f} s long{rest}; at least "
            f"{config.min_seconds:g} s are needed, a minute is better. "
            "Give a longer video."
        )


# Memory of preparing (measured: 0.6 GB at 512 px and 5 s): of the program, of a crop's pixel, of a source pixel (decoding and converting hold a few
# frames), and of each frame's landmarks, flow and fit; pictures go to disk one by one.
_PROGRAM_BYTES, _CROP_PIXEL_BYTES, _SOURCE_PIXEL_BYTES, _FRAME_BYTES = 0.55e9, 400, 30, 100e3


def _check_memory(info: VideoInfo, config: PrepareConfig) -> None:
    """Raise ResourceError where the video is too long, or too large, for the memory that is left."""
    if info.duration_s is None:
        return
    frames = _expected_frames(info, config)
    fixed = _PROGRAM_BYTES + _CROP_PIXEL_BYTES * config.size**2 + _SOURCE_PIXEL_BYTES * info.width * info.height
    require_memory_for_frames(frames, FPS, fixed, _FRAME_BYTES, f"Preparing {frames} frames of {info.path}")


def _open_state(out: Path, video: Path, source: dict) -> dict:
    """The records of an earlier run on this folder, or fresh ones. Refuses folders that are not ours or hold another
    video's clip.
    """
    fresh = {
        "schema": SCHEMA,
        "version": VERSION,
        "complete": False,
        "video": str(video),
        "source": source,
        "steps": {},
    }
    if not out.exists():
        return fresh
    if not out.is_dir():
        raise OutputError(f"{out} is a file; a clip is a folder. Choose another name with -o.")
    if not (out / "clip.json").exists():
        if any(out.iterdir()):
            raise OutputError(f"{out} is a folder with other things in it. Choose another name with -o.")
        return fresh
    try:
        state = read_json(out / "clip.json", SCHEMA, VERSION)
    except FileFormatError as error:
        raise OutputError(f"{error} Or choose another name with -o.") from error
    if state["source"]["sha256"] != source["sha256"]:
        raise OutputError(
            f"{out} is the clip of another video ({state['source']['name']}). Choose another name with -o, or delete "
            "it."
        )
    state.update(video=str(video), source=source)
    return state


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe_file = out / ".writable"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}. Choose another place with -o.") from error


# --- decoding and the crop --------------------------------------------------------------------------------------------

_LOOK_EVERY = 5  # frames between two looks for faces
_LOOK_SIZE = 640  # px of the longer side in which faces are looked for
# Margins around the detector's box (brows to chin, ear to ear) in its sizes: hair above, neck below, hair and turns
# beside.
_ABOVE, _BELOW, _BESIDE = 0.7, 0.35, 0.5
_FILLS = 0.4  # a square video whose face takes this share of its side is a head crop already
_STAYS = 0.5  # a person is a candidate when there in this share of the frames of the most constant one
_BYSTANDER = 0.15  # a further face is worth a word when there in this share of the frames


def _cut(frames: Iterable[np.ndarray], config: PrepareConfig) -> Iterator[np.ndarray]:
    """The frames from `start` for `duration` seconds."""
    first = round(config.start * FPS)
    last = None if config.duration is None else first + round(config.duration * FPS)
    for i, frame in enumerate(frames):
        if last is not None and i >= last:
            return
        if i >= first:
            yield frame


def _expected_frames(info: VideoInfo, config: PrepareConfig) -> int:
    seconds = (info.duration_s or 0.0) - config.start
    return max(1, round(min(seconds, config.duration or seconds) * FPS))


def _find_faces(work: _Work, video: Path, info: VideoInfo) -> dict:
    """Who is in the video: the face that is followed, as boxes in source px over looks every few frames, and who else
    is there.
    """
    from hicode.tracking.landmarks import FaceLandmarker

    landmarker = FaceLandmarker()
    expected = _expected_frames(info, work.config)
    looks, count, scale = [], 0, 1.0
    light: dict[tuple, float] = {}
    with progress_bar("Looking for faces", work.show) as report:
        for i, frame in enumerate(_cut(read_video(video, FPS, max_size=_LOOK_SIZE), work.config)):
            count += 1
            scale = info.width / frame.shape[1]
            if i % _LOOK_EVERY == 0:
                found = [np.array([face.x0, face.y0, face.x1, face.y1]) for face in landmarker.detect(frame)]
                looks.append([box * scale for box in found])
                light |= {tuple(box * scale): _mean_in(frame, box) for box in found}
            report(i + 1, max(expected, i + 1))
    if count < round(work.config.min_seconds * FPS):
        raise InputError(
            f"{video} has {count / FPS:.1f} s of pictures; at least {work.config.min_seconds:g} s are needed, a "
            "minute is better. Give a longer video."
        )
    people = follow_people(looks)
    if not people:
        raise InputError(
            f"No face in {video} (looked at {len(looks)} of {count} frames). Film one person from the front, in good "
            "light."
        )
    stay = max(len(person) for person in people)
    chosen = max(
        (p for p in people if len(p) >= _STAYS * stay), key=lambda p: len(p) * np.median([_size(b) for b in p.values()])
    )
    if len(chosen) < 0.5 * len(looks):
        raise InputError(
            f"A face in only {len(chosen)} of the {len(looks)} frames looked at in {video}. Trim the video with "
            "--start and --duration to where one "
            "person is seen."
        )
    others = [p for p in people if p is not chosen and len(p) >= _BYSTANDER * len(looks)]
    boxes = np.array(list(chosen.values()))
    low, high = np.percentile(boxes[:, :2], 1, axis=0), np.percentile(boxes[:, 2:], 99, axis=0)
    return {
        "frame_count": count,
        "looks": len(looks),
        "size_px": float(np.median([_size(b) for b in boxes])),
        "reach": [float(v) for v in (*low, *high)],
        "centre": [float(v) for v in np.median((boxes[:, :2] + boxes[:, 2:]) / 2, 0)],
        "others": [float(np.median([_size(b) for b in p.values()])) for p in others],
        "light": [[_LOOK_EVERY * i, round(light[tuple(box)], 1)] for i, box in chosen.items()],
    }


def _mean_in(frame: UInt8[np.ndarray, "h w 3"], box: Float[np.ndarray, "4"]) -> float:
    x0, y0 = np.clip(box[:2], 0, np.array(frame.shape[1::-1]) - 1).astype(int)
    x1, y1 = np.clip(box[2:], (x0 + 1, y0 + 1), frame.shape[1::-1]).astype(int)
    return float(frame[y0:y1, x0:x1].mean())


def _check_light(light: list[list[float]], video: Path, config: PrepareConfig) -> None:
    """Raise InputError where the face's brightness, [frame, mean] over the looks, changes so much that one colour a place says nothing.

    Measured: trained on a face that falls to 0.4 of its brightness for a while, dark patches wander over the face.
    """
    frames, means = np.array(light).T
    low, high = np.percentile(means, [5, 95])
    factor = high / max(low, 1.0)
    if factor > config.max_light:
        raise InputError(
            f"The light on the face changes by a factor of {factor:.1f} along {video} (darkest at {_clock(int(frames[means.argmin()]))}). "
            "Trim it to even light with --start and --duration, or accept patches with "
            f"--max-light {np.ceil(10 * factor) / 10:.1f}."
        )


def _size(box: Float[np.ndarray, "4"]) -> float:
    return float(max(box[2] - box[0], box[3] - box[1]))


def follow_people(looks: list[list[Float[np.ndarray, "4"]]]) -> list[dict[int, Float[np.ndarray, "4"]]]:
    """Boxes (x0, y0, x1, y1) of successive looks joined into people, each {look: box}: a box goes to the person last
    seen nearest to it.

    Nearest first, none farther than one face size away or of another size by more than half.
    """
    people: list[dict[int, np.ndarray]] = []
    for i, boxes in enumerate(looks):
        pairs = []
        for p, person in enumerate(people):
            last = person[max(person)]
            for b, box in enumerate(boxes):
                distance = np.hypot(*((last[:2] + last[2:]) / 2 - (box[:2] + box[2:]) / 2)) / _size(last)
                if distance < 1 and 1 / 1.5 < _size(box) / _size(last) < 1.5:
                    pairs.append((distance, p, b))
        taken_people, taken_boxes = set(), set()
        for _, p, b in sorted(pairs):
            if p not in taken_people and b not in taken_boxes:
                people[p][i] = boxes[b]
                taken_people.add(p)
                taken_boxes.add(b)
        people += [{i: box} for b, box in enumerate(boxes) if b not in taken_boxes]
    return people


def head_box(width: int, height: int, reach: list[float], size_px: float) -> tuple[int, int, int]:
    """(x0, y0, side) of the one square that holds head, hair and neck wherever the face goes, inside a width x height
    video.

    `reach` is the outline (x0, y0, x1, y1) of all the face's boxes. A square video that is a head crop already is kept
    whole, exactly. A head that comes nearer to the border than its margins gets what there is: no pixel is invented.
    """
    if width == height and size_px >= _FILLS * width:
        return 0, 0, width
    x0, y0, x1, y1 = reach
    left, right, top, bottom = (
        x0 - _BESIDE * size_px,
        x1 + _BESIDE * size_px,
        y0 - _ABOVE * size_px,
        y1 + _BELOW * size_px,
    )
    side = int(min(max(right - left, bottom - top), width, height))
    x = np.clip((left + right - side) / 2, 0, width - side)
    y = np.clip((top + bottom - side) / 2, 0, height - side)
    return round(float(x)), round(float(y)), side


def _write_frames(work: _Work, video: Path, info: VideoInfo, faces: dict) -> dict:
    """The crop of every frame as a lossless picture."""
    size = work.config.size
    x0, y0, side = head_box(info.width, info.height, faces["reach"], faces["size_px"])
    check_free_space(work.folder, round(faces["frame_count"] * size * size * 1.5))
    # Decoding straight to about twice the crop's resolution spares most of a 4K frame's conversion.
    scale = min(1.0, 2 * size / side)
    max_size = None if scale == 1.0 else round(max(info.width, info.height) * scale)
    count = 0
    with progress_bar("Frames", work.show) as report, _whole_folder(work.folder / "frames") as target:
        for frame in _cut(read_video(video, FPS, max_size=max_size), work.config):
            write_png(target / f"{count:06d}.png", crop_square(frame, x0 * scale, y0 * scale, side * scale, size))
            count += 1
            report(count, faces["frame_count"])
    return {"frame_count": count, "box": [x0, y0, side], "scale": size / side}


def crop_square(
    frame: UInt8[np.ndarray, "h w 3"], x0: float, y0: float, side: float, size: int
) -> UInt8[np.ndarray, "s s 3"]:
    """A square of a frame at `size` px: untouched where nothing needs scaling, area-averaged when reduced, bicubic when
    enlarged.
    """
    x, y, n = round(x0), round(y0), round(side)
    x, y = min(x, frame.shape[1] - n), min(y, frame.shape[0] - n)
    part = frame[max(y, 0) : max(y, 0) + n, max(x, 0) : max(x, 0) + n]
    if part.shape[:2] == (size, size):
        return part
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if n > size else cv2.INTER_CUBIC)


class _whole_folder:
    """A folder filled under a temporary name and renamed when it is whole; an older one of that name is replaced."""

    def __init__(self, folder: Path):
        self.folder, self.temporary = folder, folder.with_name(f".{folder.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.temporary.rename(self.folder)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


# --- the face ---------------------------------------------------------------------------------------------------------


def _frames(work: _Work, count: int, label: str) -> Iterator[np.ndarray]:
    with progress_bar(label, work.show) as report:
        for t in range(count):
            yield read_png(work.folder / "frames" / f"{t:06d}.png", grey=False)
            report(t + 1, count)


def _find_landmarks(work: _Work, video: Path, count: int) -> dict:
    from hicode.tracking.landmarks import FaceLandmarker, track_faces

    landmarks = track_faces(_frames(work, count, "Landmarks"), FaceLandmarker())
    found = np.asarray(landmarks.found)
    missing = int((~found).sum())
    first = int(np.argmax(~found)) if missing else None
    if missing > work.config.max_missing * count:
        raise InputError(
            f"No face in {missing} of {count} frames of {video} (first at {_clock(first)}). Trim it with --start and "
            "--duration, or accept gaps with "
            f"--max-missing {min(0.99, np.ceil(100 * missing / count) / 100 + 0.01):.2f}."
        )
    tensors = {"points_px": landmarks.points_px, "presence": landmarks.presence, "found": landmarks.found}
    save_tensors(work.folder / "landmarks.safetensors", tensors, "hicode-landmarks", 1)
    return {"missing": missing, "first_missing": first}


def _clock(frame: int) -> str:
    seconds = frame / FPS
    return f"{int(seconds // 60):02d}:{seconds % 60:05.2f}"


def _load_landmarks(work: _Work) -> dict:
    return load_tensors(work.folder / "landmarks.safetensors", "hicode-landmarks", 1)[0]


def _fit(work: _Work, train: range) -> dict:
    """The landmarks' track: what masks, keyframes and the rigid points start from."""
    from hicode.tracking.fit import fit_report, fit_track, track_flow
    from hicode.tracking.head_model import HeadModel

    saved = _load_landmarks(work)
    size = work.config.size
    model = HeadModel.load()
    points, found = saved["points_px"], saved["found"]
    flow = track_flow(_frames(work, len(points), "Optical flow"), points, found)
    with progress_bar("Fitting the head", work.show) as report:
        track = fit_track(
            points, found, size, size, model, train, progress=lambda done: report(round(100 * done), 100), flow=flow
        )
    save_track(work.folder / "fit.safetensors", track)
    figures = fit_report(track, model)
    return {"error_px": figures.error_px, "lips_px": figures.lips_px, "focal_px": figures.focal_px}


def _align(work: _Work, train: range) -> dict:
    """Poses from the rigid points of the whole head, then expressions and landmarks anew under them."""
    from hicode.tracking.fit import fit_report, refit_expressions
    from hicode.tracking.head_model import HeadModel
    from hicode.tracking.landmark_drift import follow_skin
    from hicode.tracking.rigid_pose import align_skull

    saved = _load_landmarks(work)
    model = HeadModel.load()
    track = load_track(work.folder / "fit.safetensors")
    image = lambda t: read_png(work.folder / f"frames/{t:06d}.png", grey=False)
    mask = lambda t: read_png(work.folder / f"masks/head/{t:06d}.png", grey=True)
    with progress_bar("Aligning the head", work.show) as report:
        poses, skull, found = align_skull(
            image, mask, track, model, train, progress=lambda done: report(round(100 * done), 100)
        )
    track = refit_expressions(track, poses, saved["points_px"], saved["found"], model, train)
    with progress_bar("Following the skin", work.show) as report:
        track, skin = follow_skin(
            image, mask, track, skull, model, train, progress=lambda done: report(round(100 * done), 100)
        )
    save_track(work.folder / "track.safetensors", track)
    save_tensors(work.folder / "skull.safetensors", skull.tensors(), "hicode-skull", 1)
    figures = fit_report(track, model)
    return {
        "matches": round(found.matches_per_frame),
        "match_px": found.residual_px,
        "turned_deg": found.turned_deg,
        "origin_mm": found.origin_mm,
        "unmatched": found.unmatched,
        "skin_matches": skin.matches,
        "skin_px": skin.moved_px,
        "jitter_deg": figures.jitter_deg,
        "jitter_px": figures.jitter_px,
    }


def _segment(work: _Work, train: range, count: int) -> dict:
    from hicode.tracking.masks import Segmenter, head_mask

    segmenter = Segmenter()
    points = load_track(work.folder / "fit.safetensors").landmarks_px.numpy()
    with _whole_folder(work.folder / "masks") as target:
        person, head = target / "person", target / "head"
        person.mkdir()
        head.mkdir()
        for t, mask in enumerate(segmenter.persons(_frames(work, count, "Person masks"))):
            write_png(person / f"{t:06d}.png", mask)
        with progress_bar("Head masks", work.show) as report:
            for t in range(count):
                mask = head_mask(read_png(person / f"{t:06d}.png", grey=True), points[t])
                write_png(head / f"{t:06d}.png", mask)
                report(t + 1, count)
    return {}


_DEPTH_VIEWS, _DEPTH_SPACING_DEG = 5, 6.0  # frames that the cloud starts from, and how far apart they look at the head


def _depth(work: _Work, train: range) -> dict:
    """Depth of the first training frame and of those that show the head from other sides."""
    from hicode.tracking.depth import head_depth
    from hicode.tracking.head_model import HeadModel
    from hicode.tracking.rigid_pose import Skull, choose_keyframes, corrected_depth

    track, model = load_track(work.folder / "track.safetensors"), HeadModel.load()
    skull = Skull(**load_tensors(work.folder / "skull.safetensors", "hicode-skull", 1)[0])
    seen = np.array([t for t in train if track.confidence[t] > 0 or t == train.start])
    frames = choose_keyframes(track.motion.T_camera_head.double().numpy(), seen, _DEPTH_VIEWS, _DEPTH_SPACING_DEG)
    depths = []
    for t in frames:
        mask = read_png(work.folder / f"masks/head/{t:06d}.png", grey=True)
        depths.append(corrected_depth(head_depth(model, track, int(t), mask), skull, track, int(t)))
    tensors = {"frames": torch.from_numpy(frames), "depth": torch.from_numpy(np.stack(depths))}
    save_tensors(work.folder / "depth.safetensors", tensors, "hicode-depth", 2)
    return {"frames": frames.tolist()}


# --- the sound --------------------------------------------------------------------------------------------------------


def _sound(work: _Work, video: Path, count: int) -> dict:
    """The sound as recorded, cut as the pictures are."""
    samples = read_audio(video)
    (work.folder / "audio.wav").unlink(missing_ok=True)
    if samples is None:
        return {"usable": False, "present": False}
    first = round(work.config.start * SAMPLE_RATE_HZ)
    samples = shift_audio(samples[first:], 0.0, count)
    loudest = level_db(samples)
    if loudest < _SILENT_DB:
        return {"usable": False, "present": True, "loudest_db": round(loudest, 1)}
    write_audio(work.folder / "audio.wav", samples, SAMPLE_RATE_HZ)
    power = (samples.reshape(count, SAMPLES_PER_FRAME).astype(np.float64) ** 2).mean(1)
    quiet = float((10 * np.log10(np.maximum(power, 1e-12)) < loudest + _QUIET_FRAME_DB).mean())
    clipped = float((np.abs(samples) > 0.999).mean())
    return {
        "usable": True,
        "present": True,
        "loudest_db": round(loudest, 1),
        "quiet": round(quiet, 3),
        "clipped": round(clipped, 5),
    }


def _read_sound(work: _Work) -> np.ndarray:
    import soundfile

    return soundfile.read(str(work.folder / "audio.wav"), dtype="float32")[0]


def _offset(work: _Work, train: range) -> dict:
    """How much later the mouth is than the sound, in frames, from the training part; 0 where the measure is not to be
    believed.
    """
    from hicode.speech.encoder import create_encoder, match_frames
    from hicode.speech.sync import SyncModel, estimate_offset

    model = SyncModel.load()
    features = match_frames(create_encoder(model.encoder).encode(_read_sound(work)), train.stop)
    landmarks = load_track(work.folder / "track.safetensors").motion.landmarks[: train.stop]
    result = estimate_offset(features, landmarks, model)
    frames = round(result.offset_frames, 2) if result.reliable else 0.0
    return {
        "frames": frames,
        "sure": result.reliable,
        "measured": round(result.offset_frames, 2),
        "margin": round(result.margin, 3),
    }


def _features(work: _Work, count: int, offset_frames: float) -> dict:
    from hicode.speech.encoder import create_encoder

    encoder = create_encoder(work.config.encoder)
    features, config = frame_features(
        encoder, shift_audio(_read_sound(work), offset_frames, count), count, offset_frames
    )
    save_tensors(
        work.folder / f"audio.{work.config.encoder}.safetensors", {"features": features}, FEATURES_SCHEMA, 1, config
    )
    return {"dim": encoder.dim}


# --- the capture report -----------------------------------------------------------------------------------------------


def _report(
    work: _Work, info: VideoInfo, faces: dict, crop: dict, found: dict, fitted: dict, sound: dict, offset: dict | None
) -> dict:
    """{"items": [{"name", "value", "advice"}]}: what was measured, and where it limits the result, what would help."""
    config = work.config
    track = load_track(work.folder / "track.safetensors")
    count, scale = crop["frame_count"], crop["scale"]
    points = track.landmarks_px.numpy()
    iod = np.linalg.norm(points[:, RIGHT_EYE_OUTER] - points[:, LEFT_EYE_OUTER], axis=1)
    items = []

    def item(name: str, value: str, bad: bool = False, advice: str = "") -> None:
        items.append({"name": name, "value": value, "advice": advice if bad else ""})

    seconds = count / FPS
    item(
        "length",
        f"{seconds:.1f} s, {count} frames at 25 fps",
        seconds < 20,
        "A minute or more teaches the mouth better.",
    )
    turned = f", turned {info.rotation_deg}°" if info.rotation_deg else ""
    item("video", f"{info.width}x{info.height} px, {info.fps:.4g} fps, {info.codec}{turned}")
    if info.hdr:
        item("colour", "high dynamic range", True, "Colours come out flat: film in SDR.")
    if info.interlaced:
        item("scanning", "interlaced", True, "Combing hurts moving lips: deinterlace it first.")
    face_px = faces["size_px"]
    item(
        "face",
        f"{face_px:.0f} px in the video, {face_px * scale:.0f} px in the crop",
        face_px < config.min_face,
        "Small: film closer, or in a higher resolution.",
    )
    x0, y0, side = crop["box"]
    wanders = max(faces["reach"][2] - faces["reach"][0], faces["reach"][3] - faces["reach"][1]) / face_px
    item(
        "crop",
        f"{side} px square at ({x0}, {y0})",
        wanders > 2.0,
        f"The face wanders over {wanders:.1f} face sizes, so it is small in the crop: sit still.",
    )
    if faces["others"]:
        item(
            "people",
            f"{1 + len(faces['others'])} faces",
            True,
            "The largest that stays was taken. Film one person alone.",
        )
    if found["missing"]:
        item(
            "missing face",
            f"{found['missing']} frames, first at {_clock(found['first_missing'])}",
            True,
            "They are interpolated.",
        )
    item(
        "fit",
        f"{fitted['error_px']:.1f} px mean landmark error, focal length {fitted['focal_px']:.0f} px",
        fitted["error_px"] > 4,
        "The head model fits badly.",
    )
    look = _look_at_face(work, track, count)
    item(
        "sharpness",
        f"{look['sharpness']:.2f}",
        look["sharpness"] < 0.05,
        "Blurred: check focus, use more light or a shorter exposure.",
    )
    item(
        "light",
        f"face at {look['luma']:.0f} of 255",
        not 50 <= look["luma"] <= 210,
        "Too dark or too bright: use soft light from the front.",
    )
    changes = _look_along(work, track, count)
    item(
        "light changes",
        f"face from {changes['luma_low']:.0f} to {changes['luma_high']:.0f}",
        changes["luma_high"] > _LIGHT_RATIO * max(changes["luma_low"], 1),
        "One colour a place is learned: film in even light, or trim to it with --start and --duration.",
    )
    if changes["cuts"]:
        item(
            "cuts",
            f"{len(changes['cuts'])}, first at {_clock(changes['cuts'][0])}",
            True,
            "One take of one person is learned: trim to it with --start and --duration.",
        )
    if len(changes["covered"]) >= max(_COVERED_LEAST, _COVERED_SHARE * count):
        item(
            "covered mouth",
            f"{len(changes['covered'])} frames, first at {_clock(changes['covered'][0])}",
            True,
            "A hand or a thing before the mouth is learned as part of it: trim it away.",
        )
    turn = head_turn_deg(track)
    item(
        "head turns",
        f"{turn[0]:.0f} to {turn[1]:+.0f} degrees sideways",
        turn[1] - turn[0] > _TURN_DEG,
        "Wide: cheeks and hair that few frames show come out badly. Face the camera more.",
    )
    if look["burnt"] > 0.02:
        item("burnt out", f"{100 * look['burnt']:.0f} % of the face", True, "Expose less.")
    opening = np.linalg.norm(points[:, UPPER_LIP_INNER] - points[:, LOWER_LIP_INNER], axis=1) / iod
    mouth = float(np.percentile(opening, 95) - np.percentile(opening, 5))
    item(
        "mouth range",
        f"{100 * mouth:.0f} % of the eye distance",
        mouth < 0.06,
        "The mouth hardly moves: speak clearly.",
    )
    if not sound["present"]:
        item("sound", "none", True, "The renderer learns from it; generic speech models will drive the mouth.")
    elif not sound["usable"]:
        item("sound", f"silent (loudest {sound['loudest_db']:.0f} dB)", True, "Taken as a video without sound.")
    else:
        item(
            "sound",
            f"loudest {sound['loudest_db']:.0f} dB, {100 * sound['quiet']:.0f} % quiet",
            sound["loudest_db"] < -35,
            "Quiet: move the microphone closer.",
        )
        if sound["clipped"] > 0.001:
            item("overdriven", f"{100 * sound['clipped']:.1f} % of the samples", True, "Record with less gain.")
        lead = offset["frames"]
        where = (
            "in sync"
            if lead == 0
            else f"picture {'leads' if lead < 0 else 'trails'} by {abs(lead):g} frames, corrected"
        )
        item(
            "audio offset",
            where if offset["sure"] else "not measurable, taken as 0",
            not offset["sure"],
            "Too little clear speech to measure it.",
        )
    return {
        "items": items,
        "face_px": round(face_px, 1),
        "eye_distance_px": round(float(np.median(iod)), 1),
        "missing_frames": found["missing"],
        "other_faces": len(faces["others"]),
        "fit_error_px": round(fitted["error_px"], 3),
        "mouth_range": round(mouth, 4),
        **{k: round(v, 4) for k, v in look.items()},
        "cuts": len(changes["cuts"]),
        "covered_frames": len(changes["covered"]),
        "luma_range": [round(changes["luma_low"], 1), round(changes["luma_high"], 1)],
        "turn_deg": [round(v, 1) for v in turn],
    }


# Measured on seven real clips and on ones spoilt on purpose (docs/log.md): from one frame to the next the picture at 16 x 16, its brightness taken out,
# changes by at most 0.08, at a cut by 0.4; the face's brightness varies by at most a tenth, with the light by more than two; the mouth correlates
# with its median picture by 0.2 and more but for two frames of wide turns, behind a hand by 0 to 0.15.
_CUT = 0.2
_LIGHT_RATIO = 1.3
_UNLIKE = 0.15
_COVERED_LEAST, _COVERED_SHARE = 4, 0.01  # frames, share of the frames
_TURN_DEG = 35
_MOUTH_SIDE = 24  # px of the patches that are compared
_MOST_PATCHES = 500  # that the median is taken of


def _look_along(work: _Work, track: FaceTrack, count: int) -> dict:
    """What happens along the clip, from one pass that keeps some hundred bytes a frame: frames at which a cut is, frames whose mouth does not look like
    itself, the brightness of the upper face (2nd and 98th percentile)."""
    points = track.landmarks_px.numpy()
    luma, cuts, before = np.zeros(count), [], None
    mouths = np.zeros((count, _MOUTH_SIDE**2), np.uint8)
    with progress_bar("Looking along the clip", work.show) as report:
        for t in range(count):
            grey = read_png(work.folder / f"frames/{t:06d}.png", grey=True)
            small = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32)
            small /= max(small.mean(), 1.0)
            if before is not None and np.abs(small - before).mean() > _CUT:
                cuts.append(t)
            before = small
            mouths[t] = _mouth_patch(grey, points[t]).ravel()
            brow = points[t, _UPPER_FACE]
            x0, y0 = np.clip(brow.min(0), 0, np.array(grey.shape[::-1]) - 2).astype(int)
            x1, y1 = np.clip(brow.max(0), (x0 + 1, y0 + 1), grey.shape[::-1]).astype(int)
            luma[t] = grey[y0:y1, x0:x1].mean()
            report(t + 1, count)
    usual = np.median(mouths[np.linspace(0, count - 1, min(count, _MOST_PATCHES)).astype(int)], 0)
    alike = [_correlation(patch.astype(np.float32), usual) for patch in mouths]
    low, high = np.percentile(luma, [2, 98])
    return {
        "cuts": cuts,
        "covered": [t for t, c in enumerate(alike) if c < _UNLIKE],
        "luma_low": float(low),
        "luma_high": float(high),
    }


_UPPER_FACE = np.array([10, 67, 297, 50, 280, 6])  # forehead to cheeks: what the mouth does not move


def _mouth_patch(grey: UInt8[np.ndarray, "h w"], points: Float[np.ndarray, "478 2"]) -> UInt8[np.ndarray, "s s"]:
    """The mouth turned upright, one eye distance wide."""
    right, left = points[MOUTH_CORNERS[0]], points[MOUTH_CORNERS[1]]
    across = (left - right) / max(np.linalg.norm(left - right), 1e-3)
    across *= max(np.linalg.norm(points[RIGHT_EYE_OUTER] - points[LEFT_EYE_OUTER]), 1.0)
    down = np.array([-across[1], across[0]])
    corner = (left + right) / 2 - across / 2 - 0.35 * down - 0.5
    to = np.array([[0, 0], [_MOUTH_SIDE, 0], [0, _MOUTH_SIDE]], np.float32)
    matrix = cv2.getAffineTransform(np.array([corner, corner + across, corner + 0.7 * down], np.float32), to)
    return cv2.warpAffine(grey, matrix, (_MOUTH_SIDE, _MOUTH_SIDE), borderMode=cv2.BORDER_REPLICATE)


def _correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-6))


def head_turn_deg(track: FaceTrack) -> tuple[float, float]:
    """How far the head turns to its right (negative) and to its left over the clip (1st and 99th percentile), from facing the camera."""
    forward = track.motion.T_camera_head[:, :3, 2].numpy()  # the head's z, out of the face, in the camera frame
    turn = np.degrees(np.arctan2(forward[:, 0], -forward[:, 2]))
    low, high = np.percentile(turn, [1, 99])
    return float(low), float(high)


def _look_at_face(work: _Work, track: FaceTrack, count: int, looks: int = 12) -> dict:
    """Over some frames: sharpness (share of the face's contrast in its finest detail), brightness, burnt-out share."""
    sharpness, luma, burnt = [], [], []
    for t in np.linspace(0, count - 1, min(looks, count)).round().astype(int):
        grey = cv2.cvtColor(read_png(work.folder / f"frames/{t:06d}.png", grey=False), cv2.COLOR_RGB2GRAY).astype(
            np.float32
        )
        points = track.landmarks_px[t].numpy()
        x0, y0 = np.clip(points.min(0), 0, np.array(grey.shape[::-1]) - 8).astype(int)
        x1, y1 = np.clip(points.max(0), (x0 + 8, y0 + 8), grey.shape[::-1]).astype(int)
        face = grey[y0:y1, x0:x1]
        fine = face - cv2.GaussianBlur(face, (0, 0), 1.5)
        sharpness.append(fine.std() / max(face.std(), 1e-3))
        luma.append(face.mean())
        burnt.append((face > 252).mean())
    return {"sharpness": float(np.median(sharpness)), "luma": float(np.median(luma)), "burnt": float(np.median(burnt))}


def print_report(report: dict) -> None:
    """The capture report as a table, with what would help."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Capture report", title_justify="left", box=None, pad_edge=False)
    for column in ("", "measured", "advice"):
        table.add_column(column)
    for item in report["items"]:
        table.add_row(
            item["name"], item["value"], f"[yellow]{item['advice']}[/]" if item["advice"] else "[green]good[/]"
        )
    Console(stderr=True).print(table)
