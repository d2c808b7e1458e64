"""The settings of a recipe below `model:`, at the address that the docs give."""

from lightning_dfd.training.settings import *  # noqa: F403
from lightning_dfd.training.settings import __all__ as __all__
