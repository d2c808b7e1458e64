"""Tiny Wan pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from lightning_dfd.testing.tiny.parts import Tiny, text_encoder, text_tokenizer

SIGHT = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, image_size=16, patch_size=8
)
# 4 channels of mask and 4 of the image beside the latents' 4, and CLIP's features
IMAGE = MappingProxyType({"in_channels": 12, "image_dim": 32, "added_kv_proj_dim": 32})
EXPANDED = MappingProxyType({"expand_timesteps": True})  # 2.2's 5B: a time for every token


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


def wan(
    pipeline: Any = WanPipeline,
    more: Mapping[str, Any] = MappingProxyType({}),
    network: Any = WanTransformer3DModel,
    shift: float = 5.0,
    **transformer: Any,
) -> DiffusionPipeline:
    """Wan 2.1 text-to-video with Euler's scheduler at shift 5; or another pipeline of the kind, with `more` parts."""
    tokenizer = text_tokenizer()
    built: DiffusionPipeline = pipeline(
        **more,
        tokenizer=tokenizer,
        text_encoder=text_encoder(UMT5Config, UMT5EncoderModel, len(tokenizer)),
        vae=wan_vae(),
        transformer=wan_transformer(network, **transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    return built


def wan_transformer(network: Any = WanTransformer3DModel, **config: Any) -> Any:
    """A network of two layers; `config` adds to what it is told or replaces it."""
    small = {
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
    return network(**(small | config))


def sight(encoder: Any = CLIPVisionModel) -> dict[str, Any]:
    """What CLIP's features of an image are made by."""
    return {
        "image_encoder": encoder(SIGHT).eval(),
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    }


def wan_i2v() -> DiffusionPipeline:
    """Wan 2.1 image-to-video."""
    return wan(WanImageToVideoPipeline, sight(), **IMAGE)


def wan22() -> DiffusionPipeline:
    """Wan 2.2 A14B: two networks, the second below t = .875."""
    return wan(more={"transformer_2": wan_transformer(), "boundary_ratio": 0.875})


def wan22_i2v() -> DiffusionPipeline:
    """Wan 2.2 A14B image-to-video, without CLIP's features."""
    more = {"transformer_2": wan_transformer(in_channels=12), "boundary_ratio": 0.9}
    return wan(WanImageToVideoPipeline, more, in_channels=12)


NO_GAN = {"gan": r"StagedNetwork has no list of blocks to tap; set model\.gan\.weight: 0"}
TINY = {
    "wan": Tiny(wan),
    "wan_i2v": Tiny(wan_i2v, text_length=512),  # its attention takes the first 512 tokens for text
    "wan22": Tiny(wan22, refuses=NO_GAN),
    "wan22_i2v": Tiny(wan22_i2v, refuses=NO_GAN),
    "wan_ti2v": Tiny(lambda: wan(more=EXPANDED)),
    "wan_ti2v_i2v": Tiny(lambda: wan(WanImageToVideoPipeline, EXPANDED)),
}
