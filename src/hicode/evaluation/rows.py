"""What is measured of a row of frames, whoever made them: an avatar (`report`) or another system's video (`videos`).

A row has t frames beside t frames of truth. Figures are means over frames; landmarks are found in the row's own frames and
in the truth's by the same detector. What cannot be measured is None, and `not_measured` says why: nothing is left out in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hicode.audio import frame_rms
from hicode.errors import FileFormatError
from hicode.evaluation.images import REGIONS, mean_of_frames
from hicode.evaluation.lips import (
    CLOSED,
    LMD_SIZE_PX,
    SILENCE_DB,
    closure,
    correlation,
    jitter,
    lip_distance,
    lip_distances,
    motion_in_silence,
    opening,
    silent_frames,
)
from hicode.evaluation.syncnet import MIN_FRAMES, AVConf, LipStream, SyncNet, finish

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
    "lmd_px": "40 lip landmarks, each set minus its mean, mean distance in px of a frame 512 px wide: for heads that fill it",
    "lmd_norm": "the same over the distance of the outer eye corners in the truth; `lmd_iod` is the same figure",
    "missed_faces": "frames in which the detector found no face in the row or in the truth: not in LMD, never counted as 0",
    "jitter_px": "mean second difference of all landmarks, each frame's shift, turn and scale taken out, px at 512",
    "seam": "mean difference of gradients from the truth's in a band of 4 px about the composition's boundary",
    "sync_offset_frames": "frames by which the mouth is later than the sound, by hicode.speech.sync (not SyncNet)",
    "sync_margin": "correlation at that offset less the median over offsets; `sync_margin_shuffled` with the sound rotated",
    "sync_auc_shifted": "how surely two seconds of mouth tell their sound from the same sound 5 ... 10 frames off",
    "sync_windows": "windows of two seconds, 10 frames apart: frame at which each begins, its own offset and margin",
    "sync_windows_near": "share of them whose offset is within a frame of the row's",
    "closure": f"share of the p, b and m due in which the inner lips come nearer than {CLOSED} of the eye distance",
    "closed_elsewhere": "share of the other frames in which they do: a mouth that never opens has 1 of both",
    "motion_in_silence": f"change of the mouth's opening a frame in silence ({-SILENCE_DB:.0f} dB under the speech) over that in speech",
    "opening_correlation": "of the mouth's opening (gap of the inner lips over the distance of the outer eye corners), row against truth",
    "opening_mean": "mean opening: a row well below the truth's mumbles",
}
AVCONF_DEFINITION = {
    "avconf": "SyncNet with the weights given, face boxes from the landmarks: confidence (LSE-C), distance (LSE-D), offset",
}


@dataclass(eq=False)
class Row:
    """What was measured of one row: a list entry a frame. `lips` collects for AVConf where weights are given."""

    images: list[dict] = field(default_factory=list)
    points: list[np.ndarray] = field(default_factory=list)
    seam: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lips: LipStream | None = None

    def landmarks(self) -> Float[np.ndarray, "t 478 3"]:
        return np.stack(self.points)


@dataclass(frozen=True, eq=False)
class Heard:
    """The sound of t frames: 16 kHz mono, 640 samples a frame, and its features by an encoder's name, "2*t d"."""

    samples: Float32[np.ndarray, "640*t"]
    features: Callable[[str], Float[Tensor, "2*t d"]]

    def silent(self) -> np.ndarray:
        from hicode.speech.loudness import speech_level

        return silent_frames(frame_rms(self.samples), speech_level(self.samples))


@dataclass
class Findings:
    """What goes into a report beside the figures."""

    notes: list[str] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)


def figures(
    rows: dict[str, Row],
    width: int,
    heard: dict[str, Heard | None],
    findings: Findings,
    due: list[tuple[int, int]] | None = None,
    syncnet: SyncNet | None = None,
    sound_missing: str = "there is no sound",
) -> dict[str, dict]:
    """Each row's figures, by name; the truth's row is called `ground_truth`. `heard` has each row's sound, `due` the closures due."""
    truth = rows["ground_truth"].landmarks()
    sync = _sync(rows, heard, findings, sound_missing)
    out = {}
    for name, row in rows.items():
        points = row.landmarks()
        distance = lip_distance(points, truth, width)
        found: dict = {
            region: {
                metric: mean_of_frames([f[region][metric] for f in row.images]) for metric in row.images[0][region]
            }
            for region in REGIONS
        }
        found |= {
            "lmd_px": distance.px,
            "lmd_norm": distance.iod,
            "lmd_iod": distance.iod,
            "missed_faces": distance.missed,
        }
        found |= sync[name]
        found |= {
            "jitter_px": jitter(points, width),
            "seam": mean_of_frames(row.seam),
            "opening_correlation": correlation(opening(points), opening(truth)),
            "opening_mean": mean_of_frames(list(opening(points))),
            "motion_in_silence": None,
            "closure": None,
            "closures_due": None,
            "closed_elsewhere": None,
        }
        if heard[name] is not None:
            found["motion_in_silence"] = motion_in_silence(opening(points), heard[name].silent())
        if due:
            came = closure(opening(points), due)
            found |= {"closure": came.recall, "closures_due": came.due, "closed_elsewhere": came.elsewhere}
        if name != "ground_truth":
            _note_equal_frames(name, row, findings)
        if distance.missed:
            findings.notes.append(
                f"{name}: no face found in {distance.missed} of {distance.frames} frames; they are left out of LMD."
            )
        out[name] = found
    _say_why(out, heard, findings, due, sound_missing)
    _avconf(out, rows, heard, findings, syncnet, sound_missing)
    return out


def _note_equal_frames(name: str, row: Row, findings: Findings) -> None:
    """A frame that equals the truth has no finite PSNR, and then neither has the mean: say so, with the mean of the others."""
    for region in REGIONS:
        values = np.array([f[region]["psnr"] for f in row.images])
        equal, known = np.isposinf(values), np.isfinite(values)
        if equal.any() and known.any():
            findings.notes.append(
                f"{name}: {equal.sum()} of {len(values)} frames equal the truth in the {region}: the mean PSNR is infinite; "
                f"over the other frames it is {values[known].mean():.2f} dB."
            )


def _say_why(out: dict, heard: dict, findings: Findings, due: list | None, sound_missing: str) -> None:
    if due is None:
        findings.not_measured["closure"] = "no alignment says where p, b and m are spoken (--alignment FILE)"
    elif not due:
        findings.not_measured["closure"] = "the alignment has no p, b or m in these frames"
    if heard["ground_truth"] is None:
        findings.not_measured["motion in silence"] = sound_missing
    elif all(found["motion_in_silence"] is None for found in out.values()):
        quiet = int(heard["ground_truth"].silent().sum())
        findings.not_measured["motion in silence"] = (
            f"{quiet} of {len(heard['ground_truth'].silent())} frames are silent: at least 5 steps of silence and of speech are needed"
        )
    if all(found["jitter_px"] is None for found in out.values()):
        findings.not_measured["jitter"] = "no three frames in a row have a face"


def _sync(rows: dict[str, Row], heard: dict, findings: Findings, sound_missing: str) -> dict[str, dict]:
    """Sync of each row's mouth with its sound; None where it cannot be known."""
    nothing = {"sync_offset_frames": None, "sync_margin": None, "sync_windows": None, "sync_windows_near": None}
    out = {name: dict(nothing) for name in rows}
    frames = len(rows["ground_truth"].points)
    if all(sound is None for sound in heard.values()):
        findings.not_measured["sync"] = sound_missing
        return out
    if frames < MIN_SYNC_FRAMES:
        findings.not_measured["sync"] = f"{frames} frames, at least {MIN_SYNC_FRAMES} (two seconds) are needed"
        return out
    from hicode.speech.sync import SyncModel, estimate_offset, shuffled_control, sync_auc, windowed_offsets

    try:
        model = SyncModel.load()
    except FileFormatError as error:
        findings.not_measured["sync"] = str(error)
        return out
    for name, row in rows.items():
        points = without_gaps(row.landmarks())
        if points is None or heard[name] is None:
            why = "half of its frames or more have no face" if points is None else sound_missing
            findings.not_measured[f"sync of {name}"] = why
            continue
        features, landmarks = heard[name].features(model.encoder), torch.from_numpy(points)
        result = estimate_offset(features, landmarks, model)
        auc = float("nan")
        if frames >= MIN_AUC_FRAMES:
            auc = sync_auc(features, landmarks, offset_frames=round(result.offset_frames), model=model)[0]
        else:
            findings.not_measured["AUC of sync"] = (
                f"{frames} frames hold too few windows: at least {MIN_AUC_FRAMES} are needed"
            )
        windows = windowed_offsets(features, landmarks, model)
        near = [w.margin > 0 and abs(w.offset_frames - result.offset_frames) <= 1 for _, w in windows]
        out[name] = {
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
    return out


def without_gaps(points: Float[np.ndarray, "t 478 3"]) -> Float[np.ndarray, "t 478 3"] | None:
    """Frames without a face, interpolated; None where half of them or more are."""
    known = np.isfinite(points).all((1, 2))
    if known.mean() <= 0.5:
        return None
    times = np.arange(len(points))
    flat = points.reshape(len(points), -1)
    filled = np.stack([np.interp(times, times[known], column[known]) for column in flat.T], 1)
    return filled.reshape(points.shape).astype(np.float32)


def _avconf(
    out: dict, rows: dict[str, Row], heard: dict, findings: Findings, net: SyncNet | None, sound_missing: str
) -> None:
    """AVConf of each row, where the weights are there; without them no row has the key."""
    if net is None:
        findings.not_measured["AVConf"] = (
            "it needs SyncNet's own weights, which may not be shipped (--syncnet PATH to syncnet_v2.model)"
        )
        return
    frames = len(rows["ground_truth"].points)
    for name, row in rows.items():
        sound = heard[name]
        got: AVConf | None = None
        if sound is None:
            findings.not_measured[f"AVConf of {name}"] = sound_missing
        elif row.lips is None:
            findings.not_measured[f"AVConf of {name}"] = "no frame has a face to crop"
        elif frames < MIN_FRAMES:
            findings.not_measured[f"AVConf of {name}"] = f"{frames} frames, at least {MIN_FRAMES} are needed"
        else:
            got = finish(net, row.lips, frames, sound.samples)
        out[name]["avconf"] = got and {
            "confidence": got.confidence,
            "distance": got.distance,
            "offset_frames": got.offset_frames,
        }


def over_control(out: dict[str, dict], modes: list[str]) -> dict[str, dict]:
    """Each mode's PSNR and LMD less the control's."""
    return {
        mode: {region: _minus(out[mode][region]["psnr"], out["control"][region]["psnr"]) for region in REGIONS}
        | {"lmd_px": _minus(out[mode]["lmd_px"], out["control"]["lmd_px"])}
        for mode in modes
    }


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def per_frame(row: Row, truth_points: Float[np.ndarray, "t 478 3"], width: int) -> dict[str, list[float]]:
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


def jsonable(value):
    """Plain numbers, six digits after the point; what is no finite number is None: JSON has neither infinity nor
    NaN."""
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
