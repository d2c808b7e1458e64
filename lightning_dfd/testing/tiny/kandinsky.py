"""Tiny Kandinsky 5 pipelines."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from lightning_dfd.testing.tiny.hunyuan import clip_encoder, hunyuan_vae
from lightning_dfd.testing.tiny.parts import Tiny, template_tokenizer
from lightning_dfd.types import VideoSize

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def kandinsky(pipeline: Any = Kandinsky5T2VPipeline) -> DiffusionPipeline:
    """Kandinsky 5 of five seconds: its two text encoders, channels for a first frame, and shift 5."""
    pipe = pipeline(
        **dict.fromkeys(("tokenizer", "text_encoder")),
        **clip_encoder(),
        vae=hunyuan_vae(),
        transformer=Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=32,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    # 103 words are 103 + 25 tokens, as many as the pipeline cuts off
    tokenizer = template_tokenizer(pipe.prompt_template, {"postprocessing", "transitions"})
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    sight = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=SMALL | text, vision_config=sight)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval())
    return pipe  # type: ignore[no-any-return]


TINY = {
    "kandinsky": Tiny(kandinsky),
    "kandinsky_i2v": Tiny(lambda: kandinsky(Kandinsky5I2VPipeline), size=VideoSize(17, 32, 48), kinds=("ode",)),
}
