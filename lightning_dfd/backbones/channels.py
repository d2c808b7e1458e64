"""Latents that are normalised channel by channel, as Wan, LTX and Mochi do, or by one factor, as most others do.

Axis legend: B batch, C channels, f, h, w frames, height and width of latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dfd.backbones.base import Backbone


class PerChannel(Backbone):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, [C] each."""
        mean, std = (torch.tensor(self.configs.vae[key]) for key in ("latents_mean", "latents_std"))
        return mean, std / self.configs.vae.get("scaling_factor", 1.0)

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self.statistics()
        return mean.view(1, -1, 1, 1, 1).to(like), std.view(1, -1, 1, 1, 1).to(like)


class Scaled(Backbone):
    """Latents [B, C, f, h, w], multiplied by the VAE's `scaling_factor`."""

    def normalise(self, latents: Tensor) -> Tensor:
        return latents * float(self.configs.vae["scaling_factor"])

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents / float(self.configs.vae["scaling_factor"])
