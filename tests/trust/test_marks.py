"""Manifest, AIGC field and label, and what `verify` says of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.trust_pictures import pictures
from hicode.errors import InputError, OutputError
from hicode.media.video import VideoWriter, read_video
from hicode.trust.consent import consent_record
from hicode.trust.marks import (
    FrameMarker,
    MarkConfig,
    VideoRecord,
    aigc_field,
    label_is_shown,
    labelled,
    manifest,
    read_aigc,
    sign_video,
)
from hicode.trust.verify import find_watermark, read_manifest, synthetic_source, verify

AVATAR = "89abcdef" + 56 * "0"


@pytest.fixture
def record() -> VideoRecord:
    return VideoRecord(AVATAR, consent_record("Jane Doe", 64 * "1"), 64 * "2")


def write(path: Path, frames, sound: bool = True) -> Path:
    height, width = frames[0].shape[:2]
    audio = np.sin(np.arange(16_000) / 9).astype(np.float32) if sound else None
    with VideoWriter(path, width, height, audio=audio) as video:
        for frame in frames:
            video.write(frame)
    return path


def marked(record: VideoRecord) -> list[np.ndarray]:
    return list(map(FrameMarker(MarkConfig(), record), pictures(5, 256)))


def test_a_marked_and_signed_video_is_synthetic_by_its_avatar(tmp_path, record):
    path = write(tmp_path / "a.mp4", marked(record))
    before, size = list(read_video(path)), path.stat().st_size
    sign_video(path, record)
    assert path.stat().st_size - size <= 10_000
    assert all(np.array_equal(a, b) for a, b in zip(before, read_video(path), strict=True))
    found = verify(path)
    assert found.verdict == "synthetic" and found.exit_code == 0 and found.agreement
    assert found.manifest.state == "ours" and found.manifest.avatar_sha256 == AVATAR
    assert found.manifest.consent == "stated" and found.manifest.consent_sha256 == record.consent.sha256
    assert found.watermark.avatar_id == AVATAR[:8] and found.watermark.false_alarm_rate <= 1e-9
    assert found.aigc is not None and found.aigc["Label"] == "1"
    values = json.loads(found.to_json())
    assert values["exit_code"] == 0 and values["limits"]
    assert "Jane" not in path.read_bytes().decode("latin-1")
    assert list(tmp_path.glob(".*")) == []


def test_one_changed_byte_is_noticed(tmp_path, record):
    path = write(tmp_path / "a.mp4", marked(record))
    sign_video(path, record)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert read_manifest(path).state == "invalid"
    found = verify(path)
    assert found.verdict == "altered" and found.exit_code == 3


def test_another_machine_reads_a_valid_signature_of_an_unknown_key(tmp_path, record, monkeypatch):
    path = write(tmp_path / "a.mp4", marked(record))
    sign_video(path, record)
    monkeypatch.setenv("HICODE_CONFIG", str(tmp_path / "other"))
    assert read_manifest(path).state == "valid" and verify(path).verdict == "synthetic"


def test_a_manifest_without_its_watermark_is_a_contradiction(tmp_path, record):
    path = write(tmp_path / "a.mp4", pictures(5, 256))
    sign_video(path, record)
    assert verify(path).verdict == "contradictory"


def test_a_video_too_small_for_the_watermark_is_judged_by_its_manifest(tmp_path, record):
    frames = [np.ascontiguousarray(frame[:128, :128]) for frame in marked(record)]
    path = write(tmp_path / "a.mp4", frames)
    sign_video(path, record)
    found = verify(path)
    assert found.verdict == "synthetic" and found.exit_code == 0
    assert found.watermark.present or "128 px are too few" in str(found)


def test_a_manifest_of_another_avatar_is_a_contradiction(tmp_path, record):
    path = write(tmp_path / "a.mp4", marked(record))
    sign_video(path, VideoRecord("01" * 32, record.consent))
    found = verify(path)
    assert found.verdict == "contradictory" and found.agreement is False and found.exit_code == 3


def test_the_watermark_alone_remains_after_encoding_anew(tmp_path, record):
    path = write(tmp_path / "a.mp4", marked(record))
    sign_video(path, record)
    again = write(tmp_path / "b.mp4", list(read_video(path)), sound=False)
    found = verify(again)
    assert found.manifest.state == "none" and found.aigc is None
    assert found.verdict == "synthetic" and found.watermark.avatar_id == AVATAR[:8]


def test_an_unmarked_video_has_no_mark(tmp_path):
    found = verify(write(tmp_path / "a.mp4", pictures(5, 256)))
    assert found.verdict == "no mark" and found.exit_code == 1
    assert "does not prove" in str(found)


@pytest.mark.slow
def test_a_part_that_is_ours_is_found_in_a_longer_video(tmp_path, record):
    quiet = pictures(1, 512, seed=3)[0]
    mark = FrameMarker(MarkConfig(), record)
    frames = [quiet] * 200 + [mark(quiet)] * 100 + [quiet] * 100
    found = find_watermark(write(tmp_path / "a.mp4", frames, sound=False))
    assert found.present and found.avatar_id == AVATAR[:8]
    assert (8.0, 12.0) in found.marked_s and len(found.marked_s) <= 2


def test_signing_is_atomic(tmp_path, record):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video at all")
    with pytest.raises(OutputError):
        sign_video(path, record)
    assert path.read_bytes() == b"no video at all"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_manifest_says_what_c2pa_asks(record):
    definition = manifest(record)
    action = definition["assertions"][0]["data"]["actions"][0]
    assert action["action"] == "c2pa.created"
    assert action["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert definition["ingredients"][0]["instance_id"] == f"sha256:{record.driving_sha256}"


def test_the_aigc_field_has_the_standards_seven_keys(tmp_path, record):
    field = aigc_field(record)
    assert set(field) == {
        "Label", "ContentProducer", "ProduceID", "ReservedCode1", "ContentPropagator", "PropagateID", "ReservedCode2",
    }  # fmt: skip
    assert field["ProduceID"] != aigc_field(record)["ProduceID"]
    assert read_aigc(write(tmp_path / "a.mp4", pictures(2, 128))) is None
    assert read_aigc(tmp_path / "none.mp4") is None


@pytest.mark.parametrize("values", [{"mark": "none"}, {"mark": "none", "reason": " "}, {"reason": "x"}])
def test_no_mark_needs_a_reason_and_a_reason_needs_no_mark(values):
    with pytest.raises(InputError, match="--reason"):
        MarkConfig(**values)


def test_without_marks_frames_stay_as_they_are(record):
    frames = pictures(2, 128)
    marker = FrameMarker(MarkConfig(mark="none", reason="a test"), record)
    assert all(np.array_equal(marker(f), f) for f in frames)


@pytest.mark.parametrize("size", [(512, 512), (720, 1280), (1280, 720), (128, 96)])
def test_labels_are_large_enough_and_at_the_top_right(size):
    frame = np.full((*size, 3), 90, np.uint8)
    for label in ("eu", "cn"):
        changed = (labelled(frame, label) != frame).any(-1)
        rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
        letters = (labelled(frame, label) > 200).all(-1).any(1).nonzero()[0]
        assert np.ptp(letters) + 1 >= 0.05 * min(size)
        assert rows.max() < 0.25 * size[0] and columns.max() > 0.9 * size[1]


def test_labels_are_shown_at_the_start_and_again():
    assert label_is_shown("cn", 2.0) and not label_is_shown("cn", 60.0)
    assert label_is_shown("eu", 0.0) and not label_is_shown("eu", 30.0) and label_is_shown("eu", 61.0)


def test_a_recording_that_says_it_is_synthetic_is_named(tmp_path, record):
    assert synthetic_source(write(tmp_path / "real.mp4", pictures(5, 256))) is None
    # Every tenth frame is looked at.
    spoken = write(tmp_path / "spoken.mp4", list(map(FrameMarker(MarkConfig(), record), pictures(41, 256))))
    assert f"avatar {AVATAR[:8]}" in str(synthetic_source(spoken))
    sign_video(spoken, record)
    assert "C2PA" in str(synthetic_source(spoken))
