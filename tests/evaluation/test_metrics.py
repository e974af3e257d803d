"""The measures, and the traps in them: a pasted background, means of logarithms, frames without a face, clips of other
lengths."""

import numpy as np
import pytest
import torch

from hicode import assets
from hicode.errors import InputError
from hicode.evaluation import lips
from hicode.evaluation.images import Truth, box_mask, grown, mean_of_frames, psnr, seam_error, ssim, to_tensor
from hicode.motion import LEFT_EYE_OUTER, LIPS, LOWER_LIP_INNER, RIGHT_EYE_OUTER, UPPER_LIP_INNER

needs_lpips = pytest.mark.skipif(
    not assets.is_cached("perceptual"),
    reason="the asset `perceptual` is not in the cache: `hicode assets pull perceptual`",
)


def lpips_distance(image, truth) -> float:
    from hicode.perceptual import lpips

    with torch.inference_mode():
        return float(lpips("alexnet")(to_tensor(image), to_tensor(truth)))


def scene(seed=0, height=96, width=128):
    """A smooth random image and a noisy copy, uint8."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 6, 8), np.float32))
    truth = (
        torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1).permute(1, 2, 0).numpy()
    )
    image = np.clip(truth + rng.normal(0, 0.05, truth.shape), 0, 1)
    return (image * 255 + 0.5).astype(np.uint8), (truth * 255 + 0.5).astype(np.uint8)


# --------------------------------------------------------------------------------------------------------------- images


def test_psnr_of_a_constant_tenth_is_20_db():
    a = np.full((32, 32, 3), 0, np.uint8)
    # 25.5 / 255 is not a uint8 value; 51 / 255 = 0.2 is: 20 log10(5) dB
    assert psnr(a + 51, a) == pytest.approx(20 * np.log10(5), abs=1e-9)
    half = a.copy()
    half[:16] = 51  # half the pixels off by 0.2: an MSE of 0.02
    assert psnr(half, a) == pytest.approx(-10 * np.log10(0.02), abs=1e-9)
    assert psnr(a, a) == float("inf")
    assert np.isnan(psnr(a, a, np.zeros((32, 32), bool)))


def test_a_pasted_background_inflates_psnr_by_its_share():
    """A region of fraction f wrong, the rest exact: the frame's PSNR is the region's minus 10 log10 f. This is why
    regions are reported."""
    image, truth = scene()
    mask = box_mask((40, 30, 72, 62), 96, 128)
    pasted = np.where(mask[..., None], image, truth)
    f = mask.mean()
    assert psnr(pasted, truth) - psnr(image, truth, mask) == pytest.approx(-10 * np.log10(f), abs=1e-9)
    assert psnr(pasted, truth, mask) == psnr(image, truth, mask)


def test_the_mean_of_psnrs_is_not_the_psnr_of_the_mean():
    a = np.zeros((16, 16, 3), np.uint8)
    frames = [a + 1, a + 51]
    mean = mean_of_frames([psnr(f, a) for f in frames])
    pooled = -10 * np.log10(np.mean([((f / 255.0) ** 2).mean() for f in frames]))
    assert mean == pytest.approx((48.1308 + 13.9794) / 2, abs=1e-3)
    assert mean > pooled + 10


def test_means_leave_unknown_frames_out_and_infinity_has_no_number():
    assert mean_of_frames([1.0, float("nan"), 3.0]) == 2.0
    assert mean_of_frames([float("nan")]) is None
    assert mean_of_frames([float("inf"), float("inf")]) is None


@pytest.mark.parametrize("size", [(96, 128), (33, 20)])
def test_ssim_equals_scikit_image(size):
    from skimage.metrics import structural_similarity

    image, truth = scene(1, *size)
    wanted = structural_similarity(
        image / 255.0,
        truth / 255.0,
        channel_axis=2,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim(image, truth) == pytest.approx(wanted, abs=1e-12)  # both in float64
    assert ssim(truth, truth) == pytest.approx(1, abs=1e-12)


def test_ssim_over_a_mask_is_scikit_images_map_over_it():
    from skimage.metrics import structural_similarity

    image, truth = scene(7)
    mask = box_mask((60, 40, 100, 80), 96, 128)
    _, whole = structural_similarity(
        image / 255.0, truth / 255.0, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert ssim(image, truth, mask) == pytest.approx(whole.mean(2)[mask].mean(), abs=1e-12)


@needs_lpips
def test_lpips_is_its_definition_in_numpy():
    """AlexNet without torch: unit features, squared differences weighted by the heads, summed."""
    from hicode.perceptual import LPIPS_LAYERS, load_weights

    weights = {k: v.double().numpy() for k, v in load_weights("alexnet").items()}
    image, truth = scene(6, 80, 72)

    def convolved(x, name, stride, padding):
        kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
        windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
        return np.maximum(np.einsum("chwij,ocij->ohw", windows, kernel, optimize=True) + bias[:, None, None], 0)

    def pooled(x):
        return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((3, 4))

    def features(picture):
        # the package takes [-1, 1] and standardises by its own shift and scale; that is ImageNet's mean and deviation
        # on [0, 1]
        x = 2 * (picture.transpose(2, 0, 1) / 255.0) - 1
        x = (x - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
        maps = [convolved(x, "relu1", 4, 2)]
        maps.append(convolved(pooled(maps[-1]), "relu2", 1, 2))
        maps.append(convolved(pooled(maps[-1]), "relu3", 1, 1))
        maps.append(convolved(maps[-1], "relu4", 1, 1))
        maps.append(convolved(maps[-1], "relu5", 1, 1))
        return [m / (np.sqrt((m**2).sum(0)) + 1e-10) for m in maps]

    wanted = sum(
        (weights[f"lpips.{name}"][:, None, None] * (a - b) ** 2).sum(0).mean()
        for name, a, b in zip(LPIPS_LAYERS["alexnet"], features(image), features(truth), strict=True)
    )
    assert 0.05 < wanted < 1
    assert lpips_distance(image, truth) == pytest.approx(wanted, abs=1e-4)


def test_ssim_over_a_mask_looks_at_the_mask():
    image, truth = scene(2)
    mask = box_mask((60, 40, 100, 80), 96, 128)
    beside = np.where(box_mask((0, 0, 40, 96), 96, 128)[..., None], image, truth)
    assert ssim(beside, truth, mask) == pytest.approx(1, abs=1e-12)
    assert ssim(image, truth, mask) < 0.99


@needs_lpips
def test_regions_of_one_comparison_are_the_measures_by_themselves():
    image, truth = scene(3, 160, 160)
    head = np.zeros((160, 160), np.uint8)
    head[20:140, 30:130] = 255
    box = (60, 90, 100, 120)
    found = Truth(truth, head, box).compare(image)
    mouth = box_mask(box, 160, 160)
    assert found["frame"]["psnr"] == psnr(image, truth)
    assert found["head"]["psnr"] == psnr(image, truth, head >= 128)
    assert found["mouth"]["psnr"] == psnr(image, truth, mouth)
    assert found["frame"]["ssim"] == pytest.approx(ssim(image, truth))
    assert found["head"]["ssim"] == pytest.approx(ssim(image, truth, head >= 128))
    assert found["mouth"]["ssim"] == pytest.approx(ssim(image, truth, mouth))
    assert found["frame"]["lpips"] == pytest.approx(lpips_distance(image, truth), rel=1e-5)
    x0, y0, x1, y1 = grown(box, 160, 160)
    assert (x1 - x0, y1 - y0) == (64, 64)
    assert found["mouth"]["lpips"] == pytest.approx(
        lpips_distance(image[y0:y1, x0:x1].copy(), truth[y0:y1, x0:x1].copy()), rel=1e-5
    )


@needs_lpips
def test_the_truth_against_itself_is_perfect_and_an_empty_head_unknown():
    _, truth = scene(4)
    found = Truth(truth, np.zeros((96, 128), np.uint8), (40, 40, 80, 70)).compare(truth)
    assert found["frame"] == {"psnr": float("inf"), "ssim": pytest.approx(1), "lpips": 0}
    assert all(np.isnan(v) for v in found["head"].values())


@needs_lpips
def test_a_frame_without_a_face_counts_for_the_frame_alone():
    image, truth = scene(4)
    found = Truth(truth, None, None).compare(image)
    assert found["frame"]["psnr"] == psnr(image, truth)
    assert all(np.isnan(v) for region in ("head", "mouth") for v in found[region].values())


@pytest.mark.wrong_shapes
def test_images_of_other_sizes_and_kinds_are_refused():
    a = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match="The image is 32x16, the truth 32x32"):
        psnr(a[:16], a)
    with pytest.raises(InputError, match="not uint8 RGB"):
        ssim(a.astype(np.float32), a)
    with pytest.raises(InputError, match="at least 64 px"):
        Truth(a, a[..., 0], (0, 0, 4, 4))


def test_a_box_grows_inside_the_image():
    assert grown((0, 0, 10, 10), 100, 100) == (0, 0, 64, 64)
    assert grown((90, 40, 100, 50), 100, 100) == (36, 13, 100, 77)
    assert grown((10, 10, 90, 90), 100, 100) == (10, 10, 90, 90)
    assert grown((0, 0, 10, 10), 40, 50) == (0, 0, 50, 40)


def test_the_seam_sees_an_edge_at_the_boundary_and_nothing_elsewhere():
    truth = scene(5)[1]
    region = np.zeros((96, 128), np.uint8)
    region[30:70, 40:90] = 255
    brighter = np.where(region[..., None] > 0, np.minimum(truth.astype(int) + 20, 255), truth).astype(np.uint8)
    inside = truth.copy()
    inside[48:52, 60:66] = 255 - inside[48:52, 60:66]
    assert seam_error(truth, truth, region) == 0
    assert seam_error(inside, truth, region) == 0
    assert seam_error(brighter, truth, region) > 0.003  # a step of 20/255 on one pixel in eight or so of the band
    assert np.isnan(seam_error(truth, truth, np.zeros_like(region)))


# ----------------------------------------------------------------------------------------------------------------- lips


def faces(t=12, seed=0):
    """t frames of 478 points: a random face that nods, turns and speaks."""
    rng = np.random.default_rng(seed)
    shape = rng.normal(0, 60, (478, 3)) + [256, 256, 0]
    shape[RIGHT_EYE_OUTER], shape[LEFT_EYE_OUTER] = [200, 220, 0], [300, 220, 0]
    shape[UPPER_LIP_INNER], shape[LOWER_LIP_INNER] = [250, 320, 0], [250, 321, 0]
    points = np.repeat(shape[None], t, 0)
    points[:, LOWER_LIP_INNER, 1] += 10 * (1 - np.cos(np.arange(t)))
    return points


def test_lmd_ignores_where_the_mouth_is_and_sees_its_shape():
    truth = faces()
    moved = truth + [7, -3, 0]
    assert lips.lip_distance(moved, truth).px == pytest.approx(0, abs=1e-9)
    wrong = truth.copy()
    wrong[:, LIPS[0], 0] += 4  # one of 40 points by 4 px: it is 4 · 39/40 off its mean, the others 4/40 each
    found = lips.lip_distance(wrong, truth)
    assert found.px == pytest.approx((4 * 39 / 40 + 39 * 4 / 40) / 40)
    assert found.iod == pytest.approx(found.px / 100)
    assert lips.lip_distance(wrong, truth, width_px=256).px == pytest.approx(2 * found.px)
    assert lips.lip_distance(wrong, truth, width_px=256).iod == pytest.approx(found.iod)


def test_a_frame_without_a_face_is_counted_not_scored():
    truth, predicted = faces(), faces() + np.where(np.arange(478)[:, None] % 2 == 0, 1.0, -1.0)
    whole = lips.lip_distance(predicted, truth)
    predicted[3], truth[7] = np.nan, np.nan
    found = lips.lip_distance(predicted, truth)
    assert found.missed == 2 and found.frames == 12
    assert found.px == pytest.approx(whole.px)
    assert lips.lip_distance(np.full_like(truth, np.nan), truth) == lips.LipDistance(None, None, 12, 12)


@pytest.mark.wrong_shapes
def test_clips_of_other_lengths_are_refused():
    with pytest.raises(InputError, match="The prediction has 11 frames, the truth 12"):
        lips.lip_distance(faces(11), faces(12))


def test_jitter_is_of_the_face_not_of_the_head():
    """A head that moves, turns and comes nearer has none; noise of σ per coordinate has about σ √6 √(π/2) (second
    difference of a plane's noise)."""
    still = faces()[:1].repeat(40, 0)
    t = np.arange(40)
    turn = np.exp(1j * 0.3 * np.sin(t / 5)) * (1 + 0.1 * np.sin(t / 7))
    z = (still[..., 0] + 1j * still[..., 1]) * turn[:, None] + (30 * np.sin(t / 3))[:, None]
    moving = np.stack([z.real, z.imag], -1)
    assert lips.jitter(moving) < 1e-9
    noise = np.random.default_rng(1).normal(0, 0.5, (40, 478, 2))
    # the first two frames' mean shape and 4 fitted parameters take a little away; the head's scale varies by a tenth
    assert lips.jitter(still[..., :2] + noise) == pytest.approx(0.5 * np.sqrt(6) * np.sqrt(np.pi / 2), rel=0.05)
    gap = still[..., :2] + noise
    gap[5] = np.nan
    assert lips.jitter(gap) == pytest.approx(lips.jitter(still[..., :2] + noise), rel=0.1)
    assert lips.jitter(gap[:2]) is None


def test_closure_counts_what_was_due():
    gap = np.full(20, 0.2)
    gap[[4, 11]] = 0.01
    gap[15:19] = np.nan
    found = lips.closure(gap, [(3, 6), (7, 9), (10, 11), (16, 18)])
    assert (found.hits, found.due, found.unknown) == (2, 3, 1)
    assert found.recall == pytest.approx(2 / 3)
    assert lips.closure(gap, []).recall is None
    with pytest.raises(InputError, match="there are 20"):
        lips.closure(gap, [(18, 25)])


def test_a_mouth_that_never_opens_recalls_every_closure_and_pays_for_it():
    shut, due = np.zeros(40), [(10, 12), (20, 22)]
    found = lips.closure(shut, due)
    assert found.recall == 1 and found.elsewhere == 1
    speaking = np.full(40, 0.2)
    speaking[[10, 20]] = 0
    assert lips.closure(speaking, due).recall == 1 and lips.closure(speaking, due).elsewhere == 0


def test_a_resting_mouth_has_no_motion_in_silence():
    gap = np.concatenate([np.full(20, 0.05), 0.1 + 0.05 * np.sin(np.arange(30))])
    silent = np.arange(50) < 20
    assert lips.motion_in_silence(gap, silent) == 0
    assert lips.motion_in_silence(gap, np.zeros(50, bool)) is None


def test_silence_is_what_lasts_and_lies_under_the_speech():
    rms = np.full(40, 0.1)
    rms[10:20], rms[25:28] = 0.001, 0.001  # a pause, and a closure of three frames
    found = lips.silent_frames(rms, 0.1)
    assert found[10:20].all() and found.sum() == 10
    assert not lips.silent_frames(np.full(40, 0.02), 0.1).any()  # 14 dB under is quiet speech


def test_a_mouth_that_moves_as_much_in_silence_as_in_speech_has_a_ratio_of_one():
    gap = np.where(np.arange(60) % 2, 0.1, 0.2)
    assert lips.motion_in_silence(gap, np.arange(60) < 30) == pytest.approx(1)


def test_closures_are_due_where_the_alignment_has_them(tmp_path):
    phones = tmp_path / "a.txt"
    phones.write_text("0.00 0.40 sil\n0.40 0.48 B\n0.48 0.60 IH1\n0.60 0.68 n\n1.00 1.04 m0\n\n5.0 5.1 P\n")
    assert lips.closures_due(phones, 0, 100) == [(10, 12), (25, 26)]  # the last is past the end
    assert lips.closures_due(phones, 20, 100) == [(5, 6)]  # the test part starts at frame 20
    assert lips.closures_due(phones, 0, 100, offset_frames=2.0) == [(12, 14), (27, 28)]  # the mouth is later
    words = tmp_path / "b.align"
    words.write_text("0 23750 sil\n25000 29500 bin\n29500 34000 now\n35000 40000 m\n")
    # "bin" at its start (frame 25), "em" at its end (frame 40)
    assert lips.closures_due(words, 0, 75) == [(23, 27), (38, 42)]
    (tmp_path / "bad.txt").write_text("0.1 0.2 P\n0.3 P\n")
    with pytest.raises(InputError, match="line 2"):
        lips.closures_due(tmp_path / "bad.txt", 0, 75)
    with pytest.raises(InputError, match="does not exist"):
        lips.closures_due(tmp_path / "absent.txt", 0, 75)


def test_correlation_needs_something_to_go_by():
    a = np.sin(np.arange(30.0))
    b = 2 * a + 1
    b[4] = np.nan
    assert lips.correlation(a, b) == pytest.approx(1)
    assert lips.correlation(a, np.zeros(30)) is None
    assert lips.correlation(a[:5], b[:5]) is None


@pytest.fixture(scope="module")
def landmarker():
    if not (assets.is_cached("face_landmarks") and assets.is_cached("face_detection")):
        pytest.skip("the face networks are not in the cache: `hicode assets pull face_landmarks face_detection`")
    from hicode.tracking.landmarks import FaceLandmarker

    return FaceLandmarker()


def test_no_face_gives_no_landmarks(landmarker):
    found = lips.detect([np.zeros((128, 128, 3), np.uint8)], landmarker)
    assert found.shape == (1, 478, 3) and np.isnan(found).all()


@pytest.mark.clip
def test_a_real_face_is_found_and_an_empty_frame_between_is_missed(landmarker, markey):
    av = pytest.importorskip("av")
    with av.open(str(markey)) as video:
        frame = next(video.decode(video=0)).to_ndarray(format="rgb24")
    found = lips.detect([frame, np.zeros_like(frame), frame], landmarker)
    assert np.isfinite(found[[0, 2]]).all() and np.isnan(found[1]).all()
    assert lips.lip_distance(found, found).missed == 1
    shifted = lips.detect([np.roll(frame, 8, 1)], landmarker)
    # the network's own noise under another crop: 0.3 px on average over frames, more on some
    assert lips.lip_distance(shifted, found[:1]).px < 0.8
