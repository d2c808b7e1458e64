"""A small world of captioned clips in which the diversity that a caption leaves open is known.

Axis legend: N clips, F frames, H height, W width, C = 3 colour channels.

A caption names the shape and the colour. It leaves open, with the unequal shares below, the direction,
the background and the speed, and, uniformly, one of three lanes to move in: 72 kinds of clip for a caption.
So for any model of this world one can say by counting how often its clips obey their caption and how far its
shares lie from the truth.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FRAMES, SIZE, FPS = 9, 32, 8

HALF_WIDTH = {"cross": 1.5 / math.sqrt(5), "square": 0.5, "triangle": math.sqrt(0.5)}  # at area 1
SHAPES = tuple(HALF_WIDTH)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 45, 45),
    "green": (45, 180, 65),
    "blue": (50, 85, 230),
    "yellow": (240, 205, 45),
}
DIRECTION_SHARES = {"right": 0.4, "left": 0.3, "up": 0.2, "down": 0.1}
BACKGROUND_SHARES = {"dark": 0.5, "grey": 0.3, "light": 0.2}
SPEED_SHARES = {"slow": 0.6, "fast": 0.4}

STEP = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down
BACKGROUND_LEVEL = {"dark": 20, "grey": 65, "light": 110}
TRAVEL = {"slow": 7.0, "fast": 14.0}  # pixels between the first and the last frame
LANES = (9.0, 16.0, 23.0)  # where a shape's centre can be across its motion; along it, it starts at an outer one
SHAPE_SIZE = 11.5  # root of the area, in pixels


@dataclass(frozen=True)
class Scene:
    """Everything that decides one clip. `x`, `y` are the centre in the first frame, `travel` the way to that in
    the last and `size` the root of the area, all in pixels."""

    shape: str
    colour: str
    direction: str
    background: str
    travel: float
    x: float
    y: float
    size: float = SHAPE_SIZE

    @property
    def speed(self) -> str:
        return min(TRAVEL, key=lambda name: abs(TRAVEL[name] - self.travel))

    @property
    def caption(self) -> str:
        return caption(self.colour, self.shape)


def caption(colour: str, shape: str) -> str:
    return f"a {colour} {shape} is moving"


CAPTIONS = tuple(caption(colour, shape) for colour, shape in itertools.product(COLOURS, SHAPES))


def draw_scene(rng: np.random.Generator) -> Scene:
    """One scene: shape, colour and lane uniform, the free factors by their shares."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    direction, background, speed = (
        str(rng.choice(list(shares), p=list(shares.values())))
        for shares in (DIRECTION_SHARES, BACKGROUND_SHARES, SPEED_SHARES)
    )
    lane = float(rng.choice(LANES))
    x, y = (lane if step == 0 else LANES[0] if step > 0 else LANES[-1] for step in STEP[direction])
    return Scene(shape, colour, direction, background, TRAVEL[speed], x, y)


def coverage(shape: str, x: float, y: float, size: float) -> NDArray[np.float64]:
    """Share of each pixel that the shape covers, [H, W] in [0, 1] (edges softened over one pixel).

    `x`, `y` is the centre of the bounding box. Every shape has the area size^2, so area does not tell them apart.
    """
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    dx, dy = columns - x, rows - y
    half = HALF_WIDTH[shape] * size
    if shape == "cross":  # its arms are a third as wide as the whole
        outside = np.maximum(np.maximum(abs(dx), abs(dy)) - half, np.minimum(abs(dx), abs(dy)) - half / 3)
    elif shape == "square":
        outside = np.maximum(abs(dx), abs(dy)) - half
    else:  # a triangle standing on its base, as wide as high
        outside = np.maximum((2 * abs(dx) - dy - half) / math.sqrt(5), dy - half)
    share: NDArray[np.float64] = np.clip(0.5 - outside, 0.0, 1.0)
    return share


def render(scene: Scene) -> NDArray[np.uint8]:
    """The clip of a scene, uint8 [F, H, W, C]."""
    background = np.full(3, BACKGROUND_LEVEL[scene.background], dtype=np.float64)
    colour = np.array(COLOURS[scene.colour], dtype=np.float64)
    frames = []
    for progress in np.linspace(0.0, scene.travel, FRAMES):
        dx, dy = STEP[scene.direction]
        mask = coverage(scene.shape, scene.x + dx * progress, scene.y + dy * progress, scene.size)[..., None]
        frames.append(mask * colour + (1 - mask) * background)
    return np.rint(np.stack(frames)).astype(np.uint8)


def draw_clips(n: int, seed: int) -> tuple[list[Scene], NDArray[np.uint8]]:
    """`n` scenes and their clips, uint8 [N, F, H, W, C]; the same seed gives the same clips."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(n)]
    return scenes, np.stack([render(scene) for scene in scenes])
