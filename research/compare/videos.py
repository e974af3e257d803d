"""Any two videos measured by the code that measures ours: a system's output against the recording it should equal.

Frames are compared one by one at 25 a second, as they come out of the files. The regions are the reference's: its face
is tracked and its head cut out as `prepare` does. Rows:

    ground_truth  the reference itself: the detector's and the sync measure's own values
    control       the mean of the reference's frames pasted on each of them over the head (and 4 px around it): what a
                  still picture scores where the true background is pasted. It has seen the frames that it is measured
                  on, so it is a generous floor
    video         the video; in JSON its figures stand at the top level

Nothing is cut, scaled or resampled in silence: sizes and rates must agree unless told otherwise, lengths up to a few
frames, and what was done is in `frames` and `notes`. A reference frame without a face has no head and no mouth, so it
counts for the whole frame only, and not for the control. Both files may be lossy, which costs every row but the truth.
"""

import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float64, UInt8

from hicode.audio import FPS
from hicode.avatar.blend import dilate_mask, hidden_mask
from hicode.errors import InputError
from hicode.evaluation.config import CompareConfig, EvaluateConfig
from hicode.evaluation.gallery import Gallery
from hicode.evaluation.images import Box
from hicode.evaluation.lips import DETECTOR, closures_due
from hicode.evaluation.page import write_page
from hicode.evaluation.rows import (
    AVCONF_DEFINITION,
    DEFINITIONS,
    Compared,
    Findings,
    Row,
    Sound,
    figures,
    jsonable,
    measure,
    new_rows,
    over_control,
    per_frame,
)
from hicode.evaluation.show import print_table
from hicode.files import write_json
from hicode.motion import mouth_box
from hicode.perceptual import SMALLEST_SIDE_PX
from hicode.preparation.clip import shift_audio
from hicode.preparation.crop import head_box
from hicode.progress import progress_bar
from hicode.provenance import provenance
from hicode.runtime import peak_memory_mb
from hicode.speech.encoders import create_encoder, match_frames
from hicode.tracking.face_tracker import track_faces
from hicode.tracking.landmarks import FaceLandmarker
from hicode.tracking.masks import Segmenter, head_mask
from research.compare.footage import Footage

SCHEMA, VERSION = "hicode-comparison", 2
RATES_AGREE = 0.005  # containers that keep whole milliseconds are that far off
SHAPES_AGREE = 0.01


def compare_videos(
    video: Path | str,
    reference: Path | str,
    config: EvaluateConfig = EvaluateConfig(),
    compare: CompareConfig = CompareConfig(),
    progress: bool = True,
) -> dict:
    """Measure a video against a reference, frame by frame: figures as a dict, on request as JSON and a page.

    Either may be a video file or a folder of pictures in the order of their names, 25 a second. Sound is the video's
    own, or where it has none the reference's. Raises InputError where they cannot be compared: sizes, rates or lengths
    that differ by more than `compare` allows, no face in the reference.
    """
    config.check_outputs()
    scores = config.lip_scores()
    started = time.perf_counter()
    pair = Pair.open(Path(video), Path(reference), compare)
    due = closures_due(config.alignment, 0, pair.count) if config.alignment else None
    landmarker = FaceLandmarker()
    with progress_bar("Tracking the face", progress) as report:
        face = track_reference(pair, landmarker, report)
    rows = new_rows(("video", "ground_truth", "control"), scores, face.points)
    mouths = [face.mouth(i, pair.width, pair.height) for i in range(pair.count)]
    shown = tuple(part.stop - part.start for part in face.square)
    note = "" if (pair.height, pair.width) == shown else "; cropped to the head"
    gallery = Gallery("video", mouths, (pair.width, pair.height), face.square, note)
    measured = measure(compared(pair, face), rows, landmarker, config.vgg)
    with progress_bar("Measuring", progress) as report:
        for i, _ in enumerate(gallery.watch(measured, rows)):
            report(i + 1, pair.count)
    findings = Findings(notes=list(pair.notes))
    out = _report(pair, face, rows, _figures(pair, face, rows, due, findings), findings)
    out["definitions"] = DEFINITIONS | (AVCONF_DEFINITION if scores else {})
    out["provenance"] = _provenance(pair, config, compare)
    out["evaluation"] = {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
    out = jsonable(out)
    if config.json:
        write_json(Path(config.json), out)
    if config.html:
        sound = pair.sound("video")
        write_page(Path(config.html), out, gallery.pictures(None if sound is None else sound.samples))
    if progress:
        print_table(out)
    return out


# --- the files


@dataclass(eq=False)
class Pair:
    """Two videos that can be compared.

    count    frames that both have
    lengths  frames of each
    mean     of the reference's frames that are compared
    notes    what was done about their differences
    """

    video: Footage
    reference: Footage
    count: int
    lengths: dict[str, int]
    mean: Float64[np.ndarray, "h w 3"]
    notes: list[str]

    @staticmethod
    def open(video: Path, reference: Path, config: CompareConfig) -> "Pair":
        """Look at both files, first at what is quickly known. Raises InputError where they do not fit."""
        a, b = Footage(video), Footage(reference)
        if min(b.width, b.height) < SMALLEST_SIDE_PX:
            raise InputError(
                f"{reference} is {b.width}x{b.height}; LPIPS needs {SMALLEST_SIDE_PX} px a side. Give larger frames."
            )
        notes = [*_fit_sizes(a, b, config), *_check_rates(a, b, config)]
        total, lengths = np.zeros((b.height, b.width, 3)), {"video": 0, "reference": 0}
        for _ in a.frames():
            lengths["video"] += 1
        for frame in b.frames():
            if lengths["reference"] < lengths["video"]:
                total += frame
            lengths["reference"] += 1
        count = min(lengths.values())
        left = max(lengths.values()) - count
        whose = "video" if lengths["video"] > count else "reference"
        if left > config.max_left_out:
            raise InputError(
                f"{video} has {lengths['video']} frames at 25 a second, the reference {reference} "
                f"{lengths['reference']}. Trim {video if whose == 'video' else reference} to the part that both show, "
                f"or leave its last {left} out with --max-left-out {left}."
            )
        if left:
            notes.append(f"The {whose} is longer: its last {left} of {count + left} frames were left out.")
        return Pair(a, b, count, lengths, total / count, notes)

    @property
    def width(self) -> int:
        """Of the reference, px."""
        return self.reference.width

    @property
    def height(self) -> int:
        """Of the reference, px."""
        return self.reference.height

    def truth(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The reference's frames."""
        return (frame for _, frame in zip(range(self.count), self.reference.frames(), strict=False))

    def frames(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(truth, video) frame by frame."""
        return zip(self.truth(), self.video.frames(), strict=False)

    @cached_property
    def sounds(self) -> dict[str, Sound | None]:
        """Of either file."""
        sources = {"reference": self.reference, "video": self.video}
        return {name: _sound(source.sound(), self.count) for name, source in sources.items()}

    def whose_sound(self, row: str) -> str | None:
        """Whose sound a row is measured against: its own, where that has none the other's."""
        own, other = ("video", "reference") if row == "video" else ("reference", "video")
        return next((name for name in (own, other) if self.sounds[name] is not None), None)

    def sound(self, row: str) -> Sound | None:
        """A row's sound."""
        whose = self.whose_sound(row)
        return None if whose is None else self.sounds[whose]


def _fit_sizes(a: Footage, b: Footage, config: CompareConfig) -> list[str]:
    """Scale the video to the reference's size where that is asked for; notes of what was done."""
    if (a.width, a.height) == (b.width, b.height):
        return []
    sizes = f"{a.path} is {a.width}x{a.height}, the reference {b.path} {b.width}x{b.height}"
    if abs(a.width / a.height - b.width / b.height) > SHAPES_AGREE * b.width / b.height:
        raise InputError(f"{sizes}: other shapes. Crop both to the same part of the picture.")
    if not config.resize:
        raise InputError(
            f"{sizes}. Render it at that size, or give --resize to have it scaled: then every figure includes the "
            "scaling."
        )
    a.scale_to = (b.width, b.height)
    return [f"{sizes}: the video was scaled, and every figure of it includes that."]


def _check_rates(a: Footage, b: Footage, config: CompareConfig) -> list[str]:
    """Refuse other rates unless they are accepted; notes of what was done."""
    if abs(a.fps - b.fps) > RATES_AGREE * b.fps:
        rates = f"{a.path} has {a.fps:.5g} frames a second, the reference {b.path} {b.fps:.5g}"
        if not config.resample:
            raise InputError(
                f"{rates}: frames up to {500 / max(a.fps, FPS):.0f} ms apart would be compared. Render it at that "
                "rate, or accept the nearest frame in time with --resample."
            )
        return [f"{rates}: at 25 a second the nearest frames in time were compared."]
    if abs(b.fps - FPS) > RATES_AGREE * FPS:
        return [f"Both have {b.fps:.5g} frames a second: the nearest in time to 25 a second were compared."]
    return []


def _sound(samples: np.ndarray | None, count: int) -> Sound | None:
    if samples is None or not len(samples):
        return None
    samples = shift_audio(samples, 0.0, count)
    return Sound(samples, cache(lambda encoder: match_frames(create_encoder(encoder).encode(samples), count)))


# --- the reference's face


@dataclass(frozen=True, eq=False)
class Face:
    """The reference's face over the frames that are compared.

    points "t 478 3"    in px, interpolated where none was detected
    detected "t"        whether the frame has the face
    masks               head masks as PNG: a minute of them is a few megabytes
    square              the part of the frame that holds the head throughout: rows, columns
    """

    points: Float[np.ndarray, "t 478 3"]
    detected: Bool[np.ndarray, "t"]
    masks: list[bytes]
    square: tuple[slice, slice]

    def mask(self, i: int) -> UInt8[np.ndarray, "h w"] | None:
        """The head's in frame i."""
        return _unpacked(self.masks[i]) if self.detected[i] else None

    def mouth(self, i: int, width: int, height: int) -> Box | None:
        """The mouth box of frame i."""
        return mouth_box(self.points[i], width, height) if self.detected[i] else None


def track_reference(pair: Pair, landmarker: FaceLandmarker, report: Callable[[int, int], None]) -> Face:
    """Landmarks and head masks of the reference, as `prepare` makes them: segmentation sees a square about the head."""
    t = pair.count
    try:
        landmarks = track_faces(pair.truth(), landmarker, progress=lambda done: report(done, 2 * t))
    except InputError as error:
        raise InputError(
            f"No face in any of the {t} frames of the reference {pair.reference.path}: there is no head and no mouth "
            "to compare. Give the recording of the person as --reference."
        ) from error
    points, detected = landmarks.points_px.numpy(), np.asarray(landmarks.found)
    low, high = points[detected, :468, :2].min(1), points[detected, :468, :2].max(1)
    box = [float(x) for x in (*np.percentile(low, 1, axis=0), *np.percentile(high, 99, axis=0))]
    x, y, side = head_box(pair.width, pair.height, box, float(np.median((high - low).max(1))))
    square = np.s_[y : y + side, x : x + side]
    masks: list[bytes] = []
    persons = Segmenter().persons(np.ascontiguousarray(frame[square]) for frame in pair.truth())
    for i, person in enumerate(persons):
        whole = np.zeros((pair.height, pair.width), np.uint8)
        if detected[i]:
            whole[square] = head_mask(person, points[i, :, :2] - [x, y])
        masks.append(_packed(whole))
        report(t + i + 1, 2 * t)
    return Face(points, detected, masks, square)


def _packed(mask: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", mask, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done, mask.shape
    return data.tobytes()


def _unpacked(data: bytes) -> UInt8[np.ndarray, "h w"]:
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert mask is not None, "a mask that was packed here cannot be read"
    return mask


# --- measuring


def control(
    pair: Pair, truth: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The mean frame's head on a true frame."""
    return np.where(hidden_mask(mask)[..., None] > 0, (pair.mean + 0.5).astype(np.uint8), truth)


def compared(pair: Pair, face: Face) -> Iterator[Compared]:
    """Frame by frame; a frame without a face has no control."""
    for i, (truth, image) in enumerate(pair.frames()):
        mask, images, regions = face.mask(i), {"video": image}, {}
        if mask is not None:
            images["control"] = control(pair, truth, mask)
            region = dilate_mask(mask)
            regions = {name: region for name in ("video", "control", "ground_truth")}
        yield Compared(i, truth, mask, face.mouth(i, pair.width, pair.height), images, regions)


def _figures(pair: Pair, face: Face, rows: dict[str, Row], due: list | None, findings: Findings) -> dict[str, dict]:
    blind = int((~face.detected).sum())
    if blind:
        findings.notes.append(
            f"No face in {blind} of {pair.count} frames of the reference (first: {int(np.argmin(face.detected))}): "
            "they count for the whole frame only, not for head, mouth, lips and seam, and not for the control."
        )
    sounds = {name: pair.sound(name) for name in rows}
    found = figures(rows, pair.width, sounds, findings, due, "neither the video nor the reference has sound")
    if pair.whose_sound("video") == "reference":
        findings.notes.append("The video has no sound: its sync is measured against the reference's.")
    return found


def _report(pair: Pair, face: Face, rows: dict[str, Row], found: dict[str, dict], findings: Findings) -> dict:
    truth = rows["ground_truth"].landmarks()
    faceless = {name: np.flatnonzero(~np.isfinite(row.landmarks()).all((1, 2))) for name, row in rows.items()}
    faceless["reference_track"] = np.flatnonzero(~face.detected)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "title": f"{pair.video.path.name} against {pair.reference.path.name}: {pair.count} frames",
        **found["video"],
        "ground_truth": found["ground_truth"],
        "control": found["control"],
        "over_control": over_control(found, ["video"]),
        "frames": {
            "compared": pair.count,
            **pair.lengths,
            "left_out": max(pair.lengths.values()) - pair.count,
            "fps": FPS,
        },
        "no_face": {name: {"count": len(i), "frames": [int(k) for k in i]} for name, i in faceless.items()},
        "sound": {name: pair.whose_sound(name) for name in rows},
        "split": {"train": None, "test": [0, pair.count], "fps": FPS},
        "detector": DETECTOR,
        "protocol": (
            "frames compared one by one at 25 a second as they come out of the files; regions from the reference's "
            "face. Control: the mean of the reference's own frames, pasted on each over the head"
        ),
        "notes": findings.notes,
        "not_measured": findings.not_measured | {"speed and training time": "the frames came as files"},
        "per_frame": {name: per_frame(row, truth, pair.width) for name, row in rows.items()},
    }


def _provenance(pair: Pair, config: EvaluateConfig, compare: CompareConfig) -> dict:
    brought = [str(config.syncnet)] if config.syncnet else []
    used = ["face_landmarks", "face_detection", "person_mask", "perceptual", *brought]
    return {
        "evaluated": datetime.date.today().isoformat(),
        **provenance(asdict(compare) | {"vgg": config.vgg}, None, used),
        "video": pair.video.described(),
        "reference": pair.reference.described(),
    }
