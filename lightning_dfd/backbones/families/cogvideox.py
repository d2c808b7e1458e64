"""CogVideoX (2408.06072), text- and image-to-video: 2B with sine positions, 5B with rotary ones; v-prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.discrete import few_step_discrete_scheduler
from lightning_dfd.backbones.images import ImageChannels
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class CogVideoXBackbone(Backbone):
    """Latents [B, f, C, h, w], scaled by the VAE's `scaling_factor`."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
    frame_axis = 1

    def text_length(self) -> int:
        return int(self.configs.transformer["max_text_seq_length"])

    def compression(self) -> tuple[int, int]:
        vae = self.configs.vae
        return int(vae["temporal_compression_ratio"]), 2 ** (len(vae["block_out_channels"]) - 1)

    def text_limits(self) -> tuple[int, int | None]:
        """Positions of the 2B and of I2V are added to text and video together, for so many text tokens."""
        if self.configs.transformer.get("use_rotary_positional_embeddings") and not self._learned:
            return super().text_limits()
        return self.text_length(), self.text_length()

    @property
    def _learned(self) -> bool:
        return bool(self.configs.transformer.get("use_learned_positional_embeddings"))

    def sizes(self) -> Sizes:
        """With learned positions, as the 5B I2V of 1.0 has them, the network takes one height and width."""
        if not self._learned:
            return super().sizes()
        height, width = (int(self.configs.transformer[f"sample_{side}"]) for side in ("height", "width"))
        spatial = self.compression()[1]
        return replace(super().sizes(), sides=(height * spatial, width * spatial))

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        temporal, spatial = self.compression()
        frames = (size.frames - 1) // temporal + 1
        return frames, self.latent_channels(), size.height // spatial, size.width // spatial

    def normalise(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2) * float(self.configs.vae["scaling_factor"])

    def denormalise(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2) / float(self.configs.vae["scaling_factor"])

    def decode(self, latents: Tensor) -> Tensor:
        """Of an even number of latent frames the VAE makes four frames of the first as well, not one: the last of them
        is the video's first."""
        frames = (latents.shape[2] - 1) * self.compression()[0] + 1
        return super().decode(latents)[:, :, -frames:]

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=self.network_input(x_t, cond).to(dtype_of(transformer)),
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
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
        return few_step_discrete_scheduler(self.schedule, steps, kind)


class CogVideoXImageBackbone(ImageChannels, CogVideoXBackbone):
    """Image-to-video: the image's latents, and zeros for all later frames, are further channels."""

    channel_axis = 2

    def network_channels(self) -> tuple[int, int]:
        return 2 * self.latent_channels(), self.latent_channels()

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        latents = self.encode_videos(images.unsqueeze(2))
        if self.configs.vae.get("invert_scale_latents"):  # 1.5 was trained on images scaled the other way
            latents = latents / self.configs.vae["scaling_factor"] ** 2
        on_all_frames = latents.new_zeros(len(latents), (frames - 1) // self.compression()[0] + 1, *latents.shape[2:])
        on_all_frames[:, :1] = latents
        return Conditioning({"image_latents": on_all_frames})
