from lightning_dfd.evaluation.features.base import FeatureExtractor, FeatureKind
from lightning_dfd.evaluation.features.reference import (
    cached_statistics,
    data_fingerprint,
    read_statistics,
    write_statistics,
)
from lightning_dfd.evaluation.features.registry import EXTRACTORS, load_extractor

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
