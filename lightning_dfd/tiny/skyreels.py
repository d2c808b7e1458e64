"""Tiny SkyReels-V2 pipelines."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel

from lightning_dfd.noise import shifted_steps
from lightning_dfd.tiny.parts import Tiny
from lightning_dfd.tiny.wan import NETWORK, wan_encoders


def skyreels() -> SkyReelsV2Pipeline:
    """SkyReels-V2 text-to-video with Euler's scheduler at shift 8."""
    return SkyReelsV2Pipeline(
        **wan_encoders(),
        transformer=SkyReelsV2Transformer3DModel(**NETWORK),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )


TINY = {"skyreels": Tiny(skyreels, steps=shifted_steps(4, 8.0))}
