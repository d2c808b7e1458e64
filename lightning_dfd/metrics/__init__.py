from lightning_dfd.metrics.adapt import CallableExtractor, Extractor, as_extractor
from lightning_dfd.metrics.colour import ColourStatistics
from lightning_dfd.metrics.diversity import PromptDiversity, VendiScore
from lightning_dfd.metrics.frechet import FrechetVideoDistance
from lightning_dfd.metrics.suite import VideoSuite, relative_to_teacher, score
from lightning_dfd.metrics.temporal import FrameConsistency, MotionAmount, TemporalFlickering

__all__ = [
    "CallableExtractor",
    "ColourStatistics",
    "Extractor",
    "FrameConsistency",
    "FrechetVideoDistance",
    "MotionAmount",
    "PromptDiversity",
    "TemporalFlickering",
    "VendiScore",
    "VideoSuite",
    "as_extractor",
    "relative_to_teacher",
    "score",
]
