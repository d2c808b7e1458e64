"""What test_processes.py runs: in one process, or in each of two that train together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dfd import DistillationModule, DistillationTrainer, FSDP2Strategy, VideoDataModule
from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.settings import DataForcingSettings, DMDSettings, GANSettings, StudentSettings

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp_find_unused_parameters_true",
    "fsdp2": lambda: FSDP2Strategy(),
    "fsdp2 in shards": lambda: FSDP2Strategy(save_distributed_checkpoint=True),
}


class JointDraws:
    """The draws of two ranks, one after the other, for one process with all their clips."""

    def __init__(self, ranks: Sequence[Draws]) -> None:
        self.ranks, self.index, self.shared = ranks, ranks[0].index, ranks[0].shared

    def noise_like(self, latents: Tensor) -> Tensor:
        return torch.cat([draws.noise_like(part) for draws, part in zip(self.ranks, latents.chunk(2), strict=True)])

    def times(self, count: int, *limits: float) -> Tensor:
        return torch.cat([draws.times(count // 2, *limits) for draws in self.ranks])

    def indices(self, count: int, end: int) -> Tensor:
        return torch.cat([draws.indices(count // 2, end) for draws in self.ranks])


def fit(
    teacher: str,
    videos: str,
    root: str,
    strategy: str,
    steps: int,
    batch_size: int,
    mode: str = "lora",
    processes: int = 1,
    resume: str | None = None,
    **options: Any,
) -> DistillationTrainer:
    """A short run with everything that has weights or moments; checkpoints every two iterations."""
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)  # noqa: E731
    module = DistillationModule(
        teacher, student=StudentSettings(mode=mode, rank=4, ema_decay=0.9, gradient_checkpointing=True),
        dmd=DMDSettings(student_update_freq=2), data_forcing=DataForcingSettings(probability=0.5),
        gan=GANSettings(weight=0.03, r1_weight=1.0), student_optimizer=optimizer, fake_optimizer=optimizer,
        gradient_clip=0.1, max_sequence_length=TEXT_LENGTH, accumulate=2, **options,
    )  # fmt: skip
    keep = ModelCheckpoint(Path(root), filename="{step}", every_n_train_steps=2, save_top_k=-1)
    keep.CHECKPOINT_EQUALS_CHAR = "_"
    trainer = DistillationTrainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=processes, default_root_dir=root, logger=False,
        strategy=STRATEGIES[strategy](), callbacks=[keep], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = VideoDataModule(videos, frames=9, height=32, width=32, fps=8, batch_size=batch_size)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


def as_two_ranks(**run: Any) -> DistillationTrainer:
    """In one process with twice the batch, what two ranks would do."""
    of = Draws.of

    def joint(seed: int, step: int, micro: int, rank: int, device: torch.device) -> Any:
        return JointDraws([of(seed, step, micro, rank, device) for rank in range(2)])

    with patch.object(Draws, "of", joint):
        return fit(**(run | {"batch_size": 2 * run["batch_size"]}))


def fit_all(runs: Sequence[Mapping[str, Any]]) -> None:
    """In each of two processes, one run after the other."""
    warnings.simplefilter("ignore")
    for run in runs:
        fit(**run, processes=2)
