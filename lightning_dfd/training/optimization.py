"""The optimizers of student and fake score, with their schedules: built, stepped in turns, resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dfd.networks.roles import TRAINED
from lightning_dfd.training.optimizers import BadGradients, Groups, clip_parts, plain, settings_of
from lightning_dfd.training.schedules import (
    Schedule,
    Watching,
    build,
    go_on,
    plan_at,
    ready,
    refuse_unlogged,
    takes_a_value,
    trial,
)
from lightning_dfd.types import Role

Part = tuple[nn.Module, float | None]  # a module that a term trains, and its learning rate; None for the fake score's


class Optimization:
    """Two optimizers, one for each trained role.

    Modules that terms train have no optimizer of their own, as an iteration is one counted step: they are further
    groups of the fake score's.

    Args:
        optimizers: by role, as the recipe names them.
        shared: schedule of both rates.
        own: schedules of one rate each, instead of the shared one.
        max_norm: of a role's gradient, and of each module that a term trains.

    Raises:
        ValueError: there is a shared schedule and one of a role.
    """

    def __init__(
        self,
        optimizers: Mapping[Role, OptimizerCallable],
        shared: Schedule | None,
        own: Mapping[Role, Schedule | None],
        max_norm: float,
    ) -> None:
        if shared is not None and any(schedule is not None for schedule in own.values()):
            raise ValueError(
                "model.lr_scheduler is of both roles; set it to null, or leave out model.student_lr_scheduler and "
                "model.fake_lr_scheduler"
            )
        self.optimizers, self.max_norm = optimizers, max_norm
        self.schedules = {role: schedule for role in TRAINED if (schedule := own[role] or shared) is not None}
        named = {role: f"model.{role}_lr_scheduler" for role in TRAINED}
        self.keys = named if shared is None else dict.fromkeys(TRAINED, "model.lr_scheduler")
        self.parts: dict[str, list[nn.Parameter]] = {}  # what is clipped by a norm of its own, by name
        self._names: list[str] = []  # of the optimizers' classes
        self._settings: list[Groups] = []  # before they had schedules
        self._built: list[Groups] = []  # and after
        self._watching: list[Watching] = []
        self._followed: set[str] = set()  # the values that these were shown
        self._kept: tuple[Sequence[Any], Sequence[Any]] | None = None  # plans and schedules of a checkpoint
        self._bad = BadGradients()

    # ---- building -----------------------------------------------------------------------------------------------

    def check(self, term_rates: Sequence[float | None], max_steps: int) -> None:
        """Raise ValueError where an optimizer or its schedule does not fit a run of `max_steps`; nothing is loaded."""
        heads = [{} if rate is None else {"lr": rate} for rate in term_rates]
        groups: dict[str, list[dict[str, Any]]] = {"student": [], "fake": [{}, *heads] if heads else []}
        self._names = [
            trial(
                role, f"model.{role}_optimizer", self.optimizers[role], groups[role], self.keys[role],
                self.schedules.get(role), max_steps,
            )
            for role in TRAINED
        ]  # fmt: skip

    def build(self, roles: Mapping[Role, list[nn.Parameter]], terms: Mapping[str, Part]) -> OptimizerLRScheduler:
        """What `configure_optimizers` returns."""
        self.parts = {str(role): roles[role] for role in TRAINED}
        fake: Any = roles["fake"]
        if terms:
            fake = [{"params": fake}]
            for name, (module, rate) in terms.items():
                self.parts[name] = list(module.parameters())
                fake.append({"params": self.parts[name]} | ({} if rate is None else {"lr": rate}))
        given: dict[Role, Any] = {"student": roles["student"], "fake": fake}
        optimizers = [build(f"model.{role}_optimizer", self.optimizers[role], given[role]) for role in TRAINED]
        self._settings = [settings_of(optimizer) for optimizer in optimizers]
        schedulers: dict[str, Any] = {
            role: build(self.keys[role], self.schedules[role], ready(optimizer))
            for role, optimizer in zip(TRAINED, optimizers, strict=True)
            if role in self.schedules
        }
        self._built = [settings_of(optimizer) for optimizer in optimizers]
        self._watching = [scheduler for scheduler in schedulers.values() if takes_a_value(scheduler)]
        named: Any = [
            {"scheduler": scheduler, "interval": "step", "name": f"lr-{role}"} for role, scheduler in schedulers.items()
        ]
        return optimizers, named

    # ---- a step -------------------------------------------------------------------------------------------------

    def clip(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Clip the gradient of each part that `optimizer` holds by its own norm; returns the norms before."""
        return clip_parts(optimizer, self.parts, self.max_norm)

    def drop_bad(self, optimizer: Optimizer, norms: Mapping[str, Tensor], iteration: int) -> bool:
        """As `BadGradients.drop`."""
        return self._bad.drop(optimizer, norms, iteration)

    def step(self, role: Role, optimizers: Sequence[Any], schedulers: Sequence[Any]) -> dict[str, float]:
        """Step the optimizer of `role` and all schedules, which count iterations; returns the rates before, to log."""
        rates = {
            f"train/{name}_lr": float(each.param_groups[0]["lr"])
            for name, each in zip(TRAINED, optimizers, strict=True)
            if each.param_groups[0].get("lr") is not None  # some choose it in each step
        }
        optimizer = optimizers[TRAINED.index(role)]
        optimizer.step()
        for each in optimizers:  # the other's too: the student's loss may run through what terms train
            each.zero_grad()
        for scheduler in schedulers:
            if scheduler not in self._watching:
                scheduler.step()
        return rates

    def follow(self, values: Mapping[str, float], mean: Callable[[float], float]) -> None:
        """Show the schedules that watch a value, as ReduceLROnPlateau, what was logged just now.

        `mean` is over all processes, which all have to call it.
        """
        self._followed |= values.keys()
        for scheduler in self._watching:
            if scheduler.monitor in values:
                scheduler.step(mean(values[scheduler.monitor]))

    def refuse_unlogged(self, kind: str, logged: set[str]) -> None:
        """Raise ValueError where a schedule watches a value below `kind`, as `val/`, that is not logged."""
        for scheduler in self._watching:
            if scheduler.monitor.startswith(kind):
                refuse_unlogged(scheduler, self._followed | logged)

    # ---- resume -------------------------------------------------------------------------------------------------

    def plans(self, optimizers: Sequence[Optimizer], iteration: int) -> list[dict[str, Any]]:
        """For a checkpoint: what the recipe alone gives at `iteration`; see `schedules`."""
        return [
            plan_at(optimizer, settings, self.schedules.get(role), iteration)
            for role, optimizer, settings in zip(TRAINED, optimizers, self._settings, strict=False)
        ]

    def keep(self, plans: Sequence[Any] | None, schedules: Sequence[Any]) -> None:
        """Set a checkpoint's plans and schedules aside for `go_on`.

        Raises:
            ValueError: it is of other optimizers.
        """
        for role, own, plan in zip(TRAINED, self._names, plans or [], strict=bool(plans)):
            if own != plan["optimizer"]:
                raise ValueError(
                    f"model.{role}_optimizer is {own}, and the checkpoint's is {plan['optimizer']}; resume with "
                    "that, or begin a new run with the checkpoint's weights by model.init_from"
                )
        self._kept = plans or [None] * len(TRAINED), schedules

    def go_on(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any], iteration: int) -> None:
        """Once the trainer has restored optimizers: it brings their old settings along; the recipe's win."""
        if self._kept is None:
            return
        by_optimizer = {id(scheduler.optimizer): scheduler for scheduler in schedulers}
        (plans, schedules), self._kept = self._kept, None
        kept = iter(schedules)
        for role, optimizer, built, plan in zip(TRAINED, optimizers, self._built, plans, strict=True):
            state = next(kept) if plan is not None and plan["schedule"] is not None else None
            go_on(role, optimizer, by_optimizer.get(id(optimizer)), built, plan, state, iteration)


def without_code(checkpoint: dict[str, Any]) -> None:
    """Keep of the optimizers' and schedules' settings in a checkpoint what it may hold: data alone."""
    if "lr_schedulers" not in checkpoint:  # it is of weights alone
        return
    checkpoint["lr_schedulers"] = [plain(state) for state in checkpoint["lr_schedulers"]]
    for state in checkpoint["optimizer_states"]:
        state["param_groups"] = [plain(group) for group in state["param_groups"]]


def begin_training(optimizers: Sequence[Any]) -> None:
    """Schedule-free optimizers have a training mode; they stay in it, see docs/recipes.md."""
    for optimizer in optimizers:
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()


def mean_over(strategy: Strategy, device: torch.device) -> Callable[[float], float]:
    """The mean of a number over all processes."""

    def mean(value: float) -> float:
        return float(strategy.reduce(torch.tensor(value, dtype=torch.float64, device=device), reduce_op="mean"))

    return mean
