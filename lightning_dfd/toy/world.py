"""A small world of captioned clips in which what a caption leaves open is known.

Axis legend: N clips, F frames, H height, W width, C = 3 colour channels.

A caption names a shape and a colour. A clip is drawn from its caption in three steps:

1. The free factors (direction, background, speed, lane, path) are drawn by shares that depend on the caption. Of every
   factor some values are typical for a caption and others rare: `SHARES`, in the order that `typical` gives.
2. The strength of the colour is drawn evenly between pale and vivid: `STRENGTH`.
3. The caption may be wrong, as captions from the web are. The paler the colour, the more often the clip shows another
   one (`right_colour`); and in `WRONG_SHAPE` of the clips it shows another shape.

So a model that follows these captions has to be guided to obey them, and guidance costs rare values and pale colours,
as it does in large models. What a perfect model would show is known: the clips whose captions are right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FRAMES, SIZE, FPS = 9, 32, 8

HALF_WIDTH = {"cross": 1.5 / math.sqrt(5), "square": 0.5, "triangle": math.sqrt(0.5)}  # at area 1
SHAPES = tuple(HALF_WIDTH)
PALE = 140  # the grey that a colour of strength 0 would be
COLOURS: dict[str, tuple[int, int, int]] = {  # of strength 1; 1.4 still fits between 0 and 255
    "red": (205, 60, 60),
    "green": (65, 190, 85),
    "blue": (75, 100, 220),
    "yellow": (215, 190, 65),
}
STRENGTH = (0.35, 1.0)
WRONG_SHAPE = 0.05

FACTORS: dict[str, tuple[str, ...]] = {
    "direction": ("right", "left", "up", "down"),
    "background": ("dark", "grey", "light"),
    "speed": ("slow", "fast"),
    "lane": ("first", "second"),
    "path": ("straight", "curved"),
}
SHARES = {  # from typical to rare
    "direction": (0.42, 0.28, 0.18, 0.12),
    "background": (0.5, 0.3, 0.2),
    "speed": (0.64, 0.36),
    "lane": (0.64, 0.36),
    "path": (0.64, 0.36),
}
KINDS = math.prod(len(values) for values in FACTORS.values())  # of clip, for a caption

STEP = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y points down
BACKGROUND_LEVEL = {"dark": 15, "grey": 50, "light": 85}
TRAVEL = {"slow": 6.0, "fast": 14.0}  # pixels between the first and the last frame
LANES = {"first": 11.5, "second": 20.5}  # the centre across the motion, in the first frame; a curve ends in the other
OUTER = 9.0  # the centre along the motion is so far from an edge in the first frame
SHAPE_SIZE = 10.0  # root of the area, in pixels
PIXELS = np.arange(SIZE) + 0.5  # where their middles are


@dataclass(frozen=True)
class Scene:
    """Everything that decides one clip.

    `shape`, `colour` and `strength` are shown; `told` are the colour and the shape in the caption. `x`, `y` are the
    centre in the first frame, `travel` the way along the direction, `turn` the way across it (to the right
    or downwards), and `size` the root of the area, all in pixels.
    """

    shape: str
    colour: str
    strength: float
    told: tuple[str, str]
    direction: str
    background: str
    x: float
    y: float
    travel: float
    turn: float
    size: float = SHAPE_SIZE

    @property
    def caption(self) -> str:
        return caption(*self.told)

    @property
    def obeys(self) -> bool:
        """Whether the clip shows what its caption says."""
        return (self.colour, self.shape) == self.told


def caption(colour: str, shape: str) -> str:
    return f"a {colour} {shape} is moving"


TOLD = {caption(colour, shape): (colour, shape) for colour, shape in itertools.product(COLOURS, SHAPES)}
CAPTIONS = tuple(TOLD)


def typical(text: str) -> dict[str, tuple[str, ...]]:
    """The values of every factor from typical to rare for a caption. Over all captions every value is as frequent."""
    colour, shape = (names.index(name) for names, name in zip((tuple(COLOURS), SHAPES), TOLD[text], strict=True))
    first = {"direction": colour, "background": shape, "speed": colour + shape, "lane": colour // 2}
    first["path"] = colour + shape
    return {factor: _from(values, first[factor]) for factor, values in FACTORS.items()}


def _from(values: tuple[str, ...], first: int) -> tuple[str, ...]:
    first %= len(values)
    return values[first:] + values[:first]


def shares(text: str) -> dict[str, dict[str, float]]:
    """For a caption, the share of every value of every factor."""
    return {name: dict(zip(values, SHARES[name], strict=True)) for name, values in typical(text).items()}


def effective_kinds() -> float:
    """The effective number of kinds of clip for a caption: 1 / the probability that two clips are of one kind."""
    return 1 / math.prod(sum(share**2 for share in of_factor) for of_factor in SHARES.values())


def right_colour(strength: float) -> float:
    """The probability that a clip of this strength shows the colour that its caption names."""
    low, high = STRENGTH
    return 0.6 + 0.4 * (strength - low) / (high - low)


def right_share() -> float:
    """The share of clips whose captions are right."""
    return (1 - WRONG_SHAPE) * (right_colour(STRENGTH[0]) + right_colour(STRENGTH[1])) / 2


def mean_strength(right: bool) -> float:
    """The mean strength of the world's colours: of all clips, or of those whose captions are right."""
    low, high = STRENGTH
    if not right:
        return (low + high) / 2
    wide, pale, vivid = high - low, right_colour(low), right_colour(high)  # between them right_colour is linear
    return low + wide * (pale / 2 + (vivid - pale) / 3) / ((pale + vivid) / 2)


def scene_of(draws: NDArray[np.float64]) -> Scene:
    """The scene that nine even draws in [0, 1) decide, [9]."""
    which, strength, mistake, other, *factors = (float(draw) for draw in draws)
    text = CAPTIONS[int(which * len(CAPTIONS))]
    (colour, shape), of_caption = TOLD[text], shares(text)
    values = {name: _pick(of_caption[name], draw) for name, draw in zip(FACTORS, factors, strict=True)}
    strength = STRENGTH[0] + strength * (STRENGTH[1] - STRENGTH[0])
    shown_colour, shown_shape = colour, shape
    # One draw decides both mistakes: what is left of it after the first is even again.
    right = right_colour(strength)
    if mistake >= right:
        shown_colour = _other(colour, tuple(COLOURS), other)
    rest = mistake / right if mistake < right else (mistake - right) / (1 - right)
    if rest < WRONG_SHAPE:
        shown_shape = _other(shape, SHAPES, other * 7 % 1)
    return place(shown_shape, shown_colour, strength, (colour, shape), values)


def place(shape: str, colour: str, strength: float, told: tuple[str, str], values: Mapping[str, str]) -> Scene:
    """The scene of these `values` of the free factors."""
    direction, lane = values["direction"], LANES[values["lane"]]
    turn = sum(LANES.values()) - 2 * lane if values["path"] == "curved" else 0.0
    x, y = (lane if step == 0 else OUTER if step > 0 else SIZE - OUTER for step in STEP[direction])
    return Scene(shape, colour, strength, told, direction, values["background"], x, y, TRAVEL[values["speed"]], turn)


def _pick(of_values: Mapping[str, float], draw: float) -> str:
    """The value at `draw` in [0, 1) of the cumulated shares."""
    total = np.cumsum(list(of_values.values()))
    return list(of_values)[min(int(np.searchsorted(total, draw, side="right")), len(of_values) - 1)]


def _other(name: str, names: tuple[str, ...], draw: float) -> str:
    others = [other for other in names if other != name]
    return others[int(draw * len(others))]


def coverage(shape: str, x: ArrayLike, y: ArrayLike, size: ArrayLike) -> NDArray[np.float64]:
    """Share of each pixel that the shape covers, [..., H, W] in [0, 1] (edges softened over one pixel).

    `x`, `y` [...] is the centre of the bounding box. Every shape has the area size^2, so area does not tell them apart.
    """
    x, y, size = (np.asarray(value, dtype=np.float64)[..., None, None] for value in (x, y, size))
    dx, dy = PIXELS[None, :] - x, PIXELS[:, None] - y
    half = HALF_WIDTH[shape] * size
    if shape == "cross":  # its arms are a third as wide as the whole
        outside = np.maximum(np.maximum(abs(dx), abs(dy)) - half, np.minimum(abs(dx), abs(dy)) - half / 3)
    elif shape == "square":
        outside = np.maximum(abs(dx), abs(dy)) - half
    else:  # a triangle standing on its base, as wide as high
        outside = np.maximum((2 * abs(dx) - dy - half) / math.sqrt(5), dy - half)
    share: NDArray[np.float64] = np.clip(0.5 - outside, 0.0, 1.0)
    return share


def colour_of(name: str, strength: float) -> NDArray[np.float64]:
    """The colour of this strength, [C] in [0, 255]: a mixture of the full colour and a grey."""
    mixed: NDArray[np.float64] = PALE + strength * (np.array(COLOURS[name], dtype=np.float64) - PALE)
    return mixed


def path_of(scene: Scene, progress: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The centre (x, y) after each share [...] of the way, in pixels. A curve begins along the direction."""
    dx, dy = STEP[scene.direction]
    along, across = scene.travel * np.asarray(progress), scene.turn * np.asarray(progress) ** 2
    return scene.x + dx * along + abs(dy) * across, scene.y + dy * along + abs(dx) * across


def render(scene: Scene) -> NDArray[np.uint8]:
    """The clip of a scene, uint8 [F, H, W, C]."""
    mask = coverage(scene.shape, *path_of(scene, np.linspace(0.0, 1.0, FRAMES)), scene.size)[..., None]
    colour = colour_of(scene.colour, scene.strength)
    return np.rint(mask * colour + (1 - mask) * BACKGROUND_LEVEL[scene.background]).astype(np.uint8)


def draw_scenes(n: int, seed: int, right: bool = False) -> Iterator[Scene]:
    """`n` scenes, one at a time; with `right` only such whose captions are right. The same seed gives the same."""
    rng = np.random.default_rng(seed)
    while n:
        scene = scene_of(rng.random(9))
        if scene.obeys or not right:
            n -= 1
            yield scene


def draw_clips(n: int, seed: int, right: bool = False) -> tuple[list[Scene], NDArray[np.uint8]]:
    """The scenes of `draw_scenes` and their clips, uint8 [N, F, H, W, C]."""
    scenes = list(draw_scenes(n, seed, right))
    return scenes, np.stack([render(scene) for scene in scenes])
