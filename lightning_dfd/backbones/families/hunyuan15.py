"""HunyuanVideo 1.5 (2511.18870), text- and image-to-video: flow matching, guidance by a component of the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor
from torch import Tensor

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.families.hunyuan import HunyuanVideoBackbone
from lightning_dfd.backbones.images import ImageChannels, to_pictures
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.types import Conditioning, VideoSize

LETTER_TOKENS = 256  # of the second text encoder, an attribute of the pipeline as well
IMAGE_TOKENS = 729  # fixed in the pipeline: the tokens of an image that text-to-video does not have


class HunyuanVideo15Backbone(HunyuanVideoBackbone):
    """Latents [B, C, f, h, w], scaled by the VAE's `scaling_factor`.

    Two text encoders: one for the prompt, one for the letters that stand in quotation marks in it.
    """

    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 1000  # an attribute of the pipeline, and none of its call's arguments

    def network_channels(self) -> tuple[int, int]:
        return 2 * self.latent_channels() + 1, self.latent_channels()  # see network_input

    def encoder_widths(self) -> dict[str, int | None]:
        return super().encoder_widths() | {"text_encoder_2": self.configs.transformer.get("text_embed_2_dim")}

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """None: the pipeline's guider has the scale, see `prepare`."""
        return {}

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        """The VAE fails on several videos at once, so it takes them one by one."""
        pipe.guider = pipe.guider.new(guidance_scale=guidance)
        pipe.tokenizer_max_length = self.max_sequence_length
        self.prepare_vae(pipe.vae)

    def prepare_vae(self, vae: Any) -> None:
        vae.enable_slicing()

    def preparation(self) -> tuple[str, ...]:
        return (
            "pipe.guider = pipe.guider.new(guidance_scale=1.0)",
            f"pipe.tokenizer_max_length = {self.max_sequence_length}",
            "pipe.vae.enable_slicing()",
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        tensors = self.loader.encoders.encode_prompt(list(prompts), device=self.loader.device, batch_size=len(prompts))
        names = ("prompt_embeds", "prompt_attention_mask", "prompt_embeds_2", "prompt_attention_mask_2")
        return Conditioning(dict(zip(names, tensors, strict=True)))

    def dummy_prompts(self, batch_size: int) -> Conditioning:
        first = Backbone.dummy_prompts(self, batch_size)
        letters = (batch_size, LETTER_TOKENS)
        embeds = torch.zeros(*letters, self.configs.transformer["text_embed_2_dim"], dtype=self.dtype)
        second = {"prompt_embeds_2": embeds, "prompt_attention_mask_2": torch.ones(letters, dtype=torch.int64)}
        return first | Conditioning(second)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        dtype = dtype_of(transformer)
        output: Tensor = transformer(
            hidden_states=self.network_input(x_t, cond).to(dtype),
            timestep=timestep.to(dtype),  # rounded like the pipeline's
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["prompt_attention_mask"].to(dtype),
            encoder_hidden_states_2=cond["prompt_embeds_2"].to(dtype),
            encoder_attention_mask_2=cond["prompt_attention_mask_2"].to(dtype),
            image_embeds=self._image_embeds(x_t, cond).to(dtype),
            return_dict=False,
        )[0]
        return output

    def network_input(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """Beside x_t the latents of a first frame, and a mask of where it is: nothing and nowhere."""
        return torch.cat([x_t, torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])], 1)

    def _image_embeds(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """Zeros, by which the network knows that there is no image."""
        return x_t.new_zeros(len(x_t), IMAGE_TOKENS, self.configs.transformer["image_embed_dim"])


@dataclass(frozen=True, kw_only=True)
class Cropped(Sizes):
    """Sizes to which the pipeline crops images: those of about as many pixels as its network knows.

    Args:
        target: side of a square of so many pixels.
    """

    target: int

    def nearest(self, size: VideoSize) -> VideoSize:
        processor, last = HunyuanVideo15ImageProcessor(vae_scale_factor=self.compression[1]), None
        sides = size.height, size.width
        while sides != last:  # ratios are rounded, so a few of the sides lead on to the next
            last = sides
            sides = processor.calculate_default_height_width(*sides, self.target)
        return VideoSize(super().nearest(size).frames, *sides)

    def rule(self) -> str:
        frames = f"{self.compression[0]}k + 1"
        return f"frames must be {frames} and the sides those to which the pipeline crops for {self.target}"


class HunyuanVideo15ImageBackbone(ImageChannels, HunyuanVideo15Backbone):
    """Image-to-video: the first frame's latents and mask are further channels, its SigLIP features further text."""

    def encoder_widths(self) -> dict[str, int | None]:
        return super().encoder_widths() | {"image_encoder": self.configs.transformer.get("image_embed_dim")}

    def check_teacher(self) -> None:
        super().check_teacher()
        if self.configs.transformer["use_meanflow"]:
            raise ValueError(
                f"the network of {self.source} was distilled to few steps already: it is told the next time as well "
                "(use_meanflow); take the teacher that it was made from"
            )

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        latents = self.encode_videos(images.unsqueeze(2))
        channels = latents.new_zeros(
            len(latents), latents.shape[1] + 1, (frames - 1) // self.compression()[0] + 1, *latents.shape[3:]
        )
        channels[:, :-1, :1], channels[:, -1, 0] = latents, 1.0
        encode, device = self.loader.encoders.encode_image, self.loader.device
        embeds = [encode(one, 1, device, self.dtype) for one in to_pictures(images)]
        return Conditioning({"image_latents": channels, "image_embeds": torch.cat(embeds)})

    def dummy_images(self, batch_size: int, size: VideoSize) -> Conditioning:
        encoder = self.configs.part("image_encoder")
        tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2
        embeds = torch.zeros(batch_size, tokens, self.configs.transformer["image_embed_dim"], dtype=self.dtype)
        return super().dummy_images(batch_size, size) | Conditioning({"image_embeds": embeds})

    def _image_embeds(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        return cond["image_embeds"]

    def size_arguments(self, size: VideoSize) -> dict[str, int]:
        """The pipeline takes height and width from the image, as `Cropped` does."""
        return {"num_frames": size.frames}

    def sizes(self) -> Cropped:
        return Cropped(**vars(super().sizes()), target=self.configs.transformer["target_size"])
