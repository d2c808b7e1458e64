"""Tiny SkyReels-V2 pipelines."""

from __future__ import annotations

from diffusers import (
    DiffusionPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)
from transformers import CLIPVisionModelWithProjection

from lightning_dfd.diffusion.noise import shifted_steps
from lightning_dfd.testing.tiny.parts import Tiny
from lightning_dfd.testing.tiny.wan import IMAGE, sight, wan


def skyreels() -> DiffusionPipeline:
    """SkyReels-V2 text-to-video with Euler's scheduler at shift 8."""
    return wan(SkyReelsV2Pipeline, network=SkyReelsV2Transformer3DModel, shift=8.0)


def skyreels_i2v() -> DiffusionPipeline:
    """SkyReels-V2 image-to-video, at shift 5."""
    more = sight(CLIPVisionModelWithProjection)
    return wan(SkyReelsV2ImageToVideoPipeline, more, SkyReelsV2Transformer3DModel, **IMAGE)


TINY = {
    "skyreels": Tiny(skyreels, steps=shifted_steps(4, 8.0)),
    "skyreels_i2v": Tiny(skyreels_i2v, text_length=512),  # its attention takes the first 512 tokens for text
}
