"""Two networks that share the noise levels between them, as Wan 2.2's do, seen as one.

Axis legend: B batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dfd.backbones.base import Backbone


class StagedNetwork(nn.Module):
    """`transformer` for timesteps from `boundary` on, `transformer_2` below; called like either, clip by clip.

    Rows of a batch on both sides of the boundary are two calls. Which they are has to be known on the host: a wait
    for the device in every call.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def _keep_in_fp32_modules(self) -> Any:  # what `dtype_of` passes over, as in diffusers' own networks
        return getattr(self.transformer, "_keep_in_fp32_modules", None)

    @property
    def config(self) -> Any:
        return self.transformer.config

    def enable_gradient_checkpointing(self, *arguments: Any) -> None:
        for network in (self.transformer, self.transformer_2):
            network.enable_gradient_checkpointing(*arguments)  # type: ignore[operator]

    def disable_gradient_checkpointing(self) -> None:
        for network in (self.transformer, self.transformer_2):
            network.disable_gradient_checkpointing()  # type: ignore[operator]

    def forward(self, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        """`timestep` is [B]; of `arguments` the tensors are [B, ...]."""
        early = (timestep >= self.boundary).tolist()
        if len(set(early)) == 1:
            network = self.transformer if early[0] else self.transformer_2
            return (network(timestep=timestep, **arguments)[0],)
        outputs: list[Tensor] = []
        for network, stage in ((self.transformer, True), (self.transformer_2, False)):
            rows = [row for row, one in enumerate(early) if one == stage]
            own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in arguments.items()}
            outputs.append(network(timestep=timestep[rows], **own)[0])
        order = torch.tensor(early).argsort(descending=True, stable=True).argsort()
        return (torch.cat(outputs)[order.to(timestep.device)],)


class Staged(Backbone):
    """For pipelines with a `boundary_ratio`."""

    networks = ("transformer", "transformer_2")

    def assemble(self, *networks: nn.Module) -> nn.Module:
        boundary = self.configs.pipeline["boundary_ratio"] * self.schedule.num_train_timesteps
        transformer, transformer_2 = networks
        return StagedNetwork(transformer, transformer_2, boundary).eval().requires_grad_(False)
