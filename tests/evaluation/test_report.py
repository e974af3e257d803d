"""The report, on a tiny drawn clip with avatars whose faults are known: rows, control, driving modes, JSON, page."""

import json
import re
from dataclasses import replace
from io import StringIO

import cv2
import numpy as np
import pytest
import torch

from hicode import assets
from hicode.avatar.blend import hidden_mask
from hicode.camera import Camera
from hicode.errors import InputError, OutputError
from hicode.evaluation import report as report_module
from hicode.evaluation.images import mean_of_frames, psnr
from hicode.evaluation.page import chart, difference_map
from hicode.evaluation.report import ROWS, evaluate
from hicode.evaluation.rows import without_gaps
from hicode.evaluation.show import mouth_windows, print_table, worst_first
from hicode.files import save_tensors, write_json
from hicode.media.audio import write_audio
from hicode.motion import LIPS, N_LANDMARKS, FaceTrack, Motion
from hicode.preparation.clip import SCHEMA, VERSION, Clip, save_track, write_png
from hicode.speech.encoders import create_encoder, default_spec

pytestmark = pytest.mark.skipif(
    not assets.is_cached("perceptual"),
    reason="the asset `perceptual` is not in the cache: `hicode assets pull perceptual`",
)

ENCODER = replace(default_spec("embedded"), dim=3)  # small features
SIZE, FRAMES, TRAIN = 72, 20, 12


def drawn(t: int) -> np.ndarray:
    """A head that sways over a grating, with a mouth that opens."""
    y, x = np.mgrid[:SIZE, :SIZE]
    image = np.stack([90 + 60 * np.sin(x / (5 + c)) * np.cos(y / 6) for c in range(3)], -1)
    cx = SIZE / 2 + 4 * np.sin(t / 3)
    image[head(t) >= 128] = (200, 150, 120)
    image[np.hypot((x - cx) / 8, (y - 48) / (2 + 3 * abs(np.sin(t)))) < 1] = (90, 20, 30)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def head(t: int) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE]
    return (255 * (np.hypot((x - SIZE / 2 - 4 * np.sin(t / 3)) / 18, (y - 38) / 24) < 1)).astype(np.uint8)


def landmarks_px(t: int) -> np.ndarray:
    """Where the points are: the lips on the drawn mouth."""
    rng = np.random.default_rng(5)
    points = rng.uniform(24, 48, (N_LANDMARKS, 2)) + [4 * np.sin(t / 3), 0]
    points[33], points[263] = [SIZE / 2 - 10, 30], [SIZE / 2 + 10, 30]
    angle = np.linspace(0, 2 * np.pi, len(LIPS), endpoint=False)
    points[LIPS] = np.stack(
        [SIZE / 2 + 4 * np.sin(t / 3) + 8 * np.cos(angle), 48 + (2 + 3 * abs(np.sin(t))) * np.sin(angle)], 1
    )
    return points


def write_clip(path, sound=True, test=None, sha256="abc"):
    for kind in ("frames", "masks/head", "masks/person"):
        (path / kind).mkdir(parents=True)
    for t in range(FRAMES):
        write_png(path / "frames" / f"{t:06d}.png", drawn(t))
        for kind in ("head", "person"):
            write_png(path / "masks" / kind / f"{t:06d}.png", head(t))
    g = torch.Generator().manual_seed(0)
    poses = torch.eye(4).repeat(FRAMES, 1, 1)
    poses[:, 2, 3] = torch.arange(FRAMES) + 10.0
    motion = Motion(torch.rand(FRAMES, 64, generator=g), torch.rand(FRAMES, 478, 3, generator=g), poses)
    points = torch.from_numpy(np.stack([landmarks_px(t) for t in range(FRAMES)])).float()
    save_track(
        path / "track.safetensors",
        FaceTrack(motion, torch.rand(80, generator=g), Camera.pinhole(100.0, SIZE, SIZE), points, torch.ones(FRAMES)),
    )
    if sound:
        write_audio(path / "audio.wav", 0.3 * np.sin(np.arange(640 * FRAMES) / 9).astype(np.float32), 16000)
        features = torch.arange(2 * FRAMES)[:, None].repeat(1, 3).float()
        config = {"encoder": ENCODER.to_json(), "offset_frames": 0.0}
        save_tensors(path / "audio.embedded.safetensors", {"features": features}, "hicode-speech-features", 2, config)
    write_json(
        path / "clip.json",
        {
            "schema": SCHEMA, "version": VERSION, "complete": True, "fps": 25.0, "frame_count": FRAMES,
            "width": SIZE, "height": SIZE,
            "train": [0, TRAIN], "test": test or [TRAIN, FRAMES],
            "source": {"name": "drawn.mp4", "path": "/drawn.mp4", "sha256": sha256}, "crop_box": [0, 0, SIZE], "start_s": 0.0,
            "audio_offset_frames": 0.0, "has_audio": sound, "report": {}, "steps": {"fit": {"seconds": 2.5}}, "video": "drawn.mp4",
            "encoder": ENCODER.to_json(),
        },
    )  # fmt: skip
    return Clip.open(path)


class FakeSpeech:
    encoder = ENCODER

    def encoder_for(self):
        return create_encoder(self.encoder.name)

    def __init__(self):
        self.heard = None

    def predict(self, features):
        self.heard = features
        t = len(features) // 2
        return torch.full((t, 64), 7.0), torch.full((t, 478, 3), 7.0)


class FakeAvatar:
    """Gives the true frame with `fault` (image, t → image) done to it; keeps the motion it was driven by."""

    def __init__(self, clip, fault=lambda image, t: image, speech=True):
        self.fault, self.motions = fault, []
        self.own, self.asked = [], []  # what was said of the frames' own motion
        self.remembered = []  # training frames asked for, and their own motion where it was said
        self.speech = FakeSpeech() if speech else None
        self.driving = clip.track.motion[: len(clip.train)]
        self.background_plate, self.audio_driven, self.film_grain = (
            np.zeros((clip.height, clip.width, 3), np.uint8),
            False,
            None,
        )
        self.mouth_expression = torch.arange(64) < 10
        self.mouth_landmark_weight = (torch.arange(478) < 100).float()
        self.info = {"preset": "draft", "seconds": {"speech": 1.0, "head": 20.0}, "peak_memory_mb": 321}
        self.source = {"sha256": "abc"}

    def face_mask(self, motion, t, head_mask, frame_motion, frame_t):
        self.asked.append((motion, t, frame_motion, frame_t))
        return np.where(np.arange(head_mask.shape[0])[:, None] >= 40, head_mask, 0).astype(np.uint8)

    def synthesize_frame(self, motion, t, frame, head_mask, own=None):
        if motion is self.driving:
            self.remembered.append((t, own))
            return self.fault(frame.copy(), t)
        self.own.append(own)
        if not any(motion is m for m in self.motions):
            self.motions.append(motion)
        return self.fault(frame.copy(), t)


def darker(image, t):
    image[20:60, 24:48] = image[20:60, 24:48] * (0.9 - 0.05 * t)
    return image


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("drawn") / "drawn.clip")


@pytest.fixture(autouse=True)
def seeing(monkeypatch):
    """A detector for drawings, who finds the head by its swaying; and no clock for the encoder."""

    def detect(frames, landmarker):
        out = []
        for frame in frames:
            best = min(range(FRAMES), key=lambda t: np.abs(drawn(t).astype(int) - frame).mean())
            points = np.zeros((N_LANDMARKS, 3), np.float32)
            points[:, :2] = landmarks_px(best)
            out.append(points)
        return np.stack(out)

    monkeypatch.setattr(report_module, "detect", detect)
    monkeypatch.setattr(report_module._Work, "landmarker", None)
    monkeypatch.setattr(report_module._Work, "_encoding_seconds", lambda self, name, heard: 0.001)


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_holds_what_is_promised(clip, tmp_path):
    out = evaluate(FakeAvatar(clip, darker), clip, json=tmp_path / "r.json", progress=False)
    assert strict((tmp_path / "r.json").read_text()) == json.loads(json.dumps(out))
    for name in ROWS:
        for region in ("frame", "head", "mouth"):
            assert {"psnr", "ssim", "lpips"} <= set(out[name][region])
        assert {
            "lmd_px",
            "lmd_norm",
            "sync_offset_frames",
            "sync_margin",
            "jitter_px",
            "seam",
            "motion_in_silence",
            "closure",
        } <= set(out[name])
    assert out["seconds"] == {"prepare": 2.5, "speech": 1.0, "head": 20.0}
    assert out["fps"] > 0 and out["peak_memory_mb"] == 321
    assert out["split"]["test"] == [TRAIN, FRAMES] and "MediaPipe" in out["detector"]
    assert {"commit", "machine", "version", "clip", "avatar"} <= set(out["provenance"])


def test_the_truth_is_perfect_and_its_psnr_has_no_number(clip):
    row = evaluate(FakeAvatar(clip), clip, progress=False)["ground_truth"]
    for region in ("frame", "head", "mouth"):
        assert row[region] == {"psnr": None, "ssim": 1.0, "lpips": 0.0}
    assert row["lmd_px"] == 0 and row["missed_faces"] == 0


def test_an_avatar_that_returns_the_frame_scores_as_the_truth(clip):
    out = evaluate(FakeAvatar(clip), clip, progress=False)
    for region in ("frame", "head", "mouth"):
        assert out["tracked"][region]["psnr"] is None
        assert out["tracked"][region]["ssim"] == pytest.approx(1)
        assert out["tracked"][region]["lpips"] == pytest.approx(0, abs=1e-6)


def test_figures_are_means_over_the_test_frames(clip):
    out = evaluate(FakeAvatar(clip, darker), clip, modes=("tracked",), progress=False)
    by_hand = mean_of_frames([psnr(darker(drawn(t), i), drawn(t)) for i, t in enumerate(clip.test)])
    assert out["tracked"]["frame"]["psnr"] == pytest.approx(by_hand, abs=1e-5)
    assert out["audio"] is None


def test_the_control_is_the_mean_training_head_on_the_true_frame(clip):
    out = evaluate(FakeAvatar(clip, darker), clip, modes=("tracked",), progress=False)
    mean = (np.mean([drawn(t).astype(float) for t in clip.train], 0) + 0.5).astype(np.uint8)
    values = [psnr(np.where(hidden_mask(head(t))[..., None] > 0, mean, drawn(t)), drawn(t)) for t in clip.test]
    assert out["control"]["frame"]["psnr"] == pytest.approx(mean_of_frames(values), abs=1e-5)
    assert out["over_control"]["tracked"]["frame"] == pytest.approx(
        out["tracked"]["frame"]["psnr"] - out["control"]["frame"]["psnr"], abs=1e-5
    )


def test_the_face_alone_is_measured_where_asked_for_and_the_report_says_so(clip):
    avatar = FakeAvatar(clip, darker)
    out = evaluate(avatar, clip, progress=False, region="face")
    assert out["region"] == "face" and any("Only the face is rendered" in note for note in out["notes"])
    tracked = avatar.motions[0]
    assert avatar.own and all(
        own is tracked for own in avatar.own
    )  # the audio row's faces go where the frames' own were, too
    part = lambda t: np.where(np.arange(SIZE)[:, None] >= 40, head(t), 0).astype(np.uint8)
    mean = (np.mean([drawn(t).astype(float) for t in clip.train], 0) + 0.5).astype(np.uint8)
    values = [psnr(np.where(hidden_mask(part(t))[..., None] > 0, mean, drawn(t)), drawn(t)) for t in clip.test]
    assert out["control"]["frame"]["psnr"] == pytest.approx(mean_of_frames(values), abs=1e-5)
    whole = evaluate(other := FakeAvatar(clip, darker), clip, progress=False)
    assert whole["region"] == "head" and set(other.own) == {None} and not other.asked
    assert whole["control"]["frame"]["psnr"] < out["control"]["frame"]["psnr"]


def test_no_test_frame_enters_the_control(clip, tmp_path):
    other = write_clip(tmp_path / "other.clip")
    for t in other.test:
        write_png(other.path / "frames" / f"{t:06d}.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    means = [report_module._Work(FakeAvatar(c), c).mean_frame for c in (clip, Clip.open(other.path))]
    assert np.array_equal(*means)


def test_what_the_avatar_remembers_of_its_training_frames_stands_apart(clip, capsys):
    avatar = FakeAvatar(clip, darker)
    out = evaluate(avatar, clip, modes=("tracked",), region="face")["training_frames"]
    assert out["frames"] == TRAIN and avatar.remembered == [(t, avatar.driving) for t in range(TRAIN)]
    by_hand = np.mean([psnr(darker(clip.image(t), t), clip.image(t)) for t in range(TRAIN)])
    assert out["frame"]["psnr"] == pytest.approx(by_hand, abs=1e-6)
    assert f"frame {out['frame']['psnr']:.2f} dB, head" in " ".join(capsys.readouterr().out.split())
    avatar.source = {"sha256": "another"}
    assert evaluate(avatar, clip, modes=("tracked",), progress=False)["training_frames"] is None


def test_tracked_is_the_test_track_and_audio_replaces_the_mouth_alone(clip):
    avatar = FakeAvatar(clip)
    evaluate(avatar, clip, progress=False)
    tracked, audio = avatar.motions
    wanted = clip.track.motion[TRAIN:FRAMES]
    assert torch.equal(tracked.expression, wanted.expression) and torch.equal(tracked.landmarks, wanted.landmarks)
    assert torch.equal(audio.T_camera_head, wanted.T_camera_head)
    assert torch.equal(audio.expression[:, 10:], wanted.expression[:, 10:]) and torch.equal(
        audio.landmarks[:, 100:], wanted.landmarks[:, 100:]
    )
    # a tone is speech to the gate: after its attack the mouth is the prediction's
    assert (audio.expression[-1, :10] - 7).abs().max() < 1e-5 and (audio.landmarks[-1, :100] - 7).abs().max() < 1e-5


def test_speech_hears_the_test_part_alone(clip):
    avatar = FakeAvatar(clip)
    evaluate(avatar, clip, progress=False)
    assert torch.equal(avatar.speech.heard[:, 0], torch.arange(2 * TRAIN, 2 * FRAMES).float())


def test_no_true_test_mouth_reaches_the_audio_row(clip, tmp_path):
    """Another mouth in the test track, same sound: the audio row's mouth does not change."""
    motion = clip.track.motion
    changed = replace(motion, expression=motion.expression.clone(), landmarks=motion.landmarks.clone())
    changed.expression[TRAIN:, :10], changed.landmarks[TRAIN:, :100] = 0.5, 0.5
    other = write_clip(tmp_path / "other.clip")
    save_track(other.path / "track.safetensors", replace(clip.track, motion=changed))
    avatars = []
    for c in (clip, Clip.open(other.path)):
        avatar = FakeAvatar(clip)
        evaluate(avatar, c, modes=("audio",), progress=False)
        avatars.append(avatar)
    (a,), (b,) = (avatar.motions for avatar in avatars)
    assert torch.equal(a.expression, b.expression) and torch.equal(a.landmarks, b.landmarks)


@pytest.mark.parametrize("silent", ["clip", "avatar"])
def test_without_sound_or_speech_models_there_is_no_audio_row_and_a_note(clip, tmp_path, silent):
    other = write_clip(tmp_path / "silent.clip", sound=silent != "clip")
    out = evaluate(
        FakeAvatar(other, darker, speech=silent != "avatar"),
        other,
        json=tmp_path / "r.json",
        html=tmp_path / "r.html",
        progress=False,
    )
    assert out["audio"] is None and out["tracked"] is not None
    assert any(note.startswith("No audio row") for note in out["notes"])
    assert out["timing"]["fps_is"] == "motion to final frame"


def test_short_test_parts_have_no_sync_figure_and_say_so(clip):
    out = evaluate(FakeAvatar(clip), clip, modes=("tracked",), progress=False)
    assert out["tracked"]["sync_margin"] is None and "at least 50" in out["not_measured"]["sync"]


def test_what_is_not_measured_says_why(clip):
    out = evaluate(FakeAvatar(clip), clip, modes=("tracked",), progress=False)
    why = out["not_measured"]
    assert "--syncnet" in why["AVConf"] and "--alignment" in why["closure"] and "silent" in why["motion in silence"]
    assert all("avconf" not in out[name] for name in ("ground_truth", "control", "tracked"))
    assert "avconf" not in out["definitions"]


def test_with_weights_a_part_too_short_for_avconf_says_so(clip, tmp_path):
    from hicode.evaluation.syncnet import SyncNet

    torch.save(SyncNet().state_dict(), tmp_path / "syncnet_v2.model")
    out = evaluate(FakeAvatar(clip), clip, modes=("tracked",), progress=False, syncnet=tmp_path / "syncnet_v2.model")
    assert out["tracked"]["avconf"] is None and "at least 36" in out["not_measured"]["AVConf of tracked"]
    assert set(out["provenance"]["assets"]) == {"face_landmarks", "face_detection", "perceptual", "syncnet_v2.model"}


def test_closure_is_counted_where_an_alignment_is_given(clip, tmp_path):
    """The lips of the drawing's landmarks never close, the detector here says where they are."""
    start = TRAIN / 25
    (tmp_path / "a.txt").write_text(
        f"0.0 0.1 B\n{start + 0.04:.2f} {start + 0.12:.2f} M\n{start + 0.2:.2f} {start + 0.24:.2f} P\n"
    )
    out = evaluate(FakeAvatar(clip), clip, modes=("tracked",), progress=False, alignment=tmp_path / "a.txt")
    assert out["ground_truth"]["closures_due"] == 2 and out["ground_truth"]["closure"] is not None
    assert out["tracked"]["closure"] == out["ground_truth"]["closure"]
    assert "closure" not in out["not_measured"]


def test_some_equal_frames_do_not_hide_the_mean(clip):
    """A frame equal to the truth has no finite PSNR: the mean is infinite, and a note gives that of the others."""
    out = evaluate(
        FakeAvatar(clip, lambda image, t: image if t < 3 else darker(image, t)),
        clip,
        modes=("tracked",),
        progress=False,
    )
    others = np.mean([psnr(darker(drawn(t), i), drawn(t)) for i, t in enumerate(clip.test) if i >= 3])
    assert out["tracked"]["frame"]["psnr"] is None
    assert any(
        "3 of 8 frames equal the truth in the frame" in note and f"{others:.2f} dB" in note for note in out["notes"]
    )


def test_frames_without_a_face_are_counted(clip, monkeypatch):
    seen, calls = report_module.detect, []

    def blind(frames, landmarker):
        calls.append(1)
        return (
            np.full((1, N_LANDMARKS, 3), np.nan) if len(calls) % 3 == 0 else seen(frames, landmarker)
        )  # every tracked frame of three rows

    monkeypatch.setattr(report_module, "detect", blind)
    out = evaluate(FakeAvatar(clip), clip, modes=("tracked",), progress=False)
    assert out["tracked"]["missed_faces"] == FRAMES - TRAIN and out["tracked"]["lmd_px"] is None
    assert out["control"]["missed_faces"] == 0
    assert any("tracked: no face found in 8 of 8" in note for note in out["notes"])


def test_gaps_are_interpolated_for_sync_and_half_blind_rows_are_not():
    points = np.arange(10, dtype=np.float32)[:, None, None].repeat(4, 1).repeat(3, 2)
    gap = points.copy()
    gap[4:6] = np.nan
    assert np.allclose(without_gaps(gap), points)
    gap[:5] = np.nan
    assert without_gaps(gap) is None


def test_the_page_is_whole_and_shows_the_worst_first(clip, tmp_path):
    evaluate(FakeAvatar(clip, darker), clip, html=tmp_path / "r.html", progress=False)
    text = (tmp_path / "r.html").read_text()
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert not re.findall(r"(?:src|href)=['\"](?!data:image/|#)", text) and "http" not in re.sub(
        r"data:image[^']*", "", text
    )
    assert text.count("<svg") == 6 and "<polygon" in text  # four measures, the openings, the waveform
    assert "<script" not in text and "ground truth" in text and "∞" in text
    shown = [int(t) for t in re.findall(r"<h3>Frame (\d+):", text)]
    assert shown[0] == FRAMES - 1  # `darker` grows with t
    assert shown[:5] == sorted(shown[:5], reverse=True)


def test_the_table_names_every_row(clip):
    from rich.console import Console

    out = evaluate(FakeAvatar(clip, darker), clip, progress=False)
    stream = StringIO()
    print_table(out, Console(file=stream, width=140))
    text = stream.getvalue()
    for word in (
        "ground truth",
        "control",
        "tracked",
        "audio",
        "over the control",
        "∞",
        "frames a second",
        "drawn.mp4: 8 unseen frames (12 … 19)",
    ):
        assert word in text, word


def test_another_videos_avatar_is_measured_with_a_warning(clip):
    avatar = FakeAvatar(clip)
    avatar.source = {"sha256": "other"}
    assert any("another video" in note for note in evaluate(avatar, clip, modes=("tracked",), progress=False)["notes"])


def test_what_cannot_be_measured_is_refused(clip, tmp_path):
    avatar = FakeAvatar(clip)
    avatar.background_plate = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="frames of 64x64, the clip has 72x72"):
        evaluate(avatar, clip, progress=False)
    with pytest.raises(InputError, match="no driving mode 'lips'"):
        evaluate(FakeAvatar(clip), clip, modes=("lips",), progress=False)
    with pytest.raises(InputError, match="no region 'hair'"):
        evaluate(FakeAvatar(clip), clip, region="hair", progress=False)
    with pytest.raises(OutputError, match="is a folder"):
        evaluate(FakeAvatar(clip), clip, json=tmp_path, progress=False)
    with pytest.raises(InputError, match="12 training and 0 test frames"):
        evaluate(FakeAvatar(clip), write_clip(tmp_path / "none.clip", test=[20, 20]), progress=False)


def test_curves_have_gaps_and_survive_having_nothing():
    assert chart([("a", "#000", [1.0, None, 2.0, 3.0], "")], 5).count("<polyline") == 2
    assert "Nothing was measured" in chart([("a", "#000", [None], "")], 5)
    assert "<polyline" in chart([("flat", "#000", [2.0, 2.0], "")], 0)


def test_a_difference_map_is_dark_where_images_agree():
    a = drawn(3)
    b = a.copy()
    b[10:20, 10:20] = 255 - b[10:20, 10:20]
    shown = difference_map(b, a).mean(2)
    assert shown[40:, 40:].max() < 5
    assert shown[12:18, 12:18].mean() > 60
    assert cv2.countNonZero((shown > 30).astype(np.uint8)) <= 100


def test_mouths_over_time_keep_their_scale():
    windows = mouth_windows([(10, 20, 30, 32), (60, 60, 70, 80), (0, 0, 8, 8)], 72, 90)
    assert {(x1 - x0, y1 - y0) for x0, y0, x1, y1 in windows} == {(20, 20)}
    assert all(0 <= x0 and x1 <= 72 and 0 <= y0 and y1 <= 90 for x0, y0, x1, y1 in windows)
    assert windows[0] == (10, 16, 30, 36)


def test_the_worst_come_first_and_unknown_frames_are_never_worst():
    nan, inf = float("nan"), float("inf")
    picked = worst_first([30.0, nan, 20.0, inf, 25.0, 40.0], 3, 2)
    assert [i for i, _ in picked] == [2, 4, 0, 5] and "worst 1" in picked[0][1] and picked[-1][1] == "evenly spread"
