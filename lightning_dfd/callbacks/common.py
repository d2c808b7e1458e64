"""What the callbacks share: when to look, at what, and how to do so without touching training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_dfd.data import VideoDataModule
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.evaluation.features import read_statistics, write_statistics
from lightning_dfd.training.module import DistillationModule


def due(trainer: Trainer, every: int, done: int) -> bool:
    """Whether iteration `trainer.global_step`, not yet looked at, is a multiple of `every` or the last one.

    Batches that are accumulated share an iteration, so it counts once, and those before the first do not.
    """
    step = trainer.global_step
    return step not in (0, done) and (step % every == 0 or step == trainer.max_steps)


def student_of(module: LightningModule) -> DistillationModule:
    """The module as one of this package.

    Raises:
        ValueError: it is another.
    """
    if not isinstance(module, DistillationModule):
        raise ValueError(f"callbacks of lightning_dfd need a DistillationModule, got {type(module).__name__}")
    return module


class Undeclared(Protocol):
    """What a Trainer has and Lightning does not declare."""

    callbacks: list[Callback]
    datamodule: LightningDataModule | None
    fast_dev_run: int | bool
    log_every_n_steps: int


def undeclared(trainer: Trainer) -> Undeclared:
    return cast(Undeclared, trainer)


def require_data(trainer: Trainer) -> VideoDataModule:
    """The run's VideoDataModule, which knows size, captions and cache."""
    data = undeclared(trainer).datamodule
    if not isinstance(data, VideoDataModule):
        raise ValueError(
            f"callbacks that generate videos need a VideoDataModule for size and captions, got {type(data).__name__}; "
            "pass datamodule=VideoDataModule(...) to fit"
        )
    return data


def require_teacher_steps(trainer: Trainer, module: DistillationModule, steps: int) -> None:
    """Raise ValueError, before anything is loaded, where so many steps of the teacher's scheduler are not known."""
    data = undeclared(trainer).datamodule
    if isinstance(data, VideoDataModule):
        module.backbone.teacher_times(steps, module.backbone.latent_shape(data.size))


def evaluation_prompts(data: VideoDataModule, wanted: int | list[str]) -> list[str]:
    """The texts given, or up to so many distinct captions, of held-out clips first, evenly spread.

    Raises:
        ValueError: none is asked for.
    """
    if not wanted:
        raise ValueError(f"prompts is {wanted}; give texts, or how many captions of the data to take")
    if isinstance(wanted, list):
        return list(dict.fromkeys(wanted))
    captions = list(dict.fromkeys(clip.caption for clip in (*data.held_out, *data.clips)))
    count = min(wanted, len(captions))
    return [captions[index * len(captions) // count] for index in range(count)]


@contextmanager
def quiet_generation(module: DistillationModule) -> Iterator[None]:
    """Generate videos without gradient, in the run's own precision, leaving every global generator as it was."""
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        yield


def shared_statistics(
    trainer: Trainer, folder: Path, key: Mapping[str, str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`cached_statistics` for all ranks: the first one's file decides for all, as `compute` may need them all."""
    ranks = Ranks.of(trainer)
    found = ranks.broadcast(read_statistics(folder, key) if ranks.is_first else None)
    if found is None:
        found = compute()
        if ranks.is_first:
            write_statistics(folder, key, found)
    return found
