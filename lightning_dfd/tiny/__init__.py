"""The tiny pipelines, at the address that the docs give; `python -m lightning_dfd.tiny` writes them."""

from lightning_dfd.testing.tiny import *  # noqa: F403
from lightning_dfd.testing.tiny import __all__ as __all__
