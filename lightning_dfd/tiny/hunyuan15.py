"""Tiny HunyuanVideo 1.5 pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel, T5Config, T5EncoderModel

from lightning_dfd.tiny.parts import Tiny, text_encoder, text_tokenizer

CUT = 108  # tokens of its template that the pipeline cuts off, whatever they say


def hunyuan15() -> HunyuanVideo15Pipeline:
    """HunyuanVideo 1.5 with two text encoders, a guider and the published compression of 4 and 16."""
    tokenizer = text_tokenizer({"a"})
    tokenizer.chat_template = f"{{{{ 'a ' * {CUT} }}}}{{{{ messages[1]['content'] }}}} a"
    letters = ByT5Tokenizer()
    qwen: Any = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return HunyuanVideo15Pipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLTextModel(qwen).eval(),
        tokenizer_2=letters,
        text_encoder_2=text_encoder(T5Config, T5EncoderModel, len(letters)),
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1),
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            text_embed_2_dim=32,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )


TINY = {"hunyuan15": Tiny(hunyuan15)}
