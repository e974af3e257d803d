"""Any two videos: figures against hand-made ones, the control, what differs between files, frames without a face.

Pictures of a face come from scikit-image (astronaut, public domain); folders of PNGs stand for lossless videos.
"""

import json
from io import StringIO

import cv2
import numpy as np
import pytest
from research.compare import videos
from research.compare.videos import compare_videos

from helpers.videos import portrait, speech_like, swaying, write_video
from hicode import assets, cli
from hicode.errors import InputError
from hicode.evaluation.config import CompareConfig, EvaluateConfig
from hicode.evaluation.images import psnr
from hicode.evaluation.lips import detect
from hicode.evaluation.show import print_table
from hicode.motion import LIPS
from hicode.preparation.clip import write_png
from hicode.tracking.landmarks import FaceLandmarker

NEEDED = ("face_landmarks", "face_detection", "person_mask", "perceptual")
pytestmark = pytest.mark.skipif(
    not all(map(assets.is_cached, NEEDED)), reason=f"not in the cache: `hicode assets pull {' '.join(NEEDED)}`"
)
SIZE, COUNT = 160, 6


def truth() -> list[np.ndarray]:
    return list(swaying(COUNT, portrait(SIZE), amount=9.0))


def blurred() -> list[np.ndarray]:
    """What a poor system makes of it: soft, and one frame late."""
    frames = truth()
    return [cv2.GaussianBlur(frames[max(i - 1, 0)], (0, 0), 1.5) for i in range(COUNT)]


def folder(path, frames):
    path.mkdir()
    for i, frame in enumerate(frames):
        write_png(path / f"{i:04d}.png", frame)
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("videos")
    return folder(base / "reference", truth()), folder(base / "video", blurred())


@pytest.fixture(scope="module")
def compared(places, tmp_path_factory):
    """One comparison, with its page, and the images that were the control."""
    controls, made = [], videos.control

    def spy(pair, picture, mask):
        controls.append(made(pair, picture, mask))
        return controls[-1]

    base = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videos, "control", spy)
        config = EvaluateConfig(json=base / "r.json", html=base / "r.html")
        out = compare_videos(places[1], places[0], config, progress=False)
    return out, controls[:COUNT], base


def test_json_has_the_videos_figures_at_top_level(compared):
    out, _, base = compared
    stored = json.loads((base / "r.json").read_text())
    assert stored == json.loads(json.dumps(out))
    for row in (stored, stored["control"], stored["ground_truth"]):
        assert all(set(row[region]) >= {"psnr", "ssim", "lpips"} for region in ("frame", "head", "mouth"))
        assert {"lmd_px", "lmd_norm", "missed_faces", "sync_offset_frames", "jitter_px", "seam"} <= set(row)
    assert stored["frames"] == {"compared": COUNT, "video": COUNT, "reference": COUNT, "left_out": 0, "fps": 25.0}
    made = stored["provenance"]
    assert made["video"]["sha256"] != made["reference"]["sha256"] and set(made["assets"]) == set(NEEDED)
    assert made["config"]["max_left_out"] == 5 and "commit" in made


def test_frame_figures_are_those_of_the_pictures(compared):
    from skimage.metrics import structural_similarity

    out, _, _ = compared
    pairs = list(zip(blurred(), truth(), strict=True))
    by_hand = np.mean([-10 * np.log10((((a / 255.0) - b / 255.0) ** 2).mean()) for a, b in pairs])
    assert out["frame"]["psnr"] == pytest.approx(by_hand, abs=1e-4)
    pooled = -10 * np.log10(np.mean([(((a / 255.0) - b / 255.0) ** 2).mean() for a, b in pairs]))
    assert abs(by_hand - pooled) > 0.01  # the mean of PSNRs, which is not the PSNR of the mean
    settings = {
        "channel_axis": 2, "data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False,
    }  # fmt: skip
    wanted = np.mean([structural_similarity(a / 255.0, b / 255.0, **settings) for a, b in pairs])
    assert out["frame"]["ssim"] == pytest.approx(wanted, abs=1e-4)


def test_lmd_is_by_one_detector_on_both(compared):
    out, _, _ = compared
    a, b = (detect(frames, FaceLandmarker())[:, LIPS, :2].astype(float) for frames in (blurred(), truth()))
    distance = np.linalg.norm((a - a.mean(1, keepdims=True)) - (b - b.mean(1, keepdims=True)), axis=-1).mean()
    assert out["lmd_px"] == pytest.approx(distance * 512 / SIZE, abs=1e-3)  # px at 512
    assert out["ground_truth"]["lmd_px"] == 0


def test_a_static_mean_head_scores_exactly_as_the_control_says(compared, places, tmp_path):
    out, controls, _ = compared
    still = compare_videos(folder(tmp_path / "still", controls), places[0], progress=False)
    for key in ("frame", "head", "mouth", "lmd_px", "lmd_norm", "jitter_px", "seam", "opening_correlation"):
        assert still[key] == out["control"][key] == still["control"][key], key
    assert still["over_control"]["video"] == dict.fromkeys(("frame", "head", "mouth", "lmd_px"), 0.0)


def test_the_control_unmasks_a_pasted_background(compared):
    """The control is wrong inside the head alone: its frame PSNR is lifted by the background, its head PSNR is not."""
    out, controls, _ = compared
    assert out["control"]["frame"]["psnr"] > out["control"]["head"]["psnr"] + 2
    for still, real in zip(controls, truth(), strict=True):
        changed = (still != real).any(2)
        f = changed.mean()
        assert psnr(still, real) - psnr(still, real, changed) == pytest.approx(-10 * np.log10(f), abs=1e-9)
        assert (still[:4] == real[:4]).all()


def test_without_syncnets_weights_nothing_is_called_avconf(compared):
    out, _, base = compared
    assert "--syncnet" in out["not_measured"]["AVConf"]
    assert not any("avconf" in row for row in (out, out["control"], out["ground_truth"]))
    text = table(out)
    assert "LSE-C" not in text and "not measured: AVConf, because" in " ".join(text.split())
    assert "LSE-C" not in (base / "r.html").read_text()


def test_with_weights_every_row_has_an_avconf(tmp_path, monkeypatch):
    """Random weights, six frames: crops, sound and both towers fit together. Scores are tested elsewhere."""
    import torch
    from research.compare import syncnet

    monkeypatch.setattr(syncnet, "MIN_FRAMES", COUNT)
    torch.save(syncnet.SyncNet().state_dict(), tmp_path / "syncnet_v2.model")
    clip = write_video(tmp_path / "a.mp4", truth(), speech_like(COUNT / 25))
    out = compare_videos(clip, clip, config=EvaluateConfig(syncnet=tmp_path / "syncnet_v2.model"), progress=False)
    assert out["avconf"] == out["ground_truth"]["avconf"] and set(out["avconf"]) == {
        "confidence",
        "distance",
        "offset_frames",
    }
    assert out["control"]["avconf"]["distance"] != out["avconf"]["distance"]
    assert "AVConf LSE-C" in table(out) and "AVConf" not in out["not_measured"] and "avconf" in out["definitions"]
    assert "syncnet_v2.model" in out["provenance"]["assets"]


def table(out) -> str:
    from rich.console import Console

    stream = StringIO()
    print_table(out, Console(file=stream, width=400))
    return stream.getvalue()


def test_a_video_equal_to_its_reference_is_perfect(places):
    out = compare_videos(places[0], places[0], progress=False)
    for region in ("frame", "head", "mouth"):
        assert out[region]["psnr"] is None and out[region]["ssim"] == pytest.approx(1) and out[region]["lpips"] < 1e-6
    assert out["lmd_px"] == 0 and "∞" in table(out)


# -------------------------------------------------------------------------------------------------------------- no face


def test_frames_without_a_face_are_counted_in_table_json_and_page(places, tmp_path):
    frames = blurred()
    frames[2] = np.full_like(frames[2], 90)
    out = compare_videos(
        folder(tmp_path / "gap", frames), places[0], config=EvaluateConfig(html=tmp_path / "r.html"), progress=False
    )
    assert out["missed_faces"] == 1 and out["no_face"]["video"] == {"count": 1, "frames": [2]}
    assert out["no_face"]["ground_truth"]["count"] == 0
    # seen, and scored
    assert out["per_frame"]["video"]["lmd_px"][2] is None and out["per_frame"]["video"]["psnr_head"][2] < 20
    text = table(out)
    said = "video: no face found in 1 of 6 frames"
    assert said in text and "no face" in text
    page = (tmp_path / "r.html").read_text()
    assert said in page and "Frame 2: worst 1 by head PSNR (video); no face found" in page


def test_a_reference_frame_without_a_face_has_no_head_but_a_frame(tmp_path):
    frames = list(swaying(16, portrait(SIZE), amount=6.0))[:10]
    gone = [f if i not in (4, 5) else np.full_like(f, 90) for i, f in enumerate(frames)]
    out = compare_videos(folder(tmp_path / "v", frames), folder(tmp_path / "r", gone), progress=False)
    assert out["no_face"]["reference_track"] == {"count": 2, "frames": [4, 5]}
    heads = out["per_frame"]["video"]["psnr_head"]
    # equal frames are infinite and so null in JSON; the control's are finite but for the two without a head
    control = out["per_frame"]["control"]["psnr_head"]
    assert [v is None for v in control] == [i in (4, 5) for i in range(10)] and heads[4] is None
    assert out["per_frame"]["video"]["psnr_frame"][4] < 20
    assert out["head"]["ssim"] == pytest.approx(1) and out["frame"]["ssim"] < 1
    assert out["missed_faces"] == 2
    assert any(note.startswith("No face in 2 of 10 frames of the reference (first: 4)") for note in out["notes"])


def test_a_reference_without_any_face_is_refused(tmp_path, places):
    empty = folder(tmp_path / "empty", [np.full((SIZE, SIZE, 3), 90, np.uint8)] * 4)
    with pytest.raises(InputError, match=r"No face in any of the 4 frames of the reference .*empty.*--reference"):
        compare_videos(places[1], empty, progress=False, compare=CompareConfig(max_left_out=9))


# ------------------------------------------------------------------------------------------------------ what may differ


def test_a_few_frames_more_are_left_out_and_reported(places, tmp_path):
    longer = [*blurred(), *blurred()[:2]]
    out = compare_videos(
        folder(tmp_path / "longer", longer), places[0], config=EvaluateConfig(html=tmp_path / "r.html"), progress=False
    )
    assert out["frames"]["compared"] == COUNT and out["frames"]["left_out"] == 2 and out["frames"]["video"] == COUNT + 2
    said = "The video is longer: its last 2 of 8 frames were left out."
    assert said in out["notes"] and said in table(out) and said in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    "spoil, config, finding",
    [
        (lambda f: f * 3, {}, r"has 18 frames at 25 a second, the reference .* 6\. Trim .*--max-left-out 12"),
        (lambda f: f + f[:1], {"max_left_out": 0}, "--max-left-out 1"),
        (lambda f: [cv2.resize(p, (80, 80)) for p in f], {}, r"is 80x80, the reference .* 160x160\. .*--resize"),
        (lambda f: [p[:100] for p in f], {"resize": True}, "other shapes"),
        (lambda f: [*f[:3], f[3][:80, :80]], {}, "80x80 at frame 3"),
        (lambda f: [], {}, "folder without pictures"),
        (lambda f: f, {"max_left_out": -1}, "is negative"),
    ],
    ids=["length", "length, strictly", "size", "shape", "size midway", "nothing", "a negative number"],
)
def test_what_differs_is_refused_with_a_remedy(places, tmp_path, spoil, config, finding):
    other = folder(tmp_path / "other", spoil(blurred()))
    with pytest.raises(InputError, match=finding):
        compare_videos(other, places[0], progress=False, compare=CompareConfig(**config))


def test_small_references_and_damaged_pictures_are_refused(places, tmp_path):
    tiny = folder(tmp_path / "tiny", [cv2.resize(f, (48, 48)) for f in truth()])
    with pytest.raises(InputError, match="64 px a side"):
        compare_videos(tiny, tiny, progress=False)
    broken = folder(tmp_path / "broken", truth())
    (broken / "0003.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"0003\.png is not a readable picture"):
        compare_videos(broken, places[0], progress=False)


def test_a_scaled_video_is_compared_on_request_and_says_so(places, tmp_path):
    small = [cv2.resize(f, (80, 80), interpolation=cv2.INTER_AREA) for f in truth()]
    out = compare_videos(
        folder(tmp_path / "small", small), places[0], progress=False, compare=CompareConfig(resize=True)
    )
    assert any("was scaled" in note for note in out["notes"]) and 15 < out["frame"]["psnr"] < 45


def test_other_rates_are_refused_or_paired_by_time(tmp_path):
    scene = portrait(SIZE)
    levels = [np.clip(scene.astype(int) + 4 * i, 0, 255).astype(np.uint8) for i in range(12)]
    reference = write_video(tmp_path / "r.mp4", levels[:8])
    faster = tmp_path / "v.mp4"
    from hicode.media.video import VideoWriter

    with VideoWriter(faster, SIZE, SIZE, fps=50.0) as video:
        for frame in levels[:8]:
            video.write(frame)
            video.write(frame)
    with pytest.raises(InputError, match=r"has 50 frames a second, the reference .* 25: .*--resample"):
        compare_videos(faster, reference, progress=False)
    pair = videos.Pair.open(faster, reference, CompareConfig(resample=True))
    assert pair.count == 8 and any("nearest frames in time" in note for note in pair.notes)
    assert all(abs(a.mean() - b.mean()) < 1.5 for a, b in pair.frames())  # a frame off would be 4 levels


def test_the_sound_is_the_videos_own_and_else_the_references(tmp_path):
    frames = truth()
    loud = write_video(tmp_path / "loud.mp4", frames, speech_like(COUNT / 25))
    mute = write_video(tmp_path / "mute.mp4", frames)
    for video, reference, whose in ((loud, mute, "video"), (mute, loud, "reference"), (mute, mute, None)):
        pair = videos.Pair.open(video, reference, CompareConfig())
        assert pair.whose_sound("video") == pair.whose_sound("ground_truth") == whose
        assert (pair.sound("video") is None) == (whose is None)
    both = videos.Pair.open(loud, loud, CompareConfig())
    assert (both.whose_sound("video"), both.whose_sound("control")) == ("video", "reference")
    assert len(both.sound("video").samples) == 640 * COUNT


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "arguments, finding",
    [
        ("evaluate", "Nothing to measure"),
        ("evaluate some.hicode", "Nothing to measure"),
        ("evaluate --video a.mp4", "Give both"),
        ("evaluate a.hicode a.clip --video a.mp4 --reference b.mp4", "without an avatar"),
        ("evaluate a.hicode a.clip --resize", "for two videos"),
        ("evaluate --video absent.mp4 --reference absent.mp4", "absent.mp4 does not exist"),
        ("evaluate --video a.mp4 --reference b.mp4 --syncnet absent.model", "absent.model does not exist"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(arguments, finding, capfd):
    assert cli.main(arguments.split()) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and finding in lines[0]


def test_a_small_head_in_a_wide_frame_is_found_masked_and_shown_by_itself(tmp_path):
    """Regions are the head's, wherever it is; nothing beside it is in the head's mask or changed by the control."""
    wide = np.full((240, 420, 3), 110, np.uint8)
    wide[40:200, 230:390] = portrait(SIZE)
    frames = list(swaying(4, wide, amount=3.0))
    clip = folder(tmp_path / "wide", frames)
    pair = videos.Pair.open(clip, clip, CompareConfig())
    face = videos.track_reference(pair, FaceLandmarker(), lambda done, total: None)
    mask = face.mask(0)
    assert mask.shape == (240, 420) and face.detected.all()
    ys, xs = np.nonzero(mask >= 128)
    assert xs.min() > 235 and xs.max() < 390 and ys.min() >= 30 and ys.max() < 200 and len(xs) > 1500
    x0, y0, x1, y1 = face.mouth(0, 420, 240)
    assert 260 < x0 < x1 < 360 and 90 < y0 < y1 < 190
    still = videos.control(pair, frames[0], mask)
    assert np.array_equal(still[:, :220], frames[0][:, :220])
    rows, columns = face.square
    assert columns.start > 100 and rows.stop - rows.start == columns.stop - columns.start
