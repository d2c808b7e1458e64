"""A loaded network and how it is used, as the loaders of this room return it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dfd.evaluation.features.base import FeatureKind


@dataclass(frozen=True)
class Network:
    """A frozen network with its preprocessing.

    Attributes:
        module: in float32 and evaluation mode; moved, in place, to the device of the videos.
        features: runs `module` on videos [B, C, F, H, W], float32 in [-1, 1]: [B, D], or [B, F, D] for a frame kind.
        kind: see `FeatureExtractor`.
        protocol: the preprocessing and the layer in words; other words make another fingerprint.
        weights: a hash of the weights.
    """

    module: nn.Module
    features: Callable[[Tensor], Tensor]
    kind: FeatureKind
    protocol: str
    weights: str


def hash_of_weights(module: nn.Module) -> str:
    """sha256 over the layers as the module prints them, and names and values of its parameters and buffers.

    Taken from the loaded values, as a hub id names other weights whenever its owner uploads some.
    """
    total = hashlib.sha256(repr(module).encode())  # layers without weights count as well
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):  # a module may keep other things in its state
            total.update(name.encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
