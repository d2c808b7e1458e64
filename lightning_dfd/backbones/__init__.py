from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured import CapturedBackbone
from lightning_dfd.backbones.cogvideox import CogVideoXBackbone
from lightning_dfd.backbones.cosmos import Cosmos25Backbone, Cosmos25ImageBackbone
from lightning_dfd.backbones.hunyuan import HunyuanVideoBackbone
from lightning_dfd.backbones.kandinsky import Kandinsky5Backbone
from lightning_dfd.backbones.ltx import LTXBackbone
from lightning_dfd.backbones.mochi import MochiBackbone
from lightning_dfd.backbones.registry import BACKBONES, backbone_from_pretrained
from lightning_dfd.backbones.sana_video import SanaVideoBackbone
from lightning_dfd.backbones.skyreels import SkyReelsV2Backbone
from lightning_dfd.backbones.wan import WanBackbone

__all__ = [
    "BACKBONES",
    "Backbone",
    "CapturedBackbone",
    "CogVideoXBackbone",
    "Cosmos25Backbone",
    "Cosmos25ImageBackbone",
    "HunyuanVideoBackbone",
    "Kandinsky5Backbone",
    "LTXBackbone",
    "MochiBackbone",
    "SanaVideoBackbone",
    "SkyReelsV2Backbone",
    "WanBackbone",
    "backbone_from_pretrained",
]
