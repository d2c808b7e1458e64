"""What is checked of the levers for memory: they reach the parts that they are for, whatever the family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from lightning_dfd.networks.quantization import Quantization
from lightning_dfd.testing.case import PROMPTS, Case, gap, require


def quantization(case: Case, folder: Path) -> None:
    """`quantization` reaches every linear layer of the network, or of each of its networks."""
    exact, backbone = case.load(torch.float32).load_transformer(), case.load(torch.float32)
    with rounding() as backbone.loader.quantization:
        network = backbone.load_transformer()
    layers = dict(network.named_modules())
    linear = {name: layer for name, layer in exact.named_modules() if isinstance(layer, nn.Linear)}
    require(linear, "the network has no linear layers")
    for name, layer in linear.items():
        found: Any = layers[name]
        require(torch.equal(found.weight, rounded(layer.weight)), f"quantization does not reach the network's {name}")


def offload(case: Case, folder: Path) -> float:
    """With `offload` the encoders and the VAE wait on the CPU, and answer the same."""
    plain, waiting = case.load(torch.float32), case.load(torch.float32)
    waiting.loader.offload = True
    videos, answers = case.videos(1), []
    for backbone in (plain, waiting):
        backbone.loader.to(_device())
        latents = backbone.encode_videos(videos)
        cond = backbone.encode_prompts(PROMPTS[:1]) | backbone.encode_images(videos[:, :, 0], case.size.frames)
        answers.append([latents, backbone.decode_latents(latents), *cond.tensors.values()])
    parts = {name: getattr(waiting.loader.encoders, name) for name in waiting.configs.encoders}
    for name, part in {"vae": waiting.loader.vae, **parts}.items():
        devices = {tensor.device.type for tensor in part.parameters()}
        require(devices == {"cpu"}, f"with offload the {name} stays on {devices} when it is done")
        require(_waits(part), f"offload does not reach the {name}")
    error = max(gap(one.float(), other.float()) for one, other in zip(*answers, strict=True))
    require(error < 1e-4, f"with offload encoders and VAE answer otherwise, by {error:.1e}")
    return error


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _waits(network: nn.Module) -> bool:
    """Whether every layer with weights is brought to the device for its call, by itself or with the whole network."""

    def brought(module: nn.Module) -> bool:
        registry: Any = getattr(module, "_diffusers_hook", None)
        return registry is not None and registry.get_hook(_GROUP_OFFLOADING) is not None

    layers = [module for module in network.modules() if not list(module.children()) and list(module.parameters())]
    return all(map(brought, layers))


# ---- a quantisation that needs no package ---------------------------------------------------------------------------


def rounded(weight: Tensor) -> Tensor:
    """A matrix in 8 bits: in every row multiples of a 127th of its largest entry."""
    unit = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / unit).round() * unit


class _Method(str, Enum):
    ROUNDING = "rounding"


class _Config(QuantizationConfigMixin):
    def __init__(self) -> None:
        self.quant_method: Any = _Method.ROUNDING

    def to_diff_dict(self) -> dict[str, Any]:  # diffusers writes it into the network's config
        settings: dict[str, Any] = self.to_dict()
        return settings


class _Quantizer(DiffusersQuantizer):
    is_serializable, is_trainable = False, True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        pass

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(rounded(layer.weight))


class _Rounding(Quantization):
    def config(self, dtype: torch.dtype) -> Any:
        return _Config()


@contextmanager
def rounding() -> Iterator[Quantization]:
    """Stands in for the packages that quantise: networks that are loaded within it get rounded weights."""
    AUTO_QUANTIZER_MAPPING[_Method.ROUNDING] = _Quantizer
    try:
        yield _Rounding("torchao", "int8")
    finally:
        del AUTO_QUANTIZER_MAPPING[_Method.ROUNDING]
