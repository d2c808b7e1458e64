from lightning_dfd.objectives.dfd import draw_forcing, paired_gap, teacher_data
from lightning_dfd.objectives.dmd import dmd_gradient, fake_score_loss, guide, surrogate_loss

__all__ = [
    "dmd_gradient",
    "draw_forcing",
    "fake_score_loss",
    "guide",
    "paired_gap",
    "surrogate_loss",
    "teacher_data",
]
