"""What Lightning leaves to whoever steps several optimizers by hand: settings on resume, clipping, bad gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dfd.sharding import whole

Groups = list[dict[str, Any]]
MAX_SKIPPED = 10  # updates in a row of one optimizer that may be left out before the run ends


def settings_of(optimizers: Sequence[Optimizer]) -> list[Groups]:
    """The settings of each optimizer's groups, without their parameters."""
    return [
        [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def keep_settings(optimizers: Sequence[Optimizer], schedulers: Sequence[Any], recipe: Sequence[Groups]) -> None:
    """Give restored optimizers the recipe's settings back, their learning rates at the schedule's present height.

    Args:
        schedulers: one for each optimizer, or none.
        recipe: `settings_of` the optimizers when they were new.
    """
    for index, (optimizer, fresh_groups) in enumerate(zip(optimizers, recipe, strict=True)):
        for group, fresh in zip(optimizer.param_groups, fresh_groups, strict=True):
            scale = fresh.get("initial_lr", fresh["lr"]) / group.get("initial_lr", group["lr"])
            group.update(fresh, lr=group["lr"] * scale)
        if schedulers:
            schedulers[index].base_lrs = [group["initial_lr"] for group in fresh_groups]


def clip_parts(optimizer: Optimizer, parts: Mapping[str, Sequence[nn.Parameter]], largest: float) -> dict[str, Tensor]:
    """Clip the gradient of each part that `optimizer` holds by its own norm; returns the norms before.

    A part's share of the clipping must not depend on what else shares its optimizer.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {
        name: whole(torch.nn.utils.clip_grad_norm_(part, largest)) for name, part in parts.items() if held >= {*part}
    }


class BadGradients:
    """Leaves out updates whose gradient is not finite, and ends the run where nothing else comes."""

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}

    def drop(self, optimizer: Optimizer, norms: Mapping[str, Tensor], iteration: int) -> bool:
        """Take the gradients away from `optimizer` if a norm, by part, is not finite: then its step changes nothing.

        Averaged gradients are the same on all ranks, and so is the answer. It is the one thing of an iteration that
        waits for the device; a step that was not to be taken cannot be taken back.

        Raises:
            RuntimeError: it happened MAX_SKIPPED times in a row.
        """
        role, values = next(iter(norms)), torch.stack([*norms.values()])
        if bool(torch.isfinite(values).all()):
            self._in_a_row[role] = 0
            return False
        optimizer.zero_grad(set_to_none=True)
        self._in_a_row[role] = self._in_a_row.get(role, 0) + 1
        if self._in_a_row[role] >= MAX_SKIPPED:
            raise RuntimeError(
                f"iteration {iteration}: the last {MAX_SKIPPED} gradients of the {role} were not finite, their updates "
                "left out; lower its learning rate, use trainer.precision bf16-mixed, or take an earlier checkpoint"
            )
        return True


def as_list(value: Any) -> list[Any]:
    """Lightning answers with one object where there is only one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
