"""The feature extractors, at the address that the docs give."""

from lightning_dfd.evaluation.features import *  # noqa: F403
from lightning_dfd.evaluation.features import __all__ as __all__
