"""LTX-Video (2501.00103), text- and image-to-video: flow matching on strongly compressed latents, packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor

from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_own_scheduler
from lightning_dfd.backbones.images import GivenFirstFrame, refuse_sde, token_times
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.diffusion.noise import shifted_steps
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.types import Conditioning, SampleKind

FRAME_RATE = 25  # default of the pipeline's call, by which the network's positions in time are scaled


class LTXBackbone(PerChannel):
    """Latents [B, C, f, h, w]; the pipeline's are packed, [B, f*h*w, C], as its networks have patches of 1."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 128  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        config = self.configs.vae
        halvings = 2 ** sum(config["spatio_temporal_scaling"])
        temporal, spatial = (config.get(f"{axis}_compression_ratio") for axis in ("temporal", "spatial"))
        return temporal or config["patch_size_t"] * halvings, spatial or config["patch_size"] * halvings

    def statistics(self) -> tuple[Tensor, Tensor]:
        """They are among the VAE's weights here, not in its config."""
        return self.loader.vae.latents_mean, self.loader.vae.latents_std / self.configs.vae["scaling_factor"]

    def check_teacher(self) -> None:
        super().check_teacher()
        if (patch := self.sizes().patch) != (1, 1):
            raise ValueError(
                f"the network of {self.source} has patches of {patch} latent frames and rows; only (1, 1), as "
                "all published ones have, is supported: set model.teacher to such a pipeline"
            )

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        latents: Tensor = packed.transpose(1, 2).unflatten(2, tuple(shape[1:]))
        return latents

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        """Shifted by the number of tokens, and stretched, as the pipeline's own call does."""
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        values = (self.configs.scheduler[name] for name in names)
        tokens = shape[1] * shape[2] * shape[3]
        own = np.linspace(1.0, 1 / num_steps, num_steps)  # as the pipeline: a last digit decides how timesteps round
        return teacher_times(self.configs.scheduler, num_steps, sigmas=own, mu=calculate_shift(tokens, *values))

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        shape = x_t.shape[1:]
        temporal, spatial = self.compression()
        output: Tensor = transformer(
            hidden_states=self.pack(self.network_input(x_t, cond)).to(dtype_of(transformer)),
            timestep=self.network_time(timestep.float(), shape),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
            encoder_attention_mask=cond["prompt_attention_mask"],
            num_frames=shape[1],
            height=shape[2],
            width=shape[3],
            rope_interpolation_scale=(temporal / FRAME_RATE, spatial, spatial),
            return_dict=False,
        )[0]
        return self.unpack(output, shape)

    def network_time(self, timestep: Tensor, shape: Sequence[int]) -> Tensor:
        """What the network is told of times [B], for latents of `shape`."""
        return timestep

    def decode(self, latents: Tensor) -> Tensor:
        """Later VAEs denoise while they decode; like the pipeline by default we tell them that there is no noise."""
        timestep = latents.new_zeros(len(latents)) if self.configs.vae["timestep_conditioning"] else None
        frames: Tensor = self.loader.vae.decode(latents, timestep).sample
        return frames

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_own_scheduler(steps, kind, shifted_steps(len(steps), 1.0))


class LTXImageBackbone(GivenFirstFrame, LTXBackbone):
    """Image-to-video by the same network: the image's tokens have a time of their own, 0."""

    pipeline_class = "LTXImageToVideoPipeline"

    def network_time(self, timestep: Tensor, shape: Sequence[int]) -> Tensor:
        return token_times(timestep, shape[1], shape[2] * shape[3], given_frames=1)

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        refuse_sde(kind)
        return super().few_step_scheduler(steps, kind)
