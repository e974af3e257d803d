"""The report on an avatar: what it makes of the part of its clip that it has not seen.

Rows, the product first:

    audio         driven by the test sound through a `Session`, as `speak` does it: mouth and jaw from speech; head
                  pose, eyes, upper face and background from the test frames; the mouth at rest from training frames
    tracked       the whole head under the motion tracked from the test frames: measures the renderer
    tracked_face  the same, the face alone
    ground_truth  the test frames themselves: the detector's and the sync measure's own values
    control       a static head, the mean of the training frames, pasted on the test frames over the region that
                  composition does not read

Every row but the truth is pasted into the true test frames, so the background is exact in all of them and lifts the
whole frame's PSNR; a result is its distance from the control. Film grain and added blinks are off. Frames are compared
as composed, before any lossy encoding.
"""

import datetime
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from hicode.audio import SAMPLES_PER_FRAME
from hicode.avatar.avatar import Avatar
from hicode.avatar.blend import Region, dilate_mask, face_room, hidden_mask
from hicode.errors import InputError
from hicode.evaluation.config import EvaluateConfig, Mode
from hicode.evaluation.gallery import Gallery, evenly
from hicode.evaluation.images import AREAS, Truth
from hicode.evaluation.lips import DETECTOR, closures_due, opening
from hicode.evaluation.page import write_page
from hicode.evaluation.rows import (
    AVCONF_DEFINITION,
    DEFINITIONS,
    Compared,
    Findings,
    Sound,
    figures,
    jsonable,
    means,
    measure,
    new_rows,
    over_control,
    per_frame,
)
from hicode.evaluation.show import print_table
from hicode.files import write_json
from hicode.preparation.clip import Clip
from hicode.progress import progress_bar
from hicode.provenance import provenance
from hicode.runtime import peak_memory_mb, resolve_device
from hicode.session.config import SpeakConfig
from hicode.session.motion_source import DrivingTrack
from hicode.session.rendering import FrameRenderer
from hicode.session.session import Frame, Session
from hicode.session.speak import drained, synthesize
from hicode.session.timings import Timings
from hicode.tracking.landmarks import FaceLandmarker

SCHEMA, VERSION = "hicode-report", 2
ROWS = ("audio", "tracked", "tracked_face", "ground_truth", "control")
TRAINING_FRAMES = 30  # of which what the avatar remembers is measured, spread evenly
MAX_MEAN_FRAMES = 100  # training frames that the control's mean head is made of, spread evenly
SPEED_FRAMES = 100  # that the speed is measured on
Keep = Callable[[str, int, UInt8[np.ndarray, "h w 3"]], None]


def evaluate(
    avatar: Avatar | Path | str,
    clip: Clip | Path | str,
    config: EvaluateConfig = EvaluateConfig(),
    keep: Keep | None = None,
    progress: bool = True,
) -> dict:
    """Measure an avatar on the test part of its clip: the figures as a dict, on request as a JSON file and a page.

    `keep(row, i, image)` is given each frame that is scored. `progress` shows the bar and prints the table. A clip
    without sound, or an avatar without speech models, has no audio row: it is null, and `notes` says so. Raises
    InputError where clip and avatar do not belong together or nothing is left to test, FileFormatError for files that
    are no such thing.
    """
    config.check_outputs()
    place = resolve_device(config.device)
    scores = config.lip_scores()
    if isinstance(avatar, (str, Path)):
        avatar = Avatar.load(avatar)
    if place != "cpu":
        avatar = avatar.to(place)
    started = time.perf_counter()
    test = TestPart(avatar, clip if isinstance(clip, Clip) else Clip.open(clip), config.region)
    due = test.closures(config.alignment) if config.alignment else None
    driven = test.rows(config.modes)
    timing = test.speed() if "audio" in driven else {"fps": None}
    truth = test.clip.track.landmarks_px[test.frames.start : test.frames.stop].numpy()
    rows = new_rows((*driven, "ground_truth", "control"), scores, truth)
    mouths = [test.clip.track.mouth_box(t) for t in test.frames]
    gallery = Gallery(next(iter(driven), "control"), mouths, (test.clip.width, test.clip.height))
    measured = measure(test.compared(driven), rows, FaceLandmarker(), config.vgg)
    with progress_bar("Measuring", progress) as report:
        for i, frame in enumerate(gallery.watch(measured, rows)):
            if keep is not None:
                for name, image in frame.images.items():
                    keep(name, i, image)
            report(i + 1, len(test.frames))
    sounds = dict.fromkeys(rows, test.sound)
    found = figures(rows, test.clip.width, sounds, test.findings, due, "the clip has no sound")
    out = test.report(found, timing) | {"per_frame": test.curves(rows), "training_frames": test.training_frames()}
    out["definitions"] = DEFINITIONS | (AVCONF_DEFINITION if scores else {})
    out["provenance"] = test.provenance(config)
    out["evaluation"] = {"seconds": time.perf_counter() - started, "peak_memory_mb": peak_memory_mb()}
    out = jsonable(out)
    if config.json:
        write_json(Path(config.json), out)
    if config.html:
        write_page(Path(config.html), out, gallery.pictures(None if test.sound is None else test.sound.samples))
    if progress:
        print_table(out)
    return out


class TestPart:
    """An avatar and the test part of its clip: how each row's frames are made, and what the report says of them.

    Raises InputError where the two do not belong together.
    """

    __test__ = False  # no test of pytest's

    def __init__(self, avatar: Avatar, clip: Clip, region: Region = "face"):
        self.avatar, self.clip = avatar, clip
        self.region: Region = region
        self.frames, self.findings = range(clip.test.start, clip.test.stop), Findings()
        self._openings: list[float] = []  # that speech predicts
        self._check()
        if avatar.audio_driven and avatar.speech is not None:
            clip.hear(avatar.speech.encoder)
            self.findings.notes.append(
                "Speech features move this avatar directly: its tracked row hears the test sound as its audio row does."
            )
        motion = clip.track.motion[self.frames.start : self.frames.stop]
        self.driving = DrivingTrack(
            motion, lambda i: clip.image(self.frames[i]), lambda i: clip.head_mask(self.frames[i])
        )

    def _check(self) -> None:
        if not len(self.frames) or not len(self.clip.train):
            raise InputError(
                f"{self.clip.path} has {len(self.clip.train)} training and {len(self.frames)} test frames: "
                "nothing to measure. Prepare a longer video."
            )
        plate = self.avatar.background_plate
        if plate.shape[:2] != (self.clip.height, self.clip.width):
            raise InputError(
                f"The avatar makes frames of {plate.shape[1]}x{plate.shape[0]}, "
                f"the clip has {self.clip.width}x{self.clip.height}. Evaluate it on the clip that it was trained on."
            )
        bad = int((~self.clip.usable[self.frames.start : self.frames.stop]).sum())
        if bad:
            self.findings.notes.append(
                f"{bad} of {len(self.frames)} test frames are damaged, frozen or dark. The figures count them."
            )
        mine, theirs = self.avatar.source.get("sha256"), self.clip.source.get("sha256")
        if mine and theirs and mine != theirs:
            self.findings.notes.append(
                "The avatar was trained on another video than this clip's: no figure here is comparable with any other."
            )

    # --- frames

    def rows(self, modes: tuple[Mode, ...]) -> dict[str, Region]:
        """The driven rows that are asked for and possible, with the region of the head that each renders."""
        out: dict[str, Region] = {}
        if "audio" in modes:
            lacking = "the avatar has no speech models" if self.avatar.speech is None else "the clip has no sound"
            if self.avatar.speech is None or self.sound is None:
                self.findings.notes.append(f"No audio row: {lacking}.")
            else:
                out["audio"] = self.region
        if "tracked" in modes:
            out |= {"tracked": "head", "tracked_face": "face"}
        return out

    @cached_property
    def sound(self) -> Sound | None:
        """The test part's sound."""
        samples = self.clip.audio()
        if samples is None:
            return None
        first, end = self.frames.start, self.frames.stop

        def features(encoder: str) -> Float[Tensor, "s d"]:
            made = self.clip.speech_features(encoder)
            assert made is not None, f"{self.clip.path} has sound and no features"
            return made[2 * first : 2 * end]

        return Sound(samples[first * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME], features)

    @property
    def speak_config(self) -> SpeakConfig:
        """How the avatar speaks here: as `speak` has it, without what no truth has."""
        return SpeakConfig(region=self.region, blinks=False, film_grain=False)

    def spoken(self) -> Iterator[Frame]:
        """The avatar speaking the test sound over the test frames."""
        assert self.sound is not None, "no sound to speak"
        return synthesize(self.avatar, self.sound.samples, self.speak_config, self.driving)

    def compared(self, driven: dict[str, Region]) -> Iterator[Compared]:
        """Each test frame with the frames of all rows."""
        renderers = {
            name: FrameRenderer(self.avatar, self.driving, region, film_grain=False)
            for name, region in driven.items()
            if name != "audio"
        }
        spoken = self.spoken() if "audio" in driven else iter(())
        motion, timings = self.driving.motion, Timings()
        for i, t in enumerate(self.frames):
            images = {}
            if "audio" in driven:
                frame = next(spoken)
                images["audio"] = frame.image
                self._openings += list(opening(frame.motion.landmarks.numpy()))
            for name, renderer in renderers.items():
                images[name] = renderer.render(i, motion[i : i + 1], i, timings)
            control = self.composed_mask(i, self.region)
            images["control"] = np.where(hidden_mask(control)[..., None] > 0, self.mean_frame, self.clip.image(t))
            regions = {name: dilate_mask(self.composed_mask(i, driven[name])) for name in driven}
            regions |= dict.fromkeys(("control", "ground_truth"), dilate_mask(control))
            yield Compared(t, self.clip.image(t), self.clip.head_mask(t), self.clip.track.mouth_box(t), images, regions)

    def composed_mask(self, i: int, region: Region) -> UInt8[np.ndarray, "h w"]:
        """What of test frame i is composited under its own motion: the head's mask, or the face's part of it."""
        mask, motion = self.driving.mask(i), self.driving.motion
        return mask if region == "head" else self.avatar.face_mask(motion, i, face_room(mask), motion, i)

    @cached_property
    def mean_frame(self) -> UInt8[np.ndarray, "h w 3"]:
        """The control's head."""
        return mean_training_frame(self.clip)

    # --- figures

    def speed(self) -> dict:
        """From sound to final frame, after a few frames that compile and warm: frames a second, CPU ms a frame."""
        assert self.sound is not None, "no sound to speak"
        samples = self.sound.samples[: SPEED_FRAMES * SAMPLES_PER_FRAME]
        for _ in synthesize(self.avatar, samples[: 5 * SAMPLES_PER_FRAME], self.speak_config, self.driving):
            pass
        session = Session(self.avatar, self.speak_config, self.driving)
        started = time.perf_counter()
        frames = sum(1 for _ in drained(session, iter([samples])))
        fps = frames / (time.perf_counter() - started)
        return {"fps": fps, "fps_is": "sound to final frame", "cpu_ms": session.timings.ms_per_frame()}

    def training_frames(self) -> dict | None:
        """Training frames under their own motion, which was fitted to them: a diagnostic, no rank with the rows.

        None where another clip's avatar is measured.
        """
        avatar, clip = self.avatar, self.clip
        if avatar.source.get("sha256") != clip.source.get("sha256"):
            return None
        shown = clip.driving
        picked = evenly(min(len(shown), len(avatar.driving)), TRAINING_FRAMES)
        driving = DrivingTrack(avatar.driving, lambda k: clip.image(shown[k]), lambda k: clip.head_mask(shown[k]))
        renderer, scores = FrameRenderer(avatar, driving, self.region, film_grain=False), []
        for k in picked:
            t = shown[k]
            truth = Truth(clip.image(t), clip.head_mask(t), clip.track.mouth_box(t))
            scores.append(truth.compare(renderer.render(k, avatar.driving[k : k + 1], k, Timings())))
        return {"frames": len(picked)} | {area: means([s[area] for s in scores]) for area in AREAS}

    def closures(self, alignment: Path | str) -> list[tuple[int, int]]:
        """Closures due in the test part. The alignment's times are the video's, of which the clip may lack a start."""
        first = self.frames.start + self.clip.first_frame
        return closures_due(alignment, first, len(self.frames), self.clip.audio_offset_frames, self.clip.fps)

    def curves(self, rows: dict) -> dict[str, dict]:
        """Figures frame by frame, with the opening that speech predicts."""
        truth = rows["ground_truth"].landmarks()
        out = {name: per_frame(row, truth, self.clip.width) for name, row in rows.items()}
        if self._openings:
            out["audio"]["opening_predicted"] = self._openings
        return out

    def report(self, found: dict[str, dict], timing: dict) -> dict:
        """The figures and what they are of; schema `hicode-report`."""
        clip, info, (first, end) = self.clip, self.avatar.info, (self.frames.start, self.frames.stop)
        name = "tracked" if self.region == "head" else "tracked_face"  # that the control compares with
        return {
            "schema": SCHEMA,
            "version": VERSION,
            "title": f"{clip.source.get('name', 'clip')}: {end - first} unseen frames ({first} … {end - 1})",
            **{row: found.get(row) for row in ROWS},
            "over_control": over_control(found, [row for row in ("audio", name) if row in found]),
            "seconds": _stage_seconds(clip, info),
            "fps": timing["fps"],
            "peak_memory_mb": info.get("peak_memory_mb") or peak_memory_mb(),
            "timing": timing,
            "detector": DETECTOR,
            "split": {"train": [clip.train[0], clip.train[-1] + 1], "test": [first, end], "fps": clip.fps},
            "region": self.region,
            "protocol": (
                "frames that the avatar has not seen, before any encoding; head pose, upper face and eyes of all "
                "driven rows are the test video's own track. Control: the mean of the training frames, pasted on the "
                "true frames"
            ),
            "notes": self.findings.notes,
            "not_measured": self.findings.not_measured,
        }

    def provenance(self, config: EvaluateConfig) -> dict:
        """Versions, machine, clip and avatar."""
        clip, info = self.clip, self.avatar.info
        used = ["face_landmarks", "face_detection", "perceptual", *([str(config.syncnet)] if config.syncnet else [])]
        settings = {"modes": list(config.modes), "vgg": config.vgg, "region": config.region}
        source = {key: clip.source[key] for key in ("name", "sha256") if key in clip.source}
        size = {"width": clip.width, "height": clip.height, "audio_offset_frames": clip.audio_offset_frames}
        return {
            "evaluated": datetime.date.today().isoformat(),
            **provenance(settings, info.get("seed"), used),
            "clip": source | size,
            "avatar": {key: info[key] for key in ("preset", "seed", "config", "provenance") if key in info},
        }


def mean_training_frame(clip: Clip) -> UInt8[np.ndarray, "h w 3"]:
    """The mean of at most `MAX_MEAN_FRAMES` training frames: a head that is static and blurred."""
    picked = [clip.train[k] for k in evenly(len(clip.train), MAX_MEAN_FRAMES)]
    total = np.zeros((clip.height, clip.width, 3))
    for t in picked:
        total += clip.image(t)
    return (total / len(picked) + 0.5).astype(np.uint8)


def _stage_seconds(clip: Clip, info: dict) -> dict[str, float]:
    prepared = clip.prepare_seconds
    return ({"prepare": prepared} if prepared else {}) | info.get("seconds", {})
