"""Where fake tensors on a CPU need help to behave as real ones on an accelerator do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# What CUDA's autocast computes in float32 and a CPU's does not, of what networks keep for the backward pass
# (torch's ATen/autocast_mode.h, AT_FORALL_FP32).
IN_FLOAT32 = {F.layer_norm, F.rms_norm, F.group_norm, F.softmax, torch.softmax, torch.rsqrt, torch.pow, torch.exp}


class Rules(TorchFunctionMode):
    """Within it, fake tensors follow an accelerator's mixed precision, and masks leave nothing out.

    Args:
        device: `cuda`, or `cpu` for a CPU's own mixed precision.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.in_float32 = IN_FLOAT32 if device == "cuda" else set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.in_float32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, _as_float32, (args, kwargs))
        if func is torch.nonzero and args[0].ndim == 1:  # depends on values; of a mask, at most everything
            return torch.arange(len(args[0])).view(-1, 1)
        return func(*args, **kwargs)


def _as_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
