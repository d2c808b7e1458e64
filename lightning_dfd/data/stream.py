"""Samples, batches of them, and the endless seeded stream that training draws from.

Axis legend: B batch, C = 3 colour channels, F frames, H height, W width.
"""

from __future__ import annotations

import bisect
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lightning_dfd.data.listing import Clip
from lightning_dfd.data.video import read_video
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.files import SampleError
from lightning_dfd.types import Batch, Conditioning, VideoSize


@dataclass(frozen=True)
class Sample:
    """One captioned video: `video` uint8 [C, F, H, W], or from a cache `latents` [...] and `cond` of batch 1."""

    prompt: str
    video: Tensor | None = None
    latents: Tensor | None = None
    cond: Conditioning | None = None


def collate(samples: Sequence[Sample]) -> Batch:
    """B samples of one kind as a batch: pixels float [B, C, F, H, W] in [-1, 1], or latents float32 [B, ...]."""
    prompts = tuple(sample.prompt for sample in samples)
    videos = [sample.video for sample in samples if sample.video is not None]
    if videos:
        return Batch(prompts, video=torch.stack(videos).float() / 127.5 - 1.0)
    latents = [sample.latents for sample in samples if sample.latents is not None]
    conds = [sample.cond for sample in samples if sample.cond is not None]
    return Batch(prompts, latents=torch.stack(latents).float(), cond=Conditioning.cat(conds))


@dataclass(frozen=True)
class ClipVideos:
    """Clips as samples of pixels, each of its own size."""

    clips: tuple[Clip, ...]
    sizes: tuple[VideoSize, ...]
    fps: float | None

    def __len__(self) -> int:
        return len(self.clips)

    def captions(self, index: int) -> tuple[str, ...]:
        """All that a clip has."""
        return self.clips[index].captions

    def load(self, index: int, caption: str | None = None) -> Sample:
        """Sample number `index`, with another caption than its first if one is given. Raises VideoError."""
        clip = self.clips[index]
        video = read_video(clip.source, self.sizes[index], self.fps)
        return Sample(clip.caption if caption is None else caption, video=video)


class Load(Protocol):
    """From an index to its sample. `k` is the place in the training stream, None outside of it. May raise
    SampleError."""

    def __call__(self, index: int, k: int | None = None) -> Sample: ...


def load_or_next(load: Load, order: Sequence[int], position: int, bad: set[int], k: int | None = None) -> Sample:
    """The sample at `position` of `order`, or the next one (round the end) that can be loaded.

    Indices that fail are warned of and remembered in `bad`, so that a process tries each only once.

    Raises:
        ValueError: none can be loaded.
    """
    for offset in range(len(order)):
        index = order[(position + offset) % len(order)]
        if index in bad:
            continue
        try:
            return load(index, k)
        except SampleError as error:
            bad.add(index)
            warnings.warn(f"left out: {error}", stacklevel=2)
    raise ValueError(f"nothing left to load: all {len(order)} clips failed, each with a warning above")


class SeededStream(IterableDataset[Sample]):
    """An endless stream whose item k depends on the seed and k alone.

    The clips lie in parts (buckets of one size each), one after the other; a batch of all ranks together is of one
    part. Each part goes through its clips in permutations drawn from the seed; an epoch holds as many batches of
    every part as it takes to show its clips once, in an order drawn from (seed, epoch). With one part, item k is
    number k % count of permutation k // count.

    Batch b of a rank holds the items from (b * data_size + data_rank) * batch_size on, so that two ranks see together
    what one rank with twice the batch sees. A DataLoader with any number of workers yields the batches that it yields
    without workers, if its batch_size is the stream's: worker w of W makes the batches w, w + W, ... A clip that
    cannot be loaded is left out and the next of its permutation takes its place.

    Args:
        load: from an index below `count`, and k, to a sample; may raise SampleError.
        count: how many different samples there are.
        seed: of the permutations.
        batch_size: items in a batch of one rank.
        start: batches of this rank that a run has consumed before.
        ranks: this process among those that train together. Those that share a sequence get the same clips.
        parts: how many of the samples belong to each part; none for a single part. They add up to `count`.

    Raises:
        ValueError: `count` or `batch_size` is below 1; when iterated, all loads of a part in a row failed.
    """

    def __init__(
        self,
        load: Load,
        count: int,
        seed: int,
        batch_size: int,
        start: int = 0,
        ranks: Ranks = Ranks(),  # noqa: B008 (frozen)
        parts: Sequence[int] = (),
    ) -> None:
        if count < 1 or batch_size < 1:
            raise ValueError(f"need at least one clip and one item a batch, got {count} and {batch_size}")
        self.load = load
        self.count = count
        self.seed = seed
        self.batch_size = batch_size
        self.start = start
        self.ranks = ranks
        self.parts = tuple(part for part in parts if part) or (count,)
        if sum(self.parts) != count:
            raise ValueError(f"the parts hold {sum(self.parts)} clips, not {count}")
        self._begins = (0, *accumulate(self.parts))
        self._bad: set[int] = set()
        self._orders: dict[int, tuple[int, list[int]]] = {}  # of each part, the permutation in use and its number
        self._plan: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batch = self.start + first
        while True:
            begin = (batch * self.ranks.data_size + self.ranks.data_rank) * self.batch_size
            for k in range(begin, begin + self.batch_size):
                yield self.item(k)
            batch += step

    def item(self, k: int) -> Sample:
        """Item k of the stream that all ranks share."""
        whole = self.batch_size * self.ranks.data_size
        rounds = [-(-count // whole) for count in self.parts]  # batches of each part in an epoch
        epoch, place = divmod(k // whole, sum(rounds))
        plan = self._planned(epoch, rounds)
        part = plan[place]
        number = epoch * rounds[part] + plan[:place].count(part)  # batches of this part that come before
        turn, position = divmod(number * whole + k % whole, self.parts[part])
        if self._orders.get(part, (-1,))[0] != turn:
            self._orders[part] = turn, self.order(turn, part)
        return load_or_next(self.load, self._orders[part][1], position, self._bad, k)

    def order(self, turn: int, part: int = 0) -> list[int]:
        """Permutation number `turn` of a part's indices."""
        drawn = torch.randperm(self.parts[part], generator=self._generator(turn, *([part] if part else [])))
        return (drawn + self._begins[part]).tolist()

    def _planned(self, epoch: int, rounds: Sequence[int]) -> list[int]:
        """The part of every batch of an epoch."""
        if len(rounds) == 1:
            return [0] * rounds[0]
        if self._plan[0] != epoch:
            parts = [part for part, count in enumerate(rounds) for _ in range(count)]
            drawn = torch.randperm(len(parts), generator=self._generator(epoch, "parts"))
            self._plan = epoch, [parts[index] for index in drawn.tolist()]
        return self._plan[1]

    def _generator(self, *of: int | str) -> torch.Generator:
        digest = hashlib.sha256("/".join(str(one) for one in (self.seed, *of)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class OrderedSamples(Dataset[Sample]):
    """A finite number of samples in order; one that cannot be loaded is replaced by the next of its part that can."""

    def __init__(self, load: Load, count: int, parts: Sequence[int] = ()) -> None:
        self.load = load
        self.count = count
        self._ends = list(accumulate(parts)) or [count]
        self._bad: set[int] = set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        begin = self._ends[part - 1] if part else 0
        return load_or_next(self.load, range(begin, self._ends[part]), index - begin, self._bad)
