"""Tiny Mochi pipelines."""

from __future__ import annotations

from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
from transformers import T5Config, T5EncoderModel

from lightning_dfd.backbones.families.mochi import own_times
from lightning_dfd.diffusion.noise import shift_time
from lightning_dfd.testing.tiny.parts import Tiny, text_encoder, text_tokenizer
from lightning_dfd.types import VideoSize


def mochi() -> MochiPipeline:
    """Mochi 1 with the 12 channels of latents and the compression of 6 and 8 that its pipeline takes for granted."""
    tokenizer = text_tokenizer()
    return MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        transformer=MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=12,
            pooled_projection_dim=32,
            text_embed_dim=32,
            time_embed_dim=8,
            num_layers=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )


# 1 by itself would be rounded above 1
STEPS = (1.0, *(shift_time(t, 0.1) for t in own_times(4)[1:]))
TINY = {"mochi": Tiny(mochi, size=VideoSize(7, 32, 48), steps=STEPS, kinds=("ode",), least_steps=2)}
