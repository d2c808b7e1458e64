"""The values that pass between the rooms of this package.

Axis legend, used throughout: B batch, C channels, F frames, H height, W width, L text tokens, D features.
Videos are [B, C, F, H, W], float in [-1, 1]. Latents have the layout of their pipeline's network
([B, F, C, H, W] for CogVideoX, [B, C, F, H, W] for Wan); nothing outside `backbones` looks at their axes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Role = Literal["teacher", "student", "fake", "ema"]
SampleKind = Literal["ode", "sde"]


@dataclass(frozen=True)
class Conditioning:
    """What a network is told besides x_t and t: named tensors, each [B, ...].

    They come from prompts and, with image-to-video teachers, from the first frame, under names of their own.
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def batch_size(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """`Tensor.to` on every tensor."""
        return Conditioning({name: value.to(*args, **kwargs) for name, value in self.tensors.items()})

    def expand(self, batch_size: int) -> Conditioning:
        """A conditioning of batch size 1, repeated for a batch."""
        return Conditioning({name: value.expand(batch_size, *value.shape[1:]) for name, value in self.tensors.items()})

    def __or__(self, other: Conditioning) -> Conditioning:
        """As `|` of dicts: what `other` names is taken from it, the rest stays."""
        return Conditioning({**self.tensors, **other.tensors})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch axis; all parts name the same tensors."""
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})


@dataclass(frozen=True)
class Batch:
    """Captioned videos, as pixels or, from a cache, as latents with their conditioning.

    Either `video` ([B, C, F, H, W] in [-1, 1]) is given, or `latents` ([B, ...], as the network sees them) and
    `cond` are.
    """

    prompts: tuple[str, ...]
    video: Tensor | None = None
    latents: Tensor | None = None
    cond: Conditioning | None = None

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """`to` on everything that is there."""

        def move(value: Any) -> Any:
            return None if value is None else value.to(*args, **kwargs)

        return replace(self, video=move(self.video), latents=move(self.latents), cond=move(self.cond))


@dataclass(frozen=True)
class VideoSize:
    """Frames and pixels of a clip."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.height}x{self.width}"
