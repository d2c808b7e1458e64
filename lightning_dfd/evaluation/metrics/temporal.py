"""Metrics of change over time; what they measure is defined in `functional.temporal`.

Axis legend: B videos [B, 3, F, H, W] in [-1, 1], F >= 2.
"""

from __future__ import annotations

from torch import Tensor

from lightning_dfd.evaluation.metrics.adapt import Extractor, as_extractor, frame_features
from lightning_dfd.evaluation.metrics.base import MeanOverVideos
from lightning_dfd.evaluation.metrics.functional.temporal import frame_consistency, motion, temporal_flickering


class TemporalFlickering(MeanOverVideos):
    """Mean of `temporal_flickering` over videos: 1 for stills, less the more consecutive frames differ."""

    higher_is_better = True

    def update(self, videos: Tensor) -> None:
        """Add videos [B, 3, F, H, W]."""
        self._add(temporal_flickering(videos))


class MotionAmount(MeanOverVideos):
    """Mean of `motion` over videos; more is not better, so compare with the teacher or the data."""

    def update(self, videos: Tensor) -> None:
        """Add videos [B, 3, F, H, W]."""
        self._add(motion(videos))


class FrameConsistency(MeanOverVideos):
    """Mean of `frame_consistency` over videos: VBench's subject consistency with DINO, background with CLIP.

    Args:
        extractor: of frames. A name, a `FeatureExtractor`, or a module or function as `CallableExtractor` takes.
    """

    higher_is_better = True

    def __init__(self, extractor: Extractor) -> None:
        super().__init__()
        self.extractor = as_extractor(extractor)

    def update(self, videos: Tensor) -> None:
        """Add videos [B, 3, F, H, W].

        Raises:
            ValueError: if the extractor knows no frames, or there are fewer than two.
        """
        self._add(frame_consistency(frame_features(self.extractor, videos)))
