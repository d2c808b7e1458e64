"""Networks without weights, built from a config on torch's meta device; and the precision of a network's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import nn


def meta_network(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A diffusers network in the precision in which `from_pretrained` loads it: some layers stay float32."""
    network_class = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        network: nn.Module = network_class.from_config(dict(config))
    kept = set(network_class._keep_in_fp32_modules or ())
    for name, tensor in network.state_dict(keep_vars=True).items():  # buffers that are not stored stay as they are
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return network.eval().requires_grad_(False)


def dtype_of(network: nn.Module) -> torch.dtype:
    """The precision in which a network takes its inputs, like diffusers' `network.dtype`.

    That one looks through all modules for hooks that cast layers, at every call.
    """
    kept = getattr(network, "_keep_in_fp32_modules", None) or ()
    return next(
        parameter.dtype
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point() and not any(module in name for module in kept)
    )
