from lightning_dfd.features.base import FeatureExtractor, FeatureKind
from lightning_dfd.features.reference import cached_statistics, data_fingerprint, read_statistics, write_statistics
from lightning_dfd.features.registry import EXTRACTORS, load_extractor

__all__ = [
    "EXTRACTORS",
    "FeatureExtractor",
    "FeatureKind",
    "cached_statistics",
    "data_fingerprint",
    "load_extractor",
    "read_statistics",
    "write_statistics",
]
