from lightning_dfd.evaluation.metrics.adapt import CallableExtractor, Extractor, as_extractor
from lightning_dfd.evaluation.metrics.colour import ColourStatistics
from lightning_dfd.evaluation.metrics.diversity import PromptDiversity, VendiScore
from lightning_dfd.evaluation.metrics.frechet import FrechetVideoDistance
from lightning_dfd.evaluation.metrics.suite import VideoSuite, relative_to_teacher, score
from lightning_dfd.evaluation.metrics.temporal import FrameConsistency, MotionAmount, TemporalFlickering

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
