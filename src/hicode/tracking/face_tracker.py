"""The landmarks of one face through a video.

t frames, b crops. Regions of interest (roi) are as in `hicode.tracking.landmarks`. A chunk of frames is first run
through the last region, then each frame through its own region, smoothed in time, several times over slightly different
crops. The remaining noise is averaged in time along the optical flow of the skin, so that motion is kept. Against a
finer flow, the landmarks of two 512 px heads moved over the skin by 0.6 and 0.8 px from frame to frame, MediaPipe's by
1.3 and 1.4.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.errors import InputError
from hicode.motion import CHIN, FOREHEAD_TOP, N_LANDMARKS
from hicode.threads import map_frames, side_by_side
from hicode.tracking.landmarks import (
    ROI_SCALE,
    Image,
    LandmarkDetector,
    Roi,
    crop_face,
    crops_to_tensor,
    rois_from_landmarks,
)


@dataclass(frozen=True)
class LandmarkConfig:
    """How a face is followed."""

    presence: float = 0.5  # below this presence the face is searched anew (MediaPipe's value)
    chunk: int = 8  # frames that are run together; twice as many are held in memory
    detect_every: int = 3  # chunks between searches for further faces
    roi_sigma_frames: float = 2.0  # smoothing of the regions in time: a jittering region gives jittering landmarks
    crops: int = 2  # slightly different crops of each frame, averaged
    flow_sigma_frames: float = 2.0  # averaging of the landmarks along optical flow; 0 switches it off
    max_faces: int = 3  # faces followed at once


@dataclass(frozen=True)
class LandmarkReport:
    """Frames without the face (interpolated), the first of them, and faces seen in a tenth of the frames or more."""

    missing: int
    first_missing: int | None
    faces: int


@dataclass(frozen=True, eq=False)
class Landmarks:
    """The landmarks of one face over a video.

    points_px "t 478 3"  x, y, z in px of the frames
    presence  "t"        in [0, 1]; 0 where not found
    found     "t"        False where the points are interpolated (constant before the first and after the last find)
    """

    points_px: Float[Tensor, "t 478 3"]
    presence: Float[Tensor, "t"]
    found: Bool[Tensor, "t"]
    report: LandmarkReport

    def __len__(self) -> int:
        return self.points_px.shape[0]


def track_faces(
    frames: Iterable[Image],
    landmarker: LandmarkDetector,
    progress: Callable[[int], None] | None = None,
    config: LandmarkConfig = LandmarkConfig(),
) -> Landmarks:
    """Landmarks of the largest face that stays, over a stream of frames of one size.

    Memory does not grow with their number. `progress` gets the number of frames done. Raises InputError where no frame
    has a face, or there are no frames.
    """
    tracks: list[_Track] = []
    waiting: list[np.ndarray] = []  # the chunk before: smoothing its regions needs those of the next chunk
    done = 0
    for number, chunk in enumerate(_chunks(frames, config.chunk)):
        if chunk:
            search = number % config.detect_every == 0
            _find(chunk, done + len(waiting), tracks, landmarker, config, search)
        for track in tracks:
            track.refine(waiting, done, landmarker, config)
        done += len(waiting)
        waiting = chunk
        if progress:
            progress(done)
    if not done:
        raise InputError("The video has no frames. Give a video that plays.")
    tracks = [track for track in tracks if track.points]
    if not tracks:
        raise InputError(f"No face in {done} frames. Give a video of a face from the front, large and well lit.")
    return _largest_face(tracks, done, config)


def _chunks(frames: Iterable[np.ndarray], size: int) -> Iterable[list[np.ndarray]]:
    """Lists of `size` frames, the remainder, and an empty list at the end."""
    chunk: list[np.ndarray] = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
    yield []


@dataclass(eq=False)
class _Track:
    """One face in the video, by frame: regions as first found, then landmarks from the smoothed regions.

    flow "478 3": px from t to t + 1 at the landmarks, and its trust in [0, 1] · _last: the last frame with landmarks
    """

    roi: Roi
    rois: dict[int, np.ndarray] = field(default_factory=dict)
    points: dict[int, np.ndarray] = field(default_factory=dict)
    presence: dict[int, float] = field(default_factory=dict)
    flow: dict[int, np.ndarray] = field(default_factory=dict)
    _last: tuple[int, np.ndarray] | None = None

    def seen_at(self, t: int) -> bool:
        return t in self.rois

    def overlaps(self, roi: Roi, t: int) -> bool:
        """Whether a region lies on this face: the centres are closer than a third of the larger region."""
        this = self.rois[t]
        return bool(np.hypot(*(roi[:2] - this[:2])) < 0.33 * max(roi[2], this[2]))

    def follow(self, chunk: list[np.ndarray], start: int, landmarker: LandmarkDetector, config: LandmarkConfig) -> None:
        """Find the face in a chunk from the last region, then outwards from the frames where it is found."""
        times = range(start, start + len(chunk))
        trial, used = {t: self.roi for t in times if t not in self.rois}, {}
        for _ in range(4):
            if not trial:
                break
            used |= trial
            points, presence = _landmarks([chunk[t - start] for t in trial], np.stack([*trial.values()]), landmarker)
            regions = rois_from_landmarks(torch.from_numpy(points)).numpy()
            for t, present, region in zip(trial, presence, regions, strict=True):
                if present >= config.presence:
                    self.rois[t] = region
            trial = {}
            for t in times:  # again where the face was off the crop's centre, or is missing next to a frame with it
                near = next((s for s in (t, t - 1, t + 1) if s in times and s in self.rois), None)
                if near is not None and t in used and _distance(self.rois[near], used[t]) > 0.1:
                    trial[t] = self.rois[near]
        self.roi = next((self.rois[t] for t in reversed(times) if t in self.rois), self.roi)

    def refine(self, chunk: list[np.ndarray], start: int, landmarker: LandmarkDetector, config: LandmarkConfig) -> None:
        """Landmarks through smoothed regions, for the frames where `follow` found the face."""
        times = [t for t in range(start, start + len(chunk)) if t in self.rois]
        if times:
            smooth = np.stack([self._smoothed(t, config.roi_sigma_frames) for t in times])
            images = [chunk[t - start] for t in times]
            samples = [_landmarks(images, _jittered(smooth, k, config.crops), landmarker) for k in range(config.crops)]
            moving = []
            for i, t in enumerate(times):
                presence = float(np.mean([present[i] for _, present in samples]))
                if presence >= config.presence:
                    self.points[t] = np.mean([points[i] for points, _ in samples], 0).astype(np.float32)
                    self.presence[t] = presence
                    if self._last and self._last[0] == t - 1:
                        moving.append((self._last[1], images[i], self.points[t - 1], t - 1))
                    self._last = t, images[i]
            if config.flow_sigma_frames:
                flows = map_frames(lambda pair: _flow(*pair[:3]), moving)
                self.flow |= {t: flow for (*_, t), flow in zip(moving, flows, strict=True)}
        for t in [t for t in self.rois if t < start]:  # the smoothing reaches one chunk back
            del self.rois[t]

    def _smoothed(self, t: int, sigma: float) -> np.ndarray:
        """Gaussian mean of the regions around t, up to the next gap or jump (a cut) on either side."""
        total, weight = self.rois[t].copy(), 1.0
        for step in (-1, 1):
            k, last = 1, self.rois[t]
            while k <= 3 * sigma and t + step * k in self.rois:
                roi = self.rois[t + step * k].copy()
                if _distance(roi, last) > 0.25:
                    break
                roi[3] = last[3] + (roi[3] - last[3] + np.pi) % (2 * np.pi) - np.pi
                w = float(np.exp(-0.5 * (k / sigma) ** 2))
                total, weight = total + w * roi, weight + w
                k, last = k + 1, roi
        return total / weight


def _distance(a: Roi, b: Roi) -> float:
    """The sum of shift, change of size and rotation between two regions, as a fraction of their size."""
    angle = abs((a[3] - b[3] + np.pi) % (2 * np.pi) - np.pi)
    return float(np.hypot(*(a[:2] - b[:2])) / max(a[2], b[2]) + abs(np.log(a[2] / b[2])) + angle / 2)


def _jittered(rois: Float[np.ndarray, "b 4"], k: int, n: int) -> Float[np.ndarray, "b 4"]:
    """The k-th of n variations of the regions that average out: shifts of 2 %, sizes of 3 %, rotations of 2 degrees."""
    if n == 1:
        return rois
    phase = 2 * np.pi * (k + 0.5) / n
    size = rois[:, 2]
    sign = 1 if k % 2 else -1
    shift = 0.02 * size
    x, y = rois[:, 0] + shift * np.cos(phase), rois[:, 1] + shift * np.sin(phase)
    return np.stack([x, y, size * (1 + 0.03 * sign), rois[:, 3] + 0.035 * np.sin(2 * phase)], 1)


def _landmarks(
    images: list[np.ndarray], rois: Float[np.ndarray, "b 4"], landmarker: LandmarkDetector
) -> tuple[Float[np.ndarray, "b 478 3"], Float[np.ndarray, "b"]]:
    """Landmarks (float64) and presence of one region of each image, two halves of them side by side."""
    size = landmarker.crop_px

    @torch.inference_mode()
    def some(part: slice) -> tuple[np.ndarray, np.ndarray]:
        crops = [crop_face(image, roi, size) for image, roi in zip(images[part], rois[part], strict=True)]
        points, presence = landmarker.from_crops(crops_to_tensor(np.stack(crops)), torch.from_numpy(rois[part]))
        return points.double().numpy(), presence.numpy()

    middle = len(images) // 2
    halves = side_by_side(some, [slice(0, middle), slice(middle, None)] if middle else [slice(None)])
    points, presence = zip(*halves, strict=True)
    return np.concatenate(points), np.concatenate(presence)


def _flow(image: np.ndarray, following: np.ndarray, points: Float[np.ndarray, "478 3"]) -> Float[np.ndarray, "478 3"]:
    """How the picture moves at the landmarks from one frame to the next, in px, and a trust in [0, 1].

    The mean of dense flow there and back over the face at 256x256. Where the two disagree (lips that part, lids that
    close, a cut) the trust falls.
    """
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    size, side = 256, 1.5 * float((high - low).max())
    roi = np.array([*(low + high) / 2, side, 0.0])
    before, after = (cv2.cvtColor(crop_face(frame, roi, size), cv2.COLOR_RGB2GRAY) for frame in (image, following))
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)  # pyright: ignore[reportAttributeAccessIssue]
    at = (points[:, :2] - 0.5 - roi[:2]) * (size / side) + size / 2
    there = _sample(method.calc(before, after, None), at)
    back = _sample(method.calc(after, before, None), at + there)
    apart_px = np.linalg.norm(there + back, axis=1) * (side / size)
    trust = np.exp(-((apart_px / (0.0015 * side)) ** 2))[:, None]
    return np.concatenate([(there - back) / 2 * (side / size), trust], 1)


def _sample(flow: np.ndarray, at: np.ndarray) -> np.ndarray:
    x, y = at.astype(np.float32).T[:, None]
    return cv2.remap(flow, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]


def _average_along_flow(
    points: Float[np.ndarray, "t 478 3"], flow: Float[np.ndarray, "t 478 3"], sigma: float
) -> Float[np.ndarray, "t 478 3"]:
    """Gaussian mean in time of each landmark's place on the skin: flow is motion, deviation from the flow is noise.

    A frame k away votes with its landmark moved along the flow. Its weight falls with k, with the trust in the flow
    between, and with the distance of its vote (0.6 % of the region), so that motion the flow missed survives. Depth is
    averaged with the same weights.
    """
    deviation = np.zeros_like(points)
    deviation[:-1] = points[1:] - points[:-1]
    deviation[..., :2] -= flow[..., :2]
    trust = flow[..., 2]
    low, high = points[..., :2].min(1), points[..., :2].max(1)
    tolerance = 0.006 * ROI_SCALE * (high - low).max(-1)[:, None]
    n = len(points)
    total, weight = np.zeros_like(points), np.ones(points.shape[:2], points.dtype)
    for direction in (1, -1):
        vote, along = np.zeros_like(points), np.ones_like(weight)
        for k in range(1, min(int(3 * sigma), n - 1) + 1):
            # Frame t + direction * k votes in frame t: one more step of deviation, and of trust.
            here = slice(0, n - k) if direction > 0 else slice(k, n)
            step = slice(k - 1, n - 1) if direction > 0 else slice(0, n - k)
            vote[here] += direction * deviation[step]
            along[here] *= trust[step]
            far = np.linalg.norm(vote[here][..., :2], axis=-1) / tolerance[here]
            w = along[here] * np.exp(-0.5 * (k / sigma) ** 2 - far**2)
            total[here] += w[..., None] * vote[here]
            weight[here] += w
    return points + total / weight[..., None]


def _find(
    chunk: list[np.ndarray],
    start: int,
    tracks: list[_Track],
    landmarker: LandmarkDetector,
    config: LandmarkConfig,
    search: bool,
) -> None:
    """Follow the known faces through a chunk; search for further ones if asked, and where none is seen."""
    times = range(start, start + len(chunk))
    for track in sorted(tracks, key=lambda track: -len(track.points)):
        if track.seen_at(start - 1):
            track.follow(chunk, start, landmarker, config)
            _yield_to_others(track, tracks, times)
    for t, image in zip(times, chunk, strict=True):
        if any(track.seen_at(t) for track in tracks) and not (search and t == start):
            continue
        for face in landmarker.detect(image):
            roi = face.roi()
            if any(track.seen_at(t) and track.overlaps(roi, t) for track in tracks):
                continue
            # A face that appears is one that was lost, if it is the only one (a cut) or comes back near its place.
            lost = [track for track in tracks if not track.seen_at(t)]
            track = min(lost, key=lambda track: _distance(track.roi, roi), default=None)
            if track is None or (len(tracks) > 1 and _distance(track.roi, roi) > 1):
                if len(tracks) == config.max_faces:
                    continue
                track = _Track(roi)
                tracks.append(track)
            track.roi = roi
            track.follow(chunk, start, landmarker, config)
            _yield_to_others(track, tracks, times)
            if not track.rois and not track.points:  # no face after all
                tracks.remove(track)


def _yield_to_others(track: _Track, tracks: list[_Track], times: range) -> None:
    """Give up the frames in which the track has slid onto another track's face."""
    for t in times:
        if track.seen_at(t) and any(o is not track and o.seen_at(t) and o.overlaps(track.rois[t], t) for o in tracks):
            del track.rois[t]


def _largest_face(tracks: list[_Track], n: int, config: LandmarkConfig) -> Landmarks:
    """The largest face that stays, gaps interpolated."""

    def heights(track: _Track) -> np.ndarray:
        return np.array([np.linalg.norm(p[FOREHEAD_TOP, :2] - p[CHIN, :2]) for p in track.points.values()])

    tracks = sorted(tracks, key=lambda track: -heights(track).sum())
    main, others = tracks[0], [track for track in tracks[1:] if len(track.points) >= 0.1 * n]
    times = np.array(sorted(main.points))
    known = np.stack([main.points[t] for t in times])
    if main.flow:
        missing = np.zeros((N_LANDMARKS, 3), np.float32)
        flow = np.stack([main.flow.get(t, missing) for t in times])
        known = _average_along_flow(known, flow, config.flow_sigma_frames)
    presence = np.zeros(n, np.float32)
    presence[times] = [main.presence[t] for t in times]
    found = presence > 0
    at = np.interp(np.arange(n), times, np.arange(len(times)))
    low = np.minimum(at.astype(int), len(times) - 1)
    high = np.minimum(low + 1, len(times) - 1)
    part = (at - low).astype(np.float32)[:, None, None]
    points = known[low] * (1 - part) + known[high] * part
    report = LandmarkReport(
        missing=int(n - found.sum()),
        first_missing=None if found.all() else int(np.argmin(found)),
        faces=1 + len(others),
    )
    return Landmarks(torch.from_numpy(points), torch.from_numpy(presence), torch.from_numpy(found), report)
