"""A pipeline's networks without weights: built from their configs on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from lightning_dfd.backbones import Backbone
from lightning_dfd.networks.blocks import blocks_within, networks_within
from lightning_dfd.networks.quantization import BYTES, Quantization


def meta_encoders(backbone: Backbone) -> dict[str, nn.Module] | None:
    """What encodes prompts and images besides the VAE, by name; None where a config is not there."""
    networks = {}
    for name in backbone.configs.encoders:
        config: Any = backbone.configs.encoder(name)
        if config is None:
            return None
        network_class = getattr(transformers, backbone.configs.pipeline[name][1])
        with torch.device("meta"):
            networks[name] = network_class(network_class.config_class.from_dict(config)).to(backbone.dtype)
    return networks


def size_of(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def spared_by_quantization(network: nn.Module, quantization: Quantization) -> int:
    """Bytes that a network's linear layers lose; those that stay float32 are not quantised either."""
    weights = []
    one: Any
    for one in networks_within(network):
        kept = set(one._keep_in_fp32_modules or ())
        linear = {name: module for name, module in one.named_modules() if isinstance(module, nn.Linear)}
        weights += [module.weight for name, module in linear.items() if not kept & set(name.split("."))]
    return sum(weight.nbytes - int(weight.numel() * BYTES[quantization.kind]) for weight in weights)


def spared_by_offload(network: nn.Module) -> int:
    """Bytes of the blocks that wait on the CPU: all but the one that computes and the one being fetched."""
    sizes = sorted(map(size_of, blocks_within(network)))
    return sum(sizes[:-2])


def replace_tensors(network: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Give every parameter and buffer what `make` answers for it; shared ones stay shared."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[parameter]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                made[buffer] = made.get(buffer, make(buffer))
                module._buffers[name] = made[buffer]
