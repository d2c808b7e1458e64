from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.cogvideox import CogVideoXBackbone
from lightning_dfd.backbones.cosmos import Cosmos25Backbone, Cosmos25ImageBackbone
from lightning_dfd.backbones.hunyuan import HunyuanVideoBackbone
from lightning_dfd.backbones.ltx import LTXBackbone
from lightning_dfd.backbones.mochi import MochiBackbone
from lightning_dfd.backbones.registry import BACKBONES, backbone_from_pretrained
from lightning_dfd.backbones.wan import WanBackbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "CogVideoXBackbone",
    "Cosmos25Backbone",
    "Cosmos25ImageBackbone",
    "HunyuanVideoBackbone",
    "LTXBackbone",
    "MochiBackbone",
    "WanBackbone",
    "backbone_from_pretrained",
]
