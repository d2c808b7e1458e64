"""Training on several processes with sharded weights: FSDP2, with this package's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.distributed.sharding import Like, gather, shard_like

PATIENCE = timedelta(minutes=30)


@runtime_checkable
class PartlySaved(Protocol):
    """A module of which checkpoints hold a part."""

    def owned_keys(self) -> set[str]: ...

    def state_dict(self) -> dict[str, Any]: ...


@runtime_checkable
class ShardFiles(Protocol):
    """A checkpoint plugin that knows sharded checkpoints too, as DistillationTrainer's does."""

    def save_shards(self, checkpoint: dict[str, Any], path: Path) -> None: ...

    def load_lazily(self, path: Path, like: Like) -> dict[str, Any]: ...


class FSDP2Strategy(ModelParallelStrategy):
    """Every process holds a share of all weights, teacher included, and of the optimizers' moments.

    `trainer.strategy: fsdp2`. Checkpoints are without the teacher; the first process writes a file as one process
    alone would, so that any strategy and any number of processes can go on with it.

    Args:
        save_distributed_checkpoint: every process writes its share to a folder instead: for what the CPU of one
            machine cannot hold. Any strategy and number of processes can go on with it as well.
        process_group_backend: of torch.distributed; null to choose by the device.
        timeout: for which a process waits for the others.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = PATIENCE,
    ) -> None:
        super().__init__(1, 1, save_distributed_checkpoint, process_group_backend, timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # ---- saving ---------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Of what is trained alone: a teacher that is dropped later would have been gathered for nothing."""
        module = self.lightning_module
        assert isinstance(module, PartlySaved)
        owned = module.owned_keys()
        return self._to_save({name: value for name, value in module.state_dict().items() if name in owned})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._to_save(ParallelStrategy.optimizer_state(self, optimizer))

    def _to_save(self, state: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = state if self._save_distributed_checkpoint else gather(state, Ranks.current().is_first)
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path, files = self.broadcast(filepath), self.checkpoint_io
        if not self._save_distributed_checkpoint:
            ParallelStrategy.save_checkpoint(self, checkpoint, path, storage_options)
        elif isinstance(files, ShardFiles):
            files.save_shards(checkpoint, Path(path))
        else:
            raise TypeError(
                f"{type(files).__name__} writes no shards; use DistillationTrainer without a checkpoint plugin, or set "
                "save_distributed_checkpoint: false"
            )

    # ---- loading, in the order in which other strategies do it: first what may refuse, then weights, then moments ----

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        path, files = self.broadcast(checkpoint_path), self.checkpoint_io
        if isinstance(files, ShardFiles):
            return files.load_lazily(Path(path), self._like)
        return files.load_checkpoint(path, weights_only=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        for name, value in checkpoint["state_dict"].items():
            own[name].copy_(shard_like(value, own[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state: dict[int, dict[str, Any]] = {}
            for index, values in saved["state"].items():
                own = _parameter(optimizer, index)
                state[index] = {
                    key: shard_like(value, own).clone() if _is_of(own, value) else value
                    for key, value in values.items()
                }
            optimizer.load_state_dict({**saved, "state": state})

    def _like(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """An empty tensor for one of a sharded checkpoint, spread as what it belongs to is spread here; None for
        moments where nothing is trained."""
        assert self.lightning_module is not None
        kind, _, place = name.partition("/")
        own: Tensor | None
        if kind == "state_dict":
            own = self.lightning_module.state_dict().get(place)
        elif not self.optimizers:
            return None
        else:
            number, index, _ = place.split("/", 2)
            own = _parameter(self.optimizers[int(number)], int(index))
        if own is None or own.shape != shape:
            return torch.empty(shape, dtype=dtype)
        return torch.empty_like(own, dtype=dtype, requires_grad=False)


def _parameter(optimizer: Optimizer, index: int) -> Tensor:
    """The parameter that an optimizer's state knows by a number."""
    found: Tensor = [parameter for group in optimizer.param_groups for parameter in group["params"]][index]
    return found


def _is_of(parameter: Tensor, value: Any) -> bool:
    """Whether a value of an optimizer's state has an entry for each of the parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="sharded weights, with this package's checkpoints")
