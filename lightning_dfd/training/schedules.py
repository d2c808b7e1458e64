"""Learning-rate schedules, counted in iterations: how a recipe names one, whether it fits the run, how it goes on.

A schedule is a function of the recipe and the iteration, as the draws are. So a resumed run takes it from the recipe,
and only what training has added (a best value, an optimizer's own estimates) from the checkpoint. To tell the two
apart, a checkpoint also holds the plan: what the recipe alone gives at its iteration. What differs from that is state.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import torch
from jsonargparse import Namespace
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LRScheduler, OneCycleLR, SequentialLR

from lightning_dfd.training.optimizers import (
    DROPPED,
    Groups,
    merged,
    merged_group,
    plain,
    same,
    set_groups,
    settings_of,
)

Given = TypeVar("Given")
Built = TypeVar("Built")
LENGTH = "num_training_steps"  # what diffusers' and transformers' functions call a schedule's length


# ---- naming one -----------------------------------------------------------------------------------------------


class ScheduleFunction:
    """A function that returns an optimizer's schedule, with its other arguments, as a recipe names it.

    diffusers.optimization.get_cosine_schedule_with_warmup is one. jsonargparse checks the arguments, as those of a
    class, but would call the function without an optimizer; this is what it makes of it instead.

    Args:
        class_path: import path of the function; its first parameter has to be named `optimizer`.
        init_args: its other arguments.
    """

    def __init__(self, class_path: str, init_args: Mapping[str, Any] | None = None) -> None:
        module, _, name = class_path.rpartition(".")
        self.function = getattr(importlib.import_module(module), name) if module else None
        if not takes_optimizer(self.function):
            raise ValueError(f"{class_path} is not a function whose first parameter is named optimizer")
        self.class_path, self.init_args = class_path, dict(init_args or {})

    def __call__(self, optimizer: Optimizer) -> LRScheduler:
        made: LRScheduler = self.function(optimizer, **self.init_args)  # type: ignore[misc]
        return made

    @classmethod
    def read(cls, value: Any) -> Any:
        """From what a recipe holds: class_path and init_args.

        A path alone, or one with `${...}` still in its arguments, is only checked: jsonargparse comes back with all.
        """
        content = value if isinstance(value, Namespace) else Namespace(class_path=value)
        made = cls(**content.as_dict())
        return content if isinstance(value, str) or "${" in str(made.init_args) else made

    def write(self) -> dict[str, Any]:
        return {"class_path": self.class_path, "init_args": self.init_args}


def takes_optimizer(function: Any) -> bool:
    """Whether it is a function whose first parameter is `optimizer`."""
    return inspect.isfunction(function) and next(iter(inspect.signature(function).parameters), None) == "optimizer"


register_type(ScheduleFunction, ScheduleFunction.write, ScheduleFunction.read)

Schedule = LRSchedulerCallable | ScheduleFunction


class Watching(Protocol):
    """A schedule that is stepped by a value, such as Lightning's ReduceLROnPlateau."""

    monitor: str

    def step(self, metrics: float) -> None: ...


def takes_a_value(stepped: Any) -> bool:
    """Whether each step has to be given something: ReduceLROnPlateau's a value, LBFGS' a closure."""
    first = next(iter(inspect.signature(stepped.step).parameters.values()), None)
    return first is not None and first.default is first.empty and first.kind is first.POSITIONAL_OR_KEYWORD


# ---- does it fit? ---------------------------------------------------------------------------------------------


def build(key: str, make: Callable[[Given], Built], given: Given) -> Built:
    """`make(given)`, an optimizer's or a schedule's factory.

    Raises:
        ValueError: what it raised, in one line with the recipe's key.
    """
    try:
        return make(given)
    except Exception as error:  # of whatever class the recipe names; the key is what its user can change
        raise ValueError(f"{key} fails ({type(error).__name__}: {error})") from error


def trial(
    role: str, key: str, make: Callable[[Any], Optimizer], groups: Sequence[Mapping[str, Any]], schedule_key: str,
    schedule: Schedule | None, max_steps: int,
) -> str:  # fmt: skip
    """Try a role's optimizer and schedule on a small tensor, before anything is loaded; returns the optimizer's name.

    Args:
        groups: settings of the groups of parameters that the optimizer will get; none of them for one plain group.
        max_steps: iterations of the run; below 1 if it has no end.

    Raises:
        ValueError: they cannot be built, or the schedule does not fit the run.
    """

    def like() -> torch.nn.Parameter:  # as an adapter's matrix
        return torch.nn.Parameter(torch.zeros(2, 2))

    parameters: Any = [{**group, "params": [like()]} for group in groups] or [like()]
    optimizer = build(key, make, parameters)
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"{key} gives {type(optimizer).__name__}, which is not a torch.optim.Optimizer")
    if takes_a_value(optimizer):
        raise ValueError(f"{key} is {type(optimizer).__name__}, whose step needs a closure; take one that does without")
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError(f"{key} is SparseAdam, which takes sparse gradients alone, and these are dense; take AdamW")
    _say_what_is_lost(key, *settings_of(optimizer))
    if schedule is not None:
        scheduler = build(schedule_key, schedule, ready(optimizer))
        if not all(hasattr(scheduler, name) for name in ("step", "state_dict", "load_state_dict", "optimizer")):
            raise ValueError(f"{schedule_key} gives {type(scheduler).__name__}, which is not a learning-rate schedule")
        _say_what_is_lost(schedule_key, scheduler.state_dict())
        if takes_a_value(scheduler):
            _refuse_unnamed(schedule_key, scheduler)
        elif max_steps > 0:
            for problem in early_ends(scheduler, max_steps):
                raise ValueError(f"{schedule_key}: {problem}")
            _refuse_rates(role, schedule_key, schedule, _rates(schedule_key, scheduler, max_steps))
    return type(optimizer).__name__


def early_ends(scheduler: Any, steps: int, start: int = 0) -> Iterator[str]:
    """What goes wrong, in words, with schedules that have an end and are stepped beyond it.

    Args:
        steps: how often it is stepped.
        start: iteration of its first rate.
    """
    if isinstance(scheduler, SequentialLR):
        begins = [0, *scheduler._milestones]
        ends = [*scheduler._milestones, steps]
        for inner, begin, end in zip(scheduler._schedulers, begins, ends, strict=True):
            if begin < steps:
                yield from early_ends(inner, min(end, steps) - begin, start + begin)
    elif isinstance(scheduler, ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from early_ends(inner, steps, start)
    until = f"it is stepped from iteration {start} to {start + steps}" if start else f"trainer.max_steps is {steps}"
    if isinstance(scheduler, CosineAnnealingLR) and scheduler.T_max < steps - 1:
        yield (
            f"T_max is {scheduler.T_max} and {until}, so the rate would rise again; set T_max to {steps}, or take "
            "CosineAnnealingWarmRestarts for cycles"
        )
    if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        yield (
            f"total_steps (epochs x steps_per_epoch) is {scheduler.total_steps} and {until}, beyond which OneCycleLR "
            f"has no rate; set total_steps to {steps}"
        )


def _rates(key: str, scheduler: Any, max_steps: int) -> list[float]:
    """The largest rate of a group at each iteration of the run."""
    rates = []
    for iteration in range(max_steps):
        groups = [float(group["lr"]) for group in scheduler.optimizer.param_groups if group.get("lr") is not None]
        wrong = next((rate for rate in groups if not 0 <= rate < math.inf), None)
        if wrong is not None:
            raise ValueError(f"{key} gives a rate of {wrong:g} at iteration {iteration}; it must be 0 or above")
        rates.append(max(groups, default=math.inf))
        build(f"{key}, at iteration {iteration + 1} of {max_steps},", lambda _: scheduler.step(), None)
    return rates


def _refuse_rates(role: str, key: str, schedule: Schedule, rates: Sequence[float]) -> None:
    steps = len(rates)
    length = schedule.init_args.get(LENGTH) if isinstance(schedule, ScheduleFunction) else None
    if length is not None and length < steps - 1 and max(rates[length:]) > rates[length] * 1.001 + 1e-12:
        raise ValueError(
            f"{key}.init_args.{LENGTH} is {length} and trainer.max_steps is {steps}, so the rate would rise again; set "
            f"it to {steps}"
        )
    lit = max((iteration for iteration, rate in enumerate(rates) if rate > 0), default=-1)
    if lit < steps - 1:
        rank_zero_warn(
            f"{key}: the {role}'s rate is 0 from iteration {lit + 1} to the end at trainer.max_steps {steps}, so it "
            "learns nothing there; let the schedule last as long as the run"
        )


def _refuse_unnamed(key: str, scheduler: Any) -> None:
    monitor = getattr(scheduler, "monitor", None)
    if not isinstance(monitor, str) or not monitor.startswith(("train/", "val/")):
        raise ValueError(
            f"{key}: {type(scheduler).__name__} watches {monitor!r}; set class_path: "
            "lightning.pytorch.cli.ReduceLROnPlateau and init_args.monitor to a value that is logged, as val/score"
        )
    if monitor.endswith("_x0_error"):
        raise ValueError(
            f"{key}.init_args.monitor is {monitor}, which Lightning measures after the iteration's checkpoint, so a "
            "resumed run may lack it; watch val/score, by the callback VideoEvaluation, or a value below train/"
        )


def refuse_unlogged(scheduler: Watching, logged: Iterable[str]) -> None:
    """Raise ValueError unless what a schedule watches is among the names that are logged."""
    if scheduler.monitor not in logged:
        kind = scheduler.monitor.partition("/")[0]
        same_kind = sorted(name for name in logged if name.startswith(f"{kind}/"))
        add = "" if same_kind else "; add the callback lightning_dfd.callbacks.VideoEvaluation"
        raise ValueError(
            f"the monitor of {type(scheduler).__name__} is {scheduler.monitor}, which nothing logs{add}. Logged are: "
            f"{', '.join(same_kind) or f'none below {kind}/'}"
        )


def _say_what_is_lost(key: str, *states: Mapping[str, Any]) -> None:
    """Functions are the recipe's, and there again on resume; other objects may hold state."""
    values = [item for state in states for item in state.items()]
    lost = {name for name, value in values if not callable(value) and plain(value) is DROPPED}
    if lost:
        rank_zero_warn(f"{key}: {', '.join(sorted(lost))} cannot be kept in a checkpoint, and begins anew on resume")


# ---- going on -------------------------------------------------------------------------------------------------


def ready(optimizer: Optimizer) -> Optimizer:
    """Keep torch from warning of a schedule that is stepped before its optimizer: the two roles take turns."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return optimizer


def plan_at(optimizer: Optimizer, settings: Groups, schedule: Schedule | None, iterations: int) -> dict[str, Any]:
    """What the recipe alone gives after so many iterations, without any update: groups and the schedule's state.

    Args:
        optimizer: is left as it is.
        settings: `settings_of` it before it had a schedule.
    """
    twin = object.__new__(type(optimizer))
    twin.__dict__.update({name: value for name, value in optimizer.__dict__.items() if name != "step"})  # it is wrapped
    twin.state = defaultdict(dict)
    twin.param_groups = [{**deepcopy(group), "params": [torch.nn.Parameter(torch.zeros(2, 2))]} for group in settings]
    scheduler = None if schedule is None else schedule(ready(twin))
    _advance(scheduler, iterations)
    return _plan_of(twin, scheduler)


def go_on(
    role: str, optimizer: Optimizer, scheduler: Any, built: Groups, plan: Mapping[str, Any] | None,
    kept: dict[str, Any] | None, iterations: int,
) -> None:  # fmt: skip
    """Give a restored optimizer and its new schedule what this recipe sets and what the checkpoint's training made.

    Args:
        optimizer: with the checkpoint's groups.
        scheduler: as it was built, or None.
        built: `settings_of` the optimizer when both were new.
        plan: `plan_at` of the checkpoint's recipe; None for a checkpoint without one.
        kept: the state of the checkpoint's schedule; None if there was none.
        iterations: the checkpoint's.
    """
    groups = settings_of(optimizer)
    was = groups[0].get("lr")
    set_groups(optimizer, deepcopy(built))
    moments, optimizer.state = optimizer.state, defaultdict(dict)  # as in a plan, there has been no update
    _advance(scheduler, iterations)
    optimizer.state = moments
    now = _plan_of(optimizer, scheduler)
    before = now if plan is None else plan
    if before["schedule"] != now["schedule"]:  # a new one decides by itself
        kept = None
        groups = [{**group, "lr": old["lr"]} for group, old in zip(groups, before["groups"], strict=True)]
    merging = zip(before["groups"], settings_of(optimizer), groups, strict=True)
    set_groups(optimizer, [merged_group(*each) for each in merging])
    if scheduler is not None:
        state = now["state"] if kept is None else merged(before["state"], now["state"], kept)
        if not same(state, now["state"]):
            scheduler.load_state_dict(state)
    rate = optimizer.param_groups[0].get("lr")
    if not same(was, rate):
        rank_zero_info(f"the {role}'s learning rate is now {_shown(rate)} by the recipe; it was {_shown(was)}")


def _shown(rate: Any) -> str:
    return "null" if rate is None else f"{float(rate):.3g}"


def _advance(scheduler: Any, iterations: int) -> None:
    if scheduler is not None and not takes_a_value(scheduler):
        for _ in range(iterations):
            scheduler.step()


def _plan_of(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    return {
        "optimizer": type(optimizer).__name__,
        "schedule": None if scheduler is None else type(scheduler).__name__,
        "groups": [plain(group) for group in settings_of(optimizer)],
        "state": {} if scheduler is None else plain(scheduler.state_dict()),
    }
