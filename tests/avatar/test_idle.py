"""Idling: statistics of blinks, gaze and head, what they do to a motion, and the stream that uses them."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.fake_avatar import FakeAvatar, source_video, speechlike
from hicode.audio import SAMPLE_RATE_HZ
from hicode.avatar import eyes as eyes_module
from hicode.avatar.eyes import Eyes, eye_gap, near_tracked_blinks, runs, tracked_blinks
from hicode.avatar.idle import (
    IdleConfig,
    Idler,
    IdleSource,
    blink_profile,
    head_room,
    neck,
    rotation_about,
    still_frame,
)
from hicode.errors import InputError
from hicode.geometry import axis_angle_from_rotation, transform
from hicode.motion import CHIN, Motion, ping_pong
from hicode.session.config import SpeakConfig, VideoConfig
from hicode.session.session import Session
from hicode.session.speak import speak, synthesize
from hicode.speech.loudness import speech_level
from hicode.trust.marks import MarkConfig

FPS = 25
EYE = {1: 0.3, 0: -0.3}  # x of the eyes' middle: left, right


def face() -> torch.Tensor:
    """Landmarks of a face as far as it matters here: two open eyes, brows (the rest of the upper half) and a mouth
    below.
    """
    points = torch.randn(478, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    points[:, 1] -= 0.5
    points[:150, 1] += 1.2  # brow and forehead
    for eye, (ring, iris) in enumerate(zip(eyes_module.RINGS, eyes_module.IRISES)):
        # A ring runs along the lower lid to the other corner, then back along the upper lid.
        angle = torch.arange(16) / 16 * 2 * torch.pi
        points[ring] = torch.stack([EYE[eye] - 0.15 * angle.cos(), 0.35 - 0.05 * angle.sin(), torch.zeros(16)], 1)
        if eye == 1:
            points[ring, 0] = 2 * EYE[1] - points[ring, 0]
        points[iris] = torch.tensor([EYE[eye], 0.35, -0.02])
    points[CHIN] = torch.tensor([0.0, -0.75, 0.0])
    return points


def actions() -> torch.Tensor:
    """Of the 3DMM: blinks bring the upper lids down, looks move the irises."""
    basis = torch.zeros(64, 478, 3)
    for eye in (0, 1):
        ring = torch.from_numpy(eyes_module.RINGS[eye])
        rest = face()[ring]
        basis[eyes_module.BLINK[eye], ring, 1] = -(rest[:, 1] - 0.35).clamp(min=0) * 2.5
        side = 1.0 if eye == 1 else -1.0
        for action, way in (
            (eyes_module.LOOK_OUT, (side, 0, 0)),
            (eyes_module.LOOK_IN, (-side, 0, 0)),
            (eyes_module.LOOK_UP, (0, 1, 0)),
            (eyes_module.LOOK_DOWN, (0, -1, 0)),
        ):
            basis[action[eye], eyes_module.IRISES[eye]] = 0.05 * torch.tensor(way)
    return basis


def track(count: int, blinks: dict[int, float] | None = None, seed: int = 0) -> Motion:
    """`count` frames of that face with its head at rest; at frame t the lids are down to a share of open, a frame
    before and after half way.
    """
    landmarks = face().repeat(count, 1, 1) + 2e-4 * torch.randn(
        count, 478, 3, generator=torch.Generator().manual_seed(seed)
    )
    expression = 0.3 * torch.rand(count, 64, generator=torch.Generator().manual_seed(seed + 1))
    for t, share in (blinks or {}).items():
        for at, depth in ((t - 1, 0.5), (t, 1.0), (t + 1, 0.5)):
            if 0 <= at < count:
                for eye in (0, 1):
                    # Lids close by 2 (the action would do 2.5 / 2 of it), with a trace of the person's own: the corners
                    # move out.
                    landmarks[at] += depth * (1 - share) * 0.8 * actions()[eyes_module.BLINK[eye]]
                    expression[at, eyes_module.BLINK[eye]] = 0.3 + 0.4 * depth
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, 2, 3] = 6.0
    pose[:, 1, 1] = pose[:, 2, 2] = -1
    return Motion(expression, landmarks, pose)


class Face(FakeAvatar):
    """The fake avatar with a face that can close its eyes."""

    def __init__(self, driving: Motion | None = None):
        super().__init__(driving=track(100) if driving is None else driving)
        self.mouth_expression = torch.zeros(64, dtype=torch.bool)
        self.mouth_expression[22:] = True
        self.mouth_landmark_weight = (face()[:, 1] < 0).float()

    def landmark_actions(self) -> torch.Tensor:
        return actions()


def hour(seed: int = 0, minutes: int = 60):
    return IdleSource(seed).next(minutes * 60 * FPS)


@pytest.fixture(scope="module")
def an_hour():
    return hour()


# --- statistics -------------------------------------------------------------------------------------------------------


def test_blinks_come_at_the_rate_asked_for_with_log_normal_pauses(an_hour):
    starts = np.array([begin for begin, _ in runs(an_hour.closure > 0)])
    # 1,080 pauses whose deviation is .5 of their mean: the rate is known to 1.5 %; four times that.
    assert len(starts) / 60 == pytest.approx(IdleConfig().blinks_per_min, rel=0.06)
    pauses = np.diff(starts) / FPS
    assert pauses.min() > 0.5 and pauses.max() < 30
    assert np.mean(pauses) > 1.08 * np.median(pauses)  # skewed to the right, as people's are
    logs = np.log(pauses - 0.7)  # without the blink itself and the shortest gap
    skew = np.mean((logs - logs.mean()) ** 3) / logs.std() ** 3
    # their logarithms are not: a normal sample of 1,080 has .07; the blinks' own lengths add a little
    assert abs(skew) < 0.4


def test_blinks_last_as_people_s_and_close_faster_than_they_open(an_hour):
    lengths, down, up = [], [], []
    for begin, end in runs(an_hour.closure > 0):
        c = an_hour.closure[begin:end]
        lengths.append((end - begin) / FPS)
        down.append(int(np.argmax(c == c.max())))
        up.append(end - begin - 1 - int(np.argmax(c == c.max())))
        assert c.max() == 1.0  # no blink falls between two frames
    assert min(lengths) >= 0.1 and max(lengths) <= 0.32  # a frame's width of rounding
    assert np.mean(up) > 1.8 * np.mean(down)


def test_a_blink_is_continuous_and_ends_open():
    t = np.linspace(-0.05, 0.35, 4001)
    c = np.array([blink_profile(x, 0.25, 0.04) for x in t])
    assert c[0] == c[-1] == 0 and c.max() == 1 and np.abs(np.diff(c)).max() < 0.01
    assert (c[(t > 0.0631) & (t < 0.1029)] == 1).all()  # .3 of .21 s down, then closed_s


def test_the_head_moves_slowly_and_within_its_limits(an_hour):
    head = an_hour.head_deg
    limits = np.array(IdleConfig().head_deg)
    assert (np.abs(head).max(0) <= limits).all() and (np.abs(head).max(0) > 0.7 * limits).all()
    assert (np.abs(head.mean(0)) < 0.05 * limits).all()
    power = (np.abs(np.fft.rfft(head * np.hanning(len(head))[:, None], axis=0)) ** 2).sum(1)
    hz = np.fft.rfftfreq(len(head), 1 / FPS)
    assert power[hz < 1].sum() > 0.98 * power.sum()  # the soft limit makes some harmonics
    # Power 1 / f^2 between .05 and .8 Hz has (1/.05 - 1/.2) / (1/.2 - 1/.8) = 4 times as much below .2; twelve random
    # frequencies scatter about it.
    assert power[hz < 0.2].sum() > 2 * power[(hz >= 0.2) & (hz < 0.8)].sum()
    assert np.abs(np.diff(head, axis=0)).max() < 0.5  # degrees a frame


def test_gaze_fixates_and_jumps(an_hour):
    step = np.abs(np.diff(an_hour.gaze_deg, axis=0)).sum(1)
    still = step == 0
    assert 0.8 < still.mean() < 0.99  # nearly all frames are within a fixation
    fixations = np.array([end - begin for begin, end in runs(still)]) / FPS
    assert 0.7 < fixations.mean() < 1.6
    away = np.abs(an_hour.gaze_deg[:, 0]) > 2.9
    assert 0.03 < away.mean() < 0.2 and np.abs(an_hour.gaze_deg).max() <= 5.0


# --- determinism ------------------------------------------------------------------------------------------------------


def test_pieces_of_any_length_are_the_same_sequence_and_seeds_differ():
    whole, pieces = IdleSource(3).next(3000), IdleSource(3)
    cut = [pieces.next(k) for k in (1, 2, 700, 0, 297, 2000)]
    for name in ("closure", "gaze_deg", "head_deg"):
        assert np.array_equal(getattr(whole, name), np.concatenate([getattr(p, name) for p in cut]))
    other = IdleSource(4).next(3000)
    assert not np.array_equal(whole.closure, other.closure) and not np.array_equal(whole.head_deg, other.head_deg)


def test_hours_need_no_memory():
    source = IdleSource()
    kept = lambda: len(pickle.dumps(source))
    before = kept()
    source._frame = 4 * 3600 * FPS  # the state goes forward by drawing every blink and saccade between
    source.next(10)
    assert abs(kept() - before) < 100  # integers are pickled in as many bytes as they need


# --- the subject's eyes -----------------------------------------------------------------------------------------------


def test_action_numbers_are_the_models():
    from hicode.errors import AssetError
    from hicode.tracking.head_model import HeadModel

    try:
        model = HeadModel.load()
    except AssetError:
        pytest.skip("the head model is not here and cannot be fetched")
    names = model.expression_names
    assert [names[i] for i in eyes_module.BLINK] == ["eyeBlinkRight", "eyeBlinkLeft"]
    for action, name in (
        (eyes_module.LOOK_DOWN, "Down"),
        (eyes_module.LOOK_UP, "Up"),
        (eyes_module.LOOK_IN, "In"),
        (eyes_module.LOOK_OUT, "Out"),
    ):
        assert [names[i] for i in action] == [f"eyeLook{name}Right", f"eyeLook{name}Left"]
    assert {names[i] for side in eyes_module.EYE_ACTIONS for i in side} == {n for n in names if n.startswith("eye")}
    assert not model.mouth_expression[[i for side in eyes_module.EYE_ACTIONS for i in side]].any()
    assert (model.mouth_landmark_weight[np.concatenate([*eyes_module.RINGS, *eyes_module.IRISES])] == 0).all()
    # Left is +x for names, rings and irises; a look to the left moves both irises there, by the angle asked for.
    head = model.landmarks(model.mean)
    basis = model.landmarks(model.expression_basis)
    eyes = Eyes.of(
        Motion(torch.rand(30, 64), head.repeat(30, 1, 1), torch.eye(4).repeat(30, 1, 1)), Modelled(model, basis)
    )
    assert head[eyes_module.IRISES[1], 0].min() > 0 > head[eyes_module.IRISES[0], 0].max()
    per_degree = eyes_module.IRIS_GAIN * eyes_module.EYEBALL * np.pi / 180
    for way, axis, sign in ((0, 0, 1), (1, 0, -1), (2, 1, 1), (3, 1, -1)):
        for iris in eyes_module.IRISES:
            # Down also draws back a little
            assert sign * float(eyes.look_landmarks[way, iris[0], axis]) == pytest.approx(per_degree, rel=0.15)
    for eye in (0, 1):
        shut = eye_gap(head + eyes.shut_landmarks[eye])
        assert abs(float(shut[eye])) < 0.25 * float(eyes.open_gap[eye])
        assert float(shut[1 - eye]) == pytest.approx(float(eyes.open_gap[1 - eye]), abs=1e-5)


class Modelled:
    """A head model as an avatar answers for it."""

    def __init__(self, model, basis):
        self.mouth_expression, self.mouth_landmark_weight, self._basis = (
            model.mouth_expression,
            model.mouth_landmark_weight,
            basis,
        )

    def landmark_actions(self):
        return self._basis


def test_tracked_blinks_are_found_and_slow_changes_are_not():
    # the second's flanks are within a dip's threshold
    assert runs(tracked_blinks(track(200, {50: 0.1, 120: 0.5}))) == [(49, 52), (120, 121)]
    squint = track(200)
    for eye in (0, 1):
        # slowly to .7 of open
        squint.landmarks.add_(0.24 * torch.linspace(0, 1, 200)[:, None, None] * actions()[eyes_module.BLINK[eye]])
    assert not tracked_blinks(squint).any()


@pytest.mark.parametrize("blinks, learned", [({60: 0.1}, True), ({60: 0.55}, False), ({}, False)])
def test_lids_close_whether_learned_from_the_track_or_taken_from_the_model(blinks, learned):
    avatar = Face(track(200, blinks))
    eyes = Eyes.of(avatar.driving, avatar)
    assert eyes.learned == learned
    idler = Idler(avatar.driving, avatar)
    for t in (0, 100):
        closed = idler._frame(avatar.driving, t, 1.0, np.zeros(2), np.zeros(3))
        assert (eye_gap(closed[1]).abs() < 0.25 * eyes.open_gap).all()
        half = idler._frame(avatar.driving, t, 0.5, np.zeros(2), np.zeros(3))
        assert ((eye_gap(half[1]) / eyes.open_gap - 0.475).abs() < 0.1).all()
        seen = (closed[0] >= avatar.driving.expression.amin(0)) & (closed[0] <= avatar.driving.expression.amax(0))
        assert seen.all()


def test_a_wink_teaches_one_eye_only():
    driving = track(200)
    driving.landmarks[60] += 0.75 * actions()[eyes_module.BLINK[0]] * 1.1
    driving.landmarks[60] += 0.75 * actions()[eyes_module.BLINK[1]] * 0.3
    eyes = Eyes.of(driving, Face(driving))
    # the left eye's is the model's action, not an enlarged twitch
    assert eyes.learned and float(eyes.shut_expression[1, eyes_module.BLINK[1]]) > 0.3
    for eye in (0, 1):
        assert abs(float(eye_gap(face() + eyes.shut_landmarks[eye])[eye])) < 0.25 * float(eyes.open_gap[eye])


def test_lids_that_are_down_already_go_no_farther():
    avatar = Face(track(200, {60: 0.1}))
    idler = Idler(avatar.driving, avatar)
    _, landmarks, _ = idler._frame(avatar.driving, 60, 1.0, np.zeros(2), np.zeros(3))
    assert (eye_gap(landmarks).abs() < 0.25 * idler.eyes.open_gap).all()


def test_landmarks_without_eyes_stay_as_they_are():
    driving = replace(track(50), landmarks=torch.zeros(50, 478, 3))
    _, landmarks, _ = Idler(driving, Face(driving))._frame(driving, 0, 1.0, np.zeros(2), np.zeros(3))
    assert torch.isfinite(landmarks).all() and not landmarks.any()


def test_eyes_turn_against_the_head():
    avatar = Face()
    idler = Idler(avatar.driving, avatar, still=True)
    _, landmarks, pose = idler._frame(avatar.driving, 0, 0.0, np.zeros(2), np.array([2.0, 0.0, 0.0]))
    moved = (landmarks - avatar.driving.landmarks[0])[eyes_module.IRISES[0][0]]
    assert moved[0] < 0 and abs(float(moved[0])) == pytest.approx(
        2 * eyes_module.IRIS_GAIN * eyes_module.EYEBALL * np.pi / 180, rel=0.05
    )
    turned = axis_angle_from_rotation(avatar.driving.T_camera_head[0, :3, :3].T @ pose[:3, :3])
    torch.testing.assert_close(turned, torch.tensor([0.0, 2 * eyes_module.RADIANS, 0.0]), atol=1e-5, rtol=0)


def test_the_head_turns_about_the_neck():
    pivot = torch.tensor([0.1, -1.0, -0.7])
    T = rotation_about(pivot, np.array([3.0, -2.0, 1.0]))
    torch.testing.assert_close(transform(T, pivot[None])[0], pivot, atol=1e-6, rtol=0)
    nose = torch.tensor([[0.0, 0.0, 0.5]])
    # yaw: to the subject's left, +x
    assert transform(rotation_about(torch.zeros(3), np.array([5.0, 0, 0])), nose)[0, 0] > 0
    assert transform(rotation_about(torch.zeros(3), np.array([0, 5.0, 0])), nose)[0, 1] > 0  # pitch: up
    crown = torch.tensor([[0.0, 1.0, 0.0]])
    # roll: towards the left shoulder
    assert transform(rotation_about(torch.zeros(3), np.array([0, 0, 5.0])), crown)[0, 0] > 0


def test_no_outline_of_the_head_moves_farther_than_composition_knows():
    avatar, config = Face(), IdleConfig()
    pivot = neck(avatar.driving)
    room = head_room(avatar, 0, pivot, config)
    assert 0 < room <= 1
    far = replace(config, head_deg=tuple(10 * d for d in config.head_deg))
    assert (
        head_room(avatar, 0, pivot, far) == pytest.approx(min(1.0, room if room < 1 else 1.0) / 10, rel=0.01)
        or room == 1.0
    )
    assert head_room(avatar, 0, pivot, replace(config, head_deg=(2.0, 40.0, 40.0))) < 0.1


# --- over a driving track ---------------------------------------------------------------------------------------------


def motions(avatar, seconds: float, **options) -> Motion:
    frames = [frame.motion for frame in synthesize(avatar, speechlike(seconds), SpeakConfig(**options))]
    return Motion(
        *(torch.cat([getattr(m, name) for m in frames]) for name in ("expression", "landmarks", "T_camera_head"))
    )


def blinks_of(motion: Motion, avatar) -> list[tuple[int, int]]:
    gap = eye_gap(motion.landmarks).mean(1)
    return runs((gap < 0.25 * eye_gap(face()).mean()).numpy())


@pytest.fixture(scope="module")
def spoken():
    """A track without a blink, spoken for 16 s: with and without what is added, and with a frame held."""
    avatar = Face(track(150))
    return avatar, motions(avatar, 16), motions(avatar, 16, blinks=False), motions(avatar, 16, still=True)


def test_a_track_without_blinks_is_given_some(spoken):
    avatar, with_blinks, without, _ = spoken
    assert not blinks_of(without, avatar)
    # 5 are expected in 16 s; their number's deviation is about 1.2
    assert 2 <= len(blinks_of(with_blinks, avatar)) <= 9
    assert torch.equal(with_blinks.T_camera_head, without.T_camera_head)  # the head is the track's
    quiet = ~(with_blinks.landmarks != without.landmarks).flatten(1).any(1)
    assert 0.8 < quiet.float().mean() < 0.97  # between blinks nothing is touched


def test_the_mouth_is_not_touched(spoken):
    avatar, with_blinks, without, still = spoken
    mouth = avatar.mouth_landmark_weight > 0
    for motion in (with_blinks, still):
        assert torch.equal(
            motion.expression[:, avatar.mouth_expression], without.expression[:, avatar.mouth_expression]
        )
    assert torch.equal(with_blinks.landmarks[:, mouth], without.landmarks[:, mouth])
    # Where speech has all of a landmark, holding a frame changes nothing either.
    assert torch.equal(still.landmarks[:, mouth], without.landmarks[:, mouth])


def test_nothing_is_added_to_a_track_that_blinks_itself():
    avatar = Face(track(200, {40: 0.1, 140: 0.1}))
    with_blinks, without = motions(avatar, 16), motions(avatar, 16, blinks=False)
    assert torch.equal(with_blinks.landmarks, without.landmarks) and torch.equal(
        with_blinks.expression, without.expression
    )


def test_a_long_pause_between_tracked_blinks_is_filled_and_none_is_doubled():
    driving, played, within = track(1000, {30: 0.1, 970: 0.1}), ping_pong(1000, 0, 4000), 100
    own = tracked_blinks(driving)
    near = near_tracked_blinks(own, ping_pong(1000, -within, 4000 + 2 * within), within)
    after = Idler(driving, Face(driving))(driving[played], near)
    added = [begin for begin, _ in runs((after.landmarks != driving.landmarks[played]).flatten(1).any(1).numpy())]
    assert len(added) >= 20
    # Measured in the frames as they are played; the blink itself may end nearer than it began.
    assert min(np.abs(np.flatnonzero(own[played]) - begin).min() for begin in added) > within - 1
    assert not (own[played] & (after.landmarks != driving.landmarks[played]).flatten(1).any(1).numpy()).any()


def test_nearness_of_tracked_blinks_is_counted_in_played_frames():
    own = np.zeros(30, bool)
    own[10] = True
    near = near_tracked_blinks(own, ping_pong(30, 0, 20 + 6), 3)  # answers for 3 ... 22
    assert np.flatnonzero(near).tolist() == [4, 5, 6, 7, 8, 9, 10]


# --- a held frame -----------------------------------------------------------------------------------------------------


def test_a_held_frame_blinks_looks_and_moves(spoken):
    avatar, _, without, still = spoken
    frames = synthesize(avatar, speechlike(1.0), SpeakConfig(still=True))
    assert len({frame.driving_frame for frame in frames}) == 1
    assert 2 <= len(blinks_of(still, avatar)) <= 9
    turn = axis_angle_from_rotation(
        still.T_camera_head[:1, :3, :3].transpose(1, 2) @ still.T_camera_head[:, :3, :3]
    ).norm(dim=1)
    assert 0.002 < turn.max() < 0.12  # .1 to 7 degrees from where it began
    assert torch.rad2deg(turn[1:] - turn[:-1]).abs().max() < 0.5
    pivot = neck(avatar.driving)
    torch.testing.assert_close(
        transform(still.T_camera_head, pivot.expand(400, 1, 3)),
        transform(without.T_camera_head[:1], pivot.expand(1, 1, 3)).expand(400, 1, 3),
        atol=1e-5,
        rtol=0,
    )


def test_a_held_frame_can_be_chosen_and_must_exist():
    avatar = Face()
    frames = synthesize(avatar, speechlike(0.5), SpeakConfig(still=True, start=7))
    assert {frame.driving_frame for frame in frames} == {7}
    for start in (100, -1):
        with pytest.raises(InputError, match=f"no driving frame {start}: they run from 0 to 99"):
            Session(avatar, SpeakConfig(still=True, start=start))


def test_the_frame_that_holds_best_has_open_eyes_and_a_usual_head():
    driving = track(120, {20: 0.1, 60: 0.1, 100: 0.1})
    poses = driving.T_camera_head.clone()
    poses[:50, :3, :3] = poses[:50, :3, :3] @ rotation_about(torch.zeros(3), np.array([15.0, 0, 0]))[:3, :3]
    t = still_frame(replace(driving, T_camera_head=poses))
    assert t >= 51 and min(abs(t - b) for b in (20, 60, 100)) > 5


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_a_track_of_a_few_frames_serves(frames):
    for still in (False, True):
        assert len(list(synthesize(Face(track(frames)), speechlike(0.3), SpeakConfig(still=still)))) == 8


@pytest.mark.parametrize("still", [False, True])
def test_streaming_equals_offline_while_idling(still):
    audio = np.concatenate([speechlike(3.0), np.zeros(2 * SAMPLE_RATE_HZ, np.float32)])
    whole = [frame.image for frame in synthesize(Face(), audio, SpeakConfig(still=still, seed=5))]
    live = []
    with Session(Face(), SpeakConfig(level=speech_level(audio), still=still, seed=5)) as session:
        for begin in range(0, len(audio), 7001):
            session.push_audio(audio[begin : begin + 7001])
            live += [frame.image for frame in session.drain()]
        session.end_utterance()
        live += [frame.image for frame in session.drain()]
    assert len(live) == len(whole) and all(np.array_equal(a, b) for a, b in zip(live, whole))


def test_how_many_frames_are_laid_over_at_once_makes_no_difference():
    avatar = Face(track(600))
    near = np.zeros(600, bool)
    for still in (False, True):
        one, many = (Idler(avatar.driving, avatar, still=still, seed=2) for _ in range(2))
        whole = one(avatar.driving, near)
        cut = [many(avatar.driving[a:b], near[a:b]) for a, b in ((0, 1), (1, 3), (3, 400), (400, 600))]
        for name in ("expression", "landmarks", "T_camera_head"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(m, name) for m in cut]))


def test_a_held_frame_idles_without_sound():
    with Session(Face(), SpeakConfig(still=True)) as session:
        frames = [frame for frame, _ in zip(session.frames(), range(75))]
    assert len({frame.motion.T_camera_head[0, 0, 2].item() for frame in frames}) > 50
    assert not any(frame.speaking for frame in frames)


def test_a_held_frame_goes_back_into_its_source(tmp_path):
    """Original size: one frame of the source is read, and shown throughout."""
    from hicode.media.video import read_video

    source_video(tmp_path / "source.mp4")
    avatar = Face()
    avatar.source = {"path": str(tmp_path / "source.mp4"), "crop_box": [30, 10, 64]}
    mark = MarkConfig(mark="none", reason="a test that compares pixels")
    config, video = SpeakConfig(still=True, start=12, mark=mark), VideoConfig(original_size=True)
    spoken = speak(avatar, speechlike(1.0), tmp_path / "out.mp4", config, video, progress=False)
    corners = [int(frame[5, 5, 0]) for frame in read_video(tmp_path / "out.mp4")]
    assert spoken.frames == len(corners) == 25
    assert all(abs(grey - (100 + 3 * 12)) <= 2 for grey in corners)  # H.264 on flat grey is off by a level or two
