from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured.backbone import CapturedBackbone
from lightning_dfd.backbones.families.cogvideox import CogVideoXBackbone
from lightning_dfd.backbones.families.cosmos import Cosmos25Backbone, Cosmos25ImageBackbone
from lightning_dfd.backbones.families.hunyuan import HunyuanVideoBackbone
from lightning_dfd.backbones.families.kandinsky import Kandinsky5Backbone
from lightning_dfd.backbones.families.ltx import LTXBackbone
from lightning_dfd.backbones.families.mochi import MochiBackbone
from lightning_dfd.backbones.families.sana_video import SanaVideoBackbone
from lightning_dfd.backbones.families.skyreels import SkyReelsV2Backbone
from lightning_dfd.backbones.families.wan import WanBackbone
from lightning_dfd.backbones.registry import BACKBONES, backbone_from_pretrained

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
