"""Tiny HunyuanVideo 1.5 pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from lightning_dfd.testing.tiny.parts import Tiny, text_encoder, text_tokenizer

CUT = 108  # tokens of its template that the pipeline cuts off, whatever they say


def hunyuan15(
    pipeline: Any = HunyuanVideo15Pipeline, more: Mapping[str, Any] = MappingProxyType({})
) -> DiffusionPipeline:
    """HunyuanVideo 1.5 with two text encoders, a guider and the published compression of 4 and 16; or another pipeline,
    with `more` parts."""
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
    built: DiffusionPipeline = pipeline(
        **more,
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
            target_size=39,  # the side of a square with the pixels of 32x48
            rope_axes_dim=(4, 6, 6),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )
    return built


def hunyuan15_i2v() -> DiffusionPipeline:
    """Image-to-video: the same network, and an image encoder."""
    siglip = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=8
    )
    more = {
        "image_encoder": SiglipVisionModel(siglip).eval(),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 16, "width": 16}),
    }
    return hunyuan15(HunyuanVideo15ImageToVideoPipeline, more)


TINY = {"hunyuan15": Tiny(hunyuan15), "hunyuan15_i2v": Tiny(hunyuan15_i2v)}
