"""The folder of a run: which checkpoints it holds, and how a second run there is refused or replaces it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dfd.runs.checkpoints import newest_whole, read_checkpoint, remove_checkpoint
from lightning_dfd.runs.loggers import read_rows

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
