"""Which process this is, who shares its data and who shares its sequences.

Noise, clips, evaluation, caching and logs ask `Ranks` and nothing else. Processes that share a sequence work on parts
of the same clips, so they are one data rank: they draw the same noise and are given the same clips. Today `sequence` is
always 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

Item = TypeVar("Item")


class Ranked(Protocol):
    """A Trainer."""

    @property
    def global_rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


@dataclass(frozen=True)
class Ranks:
    """One of `size` processes.

    Args:
        rank: of this process among all, from 0.
        size: of all.
        sequence: how many neighbours share a sequence; divides `size`.

    >>> ranks = Ranks(rank=3, size=4, sequence=2)
    >>> ranks.data_rank, ranks.data_size, ranks.sequence_rank
    (1, 2, 1)
    >>> ranks.share("abcde")
    'bd'
    """

    rank: int = 0
    size: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and self.sequence >= 1 and self.size % self.sequence == 0):
            raise ValueError(f"{self} cannot be; rank is below size, and sequence divides size")

    @staticmethod
    def of(trainer: Ranked | None) -> Ranks:
        """Of a trainer's processes; of one alone without a trainer."""
        return Ranks() if trainer is None else Ranks(trainer.global_rank, trainer.world_size)

    @staticmethod
    def current() -> Ranks:
        """Of the running processes, where no trainer is at hand; of one alone without a process group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return Ranks()
        return Ranks(distributed.get_rank(), distributed.get_world_size())

    @property
    def data_rank(self) -> int:
        """Of those that are given the same clips."""
        return self.rank // self.sequence

    @property
    def data_size(self) -> int:
        """How many are given clips of their own."""
        return self.size // self.sequence

    @property
    def sequence_rank(self) -> int:
        """Within those that share a sequence."""
        return self.rank % self.sequence

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and logs for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of what is split by data: every `data_size`-th item."""
        return items[self.data_rank :: self.data_size]

    def gather(self, value: Item) -> list[Item]:
        """The values of all processes, by rank; all have to call it."""
        found = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(found, value)
        return found

    def broadcast(self, value: Item) -> Item:
        """The value of the first process; all have to call it."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values)
        return values[0]

    def largest(self, number: int, device: torch.device) -> int:
        """The largest of all processes' numbers; all have to call it."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)


def is_first_process() -> bool:
    """Whether this process writes for all, before and after there is a process group too."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0  # which Lightning sets as soon as it is known
