"""Faces and their 478 landmarks: MediaPipe's detection and attention-mesh networks in torch, and one face followed through a video.

b crops in a batch, t frames. Points are in pixels of the image they were found in, continuous, x right and y down; z is the network's
depth in the same scale, negative towards the viewer, zero about the head's middle. A region of interest (roi) is a turned square,
(centre x, centre y, size, angle) in px and radians, clockwise on the screen; the mesh network sees it as 192x192.

Crops follow MediaPipe's OpenCV path: crop column j of n lies at `size * (j/n - 1/2)` from the roi's centre and is read at that *index*,
so without the half pixel that the repository's convention has. The networks' answers are then MediaPipe's own; correcting the crop
would move them by `(size/192 - 1) / 2` px.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from hicode import assets
from hicode.errors import InputError
from hicode.motion import (
    LEFT_EYE_OUTER,
    LEFT_EYE_RING,
    LOWER_LIP_INNER,
    N_LANDMARKS,
    RIGHT_EYE_OUTER,
    RIGHT_EYE_RING,
    UPPER_LIP_INNER,
)  # fmt: skip
from hicode.tracking.tflite import TfliteGraph

_MESH = 468  # points of the base mesh; the ten after it are the irises
_BROW, _CHIN = 10, 152  # the oval's top and bottom
_ROI_SCALE = 1.5  # MediaPipe's margin around a detection and around landmarks


@dataclass(frozen=True, eq=False)
class FaceBox:
    """A detected face: corners in px, score in [0, 1], and six keypoints in px (right eye, left eye, nose, mouth, right ear, left ear)."""

    x0: float
    y0: float
    x1: float
    y1: float
    score: float
    keypoints: np.ndarray

    @property
    def size_px(self) -> float:
        return max(self.x1 - self.x0, self.y1 - self.y0)

    def roi(self) -> Float[np.ndarray, "4"]:
        """MediaPipe's region for the mesh network: a square 1.5 times the box, upright with the line of the eyes."""
        across = self.keypoints[1] - self.keypoints[0]
        return np.array(
            [
                (self.x0 + self.x1) / 2,
                (self.y0 + self.y1) / 2,
                _ROI_SCALE * self.size_px,
                np.arctan2(across[1], across[0]),
            ]
        )


def rois_from_landmarks(points: Float[Tensor, "b n 3"]) -> Float[Tensor, "b 4"]:
    """MediaPipe's regions for the next frame: 1.5 times the landmarks' bounding box, squared, upright with the line of the eyes.

    The box is of the points as they lie in the image (not turned back first), as MediaPipe has it.
    """
    low, high = points[..., :2].amin(1), points[..., :2].amax(1)
    across = points[:, LEFT_EYE_OUTER, :2] - points[:, RIGHT_EYE_OUTER, :2]
    size = _ROI_SCALE * (high - low).amax(-1)
    return torch.stack([*((low + high) / 2).unbind(-1), size, torch.atan2(across[:, 1], across[:, 0])], -1)


def crop_faces(images: Float[Tensor, "b 3 h w"], rois: Float[Tensor, "b 4"], size: int) -> Float[Tensor, "b 3 s s"]:
    """The regions as `size` x `size` crops, bilinear, borders repeated, differentiable in the images."""
    h, w = images.shape[2:]
    cx, cy, side, angle = rois.to(images).unbind(-1)
    u = torch.arange(size, dtype=images.dtype, device=images.device) / size - 0.5
    v, u = torch.meshgrid(u, u, indexing="ij")
    cos, sin = (side * angle.cos())[:, None, None], (side * angle.sin())[:, None, None]
    x = cx[:, None, None] + cos * u - sin * v
    y = cy[:, None, None] + sin * u + cos * v
    grid = torch.stack([(x + 0.5) / w * 2 - 1, (y + 0.5) / h * 2 - 1], -1)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def crop_face(
    image: UInt8[np.ndarray, "h w 3"], roi: Float[np.ndarray, "4"], size: int, repeat: bool = True
) -> UInt8[np.ndarray, "s s 3"]:
    """`crop_faces` for one uint8 image without making it float first; outside the image its border, or black."""
    cx, cy, side, angle = roi
    cos, sin = side / size * np.cos(angle), side / size * np.sin(angle)
    half = size / 2
    matrix = np.array([[cos, -sin, cx - half * (cos - sin)], [sin, cos, cy - half * (sin + cos)]])
    border = cv2.BORDER_REPLICATE if repeat else cv2.BORDER_CONSTANT
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=border)


class FaceLandmarker(nn.Module):
    """MediaPipe's face networks with their weights. The module holds no state of a video; `track_faces` does."""

    def __init__(self):
        super().__init__()
        self.mesh = TfliteGraph(assets.path("face_landmarks"))
        self.near = TfliteGraph(assets.path("face_detection", "face_detection_short_range.tflite"))
        self.far = TfliteGraph(assets.path("face_detection", "face_detection_full_range_sparse.tflite"))
        # The mesh graph's own options list which points its lip and eye heads refine, in their order of output.
        subsets = [
            options["subset_idxs"] for name, options in self.mesh.custom_options if name == "Landmarks2TransformMatrix"
        ]
        self._refined = dict(
            zip(("output_lips", "output_left_eye", "output_right_eye"), map(torch.tensor, subsets), strict=True)
        )
        self._anchors = {
            self.near: _anchors([(8, 2), (16, 6)], self.near.input_size[0]),
            self.far: _anchors([(4, 1)], self.far.input_size[0]),
        }

    @torch.inference_mode()
    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> list[FaceBox]:
        """The faces of an image, largest first; the short-range network, then, where it sees none, the full-range one."""
        faces = self._detect(image, self.near, min_score=0.5) or self._detect(image, self.far, min_score=0.6)
        return sorted(faces, key=lambda face: -face.size_px)

    def landmarks(
        self, images: Float[Tensor, "b 3 h w"], rois: Float[Tensor, "b 4"]
    ) -> tuple[Float[Tensor, "b 478 3"], Float[Tensor, "b"]]:
        """Points in px and the presence of a face in [0, 1], differentiable in the images (range [0, 1])."""
        rois = torch.as_tensor(rois, dtype=images.dtype, device=images.device)
        return self.from_crops(crop_faces(images, rois, self.mesh.input_size[0]), rois)

    def from_crops(
        self, crops: Float[Tensor, "b 3 s s"], rois: Float[Tensor, "b 4"]
    ) -> tuple[Float[Tensor, "b 478 3"], Float[Tensor, "b"]]:
        """`landmarks` for crops that are cut already."""
        out = self.mesh(crops)
        b = crops.shape[0]
        points = out["output_mesh_identity"].reshape(b, _MESH, 3)
        xy, z = points[..., :2], points[..., 2]
        for name, indices in self._refined.items():  # the heads refine x and y; depth stays the base mesh's
            xy = xy.index_copy(1, indices.to(xy.device), out[name].reshape(b, -1, 2))
        irises, depths = [], []
        for side, ring in (
            ("left", RIGHT_EYE_RING),
            ("right", LEFT_EYE_RING),
        ):  # the graph's left is the image's, our right the subject's
            irises.append(out[f"output_{side}_iris"].reshape(b, -1, 2))
            depths.append(z[:, ring].mean(1, keepdim=True).expand(-1, 5))
        xy, z = torch.cat([xy, *irises], 1), torch.cat([z, *depths], 1)
        size = self.mesh.input_size[0]
        cx, cy, side, angle = rois.to(xy).unbind(-1)
        cos, sin = (side * angle.cos())[:, None], (side * angle.sin())[:, None]
        u, v = (xy / size - 0.5).unbind(-1)
        x = cx[:, None] + cos * u - sin * v
        y = cy[:, None] + sin * u + cos * v
        return torch.stack([x, y, z / size * side[:, None]], -1), out["conv_faceflag"].reshape(b).sigmoid()

    def _detect(self, image: np.ndarray, net: TfliteGraph, min_score: float) -> list[FaceBox]:
        h, w = image.shape[:2]
        side = max(h, w)
        size = net.input_size[0]
        crop = crop_face(image, np.array([w / 2, h / 2, side, 0.0]), size, repeat=False)  # letterboxed, black around
        out = net(_to_tensor(crop[None]) * 2 - 1)
        raw, logits = sorted(out.values(), key=lambda v: -v.shape[-1])
        scores = logits[0, :, 0].clamp(-100, 100).sigmoid().numpy()
        keep = scores >= min_score
        # A row is the box's centre, its size, then six keypoints, in pixels of the network's input; all but the size from the anchor.
        rows, anchors = raw[0].numpy()[keep] / size, self._anchors[net][keep]
        points = rows.reshape(len(rows), 8, 2)
        points[:, [0, 2, 3, 4, 5, 6, 7]] += anchors[:, None]
        corners = np.stack([points[:, 0] - points[:, 1] / 2, points[:, 0] + points[:, 1] / 2], 1)
        points = np.concatenate([corners, points[:, 2:]], 1) * side + np.array([w - side, h - side]) / 2
        return _suppress(points, scores[keep])


def _anchors(layers: list[tuple[int, int]], size: int) -> Float[np.ndarray, "n 2"]:
    """Anchor centres in [0, 1]: for each (stride, count) a grid of cell centres, `count` anchors in each. Their size is 1."""
    centres = []
    for stride, count in layers:
        n = size // stride
        y, x = np.mgrid[:n, :n] + 0.5
        centres.append(np.repeat(np.stack([x, y], -1).reshape(-1, 2) / n, count, 0))
    return np.concatenate(centres).astype(np.float32)


def _suppress(
    points: Float[np.ndarray, "n 8 2"], scores: Float[np.ndarray, "n"], overlap: float = 0.3
) -> list[FaceBox]:
    """MediaPipe's weighted suppression: detections that overlap the best one are averaged into it, weighted by their scores."""
    faces = []
    left = np.argsort(-scores, kind="stable")
    while left.size:
        best = left[0]
        low = np.maximum(points[left, 0], points[best, 0])
        high = np.minimum(points[left, 1], points[best, 1])
        common = np.prod(np.clip(high - low, 0, None), -1)
        area = np.prod(points[:, 1] - points[:, 0], -1)
        same = common > overlap * (area[left] + area[best] - common)
        same[0] = True
        group = left[same]
        mean = np.average(points[group], 0, scores[group])
        faces.append(FaceBox(*map(float, mean[:2].reshape(-1)), float(scores[best]), mean[2:]))
        left = left[~same]
    return faces


def _to_tensor(crops: UInt8[np.ndarray, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True)
class TrackConfig:
    """How a face is followed.

    presence          below it the network is not believed and the face is looked for again (MediaPipe's 0.5)
    chunk             frames that are run together; twice as many are held in memory
    detect_every      chunks between looks for further faces
    roi_sigma_frames  the regions' smoothing in time; a jittering region makes jittering landmarks
    crops             looks at each frame through slightly different regions, averaged
    flow_sigma_frames the landmarks' averaging in time along optical flow; 0 leaves each frame to itself
    max_faces         faces followed at once; the others are only counted
    """

    presence: float = 0.5
    chunk: int = 8
    detect_every: int = 3
    roi_sigma_frames: float = 2.0
    crops: int = 2
    flow_sigma_frames: float = 2.0
    max_faces: int = 3


@dataclass(frozen=True)
class TrackReport:
    """What the capture report needs to know.

    missing        frames without the face, their landmarks interpolated; first_missing is the first of them, or None
    faces          faces that stayed, the one taken included: each in sight for a tenth of the frames or more
    face_px        height from brow to chin of the face taken, median
    others_px      the same of the other faces that stayed
    presence       the network's median belief, over found frames
    """

    frames: int
    missing: int
    first_missing: int | None
    faces: int
    face_px: float
    others_px: tuple[float, ...]
    presence: float

    def findings(self, fps: float) -> list[str]:
        """The things a user should hear of, one line each."""
        lines = []
        if self.missing:
            minutes, seconds = divmod(self.first_missing / fps, 60)
            at = f"{int(minutes):02d}:{seconds:05.2f}"
            lines.append(
                f"No face in {self.missing} of {self.frames} frames (first at {at}): their landmarks are interpolated."
            )
        if self.faces > 1:
            sizes = ", ".join(f"{size:.0f}" for size in self.others_px)
            lines.append(
                f"{self.faces} faces in view: the largest that stays is taken ({self.face_px:.0f} px high; others {sizes} px)."
            )
        return lines


@dataclass(frozen=True, eq=False)
class Landmarks:
    """The landmarks of one face over a video.

    points_px "t 478 3"  x, y, z in px of the frames
    presence  "t"        belief in [0, 1]; 0 where not found
    found     "t"        False where the points are interpolated (held, before the first and after the last find)
    """

    points_px: Float[Tensor, "t 478 3"]
    presence: Float[Tensor, "t"]
    found: Tensor
    report: TrackReport

    def __len__(self) -> int:
        return self.points_px.shape[0]


def track_faces(
    frames: Iterable[UInt8[np.ndarray, "h w 3"]],
    landmarker: FaceLandmarker,
    progress: Callable[[int], None] | None = None,
    config: TrackConfig = TrackConfig(),
) -> Landmarks:
    """Landmarks of the largest face that stays, over a stream of frames of one size; memory does not grow with their number.

    A chunk of frames is first run through the last region, then each frame through its own region, smoothed in time, several times
    over slightly different crops; what noise is left is averaged in time, not at fixed places but along the optical flow of the skin, so that
    motion is kept. Measured on two 512 px heads against a finer flow than the one used: the landmarks stray from the skin by 0.6 and 0.8 px
    from frame to frame, MediaPipe's by 1.3 and 1.4; more than two crops gained nothing once the flow was there.
    `progress` hears the number of frames done. Raises InputError where no frame has a face, or there are no frames.
    """
    tracks: list[_Track] = []
    waiting: list[
        np.ndarray
    ] = []  # the chunk whose regions are known but for the smoothing, which needs the next chunk's
    done = 0
    for number, chunk in enumerate(_chunks(frames, config.chunk)):
        start = done + len(waiting)
        _find(chunk, start, tracks, landmarker, config, look=number % config.detect_every == 0)
        for track in tracks:
            track.refine(waiting, done, landmarker, config)
        done += len(waiting)
        waiting = chunk
        if progress:
            progress(done)
    for track in tracks:
        track.refine(waiting, done, landmarker, config)
    done += len(waiting)
    if progress:
        progress(done)
    if not done:
        raise InputError("The video has no frames. Give a video that plays.")
    tracks = [track for track in tracks if track.points]
    if not tracks:
        raise InputError(
            f"No face in {done} frames. Give a video in which a face is seen from the front, large and well lit."
        )
    return _report(tracks, done, config)


def _chunks(frames: Iterable[np.ndarray], size: int) -> Iterable[list[np.ndarray]]:
    chunk: list[np.ndarray] = []
    for frame in frames:
        chunk.append(frame)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(eq=False)
class _Track:
    """One face on its way through the video: regions as first found, then landmarks of the refined regions, by frame."""

    roi: Float[np.ndarray, "4"]
    rois: dict[int, np.ndarray] = field(default_factory=dict)
    points: dict[int, np.ndarray] = field(default_factory=dict)
    presence: dict[int, float] = field(default_factory=dict)
    flow: dict[int, np.ndarray] = field(
        default_factory=dict
    )  # "478 3": px from t to t + 1 at the landmarks, and its trust in [0, 1]
    _last: tuple[int, np.ndarray] | None = None  # the last frame with landmarks

    def seen_at(self, t: int) -> bool:
        return t in self.rois

    def owns(self, roi: np.ndarray, t: int) -> bool:
        """Whether a region lies on this face: their centres closer than a third of the larger one (half a face)."""
        mine = self.rois[t]
        return float(np.hypot(*(roi[:2] - mine[:2]))) < 0.33 * max(roi[2], mine[2])

    def follow(self, chunk: list[np.ndarray], start: int, landmarker: FaceLandmarker, config: TrackConfig) -> None:
        """Find the face in a chunk from the last known region, working outwards from the frames where it is found."""
        times = range(start, start + len(chunk))
        trial, used = {t: self.roi for t in times if t not in self.rois}, {}
        for _ in range(4):
            if not trial:
                break
            used |= trial
            points, presence = _look([chunk[t - start] for t in trial], np.stack(list(trial.values())), landmarker)
            regions = rois_from_landmarks(torch.from_numpy(points)).numpy()
            self.rois |= {
                t: region
                for t, belief, region in zip(trial, presence, regions, strict=True)
                if belief >= config.presence
            }
            trial = {}
            for t in times:  # again where the face was off the crop's centre, or is missing beside a frame that has it
                near = next((s for s in (t, t - 1, t + 1) if s in times and s in self.rois), None)
                if near is not None and t in used and _distance(self.rois[near], used[t]) > 0.1:
                    trial[t] = self.rois[near]
        self.roi = next((self.rois[t] for t in reversed(times) if t in self.rois), self.roi)

    def refine(self, chunk: list[np.ndarray], start: int, landmarker: FaceLandmarker, config: TrackConfig) -> None:
        """Landmarks through smoothed regions, for the frames where `follow` found the face."""
        times = [t for t in range(start, start + len(chunk)) if t in self.rois]
        if times:
            smooth = np.stack([self._smoothed(t, config.roi_sigma_frames) for t in times])
            images = [chunk[t - start] for t in times]
            looks = [_look(images, _jittered(smooth, k, config.crops), landmarker) for k in range(config.crops)]
            for i, t in enumerate(times):
                presence = float(np.mean([belief[i] for _, belief in looks]))
                if presence >= config.presence:
                    self.points[t] = np.mean([points[i] for points, _ in looks], 0).astype(np.float32)
                    self.presence[t] = presence
                    if config.flow_sigma_frames:
                        if self._last and self._last[0] == t - 1:
                            self.flow[t - 1] = _flow(self._last[1], images[i], self.points[t - 1])
                        self._last = t, images[i]
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


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """How far two regions are apart, as a fraction of their size: shift, change of size and turn added up."""
    turn = abs((a[3] - b[3] + np.pi) % (2 * np.pi) - np.pi)
    return float(np.hypot(*(a[:2] - b[:2])) / max(a[2], b[2]) + abs(np.log(a[2] / b[2])) + turn / 2)


def _jittered(rois: Float[np.ndarray, "b 4"], k: int, n: int) -> Float[np.ndarray, "b 4"]:
    """The k-th of n variations of the regions, spread evenly so that they average out: shifts of 2 %, sizes of 3 %, turns of 2 degrees."""
    if n == 1:
        return rois
    phase = 2 * np.pi * (k + 0.5) / n
    size = rois[:, 2]
    sign = 1 if k % 2 else -1
    shift = 0.02 * size
    return np.stack(
        [
            rois[:, 0] + shift * np.cos(phase),
            rois[:, 1] + shift * np.sin(phase),
            size * (1 + 0.03 * sign),
            rois[:, 3] + 0.035 * np.sin(2 * phase),
        ],
        1,
    )


@torch.inference_mode()
def _look(images: list[np.ndarray], rois: np.ndarray, landmarker: FaceLandmarker) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (float64, "b 478 3") and presence of one region per image."""
    size = landmarker.mesh.input_size[0]
    crops = _to_tensor(np.stack([crop_face(image, roi, size) for image, roi in zip(images, rois, strict=True)]))
    points, presence = landmarker.from_crops(crops, torch.from_numpy(rois))
    return points.double().numpy(), presence.numpy()


def _flow(image: np.ndarray, following: np.ndarray, points: Float[np.ndarray, "478 3"]) -> Float[np.ndarray, "478 3"]:
    """How the picture moves at the landmarks from one frame to the next, in px, and how far to trust it.

    Dense flow there and back over the face at 256x256: their mean is taken, and where they disagree (lips parting, lids closing, a cut) the
    trust falls.
    """
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    size, side = 256, 1.5 * float((high - low).max())
    roi = np.array([*(low + high) / 2, side, 0.0])
    before, after = (cv2.cvtColor(crop_face(frame, roi, size), cv2.COLOR_RGB2GRAY) for frame in (image, following))
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    at = (points[:, :2] - 0.5 - roi[:2]) * (size / side) + size / 2
    there = _sample(method.calc(before, after, None), at)
    back = _sample(method.calc(after, before, None), at + there)
    apart_px = np.linalg.norm(there + back, axis=1) * (side / size)
    return np.concatenate(
        [(there - back) / 2 * (side / size), np.exp(-((apart_px / (0.0015 * side)) ** 2))[:, None]], 1
    )


def _sample(flow: np.ndarray, at: np.ndarray) -> np.ndarray:
    return cv2.remap(flow, at.astype(np.float32)[None], None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)[0]


def _average_along_flow(
    points: Float[np.ndarray, "t 478 3"], flow: Float[np.ndarray, "t 478 3"], sigma: float
) -> Float[np.ndarray, "t 478 3"]:
    """Gaussian mean in time of each landmark's place *on the skin*: what it strays from the flow is noise, what the flow carries is motion.

    A frame k away votes with its landmark carried here; its weight falls with k, with the trust in the flow between, and, so that true
    motion the flow missed survives, with the distance of its vote (0.6 % of the region). Depth is averaged with the same weights.
    """
    stray = np.zeros_like(points)
    stray[:-1] = points[1:] - points[:-1]
    stray[..., :2] -= flow[..., :2]
    trust = flow[..., 2]
    low, high = points[..., :2].min(1), points[..., :2].max(1)
    tolerance = 0.006 * _ROI_SCALE * (high - low).max(-1)[:, None]
    n = len(points)
    total, weight = np.zeros_like(points), np.ones(points.shape[:2], points.dtype)
    for direction in (1, -1):
        vote, along = np.zeros_like(points), np.ones_like(weight)
        for k in range(1, min(int(3 * sigma), n - 1) + 1):
            # Frame t hears frame t + direction * k: one more step of stray, and of trust.
            here = slice(0, n - k) if direction > 0 else slice(k, n)
            step = slice(k - 1, n - 1) if direction > 0 else slice(0, n - k)
            vote[here] += direction * stray[step]
            along[here] *= trust[step]
            far = np.linalg.norm(vote[here][..., :2], axis=-1) / tolerance[here]
            w = along[here] * np.exp(-0.5 * (k / sigma) ** 2 - far**2)
            total[here] += w[..., None] * vote[here]
            weight[here] += w
    return points + total / weight[..., None]


def _find(
    chunk: list, start: int, tracks: list[_Track], landmarker: FaceLandmarker, config: TrackConfig, look: bool
) -> None:
    """Follow the known faces through a chunk, and look for further ones where it is time or where none is in sight."""
    times = range(start, start + len(chunk))
    for track in sorted(tracks, key=lambda track: -len(track.points)):
        if track.seen_at(start - 1):
            track.follow(chunk, start, landmarker, config)
            _yield_to_others(track, tracks, times)
    for t, image in zip(times, chunk, strict=True):
        if any(track.seen_at(t) for track in tracks) and not (look and t == start):
            continue
        for face in landmarker.detect(image):
            roi = face.roi()
            if any(track.seen_at(t) and track.owns(roi, t) for track in tracks):
                continue
            # A face that appears is one that went, if it is the only one (a cut) or comes back near where it was.
            resting = [track for track in tracks if not track.seen_at(t)]
            track = min(resting, key=lambda track: _distance(track.roi, roi), default=None)
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
        if track.seen_at(t) and any(o is not track and o.seen_at(t) and o.owns(track.rois[t], t) for o in tracks):
            del track.rois[t]


def _report(tracks: list[_Track], n: int, config: TrackConfig) -> Landmarks:
    """The largest face that stays, gaps interpolated."""

    def heights(track: _Track) -> np.ndarray:
        return np.array([np.linalg.norm(p[_BROW, :2] - p[_CHIN, :2]) for p in track.points.values()])

    tracks = sorted(tracks, key=lambda track: -heights(track).sum())
    main, others = tracks[0], [track for track in tracks[1:] if len(track.points) >= 0.1 * n]
    times = np.array(sorted(main.points))
    known = np.stack([main.points[t] for t in times])
    if main.flow:
        missing = np.zeros((N_LANDMARKS, 3), np.float32)
        known = _average_along_flow(
            known, np.stack([main.flow.get(t, missing) for t in times]), config.flow_sigma_frames
        )
    presence = np.zeros(n, np.float32)
    presence[times] = [main.presence[t] for t in times]
    found = presence > 0
    at = np.interp(np.arange(n), times, np.arange(len(times)))
    low = np.minimum(at.astype(int), len(times) - 1)
    high = np.minimum(low + 1, len(times) - 1)
    part = (at - low).astype(np.float32)[:, None, None]
    points = known[low] * (1 - part) + known[high] * part
    report = TrackReport(
        frames=n,
        missing=int(n - found.sum()),
        first_missing=None if found.all() else int(np.argmin(found)),
        faces=1 + len(others),
        face_px=float(np.median(heights(main))),
        others_px=tuple(float(np.median(heights(track))) for track in others),
        presence=float(np.median(presence[found])),
    )
    return Landmarks(torch.from_numpy(points), torch.from_numpy(presence), torch.from_numpy(found), report)


def interocular_px(points: Float[Tensor, "*b 478 d"]) -> Float[Tensor, "*b"]:
    """Distance of the outer eye corners in the image, the unit of the measures below."""
    return (points[..., LEFT_EYE_OUTER, :2] - points[..., RIGHT_EYE_OUTER, :2]).norm(dim=-1)


def mouth_opening(points: Float[Tensor, "*b 478 d"]) -> Float[Tensor, "*b"]:
    """Gap between the inner lips over the distance of the outer eye corners: 0 closed, about 0.3 wide open."""
    return (points[..., UPPER_LIP_INNER, :2] - points[..., LOWER_LIP_INNER, :2]).norm(dim=-1) / interocular_px(points)


def eye_opening(points: Float[Tensor, "*b 478 d"]) -> Float[Tensor, "*b"]:
    """Height over width of the eyes, their mean: about 0.3 open, below 0.15 in a blink."""
    ratios = []
    for ring in (
        RIGHT_EYE_RING,
        LEFT_EYE_RING,
    ):  # a ring runs along the lower lid to the other corner, then back along the upper lid
        eye = points[..., ring, :2]
        height = (eye[..., 3:6, :] - eye[..., [13, 12, 11], :]).norm(dim=-1).mean(-1)
        ratios.append(height / (eye[..., 0, :] - eye[..., 8, :]).norm(dim=-1))
    return (ratios[0] + ratios[1]) / 2
