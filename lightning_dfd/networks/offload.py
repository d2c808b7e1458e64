"""Networks that wait on the CPU and visit the accelerator for as long as they compute, by diffusers' own hooks."""

from __future__ import annotations

import torch
from diffusers.hooks.group_offloading import apply_group_offloading
from torch import nn


def offload_leaves(network: nn.Module, device: torch.device) -> None:
    """Every layer goes to `device` when it is called and back after it: for encoders, whose time hardly counts."""
    apply_group_offloading(network, onload_device=device, offload_type="leaf_level")


def offload_blocks(network: nn.Module, device: torch.device) -> None:
    """The same block by block. Only for calls without gradient: its weights are elsewhere by the backward pass."""
    stream = device.type == "cuda"  # copy the next block meanwhile
    apply_group_offloading(
        network, onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream
    )
