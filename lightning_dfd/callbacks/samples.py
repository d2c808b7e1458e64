"""The same prompts and seeds again and again: what the student makes as it learns, beside the teacher.

Axis legend: N videos, C = 3 channels, F frames, H height, W width; pictures are uint8 [N, F, H, W, C].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from lightning_dfd.callbacks.common import (
    due,
    evaluation_prompts,
    quiet_generation,
    require_data,
    require_teacher_steps,
    student_of,
)
from lightning_dfd.data import write_video
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.evaluation.generation import generate_videos, requests_for
from lightning_dfd.evaluation.pictures import contact_sheet, encode_gif, enlarge, side_by_side, to_frames, video_grid
from lightning_dfd.runs.loggers import surviving
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.types import Role

TAG = "samples/teacher_and_student"


class VideoSamples(Callback):
    """Shows the student's videos beside the teacher's, at the start, every so many iterations and at the end.

    A row is a prompt: the teacher's seeds on the left, the student's on the right. Written as mp4 and as a contact
    sheet to `<default_root_dir>/samples`, and to TensorBoard (moving) and W&B where they are the run's loggers.

    Args:
        every: iterations between two looks.
        prompts: what to show: texts, or how many captions of the data.
        seeds: of each prompt's videos.
        teacher_steps: of the teacher's sampling, which happens once.
        batch_size: videos sampled together.
    """

    def __init__(
        self,
        every: int = 100,
        prompts: int | list[str] = 4,
        seeds: Sequence[int] = (0, 1),
        teacher_steps: int = 50,
        batch_size: int = 8,
    ) -> None:
        if every < 1 or not seeds:
            raise ValueError(f"VideoSamples needs every above 0 and at least one seed, got {every} and {seeds}")
        self.every, self.prompts, self.seeds = every, prompts, list(seeds)
        self.teacher_steps, self.batch_size = teacher_steps, batch_size
        self._teacher: Tensor | None = None
        self._done = -1  # the iteration of the last look; -1 before the first

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_teacher_steps(trainer, student_of(pl_module), self.teacher_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done < 0:  # else a resumed run, whose last look was when it was due
            self._look(trainer, student_of(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if due(trainer, self.every, self._done):
            self._look(trainer, student_of(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._done:
            self._look(trainer, student_of(pl_module))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prompts=self.prompts, seeds=self.seeds)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]

    def _look(self, trainer: Trainer, module: DistillationModule) -> None:
        self._done = trainer.global_step
        if self._teacher is None:
            self._teacher = self._videos(trainer, module, "teacher")
        student = self._videos(trainer, module, module.best_student)
        if not Ranks.of(trainer).is_first:  # all ranks sample, as a sharded network needs them all; one writes
            return
        pair = enlarge(side_by_side(self._teacher, student, len(self.seeds)), 96)
        grid = video_grid(pair, 2 * len(self.seeds))
        fps = require_data(trainer).playing_rate
        video = Path(trainer.default_root_dir) / "samples" / f"{self._done:07d}.mp4"
        try:
            write_video(video, grid, fps)
            Image.fromarray(contact_sheet(pair).numpy()).save(video.with_suffix(".png"))
        except OSError as error:  # a full disk is no reason to stop
            rank_zero_warn(f"sample videos of iteration {self._done} were not written: {error}")
            return
        for logger in trainer.loggers:
            with surviving(logger):
                if isinstance(logger, TensorBoardLogger):
                    _show_in_tensorboard(logger, grid, fps, self._done)
                elif isinstance(logger, WandbLogger):
                    logger.log_video(TAG, [str(video)], step=self._done, format=["mp4"])

    def _videos(self, trainer: Trainer, module: DistillationModule, role: Role) -> Tensor:
        data = require_data(trainer)
        requests = requests_for(evaluation_prompts(data, self.prompts), self.seeds)
        frames = []
        with quiet_generation(module):
            for start in range(0, len(requests), self.batch_size):
                chunk = requests[start : start + self.batch_size]
                videos = generate_videos(module, role, chunk, data.size, data, self.teacher_steps)
                frames.append(to_frames(videos))
        return torch.cat(frames)


def _show_in_tensorboard(logger: TensorBoardLogger, grid: Tensor, fps: float, step: int) -> None:
    """As an animated GIF, which TensorBoard plays; its own add_video wants moviepy."""
    _, height, width, _ = grid.shape
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_gif(grid, fps))
    logger.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=TAG, image=image)]), step)
