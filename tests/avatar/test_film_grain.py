"""Film grain: what a recording's frames have over their renders, laid on the head again."""

from itertools import pairwise

import cv2
import numpy as np
import torch

from helpers.grainy_head import LANDMARKS, MASK, SIZE, smooth
from hicode.avatar.blend import blend_region, compose
from hicode.avatar.film_grain import GAIN, NEAREST, FilmGrain, FilmGrainLayer, lips_ellipse
from hicode.motion import LIPS


def grain_of(deviation: float = 8.0, k: int = 8, strength: float = 1.0) -> FilmGrain:
    fields = [np.random.default_rng(i).normal(0, deviation, (SIZE, SIZE)).astype(np.float32) for i in range(k)]
    return FilmGrain.of(fields, torch.from_numpy(np.stack([LANDMARKS] * k)), strength)


def test_the_same_frame_has_the_same_grain_and_the_next_one_another():
    grain = grain_of()
    again = FilmGrain.from_state(*grain.state())
    layers = [grain.layer(LANDMARKS, i).field for i in range(12)]
    assert all(np.array_equal(layer, again.layer(LANDMARKS, i).field) for i, layer in enumerate(layers))
    assert all(not np.array_equal(a, b) for a, b in pairwise(layers)), "none stays"
    assert len({layer.tobytes() for layer in layers}) > NEAREST, "shaken, so that there are more kinds than fields"
    correlation = np.corrcoef(layers[0][40:120, 40:120].ravel(), layers[1][40:120, 40:120].ravel())[0, 1]
    assert abs(correlation) < 0.1


def test_grain_goes_with_the_head():
    """A field with a mark at a landmark: wherever the head is, how large and how turned, the mark is there (but for the
    shake of 1.25 px).
    """
    mark = np.zeros((SIZE, SIZE), np.float32)
    x, y = LANDMARKS[100].round().astype(int)
    mark[y - 3 : y + 4, x - 3 : x + 4] = 60
    grain = FilmGrain.of([mark], torch.from_numpy(LANDMARKS[None]), 1.0)
    turn = np.array([[0.95, 0.2], [-0.2, 0.95]]) * 0.8
    moved = (LANDMARKS - SIZE / 2) @ turn.T + SIZE / 2 + [9, -6]
    found = grain.layer(moved, 3).field.astype(float) - 128
    ys, xs = np.mgrid[:SIZE, :SIZE]
    weight = np.clip(found, 0, None)
    place = np.array([(xs * weight).sum(), (ys * weight).sum()]) / weight.sum()
    assert np.linalg.norm(place - moved[100]) < 2.5


def test_a_frame_takes_the_grain_of_a_head_that_stood_alike():
    stretched = LANDMARKS * [0.8, 1.0]
    fields = [np.full((SIZE, SIZE), v, np.float32) for v in [20.0] * NEAREST + [-20.0] * NEAREST]
    grain = FilmGrain.of(fields, torch.from_numpy(np.stack([LANDMARKS] * NEAREST + [stretched] * NEAREST)), 1.0)
    assert all(grain.layer(LANDMARKS, i).field[80, 80] > 128 for i in range(20))
    assert all(grain.layer(stretched, i).field[80, 60] < 128 for i in range(20))


def test_composition_adds_it_on_the_render_and_nowhere_else():
    frame = plate = smooth(3)
    alpha = (MASK / 255).astype(np.float32)
    rgb = alpha[..., None] * (smooth(4) / 255).astype(np.float32)
    plain = compose(rgb, alpha, frame, MASK, plate)
    field = np.full((SIZE, SIZE), 128 + 40, np.uint8)
    out = compose(
        rgb, alpha, frame, MASK, plate, None, FilmGrainLayer(field, 0.5 / (255 * GAIN), lips_ellipse(LANDMARKS))
    )
    more = out.astype(int) - plain
    assert not more[MASK == 0].any(), "not where nothing was rendered"
    x, y = LANDMARKS[LIPS].mean(0).round().astype(int)
    assert not more[y - 2 : y + 3, x - 4 : x + 5].any(), "not on the lips"
    elsewhere = cv2.erode(MASK, np.ones((5, 5))) > 0
    elsewhere[y - 30 : y + 30, x - 50 : x + 50] = False
    assert np.abs(more[elsewhere] - 10).max() <= 1, "40 levels of a field of gain 2, by half: 10 grey levels"


def test_the_seam_box_is_where_the_field_is_read():
    """A field brighter to the right: composed, its columns stand where the frame's do."""
    frame = plate = np.full((SIZE, SIZE, 3), 100, np.uint8)
    mask = np.where(np.hypot(*(np.mgrid[:SIZE, :SIZE] - 100)) < 25, 255, 0).astype(np.uint8)
    alpha = (mask / 255).astype(np.float32)
    rgb = alpha[..., None] * np.full(3, 100 / 255, np.float32)
    field = np.broadcast_to(np.clip(128 + np.arange(SIZE) - SIZE // 2, 0, 255).astype(np.uint8), (SIZE, SIZE))
    out = compose(
        rgb,
        alpha,
        frame,
        mask,
        plate,
        None,
        FilmGrainLayer(np.ascontiguousarray(field), 1 / 255, np.array([100, 118, 4, 4], np.float32)),
    )
    assert min(blend_region(mask).box[:2]) > 0
    assert [int(out[90, x, 0]) for x in (90, 100, 110)] == [110, 120, 130] and out[118, 100, 0] == 100
