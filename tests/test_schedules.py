"""Schedules and optimizers: what a recipe sets, what training makes of it, and that a resumed run goes on with both."""

from __future__ import annotations

import csv
import io
import math
import signal
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.optimization
import pytest
import torch
import transformers.optimization
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import AdamW, Optimizer, lr_scheduler

from lightning_dfd.backbones import Backbone
from lightning_dfd.cli import main as cli
from lightning_dfd.runs.checkpoints import read_checkpoint
from lightning_dfd.training.optimizers import plain, settings_of
from lightning_dfd.training.schedules import ScheduleFunction, go_on, plan_at, ready, takes_a_value, trial
from lightning_dfd.training.settings import DMDSettings
from tests.faults.kills import differences
from tests.test_cli import fail, recipe, small
from tests.test_resume import SendSignal, fit

STEPS, CUT = 20, 7


class Estimating(AdamW):
    """As Prodigy: an estimate `d` that multiplies the rate and a counter, both in the groups, and a setting `d0`."""

    def __init__(self, params: Any, lr: float = 1.0, d0: float = 1e-4) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(d0=d0, d=d0, k=0, numerator=torch.zeros(()), total=torch.zeros(()), by_step={})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            grown = sum(float(p.grad.abs().sum()) for p in group["params"] if p.grad is not None)
            group["numerator"] = group["numerator"] + grown
            group["total"] += grown  # in place
            group["by_step"][str(group["k"])] = grown
            group["d"] = min(group["d"] * (1 + grown / (1 + grown)), 1e-2)
            group["k"] += 1
            base, group["lr"] = group["lr"], group["lr"] * group["d"]
            super().step()
            group["lr"] = base


class ScheduleFree(Optimizer):
    """As schedule-free SGD: mode, weights and largest rate in the groups, some of them only from the first step on."""

    def __init__(self, params: Any, lr: float = 1e-2, warmup_steps: int = 3, train_mode: bool = False) -> None:
        super().__init__(
            params, {"lr": lr, "warmup_steps": warmup_steps, "k": 0, "weight_sum": 0.0, "train_mode": False}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["train_mode"] = True
            rate = group["lr"] * min(1, (group["k"] + 1) / group["warmup_steps"])
            group["scheduled_lr"] = group["lr_max"] = max(rate, group.get("lr_max", 0.0))
            group["weight_sum"] += rate**2
            share = rate**2 / max(group["weight_sum"], 1e-12)
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    z.sub_(rate * p.grad)
                    p.lerp_(z, share)
            group["k"] += 1


class Noisy(lr_scheduler.LRScheduler):
    """A user's own: what it does is not a function of the iteration, and it holds a function."""

    def __init__(self, optimizer: Optimizer, share: float = 0.9) -> None:
        self.share, self.shape, self.level = share, lambda x: x, 1.0
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if not self._is_initial and self.optimizer.state:  # type: ignore[attr-defined]
            self.level *= self.share
        return [self.shape(lr * self.level) for lr in self.base_lrs]


def sequence(optimizer: Optimizer, total: int = STEPS, warm: int = 4) -> lr_scheduler.SequentialLR:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
        lr_scheduler.CosineAnnealingLR(optimizer, total - warm),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [warm])


def chain(optimizer: Optimizer, total: int = STEPS) -> lr_scheduler.ChainedScheduler:
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 5), lr_scheduler.PolynomialLR(optimizer, total, 2.0)], optimizer
    )


def nested(optimizer: Optimizer) -> lr_scheduler.SequentialLR:
    return lr_scheduler.SequentialLR(optimizer, [sequence(optimizer, 8, 2), lr_scheduler.StepLR(optimizer, 3)], [8])


# Of every class in torch: as it is, and with settings that were changed when the run was resumed.
SCHEDULES: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "LambdaLR": (lambda o, n: lr_scheduler.LambdaLR(o, lambda k: 1 - k / n), {"n": 20}, {"n": 40}),
    "MultiplicativeLR": (lambda o, f: lr_scheduler.MultiplicativeLR(o, lambda k: f), {"f": 0.9}, {"f": 0.95}),
    "StepLR": (lr_scheduler.StepLR, {"step_size": 3}, {"step_size": 4, "gamma": 0.5}),
    "MultiStepLR": (lr_scheduler.MultiStepLR, {"milestones": [3, 9, 9]}, {"milestones": [5, 12]}),
    "ConstantLR": (lr_scheduler.ConstantLR, {"total_iters": 9}, {"total_iters": 4}),
    "LinearLR": (lr_scheduler.LinearLR, {"start_factor": 0.1, "total_iters": 12}, {"start_factor": 0.1}),
    "ExponentialLR": (lr_scheduler.ExponentialLR, {"gamma": 0.9}, {"gamma": 0.8}),
    "SequentialLR": (sequence, {}, {"total": 40}),
    "CosineAnnealingLR": (lr_scheduler.CosineAnnealingLR, {"T_max": 20}, {"T_max": 40, "eta_min": 1e-6}),
    "ChainedScheduler": (chain, {}, {"total": 40}),
    "CyclicLR": (
        lr_scheduler.CyclicLR,
        {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 4, "mode": "exp_range", "gamma": 0.99},
        {"base_lr": 1e-4, "max_lr": 2e-2, "step_size_up": 6},
    ),
    "CosineAnnealingWarmRestarts": (
        lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 3, "T_mult": 2}, {"T_0": 4, "T_mult": 2},
    ),
    "OneCycleLR": (
        lr_scheduler.OneCycleLR,
        {"max_lr": 1e-2, "total_steps": 20},
        {"max_lr": 1e-2, "epochs": 4, "steps_per_epoch": 10},
    ),
    "PolynomialLR": (lr_scheduler.PolynomialLR, {"total_iters": 20}, {"total_iters": 40, "power": 2.0}),
    "ReduceLROnPlateau": (
        partial(ReduceLROnPlateau, monitor="val/score"), {"patience": 1, "factor": 0.5}, {"patience": 2, "factor": 0.5},
    ),
    "nested": (nested, {}, {}),
    "diffusers": (
        diffusers.optimization.get_cosine_schedule_with_warmup,
        {"num_warmup_steps": 3, "num_training_steps": 20}, {"num_warmup_steps": 3, "num_training_steps": 40},
    ),
    "transformers": (
        transformers.optimization.get_wsd_schedule,
        {"num_warmup_steps": 3, "num_training_steps": 20, "num_decay_steps": 5},
        {"num_warmup_steps": 3, "num_training_steps": 40, "num_decay_steps": 5},
    ),
}  # fmt: skip


class Run:
    """A few weights, an optimizer and a schedule, as the module drives them."""

    def __init__(self, make: Callable[[Any], Optimizer], schedule: Callable[[Optimizer], Any] | None) -> None:
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.schedule = schedule
        self.optimizer = make([self.weight])
        self.settings = settings_of(self.optimizer)
        self.scheduler = None if schedule is None else schedule(ready(self.optimizer))
        self.built = settings_of(self.optimizer)
        self.done = 0
        self.rates: list[float] = []

    def train(self, until: int) -> Run:
        for iteration in range(self.done, until):
            self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
            self.weight.grad = self.weight.detach().sin() + 0.1 * iteration
            self.optimizer.step()
            if self.scheduler is not None:
                value = math.cos(iteration) + iteration
                self.scheduler.step(*([value] if takes_a_value(self.scheduler) else []))
        self.done = until
        return self

    def saved(self) -> dict[str, Any]:
        """As a checkpoint that went over a disk."""
        optimizer = self.optimizer.state_dict()
        content = {
            "weight": self.weight.detach().clone(),
            "optimizer": optimizer | {"param_groups": [plain(group) for group in optimizer["param_groups"]]},
            "schedule": None if self.scheduler is None else plain(self.scheduler.state_dict()),
            "plan": plan_at(self.optimizer, self.settings, self.schedule, self.done),
            "done": self.done,
        }
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        read: dict[str, Any] = torch.load(file, weights_only=True)
        return read

    def resume(self, saved: dict[str, Any]) -> Run:
        with torch.no_grad():
            self.weight.copy_(saved["weight"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done = saved["done"]
        go_on("student", self.optimizer, self.scheduler, self.built, saved["plan"], saved["schedule"], self.done)
        return self


def of(name: str, changed: bool = False) -> Callable[[Optimizer], Any]:
    make, first, second = SCHEDULES[name]
    return partial(make, **(second if changed else first))


def adamw(parameters: Any, lr: float = 1e-2) -> Optimizer:
    return AdamW(parameters, lr=lr)


def test_every_schedule_of_torch_is_tried() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", [adamw, Estimating, ScheduleFree, partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_a_resumed_schedule_equals_the_uninterrupted_one(name: str, make: Callable[[Any], Optimizer]) -> None:
    if make is ScheduleFree and name in ("CyclicLR", "OneCycleLR"):
        make = adamw  # those two want a momentum
    whole = Run(make, of(name)).train(STEPS)
    cut = Run(make, of(name)).train(CUT)
    for stop in (CUT, 13, STEPS):  # interrupted twice
        cut = Run(make, of(name)).resume(cut.train(stop).saved())
    assert not [*differences(cut.saved(), whole.saved())]
    again = Run(make, of(name)).resume(Run(make, of(name)).train(CUT).saved()).train(STEPS)
    assert again.rates == whole.rates[CUT:]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("ReduceLROnPlateau", "nested")])
def test_a_prolonged_schedule_is_that_of_its_new_length(name: str) -> None:
    """Whatever a recipe changes about a schedule holds as if it had been so from the start."""
    new = Run(adamw, of(name, changed=True)).train(STEPS)
    old = Run(adamw, of(name)).train(CUT)
    resumed = Run(adamw, of(name, changed=True)).resume(old.saved()).train(STEPS)
    assert resumed.rates == new.rates[CUT:]
    assert resumed.rates != Run(adamw, of(name)).train(STEPS).rates[CUT:]
    assert not [*differences(resumed.saved()["plan"], new.saved()["plan"])]


def test_settings_come_from_the_recipe_and_state_from_the_checkpoint() -> None:
    saved = Run(partial(Estimating, lr=1.0, d0=1e-4), None).train(CUT).saved()
    group = Run(partial(Estimating, lr=0.5, d0=1e-3), None).resume(saved).optimizer.param_groups[0]
    kept = saved["optimizer"]["param_groups"][0]
    assert (group["lr"], group["d0"]) == (0.5, 1e-3)
    assert (group["k"], group["d"]) == (CUT, kept["d"])
    assert group["d"] not in (1e-3, 1e-4)
    assert torch.equal(group["numerator"], kept["numerator"])
    assert group["total"] == kept["total"] > 0
    assert group["by_step"] == kept["by_step"]
    assert len(group["by_step"]) == CUT
    saved = Run(ScheduleFree, None).train(CUT).saved()
    group = Run(partial(ScheduleFree, warmup_steps=9), None).resume(saved).optimizer.param_groups[0]
    assert (group["warmup_steps"], group["k"], group["train_mode"]) == (9, CUT, True)
    assert group["weight_sum"] > 0
    assert "lr_max" in group


def test_another_schedule_or_none_holds_from_the_checkpoint_on() -> None:
    names = ["CosineAnnealingLR", "OneCycleLR", "LambdaLR", "SequentialLR", "ReduceLROnPlateau", None]
    for old in names:
        saved = Run(adamw, None if old is None else of(old)).train(CUT).saved()
        for new in set(names) - {old}:
            fresh = None if new is None else of(new)
            resumed = Run(adamw, fresh).resume(saved).train(STEPS)
            if new != "ReduceLROnPlateau":
                assert resumed.rates == Run(adamw, fresh).train(STEPS).rates[CUT:]
            assert resumed.rates[0] == Run(adamw, fresh).train(CUT + 1).rates[-1] or new == "ReduceLROnPlateau"


def test_a_plateau_that_lowered_the_rate_goes_on_at_the_new_one() -> None:
    old = Run(adamw, of("ReduceLROnPlateau")).train(STEPS)
    share = old.rates[-1] / 1e-2
    assert share < 1
    resumed = Run(partial(adamw, lr=3e-3), of("ReduceLROnPlateau", changed=True)).resume(old.saved())
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3 * share)
    assert resumed.scheduler.patience == 2
    assert resumed.scheduler.best == old.scheduler.best  # type: ignore[union-attr]


def test_a_rate_that_something_else_changed_is_kept() -> None:
    """By a callback, say."""
    run = Run(adamw, None).train(3)
    run.optimizer.param_groups[0]["lr"] /= 2
    assert Run(adamw, None).resume(run.saved()).train(4).rates == [5e-3]


def test_schedules_of_ones_own_keep_their_state() -> None:
    whole = Run(adamw, Noisy).train(STEPS)
    assert whole.rates[-1] < 2e-3
    saved = Run(adamw, Noisy).train(CUT).saved()  # a function would make it unreadable
    assert Run(adamw, Noisy).resume(saved).train(STEPS).rates == whole.rates[CUT:]
    slower = Run(adamw, partial(Noisy, share=0.95)).resume(saved).train(STEPS)
    assert slower.rates[-1] == pytest.approx(whole.rates[CUT] * 0.95 ** (STEPS - CUT - 1))


# ---- what does not fit ----------------------------------------------------------------------------------------


def refused(schedule: Callable[[Any], Any] | None, max_steps: int = 20, make: Callable[[Any], Any] = adamw) -> str:
    """What is said of a role's optimizer and schedule before anything is loaded."""
    with pytest.raises(ValueError, match="model") as error:
        trial("student", "model.student_optimizer", make, [], "model.lr_scheduler", schedule, max_steps)
    return " ".join(str(error.value).split())


def fits(schedule: Callable[[Any], Any], max_steps: int = 20) -> str:
    return trial("student", "model.student_optimizer", adamw, [], "model.lr_scheduler", schedule, max_steps)


def test_a_schedule_that_ends_before_the_run_is_refused() -> None:
    cosine, one_cycle = lr_scheduler.CosineAnnealingLR, lr_scheduler.OneCycleLR
    said = refused(partial(cosine, T_max=8))
    assert "model.lr_scheduler: T_max is 8 and trainer.max_steps is 20" in said
    assert "set T_max to 20" in said
    said = refused(partial(one_cycle, max_lr=1e-2, epochs=2, steps_per_epoch=5))
    assert "total_steps (epochs x steps_per_epoch) is 10 and trainer.max_steps is 20" in said
    said = refused(partial(sequence, total=15, warm=5))
    assert "T_max is 10 and it is stepped from iteration 5 to 20" in said
    assert "T_max is 6" in refused(lambda o: lr_scheduler.ChainedScheduler([cosine(o, 6)]))
    cosine_of = "diffusers.optimization.get_cosine_schedule_with_warmup"
    said = refused(ScheduleFunction(cosine_of, {"num_warmup_steps": 3, "num_training_steps": 12}))
    assert "model.lr_scheduler.init_args.num_training_steps is 12 and trainer.max_steps is 20" in said
    for fitting in (
        partial(cosine, T_max=20),
        partial(cosine, T_max=50),
        partial(one_cycle, max_lr=1e-2, total_steps=20),
        partial(lr_scheduler.LinearLR, total_iters=3),
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
        ScheduleFunction(cosine_of, {"num_warmup_steps": 3, "num_training_steps": 20}),
        sequence,
    ):
        assert fits(fitting) == "AdamW"
    assert fits(partial(cosine, T_max=8), max_steps=-1) == "AdamW"  # a run without an end


def test_a_rate_of_zero_to_the_end_is_warned_of() -> None:
    linear = "diffusers.optimization.get_linear_schedule_with_warmup"
    schedule = ScheduleFunction(linear, {"num_warmup_steps": 3, "num_training_steps": 12})
    with pytest.warns(UserWarning, match="model.lr_scheduler: the student's rate is 0 from iteration 12 to the end"):
        fits(schedule)


def test_what_cannot_be_built_is_named_by_its_key() -> None:
    assert "model.student_optimizer fails (ValueError: Invalid learning rate: -1" in refused(
        None, make=partial(AdamW, lr=-1.0)
    )
    assert "model.student_optimizer is LBFGS, whose step needs a closure" in refused(None, make=torch.optim.LBFGS)
    assert "is SparseAdam, which takes sparse gradients alone" in refused(None, make=torch.optim.SparseAdam)
    assert "model.student_optimizer gives list, which is not a torch.optim.Optimizer" in refused(None, make=list)
    assert "model.lr_scheduler fails (ValueError: Expected positive integer T_0" in refused(
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=-3)
    )
    assert "model.lr_scheduler gives NoneType, which is not a learning-rate schedule" in refused(lambda o: None)
    assert "model.lr_scheduler gives a rate of -0.0005 at iteration 11; it must be 0 or above" in refused(
        lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.5 - k * 0.05)
    )
    assert "model.lr_scheduler, at iteration 4 of 20, fails (ZeroDivisionError" in refused(
        lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (4 - k))
    )
    assert "ReduceLROnPlateau watches None; set class_path: lightning.pytorch.cli.ReduceLROnPlateau" in refused(
        lr_scheduler.ReduceLROnPlateau
    )
    assert "init_args.monitor is val/student_x0_error, which Lightning measures after" in refused(
        partial(ReduceLROnPlateau, monitor="val/student_x0_error")
    )


def test_state_that_no_checkpoint_holds_is_said() -> None:
    class Odd(lr_scheduler.StepLR):
        def __init__(self, optimizer: Optimizer) -> None:
            self.memory = object()
            super().__init__(optimizer, 3)

    with pytest.warns(UserWarning, match="model.lr_scheduler: memory cannot be kept in a checkpoint"):
        fits(Odd)


# ---- runs -----------------------------------------------------------------------------------------------------


def logged(root: Path, name: str) -> list[float]:
    (file,) = root.rglob("metrics.csv")
    with file.open(encoding="utf-8") as rows:
        return [float(row[name]) for row in csv.DictReader(rows) if row[name]]


def test_both_rates_are_counted_in_iterations(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """Of either role, however often it is updated, and however many batches an iteration takes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step")
        fit(
            tiny["wan"], videos, 6, tmp_path, LearningRateMonitor(),
            accumulate=2, dmd=DMDSettings(student_update_freq=3),
            lr_scheduler=lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
        )  # fmt: skip
    expected = [1e-2 * (1 + math.cos(math.pi * iteration / 6)) / 2 for iteration in range(6)]
    for role in ("student", "fake"):
        assert logged(tmp_path, f"train/{role}_lr") == pytest.approx(expected)
        assert len(logged(tmp_path, f"lr-{role}")) > 3
    states = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert [state["param_groups"][0]["lr"] for state in states] == pytest.approx([0, 0], abs=1e-12)


@pytest.mark.slow(seconds=5)
def test_a_run_goes_on_with_its_schedules_and_its_optimizers_state(
    tiny: dict[str, Path], videos: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "dmd": DMDSettings(student_update_freq=2),
        "student_optimizer": partial(Estimating, lr=0.5),
        "fake_optimizer": ScheduleFree,
        "student_lr_scheduler": partial(sequence, total=8, warm=3),
        "fake_lr_scheduler": partial(ReduceLROnPlateau, monitor="train/fake_loss", patience=0, factor=0.5),
    }
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(tiny["wan"], videos, 8, whole, **settings)
    with pytest.raises(SystemExit):
        fit(tiny["wan"], videos, 8, cut, SendSignal(signal.SIGTERM, 5), **settings)
    fit(tiny["wan"], videos, 8, cut, **settings)
    ends = [read_checkpoint(root / "checkpoints" / "last.ckpt") for root in (whole, cut)]
    for end in ends:
        del end["callbacks"], end["lightning_dfd"]["logs"]  # paths
    assert not [*differences(*ends)]
    groups = [state["param_groups"][0] for state in ends[0]["optimizer_states"]]
    assert [group["k"] for group in groups] == [4, 4]
    for role in ("student", "fake"):
        rates = logged(cut, f"train/{role}_lr")
        assert rates == logged(whole, f"train/{role}_lr")
        assert len(set(rates)) > 3
    with pytest.raises(ValueError, match=r"model\.student_optimizer is AdamW, and the checkpoint's is Estimating"):
        fit(tiny["wan"], videos, 10, cut, **settings | {"student_optimizer": AdamW, "student_lr_scheduler": None})
    options = settings | {"fake_lr_scheduler": partial(ReduceLROnPlateau, monitor="val/score")}
    with pytest.raises(ValueError, match=r"is val/score, which nothing logs; add the callback .*VideoEvaluation"):
        fit(tiny["wan"], videos, 10, cut, **options | {"student_lr_scheduler": partial(sequence, total=12)})


@pytest.mark.slow(seconds=4)
def test_recipes_name_schedules_by_class_or_function(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """And what does not fit is said before the teacher is loaded."""
    wanted = tmp_path / "schedules.yaml"
    cosine = "diffusers.optimization.get_cosine_schedule_with_warmup"
    function = {
        "class_path": cosine,
        "init_args": {"num_warmup_steps": 2, "num_training_steps": "${trainer.max_steps}"},
    }
    wanted.write_text(yaml.safe_dump({"model": {"student_lr_scheduler": function}}))
    words = ["fit", "-c", recipe("wan_dmd2"), "-c", str(wanted), *small(tiny, "wan", videos, tmp_path / "run")]
    key = "--model.student_lr_scheduler.init_args"
    more = ["--model.fake_lr_scheduler", "CosineAnnealingLR", "--model.fake_lr_scheduler.init_args.T_max", "6"]
    cli.main([*words, *more, "--trainer.log_every_n_steps", "1"])
    assert logged(tmp_path / "run", "train/student_lr")[:3] == pytest.approx([0, 2.5e-5, 5e-5])
    assert logged(tmp_path / "run", "train/fake_lr")[::3] == pytest.approx([5e-5, 2.5e-5])
    kept = tmp_path / "run" / "checkpoints" / "config.yaml"
    assert yaml.safe_load(kept.read_text())["model"]["student_lr_scheduler"]["class_path"] == cosine

    monkeypatch.setattr(Backbone, "load_transformer", lambda self: pytest.fail("the teacher was loaded"))
    words += ["--trainer.default_root_dir", str(tmp_path / "other")]
    assert "student_lr_scheduler.init_args.num_training_steps is 5 and trainer.max_steps is 9" in fail(
        capsys, *words, f"{key}.num_training_steps", "5", "--trainer.max_steps", "9"
    )
    assert "model.fake_lr_scheduler: T_max is 6 and trainer.max_steps is 9" in fail(
        capsys, *words, *more, "--trainer.max_steps", "9"
    )
    assert "num_warmupp_steps" in fail(capsys, *words, f"{key}.num_warmupp_steps", "9")
    assert "model.lr_scheduler is of both roles" in fail(capsys, *words, "--model.lr_scheduler", "ConstantLR")
