"""The report on an avatar (EVALUATION.md): what it makes of the part of its clip that it has not seen, beside the truth
and a control.

Regions are the frame, the head mask and the mouth box; rows are

    ground_truth  the test frames themselves: each measure's best value, the detector's and the sync measure's own
    control       a static head, the mean of the training frames, pasted on the test frames over the region that composition does not read
    tracked       the avatar under the motion tracked from the test frames: measures the renderer
    audio         the avatar under motion predicted from the test sound, head pose, upper face and eyes from the test
                  track: measures the system

Every row but the first is pasted into the true test frames, so the background is exact in all of them and lifts the
whole frame's PSNR; a result is its distance from the control. Frames are compared as composed, before any lossy
encoding. In JSON an infinite PSNR (the truth's) is null, as is whatever could not be measured; `notes` says why.
"""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hicode.avatar.compositor import dilate_mask, hidden_mask
from hicode.avatar.driving import SilenceGate, frame_rms, merge_motion, resting_mouth
from hicode.clip import SAMPLES_PER_FRAME, Clip
from hicode.errors import FileFormatError, HicodeError, InputError
from hicode.evaluation.images import REGIONS, Truth, mean_of_frames, seam_error
from hicode.evaluation.lips import DETECTOR, correlation, detect, jitter, lip_distance, lip_distances, opening
from hicode.files import check_writable, write_json
from hicode.motion import Motion
from hicode.progress import progress_bar
from hicode.runtime import Device, peak_memory_mb, resolve_device

if TYPE_CHECKING:
    from hicode.face.landmarks import FaceLandmarker

SCHEMA, VERSION = "hicode-report", 1
Mode = Literal["tracked", "audio"]
ROWS = ("ground_truth", "control", "tracked", "audio")
MAX_MEAN_FRAMES = 100  # training frames that the control's mean head is made of, spread evenly
MIN_SYNC_FRAMES = 50  # below two seconds the sync measure has nothing to go by
WORST_SHOWN, SPREAD_SHOWN, STRIP_SHOWN = 5, 3, 12

DEFINITIONS = {
    "frame": "all pixels; LPIPS as published (AlexNet)",
    "head": "pixels of the head mask (128 and above): PSNR over them, SSIM map and LPIPS layers averaged over them",
    "mouth": (
        "box around the true lips, padded by 0.35 of their width: PSNR and SSIM map over it, "
        "LPIPS of the box alone (at least 64 px a side)"
    ),
    "psnr": "dB, mean over frames; null for the truth against itself (infinite)",
    "lmd_px": "40 lip landmarks, each set minus its mean, mean distance in px of a frame 512 px wide",
    "lmd_iod": "the same over the distance of the outer eye corners",
    "jitter_px": "mean second difference of all landmarks, each frame's shift, turn and scale taken out, px at 512",
    "seam": "mean difference of gradients from the truth's in a band of 4 px about the composition's boundary",
    "sync_offset_frames": "frames by which the mouth is later than the sound, by hicode.speech.sync (not SyncNet)",
    "sync_margin": "correlation at that offset less the median over offsets",
}


class Speaker(Protocol):
    """The part of `SpeechModels` that is used here."""

    encoder: str

    def predict(self, features: Float[Tensor, "2*t d"]) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]: ...


class Evaluated(Protocol):
    """The part of `Avatar` that is used here."""

    speech: Speaker | None
    driving: Motion
    mouth_expression: Tensor
    mouth_landmark_weight: Tensor
    info: dict
    source: dict

    def synthesize_frame(
        self, motion: Motion, t: int, frame: UInt8[np.ndarray, "h w 3"], head_mask: UInt8[np.ndarray, "h w"]
    ) -> UInt8[np.ndarray, "h w 3"]: ...


def evaluate(
    avatar: Evaluated | Path | str,
    clip: Clip | Path | str,
    json: Path | str | None = None,
    html: Path | str | None = None,
    modes: Sequence[Mode] = ("tracked", "audio"),
    device: Device = "auto",
    progress: bool = True,
    vgg: bool = False,
) -> dict:
    """Measure an avatar on the test part of its clip; the figures as a dict, on request as a JSON file and a page with
    pictures.

    `progress` shows the bar and prints the table. `vgg` adds LPIPS by VGG16 over the whole frame (a second or two a
    frame and row). A clip without sound, or an avatar without speech models, has no audio row: it is null, and `notes`
    says so. Raises InputError where clip and avatar do not belong together or nothing is left to test, FileFormatError
    for files that are no such thing.
    """
    unknown = [m for m in modes if m not in ("tracked", "audio")]
    if unknown:
        raise InputError(f"There is no driving mode {unknown[0]!r}. Choose tracked, audio or both.")
    for place in filter(None, (json, html)):
        check_writable(place)
    place = resolve_device(device)
    if isinstance(avatar, (str, Path)):
        from hicode.avatar.avatar import Avatar

        avatar = Avatar.load(avatar)
    if place != "cpu":
        avatar = avatar.to(place)
    clip = clip if isinstance(clip, Clip) else Clip.open(clip)
    started = time.perf_counter()
    work = _Work(avatar, clip)
    work.check()
    motions = work.motions(modes)
    rows = {"ground_truth": _Row(), "control": _Row()} | {mode: _Row() for mode in motions}
    with progress_bar("Measuring", progress) as report:
        _measure(work, motions, rows, vgg, report)
    out = _figures(work, rows, motions)
    out["evaluation"] = {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
    out = _jsonable(out)
    if json:
        write_json(Path(json), out)
    if html:
        from hicode.evaluation.page import write_page

        write_page(Path(html), out, _pictures(work, motions, rows))
    if progress:
        print_table(out)
    return out


# ----------------------------------------------------------------------------------------------------------------- rows


@dataclass
class _Row:
    """What was measured of one row: a list entry a test frame."""

    images: list[dict] = field(default_factory=list)
    points: list[np.ndarray] = field(default_factory=list)
    seam: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def landmarks(self) -> Float[np.ndarray, "t 478 3"]:
        return np.stack(self.points)


class _Work:
    """An avatar, a clip, and how to make each row's frames."""

    def __init__(self, avatar: Evaluated, clip: Clip):
        self.avatar, self.clip = avatar, clip
        self.test = list(clip.test)
        self.notes: list[str] = []
        self.speech_seconds: float | None = None  # a frame's share of encoding and prediction
        self.predicted_opening: np.ndarray | None = None

    def check(self) -> None:
        if not self.test or not len(self.clip.train):
            raise InputError(
                f"{self.clip.path} has {len(self.clip.train)} training and {len(self.test)} test frames: "
                "nothing to measure. Prepare a longer video."
            )
        plate = getattr(self.avatar, "plate", None)
        if plate is not None and plate.shape[:2] != (self.clip.height, self.clip.width):
            raise InputError(
                f"The avatar makes frames of {plate.shape[1]}x{plate.shape[0]}, "
                f"the clip has {self.clip.width}x{self.clip.height}. Evaluate it on the clip that it was trained on."
            )
        mine, theirs = self.avatar.source.get("sha256"), self.clip.source.get("sha256")
        if mine and theirs and mine != theirs:
            self.notes.append(
                "The avatar was trained on another video than this clip's: no figure here is comparable with any other."
            )

    def motions(self, modes: Sequence[Mode]) -> dict[str, Motion]:
        """The test frames' motion in each driving mode that is asked for and possible."""
        tracked = self.clip.track.motion[slice(self.test[0], self.test[-1] + 1)]
        out: dict[str, Motion] = {}
        if "tracked" in modes:
            out["tracked"] = tracked
        if "audio" in modes:
            spoken = self._spoken(tracked)
            if spoken is not None:
                out["audio"] = spoken
        return out

    def _spoken(self, tracked: Motion) -> Motion | None:
        """Mouth and jaw from the test sound (resting in silence, as `speak` has it), the rest from the test track."""
        speech, sound = self.avatar.speech, self.clip.audio()
        if speech is None:
            self.notes.append("No audio row: the avatar has no speech models.")
            return None
        if sound is None:
            self.notes.append("No audio row: the clip has no sound.")
            return None
        from hicode.speech.encoder import speech_level

        first, end = self.test[0], self.test[-1] + 1
        features = self.clip.speech_features(speech.encoder)[2 * first : 2 * end]
        started = time.perf_counter()
        with torch.inference_mode():
            expression, landmarks = speech.predict(features)
        predicting = time.perf_counter() - started
        heard = sound[first * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]
        self.speech_seconds = (predicting + self._encoding_seconds(speech.encoder, heard)) / len(self.test)
        gate = SilenceGate(speech_level(heard))
        share = torch.from_numpy(np.concatenate([gate.push(frame_rms(heard, SAMPLES_PER_FRAME)), gate.finish()]))
        rest_expression, rest_landmarks = resting_mouth(self.avatar.driving, self.avatar)
        expression = torch.lerp(rest_expression, expression, share[:, None])
        landmarks = torch.lerp(rest_landmarks, landmarks, share[:, None, None])
        motion = merge_motion(tracked, expression, landmarks, self.avatar)
        self.predicted_opening = opening(motion.landmarks.numpy())
        return motion

    def _encoding_seconds(self, name: str, heard: np.ndarray) -> float:
        from hicode.speech.encoder import create_encoder

        try:
            encoder = create_encoder(name)
        except (HicodeError, OSError, ImportError) as error:
            # A hub's model that is not here: its features came with the clip, only its time is unknown.
            self.notes.append(f"fps leaves the {name} encoder out: it is not here ({error}).")
            return 0.0
        started = time.perf_counter()
        encoder.encode(heard)
        return time.perf_counter() - started

    def frame(self, name: str, motion: Motion, i: int) -> UInt8[np.ndarray, "h w 3"]:
        """Test frame i of a driven row: composited into the true frame, of which only what lies outside the hidden
        region (the head and a rim of 4 px) can show."""
        t = self.test[i]
        return self.avatar.synthesize_frame(motion, i, self.clip.image(t), self.clip.head_mask(t))

    @cached_property
    def mean_frame(self) -> UInt8[np.ndarray, "h w 3"]:
        """The mean training frame, its head static and blurred: the control's head."""
        train = list(self.clip.train)
        picked = sorted({train[int(k)] for k in np.linspace(0, len(train) - 1, min(len(train), MAX_MEAN_FRAMES))})
        total = np.zeros((self.clip.height, self.clip.width, 3))
        for t in picked:
            total += self.clip.image(t)
        return (total / len(picked) + 0.5).astype(np.uint8)

    def control(self, i: int) -> UInt8[np.ndarray, "h w 3"]:
        t = self.test[i]
        return np.where(hidden_mask(self.clip.head_mask(t))[..., None] > 0, self.mean_frame, self.clip.image(t))

    @cached_property
    def landmarker(self) -> "FaceLandmarker":
        from hicode.face.landmarks import FaceLandmarker

        return FaceLandmarker()


def _measure(
    work: _Work, motions: dict[str, Motion], rows: dict[str, _Row], vgg: bool, report: Callable[[int, int], None]
) -> None:
    perfect = {region: {"psnr": float("inf"), "ssim": 1.0, "lpips": 0.0} for region in REGIONS}
    if vgg:
        perfect["frame"] = perfect["frame"] | {"lpips_vgg": 0.0}
    for name, motion in motions.items():
        work.frame(name, motion, 0)  # compiles and warms what is measured below
    for i, t in enumerate(work.test):
        picture, head_mask = work.clip.image(t), work.clip.head_mask(t)
        truth = Truth(picture, head_mask, work.clip.track.mouth_box(t), vgg)
        region = dilate_mask(head_mask)
        for name, row in rows.items():
            if name == "ground_truth":
                image = picture
                row.images.append(perfect)
            elif name == "control":
                image = work.control(i)
                row.images.append(truth.compare(image))
            else:
                started = time.perf_counter()
                image = work.frame(name, motions[name], i)
                row.seconds.append(time.perf_counter() - started)
                row.images.append(truth.compare(image))
            row.points.append(detect([image], work.landmarker)[0])
            row.seam.append(seam_error(image, picture, region))
        report(i + 1, len(work.test))


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(work: _Work, rows: dict[str, _Row], motions: dict[str, Motion]) -> dict:
    clip, avatar = work.clip, work.avatar
    truth_points = rows["ground_truth"].landmarks()
    sync = _sync(work, rows)
    out: dict = {"schema": SCHEMA, "version": VERSION} | {name: None for name in ROWS}
    for name, row in rows.items():
        points = row.landmarks()
        distance = lip_distance(points, truth_points, clip.width)
        figures: dict = {
            region: {
                metric: mean_of_frames([frame[region][metric] for frame in row.images])
                for metric in row.images[0][region]
            }
            for region in REGIONS
        }
        figures |= {"lmd_px": distance.px, "lmd_iod": distance.iod, "missed_faces": distance.missed}
        figures |= sync[name]
        figures |= {
            "jitter_px": jitter(points, clip.width),
            "seam": mean_of_frames(row.seam),
            "opening_correlation": correlation(opening(points), opening(truth_points)),
        }
        out[name] = figures
        if distance.missed:
            work.notes.append(
                f"{name}: no face found in {distance.missed} of {distance.frames} frames; they are left out of LMD."
            )
    out["over_control"] = {
        mode: {region: _minus(out[mode][region]["psnr"], out["control"][region]["psnr"]) for region in REGIONS}
        | {"lmd_px": _minus(out[mode]["lmd_px"], out["control"]["lmd_px"])}
        for mode in motions
    }
    timing = _timing(work, rows, motions)
    info = avatar.info
    out |= {
        "seconds": _stage_seconds(clip, info),
        "fps": timing["fps"],
        "peak_memory_mb": info.get("peak_memory_mb") or peak_memory_mb(),
        "timing": timing,
        "detector": DETECTOR,
        "split": {
            "train": [clip.train[0], clip.train[-1] + 1],
            "test": [work.test[0], work.test[-1] + 1],
            "fps": clip.fps,
        },
        "upper_face": "head pose, upper face and eyes of both driving modes are the test video's own track",
        "definitions": DEFINITIONS,
        "notes": work.notes,
        "per_frame": {name: _per_frame(row, truth_points, clip.width) for name, row in rows.items()},
        "provenance": _provenance(clip, avatar),
    }
    if work.predicted_opening is not None:
        out["per_frame"]["audio"]["opening_predicted"] = list(work.predicted_opening)
    return out


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _per_frame(row: _Row, truth_points: np.ndarray, width: int) -> dict[str, list[float]]:
    points = row.landmarks()
    return {
        "psnr_head": [frame["head"]["psnr"] for frame in row.images],
        "psnr_mouth": [frame["mouth"]["psnr"] for frame in row.images],
        "lpips_frame": [frame["frame"]["lpips"] for frame in row.images],
        "lmd_px": list(lip_distances(points, truth_points)[0] * 512 / width),
        "opening": list(opening(points)),
    }


def _sync(work: _Work, rows: dict[str, _Row]) -> dict[str, dict]:
    """Sync of each row's frames with the test sound; None where it cannot be known."""
    nothing = {"sync_offset_frames": None, "sync_margin": None}
    unknown = {name: dict(nothing) for name in rows}
    if work.clip.audio() is None:
        work.notes.append("No sync: the clip has no sound.")
        return unknown
    if len(work.test) < MIN_SYNC_FRAMES:
        work.notes.append(
            f"No sync: {len(work.test)} test frames, at least {MIN_SYNC_FRAMES} (two seconds) are needed. "
            "A clip of 22 s or more has them."
        )
        return unknown
    from hicode.speech.sync import SyncModel, estimate_offset, shuffled_control, sync_auc

    try:
        model = SyncModel.load()
    except FileFormatError as error:
        work.notes.append(f"No sync: {error}")
        return unknown
    features = work.clip.speech_features(model.encoder)[2 * work.test[0] : 2 * (work.test[-1] + 1)]
    out = {}
    for name, row in rows.items():
        points = _without_gaps(row.landmarks())
        if points is None:
            out[name] = dict(nothing)
            continue
        landmarks = torch.from_numpy(points)
        result = estimate_offset(features, landmarks, model)
        auc = sync_auc(features, landmarks, offset_frames=round(result.offset_frames), model=model)[0]
        out[name] = {
            "sync_offset_frames": result.offset_frames if result.margin > 0 else None,
            "sync_margin": result.margin,
            "sync_margin_shuffled": shuffled_control(features, landmarks, model).margin,
            "sync_auc_shifted": auc,
            "sync_reliable": bool(result.reliable),
        }
    return out


def _without_gaps(points: Float[np.ndarray, "t 478 3"]) -> Float[np.ndarray, "t 478 3"] | None:
    """Frames without a face, interpolated; None where half of them or more are."""
    known = np.isfinite(points).all((1, 2))
    if known.mean() <= 0.5:
        return None
    times = np.arange(len(points))
    flat = points.reshape(len(points), -1)
    filled = np.stack([np.interp(times, times[known], column[known]) for column in flat.T], 1)
    return filled.reshape(points.shape).astype(np.float32)


def _timing(work: _Work, rows: dict[str, _Row], motions: dict[str, Motion]) -> dict:
    """Medians in ms, warmed, one frame at a time; fps is from sound to final frame where there is sound, else from
    motion to final frame."""
    out: dict = {"fps": None}
    if not motions:
        return out
    name = "audio" if "audio" in motions else "tracked"
    frame = float(np.median(rows[name].seconds))
    out["frame_ms"] = 1000 * frame
    out["speech_ms"] = None if work.speech_seconds is None else 1000 * work.speech_seconds
    out["fps"] = 1 / (frame + (work.speech_seconds or 0.0)) if name == "audio" else 1 / frame
    out["fps_is"] = "sound to final frame" if name == "audio" else "motion to final frame"
    avatar = work.avatar
    if hasattr(avatar, "deformed") and hasattr(avatar, "render"):
        from hicode.render import rasterize

        motion, looks = motions[name], range(min(10, len(work.test)))
        out["deform_rasterise_ms"] = _median_ms(lambda i: avatar.render(motion, i), looks)
        moved = [avatar.deformed(motion, i) for i in looks]
        black = torch.zeros(3)
        with torch.no_grad():
            out["rasterise_ms"] = _median_ms(
                lambda i: rasterize(moved[i], avatar.camera.with_pose(motion.T_camera_head[i]), black), looks
            )
    return out


def _median_ms(work: Callable[[int], object], looks: range) -> float:
    seconds = []
    for i in looks:
        started = time.perf_counter()
        work(i)
        seconds.append(time.perf_counter() - started)
    return 1000 * float(np.median(seconds))


def _stage_seconds(clip: Clip, info: dict) -> dict[str, float]:
    steps = clip.config.get("steps", {})
    prepared = sum(step.get("seconds", 0.0) for step in steps.values() if isinstance(step, dict))
    return ({"prepare": prepared} if prepared else {}) | dict(info.get("seconds", {}))


def _provenance(clip: Clip, avatar: Evaluated) -> dict:
    from hicode.avatar.avatar import provenance

    made = {key: avatar.info[key] for key in ("preset", "seed", "config", "provenance") if key in avatar.info}
    source = {key: clip.source[key] for key in ("name", "sha256") if key in clip.source}
    size = {"width": clip.width, "height": clip.height, "audio_offset_frames": clip.audio_offset_frames}
    return {"evaluated": datetime.date.today().isoformat(), **provenance(), "clip": source | size, "avatar": made}


def _jsonable(value):
    """Plain numbers, six digits after the point; what is no finite number is None: JSON has neither infinity nor
    NaN."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if np.isfinite(value) else None
    return value


# -------------------------------------------------------------------------------------------------------------- showing


TITLES = {"ground_truth": "ground truth", "control": "control", "tracked": "tracked", "audio": "audio"}
# (column, where in a row, digits)
COLUMNS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    *(
        (f"{region} {metric.upper()}", (region, metric), digits)
        for region in REGIONS
        for metric, digits in (("psnr", 2), ("ssim", 3), ("lpips", 3))
    ),
    ("LMD px", ("lmd_px",), 2),
    ("LMD/IOD", ("lmd_iod",), 4),
    ("sync", ("sync_offset_frames",), 1),
    ("margin", ("sync_margin",), 2),
    ("jitter px", ("jitter_px",), 2),
    ("seam", ("seam",), 4),
)


def cell(row: dict, where: tuple[str, ...], digits: int) -> str:
    """A figure as shown: "∞" for the truth's PSNR, "–" for what is not known."""
    value = row
    for key in where:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        return "∞" if where[-1] == "psnr" and row.get("frame", {}).get("ssim") == 1 else "–"
    return f"{value:.{digits}f}"


def headlines(report: dict) -> list[str]:
    """What the figures come to, a line each."""
    lines = []
    for mode, gain in report["over_control"].items():
        parts = [f"{region} {gain[region]:+.2f} dB" for region in REGIONS if gain[region] is not None]
        if gain["lmd_px"] is not None:
            parts.append(f"LMD {gain['lmd_px']:+.2f} px")
        lines.append(f"{mode} over the control: {', '.join(parts)}")
    if report["fps"] is not None:
        lines.append(
            f"{report['fps']:.1f} frames a second, {report['timing']['fps_is']}, on {report['provenance']['machine']}"
        )
    if report["seconds"]:
        lines.append(
            "seconds: "
            + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report["seconds"].items())
            + f"; {report['peak_memory_mb']:.0f} MB"
        )
    return lines + report["notes"]


def print_table(report: dict, console=None) -> None:
    """The report as a table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    first, end = report["split"]["test"]
    title = f"{report['provenance']['clip'].get('name', 'clip')}: {end - first} unseen frames ({first} … {end - 1})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    shown = [name for name in ROWS if report[name] is not None]
    # Measures go down and driving modes across, unlike on the page: four columns fit any terminal.
    table.add_column("", no_wrap=True)
    for name in shown:
        table.add_column(TITLES[name], justify="right", no_wrap=True)
    for column, where, digits in COLUMNS:
        table.add_row(column, *(cell(report[name], where, digits) for name in shown))
    console.print(table)
    for line in headlines(report):
        console.print(line, highlight=False)


# ------------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class ShownFrame:
    """A test frame as the page shows it: the truth and each row's image, and the row whose error chose it."""

    t: int
    why: str
    truth: UInt8[np.ndarray, "h w 3"]
    images: dict[str, UInt8[np.ndarray, "h w 3"]]
    mouth_box: tuple[int, int, int, int]
    psnr_head: dict[str, float]


@dataclass(frozen=True)
class Pictures:
    """`frames` side by side, worst first; `strip`: (frame, {row: mouth crop}) evenly through the test part."""

    frames: list[ShownFrame]
    strip: list[tuple[int, dict[str, UInt8[np.ndarray, "h w 3"]]]]


def _pictures(work: _Work, motions: dict[str, Motion], rows: dict[str, _Row]) -> Pictures:
    """Frames are made again instead of kept: a test part may be minutes long."""
    judged = "audio" if "audio" in motions else "tracked" if "tracked" in motions else "control"
    order = np.argsort(
        [np.nan_to_num(frame["head"]["psnr"], nan=np.inf) for frame in rows[judged].images], kind="stable"
    )
    worst = [int(i) for i in order[:WORST_SHOWN]]
    spread = [int(i) for i in np.linspace(0, len(work.test) - 1, SPREAD_SHOWN) if int(i) not in worst]
    shown = []
    for i in worst + spread:
        why = f"worst {worst.index(i) + 1} by head PSNR ({judged})" if i in worst else "evenly spread"
        t = work.test[i]
        images = {"control": work.control(i)} | {name: work.frame(name, motion, i) for name, motion in motions.items()}
        scores = {name: rows[name].images[i]["head"]["psnr"] for name in images}
        shown.append(ShownFrame(t, why, work.clip.image(t), images, work.clip.track.mouth_box(t), scores))
    strip = []
    for i in sorted({int(k) for k in np.linspace(0, len(work.test) - 1, STRIP_SHOWN)}):
        t = work.test[i]
        x0, y0, x1, y1 = work.clip.track.mouth_box(t)
        whole = {"ground_truth": work.clip.image(t)} | {
            name: work.frame(name, motion, i) for name, motion in motions.items()
        }
        strip.append((t, {name: image[y0:y1, x0:x1] for name, image in whole.items()}))
    return Pictures(shown, strip)
