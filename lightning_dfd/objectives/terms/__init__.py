"""The terms of the loss: one object in one file each. docs/new_objective.md shows how to write another."""

from lightning_dfd.objectives.terms.base import (
    FeatureShape,
    Networks,
    ScoreTimeSettings,
    Step,
    StudentInput,
    TeacherView,
    Term,
    TermRecipe,
    check_terms,
    fake_loss,
    joined,
    require,
    student_loss,
)
from lightning_dfd.objectives.terms.data_forcing import DataForcing, DataForcingSettings
from lightning_dfd.objectives.terms.dmd import DistributionMatching, DMDSettings
from lightning_dfd.objectives.terms.dp_dmd import DiversitySettings, FirstStep
from lightning_dfd.objectives.terms.gan import GAN, Discriminator, GANSettings

__all__ = [
    "GAN",
    "DMDSettings",
    "DataForcing",
    "DataForcingSettings",
    "Discriminator",
    "DistributionMatching",
    "DiversitySettings",
    "FeatureShape",
    "FirstStep",
    "GANSettings",
    "Networks",
    "ScoreTimeSettings",
    "Step",
    "StudentInput",
    "TeacherView",
    "Term",
    "TermRecipe",
    "check_terms",
    "fake_loss",
    "joined",
    "require",
    "student_loss",
]
