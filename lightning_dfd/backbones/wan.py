"""Wan 2.1 text-to-video (2503.20314): flow matching, one transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class WanBackbone(Backbone):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        return int(self.vae_config.get("scale_factor_temporal", 4)), int(self.vae_config.get("scale_factor_spatial", 8))

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        temporal, spatial = self.compression()
        frames = (size.frames - 1) // temporal + 1
        return self.vae_config["z_dim"], frames, size.height // spatial, size.width // spatial

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(self.vae_config[key]) for key in ("latents_mean", "latents_std"))
        return mean.view(1, -1, 1, 1, 1).to(like), std.view(1, -1, 1, 1, 1).to(like)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=x_t.to(transformer.dtype),
            timestep=timestep.float(),
            encoder_hidden_states=cond["prompt_embeds"].to(transformer.dtype),
            return_dict=False,
        )[0]
        return output

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_flow_scheduler(steps, kind)
