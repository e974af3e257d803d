"""The z-buffer of a triangle mesh. v vertices, f triangles."""

from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float, Int
from numba import njit


@dataclass(frozen=True, eq=False)
class MeshRaster:
    """What a mesh shows at each pixel.

    triangle "h w" (-1: none) · barycentric "h w 3" (perspective-correct) · depth "h w" (inf: none)
    """

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
    """The nearest triangle at each pixel centre; front and back faces are shown.

    Vertices at or behind the camera (depth <= 0) remove their triangles. Barycentric coordinates are those of the 3D
    triangle, so `(vertices[triangles[id]] * barycentric).sum` is the surface point seen. For a parallel projection add
    a large constant to the depth.
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
@no_type_check
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
