"""The deformation at speaking time: what `Gaussians.deformed(*Deformation(...))` gives, without gradients, in about half the time.

n Gaussians, m anchors, 478 landmarks, c channels, as in `deformation.py`, which is the reference: results agree to 1e-5 head units (tested).

Kept from frame to frame is all that depends on canonical positions alone: the normalised query, the mesh vertices that a Gaussian is bound to,
indices in 32 bits. Attention runs over blocks of anchors whose scores stay in the core's own cache, so m x 478 is never written; its mean, deviation and
first AdaIN are one pass, the second AdaIN is folded into the layer behind it, and interpolation, carrier and addition are one pass over
the Gaussians.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numba import njit
from torch import Tensor

from hicode.avatar.deformation import Deformation, StillAttention, normalize_over_points
from hicode.gaussians import Gaussians
from hicode.render.simd import lane, load
from hicode.threads import run_on_threads, take

BLOCK = 256  # anchors at a time: 256 x 478 scores are half a megabyte
ROW = 16  # floats, one vector: what moves a Gaussian is location 3, quaternion 4, log-scale 3, colour 3
CHUNK = 2048  # Gaussians that a thread moves at a time
# Scores are exponentiated as they are, without their row's maximum, while none can pass this: e^±40 and its products stay inside float32.
SCORE_MAX = 40.0
_OPTIONS = {
    "cache": True,
    "nogil": True,
    "fastmath": {"reassoc", "nsz", "arcp", "contract"},
    "error_model": "numpy",
    "boundscheck": False,
}


class FrameDeformer:
    """Deforms one cloud frame after frame. Neither the cloud nor the deformation may change afterwards."""

    @staticmethod
    def supports(deformation: Deformation) -> bool:
        """Whether this deformation is the paper's full control (not an ablation of it), frozen, on the CPU."""
        config, control = deformation.config, deformation.control
        frozen = not any(p.requires_grad for p in control.parameters())
        return config.fine == "adain" and config.coarse == "adain" and frozen and control.center.device.type == "cpu"

    @torch.no_grad()
    def __init__(self, deformation: Deformation, gaussians: Gaussians):
        assert self.supports(deformation), deformation.config
        self.deformation, self.gaussians = deformation, gaussians
        control, anchors, n = deformation.control, deformation.anchors, len(gaussians)
        points = gaussians.means if anchors is None else anchors.points
        query = control.embed(points)
        self._normal = _array(normalize_over_points(query))
        standing = deformation.standing(points)
        self._still = standing.attention if isinstance(standing.attention, StillAttention) else None
        self._near = None if self._still else standing.attention
        self._query = query * query.shape[1] ** -0.5
        self._query_norm = float(self._query.norm(dim=1).max())
        if anchors is None:
            self._anchor_index, self._anchor_weight = _starts(torch.arange(n)[:, None]), np.ones((n, 1), np.float32)
        else:
            self._anchor_index, self._anchor_weight = _starts(anchors.index), _array(anchors.weight)
        nothing = np.zeros((n, 0), np.int32), np.zeros((n, 0), np.float32)
        self._vertex_index, self._vertex_weight = self._landmark_index, self._landmark_weight = nothing
        if deformation.carrier is not None:
            binding, carrier = deformation.binding, deformation.carrier
            used, index = binding.vertices.unique(return_inverse=True)
            self._basis = carrier.expression_basis[:, used].flatten(1).contiguous()
            self._vertex_index, self._vertex_weight = _starts(index.reshape(n, -1)), _array(binding.weights)
            self._landmark_index, self._landmark_weight = _starts(binding.landmarks), _array(binding.landmark_weights)
        self._canonical = _rows(
            torch.cat([gaussians.means, gaussians.quats, gaussians.log_scales, gaussians.colors], 1)
        )

    @torch.no_grad()
    def __call__(
        self,
        expression: Float[Tensor, "64"],
        landmarks: Float[Tensor, "478 3"],
        turn: Float[Tensor, "3 3"] | None = None,
    ) -> Gaussians:
        """The Gaussians at one frame (Eqs 7-12); `turn` is the head's rotation to the camera."""
        deformation, n = self.deformation, len(self.gaussians)
        offsets = self._offsets(expression, landmarks)
        offsets[:, :3] *= deformation.config.max_offset
        moved = residual = torch.zeros(0, 3)
        if deformation.carrier is not None:
            carrier = deformation.carrier
            moved = (expression @ self._basis).reshape(-1, 3)
            residual = carrier.beside_the_mesh(expression, landmarks)
        means, quats, log_scales, colors = torch.empty(n, 3), torch.empty(n, 4), torch.empty(n, 3), torch.empty(n, 3)
        run_on_threads(
            _move, -(-n // CHUNK), _rows(offsets), self._anchor_index, self._anchor_weight, _rows(moved), self._vertex_index,
            self._vertex_weight, _rows(residual), self._landmark_index, self._landmark_weight, self._canonical,
            means.numpy(), quats.numpy(), log_scales.numpy(), colors.numpy(),
        )  # fmt: skip
        still = Gaussians(means, log_scales, quats, self.gaussians.opacity_logits, colors, self.gaussians.turn_colors)
        return still.turned(deformation.control.turned(turn))

    def _offsets(self, expression: Tensor, landmarks: Tensor) -> Float[Tensor, "m o"]:
        """What `HierarchicalControl` returns."""
        control = self.deformation.control
        c, m = control.config.channels, len(self._query)
        k, v = control.keys_values(landmarks)
        moments = self._moments(k, v)

        styled = torch.empty(m, c)
        pieces = -(-m // BLOCK)
        sums = np.zeros((pieces, 2, c))
        run_on_threads(_restyle, pieces, moments.numpy(), self._normal, styled.numpy(), sums)
        mean, square = torch.from_numpy(sums.sum(0) / m)
        deviation = (square - mean * mean).clamp_min(0).sqrt()

        # The second AdaIN is y * scale + shift per channel, and goes into the layer that follows.
        style_std, style_mean = control.style(torch.cat([control.heard(expression), self.deformation.identity])).split(
            c
        )
        scale = (style_std / (deviation + 1e-5)).float()
        shift = style_mean - mean.float() * scale
        first, *rest = control.head
        return torch.nn.Sequential(*rest)(F.linear(styled, first.weight * scale, first.bias + first.weight @ shift))

    def _moments(self, k: Float[Tensor, "478 c"] | None, v: Float[Tensor, "478 c"]) -> Float[Tensor, "m 2c+16"]:
        """Numerators of E[v] and E[v²] and, in the last columns, the denominator of the softmax: 16 columns, a whole vector, are faster than one."""
        if self._still is not None:
            return torch.cat([*self._still.moments(v), torch.ones(len(self._query), 16)], 1)
        values = torch.cat([v, v * v, torch.ones(len(v), 16)], 1)
        m, keys = len(self._query), k.T.contiguous()
        bounded = self._query_norm * float(k.norm(dim=1).max()) < SCORE_MAX  # |q k| <= |q| |k|
        moments, scores = torch.empty(m, values.shape[1]), torch.empty(min(BLOCK, m), len(values))
        for begin in range(0, m, BLOCK):
            q = self._query[begin : begin + BLOCK]
            block = torch.mm(q, keys, out=scores[: len(q)])
            if self._near is not None:
                block += self._near[
                    begin : begin + BLOCK
                ]  # 0 at most: a bounded score stays bounded, and every row keeps its nearest landmark
            if not bounded:
                block -= block.amax(1, keepdim=True)
            torch.mm(block.exp_(), values, out=moments[begin : begin + BLOCK])
        return moments


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def _rows(table: Float[Tensor, "k w"]) -> np.ndarray:
    """The table flat, its rows filled up to one vector: location, quaternion, log-scale, colour, zeros."""
    rows = np.zeros((len(table), ROW), np.float32)
    rows[:, : table.shape[1]] = table.detach().numpy()
    return rows.reshape(-1)


def _starts(index: Tensor) -> np.ndarray:
    """Where the rows begin."""
    return np.ascontiguousarray(index.numpy() * ROW, np.int32)


@njit(**_OPTIONS)
def _restyle(counter, moments, normal, styled, sums):
    """AdaIN (Eq. 11) from attention's moments, BLOCK rows a piece, and the sums of the result and of its square over each piece's rows."""
    m, c = normal.shape
    zero, floor = np.float32(0), np.float32(1e-5)
    piece = take(counter)
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
        piece = take(counter)


@njit(**_OPTIONS)
def _move(
    counter, offsets, anchor_index, anchor_weight, moved, vertex_index, vertex_weight, residual, landmark_index, landmark_weight,
    canonical, out_means, out_quats, out_log_scales, out_colors,
):  # fmt: skip
    """Offsets interpolated from the anchors, the carrier's displacement, and their sum with the canonical Gaussians, a row of 16 as one vector."""
    n = canonical.shape[0] // ROW
    chunk = take(counter)
    while chunk * CHUNK < n:
        for i in range(chunk * CHUNK, min(n, (chunk + 1) * CHUNK)):
            row = load(canonical, ROW * i)
            for k in range(anchor_index.shape[1]):
                row += load(offsets, np.int64(anchor_index[i, k])) * anchor_weight[i, k]
            for k in range(vertex_index.shape[1]):
                row += load(moved, np.int64(vertex_index[i, k])) * vertex_weight[i, k]
            for k in range(landmark_index.shape[1]):
                row += load(residual, np.int64(landmark_index[i, k])) * landmark_weight[i, k]
            for k in range(3):
                out_means[i, k] = lane(row, k)
                out_log_scales[i, k] = lane(row, 7 + k)
                out_colors[i, k] = lane(row, 10 + k)
            for k in range(4):
                out_quats[i, k] = lane(row, 3 + k)
        chunk = take(counter)
