"""Every option of lightning.Trainer: it works on the endless stream, or is refused in one line; docs/trainer.md says
which."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import callbacks as stock
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_dfd import DistillationModule, DistillationTrainer, VideoDataModule
from lightning_dfd.callbacks import RunHealth, VideoEvaluation
from lightning_dfd.runs.loggers import read_rows
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.options import HIDDEN
from lightning_dfd.training.settings import DMDSettings, StudentSettings

pytestmark = pytest.mark.slow(seconds=3)

ROOT = Path(__file__).parent.parent
READINGS = "lightning_dfd.toy.features.WorldReadings"
ALL = {*inspect.signature(lightning.Trainer.__init__).parameters} - {"self"}
REFUSED: dict[str, list[tuple[Any, str]]] = {  # values that are refused, and what the line has to name
    "accumulate_grad_batches": [(4, "model.accumulate")],
    "gradient_clip_val": [(1.0, "model.gradient_clip"), (0.0, "model.gradient_clip")],
    "gradient_clip_algorithm": [("value", "model.gradient_clip")],
    "barebones": [(True, "trainer.profiler")],
    "sync_batchnorm": [(True, "batch norm")],
    "model_registry": [("mine", "dirpath of ModelCheckpoint")],
    "limit_predict_batches": [(1, "lightning sample"), (0.5, "lightning sample")],
    "max_epochs": [(1, "trainer.max_steps"), (0, "trainer.max_steps")],
    "min_epochs": [(1, "trainer.min_steps")],
    "limit_train_batches": [(1, "trainer.max_steps"), (10, "trainer.max_steps"), (0.5, "trainer.max_steps")],
    "overfit_batches": [(1, "data.folder"), (0.5, "data.folder")],
    "check_val_every_n_epoch": [(2, "trainer.val_check_interval")],
    "reload_dataloaders_every_n_epochs": [(1, "there are no epochs")],
}
OTHERWISE: dict[str, list[tuple[Any, str]]] = {  # of options that work, values that do not
    "val_check_interval": [(0.25, "number of iterations"), (1.0, "number of iterations"), (0, "number of iterations")],
    "max_steps": [(-1, "trainer.max_steps is not set")],
    "precision": [
        *((value, "bf16-mixed") for value in ("bf16-true", "16-true", "64-true", 64, "transformer-engine")),
        ("nonsense", "bf16-mixed"),
    ],
    "plugins": [(HalfPrecision("bf16-true"), "bf16-mixed"), (DoublePrecision(), "bf16-mixed")],
    "strategy": [
        *((name, "fsdp2") for name in ("fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3", "xla")),
        (ModelParallelStrategy(), "fsdp2"),
        ("ddp_find_unused_parameters_false", "take auto"),
        (DDPStrategy(static_graph=True), "take auto"),
        ("nonsense", "invalid strategy"),
    ],
    "callbacks": [
        (stock.GradientAccumulationScheduler({0: 2}), "model.accumulate"),
        (stock.StochasticWeightAveraging(1e-2), "model.student.ema_decay"),
        (stock.EMAWeightAveraging(), "model.student.ema_decay"),
        (stock.BatchSizeFinder(), "data.batch_size"),
        (stock.LearningRateFinder(), "model.student_optimizer"),
        (stock.BackboneFinetuning(), "model.student.mode"),
        (ModelCheckpoint(train_time_interval=timedelta(minutes=1)), "every_n_train_steps"),
    ],
    "profiler": [("xla", "simple"), ("nonsense", "simple")],
    "accelerator": [("gpu", "trainer"), ("nonsense", "trainer")] if not torch.cuda.is_available() else [],
    "devices": [(0, "trainer")],
    "fast_dev_run": [(-1, "trainer")],
}


class Seen(Callback):
    """What happened, by iteration."""

    def __init__(self) -> None:
        self.validated: list[tuple[int, bool]] = []  # iteration, and whether it is done
        self.sanity = self.batches = 0
        self.gradients: list[bool] = []  # whether something was gathered before a validation and is there after it

    def on_validation_batch_end(self, trainer: Any, *args: Any) -> None:
        self.sanity += trainer.sanity_checking

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append((trainer.global_step, pl_module.between_iterations))
            held = any(parameter.grad is not None for parameter in pl_module.parameters())
            self.gradients.append(held != pl_module.between_iterations)


Fit = Callable[..., DistillationTrainer]


@pytest.fixture
def fit(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> Fit:
    """A run of two batches an iteration and a cycle of two, on a CPU, with half of the clips held out."""

    def run(*callbacks: Callback, val_share: float = 0.4, ckpt_path: str | None = None, **options: Any) -> Any:
        data = VideoDataModule(str(videos), frames=9, height=32, width=32, fps=8, val_share=val_share)
        module = DistillationModule(
            str(tiny["wan"]), student=StudentSettings(rank=2), dmd=DMDSettings(student_update_freq=2), accumulate=2,
            max_sequence_length=TEXT_LENGTH,
        )  # fmt: skip
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        defaults = {"max_steps": 4, "default_root_dir": str(tmp_path), "callbacks": list(callbacks)}
        trainer = DistillationTrainer(**(quiet | defaults | options))
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


# ---- the table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REFUSED, *OTHERWISE])
def test_what_cannot_work_is_refused_in_one_line(fit: Fit, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(module: Any) -> None:
        raise AssertionError("the networks were loaded first")

    monkeypatch.setattr(DistillationModule, "configure_model", loaded)
    for value, named in (REFUSED | OTHERWISE)[name]:
        with pytest.raises(ValueError, match=r"^trainer") as refused:
            fit(**{name: value})
        assert named in str(refused.value)
        assert "\n" not in str(refused.value)


WORKING: dict[str, Any] = {  # one run has them all
    "accelerator": "cpu", "strategy": "auto", "devices": 1, "num_nodes": 1, "precision": "bf16-mixed",
    "max_steps": 9, "min_steps": 3, "limit_val_batches": 1, "limit_test_batches": 1, "num_sanity_val_steps": 1,
    "val_check_interval": 2, "log_every_n_steps": 1, "enable_checkpointing": True, "enable_progress_bar": True,
    "enable_model_summary": True, "deterministic": "warn", "benchmark": False, "inference_mode": False,
    "use_distributed_sampler": False, "detect_anomaly": True, "plugins": [], "enable_autolog_hparams": False,
}  # fmt: skip


@pytest.mark.slow(seconds=8)
def test_the_others_work_together(fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen, profiler, logger = Seen(), SimpleProfiler(), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    stop = RunHealth(every=1, stop=True)
    stop.alarms["x"] = "an alarm from the start, which would end the run at once"
    own = {"callbacks": [seen, stop], "profiler": profiler, "logger": logger, "default_root_dir": str(tmp_path)}
    apart = {"fast_dev_run", "max_time"}  # see below
    assert {*WORKING, *own, *apart, *REFUSED} == ALL
    try:
        trainer = fit(**(WORKING | own))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
    assert trainer.global_step == 3  # min_steps against the alarm
    assert seen.sanity == 1
    assert seen.validated == [(2, True), (3, True)]  # at the interval, and at the end that was asked for
    assert trainer.num_val_batches == [1]
    rows, _ = read_rows(Path(logger.log_dir) / "metrics.csv")
    assert {int(row["step"]) for row in rows} == {1, 2, 3}
    assert [int(row["step"]) for row in rows if row["val/student_x0_error"]] == [2, 3]
    assert profiler.recorded_durations["run_training_batch"]
    assert len(profiler.recorded_durations["run_training_batch"]) == 6
    assert (Path(logger.log_dir) / "checkpoints" / "last.ckpt").is_file()
    assert "3/9" in capsys.readouterr().out
    assert trainer.precision == "bf16-mixed"


def test_a_development_run_is_a_turn_of_every_role(fit: Fit, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
    seen = Seen()
    trainer = fit(seen, keep, fast_dev_run=True)
    assert (trainer.global_step, seen.batches) == (2, 4)
    assert {"train/student_loss", "train/fake_loss"} <= {*trainer.lightning_module.journal.latest}
    assert seen.validated == [(2, True)]
    assert not [*tmp_path.rglob("*.ckpt")]
    assert fit(fast_dev_run=3).global_step == 3


def test_time_ends_a_run_and_its_end_is_saved(fit: Fit, tmp_path: Path) -> None:
    trainer = fit(max_steps=-1, max_time=timedelta(seconds=0.5))
    assert trainer.global_step >= 1
    assert trainer.saved_step == trainer.global_step


def test_validation_by_the_clock_keeps_what_an_iteration_has_gathered(fit: Fit) -> None:
    seen = Seen()
    fit(seen, max_steps=2, val_check_interval="00:00:00:00", num_sanity_val_steps=0)
    assert [place for place in seen.validated if not place[1]]  # in the midst of an iteration
    assert all(seen.gradients)


def test_switches_win_over_a_recipes_callbacks(fit: Fit, tmp_path: Path) -> None:
    keep, bar = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1), stock.TQDMProgressBar()
    trainer = fit(keep, bar, max_steps=1, enable_checkpointing=False, enable_progress_bar=False)
    assert trainer.checkpoint_callbacks == []
    assert trainer.progress_bar_callback is None
    assert not [*tmp_path.rglob("*.ckpt")]


@pytest.mark.parametrize("strategy", ["ddp", "auto", DDPStrategy()])
def test_ddp_expects_roles_without_gradients(strategy: Any) -> None:
    trainer = DistillationTrainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._ddp_kwargs["find_unused_parameters"] is True  # noqa: SLF001  Lightning shows it nowhere


def test_the_table_in_the_docs_has_every_option_and_says_which_are_refused() -> None:
    text = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
    assert set(rows) == ALL
    assert {name for name, says in rows.items() if says.startswith("refused")} == {*REFUSED}
    for name, values in REFUSED.items():
        key = values[0][1]
        assert "." not in key or key in rows[name] or name == "model_registry"
    assert {*REFUSED} - {"max_epochs"} == HIDDEN


# ---- callbacks ------------------------------------------------------------------------------------------------


def test_early_stopping_looks_at_values_of_training(fit: Fit) -> None:
    """Of a role's values only at new ones: with a cycle of two, the fake score has one in two iterations."""
    options = {"max_steps": 30, "log_every_n_steps": 1, "val_share": 0.0, "enable_checkpointing": False}
    stopper = EarlyStopping("train/fake_loss", patience=2, min_delta=1e6)
    assert fit(stopper, **options).global_step == 5  # the best at 1, then 3 and 5
    assert stopper.stopping_reason_message is not None
    options["log_every_n_steps"] = 3
    assert fit(EarlyStopping("train/fake_loss", patience=1, min_delta=1e6), **options).global_step == 6
    assert fit(EarlyStopping("train/fake_loss", patience=1, min_delta=1e6), min_steps=8, **options).global_step == 8


def test_a_resumed_run_stops_early_where_the_uninterrupted_one_does(fit: Fit, tmp_path: Path) -> None:
    """A checkpoint holds the look of its own iteration."""
    options = {"max_steps": 30, "log_every_n_steps": 3, "val_share": 0.0}
    folder = tmp_path / "checkpoints"

    def run(ckpt_path: Path | None = None) -> int:
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        stopper = EarlyStopping("train/fake_loss", patience=1, min_delta=1e6)
        return fit(stopper, keep, ckpt_path=ckpt_path and str(ckpt_path), **options).global_step

    assert run() == 6  # the best at 3
    assert run(folder / "step=3.ckpt") == 6


@pytest.mark.slow(seconds=8)
def test_early_stopping_looks_at_evaluations_and_validations(fit: Fit, tmp_path: Path) -> None:
    measure = VideoEvaluation(
        every=1, prompts=2, seeds=2, min_videos=3, real_clips=8, teacher=False, distance=READINGS, diversity=READINGS
    )
    stopper = EarlyStopping("val/saturation", patience=2, min_delta=1e6)
    options = {"max_steps": 12, "enable_checkpointing": False}
    assert fit(measure, stopper, **options).global_step == 3  # the best at 1, then 2 and 3
    stopper = EarlyStopping("val/student_x0_error", patience=1, min_delta=1e6)
    assert fit(stopper, val_check_interval=2, **options).global_step == 4


def test_early_stopping_on_what_nothing_logs_is_refused(fit: Fit) -> None:
    with pytest.raises(ValueError, match=r"EarlyStopping monitors train/nothing.*train/fake_loss.*data\.val_share"):
        fit(EarlyStopping("train/nothing"), val_share=0.0, log_every_n_steps=1)


# ---- the bar --------------------------------------------------------------------------------------------------


def test_the_bar_counts_iterations_also_in_a_resumed_run(fit: Fit, tmp_path: Path) -> None:
    class Pace(Callback):
        def on_train_end(self, trainer: Any, *args: Any) -> None:
            bar = trainer.progress_bar_callback.train_progress_bar
            states.append((bar.n, bar.total, bar.initial))

    states: list[tuple[int, int, int]] = []
    keep = lambda: ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)  # noqa: E731
    fit(keep(), max_steps=2)
    bar = {"enable_progress_bar": True, "callbacks": [keep(), Pace()]}
    trainer = fit(max_steps=4, ckpt_path="last", **bar)
    assert states[-1] == (4, 4, 2)
    shown = trainer.progress_bar_callback.train_progress_bar
    assert "v_num" not in str(shown)
    assert "Epoch" not in str(shown)


def test_a_run_says_nothing_of_other_products(
    fit: Fit, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    fit(max_steps=1, enable_progress_bar=True, enable_model_summary=True, logger=True)
    said = caplog.text + "".join(capfd.readouterr())
    assert "parameters trained: student 2.6 K, fake 2.6 K; frozen" in said
    for word in ("litlogger", "litmodels", "Tip:", "TPU", "FLOPs", "Epoch", "/-2"):
        assert word not in said
