"""Makes mediapipe_landmarks.npz, the oracle of tests/test_landmarks.py: what MediaPipe itself finds in the demo video's
first frame.

Run by hand, in a virtual environment of its own: mediapipe 0.10.21 caps numpy below 2. Needs Python 3.11.

    pip install mediapipe==0.10.21 av
    python tests/golden/mediapipe_landmarks.py path/to/franck.mp4
"""

import sys
from pathlib import Path

import av
import mediapipe as mp
import numpy as np

frame = next(av.open(sys.argv[1]).decode(video=0)).to_ndarray(format="rgb24")
h, w = frame.shape[:2]
mesh = mp.solutions.face_mesh.FaceMesh(static_image_mode=True, max_num_faces=1, refine_landmarks=True).process(frame)
points = np.array([[p.x * w, p.y * h, p.z * w] for p in mesh.multi_face_landmarks[0].landmark], np.float32)
out = {"points_px": points}
for name, selection in (("near", 0), ("far", 1)):
    found = mp.solutions.face_detection.FaceDetection(model_selection=selection).process(frame).detections[0]
    box = found.location_data.relative_bounding_box
    corners = [box.xmin * w, box.ymin * h, (box.xmin + box.width) * w, (box.ymin + box.height) * h]
    keypoints = [[p.x * w, p.y * h] for p in found.location_data.relative_keypoints]
    out |= {
        f"{name}_box": np.array([*corners, found.score[0]], np.float32),
        f"{name}_keypoints": np.array(keypoints, np.float32),
    }
np.savez(Path(__file__).with_suffix(".npz"), **out)
