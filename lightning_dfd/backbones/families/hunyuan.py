"""HunyuanVideo text-to-video (2412.03603): flow matching, a network into which guidance was distilled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_dfd.backbones.channels import Scaled
from lightning_dfd.backbones.flow import few_step_own_scheduler
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.diffusion.noise import shifted_steps
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.types import Conditioning, SampleKind

EMBEDDED_GUIDANCE = 6.0  # the default of the pipeline's call: an input of the network, for teacher and student alike


class HunyuanVideoBackbone(Scaled):
    """Latents [B, C, f, h, w], scaled by the VAE's `scaling_factor`; two text encoders."""

    lora_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
        "proj_mlp",
    )

    def text_length(self) -> int:
        return 256  # the default of the pipeline's call, without its template

    def compression(self) -> tuple[int, int]:
        return int(self.configs.vae["temporal_compression_ratio"]), int(self.configs.vae["spatial_compression_ratio"])

    def encoder_widths(self) -> dict[str, int | None]:
        return super().encoder_widths() | {"text_encoder_2": self.configs.transformer.get("pooled_projection_dim")}

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """The pipeline's `guidance_scale` is the embedded one; real guidance is `true_cfg_scale`."""
        return {"guidance_scale": EMBEDDED_GUIDANCE, "true_cfg_scale": scale}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        embeds, pooled, mask = self.loader.encoders.encode_prompt(
            list(prompts), max_sequence_length=self.max_sequence_length, device=self.loader.device
        )
        names = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
        return Conditioning(dict(zip(names, (embeds, pooled, mask), strict=True)))

    def dummy_prompts(self, batch_size: int) -> Conditioning:
        pooled = torch.zeros(batch_size, self.configs.transformer["pooled_projection_dim"], dtype=self.dtype)
        return super().dummy_prompts(batch_size) | Conditioning({"pooled_prompt_embeds": pooled})

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        own = np.linspace(1.0, 0.0, num_steps + 1)[:-1]  # as the pipeline: a last digit decides how timesteps round
        return teacher_times(self.configs.scheduler, num_steps, sigmas=own)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        dtype = dtype_of(transformer)
        output: Tensor = transformer(
            hidden_states=x_t.to(dtype),
            timestep=timestep.float(),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["prompt_attention_mask"].to(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].to(dtype),
            guidance=torch.full((len(x_t),), EMBEDDED_GUIDANCE, dtype=dtype, device=x_t.device) * 1000.0,
            return_dict=False,
        )[0]
        return output

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_own_scheduler(steps, kind, shifted_steps(len(steps), 1.0))
