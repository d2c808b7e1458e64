"""Tiny Cosmos pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lightning_dfd.backbones.families.cosmos import NotAsked
from lightning_dfd.testing.tiny.parts import Tiny, text_tokenizer
from lightning_dfd.testing.tiny.wan import wan_vae

PROMPT_ALONE = "{% for turn in messages %}{% if turn.role == 'user' %}{{ turn.content[0].text }}{% endif %}{% endfor %}"


def qwen(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """A language model of two layers with 16 features; the pipeline joins what both layers say."""
    text: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder: Qwen2_5_VLForConditionalGeneration = Qwen2_5_VLForConditionalGeneration(config).eval()
    return encoder


def cosmos(padding_mask: bool = False) -> Cosmos2_5_PredictBasePipeline:
    """Cosmos-Predict2.5 with Euler's scheduler. The published networks have a padding mask, which needs torchvision.

    Like the published pipelines it is saved without a safety checker: diffusers makes one when it loads the pipeline.
    """
    tokenizer = text_tokenizer()
    tokenizer.chat_template = PROMPT_ALONE
    checker: Any = NotAsked()
    return Cosmos2_5_PredictBasePipeline(
        tokenizer=tokenizer,
        text_encoder=qwen(len(tokenizer)),
        vae=wan_vae(),
        transformer=CosmosTransformer3DModel(
            in_channels=4 + 1,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2.0,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(8, 16, 16),
            rope_scale=(1.0, 3.0, 3.0),
            concat_padding_mask=padding_mask,
            extra_pos_embed_type=None,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=2 * 16,
            encoder_hidden_states_channels=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        safety_checker=checker,
    )


CHECKED = 1e-4 + 1 / 255  # frames are cut to 8 bits for the safety checker
TINY = {
    "cosmos": Tiny(cosmos, pixel_error=CHECKED),
    "cosmos_i2v": Tiny(
        cosmos, kinds=("ode",), pixel_error=CHECKED, backbone="lightning_dfd.backbones.Cosmos25ImageBackbone"
    ),
}
