"""A backbone that learns a pipeline's calls by watching it."""

from lightning_dfd.backbones.captured.backbone import CapturedBackbone

__all__ = ["CapturedBackbone"]
