"""The toy world's own features: few, cheap and readable, so that a distance of a few hundred clips is hardly biased.

Axis legend: B videos, C = 3 channels, F frames, H height, W width, D features.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_dfd.evaluation.features import FeatureExtractor
from lightning_dfd.evaluation.pictures import to_frames
from lightning_dfd.toy import world
from lightning_dfd.toy.measure import measure_clip

LEAST = 10.0  # square pixels: the world's own areas hardly vary, and no pixel's change should count for all else
READINGS = (
    *("background", "red", "green", "blue"),
    *("area", "change of area"),
    *("x at first", "y at first", "x at last", "y at last"),
    *(f"likeness to a {shape}" for shape in world.SHAPES),
)


class WorldReadings(FeatureExtractor):
    """What the world's measuring code reads from a clip, before it decides what that is: `READINGS`, [B, D].

    Each is brought to mean 0 and deviation 1 in the world itself, but for areas, which the world keeps constant: they
    are in units of 10 pixels. So the Frechet distance between two halves of the
    world is near 0 with a few hundred clips, and cosines compare clips rather than the world's mean with itself.
    """

    name, kind, fingerprint = "world-readings", "video", "1"

    def __call__(self, videos: Tensor) -> Tensor:
        mean, deviation = world_scale()
        readings = np.stack([read(clip) for clip in to_frames(videos).numpy()])
        return torch.from_numpy((readings - mean) / deviation).float().to(videos.device)


@cache
def world_scale() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and deviation of `READINGS` in the world, each [D]."""
    readings = np.stack([read(clip) for clip in world.draw_clips(600, seed=123)[1]])
    least = [LEAST if "area" in name else 0.0 for name in READINGS]
    return readings.mean(0), np.maximum(readings.std(0), least)


def read(clip: NDArray[np.uint8]) -> NDArray[np.float64]:
    """`READINGS` of a clip, uint8 [F, H, W, C]."""
    found = measure_clip(clip)
    areas = found.cover.sum(axis=(1, 2))
    path = [*found.centres[0], *found.centres[-1]]
    return np.array(
        [found.background.mean(), *found.foreground, areas.mean(), areas.std(), *path, *found.overlaps.values()]
    )
