from lightning_dfd.data.cache import CacheError, CacheReport, LatentCache, Process, write_cache
from lightning_dfd.data.datamodule import VideoDataModule
from lightning_dfd.data.images import read_first_frame
from lightning_dfd.data.listing import Clip, Listing, Problem, first_problems, list_clips
from lightning_dfd.data.stream import OrderedSamples, Sample, SeededStream, collate
from lightning_dfd.data.video import VideoError, check_video, read_video, write_video
from lightning_dfd.files import Part, SampleError

__all__ = [
    "CacheError",
    "CacheReport",
    "Clip",
    "LatentCache",
    "Listing",
    "OrderedSamples",
    "Part",
    "Problem",
    "Process",
    "Sample",
    "SampleError",
    "SeededStream",
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
