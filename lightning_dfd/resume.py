"""Stopping a run and going on with it as if nothing had happened: what has to agree, logs, signals."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dfd.checkpoints import differing, newest_whole
from lightning_dfd.loggers import read_rows, write_rows

# ---- what has to agree ----------------------------------------------------------------------------------------


def recipe_facts(module: Any) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its recipe: `fixed` makes the run what it is; `exact` merely has to agree for a
    resumed run to be bit-equal. Other keys (rates, scales, lengths, logs) are the user's to change."""
    student, data, trainer = module.student, module.datamodule, module.trainer
    teacher = module.backbone.network_identity()
    dtype = teacher.pop("dtype")
    fixed = {
        "model.teacher": f"{teacher['pipeline']} {_digest(teacher)}",
        "model.student.input": student.input,
        "model.student.ema_decay": "null" if student.ema_decay is None else "a number",
        "model.sampling.steps": [float(step) for step in module.sampling.steps],
        "model.sampling.kind": module.sampling.kind,
        "model.data_forcing.probability": "above 0" if module.data_forcing.probability else "0",
        "model.gan.weight": "above 0" if module.gan.weight else "0",
        "model.seed": module.seed,
    }
    fixed |= student_facts(student, module.backbone.lora_targets)
    exact = {
        "trainer.precision": str(trainer.precision),
        "number of processes": trainer.world_size,
        "model.accumulate": module.accumulate,
        "model.dtype": dtype,
        "model.quantization": str(module.backbone.quantization),
        "model.compile": module.compiled,
    }
    if data is not None:
        fixed["data.frames, height, width"] = [data.size.frames, data.size.height, data.size.width]
        fixed["data.fps"] = data.fps
        fixed["data.seed"] = data.seed
        names = [clip.name for clip in data.clips]
        exact["data.batch_size"] = data.batch_size
        exact["clips"] = f"{len(names)} ({_digest(names)})"
        exact["data.cache"] = "null" if data.cache is None else "a folder"
    return {"fixed": fixed, "exact": exact}


def student_facts(student: Any, own_targets: Sequence[str]) -> dict[str, Any]:
    """What makes a network of the student's weights; `own_targets` are the backbone's."""
    facts = {"model.student.mode": student.mode}
    if student.mode == "full":
        return facts
    targets = list(student.targets or own_targets)
    alpha = student.alpha or student.rank
    return facts | {"model.student.rank": student.rank, "model.student.alpha": alpha, "model.student.targets": targets}


def refuse_other_recipe(own: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError where `recipe_facts` of a run and of the checkpoint to resume from differ in what is fixed;
    warn where the resumed run will merely not be bit-equal."""
    wrong = differing(own["fixed"], given["fixed"])
    if wrong:
        raise ValueError(
            f"the checkpoint is of another recipe: {'; '.join(wrong)}. Resume with the recipe that made it, or begin "
            "a new run with its weights by model.init_from"
        )
    inexact = differing(own["exact"], given["exact"])
    if inexact:
        rank_zero_warn(f"the resumed run will not equal the uninterrupted one bit by bit: {'; '.join(inexact)}")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def rewind(loops: Mapping[str, Any], batches: int) -> None:
    """Take the batches of an unfinished iteration out of a checkpoint's counters: a resumed run does them anew."""
    fit = loops["fit_loop"]
    for counts in (fit["epoch_loop.batch_progress"]["total"], fit["epoch_loop.batch_progress"]["current"]):
        counts.update({name: count - batches for name, count in counts.items()})
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= batches


# ---- which checkpoint -----------------------------------------------------------------------------------------


def newest_checkpoint(trainer: Any) -> Path | None:
    """What `ckpt_path: last` means: the newest whole checkpoint in the folders of the run's ModelCheckpoints.

    One without a `dirpath` writes to a new folder at every start; then all folders named `checkpoints` below
    `default_root_dir` are searched. What Lightning saves when SLURM requeues a job counts as well.
    """
    root = Path(trainer.default_root_dir)
    found = {*root.glob("hpc_ckpt_*.ckpt")}
    for callback in trainer.checkpoint_callbacks:
        dirpath = getattr(callback, "dirpath", None)
        found |= {*(root.rglob("checkpoints/*.ckpt") if dirpath is None else Path(dirpath).glob("*.ckpt"))}
    return newest_whole(found)


def last_path(trainer: Any) -> Path | None:
    """Where the run keeps its last checkpoint; None if it keeps none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            return Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    return None


def _keeps_last(trainer: Any) -> bool:
    return any(getattr(callback, "save_last", None) for callback in trainer.checkpoint_callbacks)


# ---- logs -----------------------------------------------------------------------------------------------------


def log_places(loggers: Sequence[Any]) -> dict[str, int]:
    """The folders of a run's TensorBoard and CSV logs, with the rows of the latter."""
    # rank 0 alone writes, and alone knows the folders
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return {}
    return {
        str(Path(logger.log_dir).resolve()): _rows_of(logger) if isinstance(logger, CSVLogger) else 0
        for logger in loggers
        if isinstance(logger, (TensorBoardLogger, CSVLogger))
    }


def continue_logs(loggers: Sequence[Any], places: Mapping[str, int]) -> None:
    """Let a resumed run's loggers go on in the folders of `log_places`, the CSV as it was at the checkpoint.

    Lightning's would begin a new `version_N`. What TensorBoard got after the checkpoint stays: it is logged again,
    the same. A logger with another folder or name, or a version of its own, is left alone.
    """
    for logger in loggers:
        if not isinstance(logger, (TensorBoardLogger, CSVLogger)):
            continue
        for place, rows in places.items():
            same_version = logger._version is None or Path(logger.log_dir).resolve() == Path(place)
            if Path(logger.root_dir).resolve() == Path(place).parent and same_version:
                logger._version = Path(place).name
                if isinstance(logger, CSVLogger):
                    _continue_csv(logger, rows)


@rank_zero_only
def _continue_csv(logger: CSVLogger, rows: int) -> None:
    """Lightning's writer deletes the file that it finds, so the rows are set aside and put back."""
    path = Path(logger.log_dir) / "metrics.csv"
    aside = path.with_name(".metrics.csv.before_resume")
    if path.is_file() and not aside.is_file():  # else a resume was killed between these lines
        path.rename(aside)
    if not aside.is_file():
        return
    found, columns = read_rows(aside)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")  # says that it will delete them
        writer = logger.experiment
    write_rows(path, found[:rows], columns)
    writer.metrics_keys = columns
    aside.unlink()


def _rows_of(logger: CSVLogger) -> int:
    path = Path(logger.log_dir) / "metrics.csv"
    if not path.is_file():
        return 0
    logger.save()
    return len(read_rows(path)[0])


# ---- signals --------------------------------------------------------------------------------------------------


class LeaveInTime(Callback):
    """On SIGTERM or SIGUSR1 saves `last.ckpt` at the end of the iteration and ends with 128 + the signal's number.

    Lightning's own handlers, which these replace while training, stop between the batches of an iteration, end with
    code 0, and take part in collective operations from within the handler. Its requeueing under SLURM is kept, and
    moved to the end of the iteration. A signal to any one process stops all. When a run ends by itself, last.ckpt
    is its end, whether or not that is a multiple of the interval of saving.
    """

    def __init__(self) -> None:
        self._asked = 0  # the signal's number
        self._requeue: Any = None  # what handled SIGUSR1 before: under SLURM, Lightning's requeueing

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.received_sigterm:  # before these handlers were there; nothing has been trained since the start
            raise SIGTERMException(128 + signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread():  # where Python lets nobody set handlers
            return
        before = signal.getsignal(signal.SIGUSR1)
        self._requeue = before if callable(before) else None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)  # the trainer restores what was there before the run

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not pl_module.between_iterations:
            return
        asked = self._agreed(trainer)
        if asked:
            self._save(trainer)
            if asked == signal.SIGUSR1 and self._requeue is not None:
                self._requeue(asked, None)
            rank_zero_info(f"stopped by {signal.Signals(asked).name} after iteration {trainer.global_step}")
            raise SIGTERMException(128 + asked)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if _keeps_last(trainer) and trainer.saved_step is not None:  # if nothing was saved yet, ModelCheckpoint will
            self._save(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # A run that was killed between its last two checkpoints has nothing left to train, and no `last.ckpt` of it.
        if _keeps_last(trainer) and trainer.saved_step is None and trainer.ckpt_path is not None:
            self._save(trainer)

    def _agreed(self, trainer: Any) -> int:
        """The signal that any process got; 0 for none."""
        if trainer.world_size == 1:
            return self._asked
        asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return int(asked)

    def _save(self, trainer: Any) -> None:
        path = last_path(trainer)
        if path is None:
            rank_zero_warn("the run keeps no checkpoints (there is no ModelCheckpoint), so its end is not saved")
        elif trainer.saved_step != trainer.global_step:
            trainer.save_checkpoint(path)
