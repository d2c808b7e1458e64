"""A network's blocks: which they are, how wide their tokens are, and what they give while the network runs.

Axis legend: B batch, S tokens of a clip (frames and places), D features of a token, N tapped blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from lightning_dfd.objectives.terms import FeatureShape


@contextmanager
def tapped(transformer: nn.Module, blocks: Sequence[int], batch_size: int) -> Iterator[list[Tensor]]:
    """Fills the yielded list, at its end, with what the blocks return while `transformer` is called: [B, S, D] each.

    Of a block that returns several tensors (CogVideoX: video and text tokens) the first counts. Frames that a block
    sees as a batch are put back into their clips, and the calls of a batch that was called in parts into one.

    Raises:
        RuntimeError: a call did not go through every tapped block once.
    """
    features: list[Tensor] = []
    calls: list[list[Tensor]] = []  # what the blocks gave in each call of the network

    def begin(network: nn.Module, arguments: object) -> None:
        calls.append([])

    def keep(block: nn.Module, arguments: object, output: Tensor | tuple[Tensor, ...]) -> None:
        calls[-1].append(output if isinstance(output, Tensor) else output[0])

    layers = blocks_of(transformer)
    handles = [layers[number].register_forward_hook(keep) for number in blocks]
    handles.append(transformer.register_forward_pre_hook(begin))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
    for given in calls or [[]]:
        if len(given) != len(blocks):
            raise RuntimeError(f"{len(blocks)} blocks are tapped, but one call gave {len(given)} features")
    for parts in zip(*calls, strict=True):
        features.append(torch.cat(parts).reshape(batch_size, -1, parts[0].shape[-1]))


def networks_within(module: nn.Module) -> list[nn.Module]:
    """Every diffusers network in a module, itself included."""
    return [part for part in module.modules() if isinstance(part, ModelMixin)]


def blocks_within(module: nn.Module) -> list[nn.Module]:
    """The blocks of every diffusers network in a module: the members of the lists right below each."""
    return [block for network in networks_within(module) for blocks in _lists(network) for block in blocks]


def _lists(network: nn.Module) -> list[nn.ModuleList]:
    return [child for child in network.children() if isinstance(child, nn.ModuleList)]


def blocks_of(transformer: nn.Module) -> nn.ModuleList:
    """The network's main blocks, which are tapped: the longest list of modules right below it.

    Raises:
        ValueError: there is none.
    """
    lists = _lists(transformer)
    if not lists:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks to tap; set model.gan.weight: 0")
    return max(lists, key=len)


def feature_shape(transformer: nn.Module) -> FeatureShape:
    """How many blocks there are, and D, as diffusers' video transformers state it.

    Raises:
        ValueError: the network has no list of blocks, or its config does not state D.
    """
    config: dict[str, int] = dict(transformer.config)  # type: ignore[arg-type]
    count = len(blocks_of(transformer))
    if "model_dim" in config:  # Kandinsky's name for it
        return FeatureShape(count, config["model_dim"])
    try:
        return FeatureShape(count, config["num_attention_heads"] * config["attention_head_dim"])
    except KeyError as error:
        raise ValueError(
            f"the config of {type(transformer).__name__} has no {error}, from which the size of its features follows; "
            "set model.gan.weight: 0"
        ) from error
