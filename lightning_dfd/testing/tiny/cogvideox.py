"""Tiny CogVideoX pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from transformers import T5Config, T5EncoderModel

from lightning_dfd.testing.tiny.parts import EVEN, Tiny, text_encoder, text_tokenizer


def cogvideox_scheduler(snr_shift: float) -> CogVideoXDDIMScheduler:
    """The scheduler of the published pipelines; the 2B's SNR shift is 3, the 5B's 1."""
    return CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift,
        timestep_spacing="trailing",
    )


def cogvideox(rotary: bool = False, image: bool = False) -> DiffusionPipeline:
    """9 frames of 32x32 by default; sine positions and SNR shift 3 as in the 2B, or rotary and 1 as in the 5B.

    `image` makes it image-to-video, as the 5B I2V: the image's latents are further channels.
    """
    tokenizer = text_tokenizer()
    pipeline: Any = CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    built: DiffusionPipeline = pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder(T5Config, T5EncoderModel, len(tokenizer)),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_height=32,
            sample_width=32,
            scaling_factor=0.7,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            in_channels=8 if image else 4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            sample_height=4,
            sample_width=4,
            sample_frames=9,
            max_text_seq_length=16,
            use_rotary_positional_embeddings=rotary,
        ),
        scheduler=cogvideox_scheduler(snr_shift=1.0 if rotary else 3.0),
    )
    return built


TINY = {
    "cogvideox": Tiny(cogvideox, steps=EVEN),
    "cogvideox_5b": Tiny(lambda: cogvideox(rotary=True), steps=EVEN),
    "cogvideox_i2v": Tiny(lambda: cogvideox(rotary=True, image=True), steps=EVEN),
}
