"""The parts of a module, built from a recipe: terms of the loss, roles, and the modules that terms train."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from lightning_dfd.backbones import Backbone
from lightning_dfd.networks.blocks import feature_shape
from lightning_dfd.networks.roles import FullRoles, LoraRoles, Roles
from lightning_dfd.objectives.terms import (
    GAN,
    DataForcing,
    DataForcingSettings,
    DistributionMatching,
    DiversitySettings,
    DMDSettings,
    FirstStep,
    GANSettings,
    Term,
)
from lightning_dfd.training.settings import StudentSettings


def loss_terms(
    dmd: DMDSettings,
    data_forcing: DataForcingSettings,
    gan: GANSettings,
    diversity: DiversitySettings,
    others: Sequence[Term],
    seed: int,
) -> tuple[Term, ...]:
    """The terms of a recipe, in the order in which they draw: ours, then those of the user."""
    return (
        DistributionMatching(dmd),
        DataForcing(data_forcing),
        *([GAN(gan, seed)] if gan.weight else []),
        *([FirstStep(diversity, dmd.guidance)] if diversity.weight else []),
        *others,
    )


def build_roles(transformer: nn.Module, student: StudentSettings, backbone: Backbone, seed: int, meta: bool) -> Roles:
    """Roles on the teacher's network; `meta` copies get values when they are sharded."""
    options = {"ema": student.ema_decay is not None, "checkpointing": student.gradient_checkpointing}
    if student.mode == "full":
        return FullRoles(transformer, **options, meta=meta)
    targets = student.targets or backbone.targets_in(transformer)
    return LoraRoles(transformer, targets, student.rank, student.alpha or student.rank, seed=seed, **options)


def build_term_modules(
    terms: Sequence[Term], transformer: nn.Module
) -> tuple[dict[str, nn.Module], dict[str, float | None]]:
    """What terms train on the teacher's network, and the learning rates; None for the fake score's.

    Raises:
        ValueError: two terms give a module the same name, or one gives a name that is none.
    """
    modules: dict[str, nn.Module] = {}
    rates: dict[str, float | None] = {}
    for term in terms:
        for name, module in term.build(partial(feature_shape, transformer)).items():
            if not name.isidentifier():
                raise ValueError(f"{type(term).__qualname__} names a module {name!r}; take letters, digits and _")
            if name in modules:
                raise ValueError(f"two terms train a module named {name!r}; give them different names")
            modules[name], rates[name] = module, term.learning_rate()
    return modules, rates
