"""EarlyStopping on values that are logged while training, of which Lightning looks at none: there are no epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_dfd.callbacks.common import student_of, undeclared
from lightning_dfd.callbacks.evaluation import VideoEvaluation
from lightning_dfd.training.module import DistillationModule


class StopEarly(Callback):
    """Lets every EarlyStopping of the run look at each new value of what it monitors.

    Values of training (`train/...`) are looked at every `log_every_n_steps` iterations, those of VideoEvaluation
    when it has measured. Where clips are held out, everything else is left to Lightning, which looks after each
    validation. A value that has not been logged anew since the last look does not count against the patience.
    """

    def __init__(self) -> None:
        self._looked = 0  # the iteration of the last look
        self._seen: dict[str, Any] = {}  # of each monitor, what was looked at last

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._looked = trainer.global_step
        evaluated = _evaluated(trainer)
        for stopper in self._ours(trainer):
            if stopper.monitor in evaluated:  # what was measured before the first iteration does not count
                self._seen.setdefault(stopper.monitor, evaluated[stopper.monitor])
            stopper._should_skip_check = _always  # type: ignore[method-assign]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        module = student_of(pl_module)
        step, every = trainer.global_step, max(1, undeclared(trainer).log_every_n_steps)
        if step == self._looked or not module.between_iterations or undeclared(trainer).fast_dev_run:
            return
        self._looked = step
        for stopper in self._ours(trainer):
            name = stopper.monitor
            evaluated = _evaluated(trainer).get(name)
            if evaluated is None and step % every:
                continue
            logged = module.journal.latest.get(name, trainer.callback_metrics.get(name))
            token = logged if evaluated is None else evaluated
            if token is None:
                self._refuse_unknown(trainer, module, stopper)
            elif not _same(token, self._seen.get(name)):
                self._seen[name] = token
                self._look(trainer, stopper)

    def state_dict(self) -> dict[str, Any]:
        seen = {name: token if isinstance(token, int) else float(token) for name, token in self._seen.items()}
        return {"seen": seen} if seen else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = dict(state_dict["seen"])

    def _look(self, trainer: Trainer, stopper: EarlyStopping) -> None:
        before = trainer.should_stop
        stopper._run_early_stopping_check(trainer)
        if trainer.should_stop and not before:
            rank_zero_info(
                f"EarlyStopping ends the run at iteration {trainer.global_step}: {stopper.stopping_reason_message}"
            )

    def _ours(self, trainer: Trainer) -> Iterator[EarlyStopping]:
        """Those that Lightning's validation does not serve."""
        validates = trainer.enable_validation and sum(trainer.num_val_batches) > 0
        evaluated = _evaluated(trainer)
        for callback in undeclared(trainer).callbacks:
            if isinstance(callback, EarlyStopping):
                ours = callback.monitor.startswith("train/") or callback.monitor in evaluated
                if ours or not validates:
                    yield callback

    def _refuse_unknown(self, trainer: Trainer, module: DistillationModule, stopper: EarlyStopping) -> None:
        """Raise ValueError for a value that nothing logs; that of a role may come with its first turn."""
        if not stopper.strict or trainer.global_step < module.dmd.student_update_freq:
            return
        known = sorted({*module.journal.latest, *_evaluated(trainer), *trainer.callback_metrics})
        raise ValueError(
            f"EarlyStopping monitors {stopper.monitor}, which nothing logs in this run; it can be one of "
            f"{', '.join(known)}, or with data.val_share above 0 val/student_x0_error"
        )


def _always(trainer: Trainer) -> bool:
    return True


def _evaluated(trainer: Trainer) -> dict[str, int]:
    """The values of the run's VideoEvaluations, with the iteration at which they were measured."""
    return {
        name: callback.measured_at
        for callback in undeclared(trainer).callbacks
        if isinstance(callback, VideoEvaluation)
        for name in callback.measured
    }


def _same(one: Any, other: Any) -> bool:
    """Whether two looks saw the same value: tensors are new for each value, even an equal one."""
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)
