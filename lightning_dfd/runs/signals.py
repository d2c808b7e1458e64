"""Ctrl-C and signals end a run saved, between two iterations."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.runs.folder import last_path, remove_run

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


@runtime_checkable
class Saving(Protocol):
    """A DistillationTrainer, which knows what it has saved."""

    saved_step: int | None  # iteration of the last checkpoint that was written; None before the first
    fast_dev_run: int | bool


@runtime_checkable
class Iterating(Protocol):
    """A DistillationModule, whose iterations may have several batches."""

    @property
    def between_iterations(self) -> bool: ...

    def go_on(self) -> None: ...


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
        # the earlier handler of SIGUSR1: under SLURM, Lightning's requeueing
        self._requeue: Callable[[int, FrameType | None], Any] | None = None
        self.overwrite = False  # remove an earlier run, as soon as this one is ready to begin

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.overwrite and Ranks.of(trainer).is_first:
            remove_run(trainer)
        trainer.strategy.barrier("the earlier run is removed")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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

    def _note(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._asked == signal.SIGINT and now - self._since > ONE_PRESS:
            _leave_at_once(trainer)
        if number == signal.SIGINT and not self._asked:
            rank_zero_info("\nstopping: this iteration is finished and saved; Ctrl-C again leaves at once, unsaved")
        if not self._asked:
            self._asked, self._since = number, now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if isinstance(pl_module, Iterating) and not pl_module.between_iterations:
            return
        asked = self._agreed(trainer)
        if asked:
            saved = self._save(trainer)
            if asked == signal.SIGUSR1 and self._requeue is not None:
                self._requeue(asked, None)
            how = "saved" if saved else "NOT saved"
            rank_zero_info(f"stopped by {signal.Signals(asked).name} after iteration {trainer.global_step}, {how}")
            raise Stopped(asked, saved)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_end(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was killed between its last two checkpoints has nothing left to train, and no `last.ckpt` of it.
        if _saved_step(trainer) is None and trainer.ckpt_path is not None:
            if isinstance(pl_module, Iterating):
                pl_module.go_on()  # as nothing was trained, it has not been done
            self._save_end(trainer)

    def _save_end(self, trainer: Trainer) -> None:
        if _end_path(trainer) is not None:
            self._save(trainer)

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any process got; 0 for none."""
        return Ranks.of(trainer).largest(self._asked, trainer.strategy.root_device)

    def _save(self, trainer: Trainer) -> bool:
        """Whether the present iteration can be gone on from."""
        path = _end_path(trainer)
        if path is None:
            rank_zero_warn("the run keeps no checkpoints (there is no ModelCheckpoint), so its end is not saved")
        elif _saved_step(trainer) != trainer.global_step:
            trainer.save_checkpoint(path)
        return path is not None and _saved_step(trainer) == trainer.global_step


def _saved_step(trainer: Trainer) -> int | None:
    return trainer.saved_step if isinstance(trainer, Saving) else None


def _end_path(trainer: Trainer) -> Path | None:
    """Where the end of the run is saved; None if it is not."""
    return None if isinstance(trainer, Saving) and trainer.fast_dev_run else last_path(trainer)


def _leave_at_once(trainer: Trainer) -> None:
    """As if nothing handled Ctrl-C, and with the processes that this one started."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
