"""Tiny SANA-Video pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from lightning_dfd.diffusion.noise import shifted_steps
from lightning_dfd.testing.tiny.parts import LETTERS, Tiny
from lightning_dfd.testing.tiny.wan import wan_vae
from lightning_dfd.types import VideoSize


def sana_video(pipeline: Any = SanaVideoPipeline) -> DiffusionPipeline:
    """SANA-Video with Wan's VAE, and Euler's scheduler at shift 8."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    built: DiffusionPipeline = pipeline(
        tokenizer=GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=len(pieces),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
            )
        ).eval(),
        vae=wan_vae(),
        transformer=SanaVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            in_channels=4,
            out_channels=4,
            caption_channels=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )
    return built


SIZE, STEPS = VideoSize(9, 32, 64), shifted_steps(4, 8.0)
TINY = {
    "sanavideo": Tiny(sana_video, size=SIZE, steps=STEPS),
    "sanavideo_i2v": Tiny(lambda: sana_video(SanaImageToVideoPipeline), size=SIZE, steps=STEPS, kinds=("ode",)),
}
