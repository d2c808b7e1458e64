"""HunyuanVideo 1.5 text-to-video (2511.18870): flow matching, and guidance by a component of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from torch import Tensor, nn

from lightning_dfd.backbones.hunyuan import HunyuanVideoBackbone
from lightning_dfd.types import Conditioning, VideoSize

IMAGE_TOKENS = 729  # fixed in the pipeline: the tokens of an image that text-to-video does not have


class HunyuanVideo15Backbone(HunyuanVideoBackbone):
    """Latents [B, C, f, h, w], scaled by the VAE's `scaling_factor`; the network also sees a first frame, here none.

    Two text encoders: one for the prompt, one for the letters that stand in quotation marks in it.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 1000  # an attribute of the pipeline, and none of its call's arguments

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """The network has more channels: those of the first frame and of its mask."""
        return self.vae_config["latent_channels"], *super().latent_shape(size)[1:]

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """None: the pipeline's guider has the scale, see `prepare`."""
        return {}

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        """The VAE fails on several videos at once, so it takes them one by one."""
        pipe.guider = pipe.guider.new(guidance_scale=guidance)
        pipe.tokenizer_max_length = self.max_sequence_length
        pipe.vae.enable_slicing()

    def preparation(self) -> tuple[str, ...]:
        return (
            "pipe.guider = pipe.guider.new(guidance_scale=1.0)",
            f"pipe.tokenizer_max_length = {self.max_sequence_length}",
            "pipe.vae.enable_slicing()",
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tensors = self.encoders.encode_prompt(list(prompts), device=self.device, batch_size=len(prompts))
        names = ("prompt_embeds", "prompt_attention_mask", "prompt_embeds_2", "prompt_attention_mask_2")
        return Conditioning(dict(zip(names, tensors, strict=True)))

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        dtype = transformer.dtype
        no_frame = torch.zeros_like(x_t)
        image_features = transformer.config.image_embed_dim
        output: Tensor = transformer(
            hidden_states=torch.cat([x_t, no_frame, no_frame[:, :1]], dim=1).to(dtype),
            timestep=timestep.to(dtype),  # rounded like the pipeline's
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["prompt_attention_mask"].to(dtype),
            encoder_hidden_states_2=cond["prompt_embeds_2"].to(dtype),
            encoder_attention_mask_2=cond["prompt_attention_mask_2"].to(dtype),
            image_embeds=torch.zeros(len(x_t), IMAGE_TOKENS, image_features, dtype=dtype, device=x_t.device),
            return_dict=False,
        )[0]
        return output

    def load_transformer(self) -> nn.Module:
        """By itself: this pipeline cannot be made without its VAE."""
        transformer: Any = HunyuanVideo15Transformer3DModel.from_pretrained(
            self.source, subfolder="transformer", torch_dtype=self.dtype
        )
        return transformer.eval().requires_grad_(False)  # type: ignore[no-any-return]
