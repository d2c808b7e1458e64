"""Wan 2.1 text-to-video (2503.20314): flow matching, one transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.types import Conditioning, SampleKind


class WanBackbone(PerChannel):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        return int(self.vae_config.get("scale_factor_temporal", 4)), int(self.vae_config.get("scale_factor_spatial", 8))

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
