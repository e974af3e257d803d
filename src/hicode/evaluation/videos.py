"""Any two videos measured by the code that measures ours: another system's output beside the recording that it should equal.

Frames are compared one by one at 25 a second, as they come out of the files. The regions are the reference's: its face is followed and its head
cut out as `prepare` does. Rows:

    ground_truth  the reference itself: the detector's and the sync measure's own values
    control       the mean of the reference's frames pasted on each of them over the head (and 4 px around it): what a still picture scores
                  where the true background is pasted. It has seen the very frames that it is measured on, so it is a generous floor.
    video         the video; in JSON its figures stand at the top level

Nothing is cut, scaled or resampled in silence: sizes and rates must agree unless told otherwise, lengths up to a few frames, and what was done
is in `frames` and `notes`. Frames without a face are counted in `no_face`: a reference frame without one has no head and no mouth, so it
counts for the whole frame only, and not for the control. Both files may be lossy, which costs every row but the truth.
"""

import datetime
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, UInt8

from hicode.audio import FPS
from hicode.avatar.blend import dilate_mask, hidden_mask
from hicode.errors import InputError
from hicode.evaluation.images import REGIONS, Truth, seam_error
from hicode.evaluation.lips import DETECTOR, closures_due, detect
from hicode.evaluation.rows import (
    AVCONF_DEFINITION,
    DEFINITIONS,
    Findings,
    Heard,
    Row,
    figures,
    jsonable,
    over_control,
    per_frame,
)
from hicode.evaluation.show import Pictures, ShownFrame, evenly, mouth_windows, print_table, worst_first
from hicode.evaluation.syncnet import LipStream, SyncNet, crop, crop_boxes
from hicode.files import check_writable, sha256_of, write_json
from hicode.media.audio import read_audio
from hicode.media.video import probe, read_video
from hicode.motion import N_LANDMARKS, mouth_box
from hicode.perceptual import SMALLEST_SIDE_PX
from hicode.preparation.clip import shift_audio
from hicode.preparation.crop import head_box
from hicode.progress import progress_bar
from hicode.provenance import provenance
from hicode.runtime import peak_memory_mb

if TYPE_CHECKING:
    from hicode.tracking.landmarks import FaceLandmarker

SCHEMA, VERSION = "hicode-comparison", 1
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
RATES_AGREE = 0.005  # containers that keep whole milliseconds are that far off
SHAPES_AGREE = 0.01
WORST_SHOWN, SPREAD_SHOWN, STRIP_SHOWN, FACELESS_SHOWN = 6, 2, 24, 2


@dataclass(frozen=True)
class CompareConfig:
    """What may differ between the two videos."""

    max_left_out: int = 5
    """Frames that one may be longer; they are left out at the end and counted."""
    resize: bool = False
    """Scale the video to the reference's size; every figure then includes the scaling."""
    resample: bool = False
    """Accept other frame rates: each frame at 25 a second is then the nearest one in time."""
    vgg: bool = False
    """LPIPS by VGG16 too: a second or two a frame."""


def compare_videos(
    video: Path | str,
    reference: Path | str,
    json: Path | str | None = None,
    html: Path | str | None = None,
    config: CompareConfig = CompareConfig(),
    syncnet: Path | str | None = None,
    alignment: Path | str | None = None,
    progress: bool = True,
) -> dict:
    """Measure a video against a reference, frame by frame; the figures as a dict, on request as JSON and a page with pictures.

    Either may be a video file or a folder of pictures in the order of their names, 25 a second. `syncnet`, `alignment`: as `evaluate`. Sound is
    the video's own, or where it has none the reference's. InputError where they cannot be compared: sizes, rates or lengths that differ by
    more than `config` allows, no face in the reference.
    """
    for place in filter(None, (json, html)):
        check_writable(place)
    net = SyncNet.load(syncnet) if syncnet else None
    started = time.perf_counter()
    pair = _Pair.open(Path(video), Path(reference), config)
    due = closures_due(alignment, 0, pair.count) if alignment else None
    with progress_bar("Following the face", progress) as report:
        face = _follow(pair, report)
    rows = {name: Row(lips=None) for name in ("ground_truth", "control", "video")}
    with progress_bar("Measuring", progress) as report:
        _measure(pair, face, rows, config.vgg, report)
    if net is not None:
        with progress_bar("SyncNet", progress) as report:
            _watch(pair, face, rows, net, report)
    findings = Findings(notes=list(pair.notes))
    out = _figures(pair, face, rows, due, net, findings)
    files = {"video": pair.video.described(), "reference": pair.reference.described()}
    used = ["face_landmarks", "face_detection", "person_mask", "perceptual", *([str(syncnet)] if syncnet else [])]
    out["provenance"] = {
        "evaluated": datetime.date.today().isoformat(),
        **provenance(asdict(config), None, used),
        **files,
    }
    out["evaluation"] = {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
    out = jsonable(out)
    if json:
        write_json(Path(json), out)
    if html:
        from hicode.evaluation.page import write_page

        write_page(Path(html), out, _pictures(pair, face, rows))
    if progress:
        print_table(out)
    return out


# ------------------------------------------------------------------------------------------------------------ the files


class _Footage:
    """A video file, or a folder of pictures, as frames at 25 a second; read as often as needed, never held."""

    def __init__(self, path: Path):
        self.path = path
        self.scale_to: tuple[int, int] | None = None  # width, height
        if path.is_dir():
            self._pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
            if not self._pictures:
                raise InputError(f"{path} is a folder without pictures. Give a video, or a folder of numbered PNGs.")
            self.height, self.width = read_picture(self._pictures[0]).shape[:2]
            self.fps = FPS
        else:
            self._pictures = None
            info = probe(path)
            self.width, self.height, self.fps = info.width, info.height, info.fps

    def frames(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        source = map(read_picture, self._pictures) if self._pictures is not None else read_video(self.path, FPS)
        for i, frame in enumerate(source):
            if frame.shape[:2] != (self.height, self.width):
                raise InputError(
                    f"{self.path} is {self.width}x{self.height} at first and {frame.shape[1]}x{frame.shape[0]} at frame {i}. "
                    "Give frames of one size."
                )
            if self.scale_to:
                shrinks = self.scale_to[0] < frame.shape[1]
                frame = cv2.resize(frame, self.scale_to, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
            yield frame

    def sound(self) -> np.ndarray | None:
        return None if self._pictures is not None else read_audio(self.path)

    def described(self) -> dict:
        """For the provenance: name, sha256 (of a folder: of its pictures' own, in order), size, rate."""
        sums = [sha256_of(file) for file in self._pictures or [self.path]]
        whole = sums[0] if self._pictures is None else hashlib.sha256("".join(sums).encode()).hexdigest()
        return {
            "name": self.path.name, "sha256": whole, "kind": "video" if self._pictures is None else "pictures",
            "width": self.width, "height": self.height, "fps": self.fps,
        }  # fmt: skip


def read_picture(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    """InputError where the file is no picture."""
    picture = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR) if file.stat().st_size else None
    if picture is None:
        raise InputError(f"{file} is not a readable picture. Export it again as PNG.")
    return np.ascontiguousarray(picture[..., ::-1])


@dataclass(eq=False)
class _Pair:
    """Two videos that can be compared: `count` frames of one size; how long each is; what was done about their differences."""

    video: _Footage
    reference: _Footage
    count: int
    lengths: dict[str, int]
    mean: Float64[np.ndarray, "h w 3"]  # of the reference's frames that are compared
    notes: list[str]

    @staticmethod
    def open(video: Path, reference: Path, config: CompareConfig) -> "_Pair":
        """Look at both files, first at what is quickly known. InputError where they do not fit."""
        if config.max_left_out < 0:
            raise InputError(
                f"--max-left-out {config.max_left_out} is negative. Give a number of frames; the usual number is 5."
            )
        a, b = _Footage(video), _Footage(reference)
        notes: list[str] = []
        if min(b.width, b.height) < SMALLEST_SIDE_PX:
            raise InputError(
                f"{reference} is {b.width}x{b.height}; LPIPS needs {SMALLEST_SIDE_PX} px a side. Give larger frames."
            )
        if (a.width, a.height) != (b.width, b.height):
            sizes = f"{video} is {a.width}x{a.height}, the reference {reference} {b.width}x{b.height}"
            if abs(a.width / a.height - b.width / b.height) > SHAPES_AGREE * b.width / b.height:
                raise InputError(f"{sizes}: other shapes. Crop both to the same part of the picture.")
            if not config.resize:
                raise InputError(
                    f"{sizes}. Render it at that size, or give --resize to have it scaled: then every figure includes the scaling."
                )
            a.scale_to = (b.width, b.height)
            notes.append(f"{sizes}: the video was scaled, and every figure of it includes that.")
        if abs(a.fps - b.fps) > RATES_AGREE * b.fps:
            rates = f"{video} has {a.fps:.5g} frames a second, the reference {reference} {b.fps:.5g}"
            if not config.resample:
                raise InputError(
                    f"{rates}: frames up to {500 / max(a.fps, FPS):.0f} ms apart would be compared. Render it at that rate, or accept the "
                    "nearest frame in time with --resample."
                )
            notes.append(f"{rates}: at 25 a second the nearest frames in time were compared.")
        elif abs(b.fps - FPS) > RATES_AGREE * FPS:
            notes.append(f"Both have {b.fps:.5g} frames a second: the nearest in time to 25 a second were compared.")
        total, lengths = np.zeros((b.height, b.width, 3)), {"video": 0, "reference": 0}
        for _ in a.frames():
            lengths["video"] += 1
        for frame in b.frames():
            if lengths["reference"] < lengths["video"]:
                total += frame
            lengths["reference"] += 1
        count = min(lengths.values())
        left = max(lengths.values()) - count
        if left > config.max_left_out:
            longer = video if lengths["video"] > count else reference
            raise InputError(
                f"{video} has {lengths['video']} frames at 25 a second, the reference {reference} {lengths['reference']}. Trim {longer} to the "
                f"part that both show, or leave its last {left} out with --max-left-out {left}."
            )
        if left:
            whose = "video" if lengths["video"] > count else "reference"
            notes.append(f"The {whose} is longer: its last {left} of {count + left} frames were left out.")
        return _Pair(a, b, count, lengths, total / count, notes)

    def truth(self) -> Iterator[np.ndarray]:
        return (frame for _, frame in zip(range(self.count), self.reference.frames(), strict=False))

    def frames(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(truth, video) frame by frame."""
        for _, truth, image in zip(range(self.count), self.reference.frames(), self.video.frames(), strict=False):
            yield truth, image

    @cached_property
    def sounds(self) -> dict[str, Heard | None]:
        return {
            "reference": _heard(self.reference.sound(), self.count),
            "video": _heard(self.video.sound(), self.count),
        }

    def whose_sound(self, row: str) -> str | None:
        """Whose sound a row is measured against: its own, where that has none the other's."""
        own, other = ("video", "reference") if row == "video" else ("reference", "video")
        return next((name for name in (own, other) if self.sounds[name] is not None), None)

    def heard(self, row: str) -> Heard | None:
        whose = self.whose_sound(row)
        return None if whose is None else self.sounds[whose]


def _heard(samples: np.ndarray | None, count: int) -> Heard | None:
    if samples is None or not len(samples):
        return None
    samples = shift_audio(samples, 0.0, count)

    @cache
    def features(name: str) -> torch.Tensor:
        from hicode.speech.encoders import create_encoder, match_frames

        return match_frames(create_encoder(name).encode(samples), count)

    return Heard(samples, features)


# ------------------------------------------------------------------------------------------------- the reference's face


@dataclass(frozen=True, eq=False)
class _Face:
    """The reference's face over the frames that are compared.

    points "t 478 3"  in px, interpolated where not found
    found  "t"        whether the frame has the face
    masks             head masks as PNG: a minute of them is a few megabytes
    square            the part of the frame that holds the head throughout: rows, columns
    """

    points: Float[np.ndarray, "t 478 3"]
    found: Bool[np.ndarray, "t"]
    masks: list[bytes]
    square: tuple[slice, slice]

    def mask(self, i: int) -> UInt8[np.ndarray, "h w"] | None:
        return cv2.imdecode(np.frombuffer(self.masks[i], np.uint8), cv2.IMREAD_GRAYSCALE) if self.found[i] else None

    def mouth(self, i: int, width: int, height: int) -> tuple[int, int, int, int] | None:
        return mouth_box(self.points[i], width, height) if self.found[i] else None


def _follow(pair: _Pair, report: Callable[[int, int], None]) -> _Face:
    """Landmarks and head masks of the reference, as `prepare` makes them: segmentation looks at a square about the head."""
    from hicode.tracking.face_tracker import track_faces
    from hicode.tracking.masks import Segmenter, head_mask

    t, width, height = pair.count, pair.reference.width, pair.reference.height
    try:
        landmarks = track_faces(pair.truth(), landmarker(), progress=lambda done: report(done, 2 * t))
    except InputError as error:
        raise InputError(
            f"No face in any of the {t} frames of the reference {pair.reference.path}: there is no head and no mouth to compare. "
            "Give the recording of the person as --reference."
        ) from error
    points, found = landmarks.points_px.numpy(), np.asarray(landmarks.found)
    sizes = (points[found, :468, :2].max(1) - points[found, :468, :2].min(1)).max(1)
    low, high = (
        np.percentile(points[found, :468, :2].min(1), 1, axis=0),
        np.percentile(points[found, :468, :2].max(1), 99, axis=0),
    )
    x, y, side = head_box(width, height, [*low, *high], float(np.median(sizes)))
    square = np.s_[y : y + side, x : x + side]
    persons: list[bytes] = []
    for i, mask in enumerate(Segmenter().persons(np.ascontiguousarray(frame[square]) for frame in pair.truth())):
        persons.append(_packed(mask))
        report(t + i + 1, 2 * t)
    inside = points[:, :, :2] - [x, y]
    masks = []
    for i in range(t):
        if not found[i]:
            masks.append(b"")
            continue
        whole = np.zeros((height, width), np.uint8)
        whole[square] = head_mask(_unpacked(persons[i]), inside[i])
        masks.append(_packed(whole))
    return _Face(points, found, masks, square)


def _packed(mask: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done, mask.shape
    return data.tobytes()


def _unpacked(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)


@cache
def landmarker() -> "FaceLandmarker":
    from hicode.tracking.landmarks import FaceLandmarker

    return FaceLandmarker()


# ------------------------------------------------------------------------------------------------------------ measuring


def control(
    pair: _Pair, truth: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"] | None
) -> UInt8[np.ndarray, "h w 3"]:
    """The mean frame's head on a true frame; the true frame where there is no head to hide."""
    if mask is None:
        return truth
    return np.where(hidden_mask(mask)[..., None] > 0, (pair.mean + 0.5).astype(np.uint8), truth)


def _measure(pair: _Pair, face: _Face, rows: dict[str, Row], vgg: bool, report: Callable[[int, int], None]) -> None:
    unknown = {region: dict.fromkeys(("psnr", "ssim", "lpips"), float("nan")) for region in REGIONS}
    perfect = {region: {"psnr": float("inf"), "ssim": 1.0, "lpips": 0.0} for region in REGIONS}
    if vgg:
        unknown["frame"]["lpips_vgg"], perfect["frame"]["lpips_vgg"] = float("nan"), 0.0
    for i, (picture, image) in enumerate(pair.frames()):
        mask = face.mask(i)
        truth = Truth(picture, mask, face.mouth(i, pair.reference.width, pair.reference.height), vgg)
        still = control(pair, picture, mask)
        rows["ground_truth"].images.append(perfect)
        rows["control"].images.append(unknown if mask is None else truth.compare(still))
        rows["video"].images.append(truth.compare(image))
        region = None if mask is None else dilate_mask(mask)
        for name, shown in (("ground_truth", picture), ("control", still), ("video", image)):
            blind = name == "control" and mask is None  # nothing was pasted there: it would be the truth itself
            rows[name].points.append(np.full((N_LANDMARKS, 3), np.nan) if blind else detect([shown], landmarker())[0])
            rows[name].seam.append(float("nan") if region is None else seam_error(shown, picture, region))
        report(i + 1, pair.count)


def _watch(pair: _Pair, face: _Face, rows: dict[str, Row], net: SyncNet, report: Callable[[int, int], None]) -> None:
    """SyncNet's crops, each row's about its own faces."""
    boxes = {name: crop_boxes(row.landmarks()) for name, row in rows.items()}
    for name, row in rows.items():
        row.lips = LipStream(net) if np.isfinite(boxes[name]).all() else None
    for i, (picture, image) in enumerate(pair.frames()):
        shown = {"ground_truth": picture, "control": control(pair, picture, face.mask(i)), "video": image}
        for name, row in rows.items():
            if row.lips is not None:
                row.lips.push(crop(shown[name], boxes[name][i]))
        report(i + 1, pair.count)


def _figures(
    pair: _Pair, face: _Face, rows: dict[str, Row], due: list | None, net: SyncNet | None, findings: Findings
) -> dict:
    width, count = pair.reference.width, pair.count
    blind = int((~face.found).sum())
    if blind:
        first = int(np.argmin(face.found))
        findings.notes.append(
            f"No face in {blind} of {count} frames of the reference (first: {first}): they count for the whole frame only, not for head, mouth, "
            "lips and seam, and not for the control."
        )
    found = figures(
        rows,
        width,
        {name: pair.heard(name) for name in rows},
        findings,
        due,
        net,
        sound_missing="neither the video nor the reference has sound",
    )
    if pair.whose_sound("video") == "reference":
        findings.notes.append("The video has no sound: its sync is measured against the reference's.")
    truth_points = rows["ground_truth"].landmarks()
    faceless = {name: np.flatnonzero(~np.isfinite(row.landmarks()).all((1, 2))) for name, row in rows.items()}
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "title": f"{pair.video.path.name} against {pair.reference.path.name}: {count} frames",
        **found["video"],
        "control": found["control"],
        "ground_truth": found["ground_truth"],
        "over_control": over_control(found, ["video"]),
        "frames": {
            "compared": count,
            "video": pair.lengths["video"],
            "reference": pair.lengths["reference"],
            "left_out": max(pair.lengths.values()) - count,
            "fps": FPS,
        },
        "no_face": {
            "reference_track": {"count": blind, "frames": [int(i) for i in np.flatnonzero(~face.found)]},
            **{name: {"count": len(which), "frames": [int(i) for i in which]} for name, which in faceless.items()},
        },
        "sound": {name: pair.whose_sound(name) for name in rows},
        "split": {"train": None, "test": [0, count], "fps": FPS},
        "detector": DETECTOR,
        "protocol": (
            "frames compared one by one at 25 a second as they come out of the files; regions from the reference's face. Control: the mean of "
            "the reference's own frames, pasted on each over the head"
        ),
        "definitions": DEFINITIONS
        | {"seam": DEFINITIONS["seam"] + ": here the reference's head mask, dilated as our composition dilates it"}
        | (AVCONF_DEFINITION if net else {}),
        "notes": findings.notes,
        "not_measured": findings.not_measured | {"speed and training time": "the frames came as files"},
        "per_frame": {name: per_frame(row, truth_points, width) for name, row in rows.items()},
    }


def _pictures(pair: _Pair, face: _Face, rows: dict[str, Row]) -> Pictures:
    """Read once more: only what is shown is held."""
    width, height = pair.reference.width, pair.reference.height
    wanted = dict(worst_first([f["head"]["psnr"] for f in rows["video"].images], WORST_SHOWN, SPREAD_SHOWN))
    lost = np.flatnonzero(~np.isfinite(rows["video"].landmarks()).all((1, 2)) | ~face.found)
    for i in [int(i) for i in lost if i not in wanted][:FACELESS_SHOWN]:
        wanted[i] = "shown for its missing face"
    for i in set(map(int, lost)) & set(wanted):
        wanted[i] += "; no face found in the video or the reference"
    mouths = [int(np.flatnonzero(face.found)[k]) for k in evenly(int(face.found.sum()), STRIP_SHOWN)]
    windows = dict(
        zip(mouths, mouth_windows([face.mouth(i, width, height) for i in mouths], width, height), strict=True)
    )
    head = face.square  # a head that is small in its frame is shown by itself
    crops = "" if (height, width) == tuple(part.stop - part.start for part in head) else "; cropped to the head"
    shown, strip = {}, []
    for i, (truth, image) in enumerate(pair.frames()):
        if i in wanted:
            images = {"control": control(pair, truth, face.mask(i)), "video": image}
            scores = {name: rows[name].images[i]["head"]["psnr"] for name in images}
            shown[i] = ShownFrame(
                i, wanted[i] + crops, truth[head], {n: each[head] for n, each in images.items()}, scores
            )
        if i in windows:
            x0, y0, x1, y1 = windows[i]
            strip.append((i, {"ground_truth": truth[y0:y1, x0:x1], "video": image[y0:y1, x0:x1]}))
    heard = pair.heard("video")
    return Pictures([shown[i] for i in wanted], strip, None if heard is None else heard.samples)
