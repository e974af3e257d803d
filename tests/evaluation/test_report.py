"""The report, on a tiny drawn clip with avatars whose faults are known: rows, control, sound, JSON, page."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import StringIO

import cv2
import numpy as np
import pytest
import torch

from helpers.fake_avatar import FakeAvatar, speech_models
from hicode import assets
from hicode.avatar.blend import face_room, hidden_mask
from hicode.avatar.driving import resting_mouth
from hicode.camera import Camera
from hicode.errors import InputError, OutputError
from hicode.evaluation import report as report_module
from hicode.evaluation import rows as rows_module
from hicode.evaluation.config import EvaluateConfig
from hicode.evaluation.gallery import mouth_windows
from hicode.evaluation.images import mean_of_frames, psnr
from hicode.evaluation.page import chart, difference_map
from hicode.evaluation.report import ROWS, evaluate, mean_training_frame
from hicode.evaluation.rows import without_gaps
from hicode.evaluation.show import print_table
from hicode.files import write_json
from hicode.media.audio import write_audio
from hicode.motion import LIPS, N_LANDMARKS, FaceTrack, Motion
from hicode.preparation.clip import SCHEMA, VERSION, Clip, save_track, write_png
from hicode.session.config import SpeakConfig
from hicode.session.speak import speak
from hicode.speech.encoders import default_spec
from hicode.trust.marks import MarkConfig

pytestmark = pytest.mark.skipif(
    not assets.is_cached("perceptual"),
    reason="the asset `perceptual` is not in the cache: `hicode assets pull perceptual`",
)

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
        noise = 0.1 * np.random.default_rng(3).standard_normal(640 * FRAMES)
        write_audio(path / "audio.wav", noise.astype(np.float32), 16000)
    write_json(
        path / "clip.json",
        {
            "schema": SCHEMA, "version": VERSION, "complete": True, "fps": 25.0, "frame_count": FRAMES,
            "width": SIZE, "height": SIZE,
            "train": [0, TRAIN], "test": test or [TRAIN, FRAMES],
            "source": {"name": "drawn.mp4", "path": "/drawn.mp4", "sha256": sha256}, "crop_box": [0, 0, SIZE],
            "start_s": 0.0,
            "audio_offset_frames": 0.0, "has_audio": sound, "report": {}, "encoder": default_spec("logmel").to_json(),
            "steps": {"fit": {"seconds": 2.5}}, "video": "drawn.mp4",
        },
    )  # fmt: skip
    return Clip.open(path)


@dataclass
class DrawnAvatar(FakeAvatar):
    """Gives the driving frame with `fault` (image, number, motion → image) done to it; speaks with real models."""

    fault: Callable = lambda image, number, motion: image
    info: dict = field(default_factory=dict)
    made: list = field(default_factory=list)  # (motion, whether the face alone was asked for) of each frame

    def face_mask(self, motion, t, room, frame_motion, frame_t):
        return face_part(np.where(room, 255, 0))

    def rasterize(self, deformed, pose, within=None):
        return Motion(deformed.expression[None], deformed.landmarks[None], pose[None])

    def compose(self, rendering, landmarks_px, frame, mask, index):
        top = mask.box[1] + mask.inside.any(1).argmax()  # of what composition may change
        self.made.append((rendering, top > 30))
        self.grains.append(self.film_grain)
        return self.fault(frame.copy(), index, rendering)


def avatar_of(clip, fault=lambda image, number, motion: image, speech=True) -> DrawnAvatar:
    return DrawnAvatar(
        speech=speech_models() if speech else None,
        driving=clip.track.motion[: len(clip.train)],
        background_plate=np.zeros((clip.height, clip.width, 3), np.uint8),
        source={"sha256": "abc"},
        fault=fault,
        info={"preset": "draft", "seconds": {"speech": 1.0, "head": 20.0}, "peak_memory_mb": 321},
    )


def face_part(head_mask):
    return np.where(np.arange(head_mask.shape[0])[:, None] >= 40, head_mask, 0).astype(np.uint8)


def tracked_only(**options) -> EvaluateConfig:
    return EvaluateConfig(modes=("tracked",), **options)


def darker(image, number, motion=None):
    image[20:60, 24:48] = image[20:60, 24:48] * (0.9 - 0.05 * number)
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

    monkeypatch.setattr(rows_module, "detect", detect)
    monkeypatch.setattr(report_module, "FaceLandmarker", lambda: None)
    monkeypatch.setattr(report_module, "SPEED_FRAMES", 6)


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_holds_what_is_promised(clip, tmp_path):
    out = evaluate(avatar_of(clip, darker), clip, EvaluateConfig(json=tmp_path / "r.json"), progress=False)
    assert strict((tmp_path / "r.json").read_text()) == json.loads(json.dumps(out))
    for name in ROWS:
        for region in ("frame", "head", "mouth"):
            assert {"psnr", "ssim", "lpips"} <= set(out[name][region])
        assert {
            "lmd_px", "lmd_norm", "sync_offset_frames", "sync_margin", "jitter_px", "seam", "motion_in_silence",
            "motion", "closure",
        } <= set(out[name])  # fmt: skip
        assert {"opening_ccc", "width_amplitude", "closed_share_ratio", "head_motion"} <= set(out[name]["motion"])
    assert out["seconds"] == {"prepare": 2.5, "speech": 1.0, "head": 20.0}
    assert out["fps"] > 0 and out["peak_memory_mb"] == 321
    assert out["split"]["test"] == [TRAIN, FRAMES] and "MediaPipe" in out["detector"]
    assert {"commit", "machine", "version", "clip", "avatar"} <= set(out["provenance"])


def test_the_truth_is_perfect_and_its_psnr_has_no_number(clip):
    row = evaluate(avatar_of(clip), clip, progress=False)["ground_truth"]
    for region in ("frame", "head", "mouth"):
        assert row[region] == {"psnr": None, "ssim": 1.0, "lpips": 0.0}
    assert row["lmd_px"] == 0 and row["missed_faces"] == 0


def test_an_avatar_that_returns_the_frame_scores_as_the_truth(clip):
    out = evaluate(avatar_of(clip), clip, progress=False)
    for region in ("frame", "head", "mouth"):
        assert out["tracked"][region]["psnr"] is None
        assert out["tracked"][region]["ssim"] == pytest.approx(1)
        assert out["tracked"][region]["lpips"] == pytest.approx(0, abs=1e-6)


def test_figures_are_means_over_the_test_frames(clip):
    out = evaluate(avatar_of(clip, darker), clip, tracked_only(), progress=False)
    by_hand = mean_of_frames([psnr(darker(drawn(t), i), drawn(t)) for i, t in enumerate(clip.test)])
    assert out["tracked"]["frame"]["psnr"] == pytest.approx(by_hand, abs=1e-5)
    assert out["audio"] is None


def test_the_control_is_the_mean_training_head_on_the_true_frame(clip):
    out = evaluate(avatar_of(clip, darker), clip, tracked_only(region="head"), progress=False)
    mean = (np.mean([drawn(t).astype(float) for t in clip.train], 0) + 0.5).astype(np.uint8)
    values = [psnr(np.where(hidden_mask(head(t))[..., None] > 0, mean, drawn(t)), drawn(t)) for t in clip.test]
    assert out["control"]["frame"]["psnr"] == pytest.approx(mean_of_frames(values), abs=1e-5)
    assert out["over_control"]["tracked"]["frame"] == pytest.approx(
        out["tracked"]["frame"]["psnr"] - out["control"]["frame"]["psnr"], abs=1e-5
    )


@pytest.mark.parametrize("region", ["face", "head"])
def test_sound_drives_the_region_asked_for_and_the_renderer_is_measured_on_both(clip, region):
    avatar = avatar_of(clip, darker)
    out = evaluate(avatar, clip, EvaluateConfig(region=region), progress=False)
    assert out["region"] == region and set(out["over_control"]) == {
        "audio",
        "tracked" if region == "head" else "tracked_face",
    }
    part = head if region == "head" else lambda t: face_part(np.where(face_room(head(t)), 255, 0))
    mean = (np.mean([drawn(t).astype(float) for t in clip.train], 0) + 0.5).astype(np.uint8)
    values = [psnr(np.where(hidden_mask(part(t))[..., None] > 0, mean, drawn(t)), drawn(t)) for t in clip.test]
    assert out["control"]["frame"]["psnr"] == pytest.approx(mean_of_frames(values), abs=1e-5)
    faces = {face for motion, face in avatar.made if torch.equal(motion.expression, motion_at(clip, 14).expression)}
    assert faces == {True, False}  # the tracked motion, rendered as a face and as a whole head
    assert {face for motion, face in avatar.made if is_spoken(motion, clip)} == {region == "face"}


def motion_at(clip, t: int) -> Motion:
    return clip.track.motion[t : t + 1]


def is_spoken(motion, clip) -> bool:
    """Whether its mouth is of no frame of the track."""
    return not (clip.track.motion.expression[:, :40] == motion.expression[:, :40]).all(1).any()


def test_no_test_frame_enters_the_control(clip, tmp_path):
    other = write_clip(tmp_path / "other.clip")
    for t in other.test:
        write_png(other.path / "frames" / f"{t:06d}.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    assert np.array_equal(mean_training_frame(clip), mean_training_frame(Clip.open(other.path)))


def test_training_frames_stand_apart(clip, capsys):
    """By hand from the frames that the fault leaves; null for another video's avatar."""
    avatar = avatar_of(clip, darker)
    out = evaluate(avatar, clip, tracked_only())["training_frames"]
    by_hand = np.mean([psnr(darker(clip.image(t), t), clip.image(t)) for t in range(TRAIN)])
    assert out["frames"] == TRAIN and out["frame"]["psnr"] == pytest.approx(by_hand, abs=1e-6)
    assert f"training frames ({TRAIN} of them" in " ".join(capsys.readouterr().out.split())
    avatar.source = {"sha256": "another"}
    assert evaluate(avatar, clip, tracked_only(), progress=False)["training_frames"] is None


def test_film_grain_is_off_and_stays_the_avatars(clip):
    avatar = avatar_of(clip)
    avatar.film_grain = "grain"
    evaluate(avatar, clip, progress=False)
    assert set(avatar.grains) == {None} and avatar.film_grain == "grain"


def mouth_drawn(image, number, motion):
    """A mouth whose colour tells the motion."""
    image[44:52, 30:42] = (255 * motion.expression[0, :3].sigmoid().numpy()).astype(np.uint8)
    image[52:56, 30:42, 0] = int(255 * float(motion.landmarks[0, 400, 0].sigmoid()))
    return image


def test_the_frames_scored_in_row_audio_are_those_that_speak_writes(clip, tmp_path, monkeypatch):
    """Before any encoding. The avatar's own driving track is the test part, so that `speak` shows the same frames."""
    from hicode.media.video import VideoWriter

    first, end = clip.test[0], clip.test[-1] + 1
    avatar = avatar_of(clip, mouth_drawn)
    avatar.driving = clip.track.motion[first:end]
    monkeypatch.setattr(DrawnAvatar, "driving_frame", lambda self, i: clip.image(first + i))
    monkeypatch.setattr(DrawnAvatar, "driving_mask", lambda self, i: clip.head_mask(first + i))
    scored, written, write = [], [], VideoWriter.write
    evaluate(avatar, clip, keep=lambda row, i, image: scored.append(image) if row == "audio" else None, progress=False)
    monkeypatch.setattr(VideoWriter, "write", lambda self, image: (written.append(image), write(self, image)))
    config = SpeakConfig(blinks=False, film_grain=False, mark=MarkConfig("none", "compared before any mark"))
    speak(avatar, clip.audio()[640 * first : 640 * end], tmp_path / "a.mp4", config, progress=False)
    assert len(scored) == len(written) == FRAMES - TRAIN
    assert all(np.array_equal(a, b) for a, b in zip(scored, written, strict=True))
    mouths = {image[46, 34].tobytes() for image in scored}
    assert len(mouths) > 4  # it does speak


def audio_motions(avatar, clip) -> list[Motion]:
    """Of the audio row, in order: its mouths are of no frame of the track, and it shows the test frames."""
    frames = []
    evaluate(avatar, clip, EvaluateConfig(modes=("audio",)), progress=False)
    for motion, _ in avatar.made:
        same = [t for t in clip.test if torch.equal(motion.T_camera_head, motion_at(clip, t).T_camera_head)]
        frames += [(same[0], motion)] if same else []
    return [motion for _, motion in sorted(dict(frames).items())]


def test_audio_replaces_the_mouth_of_the_test_track_alone(clip):
    motions = audio_motions(avatar_of(clip), clip)
    assert len(motions) == FRAMES - TRAIN
    for t, motion in zip(clip.test, motions, strict=True):
        true = motion_at(clip, t)
        assert torch.equal(motion.expression[:, 40:], true.expression[:, 40:])
        assert torch.equal(motion.landmarks[:, 0], true.landmarks[:, 0])  # no weight of the mouth
        assert not torch.equal(motion.expression[:, :40], true.expression[:, :40])


def test_no_true_test_mouth_reaches_the_audio_row(clip, tmp_path):
    """Another mouth in the test track, same sound: the audio row's mouth does not change."""
    motion = clip.track.motion
    changed = replace(motion, expression=motion.expression.clone(), landmarks=motion.landmarks.clone())
    changed.expression[TRAIN:, :40], changed.landmarks[TRAIN:, 477] = 0.5, 0.5
    other = write_clip(tmp_path / "other.clip")
    save_track(other.path / "track.safetensors", replace(clip.track, motion=changed))
    other = Clip.open(other.path)
    for a, b in zip(audio_motions(avatar_of(clip), clip), audio_motions(avatar_of(other), other), strict=True):
        assert torch.equal(a.expression[:, :40], b.expression[:, :40])
        assert torch.equal(a.landmarks[:, 477], b.landmarks[:, 477])


def test_the_mouth_at_rest_is_the_training_parts(clip, tmp_path):
    silent = write_clip(tmp_path / "silent.clip")
    write_audio(silent.path / "audio.wav", np.zeros(640 * FRAMES, np.float32), 16000)
    avatar = avatar_of(silent)
    rest, _ = resting_mouth(avatar.driving, avatar)
    for motion in audio_motions(avatar, silent):
        torch.testing.assert_close(motion.expression[0, :40], rest[:40])


@pytest.mark.parametrize("silent", ["clip", "avatar"])
def test_without_sound_or_speech_models_there_is_no_audio_row_and_a_note(clip, tmp_path, silent):
    other = write_clip(tmp_path / "silent.clip", sound=silent != "clip")
    config = EvaluateConfig(json=tmp_path / "r.json", html=tmp_path / "r.html")
    out = evaluate(avatar_of(other, darker, speech=silent != "avatar"), other, config, progress=False)
    assert out["audio"] is None and out["tracked"] is not None
    assert any(note.startswith("No audio row") for note in out["notes"])
    assert out["fps"] is None


def test_short_test_parts_have_no_sync_figure_and_say_so(clip):
    out = evaluate(avatar_of(clip), clip, tracked_only(), progress=False)
    assert out["tracked"]["sync_margin"] is None and "at least 50" in out["not_measured"]["sync"]


def test_what_is_not_measured_says_why(clip):
    out = evaluate(avatar_of(clip), clip, tracked_only(), progress=False)
    why = out["not_measured"]
    assert "--syncnet" in why["AVConf"] and "--alignment" in why["closure"] and "silent" in why["motion in silence"]
    assert all("avconf" not in out[name] for name in ("ground_truth", "control", "tracked"))
    assert "avconf" not in out["definitions"]


def test_with_weights_a_part_too_short_for_avconf_says_so(clip, tmp_path):
    from research.compare.syncnet import SyncNet

    torch.save(SyncNet().state_dict(), tmp_path / "syncnet_v2.model")
    out = evaluate(avatar_of(clip), clip, tracked_only(syncnet=tmp_path / "syncnet_v2.model"), progress=False)
    assert out["tracked"]["avconf"] is None and "at least 36" in out["not_measured"]["AVConf of tracked"]
    assert set(out["provenance"]["assets"]) == {"face_landmarks", "face_detection", "perceptual", "syncnet_v2.model"}


def test_closure_is_counted_where_an_alignment_is_given(clip, tmp_path):
    """The lips of the drawing's landmarks never close, the detector here says where they are."""
    start = TRAIN / 25
    (tmp_path / "a.txt").write_text(
        f"0.0 0.1 B\n{start + 0.04:.2f} {start + 0.12:.2f} M\n{start + 0.2:.2f} {start + 0.24:.2f} P\n"
    )
    out = evaluate(avatar_of(clip), clip, tracked_only(alignment=tmp_path / "a.txt"), progress=False)
    assert out["ground_truth"]["closures_due"] == 2 and out["ground_truth"]["closure"] is not None
    assert out["tracked"]["closure"] == out["ground_truth"]["closure"]
    assert "closure" not in out["not_measured"]


def test_some_equal_frames_do_not_hide_the_mean(clip):
    """A frame equal to the truth has no finite PSNR: the mean is infinite, and a note gives that of the others."""
    out = evaluate(
        avatar_of(clip, lambda image, t, motion: image if t < 3 else darker(image, t)),
        clip,
        tracked_only(),
        progress=False,
    )
    others = np.mean([psnr(darker(drawn(t), i), drawn(t)) for i, t in enumerate(clip.test) if i >= 3])
    assert out["tracked"]["frame"]["psnr"] is None
    assert any(
        "3 of 8 frames equal the truth in the frame" in note and f"{others:.2f} dB" in note for note in out["notes"]
    )


def test_frames_without_a_face_are_counted(clip, monkeypatch):
    """The detector finds none where the mouth is white: in every tracked frame."""
    seen = rows_module.detect

    def blind(frames, landmarker):
        return np.full((1, N_LANDMARKS, 3), np.nan) if (frames[0][48, 36] == 255).all() else seen(frames, landmarker)

    def white(image, number, motion):
        image[44:52, 30:42] = 255
        return image

    monkeypatch.setattr(rows_module, "detect", blind)
    out = evaluate(avatar_of(clip, white), clip, tracked_only(), progress=False)
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
    evaluate(avatar_of(clip, darker), clip, EvaluateConfig(html=tmp_path / "r.html"), progress=False)
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

    out = evaluate(avatar_of(clip, darker), clip, progress=False)
    stream = StringIO()
    print_table(out, Console(file=stream, width=140))
    text = stream.getvalue()
    for word in (
        "tracked face",
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
    avatar = avatar_of(clip)
    avatar.source = {"sha256": "other"}
    assert any("another video" in note for note in evaluate(avatar, clip, tracked_only(), progress=False)["notes"])


def test_what_cannot_be_measured_is_refused(clip, tmp_path):
    avatar = avatar_of(clip)
    avatar.background_plate = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="frames of 64x64, the clip has 72x72"):
        evaluate(avatar, clip, progress=False)
    with pytest.raises(InputError, match="no driving mode 'lips'"):
        EvaluateConfig(modes=("lips",))
    with pytest.raises(InputError, match="no region 'hair'"):
        EvaluateConfig(region="hair")
    with pytest.raises(OutputError, match="is a folder"):
        evaluate(avatar_of(clip), clip, EvaluateConfig(json=tmp_path), progress=False)
    with pytest.raises(InputError, match="12 training and 0 test frames"):
        evaluate(avatar_of(clip), write_clip(tmp_path / "none.clip", test=[20, 20]), progress=False)


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
    assert all(x0 >= 0 and x1 <= 72 and y0 >= 0 and y1 <= 90 for x0, y0, x1, y1 in windows)
    assert windows[0] == (10, 16, 30, 36)
