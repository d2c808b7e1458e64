"""Tiny Wan pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from lightning_dfd.tiny.parts import Tiny, text_encoder, text_tokenizer

NETWORK: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_vae() -> AutoencoderKLWan:
    """Wan 2.1's VAE with 4 channels of latents."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 2.0],
    )


def wan_encoders() -> dict[str, Any]:
    """Text encoder, tokenizer and VAE of Wan and of what was made from it."""
    tokenizer = text_tokenizer()
    encoder = text_encoder(UMT5Config, UMT5EncoderModel, len(tokenizer))
    return {"tokenizer": tokenizer, "text_encoder": encoder, "vae": wan_vae()}


def wan() -> WanPipeline:
    """Wan 2.1 text-to-video with Euler's scheduler at shift 5."""
    return WanPipeline(
        **wan_encoders(),
        transformer=WanTransformer3DModel(**NETWORK),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


TINY = {"wan": Tiny(wan)}
