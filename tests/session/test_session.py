"""Speaking: the stream, the merge of speech with the driving track, rest in silence, and the video."""

import threading
import time
import tracemalloc
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hicode.audio import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from hicode.avatar.compositor import compose, dilate_mask
from hicode.avatar.driving import merge_motion, resting_mouth
from hicode.camera import Camera
from hicode.errors import FileFormatError, HicodeError, InputError, OutputError
from hicode.motion import LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, Motion, bounce
from hicode.render import Rendering
from hicode.session.session import (
    READ_AHEAD,
    Stream,
    _drained,
    speak,
    synthesize,
    synthesize_motion,
)
from hicode.speech.encoder import create_encoder
from hicode.speech.faceformer import Faceformer, FaceformerConfig, SpeechModels
from hicode.speech.loudness import speech_level

SIZE = 64
DRIVING = 20


def motion_of(count: int, seed: int = 0) -> Motion:
    g = torch.Generator().manual_seed(seed)
    pose = torch.eye(4).repeat(count, 1, 1)
    pose[:, 0, 3] = torch.arange(count) / 100
    return Motion(torch.rand(count, 64, generator=g), torch.randn(count, 478, 3, generator=g), pose)


def speech_models(seed: int = 0) -> SpeechModels:
    """Real Faceformers over log-mel features with random weights: nothing of them is faked but what they have learned."""
    torch.manual_seed(seed)
    models = []
    for outputs in (64, 478 * 3):
        model = Faceformer(FaceformerConfig(feature_dim=160, outputs=outputs, components=8))
        torch.nn.init.normal_(model.output.weight, std=0.3)
        torch.nn.init.normal_(model.basis, std=0.1)
        models.append(model)
    return SpeechModels(*models, "logmel", torch.zeros(64), torch.zeros(478, 3), torch.zeros(20, 478, 3))


@dataclass
class FakeAvatar:
    """An avatar whose render is a disc: its colour tells the expression, its place the pose."""

    speech: SpeechModels | None = field(default_factory=speech_models)
    driving: Motion = field(default_factory=lambda: motion_of(DRIVING))
    compositor: None = None
    source: dict = field(default_factory=dict)
    plate: np.ndarray = field(default_factory=lambda: np.full((SIZE, SIZE, 3), 60, np.uint8))
    shown: list = field(default_factory=list)  # (motion, thread) of each rendered frame
    followed: list[bool] = field(default_factory=list)  # whether its frame was said to have the head's pose

    def __post_init__(self):
        self.mouth_expression = torch.arange(64) < 40
        self.mouth_landmark_weight = torch.linspace(0, 1, 478)

        self.camera = Camera(torch.tensor([[70.0, 0, 32], [0, 70, 32], [0, 0, 1]]), torch.eye(4), SIZE, SIZE)

    def landmark_actions(self) -> torch.Tensor:
        return torch.zeros(64, 478, 3)

    def driving_frame(self, t: int) -> np.ndarray:
        assert 0 <= t < len(self.driving)
        return np.full((SIZE, SIZE, 3), 60 + t, np.uint8)

    def driving_mask(self, t: int) -> np.ndarray:
        y, x = np.mgrid[:SIZE, :SIZE]
        return np.where(np.hypot(x - 32, y - 30) < 14, 255, 0).astype(np.uint8)

    @property
    def rendered(self) -> int:
        return len(self.shown)

    def deformed(self, motion: Motion, t: int) -> Motion:
        return motion[t : t + 1]

    def face_mask(
        self, motion: Motion, t: int, head_mask: np.ndarray, frame_motion: Motion, frame_t: int
    ) -> np.ndarray:
        return np.where(np.arange(SIZE)[:, None] >= 24, head_mask, 0).astype(np.uint8)  # all but the top of the head

    def rasterized(self, deformed: Motion, motion: Motion, t: int, within: tuple | None = None) -> Rendering:
        self.shown.append((deformed, threading.get_ident()))
        alpha = torch.from_numpy(self.driving_mask(0) / 255.0).float()
        colour = torch.stack([motion.expression[t, 0], motion.expression[t, 50], motion.landmarks[t, 400, 0]]).sigmoid()
        return Rendering(alpha[..., None] * colour, alpha)

    def composed(
        self,
        rendering: Rendering,
        motion: Motion,
        t: int,
        frame: np.ndarray,
        head_mask: np.ndarray,
        index: int,
        same_pose: bool,
        shown: np.ndarray | None,
    ) -> np.ndarray:
        self.followed.append(same_pose)
        out = compose(rendering.rgb, rendering.alpha, frame, head_mask if shown is None else shown, self.plate)
        out[30, 32, 0] = index % 251  # as grain does, it tells one frame from the next
        return out


def speechlike(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n = round(seconds * SAMPLE_RATE_HZ)
    syllables = np.clip(np.sin(2 * np.pi * 4 * np.arange(n) / SAMPLE_RATE_HZ), 0, 1)
    return (0.1 * syllables * rng.standard_normal(n)).astype(np.float32)


# --- motion ------------------------------------------------------------------------------------------------------------------------------


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


def test_an_avatar_moved_by_features_is_given_those_of_each_frame():
    """Table 2's None: frame i is moved by features 2i and 2i + 1 of its sound, however the sound comes; a last half frame repeats its row."""
    avatar = FakeAvatar()
    avatar.hears = True
    sound = speechlike(1.01)
    features = create_encoder("logmel").encode(sound)
    motions = [motion for _, motion in synthesize_motion(avatar, sound)]
    assert len(motions) == 26
    heard = torch.cat([m.speech for m in motions])
    torch.testing.assert_close(
        heard[:25], features[:50].reshape(25, -1), atol=1e-4, rtol=1e-4
    )  # streamed against whole
    assert all(m.speech is None for _, m in synthesize_motion(FakeAvatar(), sound))


# --- stream ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [160, 640, 1000, 7001, 10**6])
def test_streaming_equals_offline(chunk):
    audio = speechlike(1.7)
    offline = list(synthesize(FakeAvatar(), audio))
    stream = Stream(FakeAvatar(), level=speech_level(audio))
    live = [frame for begin in range(0, len(audio), chunk) for frame in stream.push(audio[begin : begin + chunk])]
    early = len(live)
    live += stream.flush()
    assert len(live) == len(offline) == -(-len(audio) // SAMPLES_PER_FRAME)
    assert all(np.array_equal(a, b) for a, b in zip(live, offline))  # bit for bit: sound is cut into the same pieces
    if chunk <= 1000:
        assert early >= len(offline) - round(stream.latency_s * 25) - 2  # frames come as soon as the look-ahead allows


@pytest.mark.parametrize("chunk", [1, 37, 640, 16000])
@pytest.mark.parametrize("still", [False, True])
def test_streamed_motion_equals_offline_bit_for_bit(chunk, still):
    """With all that lies between sound and head: level, features, Faceformers, gate (there is a pause), idling."""
    audio = np.concatenate([speechlike(0.5), np.zeros(9000, np.float32), speechlike(0.3, 1)])
    offline = list(synthesize_motion(FakeAvatar(), audio, still=still))
    stream, live = Stream(FakeAvatar(), level=speech_level(audio), still=still), []
    for begin in range(0, len(audio), chunk):
        stream.push(audio[begin : begin + chunk])
        live += stream.motion()
    stream.flush()
    live += stream.motion()
    assert [t for t, _ in live] == [t for t, _ in offline]
    for (_, a), (_, b) in zip(live, offline):
        assert all(torch.equal(a.tensors()[k], v) for k, v in b.tensors().items())


def embedded_speech() -> SpeechModels:
    from hicode.errors import AssetError
    from hicode.training.adaptation import load_generic

    try:
        create_encoder("embedded")
    except AssetError as error:
        pytest.skip(f"the embedded encoder's package cannot be had here: {error}")
    return load_generic()


@pytest.mark.parametrize("models", [speech_models, embedded_speech])
@pytest.mark.parametrize("rest", [True, False])
def test_the_stated_latency_is_the_measured_one(models, rest):
    """Sound is fed 2.5 ms at a time: the latest frame comes within the stated time after its own sound has ended, and just within it."""
    stream, step, late, frames = Stream(FakeAvatar(speech=models()), level=0.1, rest=rest), 40, [], 0
    for received in range(step, 24000, step):
        stream.push(np.full(step, 0.1, np.float32))
        for _ in stream.motion():
            frames += 1
            late.append(received - SAMPLES_PER_FRAME * frames)
    assert stream.latency_s * SAMPLE_RATE_HZ - step < max(late) <= stream.latency_s * SAMPLE_RATE_HZ


@pytest.mark.parametrize("samples", [1, 319, 640, 641, 1279, 1281, 12345])
def test_a_sound_of_any_length_gives_a_frame_for_every_40_ms(samples):
    audio = np.full(samples, 0.1, np.float32)
    assert len(list(synthesize(FakeAvatar(), audio))) == -(-samples // SAMPLES_PER_FRAME)


def test_frames_depend_on_the_sound():
    a, b = (np.stack(list(synthesize(FakeAvatar(), speechlike(1.0, seed)))) for seed in (1, 2))
    assert not np.array_equal(a, b)


def test_silence_shows_the_resting_mouth():
    avatar = FakeAvatar()
    audio = np.concatenate([speechlike(1.0), np.zeros(2 * SAMPLE_RATE_HZ, np.float32)])
    expression, landmarks = resting_mouth(avatar.driving, avatar)
    _, motion = list(synthesize_motion(avatar, audio))[-5]
    mouth = avatar.mouth_expression
    torch.testing.assert_close(motion.expression[0, mouth], expression[mouth])
    torch.testing.assert_close(motion.landmarks[0, 477], landmarks[477])


def test_the_driving_track_runs_back_and_forth_from_the_start_asked_for():
    frames = [t for t, _ in synthesize_motion(FakeAvatar(), speechlike(2.4), start=5)]
    assert frames == bounce(DRIVING, 5, 60).tolist()
    assert np.abs(np.diff(frames)).max() == 1


def test_head_pose_is_the_driving_frames_own():
    avatar = FakeAvatar()
    for t, motion in synthesize_motion(avatar, speechlike(1.5)):
        assert torch.equal(motion.T_camera_head[0], avatar.driving.T_camera_head[t])


def test_frames_not_asked_for_are_not_lost_and_not_rendered():
    avatar = FakeAvatar()
    stream = Stream(avatar)
    stream.push(speechlike(1.0))
    assert avatar.rendered == 0
    assert len(list(stream.flush())) == 25 == avatar.rendered


def test_memory_does_not_grow_with_the_sound():
    """Three minutes against one, the sound made on the way. Faceformers are left out, for time: `DecoderState` keeps a window (test_faceformer)."""

    class Speechless:
        """Two features in, one frame of rest out."""

        encoder, look_ahead = "logmel", 0

        def stream(self):
            return self

        def push(self, features):
            return torch.zeros(len(features) // 2, 64), torch.zeros(len(features) // 2, 478, 3)

    stream, second, kept = (
        Stream(FakeAvatar(speech=Speechless()), still=True, encoder=create_encoder("logmel")),
        speechlike(1.0),
        [],
    )
    tracemalloc.start()
    try:
        for s in range(180):
            stream.push(second)
            assert 20 <= sum(1 for _ in stream.motion()) <= 26
            if s in (59, 179):
                kept.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # A frame's motion is 12 kB, a second's sound 64 kB: anything kept of each of 3000 frames shows. NumPy's own pools of small arrays fill up meanwhile.
    assert kept[1] - kept[0] < 300_000


def test_waiting_motion_stays_bounded():
    """A long sound is handed over a little at a time: only that much motion, and what is being rendered, waits."""
    stream, most = Stream(FakeAvatar(), level=0.1), 0
    for i, _ in enumerate(_drained(stream, [speechlike(30)])):
        most = max(most, len(stream._motions))
    # At the sound's end, the encoder's and the Faceformers' look-ahead comes at once.
    assert i == 749 and most <= stream.ahead + READ_AHEAD / SAMPLES_PER_FRAME + round(25 * stream.latency_s)


def test_frames_are_rendered_on_as_many_threads_as_torch_uses_and_come_in_order():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        avatar = FakeAvatar()
        three = list(synthesize(avatar, speechlike(1.0)))
        assert torch.get_num_threads() == 3 and 1 < len({thread for _, thread in avatar.shown}) <= 3
        torch.set_num_threads(1)
        one = list(synthesize(FakeAvatar(), speechlike(1.0)))
    finally:
        torch.set_num_threads(threads)
    assert len(one) == 25 and all(np.array_equal(a, b) for a, b in zip(one, three, strict=True))


def test_a_frame_that_fails_raises_where_it_is_asked_for_and_no_thread_stays():
    class Failing(FakeAvatar):
        def driving_frame(self, t):
            if t == 5:
                raise ValueError("frame 5 is damaged")
            return super().driving_frame(t)

    before = threading.active_count()
    frames = synthesize(Failing(), speechlike(1.0))
    assert len([next(frames) for _ in range(5)]) == 5
    with pytest.raises(ValueError, match="frame 5"):
        next(frames)
    del frames
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_pixels_outside_the_dilated_mask_are_the_driving_frames():
    avatar = FakeAvatar()
    outside = dilate_mask(avatar.driving_mask(0)) == 0
    for i, frame in enumerate(synthesize(avatar, speechlike(0.5))):
        assert np.array_equal(frame[outside], avatar.driving_frame(i)[outside])


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros(0, np.float32), "empty"),
        (np.array([0.1, np.nan, 0.2], np.float32), r"1 samples that are not numbers \(first at 1\)"),
        (np.full((100, 2), 0.1, np.float32), "one channel"),
    ],
)
def test_unusable_sound_is_refused_with_its_reason(audio, message):
    with pytest.raises(InputError, match=message):
        list(synthesize(FakeAvatar(), audio))


def test_a_stream_refuses_nan_and_goes_on():
    stream = Stream(FakeAvatar())
    with pytest.raises(InputError, match="not numbers"):
        stream.push(np.array([np.inf], np.float32))
    assert len(list(stream.push(speechlike(1.0)))) + len(list(stream.flush())) == 25


def test_an_avatar_without_speech_says_so():
    with pytest.raises(InputError, match="no speech models"):
        Stream(FakeAvatar(speech=None))


def test_another_encoder_than_the_avatars_is_refused():
    with pytest.raises(InputError, match="logmel encoder, not other"):
        Stream(FakeAvatar(), encoder=SimpleNamespace(name="other"))


def bad_sounds() -> dict[str, tuple[np.ndarray, int, str]]:
    """name: (samples "n" or "n c", rate, WAV subtype) of sound as bad microphones and wrong exports make it."""
    voice = speechlike(0.6)
    wide = np.repeat(voice, 6)
    quiet = np.zeros_like(voice)
    return {
        "clipped": ((20 * voice).clip(-1, 1), 16000, "PCM_16"),
        "with an offset": (0.5 + voice, 16000, "FLOAT"),
        "an offset alone": (np.full(9600, 0.5, np.float32), 16000, "FLOAT"),
        "of 8 kHz": (voice[::2], 8000, "PCM_16"),
        "of 96 kHz": (wide, 96000, "PCM_24"),
        "of 6 channels": (np.stack([quiet, quiet, voice, quiet, quiet, quiet], 1), 16000, "PCM_16"),
        "with a dead channel": (np.stack([quiet, voice], 1), 16000, "PCM_16"),
        "with a channel turned round": (np.stack([voice, -voice], 1), 16000, "PCM_16"),
        "beyond full scale": (300 * voice, 16000, "FLOAT"),
        "in numbers of 16 bits": (32768 * voice, 16000, "FLOAT"),
        "of one sample": (voice[1000:1001], 16000, "FLOAT"),
        "of a hundred samples": (voice[1000:1100], 16000, "PCM_32"),
        "of unsigned bytes": (voice, 16000, "PCM_U8"),
    }


@pytest.mark.parametrize("name", bad_sounds())
def test_bad_sound_is_spoken_or_refused_in_one_line(tmp_path, name):
    import soundfile

    samples, rate, subtype = bad_sounds()[name]
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype=subtype)
    avatar = FakeAvatar()
    if name in ("an offset alone", "of one sample"):  # which is nothing but an offset
        with pytest.raises(InputError, match="bad.wav is silent.*Give a file with speech") as caught:
            speak(avatar, tmp_path / "bad.wav", tmp_path / "out.mp4", progress=False)
        assert "\n" not in str(caught.value)
        return
    spoken = speak(avatar, tmp_path / "bad.wav", tmp_path / "out.mp4", progress=False)
    assert spoken.frames == -(-len(samples) * 16000 // rate // 640) and len(avatar.shown) == spoken.frames
    assert all(m.expression.isfinite().all() and m.landmarks.isfinite().all() for m, _ in avatar.shown)


@pytest.mark.parametrize(
    "name",
    ["with an offset", "with a dead channel", "with a channel turned round", "beyond full scale", "of 6 channels"],
)
def test_bad_sound_moves_the_mouth_as_good_sound_does(tmp_path, name):
    import soundfile

    from hicode.media.audio import read_audio

    samples, rate, subtype = bad_sounds()[name]
    soundfile.write(tmp_path / "bad.wav", samples, rate, subtype=subtype)
    bad, good = (
        expressions(synthesize_motion(FakeAvatar(), sound))
        for sound in (read_audio(tmp_path / "bad.wav"), speechlike(0.6))
    )
    # A few parts in a thousand: 16-bit samples, and the high-pass's beginning.
    torch.testing.assert_close(bad, good, atol=0.03, rtol=0)
    assert good.std(0).max() > 0.3  # there is something to compare


def expressions(motions) -> torch.Tensor:
    return torch.cat([motion.expression for _, motion in motions])


def test_silence_of_any_kind_is_a_still_closed_mouth():
    """Digital silence, an offset, and a converter's last bit, as samples; a file of them is refused."""
    rest, _ = resting_mouth(FakeAvatar().driving, FakeAvatar())
    bit = np.random.default_rng(0).choice([0, 1 / 32768], 16000).astype(np.float32)
    for sound in (np.zeros(16000, np.float32), np.full(16000, 0.5, np.float32), bit):
        spoken = expressions(synthesize_motion(FakeAvatar(), sound))[:, FakeAvatar().mouth_expression]
        torch.testing.assert_close(spoken, rest[FakeAvatar().mouth_expression].expand_as(spoken))


@pytest.mark.parametrize("db", [-40, -26, -6])
def test_loudness_does_not_change_the_motion(db):
    """Offline from the first frame on; live once the level is known, after four seconds of speech."""
    speech = speechlike(6.0)
    speech /= speech_level(speech)
    usual = expressions(synthesize_motion(FakeAvatar(), 0.05 * speech))
    loud = np.float32(10 ** (db / 20)) * speech
    # Log-mel energies have a floor, 80 dB down: of these sounds no frame comes near it but between the syllables.
    torch.testing.assert_close(expressions(synthesize_motion(FakeAvatar(), loud)), usual, atol=0.02, rtol=0)
    stream = Stream(FakeAvatar())
    stream.push(loud)
    stream.flush()
    live = expressions(stream.motion())
    assert (live - usual)[100:].abs().mean() < 0.15 * (usual - usual.mean(0)).abs().mean()


# --- video -------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def wav(tmp_path):
    from hicode.media.audio import write_audio

    path = tmp_path / "speech.wav"
    write_audio(path, speechlike(1.3), SAMPLE_RATE_HZ)
    return path


def test_speak_writes_a_video_with_its_sound(tmp_path, wav):
    from hicode.media.audio import read_audio
    from hicode.media.video import probe, read_video

    out = tmp_path / "out.mp4"
    spoken = speak(FakeAvatar(), wav, out, progress=False)
    frames = list(read_video(out))
    info = probe(out)
    assert (info.width, info.height, info.codec) == (SIZE, SIZE, "h264") and info.fps == 25
    assert spoken.frames == len(frames) == 33 and spoken.parts.frames == 33
    original, sound = read_audio(wav), read_audio(out)
    assert abs(len(sound) - len(original)) <= 1024 + SAMPLES_PER_FRAME  # an AAC packet of padding
    n = min(len(sound), len(original))
    correlation = np.correlate(sound[:n] ** 2, np.pad(original[:n] ** 2, 640), "valid")
    assert abs(int(correlation.argmax()) - 640) <= SAMPLES_PER_FRAME  # in sync to one frame
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "speech.wav"]  # no temporary file stays


def test_speak_takes_samples_and_other_rates_and_channels(tmp_path):
    import soundfile

    stereo = tmp_path / "stereo.flac"
    soundfile.write(stereo, np.stack([np.repeat(speechlike(0.5), 3)] * 2, 1), 3 * SAMPLE_RATE_HZ)
    assert speak(FakeAvatar(), stereo, tmp_path / "a.mp4", progress=False).frames == 13
    assert speak(FakeAvatar(), speechlike(0.5), tmp_path / "b.mp4", progress=False).frames == 13
    assert speak(FakeAvatar(), np.float32([0.5, -0.5]), tmp_path / "c.mp4", progress=False).frames == 1


@pytest.mark.parametrize(
    "audio, out, error, message",
    [
        ("missing.wav", "out.mp4", InputError, "does not exist"),
        ("silent.wav", "out.mp4", InputError, "silent"),
        ("empty.wav", "out.mp4", InputError, "no sound at all"),
        ("text.wav", "out.mp4", InputError, "text.wav"),
        ("speech.wav", "out.avi", OutputError, "does not end in .mp4"),
        ("speech.wav", ".", OutputError, "does not end in .mp4"),
        ("speech.wav", "file.txt/out.mp4", OutputError, "Cannot write"),
        ("own.mp4", "own.mp4", OutputError, "also the input"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, wav, audio, out, error, message):
    from hicode.media.audio import write_audio

    write_audio(tmp_path / "silent.wav", np.zeros(16000, np.float32), 16000)
    write_audio(tmp_path / "empty.wav", np.zeros(0, np.float32), 16000)
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "file.txt").write_text("in the way")
    (tmp_path / "own.mp4").write_bytes(wav.read_bytes())
    before = {p.name for p in tmp_path.iterdir()}
    avatar = FakeAvatar()
    with pytest.raises(error, match=message) as caught:
        speak(avatar, tmp_path / audio, tmp_path / out, progress=False)
    assert "\n" not in str(caught.value) and isinstance(caught.value, HicodeError)
    assert {p.name for p in tmp_path.iterdir()} == before and avatar.rendered == 0


def test_an_avatar_that_is_none_is_refused(tmp_path, wav):
    with pytest.raises(FileFormatError):
        speak(wav, wav, tmp_path / "out.mp4", progress=False)


def test_an_interrupted_video_leaves_nothing(tmp_path, wav):
    class Failing(FakeAvatar):
        def driving_frame(self, t):
            if t == 9:
                raise KeyboardInterrupt
            return super().driving_frame(t)

    with pytest.raises(KeyboardInterrupt):
        speak(Failing(), wav, tmp_path / "out.mp4", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["speech.wav"]


# --- original size -----------------------------------------------------------------------------------------------------------------------


def source_video(path, count=30, width=160, height=120):
    from hicode.media.video import VideoWriter

    with VideoWriter(path, width, height, crf=1) as video:
        for t in range(count):
            video.write(np.full((height, width, 3), 100 + 3 * t, np.uint8))


@pytest.mark.parametrize("side", [SIZE, 100, 40])
def test_original_size_pastes_the_head_into_the_sources_frames(tmp_path, wav, side):
    from hicode.media.video import probe, read_video

    source_video(tmp_path / "source.mp4")
    avatar = FakeAvatar(source={"path": str(tmp_path / "source.mp4"), "crop_box": [30, 10, side]})
    spoken = speak(avatar, wav, tmp_path / "out.mp4", original_size=True, progress=False)
    info = probe(tmp_path / "out.mp4")
    assert (info.width, info.height) == (160, 120) and spoken.frames == 33
    scale = side / SIZE
    head = (30 + round(32 * scale), 10 + round(30 * scale))
    heads = []
    for i, (frame, t) in enumerate(zip(read_video(tmp_path / "out.mp4"), bounce(DRIVING, 0, 33))):
        # H.264 on flat grey is off by a level or two; a frame's grey differs from its neighbours' by three.
        assert abs(int(frame[5, 5, 0]) - (100 + 3 * t)) <= 2 and abs(int(frame[110, 150, 1]) - (100 + 3 * t)) <= 2, i
        heads.append(np.abs(frame[head[1], head[0]].astype(int) - (100 + 3 * t)).max())
    # The head's colour may pass through its surroundings' for a frame or two.
    assert np.median(heads) > 4


def test_original_size_takes_no_more_of_the_crop_than_what_is_new_in_it(tmp_path, wav):
    from hicode.media.video import read_video

    source_video(tmp_path / "source.mp4")
    greys = {}
    for region in ("face", "head"):
        avatar = FakeAvatar(source={"path": str(tmp_path / "source.mp4"), "crop_box": [30, 10, 100]})
        speak(avatar, wav, tmp_path / "out.mp4", original_size=True, region=region, progress=False)
        frames = zip(read_video(tmp_path / "out.mp4"), bounce(DRIVING, 0, 33))
        greys[region] = np.array(
            [int(frame[10 + round(1.5625 * 18), 30 + round(1.5625 * 32), 0]) - (100 + 3 * t) for frame, t in frames]
        )  # above the face, on the head
    assert np.abs(greys["face"]).max() <= 3, "the crop's hair is the source's, resized: it must not be pasted"
    assert np.median(np.abs(greys["head"])) > 4


def test_original_size_needs_the_source(tmp_path, wav):
    gone = FakeAvatar(source={"path": str(tmp_path / "gone.mp4"), "crop_box": [0, 0, 64]})
    with pytest.raises(InputError, match="is gone. Name its new place"):
        speak(gone, wav, tmp_path / "out.mp4", original_size=True, progress=False)
    with pytest.raises(InputError, match="does not say where that is"):
        speak(FakeAvatar(), wav, tmp_path / "out.mp4", original_size=True, progress=False)


def test_a_source_that_is_another_video_is_refused(tmp_path, wav):
    source_video(tmp_path / "small.mp4", width=64, height=48)
    avatar = FakeAvatar(source={"path": str(tmp_path / "gone.mp4"), "crop_box": [30, 10, 100]})
    with pytest.raises(InputError, match="is 64x48, too small"):
        speak(
            avatar, wav, tmp_path / "out.mp4", original_size=True, source_video=tmp_path / "small.mp4", progress=False
        )
    source_video(tmp_path / "short.mp4", count=5)
    with pytest.raises(InputError, match="ends before driving frame 5"):
        speak(
            avatar, wav, tmp_path / "out.mp4", original_size=True, source_video=tmp_path / "short.mp4", progress=False
        )
    assert not (tmp_path / "out.mp4").exists()


def test_a_held_frames_head_moves_before_its_mask_and_a_played_one_has_its_outline():
    for still in (False, True):
        avatar = FakeAvatar()
        for _ in synthesize(avatar, speechlike(0.5), still=still):
            pass
        assert avatar.followed and set(avatar.followed) == {not still}


def test_only_the_face_goes_into_a_played_frame_the_whole_head_where_wanted():
    sound, top = speechlike(0.4), np.s_[17:21, 28:36]  # of the head, above the face that `face_mask` has
    frame = FakeAvatar().driving_frame(0)
    face, head, still = (
        next(synthesize(FakeAvatar(), sound, **options))
        for options in ({}, {"region": "head"}, {"still": True, "start": 0, "region": "face"})
    )
    assert np.array_equal(face[top], frame[top]) and not np.array_equal(face[30:40, 28:36], frame[30:40, 28:36])
    assert (head[top] != frame[top]).any(-1).all()
    assert (still[top] != frame[top]).any(-1).all()  # its head moves in the frame
    with pytest.raises(InputError, match="Choose face or head"):
        Stream(FakeAvatar(), region="hair")


def test_grain_goes_by_the_frame_and_stands_still_with_a_held_one():
    """The fake writes the index that grain goes by into a pixel."""
    played = [int(frame[30, 32, 0]) for frame in synthesize(FakeAvatar(), speechlike(0.5))]
    assert played == list(range(len(played))) and len(played) > 10
    held = [int(frame[30, 32, 0]) for frame in synthesize(FakeAvatar(), speechlike(0.5), still=True, start=2)]
    assert set(held) == {0}
