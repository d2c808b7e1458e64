"""Tiny HunyuanVideo pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel

from lightning_dfd.testing.tiny.parts import LETTERS, Tiny, template_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's VAE with 4 channels of latents."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def clip_encoder() -> dict[str, Any]:
    """A second text encoder and its tokenizer: CLIP, of which pipelines take the pooled output."""
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    end = len(pieces) - 1
    config = CLIPTextConfig(
        **SMALL, vocab_size=end + 1, num_hidden_layers=2, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end
    )
    tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    return {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModel(config).eval()}


def hunyuan() -> HunyuanVideoPipeline:
    """HunyuanVideo with its two text encoders, embedded guidance and shift 7."""
    # 57 words are 57 + 38 tokens, as many as the pipeline cuts off
    spelt = {"relationships", "transitions", "background", "used"}
    tokenizer = template_tokenizer(str(DEFAULT_PROMPT_TEMPLATE["template"]), spelt)
    config = LlamaConfig(**SMALL, vocab_size=len(tokenizer), num_hidden_layers=4, pad_token_id=0)
    return HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=LlamaModel(config).eval(),
        **clip_encoder(),
        vae=hunyuan_vae(),
        transformer=HunyuanVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


TINY = {"hunyuan": Tiny(hunyuan)}
