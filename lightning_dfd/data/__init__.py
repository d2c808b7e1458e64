from lightning_dfd.data.cache.format import CacheError
from lightning_dfd.data.cache.read import LatentCache
from lightning_dfd.data.cache.write import CacheReport, write_cache
from lightning_dfd.data.datamodule import VideoDataModule
from lightning_dfd.data.images import read_first_frame
from lightning_dfd.data.listing import Clip, Listing, Problem, first_problems, list_clips
from lightning_dfd.data.stream import OrderedSamples, Sample, SeededStream, collate
from lightning_dfd.data.video import VideoError, check_video, read_video
from lightning_dfd.data.writing import write_video
from lightning_dfd.files import SampleError, ShardMember

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
    "ShardMember",
    "VideoDataModule",
    "VideoError",
    "check_video",
    "collate",
    "first_problems",
    "list_clips",
    "read_first_frame",
    "read_video",
    "write_cache",
    "write_video",
]
