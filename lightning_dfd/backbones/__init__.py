from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured import CapturedBackbone
from lightning_dfd.backbones.cogvideox import CogVideoXBackbone
from lightning_dfd.backbones.hunyuan import HunyuanVideoBackbone
from lightning_dfd.backbones.ltx import LTXBackbone
from lightning_dfd.backbones.mochi import MochiBackbone
from lightning_dfd.backbones.registry import BACKBONES, backbone_from_pretrained
from lightning_dfd.backbones.wan import WanBackbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "CapturedBackbone",
    "CogVideoXBackbone",
    "HunyuanVideoBackbone",
    "LTXBackbone",
    "MochiBackbone",
    "WanBackbone",
    "backbone_from_pretrained",
]
