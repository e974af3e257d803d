"""The head model: what its dimensions mean, where its landmarks sit, how it is built and cached."""

import numpy as np
import pytest
import torch

from hicode import assets
from hicode.motion import LEFT_EYE_RING, LEFT_IRIS, LIPS, LOWER_LIP_INNER, RIGHT_EYE_RING, RIGHT_IRIS, UPPER_LIP_INNER
from hicode.tracking import head_model as head
from hicode.tracking.head_model import PARTS, HeadModel


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return HeadModel.load()


def action(model: HeadModel, name: str, amount: float = 1.0) -> torch.Tensor:
    expression = torch.zeros(64)
    expression[model.expression_names.index(name)] = amount
    return expression


def vertices_of(model: HeadModel, part: str) -> torch.Tensor:
    return torch.unique(model.triangles[model.part(part)])


def test_it_has_80_identity_and_64_expression_dimensions_and_478_landmarks(model):
    v, f = model.mean.shape[0], model.triangles.shape[0]
    assert model.identity_basis.shape == (80, v, 3) and model.expression_basis.shape == (64, v, 3)
    assert model.triangle_part.shape == (f,) and set(model.triangle_part.tolist()) == set(range(len(PARTS)))
    assert model.landmark_triangles.shape == (478,) and int(model.triangles.max()) == v - 1
    assert len(set(model.expression_names)) == 64
    assert {"jawOpen", "mouthClose", "eyeBlinkLeft", "tongueOut", "browInnerUp"} <= set(model.expression_names[:52])


def test_a_head_is_linear_in_identity_and_expression(model):
    generator = torch.Generator().manual_seed(0)
    identity, a, b = (torch.randn(n, generator=generator) for n in (80, 64, 64))
    rest = model.vertices(identity)
    both = model.vertices(identity, torch.stack([a, b, a + b]))
    # float32 sums of 64 terms
    torch.testing.assert_close(both[2] - rest, both[0] + both[1] - 2 * rest, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.vertices(torch.zeros(80)), model.mean)


def test_identity_components_come_in_order_and_do_not_overlap(model):
    flat = model.identity_basis.flatten(1).double()
    size = flat.norm(dim=1)
    # orthogonal where the PCA weighs: face three times; without that weighting the overlaps stay small but are not zero
    overlap = (flat @ flat.T) / size[:, None] / size
    assert (overlap - torch.eye(80, dtype=torch.float64)).abs().max() < 0.8
    assert size[:10].mean() > 3 * size[-10:].mean()
    assert torch.linalg.matrix_rank(flat) == 80


def test_the_origin_is_the_centroid_of_the_face_mesh_landmarks(model):
    centroid = model.landmarks(model.mean)[:468].mean(0)
    assert centroid.abs().max() < 1e-5


def test_axes_x_left_y_up_z_out_of_the_face_in_decimetres(model):
    points = model.landmarks(model.mean)
    assert points[263, 0] > 0 > points[33, 0]  # the subject's left eye at positive x
    assert points[10, 1] > points[1, 1] > points[152, 1]  # forehead above nose above chin
    assert points[1, 2] > points[234, 2]  # nose before cheek
    assert 0.7 < points[263, 0] - points[33, 0] < 1.0  # outer eye corners, 70 to 100 mm on people


def test_landmarks_lie_on_the_surface_and_are_nearly_symmetric(model):
    assert (model.landmark_barycentric >= -1e-5).all() and torch.allclose(
        model.landmark_barycentric.sum(1), torch.ones(478), atol=1e-5
    )
    points = model.landmarks(model.mean)
    for right, left in ((33, 263), (133, 362), (61, 291), (50, 280), (234, 454), (105, 334), (98, 327)):
        mirrored = points[right] * torch.tensor([-1.0, 1.0, 1.0])
        assert (mirrored - points[left]).norm() < 0.06, (right, left)  # 6 mm: the map is measured, not mirrored


def test_lip_landmarks_meet_at_rest_and_part_when_the_jaw_opens(model):
    gap = lambda v: float((model.landmarks(v)[UPPER_LIP_INNER] - model.landmarks(v)[LOWER_LIP_INNER]).norm())
    assert gap(model.mean) < 0.04
    assert gap(model.vertices(torch.zeros(80), action(model, "jawOpen", 0.5))) > 0.12


def test_the_jaw_takes_the_lower_teeth_and_the_tongue_along_but_not_the_upper_teeth(model):
    move = model.vertices(torch.zeros(80), action(model, "jawOpen")) - model.mean
    assert move[vertices_of(model, "lower_teeth"), 1].mean() < -0.1
    assert move[vertices_of(model, "tongue"), 1].mean() < -0.03
    assert move[vertices_of(model, "upper_teeth")].abs().max() < 1e-6


def test_iris_landmarks_sit_on_the_eyeballs_and_follow_the_gaze(model):
    for part, iris, ring in (("right_eye", RIGHT_IRIS, RIGHT_EYE_RING), ("left_eye", LEFT_IRIS, LEFT_EYE_RING)):
        assert (model.triangle_part[model.landmark_triangles[iris]] == PARTS.index(part)).all()
        centre = model.landmarks(model.mean)[ring].mean(0)
        assert (model.landmarks(model.mean)[iris[0]] - centre)[:2].norm() < 0.08
    move = model.landmarks(model.vertices(torch.zeros(80), action(model, "eyeLookInLeft"))) - model.landmarks(
        model.mean
    )
    assert move[LEFT_IRIS[0], 0] < -0.02 and move[RIGHT_IRIS].abs().max() < 1e-6  # the left eye turns to the nose


def test_speech_drives_the_mouth_and_jaw_only(model):
    driven = {n for n, speech in zip(model.expression_names, model.mouth_expression, strict=True) if speech}
    assert {"jawOpen", "mouthClose", "mouthPucker", "tongueOut", "mouth-eversion"} <= driven
    assert not any(n.startswith(("eye", "brow")) for n in driven)
    weight = model.mouth_landmark_weight
    assert (weight[LIPS] == 1).all() and weight[152] == 1
    assert (weight[np.concatenate([RIGHT_EYE_RING, LEFT_EYE_RING, RIGHT_IRIS, LEFT_IRIS])] == 0).all()
    assert ((weight > 0) & (weight < 1)).any() and weight.min() == 0 and weight.max() == 1


def test_triangles_face_outwards(model):
    corners = model.mean[model.triangles]
    normal = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert normal[model.landmark_triangles[[1, 4, 10, 152, 50, 280]], 2].min() > 0
    for eye in ("left_eye", "right_eye"):  # closed surfaces: signed volume
        c = corners[model.part(eye)] - corners[model.part(eye)].mean((0, 1))
        assert torch.linalg.det(c).sum() > 0


@pytest.mark.slow
def test_building_is_deterministic_and_a_damaged_cache_is_built_again(model, tmp_path, monkeypatch):
    source = assets.folder("head_model")
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(assets, "folder", lambda name: source)
    stored = tmp_path / "head_model" / "head.safetensors"
    stored.parent.mkdir()
    stored.write_bytes(b"not a head")
    head._load.cache_clear()
    try:
        again = HeadModel.load()
    finally:
        head._load.cache_clear()
    assert torch.equal(again.mean, model.mean) and torch.equal(again.triangles, model.triangles)
    # threads may sum in another order
    torch.testing.assert_close(again.identity_basis, model.identity_basis, atol=1e-5, rtol=0)
    assert stored.stat().st_size > 1e6
