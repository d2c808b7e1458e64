"""Stopping a run and going on with it as if nothing had happened: what has to agree, logs, signals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dfd.checkpoints import differing, newest_whole, read_checkpoint, remove_checkpoint
from lightning_dfd.loggers import read_rows, write_rows
from lightning_dfd.objectives.terms import Term

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
        "the loss": " + ".join(sorted(_name_of(term) for term in module.terms)),
        "model.seed": module.seed,
    }
    for term in module.terms:
        fixed |= term.facts()
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


def _name_of(term: Term) -> str:
    """The recipe key that brings a term, with the class of one of the user's."""
    return term.key if term.key != Term.key else f"{term.key} {type(term).__qualname__}"


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


def find_checkpoint(trainer: Any, name: str) -> Path | None:
    """The checkpoint that `ckpt_path: last` or `best` means; None if there is no `last` one.

    Raises:
        ValueError: there is no best one.
    """
    return newest_checkpoint(trainer) if name == "last" else best_checkpoint(trainer)


def newest_checkpoint(trainer: Any) -> Path | None:
    """The newest whole checkpoint in the folders of the run's ModelCheckpoints."""
    return newest_whole(_checkpoints(trainer))


def best_checkpoint(trainer: Any) -> Path:
    """The checkpoint with the best value of what a ModelCheckpoint of the run monitors.

    Raises:
        ValueError: nothing is monitored, or no such checkpoint is there.
    """
    wanted = [callback.monitor for callback in trainer.checkpoint_callbacks if getattr(callback, "monitor", None)]
    if not wanted:
        raise ValueError(
            "ckpt_path is best, and no ModelCheckpoint of the recipe has a monitor (val/score, say); take last, or the "
            "path of a checkpoint"
        )
    newest = newest_checkpoint(trainer)
    states = {} if newest is None else read_checkpoint(newest, lazily=True).get("callbacks", {})
    for state in states.values():
        if isinstance(state, Mapping) and state.get("monitor") in wanted and state.get("best_model_path"):
            path = Path(state["best_model_path"])
            if path.exists():
                return path
    raise ValueError(f"ckpt_path is best, and the run has no checkpoint that was rated by {wanted[0]}; take last")


def _checkpoints(trainer: Any) -> set[Path]:
    """Everything that looks like a checkpoint of the run.

    A ModelCheckpoint without a `dirpath` writes to a new folder at every start; then all folders named `checkpoints`
    below `default_root_dir` are searched. What Lightning saves when SLURM requeues a job counts as well.
    """
    root = Path(trainer.default_root_dir)
    found = {*root.glob("hpc_ckpt_*.ckpt")}
    for callback in trainer.checkpoint_callbacks:
        dirpath = getattr(callback, "dirpath", None)
        found |= {*(root.rglob("checkpoints/*.ckpt") if dirpath is None else Path(dirpath).glob("*.ckpt"))}
    return found


# ---- another run in the same folder ---------------------------------------------------------------------------


def refuse_second_run(trainer: Any) -> None:
    """Raise FileExistsError where a new run would write among the checkpoints or logs of an earlier one.

    A run that keeps no checkpoints is not refused, nor one whose ModelCheckpoints have no `dirpath`, as Lightning then
    gives each run its own `version_N`.
    """
    if not _has_fixed_folder(trainer):
        return
    found = sorted(_checkpoints(trainer)) or _logs(trainer)
    if found:
        raise FileExistsError(
            f"{trainer.default_root_dir} holds another run ({found[0].parent.name}/{found[0].name}); go on with it by "
            "--ckpt_path last, write elsewhere by --trainer.default_root_dir, or replace it by --overwrite"
        )


def is_requeued(trainer: Any) -> bool:
    """Whether Lightning will go on by itself from what it saved when SLURM requeued this job."""
    saved = any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
    return saved and SLURMEnvironment.detect() and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def replaced_checkpoints(trainer: Any) -> set[Path]:
    """The checkpoints of an earlier run that `--overwrite` removes."""
    return _checkpoints(trainer) if _has_fixed_folder(trainer) else set()


def remove_run(trainer: Any) -> None:
    """Remove checkpoints and sample videos of the earlier run in a trainer's folder. Its logs stay, as the new run's
    get a folder of their own."""
    for path in replaced_checkpoints(trainer):
        remove_checkpoint(path)
    for sample in Path(trainer.default_root_dir).glob("samples/[0-9]*"):
        if sample.suffix in (".mp4", ".png"):
            sample.unlink()


def _has_fixed_folder(trainer: Any) -> bool:
    """Whether a second run would write its checkpoints to the folder of the first."""
    dirpaths = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return any(dirpath is not None or not trainer.loggers for dirpath in dirpaths)


def _logs(trainer: Any) -> list[Path]:
    """CSV logs of earlier runs, those alone that have rows."""
    folders = [Path(logger.root_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    files = {file for folder in folders for file in (*folder.glob("metrics.csv"), *folder.glob("*/metrics.csv"))}
    return sorted(file for file in files if read_rows(file)[0])


def last_path(trainer: Any) -> Path | None:
    """Where the run keeps its last checkpoint; None if it keeps none that it could go on from."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and not callback.save_weights_only:
            return Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    return None


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


def log_runs(loggers: Sequence[Any]) -> dict[str, str]:
    """The ids of a run at its tracking servers, by logger and project."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return {}
    found = {_server(logger): _run_id(logger) for logger in loggers if isinstance(logger, (WandbLogger, MLFlowLogger))}
    return {server: run for server, run in found.items() if run is not None}


def continue_logs(loggers: Sequence[Any], places: Mapping[str, int], runs: Mapping[str, str]) -> None:
    """Let a resumed run's loggers go on in the folders of `log_places`, the CSV as it was at the checkpoint, and in
    the runs of `log_runs`.

    Lightning's would begin a new `version_N`, and a new run. What TensorBoard got after the checkpoint stays: it is
    logged again, the same. A logger with another folder, name or project, or with its own version or run, is left as it
    is.
    """
    for logger in loggers:
        if isinstance(logger, (WandbLogger, MLFlowLogger)):
            _continue_run(logger, runs.get(_server(logger)))
        if not isinstance(logger, (TensorBoardLogger, CSVLogger)):
            continue
        for place, rows in places.items():
            same_version = logger._version is None or Path(logger.log_dir).resolve() == Path(place)
            if Path(logger.root_dir).resolve() == Path(place).parent and same_version:
                logger._version = Path(place).name
                if isinstance(logger, CSVLogger):
                    _continue_csv(logger, rows)


def _server(logger: Any) -> str:
    kind, field = ("W&B", "_project") if isinstance(logger, WandbLogger) else ("MLflow", "_experiment_name")
    return f"{kind} {getattr(logger, field, None)}"


def _run_id(logger: Any) -> str | None:
    found = logger.version if isinstance(logger, WandbLogger) else logger._run_id
    return None if found is None else str(found)


def _continue_run(logger: Any, run: str | None) -> None:
    """Before the logger asks its server for a run."""
    if run is None or _run_id(logger) is not None:
        return
    if isinstance(logger, WandbLogger):
        logger._id = logger._wandb_init["id"] = run  # with Lightning's resume="allow"
    else:
        logger._run_id = run


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

SAVING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)  # after which a run ends saved
ONE_PRESS = 0.3  # seconds within which further SIGINTs are of one Ctrl-C: launchers pass it on to processes that got it


class Stopped(SIGTERMException):
    """A run was stopped by a signal, at the end of an iteration.

    Attributes:
        saved: whether it can go on from there by `ckpt_path="last"`.
    """

    def __init__(self, number: int, saved: bool) -> None:
        super().__init__(128 + number)
        self.saved = saved


class LeaveInTime(Callback):
    """On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP saves `last.ckpt` at the end of the iteration and ends with 128 + the
    signal's number. A second Ctrl-C ends at once.

    Lightning's own handlers, which these replace while training, stop between the batches of an iteration, end with
    code 0 or lose what was done, and take part in collective operations from within the handler. Its requeueing under
    SLURM is kept, and moved to the end of the iteration. A signal to any one process stops all. Signals that a process
    was started to ignore (nohup) stay ignored. When a run ends by itself, last.ckpt is its end, unless another
    checkpoint is.
    """

    def __init__(self) -> None:
        self._asked = 0  # the signal's number
        self._since = 0.0  # when it came
        self._requeue: Any = None  # what handled SIGUSR1 before: under SLURM, Lightning's requeueing
        self.overwrite = False  # remove an earlier run, as soon as this one is ready to begin

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.overwrite and trainer.is_global_zero:
            remove_run(trainer)
        trainer.strategy.barrier("the earlier run is removed")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.received_sigterm:  # before these handlers were there; nothing has been trained since the start
            raise Stopped(signal.SIGTERM, saved=False)
        if threading.current_thread() is not threading.main_thread():  # where Python lets nobody set handlers
            return
        before = signal.getsignal(signal.SIGUSR1)
        self._requeue = before if callable(before) else None
        note = partial(self._note, trainer)
        for number in SAVING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, note)  # the trainer restores what was there before the run

    def _note(self, trainer: Any, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._asked == signal.SIGINT and now - self._since > ONE_PRESS:
            _leave_at_once(trainer)
        if number == signal.SIGINT and not self._asked:
            rank_zero_info("\nstopping: this iteration is finished and saved; Ctrl-C again leaves at once, unsaved")
        if not self._asked:
            self._asked, self._since = number, now

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if not pl_module.between_iterations:
            return
        asked = self._agreed(trainer)
        if asked:
            saved = self._save(trainer)
            if asked == signal.SIGUSR1 and self._requeue is not None:
                self._requeue(asked, None)
            how = "saved" if saved else "NOT saved"
            rank_zero_info(f"stopped by {signal.Signals(asked).name} after iteration {trainer.global_step}, {how}")
            raise Stopped(asked, saved)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._save_end(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        # A run that was killed between its last two checkpoints has nothing left to train, and no `last.ckpt` of it.
        if trainer.saved_step is None and trainer.ckpt_path is not None:
            self._save_end(trainer)

    def _save_end(self, trainer: Any) -> None:
        if last_path(trainer) is not None and not trainer.fast_dev_run:
            self._save(trainer)

    def _agreed(self, trainer: Any) -> int:
        """The signal that any process got; 0 for none."""
        if trainer.world_size == 1:
            return self._asked
        asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return int(asked)

    def _save(self, trainer: Any) -> bool:
        """Whether the present iteration can be gone on from."""
        path = None if trainer.fast_dev_run else last_path(trainer)
        if path is None:
            rank_zero_warn("the run keeps no checkpoints (there is no ModelCheckpoint), so its end is not saved")
        elif trainer.saved_step != trainer.global_step:
            trainer.save_checkpoint(path)
        return path is not None and trainer.saved_step == trainer.global_step


def _leave_at_once(trainer: Any) -> None:
    """As if nothing handled Ctrl-C, and with the processes that this one started."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
