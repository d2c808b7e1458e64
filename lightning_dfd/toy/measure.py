"""What a toy clip shows, read from its pixels by plain code, and how a set of clips compares with the world.

Axis legend: N clips, F frames, H height, W width, C = 3 colour channels; clips are uint8 [N, F, H, W, C].
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from lightning_dfd.toy import world

ERRORS = ("obedience", "readable", "kinds", "strength")  # measures of a report that have standard errors
MOTION = ("direction", "speed", "lane", "path")  # factors that are read from how a shape moves
NOTHING = "none"  # the reading where a clip shows no shape, no colour or no motion


@dataclass(frozen=True)
class Reading:
    """What one clip shows; `NOTHING` where a factor cannot be read. `strength` is of the colour, NaN without one."""

    shape: str
    colour: str
    strength: float
    direction: str
    background: str
    speed: str
    lane: str
    path: str

    @property
    def kind(self) -> tuple[str, ...]:
        """The values of the free factors."""
        return tuple(str(getattr(self, factor)) for factor in world.FACTORS)


def _separate(clip: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Background colour [C], foreground colour [C] and the foreground's cover of each pixel [F, H, W]."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1)
    background = np.median(border.reshape(-1, 3), axis=0)
    difference = clip - background
    distance = np.linalg.norm(difference, axis=-1)
    strong = distance >= 0.8 * np.percentile(distance, 99)  # of an even clip, all of it
    foreground = background + np.median(difference[strong], axis=0)
    axis = foreground - background
    cover = np.clip(difference @ axis / max(float(axis @ axis), 1e-9), 0.0, 1.0)
    cover[cover < 0.2] = 0.0  # decoder noise far from the shape would move the centre
    return background, foreground, cover


def _centres(cover: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centre of mass (x, y) per frame, [F, 2], in pixels."""
    mass = cover.sum(axis=(1, 2)) + 1e-9
    return np.stack([cover.sum(axis=1) @ world.PIXELS / mass, cover.sum(axis=2) @ world.PIXELS / mass], axis=1)


def _overlap(cover: NDArray[np.float64], centres: NDArray[np.float64], shape: str) -> float:
    """Intersection over union of the cover [F, H, W] with the shape of the same area and centre of mass [F, 2], the
    mean over frames."""
    size = np.sqrt(cover.sum(axis=(1, 2)))
    x, y = centres.T
    if shape == "triangle":  # its centre of mass lies a third above the base, below the bounding box's centre
        y = y - world.HALF_WIDTH[shape] * size / 3
    template = world.coverage(shape, x, y, size)
    common, either = np.minimum(cover, template).sum(axis=(1, 2)), np.maximum(cover, template).sum(axis=(1, 2))
    return float((common / np.maximum(either, 1e-9)).mean())


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
    centres = _centres(cover)
    overlaps = {shape: _overlap(cover, centres, shape) for shape in world.SHAPES}
    return Measurement(background, foreground, cover, centres, overlaps)


def read_clip(clip: NDArray[np.uint8]) -> Reading:
    """Read every factor of one clip, uint8 [F, H, W, C], from its pixels."""
    found = measure_clip(clip)
    background = nearest(world.BACKGROUND_LEVEL, float(found.background.mean()))
    areas = found.cover.sum(axis=(1, 2))
    low, high = world.SHAPE_SIZE**2 / 2, world.SHAPE_SIZE**2 * 2
    contrast = float(np.linalg.norm(found.foreground - found.background))
    if contrast < 40 or not low < np.median(areas) < high or areas.min() < low / 2:
        return Reading(NOTHING, NOTHING, math.nan, NOTHING, background, NOTHING, NOTHING, NOTHING)
    shape = max(found.overlaps, key=lambda name: found.overlaps[name])
    colour, strength = read_colour(found.foreground)
    return Reading(
        shape if found.overlaps[shape] > 0.6 else NOTHING, colour, strength, background=background,
        **read_motion(found.centres),
    )  # fmt: skip


def nearest(values: Mapping[str, float], found: float) -> str:
    return min(values, key=lambda name: abs(values[name] - found))


def read_colour(foreground: NDArray[np.float64]) -> tuple[str, float]:
    """The world's colour whose hue is nearest to that of `foreground` [C], and its strength, 1 for the full colour."""
    tint = foreground - foreground.mean()

    def likeness(name: str) -> float:
        full = np.array(world.COLOURS[name], dtype=np.float64)
        full -= full.mean()
        return float(tint @ full / max(float(np.linalg.norm(tint) * np.linalg.norm(full)), 1e-9))

    colour = max(world.COLOURS, key=likeness)
    strength = float(np.ptp(foreground) / np.ptp(np.array(world.COLOURS[colour])))
    return (colour, strength) if likeness(colour) > 0.8 and strength > 0.15 else (NOTHING, math.nan)


OFF = 2.5  # pixels, root mean square over frames: a motion that is further from all of the world's is none of them


@cache
def motions() -> dict[tuple[str, str, str, str], NDArray[np.float64]]:
    """The way from the first frame on of every direction, speed, lane and path, [F, 2] as (x, y), in pixels."""
    found = {}
    for values in itertools.product(*(world.FACTORS[factor] for factor in MOTION)):
        named = dict(zip(MOTION, values, strict=True)) | {"background": "dark"}
        scene = world.place("square", "red", 1.0, ("red", "square"), named)
        centres = np.stack(world.path_of(scene, np.linspace(0.0, 1.0, world.FRAMES)), axis=1)
        found[values[0], values[1], values[2], values[3]] = centres - centres[0]
    return found


def read_motion(centres: NDArray[np.float64]) -> dict[str, str]:
    """Direction, speed, lane and path of centres [F, 2] as (x, y), in pixels: the world's motion that is nearest."""
    moved = centres - centres[0]

    def distance(values: tuple[str, str, str, str]) -> float:
        return float(np.sqrt(((moved - motions()[values]) ** 2).sum(axis=1).mean()))

    def lane_of(direction: str) -> str:
        return nearest(world.LANES, float(centres[0, 1] if world.STEP[direction][0] else centres[0, 0]))

    values = min((key for key in motions() if key[2] == lane_of(key[0])), key=distance)
    return dict(zip(MOTION, values if distance(values) < OFF else (NOTHING,) * len(MOTION), strict=True))


@dataclass(frozen=True)
class WorldReport:
    """How a set of clips compares with the world.

    `obedience` is the share of clips that show the shape and colour of their caption, `readable` that of clips whose
    every factor can be read, `kinds` the effective number of kinds of clip for a caption (`effective_number`), and
    `strength` the mean strength of the colours that can be read. `shares` holds the shares of each factor's values
    among all clips, from the caption's typical value to its rarest, and then what cannot be read; `worst_gap` the
    largest difference of a share from the world's, per factor.
    """

    clips: int
    obedience: float
    readable: float
    kinds: float
    strength: float
    shares: Mapping[str, tuple[float, ...]]
    worst_gap: Mapping[str, float]


def compare_with_world(clips: NDArray[np.uint8], captions: Sequence[str]) -> WorldReport:
    """Measure clips, uint8 [N, F, H, W, C], generated for `captions` (N of them)."""
    if len(clips) != len(captions) or not len(clips):
        raise ValueError(f"got {len(clips)} clips and {len(captions)} captions; need as many of each, at least one")
    return report_of([read_clip(clip) for clip in clips], captions)


def report_of(readings: Sequence[Reading], captions: Sequence[str]) -> WorldReport:
    """The report on what was read from clips, generated for `captions`."""
    shares = {}
    for number, factor in enumerate(world.FACTORS):
        order = [
            (*world.typical(text)[factor], NOTHING).index(reading.kind[number])
            for reading, text in zip(readings, captions, strict=True)
        ]
        counts = np.bincount(order, minlength=len(world.FACTORS[factor]) + 1)
        shares[factor] = tuple(float(count) / len(readings) for count in counts)
    gaps = {
        factor: max(abs(found - true) for found, true in zip(shares[factor], (*truth, 0.0), strict=True))
        for factor, truth in world.SHARES.items()
    }
    return WorldReport(
        clips=len(readings),
        obedience=float(np.mean([obeys(r, text) for r, text in zip(readings, captions, strict=True)])),
        readable=float(np.mean([NOTHING not in (r.shape, r.colour, *r.kind) for r in readings])),
        kinds=effective_number([reading.kind for reading in readings], captions),
        strength=float(np.nanmean([reading.strength for reading in readings])),
        shares=shares,
        worst_gap=gaps,
    )


def standard_errors(readings: Sequence[Reading], captions: Sequence[str], seeds: Sequence[int]) -> dict[str, float]:
    """Standard errors of a report's `ERRORS`, for clips sampled with the same seeds for every caption.

    By the jackknife: each seed is left out in turn. The captions are taken as given.
    """
    names = sorted(set(seeds))
    if len(names) < 2:
        raise ValueError(f"got {len(names)} seed(s); standard errors need at least 2")
    kept = [[row for row, seed in enumerate(seeds) if seed != name] for name in names]
    reports = [report_of([readings[row] for row in rows], [captions[row] for row in rows]) for rows in kept]
    errors = {}
    for measure in ERRORS:
        values = np.array([getattr(report, measure) for report in reports])
        errors[measure] = float(np.sqrt((len(names) - 1) * values.var()))
    return errors


def obeys(reading: Reading, text: str) -> bool:
    return (reading.colour, reading.shape) == world.TOLD[text]


def effective_number(kinds: Sequence[Hashable], groups: Sequence[Hashable]) -> float:
    """The effective number of kinds in a group: 1 / the probability that two members of a group are of one kind.

    This is the Hill number of order 2 (the inverse Simpson index). The probability is counted over pairs of different
    members, which has no bias for any size of group, and is the mean over groups. If no pair is of one kind, it is
    taken as half a pair: such a sample is too small.
    """
    sizes = Counter(groups)
    pairs = {group: size * (size - 1) for group, size in sizes.items() if size > 1}
    if not pairs:
        raise ValueError("an effective number of kinds needs a group of at least two clips")
    same = dict.fromkeys(pairs, 0)
    for (group, _), count in Counter(zip(groups, kinds, strict=True)).items():
        if group in same:
            same[group] += count * (count - 1)
    probability = float(np.mean([same[group] / pairs[group] for group in pairs]))
    return 1 / max(probability, 1 / sum(pairs.values()))
