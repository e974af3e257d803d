"""From a video to a clip: the crop, who is followed, resuming, the report. Pictures of a face come from scikit-image
(astronaut, public domain).
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from helpers.videos import portrait, speech_like, swaying, write_video
from hicode.errors import FileFormatError, InputError, OutputError
from hicode.media.video import read_video
from hicode.preparation import pipeline
from hicode.preparation.clip import Clip
from hicode.preparation.crop import crop_square, follow_people, head_box
from hicode.preparation.pipeline import PrepareConfig, prepare
from hicode.tracking.models import TrackingModels

# --- who, and which part of the picture -------------------------------------------------------------------------------


def box(x, y, size):
    return np.array([x, y, x + size, y + size], float)


def test_two_people_are_told_apart_though_they_cross_in_order():
    looks = [[box(100 + 5 * i, 50, 80), box(400 - 5 * i, 60, 50)][:: 1 if i % 2 else -1] for i in range(20)]
    people = follow_people(looks)
    assert len(people) == 2 and all(len(p) == 20 for p in people)
    for person in people:
        sizes = [b[2] - b[0] for b in person.values()]
        assert len(set(sizes)) == 1


def test_a_face_that_comes_back_is_the_same_person():
    looks = [[box(100, 50, 80)] if i < 5 or i > 12 else [] for i in range(20)]
    assert [len(p) for p in follow_people(looks)] == [12]


def test_a_head_crop_is_kept_whole():
    assert head_box(512, 512, [100.0, 150.0, 400.0, 480.0], 270.0) == (0, 0, 512)


@pytest.mark.parametrize("width, height", [(1920, 1080), (1080, 1920), (3840, 2160), (360, 288)])
def test_the_crop_holds_hair_and_chin_and_lies_inside_the_video(width, height):
    size = 0.2 * min(width, height)
    reach = [width / 2 - 0.6 * size, height / 2 - 0.5 * size, width / 2 + 0.6 * size, height / 2 + 0.6 * size]
    x, y, side = head_box(width, height, reach, size)
    assert x >= 0 and x + side <= width and y >= 0 and y + side <= height
    assert x <= reach[0] - 0.4 * size and x + side >= reach[2] + 0.4 * size
    assert y <= reach[1] - 0.6 * size and y + side >= reach[3] + 0.25 * size
    assert side < 3 * size, "the face must stay large in the crop"


def test_a_head_at_the_border_gets_what_there_is():
    x, y, side = head_box(1280, 720, [0.0, 0.0, 300.0, 300.0], 300.0)
    assert (x, y) == (0, 0) and side <= 720


def test_an_unscaled_crop_is_exact():
    frame = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)
    assert np.array_equal(crop_square(frame, 7.0, 9.0, 64.0, 64), frame[9:73, 7:71])
    assert crop_square(frame, 7.0, 9.0, 64.0, 32).shape == (32, 32, 3)


@pytest.mark.parametrize("config, finding", [
    (PrepareConfig(size=500), "multiple of 16"),
    (PrepareConfig(max_missing=1.5), "share of frames"),
    (PrepareConfig(start=-1.0), "negative"),
    (PrepareConfig(duration=1.0), "shorter than"),
])  # fmt: skip
def test_settings_out_of_range_are_refused_before_any_work(tmp_path, config, finding):
    with pytest.raises(InputError, match=finding):
        prepare(tmp_path / "absent.mp4", tmp_path / "c", config)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A room of 480x320 with a woman in it, and a smaller copy of her beside."""
    room = np.full((320, 480, 3), (70, 90, 110), np.uint8)
    room[64:320, 20:276] = portrait(256)
    room[160:320, 310:470] = portrait(160)[:, ::-1]
    return room


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, scene):
    """(clip, video, config) of two seconds of two people, with sound."""
    folder = tmp_path_factory.mktemp("prepared")
    video = write_video(folder / "two people.mp4", swaying(52, scene), speech_like(2.08))
    config = PrepareConfig(size=256)
    return prepare(video, folder / "c", config, progress=False), video, config


def test_a_clip_has_all_its_parts(prepared):
    clip, _, _ = prepared
    assert (clip.frame_count, clip.width, clip.height, clip.fps) == (52, 256, 256, 25.0)
    assert len(clip.test) == 25 and clip.train.stop == clip.test.start
    assert clip.track.motion.landmarks.shape == (52, 478, 3)
    (depth,) = clip.depths().values()  # a head that does not turn is seen from one side
    assert depth.shape == (256, 256) and np.isfinite(depth).mean() > 0.05 and np.nanmin(depth) > 0
    assert len(clip.audio()) == 52 * 640
    assert len(clip.speech_features()) == 104
    assert not list(clip.path.rglob("*.partial")) and not list(clip.path.glob(".*"))


def test_the_crop_holds_the_larger_face(prepared):
    clip, _, _ = prepared
    x0, _, side = clip.crop_box
    assert x0 + side / 2 < 240, "the larger face is on the left"
    assert clip.report["other_faces"] == 1
    inside = clip.track.landmarks_px.numpy()
    assert inside.min() > 0 and inside.max() < 256


def test_the_crop_does_not_jitter(prepared):
    """One box for all frames, though the face sways: each is exactly that square of the source's frame."""
    clip, video, _ = prepared
    x0, y0, side = clip.crop_box
    assert 2 * clip.width >= side, "frames are decoded at their own size, so pixels can be compared"
    for t, frame in enumerate(read_video(video)):
        assert np.array_equal(clip.image(t), crop_square(frame, float(x0), float(y0), float(side), clip.width)), t


def test_the_masks_are_about_the_head(prepared):
    clip, _, _ = prepared
    points = clip.track.landmarks_px[30].numpy()
    centre = points.mean(0).astype(int)
    head, person = clip.head_mask(30), clip.person_mask(30)
    assert head[centre[1], centre[0]] == 255 and head[2, 2] == 0
    assert 0.05 < (head > 127).mean() < 0.7
    assert ((person > 127) | ~(head > 200)).mean() > 0.98, "the head is part of the person"


def test_the_report_says_what_was_found(prepared):
    clip, _, _ = prepared
    said = {item["name"]: item for item in clip.report["items"]}
    assert "2 faces" in said["people"]["value"] and "largest" in said["people"]["advice"]
    assert {"length", "face", "sharpness", "light", "mouth range", "sound", "fit"} <= set(said)
    assert said["length"]["advice"], "two seconds are little"


def test_a_rerun_does_nothing(prepared, monkeypatch):
    clip, video, config = prepared
    before = (clip.path / "clip.json").read_bytes()
    monkeypatch.setattr(pipeline, "read_pictures", None)
    monkeypatch.setattr(pipeline._Preparation, "find_landmarks", None)
    prepare(video, clip.path, config, progress=False)
    assert (clip.path / "clip.json").read_bytes() == before


def test_another_setting_repeats_only_what_depends_on_it(prepared, monkeypatch):
    clip, video, config = prepared
    for name in ("find_faces", "write_frames", "find_landmarks", "fit", "segment"):
        monkeypatch.setattr(pipeline._Preparation, name, None)
    again = prepare(video, clip.path, PrepareConfig(size=256, encoder="logmel"), progress=False)
    assert len(again.speech_features("logmel")) == 104
    prepare(video, clip.path, config, progress=False)


def test_a_changed_constant_of_tracking_repeats_its_step_and_those_after_it(prepared, monkeypatch):
    """The masks' settings are part of the masks' record; landmarks and fit come before and are kept."""
    clip, video, config = prepared
    for name in ("find_faces", "write_frames", "find_landmarks", "fit"):
        monkeypatch.setattr(pipeline._Preparation, name, None)
    softer = replace(config, track=replace(config.track, masks=replace(config.track.masks, person=40)))

    def segment(self, count):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline._Preparation, "segment", segment)
    shutil.copytree(clip.path, clip.path.with_name("other"))
    with pytest.raises(KeyboardInterrupt):
        prepare(video, clip.path.with_name("other"), softer, progress=False)


def test_models_that_are_given_are_used_and_none_is_loaded_twice(prepared, tmp_path):
    """A detector that finds nobody is believed, and the head model is not asked for."""
    _, video, config = prepared

    class Nobody:
        crop_px, from_crops = 192, None

        def detect(self, image):
            return []

    models = TrackingModels(landmarker=Nobody())
    with pytest.raises(InputError, match="No face"):
        prepare(video, tmp_path / "c", config, progress=False, models=models)
    assert "head" not in vars(models) and models.segmenter is models.segmenter


def test_where_the_clip_begins_is_told(prepared):
    clip, video, _ = prepared
    assert (clip.start_s, clip.first_frame, clip.video) == (0.0, 0, video.resolve())
    assert clip.prepare_seconds > 0


@pytest.mark.slow
def test_a_killed_run_goes_on_after_its_last_step(prepared, tmp_path, monkeypatch):
    """Interrupted in the fit; the second run neither decodes nor looks for landmarks again: the same track."""
    clip, video, config = prepared
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Preparation, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(video, tmp_path / "c", config, progress=False)
    state = json.loads((tmp_path / "c" / "clip.json").read_text())
    assert not state["complete"] and set(state["steps"]) == {"faces", "crop", "landmarks"}
    monkeypatch.setattr(pipeline, "read_pictures", None)
    monkeypatch.setattr(pipeline._Preparation, "find_landmarks", None)
    again = prepare(video, tmp_path / "c", config, progress=False)
    assert np.array_equal(again.image(7), clip.image(7))
    # The same arithmetic on the same landmarks; threads may sum in another order.
    assert np.allclose(again.track.motion.landmarks, clip.track.motion.landmarks, atol=1e-3)


def test_a_missing_result_is_made_again(prepared):
    clip, video, config = prepared
    (clip.path / "depth.safetensors").unlink()
    assert np.isfinite(prepare(video, clip.path, config, progress=False).depths()[0]).any()


@pytest.mark.parametrize("name", ["masks/head/000020.png", "depth.safetensors", "audio.wav"])
def test_a_damaged_file_is_made_again(prepared, name):
    """The remedy of the error: preparing again."""
    clip, video, config = prepared
    whole = (clip.path / name).read_bytes()
    (clip.path / name).write_bytes(whole[:-9] + bytes(9))
    with pytest.raises(FileFormatError, match="damaged"):
        damaged = Clip.open(clip.path)
        for read in (lambda: damaged.head_mask(20), damaged.depths, damaged.audio):
            read()
    prepare(video, clip.path, config, progress=False)
    assert (clip.path / name).read_bytes() == whole


def test_another_video_does_not_overwrite_a_clip(prepared, tmp_path):
    clip, _, config = prepared
    other = write_video(tmp_path / "other.mp4", swaying(55, portrait(128)))
    with pytest.raises(OutputError, match="another video"):
        prepare(other, clip.path, config, progress=False)
    Clip.open(clip.path)


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.clip
@pytest.mark.slow
def test_an_hdtf_clip_keeps_its_pixels(markey, tmp_path):
    from hicode.media.video import read_video

    clip = prepare(markey, tmp_path / "c", PrepareConfig(duration=2.4), progress=False)
    for t, frame in zip(range(3), read_video(markey), strict=False):
        assert np.array_equal(clip.image(t), frame)
    assert clip.crop_box == (0, 0, 512) and clip.report["fit_error_px"] < 5
