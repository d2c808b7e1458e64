"""The data of a run: captioned videos from a folder, or their latents from a cache.

Axis legend: B batch, C = 3 colour channels, F frames, H height, W width.
"""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_dfd.data.cache.format import INDEX
from lightning_dfd.data.cache.read import LatentCache, read_latents
from lightning_dfd.data.listing import Clip, Problem, first_problems, list_clips
from lightning_dfd.data.loading import (
    StreamLoader,
    Subset,
    check_numbers,
    check_share,
    check_source,
    held_out,
    ignore_ctrl_c,
)
from lightning_dfd.data.stream import ClipVideos, OrderedSamples, SeededStream, collate
from lightning_dfd.data.video import Facts, VideoError, glance, look, middle_rate, note_guessed_colours, read_video
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.files import SampleError, expanded, write_text
from lightning_dfd.types import Conditioning, VideoSize

UNKNOWN_RATE = 8.0  # frames per second


class VideoDataModule(LightningDataModule):
    """Captioned videos for training and for validation.

    Give `folder` (videos, decoded while training), `cache` (latents and embeddings, written from a folder by
    `lightning cache`), or both; with a cache, training reads nothing else. Clips of the folder that are new, changed or
    gone since the cache was written are then warned of. In both, `~` and environment variables are replaced.

    The training data are an endless stream in which batch k depends on the seed and k alone, so that a resumed
    run goes on where it stopped, with any number of workers.

    Args:
        folder: videos with metadata.jsonl, metadata.csv or a .txt caption beside each.
        cache: a folder of latents written by `lightning cache`; None decodes and encodes while training.
        frames: frames of a clip.
        height: pixels; videos are scaled to cover height x width and cropped at the centre.
        width: pixels.
        buckets: sizes to train at, as [frames, height, width] each; a clip gets the one that suits its own shape and
            length best, a batch is of one size. null to train at frames x height x width, which samples always have.
        fps: frames per second at which videos are read; None takes consecutive frames as stored.
        batch_size: clips in a batch of one device.
        num_workers: processes that decode beside the training; 0 decodes in the training process.
        val_share: share of the clips held out for validation and test, between 0 and 1; if above 0, at least
            one. Which ones is decided by their names alone, so adding clips moves none across.
        caption_dropout: share of the training clips whose caption is replaced by the empty one.
        seed: of the order of the training clips, of the draws among several captions, and of the dropout.

    Attributes:
        size: frames, height and width.
        sizes: those of the buckets, or `size` alone.
        clips: the training clips, after `setup`. With a cache their paths are those of the latents.
        held_out: the clips of validation and test, after `setup`.

    Raises:
        ValueError: neither folder nor cache is given, or a number is out of range.
    """

    def __init__(
        self,
        folder: str | None = None,
        cache: str | None = None,
        frames: int = 49,
        height: int = 480,
        width: int = 720,
        buckets: list[list[int]] | None = None,
        fps: float | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        val_share: float = 0.0,
        caption_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_source(folder, cache)
        check_numbers(frames, height, width, fps, batch_size, num_workers, seed)
        if any(len(bucket) != 3 or min(bucket) < 1 for bucket in buckets or ()) or buckets == []:
            raise ValueError(f"data.buckets is {buckets}; give sizes as [frames, height, width], or null for none")
        check_share("data.caption_dropout", caption_dropout)
        check_share("data.val_share", val_share)
        self.folder = None if folder is None else expanded(folder, "data.folder")
        self.cache = None if cache is None else expanded(cache, "data.cache")
        self.size = VideoSize(frames, height, width)
        self.sizes = tuple(VideoSize(*bucket) for bucket in buckets) if buckets else (self.size,)
        self.fps = fps
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.val_share = val_share
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.clips: list[Clip] = []
        self.held_out: list[Clip] = []
        self._source: ClipVideos | LatentCache | None = None
        self._facts: list[Facts] = []  # of every clip that was looked at
        self._buckets: list[int] = []  # of every clip, the number of its size
        self._train: list[int] = []
        self._val: list[int] = []

    @cached_property
    def latent_cache(self) -> LatentCache | None:
        """The cache, opened on first use; None if there is none in the recipe."""
        return None if self.cache is None else LatentCache.open(self.cache)

    def require_teacher(self, identity: Mapping[str, str]) -> None:
        """Raise ValueError if the cache is of another teacher, size or frame rate. Without one, nothing."""
        if self.latent_cache is not None:
            self.latent_cache.require(identity, self.sizes, self.fps)

    def negative_conditioning(self, prompt: str) -> Conditioning | None:
        """The cached conditioning of a prompt, batch 1; None without a cache.

        Raises:
            ValueError: the cache does not hold it.
        """
        return None if self.latent_cache is None else self.latent_cache.negative_conditioning(prompt)

    def same_caption_latents(self, prompt: str, k: int, generator: torch.Generator) -> list[Tensor]:
        """The latents [...], float32, of up to `k` different training clips with this caption, drawn by `generator`
        (on the CPU); of all if there are fewer.

        A clip whose file is missing or damaged is left out, with a warning.

        Raises:
            ValueError: there is no cache.
        """
        if self.latent_cache is None:
            raise ValueError("there is no cache to take latents from; run `lightning cache` and set data.cache")
        paths = self._paths_by_caption.get(prompt, [])
        found = []
        for index in torch.randperm(len(paths), generator=generator)[:k].tolist():
            try:
                found.append(read_latents(paths[index], f"latents of a clip of {prompt!r}"))
            except SampleError as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
        return found

    @cached_property
    def _paths_by_caption(self) -> dict[str, list[Path]]:
        """The training clips, after `setup`."""
        paths: dict[str, list[Path]] = {}
        for clip in self.clips:
            for caption in clip.captions:
                paths.setdefault(caption, []).append(clip.path)
        return paths

    def clip_of(self, prompt: str) -> Clip | None:
        """The first clip with this caption, after `setup`: of those held out, else of the training clips."""
        return next((clip for clip in (*self.held_out, *self.clips) if clip.caption == prompt), None)

    @property
    def summary(self) -> str:
        """The training clips in a few words, for a model card."""
        return f"{len(self.clips)} clips of {Path(self.folder or self.cache or '').name}"

    @cached_property
    def playing_rate(self) -> float:
        """Frames per second at which samples are to be played, which is the rate of what was trained on: `fps`; without
        it the middle one of the clips' own (of up to 64 that are looked at), or of those that the cache was made from;
        8 where none of these is known."""
        if self.fps is not None:
            return self.fps
        if self._facts:
            return middle_rate(facts.rate for facts in self._facts) or UNKNOWN_RATE
        if self.cache is not None and (Path(self.cache) / INDEX).is_file():
            rate = LatentCache.open(self.cache).rate
            if rate is not None:
                return rate
        if self.folder is None or not Path(self.folder).is_dir():
            return UNKNOWN_RATE
        try:
            clips = list_clips(self.folder).clips[:64]
        except ValueError:  # it holds no clips
            return UNKNOWN_RATE
        return middle_rate(glance(clip.source).rate for clip in clips) or UNKNOWN_RATE

    def setup(self, stage: str | None = None) -> None:
        """Find the clips, check the videos (of a cache, only whether they are still those it was made from), and hold
        out the share for validation.

        Raises:
            FileNotFoundError: the folder or the cache is not there.
            ValueError: no clip can be used, or none is left to train on.
        """
        if self._source is not None:
            return
        source: ClipVideos | LatentCache
        if self.latent_cache is not None:
            source = cache = self.latent_cache
            if stage in (None, "fit"):
                self._warn_of_other_clips(cache)
            paths = [cache.latents_path(index) for index in range(len(cache))]
            clips = [
                Clip(entry.name, path, entry.caption, entry.others)
                for entry, path in zip(cache.entries, paths, strict=True)
            ]
            self._buckets = [entry.bucket for entry in cache.entries]
            if self.caption_dropout and not cache.holds(""):
                raise ValueError(
                    f"data.caption_dropout is {self.caption_dropout}, and {cache.folder} does not hold the empty "
                    "caption; run `lightning cache` once more, which adds it"
                )
        else:
            usable = self._usable_clips()
            clips = list(usable)
            self._buckets = [self.sizes.index(size) for size in usable.values()]
            source = ClipVideos(tuple(clips), tuple(usable.values()), self.fps)
        held = set(held_out([clip.name for clip in clips], self.val_share))
        if len(held) == len(clips):
            raise ValueError(
                f"data.val_share={self.val_share} holds out all {len(clips)} clips, none is left to train on; "
                "lower it, or add clips"
            )
        ordered = sorted(range(len(clips)), key=self._buckets.__getitem__)  # stable: by name within a bucket
        self._val = [index for index in ordered if index in held]
        self._train = [index for index in ordered if index not in held]
        self.clips = [clips[index] for index in self._train]
        self.held_out = [clips[index] for index in self._val]
        self._source = source

    def require_held_out(self) -> None:
        """Raise ValueError where no clips are held out."""
        if self.val_share == 0:
            raise ValueError(
                "data.val_share is 0, so no clips are held out and there is nothing to measure; set it (0.02, say), "
                "in fit too, as clips that were trained on tell nothing"
            )

    def real_clips(self, count: int) -> list[Clip]:
        """Up to `count` clips to compare samples with, evenly spread: held-out ones if there are any, else all.

        Their paths are of the videos where `folder` is there, else of the cache's latents.
        """
        clips = self.held_out or self.clips
        if self.latent_cache is not None and self.folder is not None and Path(self.folder).is_dir():
            videos = {clip.name: clip for clip in list_clips(self.folder).clips}
            clips = [videos[clip.name] for clip in clips if clip.name in videos]
        elif self.latent_cache is not None and self.size in self.sizes:  # cached videos of other sizes do not compare
            entries = self.latent_cache.entries
            fitting = {entry.name for entry in entries if self.sizes[entry.bucket] == self.size}
            clips = [clip for clip in clips if clip.name in fitting]
        count = min(count, len(clips))
        return [clips[index * len(clips) // count] for index in range(count)]

    def real_video(self, clip: Clip, decode: Callable[[Tensor], Tensor]) -> Tensor:
        """One of `real_clips` as [1, C, F, H, W] in [-1, 1]; `decode` turns latents [1, ...] into that.

        Raises:
            VideoError: the video cannot be decoded.
        """
        if clip.path.suffix == ".safetensors":
            return decode(read_latents(clip.path)[None])
        return read_video(clip.source, self.size, self.fps)[None].float() / 127.5 - 1.0

    def train_dataloader(self) -> DataLoader[Any]:
        """Endless batches; with a trainer from `global_step * lightning_module.accumulate` on."""
        subset, counts = self._subset(self._train), self._counts(self._train)
        stream = SeededStream(
            subset.load, len(self._train), self.seed, self.batch_size, self._consumed(), self._ranks, counts
        )
        return StreamLoader(
            stream, self._consumed, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=collate,
            worker_init_fn=ignore_ctrl_c,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The held-out clips once, in order; an empty list if none are held out."""
        if not self._val:
            return []
        samples = OrderedSamples(self._subset(self._val).load, len(self._val), self._counts(self._val))
        return DataLoader(
            samples,
            batch_size=self.batch_size if len(self.sizes) == 1 else 1,  # else sizes would meet in a batch
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate,
            worker_init_fn=ignore_ctrl_c,
        )

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """As `val_dataloader`."""
        return self.val_dataloader()

    def _subset(self, indices: Sequence[int]) -> Subset:
        if self._source is None:
            raise RuntimeError("the data are not set up; call setup() first (a Trainer does)")
        return Subset(self._source, tuple(indices), self.caption_dropout, self.seed)

    def _counts(self, indices: Sequence[int]) -> list[int]:
        """How many of the clips are of each size; the clips are ordered by size."""
        return [sum(self._buckets[index] == bucket for index in indices) for bucket in range(len(self.sizes))]

    def _consumed(self) -> int:
        """Batches that this rank has trained on, before a resume included."""
        if self.trainer is None:
            return 0
        return self.trainer.global_step * int(getattr(self.trainer.lightning_module, "accumulate", 1))

    def _warn_of_other_clips(self, cache: LatentCache) -> None:
        """Where the folder is there, say how its clips differ from the cache's."""
        if self.folder is None or not Path(self.folder).is_dir() or not self._ranks.is_first:
            return
        try:
            clips = list_clips(self.folder).clips
        except ValueError:  # it holds no clips
            clips = ()
        found = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in cache.differences(clips).items()
        ]
        if found:
            folder, kept = shlex.quote(self.folder), shlex.quote(str(self.cache))
            warnings.warn(
                f"data.folder {self.folder} differs from what data.cache {self.cache} was made from, and training "
                f"reads the cache: {', '.join(found)}. To cache the folder as it is now, run: lightning cache -c "
                f"RECIPE --data.folder {folder} --data.cache {kept}",
                stacklevel=2,
            )

    def _usable_clips(self) -> dict[Clip, VideoSize]:
        """The folder's clips that can be read, and the size of each; the others are warned of and written to
        problems.json."""
        assert self.folder is not None  # __init__ demands a folder or a cache
        listing = list_clips(self.folder)
        problems = list(listing.problems)
        usable = {}
        for clip in tqdm(listing.clips, desc="checking videos", disable=not self._ranks.is_first):
            try:
                facts = look(clip.source, self.sizes, self.fps)
            except VideoError as error:
                problems.append(Problem.of(clip, error))
            else:
                self._facts.append(facts)
                usable[clip] = facts.size
        note_guessed_colours(self.folder, sum(facts.guessed_colours for facts in self._facts))
        self._report(problems)
        if not usable:
            raise ValueError(f"no usable video in {self.folder}{first_problems(problems)}")
        return usable

    def _report(self, problems: Sequence[Problem]) -> None:
        # asked of every rank, problems or not: log_dir is a collective operation
        log_dir = None if self.trainer is None else self.trainer.log_dir
        if not problems:
            return
        where = ""
        if log_dir is not None:
            path = Path(log_dir) / "problems.json"
            where = f" (all in {path})"
            if self._ranks.is_first:
                try:
                    write_text(path, json.dumps([asdict(one) for one in problems], indent=1))
                except OSError as error:  # a full disk: the first few are in the warning
                    where = f" ({path} could not be written: {error.strerror})"
        rank_zero_warn(f"{self.folder}{where}{first_problems(problems)}")

    @property
    def _ranks(self) -> Ranks:
        return Ranks.of(self.trainer)
