"""Tiny random pipelines of families without a backbone: some that can be captured, some that have to be refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLMagvit,
    ClassifierFreeGuidance,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LTXConditionPipeline,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)

from lightning_dfd.testing.tiny.ltx import ltx
from lightning_dfd.testing.tiny.wan import wan

HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN: dict[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 32,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}


def wan_parts(**others: Any) -> dict[str, Any]:
    """The tiny Wan's tokenizer, text encoder, VAE and scheduler, with `others` beside or in their place."""
    parts = {name: part for name, part in wan().components.items() if not name.startswith("transformer")}
    return {**parts, **others}


def unipc() -> UniPCMultistepScheduler:
    """The solver of second order that Wan's published pipelines have."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def vace() -> WanVACEPipeline:
    """Wan with control latents, which are blank without a video, and a solver of second order."""
    transformer = WanVACETransformer3DModel(**WAN, rope_max_seq_len=32, vace_layers=[0, 1], vace_in_channels=2 * 4 + 64)
    return WanVACEPipeline(**wan_parts(transformer=transformer, scheduler=unipc()))


def motif() -> MotifVideoPipeline:
    """Motif-Video: latents followed by channels of conditioning, its own times, and a guider."""
    transformer = MotifVideoTransformer3DModel(
        **HEADS, in_channels=9, out_channels=4, num_layers=1, num_single_layers=1, text_embed_dim=32,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return MotifVideoPipeline(**wan_parts(transformer=transformer, guider=ClassifierFreeGuidance(guidance_scale=7.5)))


def easyanimate() -> EasyAnimatePipeline:
    """EasyAnimate: arguments by place, a chat template, a scaling factor."""
    parts = wan_parts()
    parts["tokenizer"].chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}"
    return EasyAnimatePipeline(
        tokenizer=parts["tokenizer"],
        text_encoder=parts["text_encoder"],
        vae=AutoencoderKLMagvit(
            latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2
        ),
        transformer=EasyAnimateTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, patch_size=2, sample_width=4, sample_height=4, num_layers=2,
            mmdit_layers=2, time_embed_dim=8, text_embed_dim=32,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def helios() -> HeliosPipeline:
    """Helios: chunks of 9 frames of latents, with a history."""
    transformer = HeliosTransformer3DModel(**WAN, rope_dim=(4, 6, 6))
    return HeliosPipeline(**wan_parts(transformer=transformer, scheduler=HeliosScheduler()))


def anyflow() -> AnyFlowPipeline:
    """AnyFlow: the network is told two times."""
    transformer = AnyFlowTransformer3DModel(**WAN, rope_max_seq_len=32)
    return AnyFlowPipeline(**wan_parts(transformer=transformer, scheduler=FlowMapEulerDiscreteScheduler()))


def anyflow_far() -> AnyFlowFARPipeline:
    """AnyFlow FAR: frame by frame with a cache of keys and values."""
    transformer = AnyFlowFARTransformer3DModel(**{**WAN, "num_layers": 1}, rope_max_seq_len=32, chunk_partition=(1, 1))
    return AnyFlowFARPipeline(**wan_parts(transformer=transformer, scheduler=FlowMapEulerDiscreteScheduler()))


def forcing() -> SkyReelsV2DiffusionForcingPipeline:
    """SkyReels-V2 with diffusion forcing: a scheduler for each frame."""
    transformer = SkyReelsV2Transformer3DModel(**WAN, rope_max_seq_len=32, inject_sample_info=True)
    return SkyReelsV2DiffusionForcingPipeline(**wan_parts(transformer=transformer, scheduler=unipc()))


def ltx_condition() -> LTXConditionPipeline:
    """LTX-Video with conditions: the network's output is turned round."""
    return LTXConditionPipeline(**{**ltx().components, "scheduler": FlowMatchEulerDiscreteScheduler()})


CAPTURED: dict[str, Callable[[], Any]] = {"vace": vace, "motif": motif, "easyanimate": easyanimate}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "helios": (helios, "history"),
    "anyflow": (anyflow, "constant"),
    "anyflow_far": (anyflow_far, "history"),
    "forcing": (forcing, "sample"),
    "ltx_condition": (ltx_condition, "output"),
}


def save(build: Callable[[], Any], folder: Path) -> Path:
    """Save a pipeline with weights of its own seed; last layers that start at zero are drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = build()
        for parameter in pipe.transformer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    pipe.save_pretrained(folder)
    return folder
