"""Driving: which part of the motion comes from speech, and which from the driving video.

Speech moves mouth and jaw. Head pose, eyes, brows and upper face are the driving track's: sound does not tell them.
"""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hicode.motion import LIPS, LOWER_LIP_INNER, UPPER_LIP_INNER, Motion


@runtime_checkable
class MouthDrive(Protocol):
    """What says which controls speech drives: a `HeadModel` or an `Avatar`."""

    mouth_expression: Bool[Tensor, "64"]
    mouth_landmark_weight: Float[Tensor, "478"]


def merge_motion(
    driving: Motion, expression: Float[Tensor, "t 64"], landmarks: Float[Tensor, "t 478 3"], model: MouthDrive
) -> Motion:
    """The driving motion with its mouth replaced by the spoken one.

    Expression: the dimensions of `mouth_expression` are speech's, the others the driving track's. Landmarks: blended by
    `mouth_landmark_weight`, 1 at mouth and jaw. Pose and frame rate: the driving track's. Asserts equal lengths.
    """
    assert len(driving) == len(expression) == len(landmarks), (len(driving), len(expression), len(landmarks))
    return replace(
        driving,
        expression=torch.where(model.mouth_expression, expression, driving.expression),
        landmarks=torch.lerp(driving.landmarks, landmarks, model.mouth_landmark_weight[:, None]),
    )


def resting_mouth(driving: Motion, model: MouthDrive) -> tuple[Float[Tensor, "64"], Float[Tensor, "478 3"]]:
    """The subject's mouth at rest: the mean over the tenth of the driving frames whose lips are the most closed."""
    gap = (driving.landmarks[:, UPPER_LIP_INNER] - driving.landmarks[:, LOWER_LIP_INNER]).norm(dim=-1)
    width = driving.landmarks[:, torch.from_numpy(LIPS), 0]
    # Pursed and stretched lips are closed too: a mouth at rest has its usual width.
    unusual = (width.amax(1) - width.amin(1)) / (width.amax(1) - width.amin(1)).median() - 1
    rest = (gap / gap.median().clamp_min(1e-6) + unusual.abs()).argsort()[: max(1, len(driving) // 10)]
    return driving.expression[rest].mean(0), driving.landmarks[rest].mean(0)
