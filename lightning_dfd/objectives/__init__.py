from lightning_dfd.objectives.dfd import (
    forced_samples,
    nearest_real,
    paired_gap,
    teacher_data,
    teacher_guidance,
)
from lightning_dfd.objectives.diversity import diversity_loss
from lightning_dfd.objectives.dmd import dmd_gradient, fake_score_loss, guide, is_unguided, surrogate_loss
from lightning_dfd.objectives.gan import approximate_r1, discriminator_loss, generator_loss

__all__ = [
    "approximate_r1",
    "discriminator_loss",
    "diversity_loss",
    "dmd_gradient",
    "fake_score_loss",
    "forced_samples",
    "generator_loss",
    "guide",
    "is_unguided",
    "nearest_real",
    "paired_gap",
    "surrogate_loss",
    "teacher_data",
    "teacher_guidance",
]
