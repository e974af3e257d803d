"""SyncNet: shapes and weights of the towers, sound features against their published form, crop, known offsets."""

import numpy as np
import pytest
import torch
from research.compare import syncnet
from research.compare.syncnet import MAX_OFFSET, MIN_FRAMES, AVConf, LipStream, SyncNet, crop, crop_boxes, mfcc, score

from hicode.errors import FileFormatError


def sound(seconds: float = 1.0) -> np.ndarray:
    """A formula, so the golden values can be made again: a swelling chirp, noise, and a hole of digital silence."""
    n = round(16000 * seconds)
    t = np.arange(n) / 16000
    x = 0.3 * np.sin(2 * np.pi * (180 + 400 * t) * t) * (0.6 + 0.4 * np.cos(2 * np.pi * 3 * t))
    x = x + 0.02 * np.sin(91.3 * np.arange(n) ** 1.5)
    x[4000:5000] = 0
    return x.astype(np.float32)


# By hand: python_speech_features 0.6, mfcc(int16 samples, 16000) with its defaults, rounded to 5 digits. SyncNet was
# taught on these.
GOLDEN = {
    0: [
        18.72139, -10.26704, 22.83578, 18.13494, 10.99521, 1.21366, -1.81971, -4.54879, -11.75082, -17.09437, -16.85954,
        -22.07382, -17.42789,
    ],
    10: [
        18.46314, -17.20434, 19.02288, 7.5083, -1.72875, -3.32423, -4.80817, -24.97838, -33.56832, -22.91499, -18.62549,
        -11.23136, -3.08501,
    ],
    27: [-36.04365, *[0.0] * 12],
    60: [
        20.07156, -5.68704, 7.50498, -22.81156, -28.57911, -19.2279, 7.74457, 28.07609, 23.40807, 6.07344, -10.33884,
        -22.87527, -14.42451,
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def net() -> SyncNet:
    torch.manual_seed(3)
    return SyncNet()


# ------------------------------------------------------------------------------------------------------------ the sound


def test_cepstra_are_those_of_the_published_recipe():
    found = mfcc(sound())
    assert found.shape == (99, 13)
    for row, wanted in GOLDEN.items():
        # sin of large arguments differs in the last bits between machines: the 16-bit samples may differ by one step
        assert found[row] == pytest.approx(wanted, abs=2e-3)


def test_cepstra_of_one_frame_are_the_definition():
    """Frame 10 by its definition, term by term: no FFT, no library's DCT."""
    x = np.round(sound().astype(np.float64) * 32768)
    x = np.concatenate([x[:1], x[1:] - 0.97 * x[:-1]])[1600:2000]
    n, k = np.arange(400), np.arange(257)
    power = np.abs((x * np.exp(-2j * np.pi * k[:, None] * n / 512)).sum(1)) ** 2 / 512
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    corner = np.floor(513 * 700 * (10 ** (mel / 2595) - 1) / 16000)
    bands = []
    for j in range(26):
        up = [
            (i - corner[j]) / (corner[j + 1] - corner[j]) * power[i] for i in range(int(corner[j]), int(corner[j + 1]))
        ]
        down = [
            (corner[j + 2] - i) / (corner[j + 2] - corner[j + 1]) * power[i]
            for i in range(int(corner[j + 1]), int(corner[j + 2]))
        ]
        bands.append(np.log(sum(up) + sum(down)))
    wanted = [
        (1 + 11 * np.sin(np.pi * c / 22))
        * np.sqrt(2 / 26)
        * sum(b * np.cos(np.pi * c * (j + 0.5) / 26) for j, b in enumerate(bands))
        for c in range(1, 13)
    ]
    assert mfcc(sound())[10] == pytest.approx([np.log(power.sum()), *wanted], rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- the towers


def test_both_towers_end_in_1024_numbers(net):
    assert net.see(torch.zeros(2, 3, 5, 224, 224)).shape == (2, 1024)
    assert net.hear(torch.from_numpy(mfcc(sound()))).shape == (20, 1024)  # 99 rows: windows of 20 start at 0, 4 ... 76


def test_random_weights_of_the_right_shapes_come_back_through_a_file(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "syncnet_v2.model")
    again = SyncNet.load(tmp_path / "syncnet_v2.model")
    windows = torch.rand(1, 3, 5, 224, 224) * 255
    assert torch.equal(net.see(windows), again.see(windows))
    old = {k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    torch.save(old, tmp_path / "old.model", _use_new_zipfile_serialization=False)  # the format of the authors' time
    assert torch.equal(SyncNet.load(tmp_path / "old.model").see(windows), net.see(windows))


class _Runs:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_other_files_are_refused_by_name_and_run_nothing(net, tmp_path, capsys):
    def refused(content, finding):
        file = tmp_path / "w.model"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(FileFormatError, match=finding) as caught:
            SyncNet.load(file)
        assert "w.model" in str(caught.value) and "\n" not in str(caught.value)

    state = net.state_dict()
    refused(b"not weights", "plain tensors")
    refused({"a": _Runs()}, "plain tensors")
    refused([torch.zeros(3)], "holds a list")
    refused({k: v for k, v in state.items() if k != "netfclip.3.bias"}, "nothing for netfclip.3.bias")
    refused(state | {"netfclip.3.bias": torch.zeros(7)}, r"shape \(7,\)")
    refused(state | {"more": torch.zeros(7)}, "holds more")
    refused(state | {"netfclip.3.bias": torch.full((1024,), float("nan"))}, "not numbers")
    with pytest.raises(FileFormatError, match="does not exist"):
        SyncNet.load(tmp_path / "absent.model")
    assert "this must never run" not in capsys.readouterr().out


def test_a_stream_of_crops_sees_what_whole_windows_see(net):
    crops = np.random.default_rng(0).integers(0, 256, (7, 224, 224, 3), np.uint8)
    stream = LipStream(net)
    for picture in crops:
        stream.push(picture)
    windows = np.stack([crops[i : i + 5] for i in range(3)])[..., ::-1].copy()  # BGR, as it was taught
    wanted = net.see(torch.from_numpy(windows).permute(0, 4, 1, 2, 3).float())
    torch.testing.assert_close(stream.finish(), wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- the scoring


@pytest.mark.parametrize("planted", [-9, -1, 0, 4, 15])
def test_a_planted_offset_is_found(planted):
    """What is seen at frame i was heard at frame i - offset: the mouth is later."""
    rng = np.random.default_rng(1)
    heard = torch.from_numpy(rng.normal(size=(120, 16))).float()
    index = (torch.arange(90) + 15 - planted).clamp(0, 119)
    seen, heard = heard[index], heard[15:105]
    found = score(seen + 0.01 * torch.from_numpy(rng.normal(size=seen.shape)).float(), heard)
    assert found.offset_frames == planted
    # at the right offset next to nothing but the frames at the ends, elsewhere chance
    assert found.distance < found.confidence


def test_scores_are_the_definition():
    rng = np.random.default_rng(2)
    seen, heard = rng.normal(size=(40, 8)), rng.normal(size=(43, 8))
    means = []
    for shift in range(-MAX_OFFSET, MAX_OFFSET + 1):
        ahead = [heard[i + shift] if 0 <= i + shift < 40 else np.zeros(8) for i in range(40)]
        means.append(np.mean([np.linalg.norm(a - b) for a, b in zip(seen, ahead, strict=True)]))
    found = score(torch.from_numpy(seen).float(), torch.from_numpy(heard).float())
    assert found.distance == pytest.approx(min(means), abs=1e-4)
    assert found.confidence == pytest.approx(np.median(means) - min(means), abs=1e-4)
    assert found.offset_frames == -(int(np.argmin(means)) - MAX_OFFSET)


class Transparent(SyncNet):
    """Towers that pass on their input: a frame's brightness about 100, a frame's loudness about a usual one.

    Beyond its ends a clip is compared with zeros, so the mean must be there.
    """

    def see(self, windows):
        return windows.mean((1, 3, 4)) - 100

    def hear(self, rows):
        windows = rows[:, 0].unfold(0, 20, 4).float()
        return 8 * (windows.unflatten(1, (5, 4)).mean(2) - 18)


@pytest.mark.parametrize("planted", [0, 3, -5])
def test_windows_of_picture_and_sound_start_together(planted):
    """Crops as bright as the sound of `planted` frames before is loud: from files to an offset, without a slip."""
    rng = np.random.default_rng(4)
    frames, start = 60, 15
    level = rng.uniform(0.002, 0.5, frames + 40)
    samples = (np.repeat(level, 640) * np.sin(np.arange(len(level) * 640) / 3)).astype(np.float32)
    rows = mfcc(samples)[:, 0]
    loud = rows[: 4 * (frames + 30)].reshape(-1, 4).mean(1)
    bright = 100 + 8 * (loud[start - planted : start - planted + frames] - 18)
    pictures = [np.full((224, 224, 3), round(v), np.uint8) for v in bright.clip(0, 255)]
    found = avconf(Transparent(), pictures, samples[start * 640 : (start + frames) * 640].astype(np.float32))
    assert found.offset_frames == planted and found.confidence > 5


def avconf(net, pictures, samples):
    stream = LipStream(net)
    for picture in pictures:
        stream.push(picture)
    got = stream.score(samples)
    return got if isinstance(got, str) else AVConf(**got)


def test_short_clips_have_no_score(net):
    assert (
        avconf(Transparent(), [np.zeros((224, 224, 3), np.uint8)] * (MIN_FRAMES - 1), sound(3))
        == "35 frames, at least 36 are needed"
    )
    # the sound ends first
    assert avconf(Transparent(), [np.zeros((224, 224, 3), np.uint8)] * 60, sound(1)).startswith("25 frames")


# ------------------------------------------------------------------------------------------------------------- the crop


def test_a_crop_has_the_face_where_syncnet_wants_it():
    """A box of side 2 s at (x, y): columns x ± 1.4 s, rows from y - s to y + 1.8 s."""
    frame = np.zeros((300, 400, 3), np.uint8)
    frame[..., 0], frame[..., 1] = np.arange(400) % 256, (np.arange(300) % 256)[:, None]
    got = crop(frame, np.array([200.0, 120.0, 50.0]))
    assert got.shape == (224, 224, 3)
    x, y = got[..., 0].astype(float), got[..., 1].astype(float)
    assert x[100, [0, -1]] == pytest.approx([130, 13], abs=1)  # 269 is written as 13
    assert y[[0, -1], 100] == pytest.approx([70, 209], abs=1)


def test_outside_the_frame_is_grey():
    got = crop(np.zeros((100, 100, 3), np.uint8), np.array([5.0, 50.0, 30.0]))
    assert (got[:, :80] == syncnet.PAD_LEVEL).all() and (got[100:120, 120:] == 0).all()


def test_boxes_bridge_gaps_and_ignore_one_wild_frame():
    rng = np.random.default_rng(0)
    face = rng.uniform(-50, 50, (478, 3))
    face[:2, :2] = [[-60, -40], [60, 60]]
    points = np.stack([face + [200 + 2 * t, 150, 0] for t in range(40)])
    points[10:13] = np.nan
    points[25] += 300
    boxes = crop_boxes(points)
    inside = boxes[8:32]
    assert np.isfinite(boxes).all()
    # a running median of a slope about an outlier: one step off
    assert inside[:, 0] == pytest.approx(200 + 2 * np.arange(8, 32), abs=2.1)
    assert inside[:, 1] == pytest.approx(150 + (face[:468, 1].min() + face[:468, 1].max()) / 2, abs=1e-6)
    assert inside[:, 2] == pytest.approx(60, abs=1e-6)
    assert np.isnan(crop_boxes(np.full((5, 478, 3), np.nan))).all()
