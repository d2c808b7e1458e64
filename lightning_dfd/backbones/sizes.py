"""The sizes of video that a teacher can generate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dfd.types import VideoSize

SIDES = ("frames", "height", "width")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which sizes fit pipeline, network and VAE.

    Args:
        compression: (temporal, spatial) of the VAE.
        patch: latent frames, and latent rows or columns, of one patch of the network.
        multiple: what height and width have to be multiples of; None for one patch.
        most_patches: for how many patches along frames, height and width the network has positions; None for any.
        least_frames: of a video.
        frames: the only number of frames for which the network has positions; None for any.
        sides: the only (height, width) for which it has positions; None for any.
    """

    compression: tuple[int, int]
    patch: tuple[int, int]
    multiple: int | None = None
    most_patches: tuple[int, int, int] | None = None
    least_frames: int = 1
    frames: int | None = None
    sides: tuple[int, int] | None = None

    @property
    def side_multiple(self) -> int:
        """What height and width are multiples of."""
        return self.multiple or self.compression[1] * self.patch[1]

    def nearest(self, size: VideoSize) -> VideoSize:
        """The nearest size that fits; of two lengths the longer."""
        temporal, patch, multiple = self.compression[0], self.patch[0], self.side_multiple
        latents = max(1, math.floor(((size.frames - 1) / temporal + 1) / patch + 0.5)) * patch
        nearest = VideoSize(
            frames=self.frames or max(self.least_frames, (latents - 1) * temporal + 1),
            height=self.sides[0] if self.sides else max(1, round(size.height / multiple)) * multiple,
            width=self.sides[1] if self.sides else max(1, round(size.width / multiple)) * multiple,
        )
        largest = self.largest
        if largest is None:
            return nearest
        return VideoSize(*(min(getattr(nearest, side), getattr(largest, side)) for side in SIDES))

    @property
    def largest(self) -> VideoSize | None:
        """The longest, highest and widest video for which the network has positions; None for no limit."""
        if self.most_patches is None:
            return None
        (temporal, spatial), (frames, side), multiple = self.compression, self.patch, self.side_multiple
        height, width = (count * side * spatial // multiple * multiple for count in self.most_patches[1:])
        return VideoSize((self.most_patches[0] * frames - 1) * temporal + 1, height, width)

    def rule(self) -> str:
        """The rule of `nearest` in words."""
        temporal, patch = self.compression[0], self.patch[0]
        frames = f"{temporal * patch}k + {temporal * (patch - 1) + 1}"
        if self.frames is not None:
            frames = f"{self.frames}, for which the network has positions,"
        elif self.least_frames > 1:
            frames += f", at least {self.least_frames},"
        sides = f"both sides multiples of {self.side_multiple}"
        if self.sides is not None:
            sides = f"the sides {self.sides[0]}x{self.sides[1]}, for which the network has positions"
        return f"frames must be {frames} and {sides}"

    def check(self, size: VideoSize, source: str) -> None:
        """Raise ValueError, naming the nearest size that works, for one that does not fit the teacher at `source`."""
        nearest, largest = self.nearest(size), self.largest
        if nearest == size:
            return
        too_large = largest is not None and any(getattr(size, side) > getattr(largest, side) for side in SIDES)
        rule = f"the network has positions for at most {largest}" if too_large else self.rule()
        raise ValueError(
            f"{size} does not fit {source}: {rule}; the nearest is {nearest} (data.frames, data.height, data.width)"
        )


def patch_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Latent frames, and latent rows or columns, of one patch, by the config of a network."""
    patch = config["patch_size"]
    sides = (patch,) if isinstance(patch, int) else patch
    frames = sides[0] if len(sides) == 3 else config.get("patch_size_t") or 1
    return int(frames), math.lcm(*map(int, sides[-2:]))
