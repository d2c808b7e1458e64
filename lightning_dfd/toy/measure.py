"""What a toy clip shows, read from its pixels by plain code, and how a set of clips compares with the world.

Axis legend: N clips, F frames, H height, W width, C = 3 colour channels; clips are uint8 [N, F, H, W, C].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_dfd.toy import world

NOTHING = "none"  # the reading where a clip shows no shape, no colour or no motion


@dataclass(frozen=True)
class Reading:
    """What one clip shows; `NOTHING` where a factor cannot be read."""

    shape: str
    colour: str
    direction: str
    background: str
    speed: str


def _separate(clip: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Background colour [C], foreground colour [C] and the foreground's cover of each pixel [F, H, W]."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
    background = np.median(border.reshape(-1, 3), axis=0)
    difference = clip - background
    distance = np.linalg.norm(difference, axis=-1)
    strong = distance >= 0.7 * np.percentile(distance, 99)  # of an even clip, all of it
    foreground = background + np.median(difference[strong], axis=0)
    axis = foreground - background
    cover = np.clip(difference @ axis / max(float(axis @ axis), 1e-9), 0.0, 1.0)
    cover[cover < 0.2] = 0.0  # decoder noise far from the shape would move the centre
    return background, foreground, cover


def _centres(cover: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centre of mass (x, y) per frame, [F, 2], in pixels."""
    rows, columns = np.mgrid[0 : world.SIZE, 0 : world.SIZE] + 0.5
    mass = cover.sum(axis=(1, 2)) + 1e-9
    return np.stack([(cover * columns).sum(axis=(1, 2)) / mass, (cover * rows).sum(axis=(1, 2)) / mass], axis=1)


def _overlap(cover: NDArray[np.float64], shape: str) -> float:
    """Intersection over union of a frame's cover [H, W] with the shape of the same area and centre of mass."""
    size = float(np.sqrt(cover.sum()))
    x, y = _centres(cover[None])[0]
    if shape == "triangle":  # its centre of mass lies a third above the base, below the bounding box's centre
        y -= world.HALF_WIDTH[shape] * size / 3
    template = world.coverage(shape, x, y, size)
    return float(np.minimum(cover, template).sum() / max(np.maximum(cover, template).sum(), 1e-9))


@dataclass(frozen=True)
class Measurement:
    """What is measured in one clip before it is named: colours [C], the shape's cover of each pixel [F, H, W], its
    centre in each frame [F, 2] as (x, y), and how well it overlaps with each shape, in [0, 1]."""

    background: NDArray[np.float64]
    foreground: NDArray[np.float64]
    cover: NDArray[np.float64]
    centres: NDArray[np.float64]
    overlaps: Mapping[str, float]


def measure_clip(clip: NDArray[np.uint8]) -> Measurement:
    """Measure one clip, uint8 [F, H, W, C]."""
    background, foreground, cover = _separate(clip.astype(np.float64))
    overlaps = {shape: float(np.mean([_overlap(frame, shape) for frame in cover])) for shape in world.SHAPES}
    return Measurement(background, foreground, cover, _centres(cover), overlaps)


def read_clip(clip: NDArray[np.uint8]) -> Reading:
    """Read every factor of one clip, uint8 [F, H, W, C], from its pixels."""
    found = measure_clip(clip)
    level = min(world.BACKGROUND_LEVEL, key=lambda name: abs(world.BACKGROUND_LEVEL[name] - found.background.mean()))
    areas = found.cover.sum(axis=(1, 2))
    low, high = world.SHAPE_SIZE**2 / 2, world.SHAPE_SIZE**2 * 2
    contrast = float(np.linalg.norm(found.foreground - found.background))
    if contrast < 40 or not low < np.median(areas) < high or areas.min() < low / 2:
        return Reading(NOTHING, NOTHING, NOTHING, level, NOTHING)

    def colour_distance(name: str) -> float:
        return float(np.linalg.norm(np.array(world.COLOURS[name]) - found.foreground))

    colour = min(world.COLOURS, key=colour_distance)
    shape = max(found.overlaps, key=lambda name: found.overlaps[name])
    moved = found.centres[-1] - found.centres[0]
    travelled = float(np.linalg.norm(moved))
    direction, speed = NOTHING, NOTHING
    if travelled > 3.0:
        direction = max(world.STEP, key=lambda name: float(moved @ np.array(world.STEP[name])))
        speed = min(world.TRAVEL, key=lambda name: abs(world.TRAVEL[name] - travelled))
    return Reading(
        shape=shape if found.overlaps[shape] > 0.6 else NOTHING,
        colour=colour if colour_distance(colour) < 110 else NOTHING,
        direction=direction,
        background=level,
        speed=speed,
    )


@dataclass(frozen=True)
class WorldReport:
    """How a set of clips compares with the world.

    `obedience` is the share of clips whose shape and colour are those of the caption. `shares` holds the
    shares of the free factors' values among all clips, `worst_gap` the largest difference of a share from
    the world's, per factor.
    """

    clips: int
    obedience: float
    shares: Mapping[str, Mapping[str, float]]
    worst_gap: Mapping[str, float]


FREE_FACTORS = {
    "direction": world.DIRECTION_SHARES,
    "background": world.BACKGROUND_SHARES,
    "speed": world.SPEED_SHARES,
}


def compare_with_world(clips: NDArray[np.uint8], captions: Sequence[str]) -> WorldReport:
    """Measure clips, uint8 [N, F, H, W, C], made for `captions` (N of them)."""
    if len(clips) != len(captions) or not len(clips):
        raise ValueError(f"got {len(clips)} clips and {len(captions)} captions; need as many of each, at least one")
    readings = [read_clip(clip) for clip in clips]
    obeyed = [
        reading.shape != NOTHING and world.caption(reading.colour, reading.shape) == caption
        for reading, caption in zip(readings, captions, strict=True)
    ]
    shares: dict[str, dict[str, float]] = {}
    for factor, truth in FREE_FACTORS.items():
        counts = Counter(str(getattr(reading, factor)) for reading in readings)
        shares[factor] = {value: counts[value] / len(readings) for value in (*truth, NOTHING)}
    gaps = {
        factor: max(abs(shares[factor][value] - share) for value, share in truth.items())
        for factor, truth in FREE_FACTORS.items()
    }
    return WorldReport(len(clips), float(np.mean(obeyed)), shares, gaps)
