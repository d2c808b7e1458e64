"""SkyReels-V2 text-to-video (2504.13074): Wan's network, trained further."""

from __future__ import annotations

from lightning_dfd.backbones.wan import WanBackbone


class SkyReelsV2Backbone(WanBackbone):
    """Wan in all but the names of its classes. Not the diffusion-forcing pipelines, whose frames have times of their
    own."""
