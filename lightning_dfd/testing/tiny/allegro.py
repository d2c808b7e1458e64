"""Tiny Allegro pipelines."""

from __future__ import annotations

from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler
from transformers import T5Config, T5EncoderModel

from lightning_dfd.testing.tiny.parts import EVEN, Tiny, text_encoder, text_tokenizer
from lightning_dfd.types import VideoSize


def allegro() -> AllegroPipeline:
    """Allegro with the published noise levels, but DDIM's scheduler: the published one draws noise at every step."""
    tokenizer = text_tokenizer()
    return AllegroPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=AutoencoderKLAllegro(
            block_out_channels=(2, 2, 2, 2),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=1,
            sample_size=128,  # of a tile, with more than the overlap of 120
        ),
        transformer=AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=48,
            sample_height=16,
            sample_width=22,
            sample_frames=6,
            caption_channels=32,
        ),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


TINY = {"allegro": Tiny(allegro, size=VideoSize(24, 128, 176), steps=EVEN)}  # two tiles of the VAE side by side
