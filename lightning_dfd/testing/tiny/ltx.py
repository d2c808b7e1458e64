"""Tiny LTX-Video pipelines."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from lightning_dfd.testing.tiny.parts import Tiny, text_encoder, text_tokenizer
from lightning_dfd.types import VideoSize


def ltx() -> LTXPipeline:
    """LTX-Video with the published compression of 8 and 32, and its scheduler, which shifts by the number of tokens."""
    tokenizer = text_tokenizer()
    vae: Any = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(torch.tensor([1.5, 0.8, 1.0, 2.0]))
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=vae,
        transformer=LTXVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=32,
            caption_channels=32,
            num_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            base_shift=0.95,
            max_shift=2.05,
            shift_terminal=0.1,
            use_dynamic_shifting=True,
        ),
    )


TINY = {
    "ltx": Tiny(ltx, size=VideoSize(9, 64, 96), least_steps=2),
    "ltx_i2v": Tiny(  # one folder is both, as on the hub
        ltx,
        backbone="lightning_dfd.backbones.families.ltx.LTXImageBackbone",
        size=VideoSize(9, 64, 96),
        kinds=("ode",),
        least_steps=2,
    ),
}
