"""The options of lightning.Trainer on an endless stream with manual optimisation: each works or is refused.

docs/trainer.md is the table of them all.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DoublePrecision,
    HalfPrecision,
    TransformerEnginePrecision,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)

from lightning_dfd.data import VideoDataModule
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.distributed.strategy import FSDP2Strategy

Values = Mapping[str, tuple[tuple[Any, ...], str]]  # of options: the values that are allowed, what to do instead

REFUSED: Values = {
    "accumulate_grad_batches": ((1,), "set model.accumulate, in batches per iteration"),
    "gradient_clip_val": ((None,), "set model.gradient_clip, which clips each role by its own norm"),
    "gradient_clip_algorithm": ((None,), "gradients are clipped by norm; set model.gradient_clip"),
    "barebones": ((False,), "it measures Lightning without logs and checkpoints; set trainer.profiler: simple"),
    "sync_batchnorm": ((False,), "nothing that is trained has batch norm; leave it false"),
    "model_registry": ((None,), "checkpoints are kept in folders; set the dirpath of ModelCheckpoint"),
    "limit_predict_batches": ((None, 1.0), "there is no predict; use lightning sample"),
}
NO_EPOCHS = "the stream of clips has no end, so there are no epochs"
REFUSED_ON_STREAM: Values = {
    "max_epochs": ((None, -1), f"{NO_EPOCHS}; set trainer.max_steps, in iterations, and leave max_epochs at -1"),
    "min_epochs": ((None, 0), f"{NO_EPOCHS}; set trainer.min_steps, in iterations"),
    "limit_train_batches": ((None, 1.0), f"{NO_EPOCHS}; set trainer.max_steps, in iterations"),
    "overfit_batches": ((0, 0.0), f"{NO_EPOCHS}; put the clips to overfit in a folder and set data.folder"),
    "check_val_every_n_epoch": ((None, 1), f"{NO_EPOCHS}; set trainer.val_check_interval, in iterations"),
    "reload_dataloaders_every_n_epochs": ((0,), f"{NO_EPOCHS}; leave it at 0"),
}
PRECISIONS = (None, 32, "32", "32-true", 16, "16", "16-mixed", "bf16", "bf16-mixed")
STRATEGIES = "take auto, which is DDP on several devices, or fsdp2, which shards the weights"
REFUSED_CALLBACKS: Mapping[type[Callback], str] = {
    GradientAccumulationScheduler: "set model.accumulate, in batches per iteration",
    WeightAveraging: "set model.student.ema_decay",
    StochasticWeightAveraging: "set model.student.ema_decay",
    BatchSizeFinder: "see what fits by lightning plan, and set data.batch_size",
    BackboneFinetuning: "what is trained is model.student.mode's to say, lora or full",
    LearningRateFinder: "set the lr of model.student_optimizer and model.fake_optimizer",
}
HIDDEN = frozenset({*REFUSED, *REFUSED_ON_STREAM} - {"max_epochs"})  # absent from help; recipes set max_epochs: -1
VAL_EVERY = 500  # iterations, as in recipes/common.yaml


def refuse(options: Mapping[str, Any], rules: Values) -> None:
    """Raise ValueError where an option has a value that cannot be meant here."""
    for name, (allowed, instead) in rules.items():
        value = options.get(name, allowed[0])
        if not any(type(value) is type(one) and value == one for one in allowed):  # 1 batch is not a share of 1.0
            raise ValueError(f"trainer.{name} is {value!r}, which is not used here: {instead}")


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError, before anything is loaded, for options that work with no data and no model of this package."""
    refuse(options, REFUSED)
    precision = options.get("precision")
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {precision}; what is trained stays float32, so take bf16-mixed, 16-mixed or 32-true "
            "(model.dtype is the precision of the frozen weights)"
        )
    interval = options.get("val_check_interval")
    if isinstance(interval, float) and options.get("check_val_every_n_epoch", 1) is None:
        raise ValueError(f"trainer.val_check_interval is {interval}; {NO_EPOCHS}: give a number of iterations")
    if options.get("profiler") == "xla":
        raise ValueError("trainer.profiler is xla, which is for TPUs; take simple, advanced or pytorch")
    strategy = options.get("strategy", "auto")
    unusable = isinstance(strategy, str) and strategy.lower().startswith(("fsdp", "deepspeed", "xla", "single_xla"))
    if unusable and strategy.lower() != "fsdp2":
        raise ValueError(f"trainer.strategy is {strategy}; {STRATEGIES}")


def fitting_callbacks(options: Mapping[str, Any]) -> list[Callback]:
    """The callbacks of a Trainer with these options.

    `enable_checkpointing: false` and `enable_progress_bar: false` win over callbacks that a recipe lists.

    Raises:
        ValueError: one cannot work with manual optimisation.
    """
    given = options.get("callbacks") or []
    callbacks = [given] if isinstance(given, Callback) else list(given)
    switches = {"enable_checkpointing": Checkpoint, "enable_progress_bar": ProgressBar}
    off = tuple(kind for name, kind in switches.items() if options.get(name) is False)
    callbacks = [callback for callback in callbacks if not isinstance(callback, off)]
    for callback in callbacks:
        for kind, instead in REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks has {type(callback).__name__}, which is not used here: {instead}")
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise ValueError(
                "trainer.callbacks has ModelCheckpoint with train_time_interval, which Lightning ignores with manual "
                "optimisation; set every_n_train_steps, in iterations"
            )
    return callbacks


def check_plugins(trainer: Trainer) -> None:
    """Make DDP work whichever way it was chosen.

    Student and fake score take turns, so that in every iteration some parameters have no gradient.

    Raises:
        ValueError: the strategy or the precision cannot train several roles on one frozen network.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)) or (
        isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy)
    ):
        raise ValueError(f"trainer.strategy is {type(strategy).__name__}; {STRATEGIES}")
    if isinstance(strategy, DDPStrategy):
        settings = strategy._ddp_kwargs
        if settings.get("static_graph") or not settings.get("find_unused_parameters", True):
            raise ValueError(
                "trainer.strategy is DDP with static_graph or without find_unused_parameters, but student and fake "
                "score take turns; take auto or ddp"
            )
        settings["find_unused_parameters"] = True
    if isinstance(precision, BitsandbytesPrecision):
        raise ValueError("trainer.plugins has BitsandbytesPrecision; set model.quantization instead")
    if isinstance(precision, (HalfPrecision, DoublePrecision, TransformerEnginePrecision)):
        raise ValueError(f"trainer.plugins has {type(precision).__name__}; set trainer.precision: bf16-mixed instead")


def prepare_for_stream(
    trainer: Trainer, data: VideoDataModule, options: Mapping[str, Any], start: int, accumulate: int = 1, cycle: int = 1
) -> None:
    """Set what Lightning counts in batches so that it counts iterations.

    Args:
        trainer: about to fit.
        data: what it is fitted on.
        options: with which the trainer was made.
        start: iteration at which it begins.
        accumulate: batches per iteration.
        cycle: iterations in which every role has a turn.

    Raises:
        ValueError: an option speaks of epochs, or nothing would end the run.
    """
    refuse(options, REFUSED_ON_STREAM)
    trainer.fit_loop.min_epochs = 0  # with min_steps Lightning would wait for the end of an epoch as well
    if not data.val_share:
        trainer.num_sanity_val_steps = 0
    dev_run: bool | int = trainer.fast_dev_run  # type: ignore[attr-defined]
    if dev_run:  # as many iterations as were asked for, or a turn of every role
        iterations = cycle if dev_run is True else int(dev_run)
        trainer.fit_loop.epoch_loop.max_steps = start + iterations
        trainer.limit_train_batches = iterations * accumulate
        return
    endless = trainer.max_steps == -1 and options.get("max_time") is None
    if endless and options.get("max_epochs") is None:
        raise ValueError("trainer.max_steps is not set, so the run would never end; set it, in iterations")
    interval = options.get("val_check_interval")
    if interval is None:
        interval = VAL_EVERY
    if isinstance(interval, (int, float)):
        if interval < 1 or isinstance(interval, float):
            raise ValueError(f"trainer.val_check_interval is {interval}; {NO_EPOCHS}: give a number of iterations")
        trainer.val_check_interval = interval * accumulate
    elif Ranks.of(trainer).size > 1:
        raise ValueError(
            f"trainer.val_check_interval is {interval}; each process would go by its own clock: give iterations"
        )
    else:
        trainer.val_check_interval = None  # type: ignore[assignment]  # Lightning forgets to set it where validation goes by the clock


class NoAdverts(logging.Filter):
    """Keeps Lightning's tips to install more of it, and notes that mean nothing here, out of a run's output."""

    NOTES = ("💡 Tip:", "TPU available: False", "Trainer already configured with model summary")

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.NOTES)


def silence_adverts() -> None:
    """Once for all of Lightning's notes."""
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(one, NoAdverts) for one in log.filters):
        log.addFilter(NoAdverts())
