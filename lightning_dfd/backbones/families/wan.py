"""Wan 2.1 and the one-network 2.2 (2503.20314), text- and image-to-video: flow matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.channels import PerChannel
from lightning_dfd.backbones.flow import few_step_flow_scheduler
from lightning_dfd.backbones.images import GivenFirstFrame, ImageChannels, to_pictures, token_times
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.backbones.stages import Staged
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class WanBackbone(PerChannel):
    """Latents [B, C, f, h, w], each channel by its own mean and standard deviation.

    The network of 2.2's 5B is told a time for every token; which one it is stands in the pipeline's config.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    given_frames = 0  # frames of the latents that are an image's, free of noise

    @classmethod
    def variant(cls, pipeline_config: Mapping[str, Any]) -> type[Backbone]:
        return WanStagedBackbone if pipeline_config.get("boundary_ratio") is not None else cls

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        vae = self.configs.vae
        return int(vae.get("scale_factor_temporal", 4)), int(vae.get("scale_factor_spatial", 8))

    def sizes(self) -> Sizes:
        most = int(self.configs.transformer.get("rope_max_seq_len", 1024))
        return replace(super().sizes(), most_patches=(most, most, most))

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=self.network_input(x_t, cond).to(dtype_of(transformer)),
            timestep=self._network_time(timestep.float(), x_t.shape),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
            encoder_hidden_states_image=self._image_embeds(transformer, cond),
            return_dict=False,
        )[0]
        return output

    def _network_time(self, timestep: Tensor, shape: Sequence[int]) -> Tensor:
        if not self.configs.pipeline.get("expand_timesteps"):
            return timestep
        _, height, width = self.configs.transformer["patch_size"]
        return token_times(timestep, shape[2], (shape[3] // height) * (shape[4] // width), self.given_frames)

    def _image_embeds(self, transformer: Any, cond: Conditioning) -> Tensor | None:
        return None

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_flow_scheduler(steps, kind)


class WanStagedBackbone(Staged, WanBackbone):
    """2.2's A14B: one network for high noise, another for low."""


class WanImageBackbone(ImageChannels, WanBackbone):
    """Image-to-video, 2.1: the image's latents and a mask are further channels, its CLIP features further text."""

    @classmethod
    def variant(cls, pipeline_config: Mapping[str, Any]) -> type[Backbone]:
        if pipeline_config.get("boundary_ratio") is not None:
            return WanStagedImageBackbone
        return WanFirstFrameBackbone if pipeline_config.get("expand_timesteps") else cls

    def text_limits(self) -> tuple[int, int | None]:
        """Beside an image's features the network takes the first 512 tokens for text, whatever they are."""
        return super().text_limits() if self.configs.transformer.get("image_dim") is None else (512, 512)

    def network_channels(self) -> tuple[int, int]:
        return 2 * self.latent_channels() + self.compression()[0], self.latent_channels()  # see encode_images

    def encoder_widths(self) -> dict[str, int | None]:
        return super().encoder_widths() | {"image_encoder": self.configs.transformer.get("image_dim")}

    def check_teacher(self) -> None:
        super().check_teacher()
        if self.configs.transformer.get("image_dim") is not None and "image_encoder" not in self.configs.encoders:
            raise ValueError(
                f"the network of {self.source} takes an image's features (image_dim), and its pipeline has no "
                "image_encoder; set model.teacher to a whole pipeline"
            )

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        """The video of the image followed by grey, as latents; before it, in as many channels as a latent has frames,
        which of them are given."""
        clip = images.new_zeros(*images.shape[:2], frames, *images.shape[2:])
        clip[:, :, 0] = images
        latents = self.encode_videos(clip)
        mask = latents.new_zeros(len(latents), self.compression()[0], *latents.shape[2:])
        mask[:, :, 0] = 1.0
        return Conditioning({"image_latents": torch.cat([mask, latents], 1)} | self._clip_features(images))

    def dummy_images(self, batch_size: int, size: VideoSize) -> Conditioning:
        images = super().dummy_images(batch_size, size)
        if self.configs.transformer.get("image_dim") is None:
            return images
        encoder = self.configs.part("image_encoder")
        tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1  # and one for the whole
        embeds = torch.zeros(batch_size, tokens, self.configs.transformer["image_dim"], dtype=self.dtype)
        return images | Conditioning({"image_embeds": embeds})

    def _clip_features(self, images: Tensor) -> dict[str, Tensor]:
        if self.configs.transformer.get("image_dim") is None:
            return {}
        return {"image_embeds": self.loader.encoders.encode_image(to_pictures(images), self.loader.device)}

    def _image_embeds(self, transformer: Any, cond: Conditioning) -> Tensor | None:
        return cond["image_embeds"].to(dtype_of(transformer)) if "image_embeds" in cond.tensors else None


class WanStagedImageBackbone(Staged, WanImageBackbone):
    """Image-to-video of 2.2's A14B."""


class WanFirstFrameBackbone(GivenFirstFrame, WanBackbone):
    """Image-to-video of 2.2's 5B, by the network that also makes videos from text."""

    pipeline_class = "WanImageToVideoPipeline"
    given_frames = 1
