"""The mesh z-buffer against geometry that is known in closed form, and the head's depth in a frame."""

import numpy as np
import pytest
import torch

from hicode.camera import Camera
from hicode.geometry import rigid
from hicode.motion import FaceTrack, Motion
from hicode.render.mesh import rasterize_mesh
from hicode.tracking.depth import head_depth
from hicode.tracking.head_model import HeadModel


def project(points, focal=100.0, width=64, height=48):
    return points[:, :2] / points[:, 2:] * focal + [width / 2, height / 2], points[:, 2]


def test_a_slanted_triangle_has_the_depth_of_its_plane_and_perspective_barycentrics():
    corners = np.array([[-1.0, -1, 3], [2, -0.5, 5], [0, 1.5, 8]])
    raster = rasterize_mesh(*project(corners), np.array([[0, 1, 2]]), 64, 48)
    row, column = np.nonzero(raster.triangle == 0)
    assert len(row) > 200
    surface = raster.barycentric[row, column] @ corners
    ray = np.stack([(column + 0.5 - 32) / 100, (row + 0.5 - 24) / 100, np.ones(len(row))], 1)
    np.testing.assert_allclose(surface, ray * surface[:, 2:], atol=1e-5)  # float32 storage
    np.testing.assert_allclose(raster.depth[row, column], surface[:, 2], rtol=1e-6)
    normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
    np.testing.assert_allclose(raster.depth[row, column], normal @ corners[0] / (ray @ normal), rtol=1e-5)


def test_the_nearest_triangle_wins_whatever_the_order():
    near, far = np.array([[-1.0, -1, 2], [1, -1, 2], [0, 1, 2]]), np.array([[-3.0, -3, 4], [3, -3, 4], [0, 3, 4]])
    for first, second, expected in ((near, far, 0), (far, near, 1)):
        raster = rasterize_mesh(*project(np.concatenate([first, second])), np.array([[0, 1, 2], [3, 4, 5]]), 64, 48)
        assert raster.triangle[24, 32] == expected and raster.depth[24, 32] == 2


def test_triangles_behind_the_camera_degenerate_or_outside_leave_no_trace():
    points = np.array([[0.0, 0, -1], [1, 0, 2], [0, 1, 2], [50, 50, 1], [51, 50, 1], [50, 51, 1]])
    raster = rasterize_mesh(*project(points), np.array([[0, 1, 2], [3, 4, 5], [1, 1, 2]]), 64, 48)
    assert (raster.triangle == -1).all() and np.isinf(raster.depth).all()


@pytest.fixture(scope="module")
def model():
    return HeadModel.load()


@pytest.fixture(scope="module")
def track(model):
    """One frontal frame, mouth half open, 256 px."""
    expression = torch.zeros(1, 64)
    expression[0, model.expression_names.index("jawOpen")] = 0.5
    pose = rigid(torch.diag(torch.tensor([1.0, -1, -1])), torch.tensor([0.0, 0, 8.0]))[None]
    camera = Camera.pinhole(800.0, 256, 256)
    points = model.landmarks(model.vertices(torch.zeros(80), expression))
    pixels, _ = camera.with_pose(pose).project(points)
    return FaceTrack(Motion(expression, points, pose), torch.zeros(80), camera, pixels, torch.ones(1))


def disc(radius, centre=(128, 110), size=256):
    y, x = np.mgrid[:size, :size] + 0.5
    return (np.hypot(x - centre[0], y - centre[1]) < radius).astype(np.uint8) * 255


def test_depth_covers_the_mask_and_nothing_else(model, track):
    for mask in (disc(120), disc(40), np.zeros((256, 256), np.uint8), np.full((256, 256), 255, np.uint8)):
        depth = head_depth(model, track, 0, mask)
        assert depth.dtype == np.float32 and (np.isfinite(depth) == (mask > 127)).all()


def test_the_face_keeps_the_depth_of_the_mesh_and_the_outline_turns_away(model, track):
    mask = disc(120)
    depth = head_depth(model, track, 0, mask)
    vertices = model.vertices(track.identity, track.motion.expression[0])
    points, z = track.camera_at(0).project(model.landmarks(vertices))
    for landmark in (1, 50, 280, 151, 199):
        x, y = points[landmark].int().tolist()
        assert abs(depth[y, x] - z[landmark]) < 0.03, landmark  # a pixel's slope
    # along a ray out of the face through where the hair would be, depth only grows
    ray = depth[110, 190:247]
    assert (np.diff(ray) > -0.02).all() and ray[-1] - ray[0] > 0.2


def test_the_open_mouth_is_no_bottomless_hole(model, track):
    depth = head_depth(model, track, 0, disc(120))
    x, y = ((track.landmarks_px[0, 13] + track.landmarks_px[0, 14]) / 2).int().tolist()
    lips = track.camera_at(0).project(track.motion.landmarks[0, [13, 14]])[1].mean()
    assert lips - 0.05 < depth[y, x] <= lips + 0.32
