"""Face networks and tracking: MediaPipe's own answers, finite differences, and videos of known motion."""

import weakref
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from hicode import assets
from hicode.errors import AssetError, InputError
from hicode.motion import LEFT_EYE_OUTER, LOWER_LIP_INNER, RIGHT_EYE_OUTER, UPPER_LIP_INNER
from hicode.tracking import face_tracker
from hicode.tracking.face_tracker import LandmarkConfig, track_faces
from hicode.tracking.landmarks import FaceBox, FaceLandmarker, crop_face, crop_faces, rois_from_landmarks
from hicode.tracking.tflite import TfliteGraph, _depth_to_space, _same

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mediapipe_landmarks.npz")


@pytest.fixture(scope="module")
def landmarker() -> FaceLandmarker:
    try:
        return FaceLandmarker()
    except AssetError as error:
        pytest.skip(f"the face networks cannot be fetched here: {error}")


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    """The demo video's first frame, 360x288."""
    try:
        path = assets.path("demo_video", "franck.mp4")
    except AssetError as error:
        pytest.skip(f"the demo video cannot be fetched here: {error}")
    with av.open(str(path)) as video:
        return next(video.decode(video=0)).to_ndarray(format="rgb24")


def as_tensor(*images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def moved(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """The picture under an affine map of continuous pixel coordinates."""
    by_index = matrix.copy()
    by_index[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    return cv2.warpAffine(
        image, by_index, size or image.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )


def similarity(scale: float, angle: float, centre, shift) -> np.ndarray:
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.concatenate([linear, (np.asarray(centre) + shift - linear @ centre)[:, None]], 1)


# ---- against MediaPipe ----
def test_detection_is_mediapipes(landmarker, frame):
    for net, name, score in ((landmarker.near, "near", 0.5), (landmarker.far, "far", 0.6)):
        (face,) = landmarker._detect(frame, net, score)
        box = [face.x0, face.y0, face.x1, face.y1]
        # A quarter of a pixel: float16 weights are widened here before the sums and there after some of them.
        np.testing.assert_allclose(box, GOLDEN[f"{name}_box"][:4], atol=0.25)
        np.testing.assert_allclose(face.keypoints, GOLDEN[f"{name}_keypoints"], atol=0.25)
        assert abs(face.score - GOLDEN[f"{name}_box"][4]) < 0.005


def test_landmarks_are_mediapipes(landmarker, frame):
    roi = landmarker.detect(frame)[0].roi()
    points, presence = landmarker.landmarks(as_tensor(frame), torch.from_numpy(roi)[None])
    apart = np.abs(points[0].numpy() - GOLDEN["points_px"])
    # Measured: 0.011 px mean, 0.05 px at most, on this 166 px face. OpenCV versions differ by single grey levels.
    assert apart.mean() < 0.06, apart.mean()
    assert apart.max() < 0.5, apart.max()
    assert presence[0] > 0.99


# ---- the graphs ----
def test_same_padding_is_tensorflows():
    assert _same((192, 192), (3, 3), (2, 2)) == (0, 1, 0, 1)  # the odd pixel goes right and down
    assert _same((7, 5), (3, 5), (1, 1)) == (2, 2, 1, 1)
    assert _same((4, 4), (1, 1), (2, 2)) == (0, 0, 0, 0)


def test_depth_to_space_has_tensorflows_channel_order():
    x = torch.arange(2 * 8 * 2 * 3).reshape(2, 8, 2, 3)
    y = _depth_to_space(x, 2)
    for i in range(4):
        for j in range(6):
            # output channel c at (i, j) is input channel ((i % 2) * 2 + j % 2) * C + c, C = 2 output channels
            first = ((i % 2) * 2 + j % 2) * 2
            assert torch.equal(y[:, :, i, j], x[:, first : first + 2, i // 2, j // 2])


def test_a_damaged_graph_is_refused_by_name(tmp_path):
    whole = assets.path("face_landmarks") if assets.is_cached("face_landmarks") else None
    cases = {"foreign.tflite": b"not a graph at all", "empty.tflite": b""}
    if whole:
        cases["truncated.tflite"] = whole.read_bytes()[:5000]
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(AssetError, match=name):
            TfliteGraph(tmp_path / name)


def test_a_batch_gives_what_its_images_give(landmarker, frame):
    rng = np.random.default_rng(0)
    images = as_tensor(frame, frame[:, ::-1].copy(), rng.integers(0, 255, frame.shape, dtype=np.uint8))
    rois = torch.tensor([[196.0, 155, 245, -0.15], [164.0, 155, 245, 0.15], [180.0, 140, 200, 1.0]])
    together, _ = landmarker.landmarks(images, rois)
    for i in range(3):
        alone, _ = landmarker.landmarks(images[i : i + 1], rois[i : i + 1])
        # Sums are taken in another order; on noise, where landmarks mean nothing, differences grow.
        assert (together[i] - alone[0]).abs().max() < 0.02


def test_gradients_to_the_image_are_finite_differences(landmarker, frame):
    net = FaceLandmarker().double()
    image = as_tensor(frame).double()[:, :, 30:280, 60:330].requires_grad_()
    roi = torch.tensor([[136.0, 125, 245, -0.15]], dtype=torch.float64)
    weight = torch.randn(1, 478, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = (net.landmarks(image, roi)[0] * weight).sum()
    (gradient,) = torch.autograd.grad(value, image)
    assert torch.isfinite(gradient).all()
    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-7  # piecewise linear in the image but for the sampling of crops: small, so that few kinks are crossed
    with torch.no_grad():
        ahead, behind = ((net.landmarks(image + s * direction, roi)[0] * weight).sum() for s in (step, -step))
    expected = float(ahead - behind) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3)


# ---- crops and regions ----
def test_both_crops_agree(frame):
    # the second reaches outside: borders are repeated
    rois = np.array([[196.0, 155, 245, -0.15], [20.0, 250, 400, 0.7]])
    crops = crop_faces(as_tensor(frame, frame), torch.from_numpy(rois), 192)
    for crop, roi in zip(crops, rois, strict=True):
        exact = crop.permute(1, 2, 0).numpy() * 255
        # OpenCV rounds to grey levels and, in some versions, to 1/32 px
        assert np.abs(exact - crop_face(frame, roi, 192)).max() < 4.0


def test_regions_turn_and_grow_with_the_landmarks():
    points = torch.from_numpy(GOLDEN["points_px"])[None].double()
    roi = rois_from_landmarks(points)[0]
    grown = rois_from_landmarks(points * 2)[0]
    assert torch.allclose(grown[:3], 2 * roi[:3])
    assert grown[3] == pytest.approx(float(roi[3]))
    quarter = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    turned = rois_from_landmarks(points @ quarter.T)[0]
    assert turned[3] - roi[3] == pytest.approx(np.pi / 2)


def test_landmarks_follow_a_moved_picture(landmarker, frame):
    matrix = similarity(1.3, 0.2, (196, 155), (5.3, -8.7))
    points, _ = landmarker.landmarks(as_tensor(frame), torch.from_numpy(landmarker.detect(frame)[0].roi())[None])
    roi = rois_from_landmarks(points.double())
    points = landmarker.landmarks(as_tensor(frame), roi)[0][0].numpy()
    roi[0, :2] = torch.from_numpy(matrix[:, :2] @ roi[0, :2].numpy() + matrix[:, 2])
    roi[0, 2] *= 1.3
    roi[0, 3] += 0.2
    there = landmarker.landmarks(as_tensor(moved(frame, matrix)), roi)[0][0].numpy()
    expected = points[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    # The same region of the same face: left are resampling and MediaPipe's half pixel, (1.3 - 1) / 2 px of it.
    assert np.abs(there[:, :2] - expected).mean() < 0.6


# ---- tracking ----
def test_known_motion_is_tracked_with_less_noise_than_a_single_look(landmarker, frame):
    rng = np.random.default_rng(0)
    t = np.arange(24)
    matrices = [
        similarity(1 + 0.03 * np.sin(k / 5), 0.06 * np.sin(k / 4), (196, 155), (6 * np.sin(k / 6), 4 * np.cos(k / 5)))
        for k in t
    ]
    video = [np.clip(moved(frame, m) + rng.normal(0, 4, frame.shape), 0, 255).astype(np.uint8) for m in matrices]
    noise = {}
    for name, config in (("single", LandmarkConfig(crops=1, flow_sigma_frames=0.0)), ("full", LandmarkConfig())):
        found = track_faces(iter(video), landmarker, config=config)
        assert bool(found.found.all())
        xy = found.points_px[..., :2].numpy().astype(np.float64)
        home = np.stack([(p - m[:, 2]) @ np.linalg.inv(m[:, :2]).T for p, m in zip(xy, matrices, strict=True)])
        noise[name] = np.abs(np.diff(home, axis=0)).mean()  # in the first frame's coordinates nothing should move
    assert noise["full"] < 0.12, noise  # px a frame, on a face of 166 px
    assert noise["full"] < 0.6 * noise["single"], noise


def test_gaps_are_interpolated_counted_and_named(landmarker, frame):
    dark = np.zeros_like(frame)
    video = [dark] * 3 + [frame] * 7 + [dark] * 4 + [moved(frame, similarity(1, 0, (0, 0), (12.0, 0)))] * 7
    heard = []
    track = track_faces(iter(video), landmarker, progress=heard.append, config=LandmarkConfig(crops=1))
    assert track.found.tolist() == [False] * 3 + [True] * 7 + [False] * 4 + [True] * 7
    assert heard == sorted(heard) and heard[-1] == 21
    assert torch.equal(track.presence == 0, ~track.found)
    x = track.points_px[:, 1, 0]
    assert torch.equal(x[:3], x[3].expand(3))  # held before the first find
    assert torch.allclose(x[9:15], torch.linspace(float(x[9]), float(x[14]), 6), atol=1e-3)
    assert track.report.missing == 7 and track.report.first_missing == 0


def test_a_frame_missed_in_the_first_look_is_found_from_its_neighbour(landmarker, frame):
    """A jump within a chunk leaves the old region empty: the face is looked for again, not given up."""
    small = moved(frame, similarity(0.45, 0, (0, 0), (0.0, 0)))
    jumped = moved(frame, similarity(0.45, 0, (0, 0), (190.0, 120)))
    track = track_faces(iter([small] * 5 + [jumped] * 6), landmarker, config=LandmarkConfig(crops=1))
    assert bool(track.found.all())
    shift = (track.points_px[8] - track.points_px[2])[:, :2].mean(0)
    assert torch.allclose(shift, torch.tensor([190.0, 120.0]), atol=1.5)


def test_the_largest_face_that_stays_is_taken_and_said(landmarker, frame):
    def scene(scales_and_places) -> np.ndarray:
        canvas = np.full((400, 800, 3), 90, np.uint8)
        for scale, x in scales_and_places:
            face = cv2.resize(frame[40:270, 80:310], None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            canvas[20 : 20 + face.shape[0], x : x + face.shape[1]] = face
        return canvas

    passing = [scene([(0.9, 500), (1.4, 20)])] * 4 + [scene([(0.9, 500)])] * 28
    track = track_faces(iter(passing), landmarker, config=LandmarkConfig(crops=1))
    assert (track.points_px[:, 1, 0] > 500).all()  # the large one left
    staying = [scene([(0.9, 500), (1.4, 20)])] * 20
    track = track_faces(iter(staying), landmarker, config=LandmarkConfig(crops=1))
    assert (track.points_px[:, 1, 0] < 400).all()
    assert track.report.faces == 2


class TwoFacesOneFalse:
    """A detector that reports a second face, which the mesh network then denies: its crop is at the left."""

    crop_px = 192

    def detect(self, image):
        keypoints = np.array([[0.0, 0.0], [10.0, 0.0], [5.0, 5.0], [5.0, 9.0], [-5.0, 0.0], [15.0, 0.0]])
        return [FaceBox(x, 20.0, x + 60.0, 80.0, 0.9, keypoints + [x, 40]) for x in (150.0, 10.0)]

    def from_crops(self, crops, rois):
        points = rois[:, None, :2] + rois[:, None, 2:3] * torch.linspace(-0.3, 0.3, 478)[:, None]
        return torch.cat([points, torch.zeros(len(rois), 478, 1)], -1), (rois[:, 0] > 100).double()


def test_a_second_face_that_proves_false_is_dropped():
    """Faces hold arrays: they are told apart by identity, since comparing arrays for equality raises an error."""
    track = track_faces([np.zeros((100, 240, 3), np.uint8)] * 20, TwoFacesOneFalse())
    assert bool(track.found.all()) and track.report.faces == 1
    assert track != track_faces([np.zeros((100, 240, 3), np.uint8)] * 3, TwoFacesOneFalse())


def test_a_video_without_a_face_or_frames_is_refused(landmarker):
    noise = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    with pytest.raises(InputError, match="No face in 3 frames"):
        track_faces(iter([noise] * 3), landmarker)
    with pytest.raises(InputError, match="no frames"):
        track_faces(iter([]), landmarker)


def test_memory_does_not_grow_with_the_frames(landmarker, frame):
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        pass

    def stream():
        nonlocal most
        for _ in range(40):
            most = max(most, len(alive))
            image = frame.copy().view(Frame)
            alive.add(_Hashed(image))
            yield image

    class _Hashed:
        """Lives as long as the frame that holds it."""

        def __init__(self, image):
            image.keeper = self

    config = LandmarkConfig(crops=1, chunk=8)
    track_faces(stream(), landmarker, config=config)
    assert most <= 2 * config.chunk + 2, most


def test_averaging_along_flow_is_the_written_out_sum():
    rng = np.random.default_rng(0)
    n, sigma = 9, 1.5
    points = (GOLDEN["points_px"] + rng.normal(0, 0.5, (n, 478, 3))).astype(np.float32)
    flow = np.concatenate([rng.normal(0, 0.3, (n, 478, 2)), rng.uniform(0, 1, (n, 478, 1))], -1).astype(np.float32)
    got = face_tracker._average_along_flow(points, flow, sigma)
    for t in (0, 4, 8):
        for i in (0, 152, 300):
            tolerance = 0.006 * 1.5 * np.ptp(points[t, :, :2], axis=0).max()
            total, weight = points[t, i].astype(np.float64), 1.0
            for u in range(max(0, t - 4), min(n, t + 5)):
                if u == t:
                    continue
                between = range(min(t, u), max(t, u))
                carried = points[u, i] - np.sign(u - t) * np.array([*sum(flow[k, i, :2] for k in between), 0])
                trust = np.prod([flow[k, i, 2] for k in between])
                apart = np.linalg.norm((carried - points[t, i])[:2]) / tolerance
                w = trust * np.exp(-0.5 * ((u - t) / sigma) ** 2 - apart**2)
                total, weight = total + w * carried, weight + w
            np.testing.assert_allclose(got[t, i], total / weight, atol=1e-3)


def test_a_flow_that_is_not_trusted_changes_nothing():
    rng = np.random.default_rng(0)
    points = (GOLDEN["points_px"] + rng.normal(0, 1, (6, 478, 3))).astype(np.float32)
    flow = np.concatenate([rng.normal(0, 5, (6, 478, 2)), np.zeros((6, 478, 1))], -1).astype(np.float32)
    assert np.array_equal(face_tracker._average_along_flow(points, flow, 2.0), points)


def mouth_opening(points):
    """Gap between the inner lips over the distance of the outer eye corners."""
    length = lambda a, b: (points[..., a, :2] - points[..., b, :2]).norm(dim=-1)
    return length(UPPER_LIP_INNER, LOWER_LIP_INNER) / length(LEFT_EYE_OUTER, RIGHT_EYE_OUTER)


@pytest.mark.clip
def test_a_real_clip_is_steadier_than_mediapipes_way_and_keeps_its_mouth(landmarker, markey):
    with av.open(str(markey)) as video:
        frames = [f.to_ndarray(format="rgb24") for f, _ in zip(video.decode(video=0), range(40), strict=False)]
    plain = track_faces(iter(frames), landmarker, config=LandmarkConfig(crops=1, flow_sigma_frames=0.0))
    full = track_faces(iter(frames), landmarker)
    assert bool(full.found.all()) and full.report.faces == 1
    jitter = [float(track.points_px[..., :2].diff(n=2, dim=0).norm(dim=-1).median()) for track in (plain, full)]
    assert jitter[1] < 0.85 * jitter[0], jitter  # most of the rest is the head's own motion
    assert np.corrcoef(mouth_opening(plain.points_px), mouth_opening(full.points_px))[0, 1] > 0.98
