"""What of the motion is speech's and what the driving track's."""

import torch

from helpers.fake_avatar import FakeAvatar, motion_of, speechlike
from hicode.avatar.driving import merge_motion, resting_mouth
from hicode.motion import LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, Motion
from hicode.session.speak import synthesize
from hicode.speech.encoders import create_encoder


def test_speech_moves_the_mouth_and_the_track_everything_else():
    driving, spoken, avatar = motion_of(5, 1), motion_of(5, 2), FakeAvatar()
    merged = merge_motion(driving, spoken.expression, spoken.landmarks, avatar)
    mouth = avatar.mouth_expression
    assert torch.equal(merged.expression[:, mouth], spoken.expression[:, mouth])
    assert torch.equal(merged.expression[:, ~mouth], driving.expression[:, ~mouth])
    assert torch.equal(merged.landmarks[:, 0], driving.landmarks[:, 0])  # weight 0
    torch.testing.assert_close(merged.landmarks[:, 477], spoken.landmarks[:, 477])  # weight 1
    w = avatar.mouth_landmark_weight[200]
    torch.testing.assert_close(
        merged.landmarks[:, 200], (1 - w) * driving.landmarks[:, 200] + w * spoken.landmarks[:, 200]
    )
    assert torch.equal(merged.T_camera_head, driving.T_camera_head) and merged.fps == driving.fps


def test_merging_a_track_with_itself_changes_nothing():
    driving = motion_of(7)
    merged = merge_motion(driving, driving.expression, driving.landmarks, FakeAvatar())
    assert torch.equal(merged.expression, driving.expression) and torch.equal(merged.landmarks, driving.landmarks)


def test_merging_leaves_its_inputs_alone():
    driving, spoken = motion_of(3, 1), motion_of(3, 2)
    before = driving.expression.clone(), spoken.landmarks.clone()
    merge_motion(driving, spoken.expression, spoken.landmarks, FakeAvatar())
    assert torch.equal(driving.expression, before[0]) and torch.equal(spoken.landmarks, before[1])


def test_resting_mouth_is_of_frames_with_closed_lips():
    driving = motion_of(50)
    landmarks = torch.zeros(50, 478, 3)
    landmarks[:, torch.from_numpy(LIPS), 0] = torch.linspace(-0.25, 0.25, len(LIPS))
    opening = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.02
    opening[[7, 21, 22, 30, 41]] = 0.001
    landmarks[:, UPPER_LIP_INNER, 1], landmarks[:, LOWER_LIP_INNER, 1] = opening / 2, -opening / 2
    expression = torch.rand(50, 64)
    closed = torch.tensor([7, 21, 22, 30, 41])
    rest, _ = resting_mouth(Motion(expression, landmarks, driving.T_camera_head), FakeAvatar())
    torch.testing.assert_close(rest, expression[closed].mean(0))


def test_an_avatar_driven_by_features_is_given_those_of_each_frame():
    """Frame i is driven by features 2i and 2i + 1 of its sound, however it comes; a last half frame repeats its row."""
    sound = speechlike(1.01)
    features = create_encoder("logmel").encode(sound)
    motions = [frame.motion for frame in synthesize(FakeAvatar(audio_driven=True), sound)]
    assert len(motions) == 26
    given = torch.cat([m.speech for m in motions])
    # streamed against whole
    torch.testing.assert_close(given[:25], features[:50].reshape(25, -1), atol=1e-4, rtol=1e-4)
    assert all(frame.motion.speech is None for frame in synthesize(FakeAvatar(), sound))
