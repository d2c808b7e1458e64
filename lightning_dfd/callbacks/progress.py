"""What a run shows on the terminal: a bar that counts iterations, and what is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from torch import nn

from lightning_dfd.callbacks.common import student_of
from lightning_dfd.networks.roles import TRAINED

LOG_FILE_INTERVAL = 30.0  # seconds between two states of the bar where it does not go to a terminal


class IterationBar(TQDMProgressBar):
    """One bar for the whole run, in iterations. Lightning's counts batches, and starts at 0 in a resumed run."""

    def init_train_tqdm(self) -> Tqdm:
        trainer: Trainer = self.trainer
        return Tqdm(
            desc="iterations",
            initial=trainer.global_step,  # only what this process does counts for its pace
            total=None if trainer.max_steps < 0 else trainer.max_steps,
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            mininterval=0.1 if sys.stdout.isatty() else LOG_FILE_INTERVAL,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, *_: Any) -> None:
        """The bar is of the run, and goes on."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        bar = self.train_progress_bar
        step = trainer.global_step
        if bar.disable or not student_of(pl_module).between_iterations:
            return
        if not self._should_update(step, trainer.max_steps):
            return
        try:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(step - bar.n)
        except OSError:  # a terminal that was closed; the run goes on, or ends by the signal that comes with it
            bar.disable = True

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class TrainedParts(ModelSummary):
    """Says how many parameters each part has, and which are trained. Lightning's counts FLOPs, of which it finds 0."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = student_of(pl_module)
        parts = {str(role): module.network.parameters_of(role) for role in TRAINED}
        parts |= {name: list(part.parameters()) for name, part in module.term_modules.items()}
        counts = {name: _count(part) for name, part in parts.items()}
        frozen = _count(pl_module.parameters()) - sum(counts.values())
        said = [f"{name} {get_human_readable_count(count).strip()}" for name, count in counts.items()]
        rank_zero_info(
            f"parameters trained: {', '.join(said)}; frozen (teacher and averages): "
            f"{get_human_readable_count(frozen).strip()}"
        )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
