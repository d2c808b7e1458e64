"""Runs that are killed: checkpoints are whole or not there, and a resumed run equals the uninterrupted one."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open

from lightning_dfd import DistillationModule, DistillationTrainer
from lightning_dfd.callbacks import RunHealth, VideoEvaluation, VideoSamples
from lightning_dfd.data import VideoDataModule
from lightning_dfd.runs.checkpoints import CheckpointFiles, newest_whole, read_checkpoint
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.facts import refuse_other_recipe
from lightning_dfd.training.settings import DataForcingSettings, DMDSettings, SamplingSettings, StudentSettings
from tests.faults.kills import differences

ROOT = Path(__file__).parent.parent
READINGS = "lightning_dfd.toy.features.WorldReadings"


@contextmanager
def full_disk(limit: int = 1000) -> Iterator[None]:
    """No file of this process can grow beyond `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(step: int) -> dict[str, Any]:
    weights = torch.arange(5000.0) + step
    return {"global_step": step, "state_dict": {"a": weights, "b": weights.view(50, 100).T}, "lightning_dfd": {}}


def fit(teacher: Path, videos: Path, steps: int, root: Path, *callbacks: Callback, **options: Any) -> Any:
    """A run with everything that has a state, which goes on if there is one in `root`; returns its trainer."""
    data = VideoDataModule(str(videos), frames=9, height=32, width=32, fps=8, batch_size=options.pop("batch_size", 2))
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    defaults: dict[str, Any] = {"student": StudentSettings(rank=4, ema_decay=0.9), "max_sequence_length": TEXT_LENGTH}
    defaults |= {"student_optimizer": optimizer, "fake_optimizer": optimizer}
    module = DistillationModule(str(teacher), **(defaults | options))
    keep = ModelCheckpoint(
        root / "checkpoints", filename="{step}", every_n_train_steps=2, save_last=True, enable_version_counter=False
    )
    trainer = DistillationTrainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", default_root_dir=str(root), callbacks=[*callbacks, keep],
        logger=CSVLogger(root, name="metrics", flush_logs_every_n_steps=1), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path="last")
    return trainer


# ---- files ----------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    files, first, second, last = CheckpointFiles(), *(tmp_path / f"{name}.ckpt" for name in ("1", "2", "last"))
    files.save_checkpoint(content(1), first)
    files.save_checkpoint(content(1), last)
    with full_disk(), pytest.warns(UserWarning, match=r"2\.ckpt COULD NOT BE WRITTEN \(.*File too large"):
        files.save_checkpoint(content(2), second)
    files.remove_checkpoint(first)  # as ModelCheckpoint does, which believes that the second is there
    with full_disk(), pytest.warns(UserWarning, match=r"last\.ckpt COULD NOT BE WRITTEN"):
        files.save_checkpoint(content(2), last)
    assert files.failed == {2}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "1.ckpt",
        "1.safetensors",
        "last.ckpt",
        "last.safetensors",
    ]
    assert read_checkpoint(last)["global_step"] == 1
    files.save_checkpoint(content(3), last)
    assert files.failed == set()
    assert not first.exists()  # its removal was only put off


def test_the_copy_is_of_its_checkpoint_and_goes_with_it(tmp_path: Path) -> None:
    files, path = CheckpointFiles(), tmp_path / "x.ckpt"
    (tmp_path / ".x.ckpt.123.tmp").write_bytes(b"of a process that was killed while it wrote")
    files.save_checkpoint(content(7), path)
    with safe_open(tmp_path / "x.safetensors", "pt") as copy:
        assert copy.metadata() == {"iteration": "7"}
        assert torch.equal(copy.get_tensor("b"), content(7)["state_dict"]["b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.ckpt", "x.safetensors"]
    files.remove_checkpoint(path)
    assert not [*tmp_path.iterdir()]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    files, paths = CheckpointFiles(), [tmp_path / f"{step}.ckpt" for step in (9, 5, 6, 7)]
    assert newest_whole(paths) is None
    for step, path in enumerate(paths):
        files.save_checkpoint(content(step), path)
        os.utime(path, (step, step))
    os.truncate(paths[3], paths[3].stat().st_size - 100)
    torch.save({"state_dict": {}}, paths[2])
    os.utime(paths[3], (9, 9))
    os.utime(paths[2], (8, 8))
    with pytest.warns(UserWarning, match="passed over") as warned:
        assert newest_whole(paths) == paths[1]
    said = [str(one.message) for one in warned]
    assert any("7.ckpt is damaged, cut short" in text for text in said)
    assert any("6.ckpt is not a checkpoint of this package" in text for text in said)


@pytest.mark.slow(seconds=2)
def test_a_run_that_was_killed_before_its_last_save_gets_it(
    tiny: dict[str, Path], videos: Path, tmp_path: Path
) -> None:
    falling = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)}
    fit(tiny["wan"], videos, 4, tmp_path, **falling)
    last, end = tmp_path / "checkpoints" / "last.ckpt", tmp_path / "checkpoints" / "step=4.ckpt"
    last.unlink()
    fit(tiny["wan"], videos, 4, tmp_path, **falling)
    saved, expected = read_checkpoint(last), read_checkpoint(end)
    assert [*differences(saved["state_dict"], expected["state_dict"])] == []
    assert [*differences(saved["optimizer_states"], expected["optimizer_states"])] == []
    assert [*differences(saved["loops"], expected["loops"])] == []
    assert saved["lr_schedulers"][0]["last_epoch"] == 4
    assert [*differences(saved["lr_schedulers"], expected["lr_schedulers"])] == []


# ---- what has to agree ----------------------------------------------------------------------------------------


def test_another_recipe_is_refused_by_its_keys(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    fit(tiny["wan"], videos, 2, tmp_path)
    other = {"seed": 3, "sampling": SamplingSettings(steps=[1.0]), "gradient_clip": 1.0}
    with pytest.raises(ValueError, match="of another recipe") as refused:
        fit(tiny["wan"], videos, 4, tmp_path, batch_size=1, **other)
    said = str(refused.value)
    assert "model.sampling.steps is [0.999, 0.937, 0.833, 0.624] there and [1.0] here" in said
    assert "model.seed is 0 there and 3 here" in said
    assert "gradient_clip" not in said
    assert "batch_size" not in said  # which goes with the number of processes
    fit(tiny["cogvideox"], videos, 1, tmp_path / "b")
    with pytest.raises(ValueError, match=r"model\.teacher is CogVideoXPipeline \w+ there and CogVideoXPipeline \w+ he"):
        fit(tiny["other"], videos, 2, tmp_path / "b")


def test_what_only_costs_bit_equality_is_warned_of() -> None:
    one, two = ({"fixed": {"model.seed": 0}, "exact": {"number of processes": number}} for number in (1, 2))
    with pytest.warns(UserWarning, match="bit by bit: number of processes is 1 there and 2 here"):
        refuse_other_recipe(two, one)


# ---- runs -----------------------------------------------------------------------------------------------------


class SendSignal(Callback):
    """Sends this process a signal in the course of an iteration."""

    def __init__(self, number: int, iteration: int) -> None:
        self.number, self.iteration = number, iteration

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step + 1 == self.iteration and pl_module.between_iterations:
            os.kill(os.getpid(), self.number)


@pytest.fixture(
    params=[
        signal.SIGTERM,
        signal.SIGINT,
        *(pytest.param(number, marks=pytest.mark.slow(seconds=1)) for number in (signal.SIGUSR1, signal.SIGHUP)),
    ]
)
def number(request: pytest.FixtureRequest) -> Iterator[int]:
    """A signal that this process heeds, though jobs in the background and nohup ignore some."""
    ours = signal.default_int_handler if request.param == signal.SIGINT else signal.SIG_DFL
    theirs = signal.signal(request.param, ours)
    yield request.param
    signal.signal(request.param, theirs)


def test_a_signal_ends_the_run_after_the_iteration(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        fit(tiny["wan"], videos, 5, tmp_path, SendSignal(number, 3), accumulate=2)
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_a_run_that_a_signal_ended_goes_on(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(tiny["wan"], videos, 3, tmp_path, SendSignal(signal.SIGTERM, 1), accumulate=2)
    trainer = fit(tiny["wan"], videos, 3, tmp_path, accumulate=2)
    assert trainer.global_step == 3
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 3  # no multiple of 2


@pytest.mark.slow(seconds=3)
def test_an_iteration_that_was_half_done_is_done_anew(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """ModelCheckpoint may save between the batches of an iteration: nothing of it may count twice."""

    class SaveInside(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 1 and not pl_module.between_iterations:
                trainer.save_checkpoint(tmp_path / "cut" / "checkpoints" / "half.ckpt")

    options: dict[str, Any] = {"accumulate": 3, "dmd": DMDSettings(student_update_freq=2)}
    fit(tiny["wan"], videos, 3, tmp_path / "whole", SaveInside(), **options)
    assert fit(tiny["wan"], videos, 3, tmp_path / "cut", **options).global_step == 3
    ends = [read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "cut")]
    for end in ends:
        del end["callbacks"], end["lightning_dfd"]["logs"]  # paths
    assert not [*differences(*ends)]


def logged(root: Path) -> list[dict[str, str]]:
    (file,) = (root / "metrics").rglob("metrics.csv")  # one folder, however often the run was resumed
    with file.open(encoding="utf-8") as rows:
        return [{key: row[key] for key in sorted(row) if key != "train/samples_per_s"} for row in csv.DictReader(rows)]


@pytest.mark.slow(seconds=4)
def test_logs_looks_and_alarms_go_on(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """An evaluation, samples or an alarm of a resumed run are those of the uninterrupted one, none twice."""

    def looks(*more: Callback) -> list[Callback]:
        evaluation = VideoEvaluation(
            every=2, prompts=2, seeds=2, min_videos=4, real_clips=8, teacher_steps=2, distance=READINGS,
            diversity=READINGS, statistics=str(tmp_path / "statistics"),
        )  # fmt: skip
        samples = VideoSamples(every=2, prompts=1, seeds=[0], teacher_steps=2)
        return [*more, RunHealth(every=1, fake_rise=0.01), evaluation, samples]

    settings: dict[str, Any] = {"data_forcing": DataForcingSettings(0.5)}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(tiny["cogvideox"], videos, 4, whole, *looks(), **settings)
    with pytest.raises(SystemExit):
        fit(tiny["cogvideox"], videos, 4, cut, *looks(SendSignal(signal.SIGTERM, 3)), **settings)
    file = next(cut.rglob("metrics.csv"))
    file.write_text(file.read_text() + file.read_text().splitlines()[-1] + "\n")  # logged after the checkpoint
    shown = {path.name: path.stat().st_mtime_ns for path in (cut / "samples").iterdir()}
    fit(tiny["cogvideox"], videos, 4, cut, *looks(), **settings)
    assert logged(cut) == logged(whole)
    assert {name: (cut / "samples" / name).stat().st_mtime_ns for name in shown} == shown
    assert [int(row["step"]) for row in logged(cut) if row["val/score"]] == [0, 2, 4]
    ends = [read_checkpoint(root / "checkpoints" / "last.ckpt") for root in (whole, cut)]
    states = [[value for key, value in end["callbacks"].items() if "ModelCheckpoint" not in key] for end in ends]
    assert len(states[0]) == 3
    assert not [*differences(*states)]


@pytest.mark.slow(seconds=2)
def test_a_disk_that_stays_full_ends_the_run(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with (
            pytest.raises(RuntimeError, match="3 iterations in a row"),
            pytest.warns(UserWarning, match="COULD NOT BE WRITTEN"),
        ):
            fit(tiny["wan"], videos, 20, tmp_path, Fill())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {read_checkpoint(path)["global_step"] for path in (tmp_path / "checkpoints").glob("*.ckpt")} == {2}


@pytest.mark.slow(seconds=19)
def test_random_kills_change_nothing(tmp_path: Path) -> None:
    """The tool of docs/resume.md with two SIGKILLs and a SIGTERM, with workers."""
    words = ["--kills", "3", "--variants", "lora, 2 workers", "--output", str(tmp_path / "kills")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "kills" / "kills.json").read_text())
    assert (report["runs"], report["bit_equal"], report["lost"]) == (1, 1, 0)
    assert report["kills"] >= 1
