"""The metrics as functions, at the address that the docs give."""

from lightning_dfd.evaluation.metrics.functional import *  # noqa: F403
from lightning_dfd.evaluation.metrics.functional import __all__ as __all__
