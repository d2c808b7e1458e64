"""CogVideoX (2408.06072), text- and image-to-video: 2B with sine positions, 5B with rotary ones; v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, LCMScheduler
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.images import ImageChannels
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class CogVideoXBackbone(Backbone):
    """Latents [B, f, C, h, w], scaled by the VAE's `scaling_factor`."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return int(self.transformer_config["max_text_seq_length"])

    def compression(self) -> tuple[int, int]:
        return int(self.vae_config["temporal_compression_ratio"]), 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        temporal, spatial = self.compression()
        frames = (size.frames - 1) // temporal + 1
        return frames, self.latent_channels(), size.height // spatial, size.width // spatial

    def normalise(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2) * self.vae_config["scaling_factor"]

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2) / self.vae_config["scaling_factor"]

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=self.network_input(x_t, cond).to(transformer.dtype),
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(transformer.dtype),
            image_rotary_emb=self._rotary(transformer, x_t),
            ofs=None if transformer.config.ofs_embed_dim is None else x_t.new_full((1,), 2.0),  # as the pipeline does
            return_dict=False,
        )[0]
        return output

    def _rotary(self, transformer: Any, x_t: Tensor) -> tuple[Tensor, Tensor] | None:
        """The 5B's positions. The pipeline's own method, told that pixels are latents (it only needs the ratio)."""
        if not transformer.config.use_rotary_positional_embeddings:
            return None
        frames, _, height, width = x_t.shape[1:]
        shell = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=1)
        rotary: tuple[Tensor, Tensor] = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            shell, height, width, frames, x_t.device
        )
        return rotary

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        """DDIM for `ode`; for `renoise` LCM's scheduler on CogVideoX's own noise table.

        Stock schedulers take no list of times from this pipeline's default call, they space N evenly.
        """
        rows = self.schedule.timestep(torch.tensor(steps, dtype=torch.float64)).tolist()
        scheduler: Any
        if kind == "ode":
            scheduler = CogVideoXDDIMScheduler.from_config(
                self.scheduler_config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
            )
        else:
            table = self.schedule.alphas_cumprod
            assert table is not None
            before = torch.cat([table.new_ones(1), table[:-1]])
            scheduler = LCMScheduler(
                num_train_timesteps=len(table),
                trained_betas=(1.0 - table / before).tolist(),
                prediction_type="v_prediction",
                original_inference_steps=len(steps),
                timestep_scaling=1e6,  # makes LCM's boundary condition vanish: x0 as predicted
                set_alpha_to_one=True,
            )
        scheduler.set_timesteps(len(steps))
        runs_at = [int(row) for row in scheduler.timesteps]
        even = 1000 % len(steps) == 0  # else DDIM's integer division steps to other rows than it lists
        if runs_at != rows or (kind == "ode" and not even):
            raise ValueError(
                f"stock CogVideoX runs {len(steps)} steps at {runs_at} ({kind}), this student samples at {rows}; "
                "train it at evenly spaced times, one of 1, 2, 4, 5 or 8 steps "
                "(4 steps: model.sampling.steps: [0.999, 0.749, 0.499, 0.249])"
            )
        return scheduler


class CogVideoXImageBackbone(ImageChannels, CogVideoXBackbone):
    """Image-to-video: the image's latents, and zeros for all later frames, are further channels."""

    channel_axis = 2

    def latent_channels(self) -> int:
        return int(self.transformer_config["in_channels"]) // 2

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        latents = self.encode_videos(images.unsqueeze(2))
        if self.vae_config.get("invert_scale_latents"):  # 1.5 was trained on images scaled the other way
            latents = latents / self.vae_config["scaling_factor"] ** 2
        on_all_frames = latents.new_zeros(len(latents), (frames - 1) // self.compression()[0] + 1, *latents.shape[2:])
        on_all_frames[:, :1] = latents
        return Conditioning({"image_latents": on_all_frames})
