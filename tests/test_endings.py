"""Ends that lose no work: Ctrl-C, a second run in the folder of a first, and ends that cannot be saved."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dfd import DistillationModule, DistillationTrainer, VideoDataModule
from lightning_dfd.callbacks import VideoSamples
from lightning_dfd.cli import errors, program, recipes
from lightning_dfd.cli import main as cli
from lightning_dfd.runs import folder, signals
from lightning_dfd.runs.checkpoints import read_checkpoint
from lightning_dfd.runs.folder import newest_checkpoint
from lightning_dfd.runs.signals import LeaveInTime, Stopped
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.settings import StudentSettings


class Run:
    """Runs in one folder, with a checkpoint at every second iteration and last.ckpt."""

    def __init__(self, teacher: Path, videos: Path, root: Path) -> None:
        self.teacher, self.videos, self.root = teacher, videos, root
        self.init_from: str | None = None

    def trainer(self, steps: int, *callbacks: Callback, **options: Any) -> DistillationTrainer:
        keep = {"every_n_train_steps": 2, "save_last": True, "enable_version_counter": False}
        keep |= options.pop("keep", {})
        defaults: dict[str, Any] = {
            "logger": CSVLogger(self.root, name="metrics", flush_logs_every_n_steps=1), "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(self.root),
            "callbacks": [*callbacks, ModelCheckpoint(self.root / "checkpoints", filename="{step}", **keep)],
        }  # fmt: skip
        return DistillationTrainer(max_steps=steps, accelerator="cpu", **(defaults | options))

    def fit(self, steps: int, *callbacks: Callback, **options: Any) -> DistillationTrainer:
        words = {name: options.pop(name) for name in ("ckpt_path", "overwrite") if name in options}
        workers, accumulate = options.pop("workers", 0), options.pop("accumulate", 1)
        data = VideoDataModule(str(self.videos), frames=9, height=32, width=32, fps=8, num_workers=workers)
        module = DistillationModule(
            str(self.teacher), student=StudentSettings(rank=2), max_sequence_length=TEXT_LENGTH,
            init_from=self.init_from, accumulate=accumulate,
        )  # fmt: skip
        trainer = self.trainer(steps, *callbacks, **options)
        trainer.fit(module, datamodule=data, **words)
        return trainer

    @property
    def saved(self) -> dict[str, int]:
        """The iterations of the checkpoints that are there."""
        files = (self.root / "checkpoints").glob("*.ckpt")
        return {file.stem: read_checkpoint(file)["global_step"] for file in files}


@pytest.fixture
def run(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> Run:
    return Run(tiny["wan"], videos, tmp_path / "run")


# ---- a second run ---------------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=5)
def test_a_second_run_is_refused_with_three_ways_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.fit(3, VideoSamples(every=9, prompts=1, seeds=[0], teacher_steps=1))
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError) as refused:
        run.fit(1)
    said = errors.one_line_of(refused.value) or ""
    for way in ("holds another run (checkpoints/", "--ckpt_path last", "--trainer.default_root_dir", "--overwrite"):
        assert way in said
    run.fit(1, fast_dev_run=True)  # keeps nothing, and so may
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="--overwrite begins a new run and --ckpt_path goes on"):
        run.fit(1, overwrite=True, ckpt_path="last")
    run.init_from = str(run.root / "checkpoints" / "last.ckpt")
    with pytest.raises(ValueError, match=r"--overwrite would remove .*last\.ckpt, which model\.init_from starts from"):
        run.fit(1, overwrite=True)
    run.init_from = None
    trainer = run.fit(1, overwrite=True)
    assert run.saved == {"last": 1}
    assert newest_checkpoint(trainer) == run.root / "checkpoints" / "last.ckpt"
    assert not [*run.root.glob("samples/*")]
    assert len([*run.root.glob("metrics/*/metrics.csv")]) == 2  # logs stay, each in its folder
    assert run.fit(3, ckpt_path="last").global_step == 3
    for file in (run.root / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(FileExistsError, match=r"holds another run \(version_\d/metrics\.csv\)"):
        run.fit(1)
    assert run.fit(1, ckpt_path="last").global_step == 1  # a job that was killed before its first checkpoint


def test_an_overwrite_that_fails_to_load_removes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.fit(2)

    def no_memory(module: Any) -> None:
        raise MemoryError("while loading")

    monkeypatch.setattr(DistillationModule, "configure_model", no_memory)
    with pytest.raises(MemoryError):
        run.fit(1, overwrite=True)
    assert run.saved == {"last": 2, "step=2": 2}


def test_a_requeued_job_goes_on_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.root / "hpc_ckpt_1.ckpt").parent.mkdir()
    (run.root / "hpc_ckpt_1.ckpt").touch()
    for name, value in (("SLURM_NTASKS", "1"), ("SLURM_JOB_NAME", "train"), ("SLURM_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    trainer = SimpleNamespace(default_root_dir=str(run.root))
    assert folder.is_requeued(trainer)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert not folder.is_requeued(trainer)


# ---- which checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.slow(seconds=2)
def test_best_is_the_one_that_the_monitor_rates_best(run: Run) -> None:
    keep = {"monitor": "step_wise", "mode": "max", "every_n_train_steps": 1, "save_top_k": 2}

    class Began(Callback):
        at: ClassVar[list[int]] = []

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.at.append(trainer.global_step)

    class Rate(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.log("step_wise", {1: 1.0, 2: 9.0, 3: 2.0}[trainer.global_step])

    trainer = run.fit(3, Rate(), keep=keep)
    best = run.root / "checkpoints" / "step=2.ckpt"
    assert folder.find_checkpoint(trainer, "best") == str(best)
    began = Began()
    run.fit(3, Rate(), began, keep=keep, ckpt_path="best")
    assert began.at == [2]
    with pytest.raises(
        ValueError, match=r"no ModelCheckpoint of the recipe has a monitor \(val/score, say\); take last"
    ):
        run.fit(3, ckpt_path="best")


def test_a_checkpoint_that_is_not_there_is_said_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DistillationModule, "configure_model", lambda self: pytest.fail("the networks were loaded"))
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path is '/nowhere\.ckpt': there is no such file or folder"):
        run.fit(1, ckpt_path="/nowhere.ckpt")
    module = DistillationModule(str(run.teacher), max_sequence_length=TEXT_LENGTH)
    data = VideoDataModule(str(run.videos), frames=9, height=32, width=32, val_share=0.4)
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path is '/nowhere\.ckpt'"):
        run.trainer(1).validate(module, datamodule=data, ckpt_path="/nowhere.ckpt")


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------


class Interrupt(Callback):
    """Ctrl-C in a terminal: every process gets it, those that load clips included."""

    def __init__(self) -> None:
        self.workers = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1 and pl_module.between_iterations:
            for process in multiprocessing.active_children():
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGINT)
                    self.workers += 1
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # by the launcher, at once


def test_ctrl_c_saves_though_workers_get_it_too(run: Run) -> None:
    interrupt = Interrupt()
    with pytest.raises(Stopped) as stop:
        run.fit(9, interrupt, workers=1, accumulate=8)  # more batches than are loaded ahead
    assert interrupt.workers == 1
    assert (stop.value.code, stop.value.saved) == (130, True)
    assert run.saved["last"] == 2


def test_a_second_ctrl_c_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    launcher = SimpleNamespace(kill=killed.append)
    trainer: Any = SimpleNamespace(received_sigterm=False, strategy=SimpleNamespace(launcher=launcher))
    clock = iter((10.0, 10.1, 12.0))
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: killed.append((pid, number)))
    before = {number: signal.getsignal(number) for number in signals.SAVING}
    LeaveInTime().on_train_start(trainer, None)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert killed == []
        signal.raise_signal(signal.SIGINT)
        assert killed == [signal.SIGKILL, (os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_while_loading_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(DistillationModule, "configure_model", interrupted)
    with pytest.raises(SystemExit) as stop:
        run.fit(1)
    assert stop.value.code == 130
    signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(program, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit"])
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "lightning: stopped by Ctrl-C"


@pytest.mark.slow(seconds=2)
def test_ctrl_c_while_python_imports_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "lightning_dfd", "fit"], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith("torch._utils"):
            process.send_signal(signal.SIGINT)
            break
    said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == 130
    assert "".join(said).strip() == ""


def test_the_command_to_go_on_is_the_one_that_was_given(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stopped(*arguments: Any) -> None:
        raise Stopped(signal.SIGINT, saved=True)

    monkeypatch.setattr(program, "run", stopped)
    monkeypatch.setattr(sys, "argv", ["/venv/bin/lightning"])
    words = ["fit", "--overwrite", "--data.folder", "my videos", "--ckpt_path", "a.ckpt", "--trainer.max_steps=9"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert "go on with: lightning fit --data.folder 'my videos' --trainer.max_steps=9 --ckpt_path last" in said
    monkeypatch.setattr(sys, "argv", ["/venv/lightning_dfd/__main__.py"])
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "go on with: python -m lightning_dfd fit --data.folder 'my videos' --" in capsys.readouterr().err
    assert recipes.to_go_on(["fit", "--overwrite", "true", "--ckpt_path=x"]) == ["fit", "--ckpt_path", "last"]
    assert recipes.bare_flags(["fit", "--overwrite", "-c", "a"]) == ["fit", "--overwrite=true", "-c", "a"]
    assert recipes.bare_flags(["fit", "--overwrite", "false"]) == ["fit", "--overwrite", "false"]


# ---- ends that cannot be saved --------------------------------------------------------------------------------


class Fill(Callback):
    """From an iteration on, no file of this process may grow beyond some bytes."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.iteration:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.filterwarnings("ignore:THE CHECKPOINT")
def test_an_end_that_cannot_be_saved_is_an_error(run: Run) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            RuntimeError, match=r"ended at iteration 1, .* could not be written \(there is no earlier one\)"
        ):
            run.fit(1, Fill(0))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        with pytest.raises(RuntimeError, match=r"ended at iteration 3, .* \(the last is of 2\); make room and go on"):
            run.fit(3, Fill(2), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.saved == {"last": 2, "step=2": 2}


@pytest.mark.parametrize("save_last", [None, True])
def test_the_end_is_saved_between_two_checkpoints(run: Run, save_last: bool | None) -> None:
    run.fit(3, keep={"save_last": save_last})
    assert run.saved["last"] == 3
