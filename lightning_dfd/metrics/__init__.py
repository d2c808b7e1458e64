"""The metrics, at the address that the docs give."""

from lightning_dfd.evaluation.metrics import *  # noqa: F403
from lightning_dfd.evaluation.metrics import __all__ as __all__
