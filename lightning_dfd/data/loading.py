"""From clips to batches: the clips held out, the caption shown, and a loader that follows training."""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from lightning_dfd.data.cache.read import LatentCache
from lightning_dfd.data.stream import ClipVideos, Sample, SeededStream
from lightning_dfd.diffusion.draws import hash_seed
from lightning_dfd.types import Batch


@dataclass(frozen=True)
class Subset:
    """Some of the clips, numbered from 0. A class, as workers that are spawned cannot be given a closure."""

    source: ClipVideos | LatentCache
    indices: tuple[int, ...]
    caption_dropout: float
    seed: int

    def load(self, index: int, k: int | None = None) -> Sample:
        """In training (k is given) with a caption drawn by (seed, k) from all that the clip has, or the empty one;
        else with the first."""
        own = self.indices[index]
        if k is None:
            return self.source.load(own)
        if hash_seed(self.seed, "dropout", k) < self.caption_dropout * 2**63:
            return self.source.load(own, "")
        captions = self.source.captions(own)
        return self.source.load(own, captions[hash_seed(self.seed, "caption", k) % len(captions)])


def ignore_ctrl_c(worker: int) -> None:
    """In a worker: a terminal sends Ctrl-C to it too, and the iteration that is to be finished needs its clips."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StreamLoader(DataLoader[Any]):
    """A DataLoader whose stream goes on where training stands whenever it is iterated anew.

    A Trainer with limit_train_batches asks for a new iterator every epoch; a stream with a fixed start would
    give every epoch the same clips. For the same reason workers do not outlive an iterator: they would keep the
    start that they were made with.
    """

    def __init__(self, stream: SeededStream, consumed: Callable[[], int], **kwargs: Any) -> None:
        super().__init__(stream, **kwargs)
        self.stream = stream
        self.consumed = consumed

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.stream.start = self.consumed()
        return super().__iter__()


def held_out(names: Sequence[str], share: float) -> list[int]:
    """Indices of the names whose stable hash lies in the lowest `share`; at least the lowest one if share > 0."""
    if share <= 0 or not names:
        return []
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 for name in names]
    chosen = [index for index, value in enumerate(hashes) if value < share]
    return chosen or [min(range(len(names)), key=hashes.__getitem__)]


# ---- settings -------------------------------------------------------------------------------------------------


def check_source(folder: str | None, cache: str | None) -> None:
    """Raise ValueError unless there is something to read."""
    if folder is None and cache is None:
        raise ValueError("data.folder and data.cache are both empty; name a folder of videos, a cache, or both")
    if folder == "" or cache == "":
        raise ValueError(f"data.folder is {folder!r} and data.cache is {cache!r}; name a folder, or null for none")


def check_numbers(
    frames: int, height: int, width: int, fps: float | None, batch_size: int, num_workers: int, seed: int
) -> None:
    """Raise ValueError for a number that is out of range."""
    if fps is not None and math.isinf(fps):
        raise ValueError(f"data.fps is {fps}; it must be a number above 0, or null")
    if not 0 <= seed < 2**63:
        raise ValueError(f"data.seed is {seed}; it must be between 0 and 2^63 - 1")
    if min(frames, height, width, batch_size) < 1 or num_workers < 0 or (fps is not None and not fps > 0):
        raise ValueError(
            f"got frames {frames}, height {height}, width {width}, fps {fps}, batch_size {batch_size}, "
            f"num_workers {num_workers}; all must be above 0, num_workers may be 0"
        )


def check_share(key: str, share: float) -> None:
    """Raise ValueError unless it is a share of the clips."""
    if not 0 <= share < 1:
        raise ValueError(f"{key} must be at least 0 and below 1, got {share}")
