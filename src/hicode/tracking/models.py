"""The networks and the head model that tracking uses: one set for each command."""

from functools import cached_property

from hicode.tracking.head_model import HeadModel
from hicode.tracking.landmarks import FaceLandmarker, LandmarkDetector
from hicode.tracking.masks import Segmenter


class TrackingModels:
    """Models that are given, and the others, which are loaded at first use and kept.

    Raises AssetError at first use where a model cannot be fetched.
    """

    def __init__(
        self,
        landmarker: LandmarkDetector | None = None,
        segmenter: Segmenter | None = None,
        head: HeadModel | None = None,
    ):
        given = {"landmarker": landmarker, "segmenter": segmenter, "head": head}
        vars(self).update({name: model for name, model in given.items() if model is not None})

    @cached_property
    def landmarker(self) -> LandmarkDetector:
        """Face detection and landmarks."""
        return FaceLandmarker()

    @cached_property
    def segmenter(self) -> Segmenter:
        """Person masks."""
        return Segmenter()

    @cached_property
    def head(self) -> HeadModel:
        """The morphable head."""
        return HeadModel.load()
