"""Where fake tensors on a CPU need help to behave as real ones on an accelerator do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# What CUDA's autocast computes in float32 and a CPU's does not, of what networks keep for the backward pass
# (torch's ATen/autocast_mode.h, AT_FORALL_FP32).
IN_FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, torch.softmax, torch.rsqrt, torch.pow, torch.exp}


class Rules(TorchFunctionMode):
    """Within it, fake tensors follow an accelerator's mixed precision, and masks leave nothing out.

    Fake tensors have no values. Where a network asks for those of a mask, the mask keeps everything and its inverse
    nothing: the most that it can be.

    Args:
        device: `cuda`, or `cpu` for a CPU's own mixed precision.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.in_float32 = IN_FLOAT32 if device == "cuda" else set()
        self._inverted: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.in_float32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _as_float32, (args, kwargs))
        if func is torch.all and len(args) == 1:
            return True
        if func is torch.nonzero and args[0].ndim == 1:
            return torch.arange(len(args[0])).view(-1, 1)
        if func is Tensor.__getitem__ and _is_mask(args[1]) and args[1].ndim == 1:
            return args[0][:0] if any(args[1] is one for one in self._inverted) else args[0][:]
        result = func(*args, **kwargs)
        if func is Tensor.__invert__ and _is_mask(result):
            self._inverted.add(result)
        return result


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
