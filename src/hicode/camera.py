"""The pinhole camera.

Camera frame: x right, y down, z forward (OpenCV). Pixel coordinates are continuous; pixel (row i, column j) is centred
at (x, y) = (j + 0.5, i + 0.5). The head is static in its own frame; each frame's head pose is the camera's extrinsic.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hicode.geometry import transform


@dataclass(frozen=True, eq=False)
class Camera:
    """One camera, or a batch of them over the leading dimensions.

    K             "*b 3 3"  intrinsics in px
    T_camera_head "*p 4 4"  head frame to camera frame; lengths in head units (decimetres)
    """

    K: Float[Tensor, "*b 3 3"]
    T_camera_head: Float[Tensor, "*p 4 4"]
    width: int
    height: int

    @staticmethod
    def pinhole(focal_px: float, width: int, height: int, T_camera_head: Tensor | None = None) -> "Camera":
        """Square pixels, principal point at the image's centre; without a pose, the identity."""
        K = torch.tensor([[focal_px, 0.0, width / 2], [0.0, focal_px, height / 2], [0.0, 0.0, 1.0]])
        return Camera(K, torch.eye(4) if T_camera_head is None else T_camera_head, width, height)

    def double(self) -> "Camera":
        """The same camera in double precision."""
        return replace(self, K=self.K.double(), T_camera_head=self.T_camera_head.double())

    def with_pose(self, T_camera_head: Float[Tensor, "*b 4 4"]) -> "Camera":
        """The same intrinsics under another pose, or a batch of poses."""
        return replace(self, T_camera_head=T_camera_head)

    def expand(self, poses: Float[Tensor, "t 4 4"]) -> "Camera":
        """The same intrinsics as a batch of t cameras, one for each pose."""
        return replace(self, K=self.K.expand(len(poses), 3, 3), T_camera_head=poses)

    def resized(self, width: int, height: int) -> "Camera":
        """The same view on another pixel grid."""
        scale = torch.tensor([width / self.width, height / self.height, 1.0], dtype=self.K.dtype, device=self.K.device)
        return replace(self, K=self.K * scale[:, None], width=width, height=height)

    def cropped(self, x0: int, y0: int, width: int, height: int) -> "Camera":
        """The window of `width` x `height` px whose corner is pixel (x0, y0): the same rays, fewer pixels."""
        K = self.K.clone()
        K[..., 0, 2] -= x0
        K[..., 1, 2] -= y0
        return replace(self, K=K, width=width, height=height)

    def project(self, points: Float[Tensor, "*b n 3"]) -> tuple[Float[Tensor, "*b n 2"], Float[Tensor, "*b n"]]:
        """Head-frame points to pixel coordinates and depth (head units).

        Points at or behind the camera give meaningless pixels: check the depth.
        """
        p = transform(self.T_camera_head, points)
        focal = torch.stack([self.K[..., 0, 0], self.K[..., 1, 1]], -1)[..., None, :]
        return focal * p[..., :2] / p[..., 2:] + self.K[..., None, :2, 2], p[..., 2]

    def unproject(self, pixels: Float[Tensor, "*b n 2"], depth: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n 3"]:
        """Pixels with depth to head-frame points: the inverse of `project`."""
        focal = torch.stack([self.K[..., 0, 0], self.K[..., 1, 1]], -1)[..., None, :]
        xy = (pixels - self.K[..., None, :2, 2]) / focal * depth[..., None]
        p = torch.cat([xy, depth[..., None]], -1)
        return (p - self.T_camera_head[..., None, :3, 3]) @ self.T_camera_head[..., :3, :3]


def pinhole_jacobian(
    points: Float[np.ndarray, "*b 3"], focal_px: float
) -> tuple[Float[np.ndarray, "*b 2"], Float[np.ndarray, "*b 2 3"]]:
    """Camera-frame points to pixels from the principal point, and the derivative of the pixels by the points."""
    depth = points[..., 2]
    pixels = focal_px * points[..., :2] / depth[..., None]
    by_point = np.zeros((*points.shape[:-1], 2, 3))
    by_point[..., 0, 0] = by_point[..., 1, 1] = focal_px / depth
    by_point[..., 2] = -pixels / depth[..., None]
    return pixels, by_point
