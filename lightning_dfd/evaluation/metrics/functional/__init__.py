from lightning_dfd.evaluation.metrics.functional.colour import (
    clipped_share,
    colourfulness,
    contrast,
    histogram_distance,
    saturation,
    saturation_histogram,
)
from lightning_dfd.evaluation.metrics.functional.diversity import (
    mean_pairwise_cosine,
    prompt_diversity,
    spaced_frames,
    split_groups,
    vendi_score,
)
from lightning_dfd.evaluation.metrics.functional.frechet import Moments, frechet_distance
from lightning_dfd.evaluation.metrics.functional.temporal import frame_consistency, motion, temporal_flickering

__all__ = [
    "Moments",
    "clipped_share",
    "colourfulness",
    "contrast",
    "frame_consistency",
    "frechet_distance",
    "histogram_distance",
    "mean_pairwise_cosine",
    "motion",
    "prompt_diversity",
    "saturation",
    "saturation_histogram",
    "spaced_frames",
    "split_groups",
    "temporal_flickering",
    "vendi_score",
]
