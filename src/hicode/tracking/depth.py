"""Depth of a head in one frame.

Depth is the camera frame's z in decimetres, one value for each pixel centre, NaN where there is no head. It comes from
the fitted mesh, extended smoothly over what the mesh lacks (hair, ears) to the mask's edge with a rounded fall-off.
"""

from typing import TYPE_CHECKING

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve

from hicode.motion import CHIN, LIPS_INNER, FaceTrack
from hicode.render.mesh import rasterize_mesh

if TYPE_CHECKING:
    from hicode.tracking.head_model import HeadModel

_COARSE = 4  # the extension is smooth, so it is solved on every fourth pixel
_STEEP = 1.5  # the mesh is used while its depth changes by less than this per unit sideways
_MOUTH_DM = 0.3  # the mouth's cavity ends this far behind the lips: light does not reach further


def head_depth(
    model: "HeadModel", track: FaceTrack, t: int, mask: UInt8[np.ndarray, "h w"]
) -> Float32[np.ndarray, "h w"]:
    """Camera depth of the head in frame t at the pixels of the mask (above 127), NaN elsewhere.

    Under the mesh it is the z-buffer. Beyond it, over hair and ears, the square of the height above the rim's depth is
    harmonic: it falls from the mesh's to zero at the mask's edge, so the surface turns away there like an ellipsoid.
    """
    inside = mask > 127
    if not inside.any():
        return np.full(mask.shape, np.nan, np.float32)
    known, rim = _mesh_depth(model, track, t, inside)
    height2 = np.maximum(rim - known, 0.0) ** 2
    extended = rim - np.sqrt(np.maximum(_harmonic(height2, inside), 0.0))
    # The seam between mesh and extension is blended over a few pixels.
    covered = np.isfinite(known)
    share = np.clip(cv2.distanceTransform(covered.astype(np.uint8), cv2.DIST_L2, 3) / (2 * _COARSE), 0, 1)
    z = np.where(covered, share * np.nan_to_num(known) + (1 - share) * extended, extended)
    return np.where(inside, z, np.nan).astype(np.float32)


def _mesh_depth(
    model: "HeadModel", track: FaceTrack, t: int, inside: Bool[np.ndarray, "h w"]
) -> tuple[Float[np.ndarray, "h w"], float]:
    """(the mesh's depth inside the mask, NaN towards its outline and beyond; the depth of that outline).

    Hair lies over the flanks of the head, so those are left to the extension.
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
    flank = np.isin(region, np.unique(region[covered == 0]))
    known = np.where(_largest(inside & ~flank), depth, np.nan)  # not bits of ears
    # The rim is the mesh's outline above the jaw, where a head is widest; if it is not seen, the head's origin.
    chin_px = pixels.numpy()[model.triangles[model.landmark_triangles[CHIN], 0], 1]
    above_jaw = np.arange(len(covered))[:, None] < chin_px
    outline = (covered > 0) & ~(cv2.erode(covered, np.ones((3, 3), np.uint8)) > 0) & above_jaw
    rim = float(np.median(raster.depth[outline])) if outline.sum() > 20 else float(camera.T_camera_head[2, 3])
    return known, rim


def _largest(region: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The largest connected piece of a region."""
    _, piece, size, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8))
    return piece == 1 + np.argmax(size[1:, cv2.CC_STAT_AREA]) if len(size) > 1 else np.zeros_like(region)


def _harmonic(values: Float[np.ndarray, "h w"], inside: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Solve Laplace's equation in the region, coarsely, then enlarge.

    Given where `values` is finite, 0 outside the region, free at the image's border.
    """
    h, w = values.shape
    size = (-(-w // _COARSE), -(-h // _COARSE))
    given = np.isfinite(values)
    share = cv2.resize(given.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(np.where(given, values, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    coarse = total / np.maximum(share, 1e-6)
    region = cv2.resize(inside.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0
    fixed = share > 0.5
    unknown = region & ~fixed
    if unknown.any():
        coarse[unknown] = _solve_laplace(np.where(fixed, coarse, 0.0), unknown)
    coarse[~region] = 0
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_LINEAR)


def _solve_laplace(fixed: Float[np.ndarray, "h w"], unknown: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "n"]:
    """The harmonic values of the unknown cells between the fixed ones."""
    count = int(unknown.sum())
    number = np.full(unknown.shape, -1)
    number[unknown] = np.arange(count)
    degree, right = np.zeros(count), np.zeros(count)
    rows, columns = [], []
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        exists = np.ones_like(unknown)
        exists.swapaxes(0, axis)[0 if step == 1 else -1] = False  # no condition beyond the image
        neighbour = np.roll(number, step, axis)
        here = unknown & exists
        degree[number[here]] += 1
        right[number[here]] += np.roll(fixed, step, axis)[here]
        linked = here & (neighbour >= 0)
        rows.append(number[linked])
        columns.append(neighbour[linked])
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    links = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    return np.asarray(spsolve((diags(np.maximum(degree, 1e-9)) - links).tocsc(), right))
