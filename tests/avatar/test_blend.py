"""Composition: what must stay, what must not leak, and what the untrained generator is."""

import cv2
import numpy as np
import pytest
import torch

from hicode.avatar.blend import (
    FILL,
    LIGHT,
    RGB,
    SURFACE,
    SURROUND,
    blend_box,
    blend_region,
    compose,
    dilate_mask,
    estimate_background,
    face_mask,
    face_room,
    fill_smoothly,
    hidden_mask,
    plain_composite,
    with_whole_face,
)
from hicode.avatar.refiner import Compositor, CompositorConfig


def disc(size: int = 128, radius: float = 30, centre: tuple[float, float] | None = None) -> np.ndarray:
    """A soft-edged head mask."""
    cx, cy = centre or (size / 2, size / 2)
    y, x = np.mgrid[:size, :size] + 0.5
    return (255 * np.clip(radius + 0.5 - np.hypot(x - cx, y - cy), 0, 1)).astype(np.uint8)


def noise(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)


def scene(seed: int = 0, size: int = 128):
    """(rgb over black, alpha, frame, head mask, plate) of an orange disc before a smooth background."""
    rng = np.random.default_rng(seed)
    mask = disc(size)
    alpha = mask.astype(np.float32) / 255
    rgb = alpha[..., None] * np.float32([0.8, 0.5, 0.3])
    ramp = np.linspace(40, 200, size)[None, :, None] + np.linspace(0, 40, size)[:, None, None] + np.zeros(3)
    plate = ramp.astype(np.uint8)
    frame = np.clip(ramp + rng.integers(-3, 4, ramp.shape), 0, 255).astype(np.uint8)
    return rgb, alpha, frame, mask, plate


def trained_looking(seed: int = 0) -> Compositor:
    """A generator with a last layer that is not zero, so that it changes something."""
    torch.manual_seed(seed)
    compositor = Compositor()
    torch.nn.init.normal_(compositor.out.weight, std=0.02)
    return compositor.for_inference()


#  the outline ---------------------------------------------------------------------------------------------------------


def rendered_disc(centre: tuple[float, float], size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """A disc that is red on the left and blue on the right of the picture's middle: (rgb over black, alpha)."""
    alpha = disc(size, 60, centre).astype(np.float32) / 255
    left = np.arange(size) < size // 2
    return alpha[..., None] * np.where(
        left[None, :, None], np.float32([0.8, 0.1, 0.1]), np.float32([0.1, 0.1, 0.8])
    ), alpha


def test_a_faces_mask_is_about_its_hull_on_the_head():
    head, square = disc(512, 120, (256, 256)), np.float32([[200, 220], [300, 220], [300, 320], [200, 320]])
    mask = face_mask(face_room(head), square)
    # 4 px more than the hull
    assert (mask[218:322, 198:302] == 255).all() and mask[:214].max() == 0 and mask[:, 306:].max() == 0
    both = face_mask(face_room(head), square, square + [0, 40])  # the frame's face and the one that goes there
    assert (both[218:355, 200:300] == 255).all() and both[:214].max() == 0
    beyond = face_mask(face_room(head), square + [120, 0])
    assert beyond.max() == 255 and beyond[cv2.dilate(head, np.ones((21, 21), np.uint8)) == 0].max() == 0
    cut = head.copy()
    # hair that is cut by a slope, the cheek beside it too
    cut[300:, :] = np.clip(255 - 20 * np.arange(212), 0, 255)[:, None] * (head[300:] > 0)
    assert (face_mask(face_room(cut), square)[218:310, 200:300] == 255).all() and set(
        np.unique(face_mask(face_room(cut), square[:2], square[2:] - [0, 5])[300:320, 220:280])
    ) <= {0, 255}


def test_no_background_is_taken_from_a_cheek_that_the_head_mask_lacks():
    """Skin on a wall; the mask ends above the lower half of the face, as at a cut of hanging hair."""
    face = np.float32([[200, 200], [300, 200], [300, 320], [200, 320]])
    frame = np.full((512, 512, 3), 60, np.uint8)
    frame[200:320, 200:300] = 220
    mask = np.zeros((512, 512), np.uint8)
    mask[190:260, 190:310] = 255
    whole = with_whole_face(mask, face)
    assert (whole >= mask).all() and (whole[200:320, 200:300] == 255).all() and whole[326:].max() == 0
    plates = [estimate_background([frame], [m]) for m in (mask, whole)]
    assert plates[0][300, 250].min() > 200 and plates[1].max() <= 61


def test_a_composed_face_leaves_the_rest_of_the_head_as_it_is():
    rng = np.random.default_rng(0)
    frame, plate = rng.integers(0, 256, (2, 256, 256, 3), np.uint8)
    head, square = disc(256, 90, (128, 128)), np.float32([[100, 110], [150, 110], [150, 160], [100, 160]])
    rgb, alpha = rendered_disc((128, 128))
    mask = face_mask(face_room(head), square)
    out = compose(rgb, alpha, frame, mask, plate)
    x0, y0, x1, y1 = blend_box(mask)
    changed = (out != frame).any(-1)
    assert changed[112:158, 102:148].all() and not changed[:100].any() and not changed[:, 160:].any()
    assert not changed[:y0].any() and not changed[:, :x0].any() and not changed[y1:].any() and not changed[:, x1:].any()
    # where the whole head goes in
    assert (compose(rgb, alpha, frame, head, plate) != frame).any(-1)[70:100, 120:130].all()
    hair = np.ones((256, 256), bool)
    hair[60:200, 60:200] = False
    # what is rendered far from it does not matter
    np.testing.assert_array_equal(compose(rgb * ~hair[..., None], alpha * ~hair, frame, mask, plate), out)
    assert blend_box(np.zeros((256, 256), np.uint8)) is None


#  the composite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generator", [None, trained_looking()], ids=["plain", "generator"])
def test_pixels_outside_the_dilated_mask_are_the_inputs(generator):
    rgb, alpha, _, mask, plate = scene()
    frame = noise(np.random.default_rng(1))
    out = compose(rgb + 0.1, np.ones_like(alpha), frame, mask, plate, generator)
    outside = dilate_mask(mask) == 0
    assert outside.any() and np.array_equal(out[outside], frame[outside])
    assert not np.array_equal(out, frame)


@pytest.mark.parametrize("generator", [None, trained_looking()], ids=["plain", "generator"])
def test_no_input_pixel_of_the_hidden_region_can_leak(generator):
    rgb, alpha, frame, mask, plate = scene()
    inside = hidden_mask(mask) > 0
    assert (inside | (mask < 128)).all() and inside.sum() > (mask >= 128).sum()  # the whole head and a rim
    swapped = frame.copy()
    swapped[inside] = noise(np.random.default_rng(2))[inside]
    assert np.array_equal(
        compose(rgb, alpha, frame, mask, plate, generator), compose(rgb, alpha, swapped, mask, plate, generator)
    )


def test_hair_below_its_cut_is_the_frames_own():
    """A mask cut level with a long lower half (`head_mask`'s hair): the frame shows through it, up to the cut; an edge
    that is merely soft stays hidden.
    """
    rows = np.arange(200)[:, None] + np.zeros((1, 200))
    drawn = np.where(rows < 100, 255, np.clip(127 - 8 * (rows - 100), 0, 255)).astype(np.uint8)
    drawn[:, :40] = drawn[:, 160:] = 0
    soft = np.where(rows < 100, 255, np.clip(255 - 60 * (rows - 99), 0, 255)).astype(np.uint8)
    soft[:, :40] = soft[:, 160:] = 0
    for turned in (drawn, np.ascontiguousarray(drawn.T)):
        below, hidden = (turned > 0) & (turned <= 127), hidden_mask(turned) > 0
        assert hidden[turned > 127].all()
        middle = below.copy()
        middle[:, :50] = middle[:, 150:] = False
        if turned is drawn:
            assert not hidden[middle].any()
        else:
            assert hidden[60:140, 100].all()  # what falls sideways is an outline
    assert hidden_mask(soft)[100, 100] > 0


def test_untrained_generator_is_the_plain_composite():
    rgb, alpha, frame, mask, plate = scene()
    assert np.array_equal(
        compose(rgb, alpha, frame, mask, plate, Compositor()), compose(rgb, alpha, frame, mask, plate)
    )


def test_head_is_the_alpha_composite_over_the_background():
    rgb, alpha, _, mask, plate = scene()
    out = compose(rgb, alpha, plate, mask, plate)
    expected = 255 * (rgb + (1 - alpha)[..., None] * (plate / 255.0))
    # The frame is the plate, so the fill is the plate; uint8 rounding leaves half a level, the feather nothing (both
    # sides are equal).
    assert np.abs(out - expected).max() <= 0.51


def test_background_meets_a_brighter_frame_without_a_step():
    """The plate was taken under other light: the fill follows the frame at hand, so no edge shows where nothing was
    rendered.
    """
    _, alpha, _, mask, plate = scene()
    frame = np.clip(plate.astype(int) + 30, 0, 255).astype(np.uint8)
    out = compose(np.zeros((*mask.shape, 3), np.float32), np.zeros_like(alpha), frame, mask, plate)
    # a constant offset is carried exactly; rounding takes at most one level
    assert np.abs(out.astype(int) - frame).max() <= 1


def test_a_neck_beside_the_plates_wall_is_no_light_to_carry_on():
    """The head has sunk: the frame shows neck where the plate has wall, and below it the plate has neck as well. Skin
    less wall, added to that neck, was orange.
    """
    skin, wall = np.array([150, 115, 90], np.uint8), np.array([50, 115, 250], np.uint8)
    mask = disc(radius=24)
    plate, frame = np.broadcast_to(wall, (128, 128, 3)).copy(), np.broadcast_to(wall, (128, 128, 3)).copy()
    frame[60:] = skin
    plate[80:] = skin
    seam = blend_region(mask)
    fill = (
        255
        * plain_composite(
            np.zeros((128, 128, 3), np.float32), np.zeros((128, 128), np.float32), frame, plate, seam
        ).layers[..., FILL]
    )
    low, high = np.minimum(skin, wall), np.maximum(skin, wall)
    beyond = np.maximum(low - fill, fill - high).max()
    assert beyond < 1, f"a colour {beyond:.0f} levels beyond both (36 when all was taken for light)"
    edge = seam.hidden & ~cv2.erode(seam.hidden.astype(np.uint8), np.ones((3, 3))).astype(bool)
    assert np.abs(fill - frame[seam.window])[edge].mean() < 12, (
        "and it still meets the frame, but for the pixels that skin and wall share"
    )


def test_the_fill_is_its_formula():
    """Plate and light's membrane, and as far as the border shows something else the colours about; whole images instead
    of the kernels' blocks.
    """
    rng, (h, w) = np.random.default_rng(0), (63, 50)
    smooth = lambda: cv2.resize(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)
    frame, plate, mask = smooth(), smooth(), np.zeros((h, w), np.uint8)
    plate[:, :20] = np.clip(frame[:, :20].astype(int) + 15, 0, 255)  # a part that differs in its light alone
    mask[20:45, 12:40] = 255
    seam = blend_region(mask)
    found = plain_composite(np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.float32), frame, plate, seam).layers[
        ..., FILL
    ]
    f, p, readable = frame[seam.window] / 255, plate[seam.window] / 255, ~seam.hidden
    rows, columns = (f.shape[0] + 1) // 2, (f.shape[1] + 1) // 2
    mean_f, mean_p, known = np.zeros((rows, columns, 3)), np.zeros((rows, columns, 3)), np.zeros((rows, columns, 1))
    for i, j in np.argwhere(known[..., 0] == 0):
        block = np.s_[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        if readable[block].any():
            mean_f[i, j], mean_p[i, j], known[i, j] = (
                f[block][readable[block]].mean(0),
                p[block][readable[block]].mean(0),
                1,
            )
    other = known * np.clip((np.abs(mean_f - mean_p).max(-1, keepdims=True) - LIGHT) / (SURFACE - LIGHT), 0, 1)
    carried = lambda values, weight: fill_smoothly(
        (values * weight).astype(np.float32), weight[..., 0].astype(np.float32)
    )
    halves = carried(mean_f - mean_p, known - other), carried(np.concatenate([mean_f, other], -1), known)
    light, about = (
        cv2.resize(np.pad(m, ((0, 1), (0, 1), (0, 0)), mode="edge"), None, fx=2, fy=2)[: f.shape[0], : f.shape[1]]
        for m in halves
    )
    expected = p + light + about[..., 3:] * (about[..., :3] - p - light)
    interior = seam.hidden.copy()
    interior[-2:], interior[:, -2:] = False, False  # OpenCV's resize reads another neighbour at the last pixels
    assert np.abs(found - np.clip(expected, 0, 1))[interior].max() < 1e-5


def test_empty_mask_gives_the_frame_back():
    rgb, alpha, frame, mask, plate = scene()
    assert np.array_equal(compose(rgb, alpha, frame, np.zeros_like(mask), plate, trained_looking()), frame)


@pytest.mark.parametrize("where", [(0, 0), (127, 64), (64, 140), (20, 64)])
def test_heads_at_the_border_compose(where):
    rgb, alpha, frame, _, plate = scene()
    mask = disc(centre=where)
    out = compose(rgb, alpha, frame, mask, plate, trained_looking())
    outside = dilate_mask(mask) == 0
    assert out.shape == frame.shape and np.array_equal(out[outside], frame[outside])


@pytest.mark.parametrize("shape", [(96, 131), (70, 50), (33, 200)])
def test_any_image_size_composes(shape):
    rng = np.random.default_rng(0)
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : shape[1] // 2] = 255
    frame = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    out = compose(np.ones((*shape, 3), np.float32), np.ones(shape, np.float32), frame, mask, frame, trained_looking())
    assert out.shape == frame.shape and (out[mask > 0] != frame[mask > 0]).any()


def test_a_full_frame_mask_needs_no_background():
    rgb, alpha, frame, mask, plate = scene()
    out = compose(rgb, alpha, frame, np.full_like(mask, 255), plate)
    assert np.abs(out - 255 * (rgb + (1 - alpha)[..., None] * (plate / 255.0))).max() <= 0.51


def test_dilation_reaches_further_down_than_up():
    dilated = dilate_mask(disc(512, 100)) > 0
    rows = np.flatnonzero(dilated.any(1))
    above, below = 156 - rows[0], rows[-1] - 355
    # 12 px, and 6 more for the jaw; the soft edge and the chamfer metric take up to 2.
    assert 10 <= above <= 14 and 16 <= below <= 20


def test_dilation_contains_the_mask_and_grows_with_it():
    small, large = disc(radius=20), disc(radius=30)
    assert (dilate_mask(large)[large > 0] == 255).all()
    assert (dilate_mask(large) >= dilate_mask(small)).all()


def test_plate_is_the_background_that_a_moving_head_uncovers():
    rng = np.random.default_rng(0)
    background = np.tile(np.linspace(30, 220, 128)[None, :, None], (128, 1, 3)).astype(np.uint8)
    frames, masks = [], []
    for x in np.linspace(20, 108, 12):
        mask = disc(radius=18, centre=(x, 64))
        frame = np.where(mask[..., None] > 0, rng.integers(0, 256), background).astype(np.uint8)
        frames.append(frame), masks.append(mask)
    plate = estimate_background(iter(frames), iter(masks))
    assert np.abs(plate.astype(int) - background).max() <= 1  # every pixel is uncovered in some frame


def test_plate_fills_what_was_never_seen_smoothly():
    mask = disc(radius=30)
    background = np.tile(np.linspace(60, 180, 128)[:, None, None], (1, 128, 3)).astype(np.uint8)
    frame = np.where(mask[..., None] > 0, 255, background).astype(np.uint8)
    plate = estimate_background([frame] * 3, [mask] * 3)
    hole = mask > 0
    # a blend of what surrounds it, none of the head's white
    assert plate[hole].max() <= 185 and plate[hole].min() >= 55
    assert np.abs(np.diff(plate.astype(int), axis=0)).max() <= 6  # no step at the hole's border


def test_long_clips_take_bounded_memory_for_the_plate():
    """The number of kept frames is bounded: a generator of many small frames gives the plate of an even sample."""
    frames = (np.full((16, 16, 3), t % 200, np.uint8) for t in range(1000))
    plate = estimate_background(frames, (np.zeros((16, 16), np.uint8) for _ in range(1000)), max_frames=8)
    assert 60 <= plate[0, 0, 0] <= 140  # the median of an even sample of 0..199


def test_filling_keeps_the_known_and_invents_nothing_beyond_its_range():
    rng = np.random.default_rng(0)
    known = (rng.random((61, 47)) < 0.02).astype(np.float32)
    values = rng.random((61, 47, 3)).astype(np.float32) * known[..., None]
    filled = fill_smoothly(values, known)
    assert np.array_equal(filled[known > 0], values[known > 0])
    seen = values[known > 0]
    assert filled.min() >= seen.min() - 1e-6 and filled.max() <= seen.max() + 1e-6


def test_filling_takes_as_much_of_each_value_as_is_known_of_it():
    known = np.float32([[1, 0.25, 0, 0.5]] * 4)
    values = np.random.default_rng(0).random((4, 4, 2), np.float32)
    filled = fill_smoothly(values * known[..., None], known)
    everywhere = fill_smoothly(values[:, :1] * 1, known[:, :1])
    assert (
        np.array_equal(filled[:, :1], everywhere) and (filled >= values.min()).all() and (filled <= values.max()).all()
    )
    constant = fill_smoothly(np.full((4, 4, 1), 0.7, np.float32) * known[..., None], known)
    assert np.allclose(constant, 0.7, atol=1e-6)


def test_filling_with_nothing_known_is_zero():
    assert not fill_smoothly(np.zeros((20, 30, 3), np.float32), np.zeros((20, 30), np.float32)).any()


def test_generator_is_local_so_crops_train_the_whole():
    """A crop's result equals the whole's away from the crop's border: there is no normalisation over the image."""
    generator = trained_looking()
    x = torch.rand(1, 11, 256, 256)
    with torch.inference_mode():
        whole, crop = generator(x), generator(x[..., 32:224, 32:224])
    # 64 px in from the crop's border: the receptive field (some 100 px) is not fully inside, but its far part carries
    # little.
    assert (whole[..., 96:160, 96:160] - crop[..., 64:128, 64:128]).abs().max() < 0.02 * whole.abs().max()


def test_state_round_trip_gives_the_same_compositor():
    generator = Compositor(CompositorConfig(filters=8))
    torch.nn.init.normal_(generator.out.weight, std=0.02)
    tensors, config = generator.state()
    again = Compositor.from_state(tensors, config)
    x = torch.rand(1, 11, 48, 64)
    with torch.inference_mode():
        # Channels-last weights may choose another kernel: float32 rounding only.
        torch.testing.assert_close(again(x), generator(x), rtol=1e-4, atol=1e-5)


def test_generator_sees_the_frame_zeroed_inside():
    rgb, alpha, frame, mask, plate = scene()
    composite = plain_composite(rgb, alpha, frame, plate, blend_region(mask))
    surround = composite.layers[..., SURROUND]
    assert not surround[composite.region.hidden].any()
    outside = ~composite.region.hidden
    np.testing.assert_allclose(surround[outside] * 255, frame[composite.region.window][outside], atol=1e-3)
    assert np.array_equal(composite.layers[..., RGB], rgb[composite.region.window])


def test_fused_paste_equals_the_formula():
    rgb, alpha, frame, mask, plate = scene()
    composite = plain_composite(rgb, alpha, frame, plate, blend_region(mask))
    generator = trained_looking()
    window, inside = composite.region.window, composite.region.inside
    expected = np.clip(composite.output(generator.residual(composite.layers)), 0, 1) * 255
    out = compose(rgb, alpha, frame, mask, plate, generator)[window]
    assert np.abs(out[inside] - expected[inside]).max() <= 0.5 + 1e-3  # rounding to uint8
