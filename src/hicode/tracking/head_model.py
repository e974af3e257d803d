"""The open 3D morphable head: MakeHuman (CC0) with 80 identity and 64 expression dimensions and MediaPipe's landmarks.

v vertices, f triangles. A head is `mean + identity @ identity_basis + expression @ expression_basis`, linear in both.
The frame is MakeHuman's: x to the subject's left (right in the image), y up, z out of the face, in decimetres. Its
origin is the centroid of the 468 face-mesh landmarks on the mean head. Identity coefficients are standard deviations of
a sampled population; expression coefficients are intensities of named facial actions: 0 is rest, 1 the full action.

A `HeadModel` is data, not code: any head with these arrays serves, so a loader of BFM or FLAME is one function that
returns one.

Source: the `head_model` asset. 52 actions are ARKit's (`faceunits01`), the jaw's and the eyes' motions among them; 12
units are MakeHuman's own mouth and nose shapes that lie farthest outside the span of those 52. Identity is a PCA of
4000 heads sampled from the macro and detail targets.
"""

import gzip
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hicode import assets
from hicode.errors import FileFormatError
from hicode.files import load_tensors, save_tensors
from hicode.geometry import smoothstep
from hicode.motion import EXPRESSION_DIM, IDENTITY_DIM, NOSE_TIP, PHILTRUM

PARTS = ("skin", "left_eye", "right_eye", "upper_teeth", "lower_teeth", "tongue")

# Raised whenever `build` gives other vertices, triangles or bases: cached models of another recipe are rebuilt.
RECIPE_VERSION = 1
_SCHEMA, _MAP_SCHEMA = "hicode.head_model", "hicode.landmark_map"
_MAP_FILE = Path(__file__).with_name("landmark_map.safetensors")

_GROUP_OF_PART = {
    "skin": "body", "left_eye": "helper-l-eye", "right_eye": "helper-r-eye", "upper_teeth": "helper-upper-teeth",
    "lower_teeth": "helper-lower-teeth", "tongue": "helper-tongue",
}  # fmt: skip
_COLLAR_Y, _SHOULDER_X = 5.75, 1.0  # dm: skin above the collar and between the shoulders belongs to the head

# MakeHuman's units with the most energy outside the span of the 52 ARKit actions, in that order. "mouth-open" is left
# out (it lowers the teeth without the tongue), and so are the neck's and the eyes', which landmarks hardly see.
_UNITS = (
    "mouth-protusion", "mouth-part-later", "mouth-corner-puller", "mouth-pursing", "mouth-upward-retraction",
    "mouth-depression", "mouth-depression-retraction", "mouth-retraction", "mouth-compression", "nose-depression",
    "mouth-elevation", "mouth-eversion",
)  # fmt: skip
_SPEECH_DRIVEN = re.compile(r"jaw|mouth|cheekPuff|tongueOut")

_DETAIL_FOLDERS = ("head", "forehead", "cheek", "chin", "ears", "eyebrows", "eyes", "mouth", "nose", "neck", "asym")
_OPPOSITES = (
    ("incr", "decr"), ("up", "down"), ("out", "in"), ("forward", "backward"), ("convex", "concave"),
    ("uncompress", "compress"), ("l", "r"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class HeadModel:
    """Arrays of a linear head.

    mean                  "v 3"       dm, head frame
    identity_basis        "80 v 3"    dm per standard deviation
    expression_basis      "64 v 3"    dm per full action
    triangles             "f 3"       counter-clockwise seen from outside
    triangle_part         "f"         index into PARTS
    expression_names      64 names, ARKit's 52 first
    expression_low, _high "64"        the range in which an action means something
    landmark_triangles    "478"       where the landmarks sit
    landmark_barycentric  "478 3"
    mouth_expression      "64"        the actions that speech drives
    mouth_landmark_weight "478"       1 at mouth and jaw, 0 on the upper face, smooth between
    """

    mean: Float[Tensor, "v 3"]
    identity_basis: Float[Tensor, "80 v 3"]
    expression_basis: Float[Tensor, "64 v 3"]
    triangles: Int[Tensor, "f 3"]
    triangle_part: Int[Tensor, "f"]
    expression_names: tuple[str, ...]
    expression_low: Float[Tensor, "64"]
    expression_high: Float[Tensor, "64"]
    landmark_triangles: Int[Tensor, "478"]
    landmark_barycentric: Float[Tensor, "478 3"]
    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]

    @staticmethod
    def load() -> "HeadModel":
        """The MakeHuman head, built once into the cache (seconds). Raises AssetError where it cannot be fetched."""
        return _load()

    def vertices(
        self, identity: Float[Tensor, "80"], expression: Float[Tensor, "*b 64"] | None = None
    ) -> Float[Tensor, "*b v 3"]:
        """Vertices of a head; without expression, at rest."""
        rest = self.mean + (identity @ self.identity_basis.flatten(1)).view_as(self.mean)
        if expression is None:
            return rest
        return rest + (expression @ self.expression_basis.flatten(1)).view(*expression.shape[:-1], *rest.shape)

    def landmarks(self, vertices: Float[Tensor, "*b v 3"]) -> Float[Tensor, "*b 478 3"]:
        """The 478 landmark points on given vertices."""
        corners = vertices[..., self.triangles[self.landmark_triangles], :]
        return (corners * self.landmark_barycentric[..., None]).sum(-2)

    def part(self, *names: str) -> Bool[Tensor, "f"]:
        """Which triangles belong to the named PARTS."""
        return torch.isin(self.triangle_part, torch.tensor([PARTS.index(n) for n in names]))

    def to(self, device: torch.device | str) -> "HeadModel":
        """The same head on a device."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)})


@cache
def _load() -> HeadModel:
    stored = assets.cache_dir() / "head_model" / "head.safetensors"
    try:
        arrays, config = load_tensors(stored, _SCHEMA, RECIPE_VERSION)
    except FileFormatError:  # absent, of another recipe, or damaged: it is only a cache
        arrays, config = build(assets.folder("head_model"))
        save_tensors(stored, arrays, _SCHEMA, RECIPE_VERSION, config)
    landmark_map, _ = load_tensors(_MAP_FILE, _MAP_SCHEMA, RECIPE_VERSION)
    return assemble(arrays, tuple(config["expression_names"]), landmark_map["triangles"], landmark_map["barycentric"])


def save_landmark_map(triangles: Int[Tensor, "478"], barycentric: Float[Tensor, "478 3"], origin: str) -> Path:
    """Write the map that ships with the package (tools/landmark_map.py makes it)."""
    arrays = {"triangles": triangles.to(torch.int32), "barycentric": barycentric.float()}
    save_tensors(_MAP_FILE, arrays, _MAP_SCHEMA, RECIPE_VERSION, {"origin": origin})
    _load.cache_clear()
    return _MAP_FILE


def assemble(
    arrays: dict[str, Tensor],
    expression_names: tuple[str, ...],
    landmark_triangles: Int[Tensor, "478"],
    landmark_barycentric: Float[Tensor, "478 3"],
) -> HeadModel:
    """A HeadModel from what `build` gave and a landmark map; moves the origin to the landmarks' centroid."""
    triangles, landmark_triangles = arrays["triangles"].long(), landmark_triangles.long()
    mean = arrays["mean"]
    landmarks = (mean[triangles[landmark_triangles]] * landmark_barycentric[..., None]).sum(-2)
    unit = torch.tensor([name in _UNITS for name in expression_names])
    return HeadModel(
        mean=mean - landmarks[:468].mean(0),
        identity_basis=arrays["identity_basis"],
        expression_basis=arrays["expression_basis"],
        triangles=triangles,
        triangle_part=arrays["triangle_part"].long(),
        expression_names=expression_names,
        # ARKit's actions are one-sided (each has its opponent); the units correct them, so they may act both ways.
        expression_low=torch.where(unit, -0.6, 0.0),
        expression_high=torch.where(unit, 0.6, 1.0),
        landmark_triangles=landmark_triangles,
        landmark_barycentric=landmark_barycentric,
        mouth_expression=torch.tensor([_SPEECH_DRIVEN.match(name) is not None for name in expression_names]),
        mouth_landmark_weight=_mouth_weight(landmarks),
    )


def _mouth_weight(landmarks: Float[Tensor, "478 3"]) -> Float[Tensor, "478"]:
    """By height: 0 above the tip of the nose, 1 below the root of the upper lip, a cubic step between."""
    nose_tip, below_nose = landmarks[NOSE_TIP, 1], landmarks[PHILTRUM, 1]
    return smoothstep((nose_tip - landmarks[:, 1]) / (nose_tip - below_nose))


# ---- building from the MakeHuman data ----


def build(folder: Path, samples: int = 4000, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """(arrays, config) of the head from the `head_model` asset's folder.

    They are the base mesh cut at the collar, the facial actions and the identity PCA, deterministic for a seed; about
    ten seconds, most of it reading. Vertices have MakeHuman's own origin: `assemble` moves it.
    """
    base, faces, groups = _read_obj(folder / "3dobjs" / "base.obj")
    chosen, triangles, parts = _cut_head(base, faces, groups)

    def read(paths: list[Path]) -> dict[str, np.ndarray]:
        return {re.sub(r"\.target(\.gz)?$", "", p.name): _read_target(p, len(base))[chosen] for p in sorted(paths)}

    targets = folder / "targets"
    actions = read(list((folder / "faceunits01" / "targets" / "faceunits").glob("*.target")))
    units = read([targets / "expression" / "units" / "caucasian" / f"{name}.target.gz" for name in _UNITS])
    names = tuple(actions) + tuple(units)
    expression = np.stack([*actions.values(), *units.values()])
    assert expression.shape[0] == EXPRESSION_DIM, expression.shape

    macro = read(
        [p for p in (targets / "macrodetails").glob("*.target.gz") if "baby" not in p.name and "child" not in p.name]
    )
    detail = read([p for d in _DETAIL_FOLDERS for p in (targets / d).glob("*.target.gz")])
    detail = {
        name: d for name, d in detail.items() if np.abs(d).max() > 0 and "breast" not in name and "trunk" not in name
    }
    weights = _sample_population(tuple(macro), tuple(detail), samples, np.random.default_rng(seed))
    stack = np.stack([base[chosen], *macro.values(), *detail.values()])
    mean, identity = _principal_heads(stack, weights)

    arrays = {
        "mean": torch.from_numpy(mean).float(),
        "identity_basis": torch.from_numpy(identity).float(),
        "expression_basis": torch.from_numpy(expression).float(),
        "triangles": torch.from_numpy(triangles).int(),
        "triangle_part": torch.from_numpy(parts).to(torch.uint8),
    }
    return arrays, {"expression_names": list(names), "samples": samples, "seed": seed}


def _read_obj(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices "n 3", quads "q 4", and each quad's group name "q" of a Wavefront file of quads."""
    vertices, faces, groups, group = [], [], [], ""
    for line in path.read_text().splitlines():
        key, _, rest = line.partition(" ")
        if key == "v":
            vertices.append([float(x) for x in rest.split()[:3]])
        elif key == "g":
            group = rest.strip()
        elif key == "f":
            faces.append([int(corner.split("/")[0]) - 1 for corner in rest.split()])
            groups.append(group)
    return np.array(vertices), np.array(faces), np.array(groups)


def _read_target(path: Path, n: int) -> np.ndarray:
    """Displacements "n 3" of a MakeHuman target: lines of `vertex dx dy dz`, the vertices not named stay."""
    text = (gzip.open if path.suffix == ".gz" else open)(path, "rt").read()
    rows = np.array([line.split()[:4] for line in text.splitlines() if line and line[0] != "#"], float).reshape(-1, 4)
    displacement = np.zeros((n, 3), np.float32)
    displacement[rows[:, 0].astype(int)] = rows[:, 1:]
    return displacement


def _cut_head(base: np.ndarray, faces: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(chosen vertices of the base "v", triangles into them "f 3", part of each "f")."""
    above = (base[:, 1] > _COLLAR_Y) & (np.abs(base[:, 0]) < _SHOULDER_X)
    triangles, parts = [], []
    for number, part in enumerate(PARTS):
        quads = faces[groups == _GROUP_OF_PART[part]]
        if part == "skin":
            quads = quads[above[quads].all(1)]
        triangles += [quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]
        parts.append(np.full(2 * len(quads), number))
    corners = np.concatenate(triangles)
    part = np.concatenate(parts)
    solid = (corners[:, 0] != corners[:, 2]) & (corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2])
    chosen, index = np.unique(corners[solid], return_inverse=True)
    return chosen, index.reshape(-1, 3), part[solid]


def _sample_population(
    macro: tuple[str, ...], detail: tuple[str, ...], samples: int, rng: np.random.Generator
) -> Float[np.ndarray, "samples k"]:
    """Weights of the targets [base, *macro, *detail] for random adults.

    Macro targets are products of the factors in their name (race, gender, age, muscle, weight). Detail targets are axes
    between opposites; the left and the right of a face differ a little.
    """

    def between(x: np.ndarray, low: str, high: str) -> dict[str, np.ndarray]:
        return {low: 1 - x, high: x}

    def around(x: np.ndarray, what: str) -> dict[str, np.ndarray]:
        return {
            f"min{what}": (1 - 2 * x).clip(0),
            f"average{what}": 1 - np.abs(2 * x - 1),
            f"max{what}": (2 * x - 1).clip(0),
        }

    race = dict(zip(("african", "asian", "caucasian"), rng.dirichlet([0.6] * 3, samples).T, strict=True))
    factors = race | between(rng.random(samples), "female", "male") | between(rng.random(samples), "young", "old")
    factors |= around(rng.random(samples), "muscle") | around(rng.normal(0.5, 0.25, samples).clip(0, 1), "weight")
    factors["universal"] = np.ones(samples)
    columns = [np.ones(samples)]
    columns += [np.prod([factors[word] for word in name.split("-")], axis=0) for name in macro]

    shared: dict[str, np.ndarray] = {}
    axis_of: dict[str, tuple[str, int]] = {}  # target -> (axis, sign)
    for name in detail:
        stem, _, end = name.rpartition("-")
        signs = {word: (a, s) for a, b in _OPPOSITES for word, s in ((a, 1), (b, -1))}
        positive, sign = signs.get(end, (end, 1))
        axis_of[name] = (f"{stem}-{positive}", sign)
    values: dict[str, np.ndarray] = {}
    for axis, _ in axis_of.values():
        if axis in values:
            continue
        sided = axis[:2] in ("l-", "r-")
        key = axis[2:] if sided else axis
        spread = 0.15 if axis.startswith("asym") or "trans-out" in axis else 0.35
        if key not in shared:
            shared[key] = rng.normal(0, spread, samples).clip(-1, 1)
        values[axis] = (shared[key] + (rng.normal(0, 0.07, samples) if sided else 0)).clip(-1, 1)
    columns += [(values[axis] * sign).clip(0) for axis, sign in (axis_of[name] for name in detail)]
    return np.stack(columns, 1)


def _principal_heads(
    stack: Float[np.ndarray, "k v 3"], weights: Float[np.ndarray, "samples k"]
) -> tuple[Float[np.ndarray, "v 3"], Float[np.ndarray, "80 v 3"]]:
    """Mean and principal components (scaled to one standard deviation) of the heads `weights @ stack`.

    Each head is first moved and scaled until its face has the base's place and size: a camera cannot tell those from
    the pose. Every such head lies in the span of the k targets and three shifts, so the PCA is exact in k + 3
    dimensions and takes seconds. Vertices of the face count three times as much as the rest.
    """
    k, v, _ = stack.shape
    base = stack[0]
    face = (base[:, 2] > 0.3) & (base[:, 1] > 6.0)
    shifts = np.broadcast_to(np.eye(3)[:, None], (3, v, 3))
    span = np.concatenate([stack.astype(np.float64), shifts]).reshape(k + 3, -1)

    in_face = stack[:, face].astype(np.float64)
    centre = in_face.mean(1)
    flat = (in_face - centre[:, None]).reshape(k, -1)
    size2 = np.einsum("sk,sk->s", weights @ (flat @ flat.T), weights)
    scale = np.sqrt((flat[0] @ flat[0]) / size2)[:, None]
    coordinates = np.concatenate([scale * weights, centre[0] - scale * (weights @ centre)], 1)

    middle = coordinates.mean(0)
    deviation = (coordinates - middle) / np.sqrt(len(weights))
    importance = np.repeat(np.where(face, 3.0, 1.0), 3)
    metric = (span * importance**2) @ span.T
    # heads = deviation @ span; the eigenvectors of their weighted covariance, found on the small side
    value, vector = np.linalg.eigh(metric)
    root = (vector * np.sqrt(value.clip(0))) @ vector.T
    _, _, axes = np.linalg.svd(deviation @ root, full_matrices=False)
    inverse_root = (vector * np.where(value > value[-1] * 1e-12, 1 / np.sqrt(value.clip(1e-30)), 0)) @ vector.T
    axes = axes[:IDENTITY_DIM]
    spread = np.sqrt(((deviation @ root @ axes.T) ** 2).sum(0))
    components = spread[:, None] * (axes @ inverse_root @ span)
    order = np.sign(components.reshape(IDENTITY_DIM, -1)[np.arange(IDENTITY_DIM), np.abs(components).argmax(1)])
    return (middle @ span).reshape(v, 3), (components * order[:, None]).reshape(IDENTITY_DIM, v, 3)
