"""The record of a run: the resolved recipe beside its checkpoints and in its loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.files import write_text
from lightning_dfd.runs.loggers import surviving

PARTS = ("seed_everything", "trainer", "model", "data")  # of a recipe; the rest is of one command


class RecipeRecord(SaveConfigCallback):
    """Gives the recipe to every logger, and writes it as config.yaml beside the checkpoints and in the log's folder.

    When a checkpoint to go on from has been accepted, and not before: a run that is refused must not change the record
    of the one in its folder.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's way, which writes too early, and fails for loggers without a folder."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not Ranks.of(trainer).is_first or not trainer.enable_autolog_hparams:
            return
        for logger in trainer.loggers:  # before Lightning first saves them, as TensorBoard's file is written once
            with surviving(logger):
                logger.log_hyperparams(self._recipe())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        kept: set[str | Path] = {callback.dirpath for callback in savers if callback.dirpath}
        log_dir = trainer.log_dir  # a collective operation
        if isinstance(trainer.logger, (TensorBoardLogger, CSVLogger)) and log_dir is not None:
            kept.add(log_dir)  # that of others is the current folder, or none
        if Ranks.of(trainer).is_first:
            for folder in kept or {trainer.default_root_dir}:
                if "://" not in str(folder):
                    _write(self._recipe(), Path(folder) / self.config_filename)

    def _recipe(self) -> dict[str, Any]:
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        return {part: config[part] for part in PARTS if part in config}


def _write(recipe: dict[str, Any], path: Path) -> None:
    try:
        write_text(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    except OSError as error:  # a full disk is no reason not to train
        rank_zero_warn(f"{path} was not written: {error}")
