"""The folder of a run: which checkpoints it holds, and how a second run there is refused or replaces it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dfd.runs.checkpoints import newest_whole, read_checkpoint, remove_checkpoint
from lightning_dfd.runs.loggers import read_rows


class Run(Protocol):
    """A Trainer, as far as its folder is concerned."""

    @property
    def default_root_dir(self) -> str: ...

    @property
    def checkpoint_callbacks(self) -> Sequence[Checkpoint]: ...

    @property
    def loggers(self) -> Sequence[Logger]: ...


# ---- which checkpoint -----------------------------------------------------------------------------------------


def find_checkpoint(run: Run, ckpt_path: str | Path | None) -> str | None:
    """The path of a checkpoint, with `last` and `best` looked up in the run's folder; None for none, and for `last`
    where there is no checkpoint.

    Raises:
        ValueError: it is empty, no checkpoint can be read, or there is no best one; or it is a name of Lightning's, for
            folders that are not ours.
    """
    if ckpt_path is None:
        return None
    name = str(ckpt_path)
    if not name or name == "hpc" or name.startswith("registry:"):
        raise ValueError(f"ckpt_path is {name!r}; give a checkpoint's path, last, best, or null for none")
    if name not in ("last", "best"):
        return name
    found = newest_checkpoint(run) if name == "last" else best_checkpoint(run)
    damaged = sorted(_checkpoints(run)) if found is None else []
    if damaged:
        raise ValueError(
            f"ckpt_path is last, and none of the run's checkpoints can be read ({damaged[0]} and so on); name another "
            "run's, or begin anew by --overwrite without --ckpt_path"
        )
    return None if found is None else str(found)


def require_checkpoint(run: Run, ckpt_path: str | Path | None) -> str | None:
    """As `find_checkpoint`; raises FileNotFoundError for `last` where there is no checkpoint."""
    found = find_checkpoint(run, ckpt_path)
    if found is None and ckpt_path is not None:
        raise FileNotFoundError("ckpt_path is last, and the recipe's run has no whole checkpoint; name one")
    return found


def first_look(ckpt_path: str | Path | None) -> dict[str, Any]:
    """A checkpoint's content, read lazily; empty for none and for an address.

    Raises as `read_checkpoint`: before the networks are loaded, which takes minutes.
    """
    return {} if ckpt_path is None or "://" in str(ckpt_path) else read_checkpoint(ckpt_path, lazily=True)


def newest_checkpoint(run: Run) -> Path | None:
    """The newest whole checkpoint in the folders of the run's ModelCheckpoints."""
    return newest_whole(_checkpoints(run))


def best_checkpoint(run: Run) -> Path:
    """The checkpoint with the best value of what a ModelCheckpoint of the run monitors.

    Raises:
        ValueError: nothing is monitored, or no such checkpoint is there.
    """
    kept = [callback for callback in run.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    wanted = [callback.monitor for callback in kept if callback.monitor]
    if not wanted:
        raise ValueError(
            "ckpt_path is best, and no ModelCheckpoint of the recipe has a monitor (val/score, say); take last, or the "
            "path of a checkpoint"
        )
    newest = newest_checkpoint(run)
    states = {} if newest is None else read_checkpoint(newest, lazily=True).get("callbacks", {})
    for state in states.values():
        if isinstance(state, Mapping) and state.get("monitor") in wanted and state.get("best_model_path"):
            path = Path(state["best_model_path"])
            if path.exists():
                return path
    raise ValueError(f"ckpt_path is best, and the run has no checkpoint that was rated by {wanted[0]}; take last")


def _checkpoints(run: Run) -> set[Path]:
    """Everything that looks like a checkpoint of the run.

    A ModelCheckpoint without a `dirpath` writes to a new folder at every start; then all folders named `checkpoints`
    below `default_root_dir` are searched. What Lightning saves when SLURM requeues a job counts as well.
    """
    root = Path(run.default_root_dir)
    found = {*root.glob("hpc_ckpt_*.ckpt")}
    for callback in run.checkpoint_callbacks:
        dirpath = getattr(callback, "dirpath", None)
        found |= {*(root.rglob("checkpoints/*.ckpt") if dirpath is None else Path(dirpath).glob("*.ckpt"))}
    return found


# ---- another run in the same folder ---------------------------------------------------------------------------


def refuse_second_run(run: Run) -> None:
    """Raise FileExistsError where a new run would write among the checkpoints or logs of an earlier one.

    A run that keeps no checkpoints is not refused, nor one whose ModelCheckpoints have no `dirpath`, as Lightning then
    gives each run its own `version_N`.
    """
    if not _has_fixed_folder(run):
        return
    found = sorted(_checkpoints(run)) or _logs(run)
    if found:
        raise FileExistsError(
            f"{run.default_root_dir} holds another run ({found[0].parent.name}/{found[0].name}); go on with it by "
            "--ckpt_path last, write elsewhere by --trainer.default_root_dir, or replace it by --overwrite"
        )


def may_overwrite(run: Run, init_from: str | None) -> None:
    """Raise ValueError where `--overwrite` would remove the checkpoint that the new run starts from."""
    if init_from is not None and Path(init_from).resolve() in {path.resolve() for path in replaced_checkpoints(run)}:
        raise ValueError(
            f"--overwrite would remove {init_from}, which model.init_from starts from; set another "
            "--trainer.default_root_dir"
        )


def is_requeued(run: Run) -> bool:
    """Whether Lightning will go on by itself from what it saved when SLURM requeued this job."""
    saved = any(Path(run.default_root_dir).glob("hpc_ckpt_*.ckpt"))
    return saved and SLURMEnvironment.detect() and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def replaced_checkpoints(run: Run) -> set[Path]:
    """The checkpoints of an earlier run that `--overwrite` removes."""
    return _checkpoints(run) if _has_fixed_folder(run) else set()


def remove_run(run: Run) -> None:
    """Remove checkpoints and sample videos of the earlier run in a trainer's folder. Its logs stay, as the new run's
    get a folder of their own."""
    for path in replaced_checkpoints(run):
        remove_checkpoint(path)
    for sample in Path(run.default_root_dir).glob("samples/[0-9]*"):
        if sample.suffix in (".mp4", ".png"):
            sample.unlink()


def _has_fixed_folder(run: Run) -> bool:
    """Whether a second run would write its checkpoints to the folder of the first."""
    dirpaths = [getattr(callback, "dirpath", None) for callback in run.checkpoint_callbacks]
    return any(dirpath is not None or not run.loggers for dirpath in dirpaths)


def _logs(run: Run) -> list[Path]:
    """CSV logs of earlier runs, those alone that have rows."""
    folders = [Path(logger.root_dir) for logger in run.loggers if isinstance(logger, CSVLogger)]
    files = {file for folder in folders for file in (*folder.glob("metrics.csv"), *folder.glob("*/metrics.csv"))}
    return sorted(file for file in files if read_rows(file)[0])


def last_path(run: Run) -> Path | None:
    """Where the run keeps its last checkpoint; None if it keeps none that it could go on from."""
    for callback in run.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None and not callback.save_weights_only:
            return Path(callback.dirpath) / f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    return None
