from lightning_dfd.data.cache import CacheError, CacheReport, LatentCache, write_cache
from lightning_dfd.data.datamodule import VideoDataModule
from lightning_dfd.data.dataset import (
    Clip,
    Listing,
    OrderedSamples,
    Problem,
    Sample,
    SeededStream,
    collate,
    first_problems,
    list_clips,
)
from lightning_dfd.data.files import SampleError
from lightning_dfd.data.video import VideoError, check_video, read_video, write_video

__all__ = [
    "CacheError",
    "CacheReport",
    "Clip",
    "LatentCache",
    "Listing",
    "OrderedSamples",
    "Problem",
    "Sample",
    "SampleError",
    "SeededStream",
    "VideoDataModule",
    "VideoError",
    "check_video",
    "collate",
    "first_problems",
    "list_clips",
    "read_video",
    "write_cache",
    "write_video",
]
