"""SkyReels-V2, text- and image-to-video (2504.13074): Wan's network, trained further."""

from __future__ import annotations

from lightning_dfd.backbones.families.wan import WanBackbone, WanImageBackbone


class SkyReelsV2Backbone(WanBackbone):
    """Wan in all but the names of its classes. Not the diffusion-forcing pipelines, whose frames have times of their
    own."""


class SkyReelsV2ImageBackbone(WanImageBackbone):
    """The same of Wan 2.1's image-to-video."""
