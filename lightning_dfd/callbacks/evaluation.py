"""FVD, diversity and colour while training, for the student and, once, for its teacher.

Axis legend: B batch, C = 3 channels, F frames, H height, W width; videos are [B, C, F, H, W] in [-1, 1].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.callbacks.common import (
    due,
    evaluation_prompts,
    quiet_generation,
    require_data,
    require_teacher_steps,
    shared_statistics,
    student_of,
)
from lightning_dfd.data import SampleError, VideoDataModule
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.evaluation.features import data_fingerprint
from lightning_dfd.evaluation.generation import generate_videos, requests_for
from lightning_dfd.evaluation.metrics import VideoSuite, relative_to_teacher
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.types import Role


class VideoEvaluation(Callback):
    """Measures the student, its moving average if there is one, at the start, every so many iterations and at the end.

    The same prompts and seeds are sampled each time, split over the ranks, and measured by `VideoSuite` against real
    clips of the run's data. The teacher is measured once on the same prompts and seeds, in its own many guided steps.
    Logged are `val/<metric>` for the student, `val/teacher/<metric>`, `val/<metric>_ratio` (student over teacher) and
    `val/score`; docs/metrics.md says what each one is. Training is not touched: the trained weights are the same, bit
    by bit, with and without it.

    Statistics of the real clips and of the teacher are kept in `statistics`, by data, extractors and protocol, so
    that a second run with the same teacher does not measure it again.

    Args:
        every: iterations between two evaluations.
        prompts: texts, or how many captions of the data.
        seeds: videos of each prompt, at least 2; the paper takes 8.
        real_clips: how many real clips to compare with; fewer where there are fewer.
        distance: extractor of the Frechet distance (`i3d-logits` makes it FVD), as `name` or `name=weights`.
        diversity: extractor of the diversities, likewise.
        min_videos: fewer real or sampled videos than this are refused, as the distance would be mostly bias.
        teacher: whether to measure the teacher.
        teacher_steps: of its sampling.
        batch_size: videos sampled together.
        statistics: folder of kept statistics; null for `<default_root_dir>/statistics`.
    """

    def __init__(
        self,
        every: int = 100,
        prompts: int | list[str] = 16,
        seeds: int = 8,
        real_clips: int = 2048,
        distance: str = "transnetv2",
        diversity: str = "efficientnet-lite0",
        min_videos: int = 64,
        teacher: bool = True,
        teacher_steps: int = 50,
        batch_size: int = 8,
        statistics: str | None = None,
    ) -> None:
        if every < 1 or seeds < 2:
            raise ValueError(f"VideoEvaluation needs every above 0 and at least 2 seeds, got {every} and {seeds}")
        self.every, self.prompts, self.seeds, self.real_clips = every, prompts, seeds, real_clips
        self.names = {"distance": distance, "diversity": diversity}
        self.min_videos = min_videos
        self.teacher, self.teacher_steps, self.batch_size = teacher, teacher_steps, batch_size
        self.statistics = statistics
        self._suite: VideoSuite | None = None
        self._teacher_values: dict[str, float] = {}
        self._done = -1  # the iteration of the last evaluation; -1 before the first
        self._logged: dict[str, float] = {}  # what it gave

    # ---- when ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.teacher:
            require_teacher_steps(trainer, student_of(pl_module), self.teacher_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prepare(trainer, student_of(pl_module))
        if self._done < 0:
            self._evaluate(trainer, student_of(pl_module))
        else:  # a resumed run: what it was measured by before, for those that read it between evaluations
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self._logged.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if due(trainer, self.every, self._done):
            values = self._evaluate(trainer, student_of(pl_module))
            pl_module.log_dict(values, logger=False)  # for ModelCheckpoint(monitor=...) and EarlyStopping

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._done:  # ended before max_steps
            self._evaluate(trainer, student_of(pl_module))

    @property
    def measured_at(self) -> int:
        """The iteration of the last evaluation; -1 before the first."""
        return self._done

    @property
    def measured(self) -> Mapping[str, float]:
        """What the last evaluation logged."""
        return MappingProxyType(self._logged)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prompts=self.prompts, seeds=self.seeds, **self.names)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done, "logged": self._logged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done, self._logged = state_dict["done"], state_dict["logged"]

    # ---- what ---------------------------------------------------------------------------------------------

    def _prepare(self, trainer: Trainer, module: DistillationModule) -> None:
        data = require_data(trainer)
        self._requests = requests_for(evaluation_prompts(data, self.prompts), range(self.seeds))
        if len(self._requests) < self.min_videos:
            raise ValueError(
                f"VideoEvaluation would sample {len(self._requests)} videos, fewer than min_videos={self.min_videos}; "
                "raise prompts or seeds, or lower min_videos and read the distance with that in mind"
            )
        self._suite = suite = VideoSuite(**self.names, min_videos=self.min_videos).to(module.device)
        folder = Path(self.statistics or Path(trainer.default_root_dir) / "statistics")
        key = self._protocol(data) | suite.fingerprint()
        key |= {"vae_tiling": "true"} if module.backbone.loader.vae_tiling else {}
        real = shared_statistics(trainer, folder, key | {"of": "real"}, lambda: self._real_state(trainer, module, data))
        suite.load_real_state(real)
        if self.teacher:
            asked = json.dumps([asdict(request) for request in self._requests])
            key |= {"of": "teacher", "requests": asked, "steps": str(self.teacher_steps)}
            key |= module.backbone.network_identity()
            key |= {"guidance": str(module.dmd.guidance), "negative": module.dmd.negative_prompt}

            def measure() -> dict[str, Tensor]:
                values = self._measure(trainer, module, "teacher")
                return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

            self._teacher_values = {
                name: float(value) for name, value in shared_statistics(trainer, folder, key, measure).items()
            }

    def _protocol(self, data: VideoDataModule) -> dict[str, str]:
        return {
            "data": data_fingerprint(clip.source for clip in data.real_clips(self.real_clips)),
            "size": str(data.size),
            "fps": str(data.fps),
            "min_videos": str(self.min_videos),
        }

    def _real_state(self, trainer: Trainer, module: DistillationModule, data: VideoDataModule) -> dict[str, Tensor]:
        assert self._suite is not None
        ranks = Ranks.of(trainer)
        clips = ranks.share(data.real_clips(self.real_clips)) if ranks.sequence_rank == 0 else []
        for clip in tqdm(clips, desc="real clips", leave=False, disable=not ranks.is_first):
            try:
                video = data.real_video(clip, module.backbone.decode_latents)
            except SampleError as error:
                rank_zero_warn(f"{clip.name} is left out of the real clips: {error}")
                continue
            self._suite.update_real(video.to(module.device))
        return self._suite.real_state()

    def _evaluate(self, trainer: Trainer, module: DistillationModule) -> dict[str, float]:
        self._done = trainer.global_step
        values = self._measure(trainer, module, module.best_student)
        logged = {f"val/{name}": value for name, value in values.items()}
        logged |= {f"val/teacher/{name}": value for name, value in self._teacher_values.items()}
        logged |= {f"val/{name}": value for name, value in relative_to_teacher(values, self._teacher_values).items()}
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=self._done)
        module.follow(logged)
        self._logged = logged
        return logged

    def _measure(self, trainer: Trainer, module: DistillationModule, role: Role) -> dict[str, float]:
        """The suite's values for a role's videos; every rank makes a share of them, and as many network calls."""
        assert self._suite is not None
        data, suite, ranks = require_data(trainer), self._suite, Ranks.of(trainer)
        suite.reset()
        own = ranks.share(self._requests)
        rounds = range(0, -(-len(self._requests) // ranks.data_size), self.batch_size)
        described = f"evaluating {role} at {trainer.global_step}"
        with quiet_generation(module):
            for start in tqdm(rounds, desc=described, leave=False, disable=not ranks.is_first):
                chunk = own[start : start + self.batch_size]
                videos = generate_videos(module, role, chunk or self._requests[:1], data.size, data, self.teacher_steps)
                if chunk and ranks.sequence_rank == 0:  # those that share a sequence have the same videos
                    suite.update(videos, [request.prompt for request in chunk], [request.seed for request in chunk])
        return suite.compute()
