"""The capture report: what a recording is good for, and what would help where it limits the result."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from hicode.audio import FPS
from hicode.media.video import VideoInfo
from hicode.motion import (
    LEFT_EYE_OUTER,
    LOWER_LIP_INNER,
    MOUTH_CORNERS_INNER,
    RIGHT_EYE_OUTER,
    UPPER_LIP_INNER,
    FaceTrack,
)
from hicode.preparation.choice import Choice
from hicode.preparation.crop import Crop, FaceSearch, clock
from hicode.preparation.defects import Defect, usable
from hicode.preparation.sound import Offset, Sound
from hicode.progress import Report
from hicode.threads import map_frames
from hicode.tracking.keyframes import GrayPictures, Pictures

_UPPER_FACE = np.array([10, 67, 297, 50, 280, 6])  # forehead to cheeks: what the mouth does not move
_PATCH_PX = 24  # side of the mouth patches that are compared
_MOST_DEFECTS = 4  # that are listed with their times
_MOST_PATCHES = 500  # patches that the median is taken of


@dataclass(frozen=True)
class ReportConfig:
    """From where on a measurement is worth advice.

    On real clips the picture at 16 x 16, its brightness taken out, changes by at most 0.08 from frame to frame, and by
    0.4 at a cut. The face's brightness varies by at most a tenth, with the light by more than two. The mouth correlates
    with its median picture by 0.2 and more, behind a hand by 0 to 0.15.
    """

    min_face: int = 100  # faces smaller than this many source px
    min_seconds: float = 20.0  # length
    wander: float = 2.0  # how far the face moves, in its sizes
    fit_px: float = 4.0  # error of the head model
    sharpness: float = 0.05  # share of the face's contrast in its finest detail
    luma: tuple[float, float] = (50.0, 210.0)  # brightness of the face
    burnt_share: float = 0.02  # of the face
    light_ratio: float = 1.3  # between the brightest and the darkest face
    cut: float = 0.2  # change of the small picture
    covered: float = 0.15  # correlation of the mouth with its median picture
    covered_least: int = 4  # covered frames that are reported ...
    covered_share: float = 0.01  # ... or share of the frames
    rotation_deg: float = 35.0  # range of the head's rotation
    mouth_range: float = 0.06  # opening, in eye distances
    quiet_db: float = -35.0  # loudest part of the sound
    clipped_share: float = 0.001  # of the samples
    samples: int = 12  # frames that sharpness and brightness are measured on


@dataclass(frozen=True)
class Finding:
    """One line of the report; the advice is empty where all is well."""

    name: str
    value: str
    advice: str = ""


@dataclass(frozen=True)
class FaceQuality:
    """Medians over some frames: contrast in the finest detail, brightness, share of burnt-out pixels."""

    sharpness: float
    luma: float
    burnt: float


@dataclass(frozen=True)
class Survey:
    """What happens along the clip: frames at which a cut is, frames with a covered mouth, range of the brightness."""

    cuts: list[int]
    covered: list[int]
    luma_low: float
    luma_high: float


@dataclass(frozen=True, eq=False)
class Recording:
    """Everything that was measured.

    missing_frames, first_missing: frames without a face · fit_px, focal_px: of the head model
    """

    video: VideoInfo
    faces: FaceSearch
    crop: Crop
    missing_frames: int
    first_missing: int | None
    fit_px: float
    focal_px: float
    choice: Choice
    sound: Sound
    offset: Offset | None
    track: FaceTrack
    quality: FaceQuality
    survey: Survey

    @property
    def defects(self) -> list[Defect]:
        """Of frames, in order."""
        return [Defect(**defect) for defect in self.crop.defects]

    @property
    def eye_distance_px(self) -> Float[np.ndarray, "t"]:
        """Distance of the outer eye corners."""
        points = self.track.landmarks_px.numpy()
        return np.linalg.norm(points[:, RIGHT_EYE_OUTER] - points[:, LEFT_EYE_OUTER], axis=1)

    @property
    def mouth_range(self) -> float:
        """Range of the inner lips' gap (5th to 95th percentile), in eye distances."""
        points = self.track.landmarks_px.numpy()
        good = usable(len(points), self.defects)
        opening = np.linalg.norm(points[:, UPPER_LIP_INNER] - points[:, LOWER_LIP_INNER], axis=1) / self.eye_distance_px
        opening = opening[good] if good.any() else opening
        return float(np.percentile(opening, 95) - np.percentile(opening, 5))


@dataclass(frozen=True)
class CaptureReport:
    """Findings for the user, and the figures behind them."""

    items: list[dict[str, str]]
    figures: dict[str, Any]


def capture_report(recording: Recording, config: ReportConfig) -> CaptureReport:
    """All findings, in the order in which they are shown."""
    survey, quality = recording.survey, recording.quality
    figures = {
        "face_px": round(recording.faces.size_px, 1),
        "eye_distance_px": round(float(np.median(recording.eye_distance_px)), 1),
        "missing_frames": recording.missing_frames,
        "unusable_frames": int((~usable(recording.crop.frame_count, recording.defects)).sum()),
        "other_faces": len(recording.faces.others),
        "fit_error_px": round(recording.fit_px, 3),
        "mouth_range": round(recording.mouth_range, 4),
        **{name: round(value, 4) for name, value in asdict(quality).items()},
        "cuts": len(survey.cuts),
        "covered_frames": len(survey.covered),
        "luma_range": [round(survey.luma_low, 1), round(survey.luma_high, 1)],
        "rotation_deg": [round(v, 1) for v in head_rotation_deg(recording.track)],
    }
    return CaptureReport([asdict(finding) for finding in _findings(recording, config)], figures)


# ---- checks ----


def _finding(name: str, value: str, bad: bool, advice: str) -> Finding:
    return Finding(name, value, advice if bad else "")


def _findings(r: Recording, config: ReportConfig) -> Iterator[Finding]:
    """All of them, in the order in which they are shown."""
    yield from _of_the_video(r, config)
    yield from _of_the_face(r, config)
    yield from _of_the_light(r, config)
    yield from _of_the_movement(r, config)
    yield from _of_the_sound(r, config)


def _of_the_video(r: Recording, config: ReportConfig) -> Iterator[Finding]:
    count, info = r.crop.frame_count, r.video
    value = f"{count / FPS:.1f} s, {count} frames at 25 fps"
    yield _finding("length", value, count / FPS < config.min_seconds, "A minute or more teaches the mouth better.")
    if len(r.choice.runs) != 1 or r.choice.runs[0] != [0, count]:
        value = f"{r.choice.seconds:.0f} s with the most poses and mouth shapes; its speech from all"
        yield Finding("head learned from", value)
    rotated = f", turned {info.rotation_deg}°" if info.rotation_deg else ""
    yield Finding("video", f"{info.width}x{info.height} px, {info.fps:.4g} fps, {info.codec}{rotated}")
    if info.notes:
        yield Finding("file", "unusual", " ".join(info.notes))
    if info.hdr:
        yield Finding("colour", "high dynamic range", "Colours come out flat: film in SDR.")
    if info.interlaced:
        yield Finding("scanning", "interlaced", "Combing hurts moving lips: deinterlace it first.")


def _of_the_face(r: Recording, config: ReportConfig) -> Iterator[Finding]:
    px = r.faces.size_px
    value = f"{px:.0f} px in the video, {px * r.crop.scale:.0f} px in the crop"
    yield _finding("face", value, px < config.min_face, "Small: film closer, or in a higher resolution.")
    (x0, y0, side), (left, top, right, bottom) = r.crop.box, r.faces.reach
    wander = max(right - left, bottom - top) / px
    advice = f"The face wanders over {wander:.1f} face sizes, so it is small in the crop: sit still."
    yield _finding("crop", f"{side} px square at ({x0}, {y0})", wander > config.wander, advice)
    if r.faces.others:
        advice = "The largest that stays was taken. Film one person alone."
        yield Finding("people", f"{1 + len(r.faces.others)} faces", advice)
    if r.missing_frames and r.first_missing is not None:
        value = f"{r.missing_frames} frames, first at {clock(r.first_missing)}"
        yield Finding("missing face", value, "They are interpolated.")
    if r.defects:
        count = int((~usable(r.crop.frame_count, r.defects)).sum())
        shown = [f"{d.kind} {clock(d.first)}-{clock(d.end)}" for d in r.defects[:_MOST_DEFECTS]]
        more = f" and {len(r.defects) - len(shown)} more" if len(r.defects) > len(shown) else ""
        advice = "Not learned from. The longest part without them drives the avatar."
        yield Finding("unusable", f"{count} frames: {', '.join(shown)}{more}", advice)
    value = f"{r.fit_px:.1f} px mean landmark error, focal length {r.focal_px:.0f} px"
    yield _finding("fit", value, r.fit_px > config.fit_px, "The head model fits badly.")


def _of_the_light(r: Recording, config: ReportConfig) -> Iterator[Finding]:
    sharpness, luma = r.quality.sharpness, r.quality.luma
    advice = "Blurred: check focus, use more light or a shorter exposure."
    yield _finding("sharpness", f"{sharpness:.2f}", sharpness < config.sharpness, advice)
    advice = "Too dark or too bright: use soft light from the front."
    yield _finding("light", f"face at {luma:.0f} of 255", not config.luma[0] <= luma <= config.luma[1], advice)
    low, high = r.survey.luma_low, r.survey.luma_high
    advice = "One colour a place is learned: film in even light, or trim to it with --start and --duration."
    bad = high > config.light_ratio * max(low, 1)
    yield _finding("light changes", f"face from {low:.0f} to {high:.0f}", bad, advice)


def _of_the_movement(r: Recording, config: ReportConfig) -> Iterator[Finding]:
    cuts, covered = r.survey.cuts, r.survey.covered
    if cuts:
        advice = "One take of one person is learned: trim to it with --start and --duration."
        yield Finding("cuts", f"{len(cuts)}, first at {clock(cuts[0])}", advice)
    if len(covered) >= max(config.covered_least, config.covered_share * r.crop.frame_count):
        advice = "A hand or a thing before the mouth is learned as part of it: trim it away."
        yield Finding("covered mouth", f"{len(covered)} frames, first at {clock(covered[0])}", advice)
    low, high = head_rotation_deg(r.track)
    advice = "Wide: cheeks and hair that few frames show come out badly. Face the camera more."
    value = f"{low:.0f} to {high:+.0f} degrees sideways"
    yield _finding("head turns", value, high - low > config.rotation_deg, advice)
    if r.quality.burnt > config.burnt_share:
        yield Finding("burnt out", f"{100 * r.quality.burnt:.0f} % of the face", "Expose less.")
    value = f"{100 * r.mouth_range:.0f} % of the eye distance"
    advice = "The mouth hardly moves: speak clearly."
    yield _finding("mouth range", value, r.mouth_range < config.mouth_range, advice)


def _of_the_sound(r: Recording, config: ReportConfig) -> Iterator[Finding]:
    sound, offset = r.sound, r.offset
    if not sound.present:
        yield Finding("sound", "none", "The renderer learns from it; generic speech models will drive the mouth.")
    elif not sound.usable:
        yield Finding("sound", f"silent (loudest {sound.loudest_db:.0f} dB)", "Taken as a video without sound.")
    else:
        value = f"loudest {sound.loudest_db:.0f} dB, {100 * sound.quiet:.0f} % quiet"
        yield _finding("sound", value, sound.loudest_db < config.quiet_db, "Quiet: move the microphone closer.")
    if sound.usable and sound.clipped > config.clipped_share:
        yield Finding("overdriven", f"{100 * sound.clipped:.1f} % of the samples", "Record with less gain.")
    if offset is not None and not offset.reliable:
        yield Finding("audio offset", "not measurable, taken as 0", "Too little clear speech to measure it.")
    elif offset is not None:
        value = f"picture {'leads' if offset.frames < 0 else 'trails'} by {abs(offset.frames):g} frames, corrected"
        yield Finding("audio offset", value if offset.frames else "in sync")


# ---- measurements ----


def head_rotation_deg(track: FaceTrack) -> tuple[float, float]:
    """How far the head turns to its right (negative) and left over the clip (1st and 99th percentile)."""
    forward = track.motion.T_camera_head[:, :3, 2].numpy()  # the head's z, out of the face, in the camera frame
    low, high = np.percentile(np.degrees(np.arctan2(forward[:, 0], -forward[:, 2])), [1, 99])
    return float(low), float(high)


def face_quality(pictures: Pictures | GrayPictures, track: FaceTrack, samples: int) -> FaceQuality:
    """Sharpness and brightness of the face, over some frames."""
    sharpness, luma, burnt = [], [], []
    count, pictures = len(track.landmarks_px), GrayPictures.of(pictures)
    for t in np.linspace(0, count - 1, min(samples, count)).round().astype(int):
        grey = pictures.gray(int(t)).astype(np.float32)
        face = _inside(grey, track.landmarks_px[int(t)].numpy(), least=8)
        fine = face - cv2.GaussianBlur(face, (0, 0), 1.5)
        sharpness.append(fine.std() / max(face.std(), 1e-3))
        luma.append(face.mean())
        burnt.append((face > 252).mean())
    return FaceQuality(float(np.median(sharpness)), float(np.median(luma)), float(np.median(burnt)))


def survey_clip(
    pictures: Pictures | GrayPictures,
    track: FaceTrack,
    config: ReportConfig,
    report: Report,
    good: Bool[np.ndarray, "t"] | None = None,
) -> Survey:
    """One pass over the clip that keeps some hundred bytes of a frame.

    The brightness is the upper face's (2nd and 98th percentile over frames). Frames that are not `good` do not count.
    """
    points = track.landmarks_px.numpy()
    count = len(points)
    good = np.ones(count, bool) if good is None or not good.any() else good
    luma, cuts, before = np.zeros(count), [], None
    mouths = np.zeros((count, _PATCH_PX**2), np.uint8)
    for t, grey in enumerate(map_frames(GrayPictures.of(pictures).gray, range(count))):
        small = cv2.resize(grey, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float32)
        small /= max(small.mean(), 1.0)
        if before is not None and good[t - 1 : t + 1].all() and np.abs(small - before).mean() > config.cut:
            cuts.append(t)
        before = small
        mouths[t] = _mouth_patch(grey, points[t]).ravel()
        luma[t] = _inside(grey, points[t, _UPPER_FACE], least=1).mean()
        report(t + 1, count)
    kept = mouths[good]
    usual = np.median(kept[np.linspace(0, len(kept) - 1, min(len(kept), _MOST_PATCHES)).astype(int)], 0)
    alike = [_correlation(patch.astype(np.float32), usual) for patch in mouths]
    low, high = np.percentile(luma[good], [2, 98])
    covered = [t for t, c in enumerate(alike) if good[t] and c < config.covered]
    return Survey(cuts, covered, float(low), float(high))


def _inside(grey: np.ndarray, points: Float[np.ndarray, "n 2"], least: int) -> np.ndarray:
    """The picture within the points' bounding box, at least `least` px wide."""
    x0, y0 = np.clip(points.min(0), 0, np.array(grey.shape[::-1]) - least).astype(int)
    x1, y1 = np.clip(points.max(0), (x0 + least, y0 + least), grey.shape[::-1]).astype(int)
    return grey[y0:y1, x0:x1]


def _mouth_patch(grey: UInt8[np.ndarray, "h w"], points: Float[np.ndarray, "478 2"]) -> UInt8[np.ndarray, "s s"]:
    """The mouth, rotated upright, one eye distance wide."""
    right, left = points[MOUTH_CORNERS_INNER[0]], points[MOUTH_CORNERS_INNER[1]]
    across = (left - right) / max(np.linalg.norm(left - right), 1e-3)
    across *= max(np.linalg.norm(points[RIGHT_EYE_OUTER] - points[LEFT_EYE_OUTER]), 1.0)
    down = np.array([-across[1], across[0]])
    corner = (left + right) / 2 - across / 2 - 0.35 * down - 0.5
    to = np.array([[0, 0], [_PATCH_PX, 0], [0, _PATCH_PX]], np.float32)
    matrix = cv2.getAffineTransform(np.array([corner, corner + across, corner + 0.7 * down], np.float32), to)
    return cv2.warpAffine(grey, matrix, (_PATCH_PX, _PATCH_PX), borderMode=cv2.BORDER_REPLICATE)


def _correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / max(np.sqrt((a * a).sum() * (b * b).sum()), 1e-6))


def print_report(report: dict[str, Any]) -> None:
    """The capture report as a table on standard error, with what would help."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Capture report", title_justify="left", box=None, pad_edge=False)
    for column in ("", "measured", "advice"):
        table.add_column(column)
    for item in report["items"]:
        advice = f"[yellow]{item['advice']}[/]" if item["advice"] else "[green]good[/]"
        table.add_row(item["name"], item["value"], advice)
    Console(stderr=True).print(table)
