"""Which backbone understands which pipeline."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import torch
from diffusers import DiffusionPipeline

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured.backbone import CapturedBackbone
from lightning_dfd.backbones.families.allegro import AllegroBackbone
from lightning_dfd.backbones.families.cogvideox import CogVideoXBackbone, CogVideoXImageBackbone
from lightning_dfd.backbones.families.cosmos import Cosmos25Backbone
from lightning_dfd.backbones.families.hunyuan import HunyuanVideoBackbone
from lightning_dfd.backbones.families.hunyuan15 import HunyuanVideo15Backbone, HunyuanVideo15ImageBackbone
from lightning_dfd.backbones.families.kandinsky import Kandinsky5Backbone, Kandinsky5ImageBackbone
from lightning_dfd.backbones.families.latte import LatteBackbone
from lightning_dfd.backbones.families.ltx import LTXBackbone, LTXImageBackbone
from lightning_dfd.backbones.families.mochi import MochiBackbone
from lightning_dfd.backbones.families.sana_video import SanaVideoBackbone, SanaVideoImageBackbone
from lightning_dfd.backbones.families.skyreels import SkyReelsV2Backbone, SkyReelsV2ImageBackbone
from lightning_dfd.backbones.families.wan import WanBackbone, WanImageBackbone
from lightning_dfd.backbones.loading import read_config
from lightning_dfd.backbones.presence import require_source

BACKBONES: dict[str, type[Backbone]] = {
    "AllegroPipeline": AllegroBackbone,
    "CogVideoXImageToVideoPipeline": CogVideoXImageBackbone,
    "CogVideoXPipeline": CogVideoXBackbone,
    "Cosmos2_5_PredictBasePipeline": Cosmos25Backbone,
    "HunyuanVideo15ImageToVideoPipeline": HunyuanVideo15ImageBackbone,
    "HunyuanVideo15Pipeline": HunyuanVideo15Backbone,
    "HunyuanVideoPipeline": HunyuanVideoBackbone,
    "Kandinsky5I2VPipeline": Kandinsky5ImageBackbone,
    "Kandinsky5T2VPipeline": Kandinsky5Backbone,
    "LTXImageToVideoPipeline": LTXImageBackbone,
    "LattePipeline": LatteBackbone,
    "LTXPipeline": LTXBackbone,
    "MochiPipeline": MochiBackbone,
    "SanaImageToVideoPipeline": SanaVideoImageBackbone,
    "SanaVideoPipeline": SanaVideoBackbone,
    "SkyReelsV2ImageToVideoPipeline": SkyReelsV2ImageBackbone,
    "SkyReelsV2Pipeline": SkyReelsV2Backbone,
    "WanImageToVideoPipeline": WanImageBackbone,
    "WanPipeline": WanBackbone,
}


def backbone_from_pretrained(
    source: str,
    dtype: torch.dtype = torch.float32,
    max_sequence_length: int | None = None,
    backbone: str | None = None,
) -> Backbone:
    """The backbone of a diffusers pipeline; nothing but its configs is read yet.

    Args:
        source: folder of the pipeline, or its hub id, with `@revision` (branch, tag or commit) or without.
        dtype: precision of the frozen weights.
        max_sequence_length: text tokens per prompt; None for the pipeline's own default.
        backbone: import path of a `Backbone` subclass, or `captured` for one that learns its pipeline's calls by
            watching it; None to choose by the pipeline's class.

    Raises:
        FileNotFoundError: there is no pipeline at `source`.
        ValueError: the pipeline's class is not known, its parts do not fit one another, or `backbone` is not a
            Backbone.
    """
    require_source(source)
    found = _class_of(source, backbone)(source, dtype, max_sequence_length)
    found.check_teacher()
    return found


def _class_of(source: str, backbone: str | None) -> type[Backbone]:
    if backbone == "captured":
        return CapturedBackbone
    if backbone is not None:
        return _import_backbone(backbone)
    config = read_config(DiffusionPipeline, source)
    name = config["_class_name"]
    if name not in BACKBONES:
        raise ValueError(
            f"{source} is a {name}; backbones exist for {', '.join(sorted(BACKBONES))}. "
            "For another family set model.backbone: captured, which learns the calls of many pipelines by watching "
            "them or refuses, or subclass lightning_dfd.Backbone and name it in model.backbone (docs/new_backbone.md)."
        )
    return BACKBONES[name].variant(config)


def _import_backbone(path: str) -> type[Backbone]:
    module, _, name = path.rpartition(".")
    if not module or path.startswith("."):
        raise ValueError(f"model.backbone is {path!r}; give package.module.ClassName, captured, or null")
    if (moved := _moved(module, name)) is not None:
        raise ValueError(f"model.backbone is {path!r}, which moved; set model.backbone: {moved}")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a module of the user's own raises while it is imported
        raise ValueError(
            f"model.backbone {path!r} cannot be imported: {type(error).__name__}: {error}; give "
            "package.module.ClassName, of a module in the current folder or on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Backbone)):
        raise ValueError(f"model.backbone {path!r} is not a subclass of lightning_dfd.Backbone")
    if inspect.isabstract(found):
        raise ValueError(
            f"model.backbone {path!r} lacks {', '.join(sorted(found.__abstractmethods__))}; write these methods, or "
            "name a finished backbone (docs/new_backbone.md)"
        )
    return found


def _moved(module: str, name: str) -> str | None:
    """Where a family's class is, if `module` is where it once was, right below this package; None for other paths."""
    package, _, family = module.rpartition(".")
    if package != __package__ or importlib.util.find_spec(module) is not None:
        return None
    moved = f"{package}.families.{family}"
    return f"{moved}.{name}" if importlib.util.find_spec(moved) is not None else None
