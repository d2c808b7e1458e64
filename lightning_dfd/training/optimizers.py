"""What Lightning leaves to whoever steps several optimizers by hand: settings and state on resume, clipping, bad
gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dfd.distributed.sharding import full_tensor

Groups = list[dict[str, Any]]
MISSING, DROPPED = object(), object()
MAX_SKIPPED = 10  # updates in a row of one optimizer that may be left out before the run ends


def settings_of(optimizer: Optimizer) -> Groups:
    """A copy of the settings of an optimizer's groups, without their parameters: an optimizer may change its own in
    place."""
    return [
        {key: deepcopy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]


def set_groups(optimizer: Optimizer, settings: Groups) -> None:
    """Give an optimizer's groups these settings and no others."""
    for group, new in zip(optimizer.param_groups, settings, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(new, params=parameters)


# ---- what a recipe sets, and what training makes of it ---------------------------------------------------------


def merged(before: Any, now: Any, kept: Any) -> Any:
    """What this recipe sets, with what training has changed: a three-way merge.

    Args:
        before: what the recipe of the checkpoint's run had set.
        now: what this run's recipe sets.
        kept: what the checkpoint holds. Where that is no longer `before`, training has changed it, and it stays.
    """
    sides = (before, now, kept)
    if type(before) is type(now) is type(kept) is dict:
        keys = dict.fromkeys([*now, *kept])
        content = {key: merged(*(side.get(key, MISSING) for side in sides)) for key in keys}
        return {key: value for key, value in content.items() if value is not MISSING}
    if all(isinstance(side, list) and len(side) == len(now) and dict in map(type, side) for side in sides):
        return [merged(*items) for items in zip(*sides, strict=True)]
    return now if same(before, kept) else kept


def merged_group(before: Mapping[str, Any], now: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """`merged` for a group of an optimizer. A rate that both the recipe and training have changed (by
    ReduceLROnPlateau, say) keeps its ratio to what the recipe sets."""
    group: dict[str, Any] = merged(dict(before), dict(now), dict(kept))
    old, new, rate = (side.get("lr") for side in (before, now, kept))
    if old and new is not None and rate is not None and not same(old, new) and not same(old, rate):
        group["lr"] = rate * new / old
    return group


def same(one: Any, other: Any) -> bool:
    """Whether two settings are equal, tensors and nan included."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other or (one != one and other != other))


def plain(value: Any) -> Any:
    """A copy of a setting as data that a checkpoint may hold; DROPPED for what only code can make, as a function.

    Of a mapping, entries that would be dropped are left out.
    """
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Counter):
        return Counter({key: plain(count) for key, count in value.items()})
    if isinstance(value, Mapping):
        content = {key: plain(item) for key, item in value.items()}
        return {key: item for key, item in content.items() if item is not DROPPED}
    if type(value) in (list, tuple, set):
        items = [plain(item) for item in value]
        return DROPPED if any(item is DROPPED for item in items) else type(value)(items)
    return value if value is None or isinstance(value, (torch.dtype, torch.device, torch.Size)) else DROPPED


# ---- the step --------------------------------------------------------------------------------------------------


def clip_parts(optimizer: Optimizer, parts: Mapping[str, Sequence[nn.Parameter]], largest: float) -> dict[str, Tensor]:
    """Clip the gradient of each part that `optimizer` holds by its own norm; returns the norms before.

    A part's share of the clipping must not depend on what else shares its optimizer.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    return {
        name: full_tensor(torch.nn.utils.clip_grad_norm_(part, largest))
        for name, part in parts.items()
        if held >= {*part}
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
