"""Latte text-to-video (2401.03048): epsilon prediction on frames that an image VAE encodes one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.backbones.channels import Scaled
from lightning_dfd.backbones.discrete import few_step_discrete_scheduler
from lightning_dfd.backbones.encoding import cleaned_captions
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class LatteBackbone(Scaled):
    """Latents [B, C, F, h, w], a latent frame for each frame.

    The pipeline shows its network the tokens of one prompt without padding, and of a negative prompt as many as the
    prompt has. Here captions are joined in batches, so padding is masked instead, which comes to the same. Handed a
    list, the pipeline pads with zeros that are seen, and answers otherwise than for each prompt by itself.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 120  # fixed in the pipeline's encode_prompt

    def text_limits(self) -> tuple[int, int | None]:
        return 120, 120

    def compression(self) -> tuple[int, int]:
        return 1, 2 ** (len(self.configs.vae["block_out_channels"]) - 1)

    def network_channels(self) -> tuple[int, int]:
        return self.latent_channels(), 2 * self.latent_channels()  # see call

    def sizes(self) -> Sizes:
        return replace(super().sizes(), frames=self.configs.transformer["video_length"])

    def size_arguments(self, size: VideoSize) -> dict[str, int]:
        return {"video_length": size.frames, "height": size.height, "width": size.width}

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The embeddings of all 120 tokens, padding included, and the mask of the prompt's own."""
        embeds, _ = self.loader.encoders.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            **cleaned_captions(),
            mask_feature=False,
            device=self.loader.device,
        )
        tokens = self.loader.encoders.tokenizer(
            self.loader.encoders._text_preprocessing(list(prompts), **cleaned_captions()),
            padding="max_length",
            max_length=self.max_sequence_length,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(self.loader.device)
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def unconditional(self, negative: Conditioning, cond: Conditioning) -> Conditioning:
        """The negative prompt's tokens, padding included, as far as the prompt's own tokens go."""
        embeds = negative["prompt_embeds"].expand(cond.batch_size, -1, -1)
        return cond | Conditioning({"prompt_embeds": embeds})

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """The first half of the channels; the second is a variance, which no sampler here uses."""
        dtype = dtype_of(transformer)
        hidden = cond["prompt_attention_mask"] == 0
        bias = torch.zeros(hidden.shape, dtype=dtype, device=x_t.device).masked_fill(hidden, -torch.inf)
        output: Tensor = transformer(
            hidden_states=x_t.to(dtype),
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=bias[:, None].repeat_interleave(x_t.shape[2], dim=0),  # [B * F, 1, L]
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0]

    def encode(self, videos: Tensor) -> Tensor:
        frames = [
            self.loader.vae.encode(frame).latent_dist.mode() for frame in videos.unbind(2)
        ]  # one by one, for memory
        return torch.stack(frames, dim=2)

    def decode(self, latents: Tensor) -> Tensor:
        return torch.stack([self.loader.vae.decode(frame).sample for frame in latents.unbind(2)], dim=2)

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_discrete_scheduler(self.schedule, steps, kind)
