"""Turn a slow diffusers video pipeline into a few-step one without losing diversity or colour."""

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import VideoDataModule
from lightning_dfd.module import DistillationModule
from lightning_dfd.strategies import FSDP2Strategy
from lightning_dfd.trainer import DistillationTrainer

__version__ = "0.1.0"
__all__ = ["Backbone", "DistillationModule", "DistillationTrainer", "FSDP2Strategy", "VideoDataModule", "__version__"]
