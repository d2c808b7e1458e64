"""The callbacks that Lightning would add by itself, in versions that suit an endless stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ModelSummary, ProgressBar

from lightning_dfd.callbacks.progress import IterationBar, TrainedParts


def default_callbacks(options: Mapping[str, Any], given: Sequence[Callback]) -> list[Callback]:
    """Those that a Trainer with these options and callbacks lacks."""
    defaults: dict[str, tuple[type[Callback], Callable[[], Callback]]] = {
        "enable_progress_bar": (ProgressBar, IterationBar),
        "enable_model_summary": (ModelSummary, TrainedParts),
        "enable_checkpointing": (Checkpoint, newest_and_last),
    }
    return [
        make()
        for name, (kind, make) in defaults.items()
        if options.get(name) is not False and not any(isinstance(callback, kind) for callback in given)
    ]


def newest_and_last() -> ModelCheckpoint:
    """As in recipes/common.yaml; Lightning's default saves when an epoch ends, and here none does."""
    return ModelCheckpoint(filename="{step}", every_n_train_steps=100, save_last=True, enable_version_counter=False)
