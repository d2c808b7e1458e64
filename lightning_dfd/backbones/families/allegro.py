"""Allegro text-to-video (2410.15458): epsilon prediction, and a VAE that works on tiles of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from diffusers import AllegroPipeline
from torch import Tensor

from lightning_dfd.backbones.channels import Scaled
from lightning_dfd.backbones.discrete import few_step_discrete_scheduler
from lightning_dfd.backbones.encoding import cleaned_captions
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.types import Conditioning, SampleKind, VideoSize

TILE_FRAMES = 24  # of a tile of the VAE, as the overlaps of tiles a constant of its class
OVERLAP_FRAMES, OVERLAP_HEIGHT, OVERLAP_WIDTH = 8, 120, 80
MOST_TILES = 64  # along an axis; more than any video has


@dataclass(frozen=True, kw_only=True)
class WholeTiles(Sizes):
    """Sizes that whole tiles of the VAE cover. It leaves black what they do not cover, and says nothing.

    Args:
        tile: height and width of a tile.
    """

    tile: int

    def lengths(self) -> tuple[list[int], list[int], list[int]]:
        """The frames, heights and widths that the VAE's tiles cover and the network's patches divide."""
        return (
            _covered(TILE_FRAMES, OVERLAP_FRAMES, self.compression[0]),
            _covered(self.tile, OVERLAP_HEIGHT, self.side_multiple),
            _covered(self.tile, OVERLAP_WIDTH, self.side_multiple),
        )

    def nearest(self, size: VideoSize) -> VideoSize:
        frames, height, width = self.lengths()
        return VideoSize(_nearest(size.frames, frames), _nearest(size.height, height), _nearest(size.width, width))

    def rule(self) -> str:
        frames, height, width = (", ".join(map(str, lengths[:4])) for lengths in self.lengths())
        return (
            "whole tiles of the VAE have to cover the video, "
            f"so frames can be {frames}, ..., the height {height}, ... and the width {width}, ..."
        )


class AllegroBackbone(Scaled):
    """Latents [B, C, f, h, w] of 4f frames."""

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def text_length(self) -> int:
        return 512  # the default of the pipeline's call

    def compression(self) -> tuple[int, int]:
        vae = self.configs.vae
        return int(vae["temporal_compression_ratio"]), 2 ** (len(vae["block_out_channels"]) - 1)

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """The first frame has no latent frame of its own here."""
        channels, _, height, width = super().latent_shape(size)
        return channels, size.frames // self.compression()[0], height, width

    def sizes(self) -> WholeTiles:
        return WholeTiles(**vars(super().sizes()), tile=int(self.configs.vae["sample_size"]))

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        """The VAE can do nothing but tiles, and these of one video at a time."""
        self.prepare_vae(pipe.vae)

    def prepare_vae(self, vae: Any) -> None:
        vae.enable_tiling()
        vae.enable_slicing()

    def preparation(self) -> tuple[str, ...]:
        return "pipe.vae.enable_tiling()", "pipe.vae.enable_slicing()"

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return self._encode(prompts, **cleaned_captions())

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        output: Tensor = transformer(
            hidden_states=x_t.to(dtype_of(transformer)),
            timestep=timestep,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype_of(transformer)),
            encoder_attention_mask=cond["prompt_attention_mask"],
            image_rotary_emb=self._rotary(transformer, x_t),
            return_dict=False,
        )[0]
        return output

    def _rotary(self, transformer: Any, x_t: Tensor) -> Any:
        """Positions by the pipeline's own method, told that pixels are latents (it only needs the ratio)."""
        frames, height, width = x_t.shape[2:]
        shell: Any = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=1)
        return AllegroPipeline._prepare_rotary_positional_embeddings(shell, len(x_t), height, width, frames, x_t.device)

    def decode(self, latents: Tensor) -> Tensor:
        frames: Tensor = self.loader.vae.decode(latents).sample  # [B, F, C, H, W]
        return frames.transpose(1, 2)

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return few_step_discrete_scheduler(self.schedule, steps, kind)


def _covered(tile: int, overlap: int, multiple: int) -> list[int]:
    """The lengths that whole tiles with this overlap cover, of those the multiples of `multiple`, shortest first."""
    lengths = range(tile, tile + MOST_TILES * (tile - overlap), tile - overlap) if tile > overlap else [tile]
    return [length for length in lengths if length % multiple == 0]


def _nearest(length: int, allowed: Sequence[int]) -> int:
    return min(allowed, key=lambda one: abs(one - length))
