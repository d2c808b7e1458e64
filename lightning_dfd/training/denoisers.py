"""The roles of one backbone: loaded, asked, sampled, and their weights in checkpoints. Nothing of training.

Axis legend: B batch; latents are [B, ...] in the backbone's layout; times are [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import VideoDataModule
from lightning_dfd.diffusion.noise import NoiseLevel, NoiseSchedule, Time
from lightning_dfd.diffusion.sampler import Draw, Rollout, sample, stateless
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.distributed.sharding import average_gradients
from lightning_dfd.networks.blocks import tapped
from lightning_dfd.networks.roles import Roles
from lightning_dfd.objectives import guide, is_unguided, paired_gap
from lightning_dfd.objectives.terms import DMDSettings, Networks, Term
from lightning_dfd.runs.checkpoints import OURS
from lightning_dfd.training import checks, saved
from lightning_dfd.training.assembly import build_roles, build_term_modules
from lightning_dfd.training.settings import SamplingSettings, StudentSettings
from lightning_dfd.types import Batch, Conditioning, Role

TEACHER: Role = "teacher"


class Denoisers(LightningModule):
    """Teacher, student, fake score and moving average as functions from noised to clean latents.

    Args:
        backbone: the teacher's; nothing of it is loaded before `configure_model`.
        student: what is trained.
        sampling: the student's times.
        dmd: says the teacher's guidance and negative prompt.
        terms: of the loss, which may train modules of their own.
        seed: draws the first weights.
        compiled: compile the networks' blocks.
        init_from: checkpoint whose weights are the start.
    """

    def __init__(
        self,
        backbone: Backbone,
        student: StudentSettings,
        sampling: SamplingSettings,
        dmd: DMDSettings,
        terms: Sequence[Term],
        seed: int,
        compiled: bool,
        init_from: str | None,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the teacher is not in checkpoints; `saved.refuse_checkpoint` checks the rest
        self.backbone, self.student, self.sampling, self.dmd = backbone, student, sampling, dmd
        self.terms, self.seed, self.compiled, self.init_from = tuple(terms), seed, compiled, init_from
        self.roles: Roles | None = None
        self.term_modules = nn.ModuleDict()  # what terms train, by name
        self.term_rates: dict[str, float | None] = {}  # and their learning rates; None for the fake score's
        self.negative: Conditioning | None = None
        self.loaded_from: dict[str, Any] = {"checkpoint": None, "iteration": None}  # of `load_weights`

    # ---- asked ---------------------------------------------------------------------------------------------------

    @property
    def networks(self) -> Networks:
        """The roles as the functions that terms call."""

        def plain(role: Role, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
            return self.x0(role, Rollout(x_t), t, cond).latents

        return Networks(
            self.schedule,
            partial(plain, "student"),
            partial(plain, "fake"),
            self.guided_teacher,
            self.teacher_features,
            dict(self.term_modules.items()),
            partial(self.x0, "student"),
        )

    def x0(self, role: Role, rollout: Rollout, t: Time, cond: Conditioning) -> Rollout:
        """A role's estimate of the clean latents, with what its network carries on."""
        with self.network.act_as(role) as transformer:
            return replace(rollout, latents=self.backbone.x0(transformer, rollout.latents, t, cond))

    def guided_teacher(
        self, x_t: Tensor, t: Time, cond: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """The teacher with classifier-free guidance, both calls in one batch: x0 [B, ...].

        `guidance` is one number or [B]; None for the recipe's. Where it is 1 for all, the unconditional call is saved.
        """
        scale = self.dmd.guidance if guidance is None else guidance
        if is_unguided(scale):
            return self.x0("teacher", Rollout(x_t), t, cond).latents
        negative = self.negative_conditioning(cond)
        twice = t.twice() if isinstance(t, NoiseLevel) else torch.cat([t, t])
        both = Conditioning.cat([self.backbone.unconditional(negative, cond), cond])
        uncond, conditional = self.x0("teacher", Rollout(torch.cat([x_t, x_t])), twice, both).latents.chunk(2)
        return guide(uncond, conditional, scale)

    def teacher_features(self, x_t: Tensor, t: Tensor, cond: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
        """What blocks of the teacher make of x_t, without guidance: N x [B, S, D], with gradient to x_t."""
        with self.network.act_as("teacher") as transformer, tapped(transformer, blocks, len(x_t)) as found:
            self.backbone.call(transformer, x_t, self.schedule.timestep(t), cond)
        return found

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents [B, ...] float32 and conditioning of a batch, from the cache or by the pipeline's encoders."""
        self.backbone.loader.to(self.device)
        if batch.latents is not None and batch.cond is not None:
            return batch.latents.float(), batch.cond
        if batch.video is None:
            raise ValueError("a batch needs either video or both latents and cond")
        images = self.backbone.encode_images(batch.video[:, :, 0], batch.video.shape[2])
        return self.backbone.encode_videos(batch.video), self.backbone.encode_prompts(batch.prompts) | images

    def negative_conditioning(self, like: Conditioning) -> Conditioning:
        """The negative prompt's conditioning, from the cache or encoded once, where `like` lives."""
        if self.negative is None:
            prompt = self.dmd.negative_prompt
            cached = None if self.datamodule is None else self.datamodule.negative_conditioning(prompt)
            self.negative = cached or self.backbone.encode_negative([prompt])
        if self.negative.device != like.device:
            self.negative = self.negative.to(like.device)
        return self.negative

    def denoising_errors(self, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Mean |x0 - real| of student and teacher at the student's times, on noise that follows from `seed`."""
        real, cond = self.encode(batch)
        generator = torch.Generator(self.device).manual_seed(seed)
        eps = torch.randn(real.shape, generator=generator, device=real.device)
        errors = {}
        for name, role in {"student": self.best_student, "teacher": TEACHER}.items():
            gaps = []
            for step in self.sampling.steps:
                t = real.new_full((len(real),), step, dtype=torch.float64)
                noised = Rollout(self.schedule.add_noise(real, eps, t))
                gaps.append(paired_gap(real, self.x0(role, noised, t, cond).latents))
            errors[name] = torch.stack(gaps).mean()
        return errors

    # ---- sampled -------------------------------------------------------------------------------------------------

    @property
    def best_student(self) -> Role:
        """The role to show and to export: the moving average where there is one."""
        return "student" if self.student.ema_decay is None else "ema"

    @torch.no_grad()
    def sample_latents(
        self,
        role: Role,
        cond: Conditioning,
        noise: Tensor,
        draw: Draw = torch.randn_like,
        teacher_steps: int = 50,
    ) -> Tensor:
        """Clean latents [B, ...] from `noise`: the teacher's in `teacher_steps` guided steps, else in few."""
        start = Rollout(noise)
        if role == "teacher":
            times = self.backbone.teacher_times(teacher_steps, noise.shape[1:])
            denoise = stateless(partial(self.guided_teacher, cond=cond))
            return self.backbone.finish(sample(denoise, self.schedule, start, times).latents)
        denoise, kind = partial(self.x0, role, cond=cond), self.sampling.kind
        return self.backbone.finish(sample(denoise, self.schedule, start, self.sampling.steps, kind, draw).latents)

    # ---- loaded --------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> NoiseSchedule:
        return self.backbone.schedule

    @property
    def network(self) -> Roles:
        if self.roles is None:
            raise RuntimeError("the networks are not loaded yet; call configure_model() first")
        return self.roles

    @property
    def datamodule(self) -> VideoDataModule | None:
        """The trainer's, if it is one of ours."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return datamodule if isinstance(datamodule, VideoDataModule) else None

    @property
    def ranks(self) -> Ranks:
        """Which of the processes this is."""
        return Ranks.of(self._trainer)

    def configure_model(self) -> None:
        """Load the teacher and build the roles on it; Lightning calls it once the strategy is known."""
        if self.roles is not None:
            return
        mesh = self.device_mesh
        if mesh is not None:
            checks.check_sharding(self.student, self.backbone)
        resumed = self._trainer is not None and self.trainer.ckpt_path is not None
        start = None if resumed else self.init_from
        if start is not None:  # refused before the teacher is loaded
            saved.open_checkpoint(start, "model.init_from", self.student, self.backbone)
        self.build_roles(self.backbone.load_transformer(), meta=mesh is not None)
        if self.compiled:
            self.network.compile_blocks()
        if mesh is not None:
            self.network.shard(mesh["data_parallel"])
            average_gradients(self.term_modules)  # small, so every process keeps them
        if start is not None:
            self.load_weights(start, "model.init_from")

    def build_roles(self, transformer: nn.Module, meta: bool = False) -> None:
        """Roles on the teacher's network, and what terms train; `meta` copies get values when they are sharded."""
        self.roles = build_roles(transformer, self.student, self.backbone, self.seed, meta)
        modules, self.term_rates = build_term_modules(self.terms, transformer)
        self.term_modules.update(modules)

    # ---- in checkpoints ------------------------------------------------------------------------------------------

    def owned_keys(self) -> set[str]:
        """The names, in the state dict, of what a checkpoint holds: all that is trained, but not the teacher."""
        return saved.owned_keys(self.network, self.term_modules)

    def load_weights(self, path: str | Path, key: str = "ckpt_path") -> dict[str, str]:
        """Take student, fake score, average and, where both sides have them, the modules of terms from a checkpoint of
        this package.

        Args:
            path: of the checkpoint.
            key: what names it in a recipe or on the command line, for errors.

        Returns what the checkpoint says of its making: name -> value. Raises as `saved.open_checkpoint`.
        """
        checkpoint = saved.open_checkpoint(path, key, self.student, self.backbone)
        saved.take_weights(checkpoint, path, self.network, self.term_modules)
        self.loaded_from = {"checkpoint": str(path), "iteration": checkpoint["global_step"]}
        facts: dict[str, str] = checkpoint[OURS]["facts"]
        return facts
