"""From a video file to a `Clip`: decode, crop, landmarks, track, masks, depth, sound, capture report.

t frames at 25 fps.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, UInt8

from hicode.audio import FPS
from hicode.errors import HicodeError, InputError, OutputError
from hicode.files import in_use, load_tensors, save_tensors, sha256_of
from hicode.media.audio import sound_notes
from hicode.media.source import as_file
from hicode.media.video import Picture, VideoInfo, probe, read_pictures
from hicode.preparation.capture_report import (
    CaptureReport,
    Recording,
    ReportConfig,
    capture_report,
    face_quality,
    print_report,
    survey_clip,
)
from hicode.preparation.choice import Choice, ChoiceConfig, choose, completed, hidden
from hicode.preparation.clip import Clip, load_track, read_png, save_track, split, write_png
from hicode.preparation.crop import (
    Crop,
    CropConfig,
    FaceSearch,
    check_light,
    clock,
    decode_size,
    find_faces,
    head_box,
    write_crops,
)
from hicode.preparation.defects import Defect, usable
from hicode.preparation.sound import Features, Offset, Sound, SoundConfig, measure_offset, store_features, store_sound
from hicode.preparation.steps import Step, StepCache, make_folder, open_state, whole_folder
from hicode.progress import progress_bar, say_notes
from hicode.runtime import forecast, require_memory_for_frames
from hicode.speech.encoders import EncoderName, default_spec
from hicode.speech.encoders.hubert import weights_variant
from hicode.threads import map_frames
from hicode.tracking.config import TrackConfig
from hicode.tracking.depth import head_depth
from hicode.tracking.face_tracker import track_faces
from hicode.tracking.fit import Observations, fit_report, fit_track, refit_expressions, track_flow
from hicode.tracking.keyframes import GrayPictures, choose_keyframes
from hicode.tracking.landmark_drift import correct_landmark_drift
from hicode.tracking.masks import head_mask
from hicode.tracking.models import TrackingModels
from hicode.tracking.rigid_pose import RigidPoints, corrected_depth, refine_rigid_pose
from hicode.trust.verify import synthetic_source


@dataclass(frozen=True)
class PrepareConfig:
    """How a video becomes a clip."""

    size: int = 512  # Side of the square crop in px. A multiple of 16.
    start: float = 0.0  # Seconds to leave out at the beginning.
    duration: float | None = None  # Seconds to use; the whole video if not given.
    encoder: EncoderName = "embedded"  # Whose speech features are stored with the clip.
    encoder_weights: Path | None = None  # Local folder of the hubert encoder's weights.
    max_missing: float = 0.1  # Largest share of frames that may lack a face; they are interpolated.
    max_light: float = 1.6
    """Largest factor by which the face's brightness may change along the video: one colour a place is learned."""
    min_seconds: float = 2.0  # Shortest video that is accepted.
    crop: CropConfig = CropConfig()  # Search for the face, and the square around it.
    track: TrackConfig = TrackConfig()  # Tracking of the head.
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)  # What of a long video the head learns from.
    sound: SoundConfig = SoundConfig()  # What counts as silence.
    report: ReportConfig = ReportConfig()  # Limits of the capture report.


def prepare(
    video: Path | str,
    out: Path | str,
    config: PrepareConfig = PrepareConfig(),
    progress: bool = True,
    models: TrackingModels | None = None,
) -> Clip:
    """Make the clip `out` from a video, or finish one that was begun; returns it opened.

    `models` are loaded at first use if not given. Raises InputError where the video cannot serve (its message says why
    and what helps), OutputError where `out` cannot be written. A new folder that failed is removed. An interrupted one
    stays, and the same call continues it.
    """
    _check_config(config)
    with as_file(video) as file, in_use(out):
        return _prepare(file, Path(out), config, progress, models, Path(video).name)


def _prepare(
    video: Path, out: Path, config: PrepareConfig, progress: bool, models: TrackingModels | None, name: str
) -> Clip:
    info = probe(video)
    info = replace(info, notes=(*info.notes, *sound_notes(video)))
    if progress:
        say_notes(name, info.notes)
    _check_length(info, config)
    frames, need_bytes = _check_memory(info, config)
    if progress:
        doing, core_seconds = f"Preparing {frames / FPS:.0f} s of video", _CORE_S + _CORE_S_A_SECOND * frames / FPS
        print(forecast(doing, core_seconds, need_bytes), file=sys.stderr)
    source = {"name": name, "path": str(video.resolve()), "sha256": sha256_of(video)}
    created = not out.exists()
    if created and (synthetic := synthetic_source(video)):
        source["synthetic"] = synthetic
        if progress:
            print(synthetic)
    cache = StepCache(out, open_state(out, video, source))
    try:
        make_folder(out)
        _Preparation(out, config, info, cache, models or TrackingModels(), progress).run()
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
        print_report(cache.state["report"])
    return Clip.open(out)


# ---- results of the steps ----


@dataclass(frozen=True)
class LandmarkResult:
    """Frames without a face, and the first of them."""

    missing: int
    first_missing: int | None


@dataclass(frozen=True)
class FitResult:
    """Errors of the landmark fit in px, and the focal length."""

    error_px: float
    lips_px: float
    focal_px: float


@dataclass(frozen=True)
class MaskResult:
    """Masks of so many frames."""

    frames: int


@dataclass(frozen=True)
class TrackResult:
    """Figures of rigid pose (matches a frame, residual, mean rotation, origin), drift and jitter."""

    matches: int
    match_px: float
    rotated_deg: float
    origin_mm: float
    unmatched: int
    drift_matches: float
    drift_px: float
    jitter_deg: float
    jitter_px: float


@dataclass(frozen=True)
class DepthResult:
    """Frames whose depth is stored."""

    frames: list[int] = field(default_factory=list)


# ---- the steps ----


@dataclass(frozen=True, eq=False)
class _Preparation:
    """One run: where it writes, from what, with which models."""

    folder: Path
    config: PrepareConfig
    info: VideoInfo
    cache: StepCache
    models: TrackingModels
    show: bool

    def run(self) -> None:
        """All steps in order. Each names the settings and the earlier steps that its result depends on."""
        config, cache, track = self.config, self.cache, self.config.track
        cut = {"start": config.start, "duration": config.duration, "sha256": cache.state["source"]["sha256"]}
        search = cut | {"crop": config.crop, "min_seconds": config.min_seconds}
        faces = cache.run(Step("faces", 2, search), FaceSearch, self.find_faces)
        check_light(faces.light, self.info.path, config.max_light)
        square = {"size": config.size, "crop": config.crop}
        crop = cache.run(Step("crop", 3, square, ("faces",), ("frames",)), Crop, lambda: self.write_frames(faces))
        self._check_usable(crop)
        train = self._describe(crop)
        landmark = {"landmarks": track.landmarks, "max_missing": config.max_missing}
        step = Step("landmarks", 3, landmark, ("crop",), ("landmarks.safetensors",))
        found = cache.run(step, LandmarkResult, lambda: self.find_landmarks(crop.frame_count))
        step = Step("fit", 3, {"fit": track.fit, "flow": track.flow}, ("landmarks",), ("fit.safetensors",))
        fitted = cache.run(step, FitResult, lambda: self.fit(train))
        step = Step("choice", 1, {"choice": config.choice}, ("fit",))
        choice = cache.run(step, Choice, lambda: self.choose(crop, train))
        cache.state["chosen"] = choice.runs
        step = Step("masks", 3, {"masks": track.masks}, ("fit", "choice"), ("masks/person", "masks/head"))
        cache.run(step, MaskResult, lambda: self.segment(choice))
        settings = {"fit": track.fit, "rigid_pose": track.rigid_pose, "drift": track.drift}
        step = Step("track", 8, settings, ("fit", "masks"), ("track.safetensors", "rigid_points.safetensors"))
        cache.run(step, TrackResult, lambda: self.track(train, choice.mask(crop.frame_count)))
        step = Step("depth", 4, {"depth": track.depth}, ("track",), ("depth.safetensors",))
        cache.run(step, DepthResult, lambda: self.depth(train, choice.mask(crop.frame_count)))
        sound, offset = self._listen(cut, crop.frame_count, train)
        after = ("faces", "track", "masks", "sound", *(("offset",) if offset else ()))
        step = Step("report", 4, {"report": config.report}, after)
        report = cache.run(
            step, CaptureReport, lambda: self.report(faces, crop, found, fitted, (choice, sound, offset))
        )
        cache.state.update(report={"items": report.items, **report.figures}, complete=True)
        cache.save()

    def _check_usable(self, crop: Crop) -> None:
        """Raise InputError where less than a second has no defect, as of a picture that was made a video."""
        defects = [Defect(**defect) for defect in crop.defects]
        good = int(usable(crop.frame_count, defects).sum())
        if good < FPS:
            kinds = " or ".join(sorted({defect.kind for defect in defects}))
            raise InputError(
                f"Only {good} of {crop.frame_count} frames of {self.info.path} can be learned from: the others are "
                f"{kinds}. Give a video in which the person moves."
            )

    def _describe(self, crop: Crop) -> range:
        """Write the clip's frames, size and split into its state; the training part."""
        size = self.config.size
        train, test = split(crop.frame_count)
        self.cache.state.update(
            fps=FPS,
            start_s=self.config.start,
            frame_count=crop.frame_count,
            width=size,
            height=size,
            train=[train.start, train.stop],
            test=[test.start, test.stop],
            crop_box=crop.box,
            defects=crop.defects,
        )
        return train

    def _listen(self, cut: dict, frame_count: int, train: range) -> tuple[Sound, Offset | None]:
        """The steps of the sound."""
        config, cache, folder = self.config, self.cache, self.folder
        store = lambda: store_sound(folder, self.info.path, config.start, frame_count, config.sound)
        sound = cache.run(Step("sound", 2, cut | {"sound": config.sound}, ("crop",), ("audio.wav",)), Sound, store)
        cache.state.update(has_audio=sound.usable, audio_offset_frames=0.0, encoder=default_spec("embedded").to_json())
        if not sound.usable:
            return sound, None
        step = Step("offset", 5, {}, ("sound", "track"))
        offset = cache.run(step, Offset, lambda: measure_offset(folder, train))
        cache.state["audio_offset_frames"] = offset.frames
        file = f"audio.{config.encoder}.safetensors"
        settings = {"encoder": config.encoder, "variant": _weights_variant(config)}
        step = Step("features", 5, settings, ("sound", "offset"), (file,))
        chosen = config.encoder, config.encoder_weights
        features = cache.run(step, Features, lambda: store_features(folder, *chosen, frame_count, offset.frames))
        cache.state["encoder"] = features.encoder
        return sound, offset

    # ---- reading ----

    def image(self, t: int) -> UInt8[np.ndarray, "h w 3"]:
        """Frame t of the crop, RGB."""
        return read_png(self.folder / f"frames/{t:06d}.png", grey=False)

    def head_mask(self, t: int) -> UInt8[np.ndarray, "h w"]:
        """The head in frame t."""
        return read_png(self.folder / f"masks/head/{t:06d}.png", grey=True)

    def frames(self, count: int, label: str) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The first `count` frames of the crop, with progress."""
        with progress_bar(label, self.show) as report:
            for t, image in enumerate(map_frames(self.image, range(count))):
                yield image
                report(t + 1, count)

    @cached_property
    def pictures(self) -> GrayPictures:
        """The crop's frames and masks, the first of them kept in grey for all steps."""
        return GrayPictures(self)

    def decode(self, max_size: int | None) -> Iterator[Picture]:
        """The source's frames from `start` for `duration` seconds."""
        return _cut(read_pictures(self.info.path, FPS, max_size=max_size), self.config)

    # ---- the steps' work ----

    def find_faces(self) -> FaceSearch:
        config, expected = self.config, _expected_frames(self.info, self.config)
        frames = (picture.rgb for picture in self.decode(config.crop.sample_size_px))
        least = round(config.min_seconds * FPS)
        with progress_bar("Looking for faces", self.show) as report:
            progress = lambda done: report(done, max(expected, done))
            return find_faces(frames, self.models.landmarker, self.info, least, config.crop, progress)

    def write_frames(self, faces: FaceSearch) -> Crop:
        size = self.config.size
        box = head_box(self.info.width, self.info.height, faces.reach, faces.size_px, self.config.crop)
        frames = self.decode(decode_size(box, size, self.info))
        with progress_bar("Frames", self.show) as report:
            return write_crops(frames, self.folder, size, box, faces.frame_count, report)

    def find_landmarks(self, count: int) -> LandmarkResult:
        config = self.config
        landmarks = track_faces(self.frames(count, "Landmarks"), self.models.landmarker, config=config.track.landmarks)
        missing, first = landmarks.report.missing, landmarks.report.first_missing
        if first is not None and missing > config.max_missing * count:
            raise InputError(
                f"No face in {missing} of {count} frames of {self.info.path} (first at {clock(first)}). Trim it with "
                "--start and --duration, or accept gaps with "
                f"--max-missing {min(0.99, np.ceil(100 * missing / count) / 100 + 0.01):.2f}."
            )
        tensors = {"points_px": landmarks.points_px, "presence": landmarks.presence, "found": landmarks.found}
        save_tensors(self.folder / "landmarks.safetensors", tensors, "hicode-landmarks", 1)
        return LandmarkResult(missing, first)

    def _observations(self) -> Observations:
        saved, _ = load_tensors(self.folder / "landmarks.safetensors", "hicode-landmarks", 1)
        return Observations(saved["points_px"], saved["found"], self.config.size, self.config.size)

    def fit(self, train: range) -> FitResult:
        """The landmarks' track: what masks, keyframes and the rigid points start from."""
        seen, config = self._observations(), self.config.track
        frames = map_frames(self.pictures.gray, range(len(seen.points_px)))
        flow = track_flow(frames, seen.points_px, seen.found, config.flow)
        observed = Observations(seen.points_px, seen.found, seen.width, seen.height, flow)
        with progress_bar("Fitting the head", self.show) as report:
            progress = lambda done: report(round(100 * done), 100)
            track = fit_track(observed, self.models.head, train, config.fit, progress=progress)
        save_track(self.folder / "fit.safetensors", track)
        figures = fit_report(track, self.models.head)
        return FitResult(figures.error_px, figures.lips_px, figures.focal_px)

    def choose(self, crop: Crop, train: range) -> Choice:
        track = load_track(self.folder / "fit.safetensors")
        good = usable(crop.frame_count, [Defect(**defect) for defect in crop.defects])
        return choose(track, train, good, self.pictures.gray, self.config.choice)

    def segment(self, choice: Choice) -> MaskResult:
        points = load_track(self.folder / "fit.safetensors").landmarks_px.numpy()
        config = self.config.track.masks
        with whole_folder(self.folder / "masks") as target:
            person, head = target / "person", target / "head"
            person.mkdir()
            head.mkdir()
            count = sum(end - first for first, end in choice.runs)

            def masks() -> Iterator[tuple[int, UInt8[np.ndarray, "h w"]]]:
                for first, end in choice.runs:
                    frames = map_frames(self.image, range(first, end))
                    yield from zip(range(first, end), self.models.segmenter.persons(frames, config), strict=True)

            def write(mask: tuple[int, UInt8[np.ndarray, "h w"]]) -> None:
                write_png(person / f"{mask[0]:06d}.png", mask[1])
                write_png(head / f"{mask[0]:06d}.png", head_mask(mask[1], points[mask[0]], config))

            with progress_bar("Masks", self.show) as report:
                for k, _ in enumerate(map_frames(write, masks())):
                    report(k + 1, count)
        return MaskResult(count)

    def track(self, train: range, chosen: Bool[np.ndarray, "t"]) -> TrackResult:
        """Poses from rigid points of the whole head, then expressions and landmarks under them.

        Pictures are read of the chosen frames only.
        """
        config, head = self.config.track, self.models.head
        fitted = load_track(self.folder / "fit.safetensors")
        with progress_bar("Aligning the head", self.show) as report:
            progress = lambda done: report(round(100 * done), 100)
            rigid = refine_rigid_pose(self.pictures, hidden(fitted, chosen), head, train, config.rigid_pose, progress)
        track = refit_expressions(fitted, rigid.poses, self._observations(), head, train, config.fit)
        with progress_bar("Following the skin", self.show) as report:
            progress = lambda done: report(round(100 * done), 100)
            track, drift = correct_landmark_drift(
                self.pictures, hidden(track, chosen), rigid.points, head, train, config.drift, progress
            )
        track = completed(track, fitted, chosen)
        save_track(self.folder / "track.safetensors", track)
        save_tensors(self.folder / "rigid_points.safetensors", rigid.points.tensors(), "hicode-rigid-points", 1)
        figures, found = fit_report(track, head), rigid.report
        return TrackResult(
            matches=round(found.matches_per_frame),
            match_px=found.residual_px,
            rotated_deg=found.rotated_deg,
            origin_mm=found.origin_mm,
            unmatched=found.unmatched - int((~chosen).sum()),
            drift_matches=drift.matches,
            drift_px=drift.moved_px,
            jitter_deg=figures.jitter_deg,
            jitter_px=figures.jitter_px,
        )

    def depth(self, train: range, chosen: Bool[np.ndarray, "t"]) -> DepthResult:
        """Depth of the first training frame and of those that show the head from other sides."""
        config, track = self.config.track.depth, load_track(self.folder / "track.safetensors")
        saved, _ = load_tensors(self.folder / "rigid_points.safetensors", "hicode-rigid-points", 1)
        points = RigidPoints(**saved)
        seen = [t for t in train if chosen[t] and track.confidence[t] > 0]
        seen = seen or [t for t in train if chosen[t]][:1]
        poses = track.motion.T_camera_head.double().numpy()
        frames = choose_keyframes(poses, seen, config.views, config.spacing_deg)
        depths = []
        for t in map(int, frames):
            mesh = head_depth(self.models.head, track, t, self.head_mask(t))
            depths.append(corrected_depth(mesh, points, track, t, config))
        tensors = {"frames": torch.from_numpy(frames), "depth": torch.from_numpy(np.stack(depths))}
        save_tensors(self.folder / "depth.safetensors", tensors, "hicode-depth", 2)
        return DepthResult(frames.tolist())

    def report(
        self,
        faces: FaceSearch,
        crop: Crop,
        found: LandmarkResult,
        fitted: FitResult,
        rest: tuple[Choice, Sound, Offset | None],
    ) -> CaptureReport:
        config, track = self.config.report, load_track(self.folder / "track.safetensors")
        quality = face_quality(self.pictures, track, config.samples)
        with progress_bar("Looking along the clip", self.show) as report:
            good = usable(crop.frame_count, [Defect(**defect) for defect in crop.defects])
            survey = survey_clip(self.pictures, track, config, report, good)
        recording = Recording(
            self.info, faces, crop, found.missing, found.first_missing, fitted.error_px, fitted.focal_px,
            *rest, track, quality, survey,
        )  # fmt: skip
        return capture_report(recording, config)


def _cut(frames: Iterable[Picture], config: PrepareConfig) -> Iterator[Picture]:
    """The frames from `start` for `duration` seconds."""
    first = round(config.start * FPS)
    last = None if config.duration is None else first + round(config.duration * FPS)
    for i, frame in enumerate(frames):
        if last is not None and i >= last:
            return
        if i >= first:
            yield frame


def _expected_frames(info: VideoInfo, config: PrepareConfig) -> int:
    seconds = info.duration_s - config.start
    return max(1, round(min(seconds, config.duration or seconds) * FPS))


# ---- before anything is written ----


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
    encoders = get_args(EncoderName)
    if config.encoder not in encoders:
        raise InputError(f"No speech encoder is called {config.encoder!r}. There are: {', '.join(encoders)}.")
    _weights_variant(config)


def _weights_variant(config: PrepareConfig) -> str | None:
    """Hash of the hubert encoder's weights, None for other encoders. Raises InputError where the two do not agree."""
    if config.encoder != "hubert":
        if config.encoder_weights is not None:
            raise InputError(f"The {config.encoder} encoder takes no --encoder-weights. Leave them out.")
        return None
    if config.encoder_weights is None:
        raise InputError("The hubert encoder needs its weights. Name their folder with --encoder-weights.")
    return weights_variant(config.encoder_weights)


def _check_length(info: VideoInfo, config: PrepareConfig) -> None:
    if info.duration_s - config.start < config.min_seconds - 0.5 / FPS:
        rest = f" after --start {config.start:g}" if config.start else ""
        raise InputError(
            f"{info.path} is {max(info.duration_s - config.start, 0):.1f} s long{rest}; at least "
            f"{config.min_seconds:g} s are needed, a minute is better. "
            "Give a longer video."
        )


# Memory of preparing (measured: 0.6 GB at 512 px and 5 s): of the program, of a crop's pixel, of a source pixel
# (decoding and converting hold a few frames), and of each frame's landmarks, flow and fit. Pictures go to disk.
_PROGRAM_BYTES, _CROP_PIXEL_BYTES, _SOURCE_PIXEL_BYTES, _FRAME_BYTES = 0.7e9, 400, 30, 100e3


# Time of preparing on one core (46 s for 8 s of video): a guess of what does not grow, and each second of video.
_CORE_S, _CORE_S_A_SECOND = 10.0, 5.0


def _check_memory(info: VideoInfo, config: PrepareConfig) -> tuple[int, float]:
    """(frames, bytes needed). Raises ResourceError where that is more than the free memory."""
    frames = _expected_frames(info, config)
    fixed = _PROGRAM_BYTES + _CROP_PIXEL_BYTES * config.size**2 + _SOURCE_PIXEL_BYTES * info.width * info.height
    require_memory_for_frames(frames, FPS, fixed, _FRAME_BYTES, f"Preparing {frames} frames of {info.path}")
    return frames, fixed + frames * _FRAME_BYTES
