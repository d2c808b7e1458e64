"""What is drawn by chance in one training batch.

Axis legend: B batch; latents are [B, ...]; times are [B] in [0, 1].
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.diffusion.noise import shift_time


@dataclass(frozen=True)
class Draws:
    """The generators of one batch: a function of seed, iteration, batch within it and rank alone, so that a resumed
    run draws what the uninterrupted one would.

    Args:
        own: of this rank, on the device of its latents.
        shared: seeded alike on all ranks and for all batches of an iteration, on the CPU.
        pairs: of this rank, on the CPU: which real clips are looked at.
    """

    own: torch.Generator
    shared: torch.Generator
    pairs: torch.Generator

    @staticmethod
    def of(seed: int, step: int, micro: int, rank: int, device: torch.device) -> Draws:
        """The generators of batch number `micro` of iteration number `step` on one rank."""
        return Draws(
            torch.Generator(device).manual_seed(hash_seed(seed, "draws", step, micro, rank)),
            torch.Generator().manual_seed(hash_seed(seed, "shared", step)),
            torch.Generator().manual_seed(hash_seed(seed, "pairs", step, micro, rank)),
        )

    def noise_like(self, latents: Tensor) -> Tensor:
        """Standard normal noise of the shape of latents [B, ...], float32."""
        return torch.randn(latents.shape, generator=self.own, device=self.own.device)

    def times(self, count: int, low: float, high: float, shift: float) -> Tensor:
        """Uniform times, shifted (2403.03206, eq. 23), then fitted between `low` and `high`; [count], float64."""
        uniform = torch.rand(count, generator=self.own, device=self.own.device, dtype=torch.float64)
        return low + (high - low) * shift_time(uniform, shift)

    def indices(self, count: int, end: int) -> Tensor:
        """`count` whole numbers from 0 to below `end`, [count], int64."""
        return torch.randint(end, (count,), generator=self.own, device=self.own.device)

    def index(self, first: int, end: int) -> int:
        """A whole number from `first` to below `end`, the same on all ranks."""
        return int(torch.randint(first, end, (), generator=self.shared))


def hash_seed(*parts: Any) -> int:
    """A seed in [0, 2^63) from any printable parts: neighbouring iterations get unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
