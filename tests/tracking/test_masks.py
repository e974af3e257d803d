"""Person and head masks: the filter against its definition, drawn figures, the network on real pictures."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from hicode import assets
from hicode.errors import AssetError
from hicode.motion import FACE_OVAL, JAW
from hicode.tracking.masks import MaskConfig, Segmenter, _guided, head_mask, refine_edge

LANDMARKS = np.load(Path(__file__).parents[1] / "golden" / "mediapipe_landmarks.npz")["points_px"]
SHAPE = (288, 360)
CHIN, BROW = LANDMARKS[152], LANDMARKS[10]
HEIGHT = float(CHIN[1] - BROW[1])


def drawn_person(long_hair: bool) -> np.ndarray:
    """A figure around the golden landmarks: skull, neck, shoulders; long hair hangs to the shoulders on both sides."""
    mask = np.zeros(SHAPE, np.uint8)
    x, y = LANDMARKS[:468, :2].mean(0)
    skull = (int(x), int(y - 0.1 * HEIGHT))
    cv2.ellipse(mask, skull, (int(0.48 * HEIGHT), int(0.75 * HEIGHT)), 0, 0, 360, 255, -1)
    mask[int(CHIN[1] + 0.1 * HEIGHT) :] = 0  # the ellipse's own lower end
    cv2.rectangle(mask, (int(x - 0.25 * HEIGHT), int(y)), (int(x + 0.25 * HEIGHT), SHAPE[0]), 255, -1)
    shoulders = np.array(
        [
            [x - 0.3 * HEIGHT, CHIN[1] + 5],
            [x + 0.3 * HEIGHT, CHIN[1] + 5],
            [x + 1.2 * HEIGHT, 287],
            [x - 1.2 * HEIGHT, 287],
        ]
    )
    cv2.fillPoly(mask, [shoulders.astype(np.int32)], 255)
    if long_hair:
        for side in (-1, 1):
            first, last = sorted((x + side * 0.4 * HEIGHT, x + side * 0.75 * HEIGHT))
            cv2.rectangle(mask, (int(first), int(y - 0.3 * HEIGHT)), (int(last), SHAPE[0]), 255, -1)
    return mask


def test_the_guided_filter_is_its_definition():
    """Least squares of the mask on the colours in every window, averaged, at half size as the fast one."""
    rng = np.random.default_rng(0)
    guide = cv2.GaussianBlur(rng.uniform(0, 1, (32, 40, 3)).astype(np.float32), (0, 0), 1.5)
    mask = cv2.GaussianBlur(rng.uniform(0, 1, (32, 40)).astype(np.float32), (0, 0), 2)
    radius, eps = 5, 1e-3
    half_guide, half_mask = (cv2.resize(a, (20, 16), interpolation=cv2.INTER_AREA) for a in (guide, mask))
    pad = radius // 2
    g = np.pad(half_guide, ((pad, pad), (pad, pad), (0, 0)), "symmetric").astype(np.float64)
    q = np.pad(half_mask, pad, "symmetric").astype(np.float64)
    fitted = np.zeros((16, 20, 4), np.float32)
    for i in range(16):
        for j in range(20):
            colours, values = (
                g[i : i + radius, j : j + radius].reshape(-1, 3),
                q[i : i + radius, j : j + radius].ravel(),
            )
            centred = colours - colours.mean(0)
            a = np.linalg.solve(
                centred.T @ centred / len(values) + eps * np.eye(3), centred.T @ (values - values.mean()) / len(values)
            )
            fitted[i, j] = [*a, values.mean() - a @ colours.mean(0)]
    mean = cv2.blur(fitted, (radius, radius), borderType=cv2.BORDER_REFLECT)
    full = cv2.resize(mean, (40, 32))
    expected = (full[..., :3] * guide).sum(-1) + full[..., 3]
    # float32 variances of the windows: three digits of the 1e-3 that regularises them.
    np.testing.assert_allclose(_guided(mask, guide, radius, eps), expected, atol=5e-3)


def test_a_coarse_edge_moves_onto_the_pictures():
    """A disc's mask, displaced by 3 px and blurred as the network's is, comes back to the disc."""
    y, x = np.mgrid[:256, :256]
    disc = np.hypot(x - 128, y - 128) < 80
    frame = np.where(disc[..., None], (200, 150, 120), (40, 60, 90)).astype(np.uint8)
    frame = np.clip(frame + np.random.default_rng(0).normal(0, 4, frame.shape), 0, 255).astype(np.uint8)
    coarse = np.roll(cv2.GaussianBlur(disc.astype(np.float32), (0, 0), 3), 3, 1)
    refined = refine_edge(coarse, frame, MaskConfig(edge_radius=10 / max(coarse.shape)))
    errors = [np.abs(mask - disc).mean() for mask in (coarse, refined)]
    assert errors[1] < 0.5 * errors[0], errors


def test_the_head_ends_at_the_jaw_and_the_shoulders_stay_out():
    head = head_mask(drawn_person(long_hair=False), LANDMARKS)
    oval = np.zeros(SHAPE, np.uint8)
    cv2.fillPoly(oval, [LANDMARKS[FACE_OVAL, :2].round().astype(np.int32)], 1)
    assert (head[cv2.erode(oval, np.ones((3, 3))) > 0] > 250).all()  # the face is whole
    assert head[int(BROW[1] - 0.2 * HEIGHT), int(BROW[0])] == 255  # so is the skull
    assert (head[int(CHIN[1] + 0.06 * HEIGHT) :] == 0).all()  # nothing below the chin
    for i in (172, 397):  # neck beneath the corners of the jaw
        x, y = LANDMARKS[i, :2]
        assert head[int(y + 0.12 * HEIGHT), int(x)] == 0


def test_the_edge_is_soft():
    head = head_mask(drawn_person(long_hair=False), LANDMARKS)
    column = head[int(CHIN[1]) - 6 : int(CHIN[1]) + 12, int(CHIN[0])].astype(int)
    assert ((column > 10) & (column < 245)).sum() >= 2
    assert np.abs(np.diff(column)).max() < 200


def test_hair_that_hangs_below_the_mouth_stays_with_the_body():
    head = head_mask(drawn_person(long_hair=True), LANDMARKS).astype(int)
    x, corner = LANDMARKS[:468, 0].mean(), LANDMARKS[[132, 361], 1].mean()
    for side in (-1, 1):
        column = head[:, int(x + side * 0.6 * HEIGHT)]
        start = int(LANDMARKS[:468, 1].mean() - 0.2 * HEIGHT)
        cut = start + int(np.argmax(column[start:] < 128))  # in the head's upright, which leans
        assert abs(cut - corner - 0.05 * HEIGHT) < 0.2 * HEIGHT and cut < CHIN[1]
        assert column[cut - int(0.04 * HEIGHT)] > 240 and column[cut + int(0.09 * HEIGHT) :].max() < 10
        # its lower half is long drawn, and never more than half: there the frame shows through
        fading = column[cut : cut + int(0.04 * HEIGHT)]
        assert fading.min() > 20 and (np.diff(fading) <= 0).all() and -np.diff(fading[1:]).max() < 40


def test_the_cut_turns_with_the_head():
    person = drawn_person(long_hair=True)
    centre = LANDMARKS[:468, :2].mean(0)
    turn = cv2.getRotationMatrix2D((float(centre[0] - 0.5), float(centre[1] - 0.5)), 15, 1)  # by index
    points = (LANDMARKS[:, :2] - 0.5) @ turn[:, :2].T + turn[:, 2] + 0.5
    turned_after = cv2.warpAffine(head_mask(person, LANDMARKS), turn, SHAPE[::-1])
    turned_before = head_mask(cv2.warpAffine(person, turn, SHAPE[::-1]), points)
    apart = np.abs(turned_after.astype(int) - turned_before)
    assert apart.mean() < 2.0  # of 255: resampling along the outline
    assert (apart > 100).mean() < 0.002


def test_the_cut_moves_smoothly_with_the_landmarks():
    """A pixel more or less in the landmarks moves the edge by about a pixel, nowhere else anything."""
    person = drawn_person(long_hair=True)
    first = head_mask(person, LANDMARKS).astype(int)
    for shift in ([1, 0], [0, 1], [-1, -1]):
        moved = head_mask(person, LANDMARKS[:, :2] + shift)
        assert np.abs(moved - first).mean() < 2.5


def test_a_face_cut_off_by_the_frame_is_no_error():
    person = np.full((200, 200), 255, np.uint8)
    for shift in ([0, 60], [-150, 0], [0, -150]):
        mask = head_mask(person, LANDMARKS[:, :2] + shift)
        assert mask.shape == (200, 200)


def test_an_empty_person_leaves_the_face():
    mask = head_mask(np.zeros(SHAPE, np.uint8), LANDMARKS)
    x, y = LANDMARKS[JAW, :2].mean(0)
    assert mask[int(y) - 20, int(x)] == 255


@pytest.fixture(scope="module")
def frames() -> list[np.ndarray]:
    try:
        path = assets.path("demo_video", "franck.mp4")
    except AssetError as error:
        pytest.skip(f"the demo video cannot be fetched here: {error}")
    with av.open(str(path)) as video:
        return [f.to_ndarray(format="rgb24") for f, _ in zip(video.decode(video=0), range(10), strict=False)]


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    try:
        return Segmenter()
    except AssetError as error:
        pytest.skip(f"the segmentation network cannot be fetched here: {error}")


def test_the_person_is_found(segmenter, frames):
    mask = segmenter.person(frames[0])
    assert mask.shape == frames[0].shape[:2] and mask.dtype == np.uint8
    inside = LANDMARKS[:, :2].astype(int)
    assert (mask[inside[:, 1], inside[:, 0]] > 250).mean() > 0.99
    assert mask[:20, :60].max() < 5 and mask[:20, -60:].max() < 5
    assert mask[-5:, 150:220].min() > 250  # the body


def test_a_videos_masks_flicker_less(segmenter, frames):
    """A camera pans over a still picture: on the picture, the masks should stand still."""
    steps = [2 * k for k in range(10)]
    pan = [np.ascontiguousarray(frames[0][:, k : k + 320]) for k in steps]

    def flicker(masks) -> float:
        common = [mask[:, 18 - k : 300 - k].astype(int) for mask, k in zip(masks, steps, strict=True)]
        return float(np.mean([np.abs(a - b).mean() for a, b in zip(common[1:], common, strict=False)]))

    assert flicker(list(segmenter.persons(pan))) < 0.8 * flicker([segmenter.person(f) for f in pan])
