"""What a camera's picture needs before it is recorded: the first thing that is wrong, in one sentence."""

import threading

import cv2
import numpy as np

from hicode.errors import InputError
from hicode.preparation.capture_report import ReportConfig
from hicode.tracking.landmarks import FaceBox, FaceDetector

GOOD = "Good. Stay like this."
SMALL, LARGE = 0.22, 0.6  # the face's size, of the picture's height
OFF_CENTRE = 0.2  # of the picture's width
TURNED = 0.35  # how far the nose is off the eyes' middle, in eye distances
MAX_SIDE = 1280


class Guide:
    """Looks at single pictures. The face detector is loaded at first use; one picture at a time."""

    def __init__(self, detector: FaceDetector | None = None):
        self._detector, self._lock = detector, threading.Lock()

    def look(self, jpeg: bytes) -> dict:
        """{advice, good} of a picture. InputError where it is none."""
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) if jpeg else None
        if image is None or max(image.shape) > MAX_SIDE:
            raise InputError(f"This is no picture of at most {MAX_SIDE} px. Reload the page.")
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        with self._lock:
            if self._detector is None:
                from hicode.tracking.landmarks import FaceLandmarker

                self._detector = FaceLandmarker()
            faces = self._detector.detect(image)
        advice = _advice(image, faces)
        return {"advice": advice or GOOD, "good": not advice}


def _advice(image: np.ndarray, faces: list[FaceBox]) -> str:
    if not faces:
        return "No face is seen. Look into the camera, in good light."
    face, (height, width) = faces[0], image.shape[:2]
    if len(faces) > 1 and faces[1].size_px > 0.5 * face.size_px:
        return "There is somebody else in the picture. Be alone in it."
    if face.size_px < SMALL * height:
        return "Come closer."
    if face.size_px > LARGE * height:
        return "Move back a little."
    if abs((face.x0 + face.x1) / 2 - width / 2) > OFF_CENTRE * width:
        return "Move to the middle of the picture."
    eyes, nose = face.keypoints[:2], face.keypoints[2]
    if abs(nose[0] - eyes[:, 0].mean()) > TURNED * np.ptp(eyes[:, 0]):
        return "Turn to the camera."
    y, x = max(int(face.y0), 0), max(int(face.x0), 0)
    luma = float(cv2.cvtColor(image[y : int(face.y1) + 1, x : int(face.x1) + 1], cv2.COLOR_RGB2GRAY).mean())
    low, high = ReportConfig().luma
    if luma < low:
        return "It is too dark. Turn to a window or a lamp."
    return "It is too bright. Use softer light." if luma > high else ""
