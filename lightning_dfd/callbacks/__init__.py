from lightning_dfd.callbacks.evaluation import VideoEvaluation
from lightning_dfd.callbacks.health import RunHealth
from lightning_dfd.callbacks.samples import VideoSamples

__all__ = ["RunHealth", "VideoEvaluation", "VideoSamples"]
