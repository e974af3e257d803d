"""Frames that cannot be used."""

import numpy as np

from hicode.preparation.defects import Defect, DefectFinder, longest_run, runs, usable


def found(frames, damaged=()) -> list[Defect]:
    finder = DefectFinder()
    for i, frame in enumerate(frames):
        finder.add(frame, i in damaged)
    return finder.defects()


def noisy(count: int, level: float = 120.0) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 2, (count, 32, 32, 3))
    return (level + noise).clip(0, 255).astype(np.uint8)


def test_ordinary_frames_have_no_defect():
    frames = noisy(60)
    frames[30:34] = frames[30]  # a source of few frames a second repeats some
    assert found(frames) == []


def test_a_picture_that_freezes_is_found():
    frames = noisy(100)
    frames[35:65] = frames[35]
    assert found(frames) == [Defect("frozen", 36, 65)]


def test_damaged_frames_are_kept_with_their_times():
    assert found(noisy(60), range(20, 30)) == [Defect("damaged", 20, 30)]


def test_a_fade_from_and_to_black_is_found_whole():
    frames = noisy(100).astype(float)
    frames[:9] *= np.linspace(0, 8 / 9, 9)[:, None, None, None]
    frames[-5:] *= np.linspace(0.8, 0, 5)[:, None, None, None]
    assert found(frames.astype(np.uint8)) == [Defect("dark", 0, 9), Defect("dark", 95, 100)]


def test_the_longest_part_without_a_defect_drives():
    mask = usable(20, [Defect("dark", 0, 2), Defect("frozen", 8, 12), Defect("damaged", 10, 14)])
    assert runs(mask) == [(2, 8), (14, 20)] and longest_run(mask) == range(2, 8)
    assert longest_run(np.zeros(5, bool)) == range(5)
