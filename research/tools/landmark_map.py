"""Make src/hicode/tracking/landmark_map.safetensors: places of MediaPipe's 478 landmarks on the head model's surface.

    python research/tools/landmark_map.py VIDEO... [--refine ROUNDS]

1. The mean MediaPipe face at rest (closed mouth, open eyes) over all clips, a Procrustes mean.
2. Non-rigid registration of the identity model to it: the closest visible skin point of each landmark, then similarity
   and identity by ridge regression, repeated. Lip landmarks stay on their lip, which is known by the jaw's motion.
3. Irises: the centre is the foremost point of the eyeball; the ring has the radius of a human iris.
4. Refinement: every clip is fitted (hicode.tracking.fit). The place of a landmark is where it is seen on the fitted
   surface, averaged over frames, then over people. This removes a bias of the map that all people share.

The map is derived data: triangle ids and barycentric weights. It holds no image and no person's face.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import KDTree
from torch import Tensor

from hicode import assets
from hicode.geometry import similarity, skew
from hicode.motion import LEFT_EYE_RING, LEFT_IRIS, LIPS, N_LANDMARKS, RIGHT_EYE_RING, RIGHT_IRIS
from hicode.render.mesh import rasterize_mesh
from hicode.tracking import head_model as head
from hicode.tracking.fit import FitConfig
from hicode.tracking.fit.identity import CHUNK, fit_frames_of_person, identity_step
from hicode.tracking.fit.problem import Problem, State, linearise
from hicode.tracking.head_model import HeadModel

IRIS_RADIUS = 0.0585  # dm; human irises vary little
# Rings of lip landmarks, corners left out: outer edge to inner edge. Upper and lower lip part ways at the mouth's line.
UPPER_LIP = [
    185, 40, 39, 37, 0, 267, 269, 270, 409, 74, 73, 72, 11, 302, 303, 304, 184, 408, 42, 41, 38, 12, 268, 271, 272, 183,
    407,
]  # fmt: skip
UPPER_LIP += [80, 81, 82, 13, 312, 311, 310, 191, 415]
LOWER_LIP = [
    146, 91, 181, 84, 17, 314, 405, 321, 375, 90, 180, 85, 16, 315, 404, 320, 77, 307, 89, 179, 86, 15, 316, 403, 319,
    96, 325,
]  # fmt: skip
LOWER_LIP += [95, 88, 178, 87, 14, 317, 402, 318, 324]


def rest_face(clips: dict[str, np.ndarray]) -> torch.Tensor:
    """Procrustes mean "478 3" of the frames with closed mouth and open eyes, equal weight per person; y up, z out."""
    people = []
    for points in clips.values():
        between_eyes = np.linalg.norm(points[:, 33] - points[:, 263], axis=1)
        mouth = np.linalg.norm(points[:, 13] - points[:, 14], axis=1) / between_eyes
        eyes = np.linalg.norm(points[:, [159, 386]] - points[:, [145, 374]], axis=2).sum(1) / between_eyes
        rest = (mouth <= np.percentile(mouth, 20)) & (eyes > np.percentile(eyes, 40))
        people.append(torch.tensor(procrustes_mean(points[rest] * [1, -1, -1])))
    mean = torch.tensor(procrustes_mean(np.stack([p.numpy() for p in people])))
    across = torch.nn.functional.normalize(mean[263] - mean[33], dim=0)
    up = mean[10] - mean[152]
    up = torch.nn.functional.normalize(up - across * (up @ across), dim=0)
    return (mean - mean[:468].mean(0)) @ torch.stack([across, up, torch.linalg.cross(across, up)], 1)


def procrustes_mean(shapes: np.ndarray) -> np.ndarray:
    """Mean shape of shapes "n k 3", each moved, turned and scaled to it."""
    tensors = torch.tensor(shapes, dtype=torch.float64)
    mean = tensors[0]
    for _ in range(5):
        aligned = []
        for shape in tensors:
            s, R, t = similarity(shape[:468], mean[:468])
            aligned.append(s * shape @ R.T + t)
        mean = torch.stack(aligned).mean(0)
    return mean.numpy()


def visible_triangles(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """ "f" bool: seen from the front, from either side or from below (parallel projection, 4 px a millimetre)."""
    seen = np.zeros(len(triangles), bool)
    for yaw, pitch in ((0, 0), (0.9, 0), (-0.9, 0), (0, 0.4)):
        c, s, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
        R = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]) @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
        turned = (vertices - vertices.mean(0)) @ R.T
        pixels = turned[:, :2] * [400, -400] + 800
        found = rasterize_mesh(pixels, 1000 - turned[:, 2], triangles, 1600, 1600).triangle
        seen[np.unique(found[found >= 0])] = True
    return seen


def register(arrays: dict, names: tuple[str, ...], target: torch.Tensor, rounds: int = 40):
    """(triangles "478", barycentric "478 3", RMS distance in mm) of the face-mesh landmarks; no irises
    (`place_irises`).
    """
    mean, basis = arrays["mean"].double().numpy(), arrays["identity_basis"].double().numpy()
    triangles, part = arrays["triangles"].numpy(), arrays["triangle_part"].numpy()
    jaw = np.linalg.norm(arrays["expression_basis"][names.index("jawOpen")].numpy(), axis=1)[triangles].mean(1)
    eyes = [mean[np.unique(triangles[part == head.PARTS.index(n)])].mean(0) for n in ("right_eye", "left_eye")]
    ids = np.arange(468)
    kind = np.where(np.isin(ids, UPPER_LIP), 1, np.where(np.isin(ids, LOWER_LIP), 2, 0))

    # initial similarity: eyes, nose tip; the rest follows
    middle = (np.abs(mean[:, 0]) < 0.05) & (mean[:, 2] > 0.9)
    nose = mean[middle][mean[middle][:, 2].argmax()]
    anchors = np.stack([target[RIGHT_EYE_RING].mean(0), target[LEFT_EYE_RING].mean(0), target[1]])
    s, R, t = similarity(
        torch.tensor(anchors), torch.tensor(np.stack([eyes[0] + [0, 0, 0.14], eyes[1] + [0, 0, 0.14], nose]))
    )
    placed = (s * target[:468] @ R.T + t).numpy()

    vertices = mean
    for round_ in range(rounds):
        if round_ % 4 == 0:
            seen = np.flatnonzero(visible_triangles(vertices, triangles) & (part == 0))
        edges = vertices[triangles[:, 1:]] - vertices[triangles[:, :1]]
        normal = np.cross(edges[:, 0], edges[:, 1])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
        owner, weight, points = samples(vertices, triangles, seen)
        found, bary, distance = np.zeros(468, int), np.zeros((468, 3)), np.zeros(468)
        for which, allowed in ((0, jaw[owner] > -1), (1, jaw[owner] < 0.15), (2, jaw[owner] > 0.15)):
            mine = kind == which
            d, j = KDTree(points[allowed]).query(placed[mine])
            found[mine], bary[mine], distance[mine] = owner[allowed][j], weight[allowed][j], d
        surface = np.einsum("lb,lbc->lc", bary, vertices[triangles[found]])
        if round_ == rounds - 1:
            break
        s, R, t = similarity(torch.tensor(placed), torch.tensor(surface))
        placed = (s * torch.tensor(placed) @ R.T + t).numpy()
        # identity by ridge: point to plane, and weakly point to point
        A = np.einsum("lb,klbc->lck", bary, basis[:, triangles[found]])
        r = placed - np.einsum("lb,lbc->lc", bary, mean[triangles[found]])
        n = normal[found]
        An, rn = np.einsum("lck,lc->lk", A, n), (r * n).sum(1)
        A3, r3 = A.reshape(-1, A.shape[2]), r.reshape(-1)
        ridge = 0.03 if round_ < 10 else 0.006
        identity = np.linalg.solve(
            An.T @ An + 0.15 * A3.T @ A3 + ridge * np.eye(A.shape[2]), An.T @ rn + 0.15 * A3.T @ r3
        )
        vertices = mean + np.einsum("k,kvc->vc", identity, basis)
    found, bary = np.concatenate([found, np.zeros(10, int)]), np.concatenate([bary, np.zeros((10, 3))])
    return torch.tensor(found), torch.tensor(bary), float(np.sqrt((distance**2).mean()) * 100)


def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cross product in the plane."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def place_irises(arrays: dict, found: torch.Tensor, bary: torch.Tensor, target: torch.Tensor) -> None:
    """Fill in landmarks 468..477: each ray from in front of the eyeball, parallel to z, meets the eyeball's surface."""
    mean, triangles, part = (
        arrays["mean"].double().numpy(),
        arrays["triangles"].numpy(),
        arrays["triangle_part"].numpy(),
    )
    for name, points in (("right_eye", RIGHT_IRIS), ("left_eye", LEFT_IRIS)):
        own = np.flatnonzero(part == head.PARTS.index(name))
        corners = mean[triangles[own]]
        centre = (corners.reshape(-1, 3).min(0) + corners.reshape(-1, 3).max(0)) / 2
        for point in points:
            offset = (target[point] - target[points[0]])[:2].numpy()
            length = np.linalg.norm(offset)
            xy = centre[:2] + (offset * (IRIS_RADIUS / length) if length > 0 else 0)
            a, b, c = corners[:, 0, :2], corners[:, 1, :2], corners[:, 2, :2]
            area = cross(b - a, c - a)
            w = (
                np.stack([cross(b - xy, c - xy), cross(c - xy, a - xy), cross(a - xy, b - xy)], 1)
                / np.where(area == 0, 1e-12, area)[:, None]
            )
            z = np.where((w >= -1e-6).all(1) & (area != 0), (w * corners[:, :, 2]).sum(1), -np.inf)
            found[point], bary[point] = own[z.argmax()], torch.tensor(w[z.argmax()])


def refine(
    arrays: dict,
    names: tuple[str, ...],
    clips: dict[str, np.ndarray],
    sizes: dict,
    found: torch.Tensor,
    bary: torch.Tensor,
) -> float:
    """Move each landmark on the mean head by its median offset over people, along the surface; the median move, mm."""
    model = head.assemble(arrays, names, found, bary)
    config = FitConfig(identity_steps=8)
    offsets = []
    for name, points in clips.items():
        frames = np.linspace(0, len(points) * 10 // 11 - 1, 20).astype(int)
        offset, _ = person_offsets(points[frames], int(sizes[name][0]), int(sizes[name][1]), model, config)
        offsets.append(offset)
        print(
            f"  {name}: offsets {100 * np.linalg.norm(offset[:468], axis=1).mean():.2f} mm, lips "
            f"{100 * np.linalg.norm(offset[LIPS], axis=1).mean():.2f} mm",
            flush=True,
        )
    move = np.median(offsets, 0)
    vertices, triangles, part = model.mean.double().numpy(), model.triangles.numpy(), model.triangle_part.numpy()
    jaw = np.linalg.norm(model.expression_basis[names.index("jawOpen")].numpy(), axis=1)[triangles].mean(1)
    visible = visible_triangles(vertices, triangles)
    wanted = model.landmarks(model.mean).double().numpy() + move
    skin = visible & (part == 0)
    kinds = np.zeros(478, int)
    kinds[UPPER_LIP], kinds[LOWER_LIP], kinds[RIGHT_IRIS], kinds[LEFT_IRIS] = 1, 2, 3, 4
    eyes = [part == head.PARTS.index(f"{side}_eye") for side in ("right", "left")]
    allowed = [skin, skin & (jaw < 0.15), skin & (jaw > 0.15), *eyes]
    for kind, which in enumerate(allowed):
        owner, weight, points = samples(vertices, triangles, np.flatnonzero(which))
        ids = np.flatnonzero(kinds == kind)
        _, j = KDTree(points).query(wanted[ids])
        found[ids], bary[ids] = torch.tensor(owner[j]), torch.tensor(weight[j])
    return float(np.median(np.linalg.norm(move, axis=1)) * 100)


def person_offsets(
    points_px: Float[np.ndarray, "t 478 3"],
    width: int,
    height: int,
    model: HeadModel,
    config: FitConfig = FitConfig(),
    rounds: int = 2,
) -> tuple[Float[np.ndarray, "478 3"], Float[Tensor, "80"]]:
    """(constant offset (dm, head frame) of each landmark from where the model has it, identity) of one person."""
    problem, state = fit_frames_of_person(points_px, width, height, model, config)
    frames = np.arange(len(points_px))
    for _ in range(rounds):
        _update_offset(problem, state, frames)
        for _ in range(2):
            identity_step(problem, state, frames, damping=1e-3, shape=False)
    return state.offset, torch.from_numpy(state.identity).float()


def _update_offset(problem: Problem, state: State, frames: Int[np.ndarray, "n"]) -> None:
    """Set the constant offset of each landmark that the frames agree on, without its similarity part (pose)."""
    A, g = np.zeros((N_LANDMARKS, 3, 3)), np.zeros((N_LANDMARKS, 3))
    for start in range(0, len(frames), CHUNK):
        linear = linearise(problem, state, frames[start : start + CHUNK])
        image = linear.by_shape[:, :, :2].astype(np.float64)
        A += np.einsum("tlij,tlik->ljk", image, image)
        g += np.einsum("tlij,tli->lj", image, linear.residual[:, :, :2])
    ridge = 0.05 * np.trace(A, axis1=1, axis2=2)[:, None, None] / 3 * np.eye(3)
    offset = state.offset - np.linalg.solve(A + ridge, g[..., None])[..., 0]
    rest = problem.basis.rest
    shifts, turns = np.broadcast_to(np.eye(3), (N_LANDMARKS, 3, 3)), skew(torch.from_numpy(rest)).numpy()
    modes = np.concatenate([shifts, turns, rest[..., None]], -1).reshape(-1, 7)
    state.offset = offset - (modes @ np.linalg.lstsq(modes, offset.reshape(-1), rcond=None)[0]).reshape(-1, 3)


def samples(vertices: np.ndarray, triangles: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(triangle, barycentric, point) of dense points on these triangles: the nearest is within 0.2 mm of any point."""
    grid = np.array([(a, b, 8 - a - b) for a in range(9) for b in range(9 - a)]) / 8
    points = np.einsum("gb,fbc->fgc", grid, vertices[triangles[of]]).reshape(-1, 3)
    return np.repeat(of, len(grid)), np.tile(grid, (len(of), 1)), points


def main() -> None:
    """Make the map from the clips named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "clips", nargs="+", type=Path, help="videos, or .npz of landmarks (NAME: t 478 3 px; NAME/size: width, height)"
    )
    parser.add_argument("--refine", type=int, default=3, help="rounds of refinement by fitting")
    options = parser.parse_args()
    clips, sizes = {}, {}
    for path in options.clips:
        if path.suffix == ".npz":
            stored = np.load(path)
            for name in stored.files:
                if not name.endswith("/size"):
                    clips[name], sizes[name] = stored[name].astype(float), tuple(stored[name + "/size"])
            continue
        from hicode.media.video import probe, read_video
        from hicode.tracking.face_tracker import track_faces
        from hicode.tracking.landmarks import FaceLandmarker

        info = probe(path)
        tracked = track_faces(read_video(path), FaceLandmarker())
        clips[path.stem] = np.asarray(tracked.points_px, float)[np.asarray(tracked.found)]
        sizes[path.stem] = (info.width, info.height)
    arrays, config = head.build(assets.folder("head_model"))
    names = tuple(config["expression_names"])
    target = rest_face(clips)
    found, bary, distance = register(arrays, names, target)
    place_irises(arrays, found, bary, target)
    print(f"{len(clips)} clips; mean distance of the mean face to the surface {distance:.2f} mm rms")
    origin = (
        f"registration to the mean MediaPipe face of {len(clips)} people, {options.refine} rounds of refinement by "
        "fitting"
    )
    for round_ in range(options.refine):
        moved = refine(arrays, names, clips, sizes, found, bary)
        print(
            f"round {round_ + 1}: landmarks moved {moved:.2f} mm (median)",
            head.save_landmark_map(found, bary, origin),
            flush=True,
        )
    if not options.refine:
        print(head.save_landmark_map(found, bary, origin))


if __name__ == "__main__":
    main()
