"""Hair on a drawn head: what swings beside the skull is followed, and only that; Gaussians go along."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.clips import write_clip
from helpers.tracked_head import FRAMES, KEYS, PX_PER_DM, TRAIN, drawn_head, swings, tracked
from hicode.avatar.avatar import Avatar
from hicode.avatar.deformation import Carrier, bind
from hicode.files import save_tensors
from hicode.geometry import rigid
from hicode.preparation.clip import Clip
from hicode.tracking import hair
from hicode.tracking.hair import HairConfig, follow_hair
from hicode.tracking.rigid_pose import Skull

CONFIG = HairConfig(structure_frames=12, face_mm=0.0)  # the drawn head's landmarks lie all over it


@pytest.fixture
def follow(monkeypatch):
    """`follow_hair` where the picture stands `swing` "t 3" (dm, head frame) beside the skull that is tracked."""
    poses, drawn = drawn_head()
    monkeypatch.setattr(hair, "head_depth", lambda model, track, t, mask: drawn[t][1])
    monkeypatch.setattr(hair, "corrected_depth", lambda depth, skull, track, t: depth)
    monkeypatch.setattr(hair, "SCALE", 1.0)  # it is drawn small

    def run(swing, images=None, confidence=None, keys=KEYS, config=CONFIG):
        said = torch.stack([torch.as_tensor(p).float() @ rigid(torch.eye(3), -s) for p, s in zip(poses, swing)])
        track = tracked(said, said, confidence=confidence)
        pictures = images or [d[0] for d in drawn]
        mask = lambda t: np.isfinite(drawn[t][1]).astype(np.uint8) * 255
        depths = {int(k): drawn[int(k)][1].astype(np.float32) for k in KEYS}
        rigid_points = Skull(torch.zeros(len(keys), 3), torch.zeros(len(keys)), keys)
        return follow_hair(lambda t: pictures[t], mask, depths, track, rigid_points, None, TRAIN, config)

    return run


def test_what_swings_beside_the_skull_is_followed(follow):
    points, moved, report = follow(swings())
    wanted = swings() - swings()[TRAIN.start : TRAIN.stop].mean(0)
    front = points[:, 2] > 0.6  # its sideways motion is across the rays
    assert len(points) > 20 and int(front.sum()) > 10 and report.points == len(points) and report.matches > 1
    left = (moved[:, front] - wanted[:, None])[..., :2].norm(dim=-1).mean()
    assert left < 0.4 * wanted.norm(dim=-1).mean(), (left * PX_PER_DM, wanted.norm(dim=-1).mean() * PX_PER_DM)
    assert moved[TRAIN.start : TRAIN.stop].mean(0).abs().max() < 1e-4


def test_a_head_that_moves_as_one_moves_no_hair(follow):
    points, moved, report = follow(torch.zeros(FRAMES, 3))
    front = points[:, 2] > 0.6
    assert float(moved[:, front].norm(dim=-1).mean()) * PX_PER_DM < 0.25 and report.moved_px < 0.5


def test_no_training_frame_depends_on_a_test_frame(follow):
    images = [d[0] for d in drawn_head()[1]]
    rng = np.random.default_rng(1)
    other = [im if t in TRAIN else rng.integers(0, 255, im.shape, dtype=np.uint8) for t, im in enumerate(images)]
    (a, one, _), (b, two, _) = follow(swings()), follow(swings(), images=other)
    assert torch.equal(a, b) and torch.equal(one[: TRAIN.stop], two[: TRAIN.stop]) and not torch.equal(one, two)


def test_frames_without_a_face_and_pictures_without_texture_move_nothing(follow):
    confidence = torch.ones(FRAMES)
    confidence[[4, 22]] = 0
    _, moved, _ = follow(swings(), confidence=confidence)
    assert moved[[4, 22]].abs().max() == 0 and moved[5].abs().max() > 0
    _, moved, _ = follow(swings(), images=[np.full((192, 192, 3), 128, np.uint8)] * FRAMES)
    assert moved.abs().max() * PX_PER_DM < 0.1


def test_a_head_without_keyframes_or_all_face_has_no_hair(follow):
    for found in (
        follow(swings(), keys=torch.zeros(0, dtype=torch.long)),
        follow(swings(), config=replace(CONFIG, face_mm=1e4)),
    ):
        assert found[0].shape == (0, 3) and found[1].shape == (FRAMES, 0, 3) and found[2].points == 0


def test_gaussians_go_with_the_hair_and_the_face_does_not():
    g = torch.Generator().manual_seed(0)
    landmarks = 0.2 * torch.rand(478, 3, generator=g)
    points = torch.tensor([3.0, 0, 0]) + 0.3 * torch.rand(40, 3, generator=g)
    vertices, triangles = torch.eye(3) + 9, torch.tensor([[0, 1, 2]])
    carrier = Carrier(torch.zeros(64, 3, 3), landmarks, torch.zeros(64, 478, 3), points)
    cloud = torch.cat([points[:10] + 0.01, landmarks[:10], torch.tensor([[3.0, 9.0, 0.0]])])
    binding = bind(cloud, vertices, triangles, landmarks, hair=points)
    assert binding.landmarks.shape == binding.landmark_weights.shape == (21, 14)
    swing = torch.tensor([0.02, -0.01, 0.03]).expand(40, 3)
    moved = carrier(binding, torch.zeros(64), landmarks, swing)
    torch.testing.assert_close(moved[:10], swing[:10], atol=1e-4, rtol=0)
    assert moved[10:].abs().max() < 1e-5  # the face, and what is far from all
    assert carrier(binding, torch.zeros(64), landmarks).abs().max() == 0  # a motion that knows of no hair
    few = bind(cloud, vertices, triangles, landmarks, hair=points[:2])
    assert (
        few.landmarks.shape == (21, 14)
        and torch.isfinite(few.landmark_weights).all()
        and int(few.landmarks.max()) < 478 + 2
    )


def test_a_clips_hair_is_its_motions_and_only_its_own_avatars(tmp_path):
    path, _ = write_clip(tmp_path / "c.clip")
    assert (
        Clip.open(path).track.motion.hair is None and len(Clip.open(path).track.hair_points) == 0
    )  # prepared before hair was followed
    points, displacement = torch.rand(5, 3), torch.rand(60, 5, 3)
    save_tensors(path / "hair.safetensors", {"points": points, "displacement": displacement}, "hicode-hair", 1)
    track = Clip.open(path).track
    assert torch.equal(track.hair_points, points) and torch.equal(track.motion[3:9].hair, displacement[3:9])
    assert torch.equal(track.motion.control_at(7)[4], displacement[7]) and torch.equal(
        track.motion.tensors()["hair"], displacement
    )
    avatar = lambda own: SimpleNamespace(deformation=SimpleNamespace(carrier=SimpleNamespace(hair_points=own)))
    assert torch.equal(Avatar.own_hair(avatar(points), track).hair, displacement)
    assert (
        Avatar.own_hair(avatar(points + 0.1), track).hair is None
        and Avatar.own_hair(avatar(torch.zeros(0, 3)), track).hair is None
    )
    assert Avatar.own_hair(SimpleNamespace(deformation=SimpleNamespace(carrier=None)), track).hair is None
