"""The invisible mark, on synthetic pictures and, where they are there, on real clips."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.trust_pictures import pictures
from hicode.errors import InputError
from hicode.trust import watermark
from hicode.trust.watermark import FALSE_ALARM_RATE, Payload, Watermark, detect

DATA = Path(__file__).parents[3] / "shared" / "data"
PAYLOAD = Payload(0x89ABCDEF)
KEY_SUM = 5732.78


@pytest.fixture(scope="module")
def marked() -> list[np.ndarray]:
    return [Watermark(PAYLOAD).embed(f) for f in pictures()]


def test_the_kernel_equals_the_reference():
    for size, channels in ((384, 3), (130, 1), (75, 3)):
        frame = pictures(1, size)[0][: size - 3, :, :channels].copy()
        fast = Watermark(PAYLOAD).embed(frame).astype(int)
        reference = Watermark(PAYLOAD).embed_reference(frame)
        # The kernel is in single precision: a sum just at a half may round the other way.
        assert np.abs(fast - reference).max() <= 1 and (fast != reference).mean() < 1e-3


def test_embedding_leaves_its_input_alone_and_takes_any_layout():
    frame = pictures(1)[0]
    before = frame.copy()
    turned = Watermark(PAYLOAD).embed(frame[:, ::-1])
    assert np.array_equal(frame, before)
    assert np.array_equal(turned, Watermark(PAYLOAD).embed(frame[:, ::-1].copy()))


def test_the_mark_is_above_40_db_on_a_smooth_and_on_a_rough_picture():
    smooth = np.full((256, 256, 3), 120, np.uint8)
    for frame in (smooth, pictures(1)[0]):
        error = Watermark(PAYLOAD).embed(frame).astype(float) - frame
        assert 10 * math.log10(255**2 / (error**2).mean()) > 40


def test_every_payload_comes_back_and_a_wrong_bit_is_noticed():
    for payload in (Payload(0), Payload(2**32 - 1, 15), PAYLOAD):
        symbols = payload.symbols()
        assert Payload.from_symbols(symbols) == payload
        for symbol in range(watermark.SYMBOLS):
            for bit in range(watermark.SYMBOL_BITS):
                changed = list(symbols)
                changed[symbol] ^= 1 << bit
                assert Payload.from_symbols(changed) is None


def test_the_key_never_changes():
    # A change here means that marks in videos that exist are no longer found.
    assert Payload(1).symbols() == (256, 0, 1, watermark._crc12(1 << 32 | 1))
    total = float(np.abs(np.fft.fft2(watermark.tile(PAYLOAD))[10, :20].real).sum())
    assert total == pytest.approx(KEY_SUM, rel=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f,
        lambda f: f[70:300, 45:290],
        lambda f: cv2.resize(f, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA),
        lambda f: cv2.resize(f, None, fx=1.5, fy=1.5, interpolation=cv2.INTER_CUBIC),
        lambda f: cv2.resize(f[20:340, 30:350], (244, 240), interpolation=cv2.INTER_AREA),
        lambda f: f[:, ::-1],
        lambda f: np.pad(f, ((100, 100), (0, 0), (0, 0))),
        lambda f: cv2.imdecode(cv2.imencode(".jpg", f, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR),
        lambda f: np.clip(f * 0.8 + 20, 0, 255).astype(np.uint8),
    ],
    ids=["same", "cropped", "reduced", "enlarged", "both", "mirrored", "bars", "jpeg", "contrast"],
)
def test_the_payload_survives(marked, change):
    found = detect([change(f) for f in marked])
    assert found.present and found.false_alarm_rate <= FALSE_ALARM_RATE
    assert found.payload == PAYLOAD and found.payload_confidence > 0.99


def test_the_alignment_is_that_of_the_change(marked):
    found = detect([cv2.resize(f, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA)[:, 10:] for f in marked])
    assert found.alignment.scale_x == pytest.approx(0.75, rel=0.01)
    shift = (found.alignment.offset_x_px + 10) % (0.75 * watermark.TILE_PX)
    assert min(shift, 0.75 * watermark.TILE_PX - shift) < 2


def test_an_unmarked_picture_has_no_mark():
    for seed in range(3):
        found = detect(pictures(1, 320, seed))
        assert not found.present and found.payload is None and found.false_alarm_rate > 1e-3


def test_degenerate_pictures_have_no_mark():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    chequers = ((np.indices((256, 256)) // 8).sum(0) % 2 * 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)
    for picture in (np.zeros((256, 256), np.uint8), ramp, chequers, noise):
        assert not detect([picture]).present


def test_the_stated_rate_bounds_the_measured_one():
    # Random keys on a fixed picture: the Chernoff bound exp(-z^2 / 2) must lie above the share of scores over z.
    rng = np.random.default_rng(0)
    n, trials = 180, 200_000
    scores = np.concatenate(
        [np.cos(2 * np.pi * rng.random((trials // 20, n))).sum(1) / math.sqrt(n / 2) for _ in range(20)]
    )
    for z in (1.0, 2.0, 3.0, 4.0):
        assert (scores > z).mean() <= math.exp(-(z**2) / 2)


def test_bad_input_is_refused_in_one_line():
    with pytest.raises(InputError, match="no frame"):
        detect([])
    with pytest.raises(InputError, match="too small"):
        detect([np.zeros((40, 40, 3), np.uint8)])
    with pytest.raises(InputError, match="changes its size"):
        detect([np.zeros((128, 128, 3), np.uint8), np.zeros((128, 130, 3), np.uint8)])


@pytest.mark.slow
@pytest.mark.clip
@pytest.mark.parametrize(
    "name", ["hdtf/RD_Radio2_000", "hdtf/WDA_EdMarkey0_000", "hdtf/WDA_KatieHill_000", "long/german_20s"]
)
def test_real_clips_keep_the_mark_through_h264_and_rescaling(name, tmp_path):
    from hicode.media.video import VideoWriter, read_video

    path = DATA / f"{name}.mp4"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    frames = [Watermark(PAYLOAD).embed(f) for f, _ in zip(read_video(path), range(50), strict=False)]
    small = [cv2.resize(f, (384, 384), interpolation=cv2.INTER_AREA) for f in frames]
    with VideoWriter(tmp_path / "small.mp4", 384, 384, crf=28) as video:
        for frame in small:
            video.write(frame)
    found = detect(read_video(tmp_path / "small.mp4"))
    assert found.present and found.payload == PAYLOAD
