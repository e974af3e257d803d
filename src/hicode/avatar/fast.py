"""The deformation at speaking time: `Deformation.deform` without gradients, in about half the time.

n Gaussians, m anchors, c channels, as in `deformation.py`, the reference: results agree to 1e-5 head units (tested).

What depends on canonical positions alone is kept: the normalised query, the mesh vertices in use, 32-bit indices.
Learned attention runs over blocks of anchors whose scores stay in the core's cache. Its mean, deviation and the first
AdaIN are one pass. The second AdaIN is folded into the layer after it. Interpolation, rig and addition are one pass.
"""

from typing import no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int32
from numba import njit
from torch import Tensor

from hicode.avatar.deformation import Deformation
from hicode.avatar.hfec import HFEC, StaticAttention, normalize_over_points
from hicode.gaussians import Gaussians
from hicode.motion import N_LANDMARKS, MotionFrame
from hicode.render.simd import lane, load, store, vector
from hicode.threads import run_on_threads, take

BLOCK = 256  # anchors at a time: 256 x 478 scores are half a megabyte
ROW = 16  # floats, one vector: location 3, quaternion 4, log-scale 3, colour 3, zeros
CHUNK = 2048  # Gaussians that a thread moves at a time
WEIGHT_MIN = 1e-5  # of static attention, whose rows sum to 1: two thirds of the weights are smaller
SCORE_MAX = 40.0  # scores below it need no row maximum: e^±40 and its products fit float32
_OPTIONS = {
    "cache": True,
    "nogil": True,
    "fastmath": {"reassoc", "nsz", "arcp", "contract"},
    "error_model": "numpy",
    "boundscheck": False,
}


class FrameDeformer:
    """Deforms one cloud frame after frame; any thread may call it. Cloud and deformation may not change afterwards."""

    @staticmethod
    def supports(deformation: Deformation) -> bool:
        """Whether this deformation is frozen, on the CPU, and has HFEC or no control (not an ablation of it)."""
        frozen = not any(p.requires_grad for p in deformation.parameters())
        on_cpu = deformation.normalization.center.device.type == "cpu"
        return deformation.config.control in ("hfec", "none") and frozen and on_cpu

    @torch.no_grad()
    def __init__(self, deformation: Deformation, gaussians: Gaussians):
        assert self.supports(deformation), deformation.config
        self._deformation, self._gaussians, n = deformation, gaussians, len(gaussians)
        nothing = np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32)
        self._anchor_index, self._anchor_weight = self._vertex_index, self._vertex_weight = nothing
        self._landmark_index, self._landmark_weight = nothing
        self._control: HFEC | None = None
        self._static: tuple[np.ndarray, ...] | None = None
        if isinstance(deformation.control, HFEC):
            self._control = deformation.control
            self._prepare(deformation.control)
        if deformation.rig is not None:
            binding, rig = deformation.binding, deformation.rig
            assert binding is not None, "the rig's Gaussians are not bound"
            used, index = binding.vertices.unique(return_inverse=True)
            self._basis = rig.expression_basis[:, used].flatten(1).contiguous()
            self._vertex_index, self._vertex_weight = _starts(index.reshape(n, -1)), _array(binding.weights)
            self._landmark_index, self._landmark_weight = _starts(binding.landmarks), _array(binding.landmark_weights)
        self._canonical = _rows(
            torch.cat([gaussians.means, gaussians.quats, gaussians.log_scales, gaussians.colors], 1)
        )

    def _prepare(self, control: HFEC) -> None:
        n, anchors = len(self._gaussians), self._deformation.anchors
        points = self._deformation.anchor_cache(self._gaussians.means)
        query = control.query(points)
        self._normal, self._attention = _array(normalize_over_points(query)), points.attention
        if isinstance(points.attention, StaticAttention):
            whole = query.shape[1] % (ROW * len(points.attention.weights)) == 0
            self._static = _sparse(points.attention) if whole else None
        self._query = query * query.shape[1] ** -0.5
        self._query_norm = float(self._query.norm(dim=1).max())
        if anchors is None:
            self._anchor_index, self._anchor_weight = _starts(torch.arange(n)[:, None]), np.ones((n, 1), np.float32)
        else:
            self._anchor_index, self._anchor_weight = _starts(anchors.index), _array(anchors.weight)

    @torch.no_grad()
    def __call__(self, frame: MotionFrame) -> Gaussians:
        """The Gaussians at one frame (Eqs 7-12)."""
        deformation, canonical, n = self._deformation, self._gaussians, len(self._gaussians)
        offsets = vertices = residual = torch.zeros(0, 3)
        if self._control is not None:
            offsets = self._offsets(self._control, frame)
            offsets[:, :3] *= deformation.config.max_offset
        if deformation.rig is not None:
            vertices = (frame.expression @ self._basis).reshape(-1, 3)
            residual = deformation.rig.landmark_residual(frame.expression, frame.landmarks)
        means, quats, log_scales, colors = torch.empty(n, 3), torch.empty(n, 4), torch.empty(n, 3), torch.empty(n, 3)
        run_on_threads(
            _move, -(-n // CHUNK), _rows(offsets), self._anchor_index, self._anchor_weight, _rows(vertices),
            self._vertex_index, self._vertex_weight, _rows(residual), self._landmark_index, self._landmark_weight,
            self._canonical, means.numpy(), quats.numpy(), log_scales.numpy(), colors.numpy(),
        )  # fmt: skip
        moved = Gaussians(means, log_scales, quats, canonical.opacity_logits, colors, canonical.view_dependent_color)
        return moved.seen_at(deformation.relative_rotation(frame.head_rotation))

    def _offsets(self, control: HFEC, frame: MotionFrame) -> Float[Tensor, "m o"]:
        """What `HFEC` returns."""
        signals = self._deformation.normalization(frame)
        m, c = self._query.shape
        moments = self._moments(*control.attention.keys_values(signals))
        styled = torch.empty(m, c)
        pieces = -(-m // BLOCK)
        sums = np.zeros((pieces, 2, c))
        run_on_threads(_restyle, pieces, moments.numpy(), self._normal, styled.numpy(), sums)
        mean, square = torch.from_numpy(sums.sum(0) / m)
        deviation = (square - mean * mean).clamp_min(0).sqrt()

        # The second AdaIN is y * scale + shift per channel, and goes into the layer that follows.
        style_mean, style_std = control.style(signals.vector)
        scale = (style_std / (deviation + 1e-5)).float()
        shift = style_mean - mean.float() * scale
        first, *rest = control.offsets
        return torch.nn.Sequential(*rest)(F.linear(styled, first.weight * scale, first.bias + first.weight @ shift))

    def _moments(self, k: Float[Tensor, "478 c"] | None, v: Float[Tensor, "478 c"]) -> Float[Tensor, "m columns"]:
        """Numerators of E[v] and E[v²] (c columns each) and 16 columns of the softmax's denominator: a whole vector is
        faster than one number."""
        m, c = self._query.shape
        if self._static is not None:
            moments = torch.empty(m, 2 * c + 16)
            flat = v.contiguous().flatten().numpy()
            run_on_threads(_attend_static, -(-m // BLOCK), *self._static, flat, moments.numpy())
            return moments
        values = torch.cat([v, v * v, torch.ones(len(v), 16)], 1)
        if isinstance(self._attention, StaticAttention):
            return torch.cat([*self._attention.moments(v), torch.ones(m, 16)], 1)
        assert k is not None, "learned attention has keys"
        keys = k.T.contiguous()
        bounded = self._query_norm * float(k.norm(dim=1).max()) < SCORE_MAX  # |q k| <= |q| |k|
        moments, scores = torch.empty(m, values.shape[1]), torch.empty(min(BLOCK, m), len(values))
        for begin in range(0, m, BLOCK):
            q = self._query[begin : begin + BLOCK]
            block = torch.mm(q, keys, out=scores[: len(q)])
            if isinstance(self._attention, Tensor):
                block += self._attention[begin : begin + BLOCK]  # at most 0, and 0 at each row's nearest landmark
            if not bounded:
                block -= block.amax(1, keepdim=True)
            torch.mm(block.exp_(), values, out=moments[begin : begin + BLOCK])
        return moments


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _rows(table: Float[Tensor, "k w"]) -> Float32[np.ndarray, "k16"]:
    """The table flat, its rows filled up to one vector."""
    rows = np.zeros((len(table), ROW), np.float32)
    rows[:, : table.shape[1]] = table.detach().numpy()
    return rows.reshape(-1)


def _sparse(attention: StaticAttention) -> tuple[np.ndarray, ...]:
    """Attention without the weights that do not count: for each share and row where they begin, landmark, weight."""
    kept = [w * (w >= WEIGHT_MIN) for w in attention.weights]
    kept = torch.stack([w / w.sum(1, keepdim=True) for w in kept]).numpy()  # "s m 478"
    share, row, landmark = np.nonzero(kept)
    counts = np.bincount(share * kept.shape[1] + row, minlength=kept.shape[0] * kept.shape[1])
    starts = np.r_[0, np.cumsum(counts)].astype(np.int64)
    return starts, landmark.astype(np.int32), kept[share, row, landmark].astype(np.float32)


def _starts(index: Tensor) -> Int32[np.ndarray, "n k"]:
    """Where the rows begin in the flat table."""
    return np.ascontiguousarray(index.numpy() * ROW, np.int32)


@njit(**_OPTIONS)
@no_type_check  # Numba must compile the function itself, not a checked wrapper
def _restyle(counter, moments, normal, styled, sums):
    """The first AdaIN (Eq. 11) from attention's moments, and each piece's sums of the result and of its square."""
    m, c = normal.shape
    zero, floor = np.float32(0), np.float32(1e-5)
    piece = take(counter)  # pyright: ignore[reportCallIssue] (numba adds the typing context)
    while piece * BLOCK < m:
        total, square = sums[piece, 0], sums[piece, 1]
        for i in range(piece * BLOCK, min(m, (piece + 1) * BLOCK)):
            row, inverse = moments[i], np.float32(1) / moments[i, 2 * c]
            for j in range(c):
                mean = row[j] * inverse
                y = normal[i, j] * np.sqrt(max(row[c + j] * inverse - mean * mean, zero) + floor) + mean
                styled[i, j] = y
                total[j] += np.float64(y)
                square[j] += np.float64(y) * np.float64(y)
        piece = take(counter)  # pyright: ignore[reportCallIssue]


@njit(**_OPTIONS)
@no_type_check
def _attend_static(counter, starts, landmark, weight, values, moments):
    """What `FrameDeformer._moments` returns, of static attention whose shares are whole vectors of channels."""
    m, c = moments.shape[0], values.shape[0] // N_LANDMARKS
    shares, pitch = (starts.shape[0] - 1) // m, moments.shape[1]
    width, flat = c // shares, moments.reshape(-1)
    piece = take(counter)  # pyright: ignore[reportCallIssue]
    while piece * BLOCK < m:
        for i in range(piece * BLOCK, min(m, (piece + 1) * BLOCK)):
            for j in range(0, c, ROW):
                row = (j // width) * m + i
                first, second = vector(np.float32(0)), vector(np.float32(0))
                for k in range(starts[row], starts[row + 1]):
                    value = load(values, np.int64(landmark[k]) * c + j)
                    part = value * weight[k]
                    first += part
                    second += part * value
                store(flat, i * pitch + j, first)
                store(flat, i * pitch + c + j, second)
            for j in range(2 * c, pitch):
                moments[i, j] = 1
        piece = take(counter)  # pyright: ignore[reportCallIssue]


@njit(**_OPTIONS)
@no_type_check
def _move(  # noqa: PLR0913 (a kernel takes its arrays one by one)
    counter, offsets, anchor_index, anchor_weight, vertices, vertex_index, vertex_weight, residual, landmark_index,
    landmark_weight, canonical, out_means, out_quats, out_log_scales, out_colors,
):  # fmt: skip
    """Canonical rows plus offsets interpolated from the anchors plus the rig's displacement; a row is one vector."""
    n = canonical.shape[0] // ROW
    chunk = take(counter)  # pyright: ignore[reportCallIssue]
    while chunk * CHUNK < n:
        for i in range(chunk * CHUNK, min(n, (chunk + 1) * CHUNK)):
            row = load(canonical, ROW * i)
            for k in range(anchor_index.shape[1]):
                row += load(offsets, np.int64(anchor_index[i, k])) * anchor_weight[i, k]
            for k in range(vertex_index.shape[1]):
                row += load(vertices, np.int64(vertex_index[i, k])) * vertex_weight[i, k]
            for k in range(landmark_index.shape[1]):
                row += load(residual, np.int64(landmark_index[i, k])) * landmark_weight[i, k]
            for k in range(3):
                out_means[i, k] = lane(row, k)
                out_log_scales[i, k] = lane(row, 7 + k)
                out_colors[i, k] = lane(row, 10 + k)
            for k in range(4):
                out_quats[i, k] = lane(row, 3 + k)
        chunk = take(counter)  # pyright: ignore[reportCallIssue]
