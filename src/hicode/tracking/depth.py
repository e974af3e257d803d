"""Depth of a head in one frame, and the z-buffer of a mesh.

Depth is the camera frame's z in decimetres (head units), one value per pixel centre, NaN where there is no head. It is
the fitted head mesh's, extended smoothly over what the mesh lacks (hair, ears) to the edge of the mask with a rounded fall-off.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from jaxtyping import Float, Float32, Int, UInt8
from numba import njit

from hicode.motion import LIPS_INNER, FaceTrack

if TYPE_CHECKING:
    from hicode.tracking.head_model import HeadModel

_COARSE = 4  # the extension is smooth, so it is solved on every fourth pixel
_STEEP = 1.5  # towards its outline the mesh is trusted while its depth changes by less than this per unit sideways
_MOUTH_DM = 0.3  # the mouth's cavity is shown no deeper than this behind the lips: light does not reach further


def head_depth(
    model: "HeadModel", track: FaceTrack, t: int, mask: UInt8[np.ndarray, "h w"]
) -> Float32[np.ndarray, "h w"]:
    """Camera depth of the head in frame t at the pixels of the mask (above 127), NaN elsewhere; a tenth of a second.

    Under the mesh its z-buffer. Beyond it, over hair and ears, the square of the height above the rim's depth is harmonic: it falls from the mesh's
    to zero at the mask's edge, so the surface turns away there like an ellipsoid, whatever the outline.
    """
    inside = mask > 127
    known, rim = _mesh_depth(model, track, t, inside)
    if not inside.any():
        return np.full(mask.shape, np.nan, np.float32)
    height2 = np.maximum(rim - known, 0.0) ** 2
    extended = rim - np.sqrt(np.maximum(_harmonic(height2, inside), 0.0))
    # the seam between mesh and extension is blended over a few pixels
    trust = np.clip(cv2.distanceTransform(np.isfinite(known).astype(np.uint8), cv2.DIST_L2, 3) / (2 * _COARSE), 0, 1)
    z = np.where(np.isfinite(known), trust * np.nan_to_num(known) + (1 - trust) * extended, extended)
    return np.where(inside, z, np.nan).astype(np.float32)


def _mesh_depth(
    model: "HeadModel", track: FaceTrack, t: int, inside: np.ndarray
) -> tuple[Float[np.ndarray, "h w"], float]:
    """(the mesh's depth inside the mask, NaN where it turns away towards its outline and beyond; the depth of that outline).

    Hair lies over the skull's flanks, so those are left to the extension.
    """
    camera = track.camera_at(t)
    vertices = model.vertices(track.identity, track.motion.expression[t])
    pixels, depth = camera.project(vertices)
    raster = rasterize_mesh(pixels.numpy(), depth.numpy(), model.triangles.numpy(), camera.width, camera.height)
    covered = (raster.triangle >= 0).astype(np.uint8)
    depth = np.where(covered > 0, raster.depth, np.nan).astype(np.float64)
    lips = track.landmarks_px[t].numpy()[LIPS_INNER]
    mouth = cv2.fillPoly(np.zeros_like(covered), [lips.round().astype(np.int32)], 1) > 0
    lip_depth = camera.project(model.landmarks(vertices))[1].numpy()[LIPS_INNER].mean()
    depth[mouth] = np.minimum(depth[mouth], lip_depth + _MOUTH_DM)
    down, across = np.gradient(depth)
    pixel_dm = float(camera.T_camera_head[2, 3] / camera.K[0, 0])
    steep = ~(np.hypot(down, across) < _STEEP * pixel_dm) | (covered == 0)
    _, region = cv2.connectedComponents(steep.astype(np.uint8))
    flank = np.isin(region, np.unique(region[(covered == 0)]))
    _, piece, size, _ = cv2.connectedComponentsWithStats((inside & ~flank).astype(np.uint8))
    largest = (
        piece == 1 + np.argmax(size[1:, cv2.CC_STAT_AREA]) if len(size) > 1 else np.zeros_like(inside)
    )  # not bits of ears
    known = np.where(largest, depth, np.nan)
    # the rim: the mesh's outline above the jaw, where a head is widest; without one in sight, the head's origin
    above_jaw = np.arange(len(covered))[:, None] < pixels.numpy()[model.triangles[model.landmark_triangles[152], 0], 1]
    outline = (covered > 0) & ~(cv2.erode(covered, np.ones((3, 3), np.uint8)) > 0) & above_jaw
    rim = float(np.median(raster.depth[outline])) if outline.sum() > 20 else float(camera.T_camera_head[2, 3])
    return known, rim


def _harmonic(values: Float[np.ndarray, "h w"], inside: np.ndarray) -> Float[np.ndarray, "h w"]:
    """Laplace's equation in the region: given where `values` is finite, 0 beyond the region, free at the image's border. Coarse, then enlarged."""
    from scipy.sparse import coo_matrix, diags
    from scipy.sparse.linalg import spsolve

    h, w = values.shape
    size = (-(-w // _COARSE), -(-h // _COARSE))
    has = np.isfinite(values)
    share = cv2.resize(has.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(np.where(has, values, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA) / np.maximum(
        share, 1e-6
    )
    region = cv2.resize(inside.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    fixed = share > 0.5
    unknown = region & ~fixed
    number = np.full(region.shape, -1)
    number[unknown] = np.arange(unknown.sum())
    if unknown.any():
        degree, right = np.zeros(unknown.sum()), np.zeros(unknown.sum())
        rows, columns = [], []
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            exists = np.roll(np.ones_like(region), step, axis)
            edge = [slice(None)] * 2
            edge[axis] = 0 if step == 1 else -1
            exists[tuple(edge)] = False  # beyond the image: no condition
            neighbour = np.roll(number, step, axis)
            value = np.roll(np.where(fixed, coarse, 0.0), step, axis)
            here = unknown & exists
            degree[number[here]] += 1
            right[number[here]] += value[here]
            linked = here & (neighbour >= 0)
            rows.append(number[linked])
            columns.append(neighbour[linked])
        rows, columns = np.concatenate(rows), np.concatenate(columns)
        matrix = diags(np.maximum(degree, 1e-9)) - coo_matrix(
            (np.ones(len(rows)), (rows, columns)), shape=(len(degree),) * 2
        )
        coarse[unknown] = spsolve(matrix.tocsc(), right)
    coarse[~region] = 0
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_LINEAR)


@dataclass(frozen=True)
class MeshRaster:
    """What a mesh shows at each pixel: triangle "h w" (-1: none), barycentric "h w 3" (perspective-correct), depth "h w" (inf: none)."""

    triangle: Int[np.ndarray, "h w"]
    barycentric: Float[np.ndarray, "h w 3"]
    depth: Float[np.ndarray, "h w"]


def rasterize_mesh(
    pixels: Float[np.ndarray, "v 2"],
    depth: Float[np.ndarray, "v"],
    triangles: Int[np.ndarray, "f 3"],
    width: int,
    height: int,
) -> MeshRaster:
    """The nearest triangle at each pixel centre, both faces shown. Vertices at or behind the camera (depth <= 0) take their triangles out.

    Barycentric coordinates are those of the 3D triangle, so `(vertices[triangles[id]] * barycentric).sum` is the surface point seen.
    For a parallel projection add a large constant to the depth.
    """
    triangle = np.full((height, width), -1, np.int32)
    barycentric = np.zeros((height, width, 3), np.float32)
    nearest = np.full((height, width), np.inf, np.float32)
    _fill(
        np.ascontiguousarray(pixels, np.float64),
        np.ascontiguousarray(depth, np.float64),
        np.ascontiguousarray(triangles, np.int32),
        triangle,
        barycentric,
        nearest,
    )
    return MeshRaster(triangle, barycentric, nearest)


@njit(cache=True)
def _fill(pixels, depth, triangles, triangle, barycentric, nearest):
    height, width = nearest.shape
    for f in range(len(triangles)):
        a, b, c = triangles[f, 0], triangles[f, 1], triangles[f, 2]
        za, zb, zc = depth[a], depth[b], depth[c]
        if za <= 0 or zb <= 0 or zc <= 0:
            continue
        ax, ay, bx, by, cx, cy = pixels[a, 0], pixels[a, 1], pixels[b, 0], pixels[b, 1], pixels[c, 0], pixels[c, 1]
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if abs(area) < 1e-12 or not np.isfinite(area):
            continue
        # pixel (row, column) is centred at (column + 0.5, row + 0.5)
        x0 = int(max(0.0, np.ceil(min(ax, bx, cx) - 0.5)))
        x1 = int(min(width - 1.0, np.floor(max(ax, bx, cx) - 0.5)))
        y0 = int(max(0.0, np.ceil(min(ay, by, cy) - 0.5)))
        y1 = int(min(height - 1.0, np.floor(max(ay, by, cy) - 0.5)))
        for row in range(y0, y1 + 1):
            y = row + 0.5
            for column in range(x0, x1 + 1):
                x = column + 0.5
                u = ((bx - x) * (cy - y) - (cx - x) * (by - y)) / area
                v = ((cx - x) * (ay - y) - (ax - x) * (cy - y)) / area
                w = 1.0 - u - v
                if u < -1e-9 or v < -1e-9 or w < -1e-9:
                    continue
                # on screen 1/z is linear
                inverse = u / za + v / zb + w / zc
                z = 1.0 / inverse
                if z < nearest[row, column]:
                    nearest[row, column] = z
                    triangle[row, column] = f
                    barycentric[row, column, 0] = u / za * z
                    barycentric[row, column, 1] = v / zb * z
                    barycentric[row, column, 2] = w / zc * z
