"""Networks whose weights are spread over processes (FSDP2), and what has to be done with such weights.

A sharded parameter is a DTensor, of which each process holds some rows.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_dfd.distributed.ranks import Ranks

# A tensor for what has this name, shape and precision, in which to read it; None to leave it out.
Like = Callable[[str, torch.Size, torch.dtype], Tensor | None]

# ---- networks -------------------------------------------------------------------------------------------------


def shard(networks: Iterable[nn.Module], blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Spread the parameters of networks over the processes of `mesh`, which gather a block's for as long as it runs.

    Every process has to make the same calls in the same order from here on.
    """
    for module in (*blocks, *networks):
        fully_shard(module, mesh=mesh)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device; its buffers are real."""
    memo: dict[int, Any] = {
        id(own): nn.Parameter(torch.empty_like(own, device="meta"), own.requires_grad) for own in module.parameters()
    }
    return copy.deepcopy(module, memo)


@torch.no_grad()
def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give the parameters of a sharded module memory, where they have none, and the values of as sharded ones."""

    def made(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=next(iter(values.values())).device) if tensor.is_meta else tensor

    module._apply(made)
    for name, parameter in module.named_parameters():
        parameter.copy_(values[name])


def average_gradients(module: nn.Module) -> None:
    """Average the gradients of a module that every process holds whole beside sharded ones."""

    size = Ranks.current().size

    def average(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total / size

    for parameter in module.parameters():
        parameter.register_hook(average)


# ---- tensors --------------------------------------------------------------------------------------------------


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its rows; of a sharded one every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every process, in the way, on the device and in the precision of `like`."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gather(state: Any, keep: bool) -> Any:
    """Nested dicts and lists with whole tensors, on the CPU, where processes `keep` them; empty tensors elsewhere.

    Tensors are gathered one by one, so that only the keeper's CPU has to hold them all.
    """
    if isinstance(state, Mapping):
        return {key: gather(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [gather(value, keep) for value in state]
    if not isinstance(state, Tensor):
        return state
    found = full_tensor(state.detach())
    return found.cpu() if keep else found.new_empty(0, device="cpu")


# ---- files ----------------------------------------------------------------------------------------------------


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write sharded and whole tensors as safetensors, each process its share; all processes have to.

    Raises:
        OSError: on every process, when one could not write.
    """
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}  # the writer takes no others
    try:
        dcp.save(kept, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:  # no Exception; it holds those of all processes
        raise OSError(str(next(iter(error.failures.values()))[0])) from error


def read_tensors(folder: Path, like: Like) -> dict[str, Tensor]:
    """What `write_tensors` wrote, from any number of processes, into new tensors that `like` makes: sharded ones are
    given their rows."""
    reader = HuggingFaceStorageReader(str(folder))
    stated: dict[str, Any] = reader.read_metadata().state_dict_metadata
    made = {name: like(name, entry.size, entry.properties.dtype) for name, entry in stated.items()}
    tensors = {name: tensor for name, tensor in made.items() if tensor is not None}
    if all(tensor.is_meta for tensor in tensors.values()):
        return tensors
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # nobody has to wait for another
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
