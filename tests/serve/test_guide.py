"""What the guide says to a camera's pictures; its face detector is a script."""

import cv2
import numpy as np
import pytest

from hicode.errors import InputError
from hicode.serve.guide import GOOD, Guide
from hicode.tracking.landmarks import FaceBox


def face(x=320.0, y=180.0, size=120.0, nose=0.0) -> FaceBox:
    eyes = [(x - size / 5, y - size / 8), (x + size / 5, y - size / 8)]
    points = [*eyes, (x + nose * size, y), (x, y + size / 4), (x - size / 2, y), (x + size / 2, y)]
    return FaceBox(x - size / 2, y - size / 2, x + size / 2, y + size / 2, 0.9, np.array(points, np.float32))


class Detector:
    def __init__(self, *faces: FaceBox):
        self.faces = list(faces)

    def detect(self, image):
        return self.faces


def jpeg(level: int) -> bytes:
    return cv2.imencode(".jpg", np.full((360, 640, 3), level, np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    "faces, level, words",
    [
        ([], 128, "No face"), ([face(), face(x=500.0, size=100.0)], 128, "somebody else"),
        ([face(size=50.0)], 128, "closer"),
        ([face(size=300.0)], 128, "back"), ([face(x=80.0)], 128, "middle"), ([face(nose=0.3)], 128, "Turn"),
        ([face()], 20, "too dark"), ([face()], 240, "too bright"), ([face()], 128, GOOD),
        ([face(), face(x=600.0, size=30.0)], 128, GOOD),
    ],
)  # fmt: skip
def test_the_first_thing_that_is_wrong_is_said(faces, level, words):
    said = Guide(Detector(*faces)).look(jpeg(level))
    assert words in said["advice"] and said["good"] == (words == GOOD)


@pytest.mark.parametrize("data", [b"", b"no picture", jpeg(1)[:60]])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(InputError, match="no picture"):
        Guide(Detector()).look(data)
