"""What the metrics of this package share: float64 states that stay float64, and honest refusals.

Axis legend: B videos, F frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class VideoMetric(Metric):
    """A metric of which all states are float64 tensors, wherever the module around it is moved or cast to.

    torchmetrics guards against `module.half()` but not against `module.to(torch.bfloat16)`, after which sums over a
    few hundred videos no longer change.
    """

    is_differentiable = False
    full_state_update = False

    @property
    def dtype(self) -> torch.dtype:
        """Also the type of what a rank without videos hands to the others, who would abort on any other type."""
        return torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow `fn` to its device, not to its dtype."""

        def move(state: Tensor) -> Tensor:
            return state.to(fn(torch.empty(0, device=state.device)).device)

        return super()._apply(move, exclude_state)

    @contextmanager
    def sync_context(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """As in torchmetrics, but if `compute` refuses, this rank's states are put back as well."""
        try:
            with super().sync_context(*args, **kwargs):
                yield
        except BaseException:
            if self._is_synced:
                self.unsync()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """The same as `update`: these metrics have no value for a single batch."""
        self.update(*args, **kwargs)


class MeanOverVideos(VideoMetric):
    """The mean of one value per video; a subclass's `update` hands the values to `_add`."""

    total: Tensor
    n: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, values: Tensor) -> None:
        self.total = self.total + values.to(self.total).sum()
        self.n = self.n + len(values)

    def compute(self) -> Tensor:
        """A float64 scalar.

        Raises:
            ValueError: if no videos came.
        """
        if not self.n:
            raise ValueError(f"{type(self).__name__} has seen no videos; need at least 1. Call update(videos) first.")
        return self.total / self.n
