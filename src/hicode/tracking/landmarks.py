"""Faces and their 478 landmarks in single images: MediaPipe's detection and attention-mesh networks in torch.

b crops in a batch. Points are px of the image they were found in, continuous, x right and y down; z is the network's
depth in the same scale, negative towards the viewer, zero about the head's middle. A region of interest (roi) is a
rotated square, (centre x, centre y, size, angle) in px and radians, clockwise on the screen; the mesh network sees it
as 192x192.

Crops follow MediaPipe's OpenCV path: crop column j of n lies at `size * (j/n - 1/2)` from the roi's centre and is read
at that *index*, without the half pixel of this package's convention. The networks' answers are then MediaPipe's own;
correcting the crop would move them by `(size/192 - 1) / 2` px.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, UInt8
from torch import Tensor, nn

from hicode import assets
from hicode.motion import LEFT_EYE_OUTER, LEFT_EYE_RING, RIGHT_EYE_OUTER, RIGHT_EYE_RING
from hicode.tracking.tflite import TfliteGraph

ROI_SCALE = 1.5  # MediaPipe's margin around a detection and around landmarks
_MESH = 468  # points of the base mesh; the ten after it are the irises
Image = UInt8[np.ndarray, "h w 3"]
Roi = Float[np.ndarray, "4"]


@dataclass(frozen=True, eq=False)
class FaceBox:
    """A detected face: corners in px, score in [0, 1], and six keypoints in px.

    The keypoints are right eye, left eye, nose, mouth, right ear, left ear.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    score: float
    keypoints: Float[np.ndarray, "6 2"]

    @property
    def size_px(self) -> float:
        """The longer side."""
        return max(self.x1 - self.x0, self.y1 - self.y0)

    def roi(self) -> Roi:
        """MediaPipe's region for the mesh network: a square 1.5 times the box, level with the line of the eyes."""
        across = self.keypoints[1] - self.keypoints[0]
        x, y = (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2
        return np.array([x, y, ROI_SCALE * self.size_px, np.arctan2(across[1], across[0])])


@runtime_checkable
class FaceDetector(Protocol):
    """What finds the faces of an image, largest first."""

    def detect(self, image: Image) -> list[FaceBox]:
        """The faces of an RGB image."""
        ...


@runtime_checkable
class LandmarkDetector(FaceDetector, Protocol):
    """What finds faces and, in a crop around one, its landmarks."""

    @property
    def crop_px(self) -> int:
        """Side of the crops."""
        ...

    def from_crops(
        self, crops: Float[Tensor, "b 3 s s"], rois: Float[Tensor, "b 4"]
    ) -> tuple[Float[Tensor, "b 478 3"], Float[Tensor, "b"]]:
        """Points in px of the images that the crops were cut from, and the presence of a face in [0, 1]."""
        ...


def rois_from_landmarks(points: Float[Tensor, "b n d"]) -> Float[Tensor, "b 4"]:
    """MediaPipe's regions for the next frame: 1.5 times the landmarks' bounding box, squared, level with the eyes.

    The box is that of the points as they lie in the image, not rotated back first, as in MediaPipe.
    """
    low, high = points[..., :2].amin(1), points[..., :2].amax(1)
    across = points[:, LEFT_EYE_OUTER, :2] - points[:, RIGHT_EYE_OUTER, :2]
    size = ROI_SCALE * (high - low).amax(-1)
    return torch.stack([*((low + high) / 2).unbind(-1), size, torch.atan2(across[:, 1], across[:, 0])], -1)


def crop_faces(images: Float[Tensor, "b 3 h w"], rois: Float[Tensor, "b 4"], size: int) -> Float[Tensor, "b 3 s s"]:
    """The regions as `size` x `size` crops, bilinear, borders repeated, differentiable in the images."""
    h, w = images.shape[2:]
    u = torch.arange(size, dtype=images.dtype, device=images.device) / size - 0.5
    v, u = torch.meshgrid(u, u, indexing="ij")
    x, y = _from_roi(u, v, rois.to(images)[..., None, None])
    grid = torch.stack([(x + 0.5) / w * 2 - 1, (y + 0.5) / h * 2 - 1], -1)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


def _from_roi(u: Tensor, v: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
    """Image x and y of places (u, v) in [-1/2, 1/2] of regions "b 4 ..."."""
    cx, cy, side, angle = rois.unbind(1)
    cos, sin = side * angle.cos(), side * angle.sin()
    return cx + cos * u - sin * v, cy + sin * u + cos * v


def crop_face(image: Image, roi: Roi, size: int, repeat: bool = True) -> UInt8[np.ndarray, "s s 3"]:
    """`crop_faces` of one uint8 image; outside the image its border is repeated, or black."""
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
        heads = ("output_lips", "output_left_eye", "output_right_eye")
        self._refined = dict(zip(heads, map(torch.tensor, subsets), strict=True))
        self._anchors = {
            self.near: _anchors([(8, 2), (16, 6)], self.near.input_size[0]),
            self.far: _anchors([(4, 1)], self.far.input_size[0]),
        }

    @property
    def crop_px(self) -> int:
        """Side of the mesh network's crops."""
        return self.mesh.input_size[0]

    @torch.inference_mode()
    def detect(self, image: Image) -> list[FaceBox]:
        """The faces of an image, largest first: by the short-range network, else by the full-range one."""
        faces = self._detect(image, self.near, min_score=0.5) or self._detect(image, self.far, min_score=0.6)
        return sorted(faces, key=lambda face: -face.size_px)

    def landmarks(
        self, images: Float[Tensor, "b 3 h w"], rois: Float[Tensor, "b 4"]
    ) -> tuple[Float[Tensor, "b 478 3"], Float[Tensor, "b"]]:
        """Points in px and the presence of a face in [0, 1], differentiable in the images (range [0, 1])."""
        rois = torch.as_tensor(rois, dtype=images.dtype, device=images.device)
        return self.from_crops(crop_faces(images, rois, self.crop_px), rois)

    def from_crops(
        self, crops: Float[Tensor, "b 3 s s"], rois: Float[Tensor, "b 4"]
    ) -> tuple[Float[Tensor, "b 478 3"], Float[Tensor, "b"]]:
        """`landmarks` of crops that are cut already."""
        out = self.mesh(crops)
        b, size = crops.shape[0], self.crop_px
        points = out["output_mesh_identity"].reshape(b, _MESH, 3)
        xy, z = points[..., :2], points[..., 2]
        for name, indices in self._refined.items():  # the heads refine x and y; depth stays the base mesh's
            xy = xy.index_copy(1, indices.to(xy.device), out[name].reshape(b, -1, 2))
        # The graph's left is the image's; ours is the subject's.
        sides = (("left", RIGHT_EYE_RING), ("right", LEFT_EYE_RING))
        irises = [out[f"output_{side}_iris"].reshape(b, -1, 2) for side, _ in sides]
        depths = [z[:, ring].mean(1, keepdim=True).expand(-1, 5) for _, ring in sides]
        xy, z = torch.cat([xy, *irises], 1), torch.cat([z, *depths], 1)
        rois = rois.to(xy)
        u, v = (xy / size - 0.5).unbind(-1)
        x, y = _from_roi(u, v, rois[..., None])
        return torch.stack([x, y, z / size * rois[:, 2:3]], -1), out["conv_faceflag"].reshape(b).sigmoid()

    def _detect(self, image: Image, net: TfliteGraph, min_score: float) -> list[FaceBox]:
        h, w = image.shape[:2]
        side = max(h, w)
        size = net.input_size[0]
        crop = crop_face(image, np.array([w / 2, h / 2, side, 0.0]), size, repeat=False)  # letterboxed, black around
        out = net(crops_to_tensor(crop[None]) * 2 - 1)
        raw, logits = sorted(out.values(), key=lambda v: -v.shape[-1])
        scores = logits[0, :, 0].clamp(-100, 100).sigmoid().numpy()
        keep = scores >= min_score
        # A row is the box's centre, its size, then six keypoints, in px of the input; all but the size from the anchor.
        rows, anchors = raw[0].numpy()[keep] / size, self._anchors[net][keep]
        points = rows.reshape(len(rows), 8, 2)
        points[:, [0, 2, 3, 4, 5, 6, 7]] += anchors[:, None]
        corners = np.stack([points[:, 0] - points[:, 1] / 2, points[:, 0] + points[:, 1] / 2], 1)
        points = np.concatenate([corners, points[:, 2:]], 1) * side + np.array([w - side, h - side]) / 2
        return _suppress(points, scores[keep])


def _anchors(layers: list[tuple[int, int]], size: int) -> Float32[np.ndarray, "n 2"]:
    """Anchor centres in [0, 1]: for each (stride, count) a grid of cell centres, `count` anchors in each."""
    centres = []
    for stride, count in layers:
        n = size // stride
        y, x = np.mgrid[:n, :n] + 0.5
        centres.append(np.repeat(np.stack([x, y], -1).reshape(-1, 2) / n, count, 0))
    return np.concatenate(centres).astype(np.float32)


def _suppress(
    points: Float[np.ndarray, "n 8 2"], scores: Float[np.ndarray, "n"], overlap: float = 0.3
) -> list[FaceBox]:
    """MediaPipe's weighted suppression: detections that overlap the best one are averaged into it by their scores."""
    faces = []
    remaining = np.argsort(-scores, kind="stable")
    while remaining.size:
        best = remaining[0]
        low = np.maximum(points[remaining, 0], points[best, 0])
        high = np.minimum(points[remaining, 1], points[best, 1])
        common = np.prod(np.clip(high - low, 0, None), -1)
        area = np.prod(points[:, 1] - points[:, 0], -1)
        same = common > overlap * (area[remaining] + area[best] - common)
        same[0] = True
        group = remaining[same]
        mean = np.average(points[group], 0, scores[group])
        (x0, y0), (x1, y1) = mean[:2].tolist()
        faces.append(FaceBox(x0, y0, x1, y1, float(scores[best]), mean[2:]))
        remaining = remaining[~same]
    return faces


def crops_to_tensor(crops: UInt8[np.ndarray, "b h w 3"]) -> Float[Tensor, "b 3 h w"]:
    """uint8 crops to [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(crops)).permute(0, 3, 1, 2).float() / 255
