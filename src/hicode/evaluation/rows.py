"""What is measured of a row of frames, whoever made them: an avatar (`report`) or another system (`research.compare`).

A row has t frames beside t frames of truth. Figures are means over frames. Landmarks are detected in the row's own
frames and in the truth's by the same detector. What cannot be measured is None, and `not_measured` says why.

A row's figures are a dict; `DEFINITIONS` says what each is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, UInt8
from torch import Tensor

from hicode.audio import frame_rms
from hicode.errors import AssetError, FileFormatError
from hicode.evaluation.config import LipScores, LipStream
from hicode.evaluation.images import AREAS, Box, Truth, mean_of_frames, seam_error
from hicode.evaluation.lips import (
    CLOSED,
    LMD_SIZE_PX,
    SILENCE_DB,
    closure,
    correlation,
    detect,
    jitter,
    lip_distance,
    lip_distances,
    motion_in_silence,
    opening,
    silent_frames,
)
from hicode.evaluation.motion_statistics import motion_statistics
from hicode.motion import N_LANDMARKS
from hicode.speech.loudness import speech_level
from hicode.speech.sync import SyncModel, estimate_offset, shuffled_control, sync_auc, windowed_offsets
from hicode.speech.voice_activity import VadConfig, VoiceActivity
from hicode.tracking.landmarks import FaceLandmarker

MIN_SYNC_FRAMES = 50  # below two seconds the sync measure has nothing to go by
MIN_AUC_FRAMES = 110  # five windows of two seconds, 10 frames apart, with 10 frames to shift on either side

DEFINITIONS = {
    "frame": "all pixels; LPIPS as published (AlexNet)",
    "head": "pixels of the head mask (128 and above): PSNR over them, SSIM map and LPIPS layers averaged over them",
    "mouth": (
        "box around the true lips, padded by 0.35 of their width: PSNR and SSIM map over it, "
        "LPIPS of the box alone (at least 64 px a side)"
    ),
    "psnr": "dB, mean over frames of each frame's own; null where it is infinite (equal images)",
    "ssim": "11 x 11 Gaussian, σ 1.5, data range 1, population covariances, RGB averaged",
    "lmd_px": "40 lip landmarks, each set minus its mean, mean distance in px of a frame 512 px wide",
    "lmd_norm": "the same over the distance of the outer eye corners in the truth",
    "missed_faces": "frames in which the row or the truth has no face: not in LMD, never counted as 0",
    "jitter_px": "mean second difference of all landmarks, each frame's shift, turn and scale removed, px at 512",
    "seam": "mean difference of gradients from the truth's in a band of 4 px about the composition's boundary",
    "opening": "gap of the inner lips over the distance of the outer eye corners",
    "opening_correlation": "Pearson correlation of the opening with the truth's",
    "opening_mean": "mean opening",
    "amplitude": "standard deviation of opening (width) over the truth's",
    "ccc": "Lin's concordance of opening (width) with the truth's: 2 cov / (var + var + (mean - mean)²)",
    "closed_share": f"share of frames with an opening below {CLOSED}; `closed_share_ratio` is over the truth's",
    "lip_dynamics": "mean over pairs of the 40 lip points of the deviation over time of their distance, % of eyes",
    "lip_speed": "mean distance that a lip point travels from frame to frame, pose removed, % of the eye distance",
    "brow_dynamics": "as lip_dynamics, over 20 brow points",
    "head_motion": "√(Σ of deviation × variance of the difference of 3 angles, degrees, + variance of translation)",
    "silent_lip_stability": "median absolute deviation of the opening in silences of .3 s or longer, % of eyes",
    "lip_loudness": "mean |opening - RMS|, both scaled to [0, 1] over the row",
    "scores": "of the last six: 1 - |x - truth| / truth",
    "motion_in_silence": "mean change of the opening a frame in silence over that in speech",
    "silence": f"{-SILENCE_DB:.0f} dB under the speech for .2 s or longer, or no voice by voice activity",
    "sync_offset_frames": "frames by which the mouth is later than the sound, by hicode.speech.sync (not SyncNet)",
    "sync_margin": "correlation at that offset less the median over offsets; `..._shuffled`: the sound rotated",
    "sync_auc_shifted": "how surely two seconds of mouth tell their sound from the same sound 5 ... 10 frames off",
    "sync_windows": "windows of two seconds, 10 frames apart: frame at which each begins, its own offset and margin",
    "sync_windows_near": "share of them whose offset is within a frame of the row's",
    "closure": f"share of the p, b and m due in which the opening comes below {CLOSED}",
    "closed_elsewhere": "share of the other frames in which it does: a mouth that never opens has 1 of both",
}
AVCONF_DEFINITION = {
    "avconf": "SyncNet, the weights given, face boxes from the truth's landmarks: LSE-C, LSE-D, offset"
}


@dataclass(frozen=True, eq=False)
class Compared:
    """One frame of truth and what is compared with it.

    images   by row; a row that has none here is not measured
    regions  by row: what composition may change (255), for the seam
    """

    t: int
    truth: UInt8[np.ndarray, "h w 3"]
    head_mask: UInt8[np.ndarray, "h w"] | None
    mouth_box: Box | None
    images: dict[str, UInt8[np.ndarray, "h w 3"]]
    regions: dict[str, UInt8[np.ndarray, "h w"]]


@dataclass(eq=False)
class Row:
    """What was measured of one row: a list entry a frame. `lips` collects for AVConf where weights are given."""

    images: list[dict] = field(default_factory=list)
    points: list[np.ndarray] = field(default_factory=list)
    seam: list[float] = field(default_factory=list)
    lips: LipStream | None = None

    def landmarks(self) -> Float[np.ndarray, "t 478 3"]:
        """Of all frames, NaN without a face."""
        return np.stack(self.points)


@dataclass(frozen=True, eq=False)
class Sound:
    """The sound of t frames: 16 kHz mono, 640 samples a frame, and its features by an encoder's name, "2*t d"."""

    samples: Float32[np.ndarray, "n"]
    features: Callable[[str], Float[Tensor, "2*t d"]]

    def rms(self) -> Float[np.ndarray, "t"]:
        """Of each frame."""
        return frame_rms(self.samples)

    def silent(self) -> Bool[np.ndarray, "t"]:
        """Frames in which nobody speaks: by loudness, or by voice activity where its encoder can be had."""
        quiet = silent_frames(self.rms(), speech_level(self.samples))
        activity = VoiceActivity.load()
        try:
            scores = activity.frames(self.features(activity.encoder))
        except AssetError:
            return quiet
        return quiet | (scores <= VadConfig().closed_score)


@dataclass
class Findings:
    """What goes into a report beside the figures."""

    notes: list[str] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)


def new_rows(names: Iterable[str], scores: LipScores | None, points: Float[np.ndarray, "t 478 c"]) -> dict[str, Row]:
    """Empty rows. `scores` scores their lips too, found by the truth's landmarks, `points` (px)."""
    return {name: Row(lips=None if scores is None else scores.stream(points)) for name in names}


def measure(
    frames: Iterable[Compared], rows: dict[str, Row], landmarker: FaceLandmarker, vgg: bool = False
) -> Iterator[Compared]:
    """Measure every row in every frame, and give the frames on. The truth's row is called `ground_truth`."""
    for frame in frames:
        truth = Truth(frame.truth, frame.head_mask, frame.mouth_box, vgg)
        for name, row in rows.items():
            image = frame.truth if name == "ground_truth" else frame.images.get(name)
            if image is None:
                row.images.append(truth.unknown())
                row.points.append(np.full((N_LANDMARKS, 3), np.nan, np.float32))
            else:
                row.images.append(truth.perfect() if name == "ground_truth" else truth.compare(image))
                row.points.append(detect([image], landmarker)[0])
            if image is None or name not in frame.regions:
                row.seam.append(float("nan"))
            else:
                row.seam.append(seam_error(image, frame.truth, frame.regions[name]))
            if row.lips is not None:
                row.lips.push(frame.truth if image is None else image)
        yield frame


def figures(
    rows: dict[str, Row],
    width: int,
    sounds: dict[str, Sound | None],
    findings: Findings,
    due: list[tuple[int, int]] | None = None,
    sound_missing: str = "there is no sound",
) -> dict[str, dict]:
    """Each row's figures, by name. `sounds` has each row's sound, `due` the closures due."""
    truth = rows["ground_truth"].landmarks()
    out = {}
    for name, row in rows.items():
        points, sound = row.landmarks(), sounds[name]
        silent = None if sound is None else sound.silent()
        distance, gap = lip_distance(points, truth, width), opening(points)
        came = closure(gap, due) if due else None
        out[name] = {
            **{area: means([f[area] for f in row.images]) for area in AREAS},
            "lmd_px": distance.px,
            "lmd_norm": distance.iod,
            "missed_faces": distance.missed,
            "opening_correlation": correlation(gap, opening(truth)),
            "opening_mean": mean_of_frames(list(gap)),
            "motion": asdict(motion_statistics(points, truth, None if sound is None else sound.rms(), silent)),
            "jitter_px": jitter(points, width),
            "seam": mean_of_frames(row.seam),
            "motion_in_silence": None if silent is None else motion_in_silence(gap, silent),
            "closure": came and came.recall,
            "closures_due": came and came.due,
            "closed_elsewhere": came and came.elsewhere,
        }
        if name != "ground_truth":
            _note_equal_frames(name, row, findings)
        if distance.missed:
            findings.notes.append(
                f"{name}: no face found in {distance.missed} of {distance.frames} frames; they are left out of LMD."
            )
    for name, found in _sync(rows, sounds, findings, sound_missing).items():
        out[name] |= found
    _say_why(out, sounds, findings, due, sound_missing)
    _avconf(out, rows, sounds, findings)
    return out


def means(frames: list[dict[str, float]]) -> dict[str, float | None]:
    """Of each metric over frames."""
    return {metric: mean_of_frames([f[metric] for f in frames]) for metric in frames[0]}


def _note_equal_frames(name: str, row: Row, findings: Findings) -> None:
    """A frame that equals the truth has no finite PSNR, and then neither has the mean: note the mean of the others."""
    for area in AREAS:
        values = np.array([f[area]["psnr"] for f in row.images])
        equal, known = np.isposinf(values), np.isfinite(values)
        if equal.any() and known.any():
            findings.notes.append(
                f"{name}: {equal.sum()} of {len(values)} frames equal the truth in the {area}: the mean PSNR is "
                f"infinite; over the other frames it is {values[known].mean():.2f} dB."
            )


def _say_why(out: dict, sounds: dict, findings: Findings, due: list | None, sound_missing: str) -> None:
    why, sound = findings.not_measured, sounds["ground_truth"]
    if due is None:
        why["closure"] = "no alignment says where p, b and m are spoken (--alignment FILE)"
    elif not due:
        why["closure"] = "the alignment has no p, b or m in these frames"
    if sound is None:
        why["motion in silence"] = sound_missing
    elif all(found["motion_in_silence"] is None for found in out.values()):
        silent = sound.silent()
        why["motion in silence"] = (
            f"{int(silent.sum())} of {len(silent)} frames are silent: "
            "at least 5 steps of silence and of speech are needed"
        )
    if all(found["jitter_px"] is None for found in out.values()):
        why["jitter"] = "no three frames in a row have a face"


def _sync(rows: dict[str, Row], sounds: dict, findings: Findings, sound_missing: str) -> dict[str, dict]:
    """Sync of each row's mouth with its sound; None where it cannot be known."""
    nothing = dict.fromkeys(("sync_offset_frames", "sync_margin", "sync_windows", "sync_windows_near"))
    out = {name: dict(nothing) for name in rows}
    frames, why = len(rows["ground_truth"].points), findings.not_measured
    if all(sound is None for sound in sounds.values()):
        why["sync"] = sound_missing
    elif frames < MIN_SYNC_FRAMES:
        why["sync"] = f"{frames} frames, at least {MIN_SYNC_FRAMES} (two seconds) are needed"
    if "sync" in why:
        return out
    try:
        model = SyncModel.load()
    except FileFormatError as error:
        why["sync"] = str(error)
        return out
    if frames < MIN_AUC_FRAMES:
        why["AUC of sync"] = f"{frames} frames hold too few windows: at least {MIN_AUC_FRAMES} are needed"
    for name, row in rows.items():
        points = without_gaps(row.landmarks())
        if points is None or sounds[name] is None:
            why[f"sync of {name}"] = sound_missing if points is not None else "half of its frames or more have no face"
        else:
            out[name] = _sync_of(sounds[name].features(model.encoder), torch.from_numpy(points), model)
    return out


def _sync_of(features: Float[Tensor, "s d"], landmarks: Float[Tensor, "t 478 3"], model: SyncModel) -> dict:
    result = estimate_offset(features, landmarks, model)
    auc = float("nan")
    if len(landmarks) >= MIN_AUC_FRAMES:
        auc = sync_auc(features, landmarks, offset_frames=round(result.offset_frames), model=model)[0]
    windows = windowed_offsets(features, landmarks, model)
    near = [w.margin > 0 and abs(w.offset_frames - result.offset_frames) <= 1 for _, w in windows]
    return {
        "sync_offset_frames": result.offset_frames if result.margin > 0 else None,
        "sync_margin": result.margin,
        "sync_margin_shuffled": shuffled_control(features, landmarks, model).margin,
        "sync_auc_shifted": auc if np.isfinite(auc) else None,
        "sync_reliable": bool(result.reliable),
        "sync_windows": [
            {"start_frame": start, "offset_frames": w.offset_frames, "margin": w.margin} for start, w in windows
        ],
        "sync_windows_near": float(np.mean(near)) if near else None,
    }


def without_gaps(points: Float[np.ndarray, "t l 3"]) -> Float32[np.ndarray, "t l 3"] | None:
    """Frames without a face, interpolated; None where half of them or more are."""
    known = np.isfinite(points).all((1, 2))
    if known.mean() <= 0.5:
        return None
    times = np.arange(len(points))
    flat = points.reshape(len(points), -1)
    filled = np.stack([np.interp(times, times[known], column[known]) for column in flat.T], 1)
    return filled.reshape(points.shape).astype(np.float32)


def _avconf(out: dict, rows: dict[str, Row], sounds: dict, findings: Findings) -> None:
    """AVConf of each row, where the weights are there; without them no row has the key."""
    why = findings.not_measured
    if rows["ground_truth"].lips is None:
        why["AVConf"] = "it needs SyncNet's own weights, which may not be shipped (--syncnet PATH to syncnet_v2.model)"
        return
    for name, row in rows.items():
        assert row.lips is not None, name
        got = "there is no sound" if sounds[name] is None else row.lips.score(sounds[name].samples)
        out[name]["avconf"] = None if isinstance(got, str) else got
        if isinstance(got, str):
            why[f"AVConf of {name}"] = got


def over_control(out: dict[str, dict], names: Iterable[str]) -> dict[str, dict]:
    """Each row's PSNR and LMD less the control's."""
    control = out["control"]
    return {
        name: {area: _minus(out[name][area]["psnr"], control[area]["psnr"]) for area in AREAS}
        | {"lmd_px": _minus(out[name]["lmd_px"], control["lmd_px"])}
        for name in names
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def per_frame(row: Row, truth_points: Float[np.ndarray, "t 478 3"], width: int) -> dict[str, list]:
    """The row's figures frame by frame, for the page's curves."""
    points = row.landmarks()
    return {
        "psnr_frame": [f["frame"]["psnr"] for f in row.images],
        "psnr_head": [f["head"]["psnr"] for f in row.images],
        "psnr_mouth": [f["mouth"]["psnr"] for f in row.images],
        "lpips_frame": [f["frame"]["lpips"] for f in row.images],
        "lmd_px": list(lip_distances(points, truth_points)[0] * LMD_SIZE_PX / width),
        "opening": list(opening(points)),
        "face": [bool(np.isfinite(p).all()) for p in points],
    }


def jsonable(value: Any) -> Any:
    """Plain numbers, six digits after the point. JSON has neither infinity nor NaN: they become None."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if np.isfinite(value) else None
    return value
