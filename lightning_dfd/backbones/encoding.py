"""From prompts, images and videos to what the network sees, and back.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents; L text tokens, D features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from lightning_dfd.backbones.family import TEXT_WIDTHS, Family
from lightning_dfd.backbones.loader import Loader
from lightning_dfd.types import Conditioning, VideoSize

PIXELS_AT_ONCE = 1 << 24  # that a VAE is handed: about one clip of 49x480x720


class Encoding(Family):
    """What VAE, text encoders and image encoders give; zeros in the same shapes, by configs alone, for planning."""

    loader: Loader

    # ---- prompts and images --------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts, as the pipeline's own call makes it.

        Right for every pipeline whose `encode_prompt` answers (positive, negative), or (positive, its mask,
        negative, its mask): `prompt_embeds` [B, L, D] and `prompt_attention_mask` [B, L].
        """
        return self._encode(prompts)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """As `encode_prompts`, of prompts to guide away from, which some pipelines encode in another way."""
        return self.encode_prompts(prompts)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], **options: Any) -> Conditioning:
        """`encode_prompts` with further arguments of the pipeline's `encode_prompt`."""
        embeds, *others = self.loader.encoders.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.loader.device,
            **options,
        )
        masks = {"prompt_attention_mask": others[0]} if len(others) == 3 else {}
        return Conditioning({"prompt_embeds": embeds} | masks)

    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        """What the network is told of the images [B, C, H, W], in [-1, 1], with which videos of `frames` begin.

        Joined to the prompts' conditioning; kept where a negative prompt takes the prompt's place. Nothing for
        text-to-video.
        """
        return Conditioning({})

    def dummy_prompts(self, batch_size: int) -> Conditioning:
        """Zeros in the shapes of `encode_prompts`, and masks of ones.

        Raises:
            ValueError: the shapes do not follow from the configs.
        """
        width = self.encoder_widths()["text_encoder"]
        if width is None:
            raise ValueError(
                f"the transformer's config of {self.source} has none of {', '.join(TEXT_WIDTHS)}, from which the size "
                f"of text embeddings follows; override encoder_widths in {type(self).__name__}"
            )
        tokens = (batch_size, self.max_sequence_length)
        embeds = torch.zeros(*tokens, width, dtype=self.dtype)
        mask = torch.ones(tokens, dtype=torch.int64)
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def dummy_images(self, batch_size: int, size: VideoSize) -> Conditioning:
        """Zeros in the shapes of `encode_images`."""
        return Conditioning({})

    # ---- videos --------------------------------------------------------------------------------------------

    @abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """From the VAE's latents [B, C, f, h, w] to what the network sees, in its layout."""

    @abstractmethod
    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""

    def encode(self, videos: Tensor) -> Tensor:
        """The VAE's encoder: videos [B, C, F, H, W] to latents [B, C, f, h, w] as it gives them."""
        latents: Tensor = self.loader.vae.encode(videos).latent_dist.mode()
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's decoder: latents [B, C, f, h, w] as it wants them, to videos [B, C, F, H, W]."""
        frames: Tensor = self.loader.vae.decode(latents).sample
        return frames

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        """Latents as the network sees them, float32, of videos [B, C, F, H, W] in [-1, 1].

        The mean of the VAE's posterior, so that a cache does not depend on a draw. Few at a time, as in decoding.
        """
        groups = videos.split(clips_at_once(videos[0, 0].numel()))
        latents = [self.encode(group.to(self.loader.device, self.loader.vae.dtype)) for group in groups]
        return self.normalise(torch.cat(latents).float())

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Videos [B, C, F, H, W] in [-1, 1], float32.

        Large ones clip by clip: a VAE takes gigabytes for one, and some fail where a tensor passes 2^31 elements.
        """
        scaled = self.denormalise(latents.to(self.loader.device).float()).to(self.loader.vae.dtype)
        temporal, spatial = self.compression()
        frames, height, width = scaled.shape[2:]
        groups = scaled.split(clips_at_once(((frames - 1) * temporal + 1) * height * width * spatial**2))
        with self.loader.tiles():
            return torch.cat([self.decode(group).float().clamp(-1.0, 1.0) for group in groups])


def clips_at_once(pixels: int) -> int:
    """Clips of so many pixels (frames included) that a VAE is handed together."""
    return max(1, PIXELS_AT_ONCE // pixels)


def cleaned_captions() -> dict[str, bool]:
    """That captions be cleaned, as some calls have it by default, which warn at each where packages for it lack."""
    return {"clean_caption": is_bs4_available() and is_ftfy_available()}
