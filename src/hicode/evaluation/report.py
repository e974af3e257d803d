"""The report on an avatar (EVALUATION.md): what it makes of the part of its clip that it has not seen, beside the truth
and a control.

Regions are the frame, the head mask and the mouth box; rows are

    ground_truth  the test frames themselves: each measure's best value, the detector's and the sync measure's own
    control       a static head, the mean of the training frames, pasted on the test frames over the region that composition does not read
    tracked       the avatar under the motion tracked from the test frames: measures the renderer
    audio         the avatar under motion predicted from the test sound, head pose, upper face and eyes from the test
                  track: measures the system

Beside them, once: what the avatar makes of frames that it learned from (`training_frames`), which says what it remembers and ranks with no row.

Every row but the first is pasted into the true test frames, so the background is exact in all of them and lifts the
whole frame's PSNR; a result is its distance from the control. Frames are compared as composed, before any lossy
encoding. In JSON an infinite PSNR (the truth's) is null, as is whatever could not be measured; `notes` says why.
"""

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hicode.audio import SAMPLES_PER_FRAME, frame_rms
from hicode.avatar.blend import Region, dilate_mask, hidden_mask
from hicode.avatar.driving import merge_motion, resting_mouth
from hicode.avatar.film_grain import FilmGrain
from hicode.errors import HicodeError, InputError
from hicode.evaluation.images import REGIONS, Truth, mean_of_frames, seam_error
from hicode.evaluation.lips import DETECTOR, closures_due, detect, opening
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
from hicode.files import check_writable, write_json
from hicode.motion import Motion
from hicode.preparation.clip import Clip
from hicode.progress import progress_bar
from hicode.provenance import provenance
from hicode.runtime import Device, peak_memory_mb, resolve_device
from hicode.speech.encoders import AudioEncoder, EncoderSpec
from hicode.speech.voice_activity import VadGate

if TYPE_CHECKING:
    from hicode.tracking.landmarks import FaceLandmarker

SCHEMA, VERSION = "hicode-report", 1
Mode = Literal["tracked", "audio"]
ROWS = ("ground_truth", "control", "tracked", "audio")
TRAINING_FRAMES = 30  # of which what the avatar remembers is measured, spread evenly
MAX_MEAN_FRAMES = 100  # training frames that the control's mean head is made of, spread evenly
WORST_SHOWN, SPREAD_SHOWN, STRIP_SHOWN = 6, 2, 24


class Speaker(Protocol):
    """The part of `SpeechModels` that is used here."""

    encoder: EncoderSpec

    def encoder_for(self) -> AudioEncoder: ...

    def predict(self, features: Float[Tensor, "2*t d"]) -> tuple[Float[Tensor, "t 64"], Float[Tensor, "t 478 3"]]: ...


class Evaluated(Protocol):
    """The part of `Avatar` that is used here."""

    speech: Speaker | None
    driving: Motion
    background_plate: UInt8[np.ndarray, "h w 3"]
    film_grain: FilmGrain | None
    audio_driven: bool
    mouth_expression: Tensor
    mouth_landmark_weight: Tensor
    info: dict
    source: dict

    def synthesize_frame(
        self,
        motion: Motion,
        t: int,
        frame: UInt8[np.ndarray, "h w 3"],
        head_mask: UInt8[np.ndarray, "h w"],
        *,
        own: Motion | None = None,
    ) -> UInt8[np.ndarray, "h w 3"]: ...

    def face_mask(
        self, motion: Motion, t: int, head_mask: UInt8[np.ndarray, "h w"], frame_motion: Motion, frame_t: int
    ) -> UInt8[np.ndarray, "h w"]: ...


def evaluate(
    avatar: Evaluated | Path | str,
    clip: Clip | Path | str,
    json: Path | str | None = None,
    html: Path | str | None = None,
    modes: Sequence[Mode] = ("tracked", "audio"),
    device: Device = "auto",
    progress: bool = True,
    vgg: bool = False,
    syncnet: Path | str | None = None,
    alignment: Path | str | None = None,
    region: Region = "head",
) -> dict:
    """Measure an avatar on the test part of its clip; the figures as a dict, on request as a JSON file and a page with
    pictures.

    `progress` shows the bar and prints the table. `vgg` adds LPIPS by VGG16 over the whole frame (a second or two a
    frame and row). `syncnet` is the user's file of SyncNet's weights: with it, AVConf. `alignment` says where p, b and m are
    spoken in the clip's video (`hicode.evaluation.lips.closures_due`): with it, closure. `region="face"` measures what `speak` shows: the face
    alone rendered, hair, ears and neck the test frame's own; such figures compare with none of the whole head's. A clip without sound, or an avatar without speech models, has no audio row: it is null, and `notes`
    says so. Raises InputError where clip and avatar do not belong together or nothing is left to test, FileFormatError
    for files that are no such thing.
    """
    unknown = [m for m in modes if m not in ("tracked", "audio")]
    if unknown:
        raise InputError(f"There is no driving mode {unknown[0]!r}. Choose tracked, audio or both.")
    for place in filter(None, (json, html)):
        check_writable(place)
    if region not in ("head", "face"):
        raise InputError(f"There is no region {region!r} of the head to render. Choose head or face.")
    place = resolve_device(device)
    net = SyncNet.load(syncnet) if syncnet else None
    if isinstance(avatar, (str, Path)):
        from hicode.avatar.avatar import Avatar

        avatar = Avatar.load(avatar)
    if place != "cpu":
        avatar = avatar.to(place)
    if avatar.film_grain is not None:  # laid on for the eye: it costs PSNR
        avatar = replace(avatar, film_grain=None)
    clip = clip if isinstance(clip, Clip) else Clip.open(clip)
    started = time.perf_counter()
    work = _Work(avatar, clip, region)
    work.check()
    due = work.closures(alignment) if alignment else None
    motions = work.motions(modes)
    rows = {name: Row(lips=LipStream(net) if net else None) for name in ("ground_truth", "control", *motions)}
    with progress_bar("Measuring", progress) as report:
        _measure(work, motions, rows, vgg, report)
    out = _figures(work, rows, motions, due, net) | {"training_frames": _remembered(work)}
    brought = [str(syncnet)] if syncnet else []
    out["provenance"] = _provenance(clip, work.avatar, brought, {"modes": list(modes), "vgg": vgg, "region": region})
    out["evaluation"] = {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
    out = jsonable(out)
    if json:
        write_json(Path(json), out)
    if html:
        from hicode.evaluation.page import write_page

        write_page(Path(html), out, _pictures(work, motions, rows))
    if progress:
        print_table(out)
    return out


# ----------------------------------------------------------------------------------------------------------------- rows


class _Work:
    """An avatar, a clip, and how to make each row's frames."""

    def __init__(self, avatar: Evaluated, clip: Clip, region: Region = "head"):
        self.avatar, self.clip, self.region = avatar, clip, region
        self.test = list(clip.test)
        self.own: Motion | None = None  # the test frames' track, where their faces' places are asked for
        self.findings = Findings()
        self.speech_seconds: float | None = None  # a frame's share of encoding and prediction
        self.predicted_opening: np.ndarray | None = None

    def check(self) -> None:
        if not self.test or not len(self.clip.train):
            raise InputError(
                f"{self.clip.path} has {len(self.clip.train)} training and {len(self.test)} test frames: "
                "nothing to measure. Prepare a longer video."
            )
        plate = self.avatar.background_plate
        if plate.shape[:2] != (self.clip.height, self.clip.width):
            raise InputError(
                f"The avatar makes frames of {plate.shape[1]}x{plate.shape[0]}, "
                f"the clip has {self.clip.width}x{self.clip.height}. Evaluate it on the clip that it was trained on."
            )
        mine, theirs = self.avatar.source.get("sha256"), self.clip.source.get("sha256")
        if mine and theirs and mine != theirs:
            self.findings.notes.append(
                "The avatar was trained on another video than this clip's: no figure here is comparable with any other."
            )

    def motions(self, modes: Sequence[Mode]) -> dict[str, Motion]:
        """The test frames' motion in each driving mode that is asked for and possible."""
        if self.avatar.audio_driven:
            self.clip.hear(self.avatar.speech.encoder)
            self.findings.notes.append(
                "Speech features move this avatar directly: its tracked row hears the test sound as its audio row does."
            )
        tracked = self.clip.track.motion[slice(self.test[0], self.test[-1] + 1)]
        if self.region == "face":
            self.own = tracked
            self.findings.notes.append(
                "Only the face is rendered, as speak has it: hair, ears and neck are the test frames' own in every row. "
                "Frame and head figures compare with no report on the whole head."
            )
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
            self.findings.notes.append("No audio row: the avatar has no speech models.")
            return None
        if sound is None:
            self.findings.notes.append("No audio row: the clip has no sound.")
            return None
        from hicode.speech.loudness import speech_level

        first, end = self.test[0], self.test[-1] + 1
        features = self.clip.speech_features(speech.encoder)[2 * first : 2 * end]
        started = time.perf_counter()
        with torch.inference_mode():
            expression, landmarks = speech.predict(features)
        predicting = time.perf_counter() - started
        heard = sound[first * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]
        self.speech_seconds = (predicting + self._encoding_seconds(speech, heard)) / len(self.test)
        gate = VadGate(speech_level(heard))
        share = torch.from_numpy(np.concatenate([gate.push(frame_rms(heard, SAMPLES_PER_FRAME)), gate.finish()]))
        rest_expression, rest_landmarks = resting_mouth(self.avatar.driving, self.avatar)
        expression = torch.lerp(rest_expression, expression, share[:, None])
        landmarks = torch.lerp(rest_landmarks, landmarks, share[:, None, None])
        motion = merge_motion(tracked, expression, landmarks, self.avatar)
        self.predicted_opening = opening(motion.landmarks.numpy())
        return motion

    def _encoding_seconds(self, speech: Speaker, heard: np.ndarray) -> float:
        try:
            encoder = speech.encoder_for()
        except (HicodeError, OSError, ImportError) as error:
            # A hub's model that is not here: its features came with the clip, only its time is unknown.
            self.findings.notes.append(f"fps leaves the {speech.encoder.name} encoder out: it is not here ({error}).")
            return 0.0
        started = time.perf_counter()
        encoder.encode(heard)
        return time.perf_counter() - started

    def heard(self) -> Heard | None:
        """The test part's sound."""
        sound = self.clip.audio()
        if sound is None:
            return None
        first, end = self.test[0], self.test[-1] + 1
        return Heard(
            sound[first * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME],
            lambda encoder: self.clip.speech_features(encoder)[2 * first : 2 * end],
        )

    def closures(self, alignment: Path | str) -> list[tuple[int, int]]:
        """Closures due in the test part; the alignment's times are the video's, of which the clip may leave out a beginning."""
        first = self.test[0] + self.clip.first_frame
        return closures_due(alignment, first, len(self.test), self.clip.audio_offset_frames, self.clip.fps)

    @cached_property
    def boxes(self) -> np.ndarray:
        """SyncNet's face boxes of the test frames. Every row is pasted into the true frame, so they are every row's."""
        return crop_boxes(self.clip.track.landmarks_px[self.test[0] : self.test[-1] + 1].numpy())

    def frame(self, name: str, motion: Motion, i: int) -> UInt8[np.ndarray, "h w 3"]:
        """Test frame i of a driven row: composited into the true frame, of which only what lies outside the hidden
        region (the head and a rim of 4 px) can show."""
        t = self.test[i]
        own = {} if self.own is None else {"own": self.own}
        return self.avatar.synthesize_frame(motion, i, self.clip.image(t), self.clip.head_mask(t), **own)

    def composed_mask(self, i: int) -> UInt8[np.ndarray, "h w"]:
        """What of test frame i is composited under its own motion: the head's mask, or the face's part of it."""
        mask = self.clip.head_mask(self.test[i])
        return mask if self.own is None else self.avatar.face_mask(self.own, i, mask, self.own, i)

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
        return np.where(
            hidden_mask(self.composed_mask(i))[..., None] > 0, self.mean_frame, self.clip.image(self.test[i])
        )

    @cached_property
    def landmarker(self) -> "FaceLandmarker":
        from hicode.tracking.landmarks import FaceLandmarker

        return FaceLandmarker()


def _measure(
    work: _Work, motions: dict[str, Motion], rows: dict[str, Row], vgg: bool, report: Callable[[int, int], None]
) -> None:
    perfect = {region: {"psnr": float("inf"), "ssim": 1.0, "lpips": 0.0} for region in REGIONS}
    if vgg:
        perfect["frame"] = perfect["frame"] | {"lpips_vgg": 0.0}
    for name, motion in motions.items():
        work.frame(name, motion, 0)  # compiles and warms what is measured below
    for i, t in enumerate(work.test):
        picture, head_mask = work.clip.image(t), work.clip.head_mask(t)
        truth = Truth(picture, head_mask, work.clip.track.mouth_box(t), vgg)
        region = dilate_mask(work.composed_mask(i))
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
            if row.lips is not None:
                row.lips.push(crop(image, work.boxes[i]))
        report(i + 1, len(work.test))


def _remembered(work: _Work) -> dict | None:
    """What the avatar makes of frames that it learned from, under the motion that training found in them: the same measures, no rank with those of unseen
    frames. None where another clip's frames are tested or none were learned.
    """
    avatar, clip = work.avatar, work.clip
    if avatar.source.get("sha256") != clip.source.get("sha256"):
        return None
    known = list(clip.train)[: len(avatar.driving)]
    if not known:
        return None
    looks = [known[i] for i in evenly(len(known), TRAINING_FRAMES)]
    own, found = {} if work.own is None else {"own": avatar.driving}, []
    for t in looks:
        image = avatar.synthesize_frame(avatar.driving, t - clip.train[0], clip.image(t), clip.head_mask(t), **own)
        found.append(Truth(clip.image(t), clip.head_mask(t), clip.track.mouth_box(t)).compare(image))
    means = {
        region: {metric: mean_of_frames([f[region][metric] for f in found]) for metric in found[0][region]}
        for region in REGIONS
    }
    return {"frames": len(looks)} | means


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(
    work: _Work,
    rows: dict[str, Row],
    motions: dict[str, Motion],
    due: list[tuple[int, int]] | None,
    net: SyncNet | None,
) -> dict:
    clip, avatar = work.clip, work.avatar
    truth_points = rows["ground_truth"].landmarks()
    heard = work.heard()
    found = figures(
        rows, clip.width, dict.fromkeys(rows, heard), work.findings, due, net, sound_missing="the clip has no sound"
    )
    first, end = work.test[0], work.test[-1] + 1
    timing = _timing(work, rows, motions)
    info = avatar.info
    out = {
        "schema": SCHEMA,
        "version": VERSION,
        "title": f"{clip.source.get('name', 'clip')}: {end - first} unseen frames ({first} … {end - 1})",
        **{name: found.get(name) for name in ROWS},
        "over_control": over_control(found, list(motions)),
        "seconds": _stage_seconds(clip, info),
        "fps": timing["fps"],
        "peak_memory_mb": info.get("peak_memory_mb") or peak_memory_mb(),
        "timing": timing,
        "detector": DETECTOR,
        "split": {"train": [clip.train[0], clip.train[-1] + 1], "test": [first, end], "fps": clip.fps},
        "region": work.region,
        "protocol": (
            "frames that the avatar has not seen, before any encoding; head pose, upper face and eyes of both driving modes "
            "are the test video's own track. Control: the mean of the training frames, pasted on the true frames"
        ),
        "definitions": DEFINITIONS | (AVCONF_DEFINITION if net else {}),
        "notes": work.findings.notes,
        "not_measured": work.findings.not_measured,
        "per_frame": {name: per_frame(row, truth_points, clip.width) for name, row in rows.items()},
    }
    if work.predicted_opening is not None:
        out["per_frame"]["audio"]["opening_predicted"] = list(work.predicted_opening)
    return out


def _timing(work: _Work, rows: dict[str, Row], motions: dict[str, Motion]) -> dict:
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
        out["deform_rasterise_ms"] = _median_ms(lambda i: avatar.render(motion[i], motion.T_camera_head[i]), looks)
        moved = [avatar.deform(motion[i]) for i in looks]
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
    prepared = clip.prepare_seconds
    return ({"prepare": prepared} if prepared else {}) | dict(info.get("seconds", {}))


def _provenance(clip: Clip, avatar: Evaluated, brought: list[str], config: dict) -> dict:
    made = {key: avatar.info[key] for key in ("preset", "seed", "config", "provenance") if key in avatar.info}
    source = {key: clip.source[key] for key in ("name", "sha256") if key in clip.source}
    size = {"width": clip.width, "height": clip.height, "audio_offset_frames": clip.audio_offset_frames}
    used = ["face_landmarks", "face_detection", "perceptual", *brought]
    return {
        "evaluated": datetime.date.today().isoformat(),
        **provenance(config, avatar.info.get("seed"), used),
        "clip": source | size,
        "avatar": made,
    }


# ------------------------------------------------------------------------------------------------------------- pictures


def _pictures(work: _Work, motions: dict[str, Motion], rows: dict[str, Row]) -> Pictures:
    """Frames are made again instead of kept: a test part may be minutes long."""
    judged = "audio" if "audio" in motions else "tracked" if "tracked" in motions else "control"
    shown = []
    for i, why in worst_first([frame["head"]["psnr"] for frame in rows[judged].images], WORST_SHOWN, SPREAD_SHOWN):
        t = work.test[i]
        images = {"control": work.control(i)} | {name: work.frame(name, motion, i) for name, motion in motions.items()}
        scores = {name: rows[name].images[i]["head"]["psnr"] for name in images}
        shown.append(ShownFrame(t, f"{why} ({judged})" if "worst" in why else why, work.clip.image(t), images, scores))
    strip = []
    picked = evenly(len(work.test), STRIP_SHOWN)
    boxes = [work.clip.track.mouth_box(work.test[i]) for i in picked]
    for i, (x0, y0, x1, y1) in zip(picked, mouth_windows(boxes, work.clip.width, work.clip.height), strict=True):
        t = work.test[i]
        whole = {"ground_truth": work.clip.image(t)} | {
            name: work.frame(name, motion, i) for name, motion in motions.items()
        }
        strip.append((t, {name: image[y0:y1, x0:x1] for name, image in whole.items()}))
    heard = work.heard()
    return Pictures(shown, strip, None if heard is None else heard.samples)
