"""`lightning cache`: the clips of a folder, encoded once."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info

from lightning_dfd.data import VideoDataModule, list_clips, write_cache
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.files import require_writable
from lightning_dfd.objectives.terms import require
from lightning_dfd.training.module import DistillationModule


def check_caching(datamodule: VideoDataModule, encode_batch_size: int) -> None:
    """Raise ValueError, before anything is loaded, unless there is a folder to read and one to write."""
    require(encode_batch_size >= 1, "encode_batch_size", encode_batch_size, "at least 1")
    if datamodule.folder is None or datamodule.cache is None:
        raise ValueError("cache needs data.folder (videos to read) and data.cache (the folder to write)")
    require_writable(datamodule.cache, "data.cache")


def cache_clips(model: DistillationModule, datamodule: VideoDataModule, encode_batch_size: int, ranks: Ranks) -> None:
    """Encode this process's share, on the device of the model's backbone, and report what was done."""
    assert datamodule.folder is not None  # `check_caching` demands both
    assert datamodule.cache is not None
    listing = list_clips(datamodule.folder)
    report = write_cache(
        model.backbone,
        listing.clips,
        datamodule.cache,
        datamodule.sizes,
        datamodule.fps,
        negative_prompts=[model.dmd.negative_prompt],
        batch_size=encode_batch_size,
        more_captions=[""] if datamodule.caption_dropout else [],
        ranks=ranks,
    )
    rank_zero_info(f"{datamodule.cache}: {report.written} clips written, {report.kept} already existed")
    for problem in (*listing.problems, *report.problems):
        rank_zero_info(f"left out {problem}")
