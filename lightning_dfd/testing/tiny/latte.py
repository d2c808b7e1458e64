"""Tiny Latte pipelines."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, LattePipeline, LatteTransformer3DModel
from transformers import T5Config, T5EncoderModel

from lightning_dfd.testing.tiny.parts import EVEN, Tiny, text_encoder, text_tokenizer

FRAMES = 9  # the network has positions for no other number


def latte() -> LattePipeline:
    """Latte with an image VAE, a variance among its outputs and the published noise levels."""
    tokenizer = text_tokenizer()
    return LattePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            norm_num_groups=2,
        ),
        transformer=LatteTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=32,
            video_length=FRAMES,
        ),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False),
    )


TINY = {"latte": Tiny(latte, steps=EVEN, text_length=120)}  # its pipeline takes no other number of tokens
