"""The configuration of tracking, as one tree."""

from dataclasses import dataclass

from hicode.tracking.face_tracker import LandmarkConfig
from hicode.tracking.fit import FitConfig, FlowConfig
from hicode.tracking.landmark_drift import DriftConfig
from hicode.tracking.masks import MaskConfig
from hicode.tracking.rigid_pose import DepthConfig, RigidPoseConfig


@dataclass(frozen=True)
class TrackConfig:
    """How a head is tracked, part by part."""

    landmarks: LandmarkConfig = LandmarkConfig()  # landmarks of one face through the video
    flow: FlowConfig = FlowConfig()  # optical flow of the upper face
    fit: FitConfig = FitConfig()  # head model, poses and expressions from landmarks
    masks: MaskConfig = MaskConfig()  # person and head masks
    rigid_pose: RigidPoseConfig = RigidPoseConfig()  # poses from points of the whole head
    drift: DriftConfig = DriftConfig()  # canonical landmarks that stay on the skin
    depth: DepthConfig = DepthConfig()  # depth maps
