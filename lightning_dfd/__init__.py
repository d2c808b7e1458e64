"""Turn a slow diffusers video pipeline into a few-step one without losing diversity or colour."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dfd.backbones import Backbone
    from lightning_dfd.cli.trainer import DistillationTrainer
    from lightning_dfd.data import VideoDataModule
    from lightning_dfd.distributed.strategy import FSDP2Strategy
    from lightning_dfd.training.module import DistillationModule

__version__ = "0.1.0"
__all__ = ["Backbone", "DistillationModule", "DistillationTrainer", "FSDP2Strategy", "VideoDataModule", "__version__"]

_HOMES = {
    "Backbone": "backbones",
    "VideoDataModule": "data",
    "DistillationModule": "training.module",
    "FSDP2Strategy": "distributed.strategy",
    "DistillationTrainer": "cli.trainer",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for, and torch with it, when it is asked for: so that Ctrl-C while a command starts up meets
    `__main__`, which knows what to do with it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
