"""The LightningModule: DMD2 with its GAN, DP-DMD and data forcing as terms of one loss, on any backbone.

Axis legend: B batch; latents are [B, ...] in the backbone's layout; times are [B].
Sources: DMD2, 2405.14867; DP-DMD, 2602.03139; Data-Forcing Distillation, 2606.18478.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dfd.backbones import backbone_from_pretrained
from lightning_dfd.checkpoints import OURS, below, only_weights, read_checkpoint, refuse_misfit
from lightning_dfd.data import VideoDataModule
from lightning_dfd.discriminator import Discriminator, tapped
from lightning_dfd.draws import Draws, hash_seed
from lightning_dfd.loggers import guard
from lightning_dfd.noise import NoiseSchedule
from lightning_dfd.objectives import (
    approximate_r1,
    discriminator_loss,
    diversity_loss,
    dmd_gradient,
    draw_forcing,
    fake_score_loss,
    forced_samples,
    generator_loss,
    guide,
    is_unguided,
    nearest_real,
    paired_gap,
    surrogate_loss,
    teacher_data,
    teacher_guidance,
)
from lightning_dfd.optimizers import BadGradients, as_list, clip_parts, keep_settings, settings_of
from lightning_dfd.quantization import Quantization
from lightning_dfd.resume import log_places, log_runs, recipe_facts, refuse_other_recipe, rewind
from lightning_dfd.roles import TRAINED, FullRoles, LoraRoles, Roles
from lightning_dfd.sampler import Draw, roll_to, sample
from lightning_dfd.settings import (
    DataForcingSettings,
    DiversitySettings,
    DMDSettings,
    GANSettings,
    SamplingSettings,
    StudentSettings,
)
from lightning_dfd.sharding import average_gradients
from lightning_dfd.types import Batch, Conditioning, Role

SPEED = "train/samples_per_s"
SHOWN = ("train/student_loss", "train/fake_loss", "train/paired_gap")  # on the progress bar
ADAMW: OptimizerCallable = partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)


class DistillationModule(LightningModule):
    """Distils a diffusers video pipeline into a few-step student by DMD2, with or without data forcing.

    One training step takes one counted optimizer step, so that `trainer.global_step` is the iteration. The
    student is updated in one of `dmd.student_update_freq` iterations, the fake score (with the GAN's discriminator,
    if there is one) in all others.

    Args:
        teacher: hub id or folder of a diffusers video pipeline.
        backbone: import path of a Backbone subclass, or `captured` for one that learns an unlisted pipeline's calls
            by watching it; null to choose by the pipeline's class.
        dtype: precision of the frozen weights. What is trained is float32; see trainer.precision.
        max_sequence_length: text tokens per prompt; null for the pipeline's default.
        quantization: of the frozen weights, for adapters; null for none.
        compile: compile the network's blocks by torch.compile: slower to start, then faster.
        offload: keep VAE and text encoders, and with full tuning the teacher, on the CPU but for what is computing.
        student: what is trained.
        sampling: the student's times and kind of sampling.
        dmd: distribution matching.
        data_forcing: data forcing.
        gan: DMD2's GAN; off by default.
        diversity: DP-DMD's term for the student's first step; off by default.
        student_optimizer: of the student.
        fake_optimizer: of the fake score, and of the discriminator.
        lr_scheduler: of both, stepped with its optimizer; null for a constant rate.
        gradient_clip: largest norm of a role's gradient, and of the discriminator's.
        accumulate: batches per optimizer step.
        init_from: checkpoint whose student and fake score are the start (data forcing starts from DMD2's).
        seed: of every draw in training, together with the iteration and the rank.
    """

    def __init__(
        self,
        teacher: str,
        backbone: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_sequence_length: int | None = None,
        quantization: Quantization | None = None,
        compile: bool = False,
        offload: bool = False,
        student: StudentSettings = StudentSettings(),  # noqa: B008 (frozen)
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008
        dmd: DMDSettings = DMDSettings(),  # noqa: B008
        data_forcing: DataForcingSettings = DataForcingSettings(),  # noqa: B008
        gan: GANSettings = GANSettings(),  # noqa: B008
        diversity: DiversitySettings = DiversitySettings(),  # noqa: B008
        student_optimizer: OptimizerCallable = ADAMW,
        fake_optimizer: OptimizerCallable = ADAMW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float = 10.0,
        accumulate: int = 1,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        diversity.check(student, sampling)
        if quantization is not None:
            quantization.check(student.mode)
        if offload:
            gan.check_offload(student)
        # Hyperparameters are not saved into checkpoints: on resume the recipe and the command line decide.
        self.automatic_optimization = False
        self.strict_loading = False  # the teacher is not in checkpoints; on_load_checkpoint checks the rest
        self.backbone = backbone_from_pretrained(teacher, getattr(torch, dtype), max_sequence_length, backbone)
        self.backbone.quantization, self.backbone.offload = quantization, offload
        self.compiled = compile
        self.student, self.sampling, self.dmd = student, sampling, dmd
        self.data_forcing, self.gan, self.diversity = data_forcing, gan, diversity
        self.student_optimizer, self.fake_optimizer = student_optimizer, fake_optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.init_from, self.seed = init_from, seed
        self.roles: Roles | None = None
        self.discriminator: Discriminator | None = None
        self.negative: Conditioning | None = None
        self.counts = {"student_steps": 0, "forced_steps": 0, "skipped_steps": 0}
        self._bad_gradients = BadGradients()
        self._recipe: dict[str, dict[str, Any]] = {}
        self._micro = 0  # batches since the last optimizer step
        self._latest: dict[str, Tensor | float] = {}
        self._clock: float | None = None

    # ---- the step: docs/concepts.md in code ------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self._seed_draws()
        real, cond = self.encode(batch)
        loss = self.student_loss(real, cond, batch.prompts) if self.student_turn else self.fake_loss(real, cond)
        self.manual_backward(loss / self.accumulate)
        self._micro += 1
        if self._micro == self.accumulate:
            self._step_optimizer()
            self._log_latest(batch)

    def student_loss(self, real: Tensor, cond: Conditioning, prompts: Sequence[str]) -> Tensor:
        """The surrogate of the DMD gradient, data-forced in a drawn share of the steps (2606.18478, eq. 9), plus
        the terms that are switched on."""
        gen = self.generate(real, cond)
        t, eps = self.score_time(len(gen)), self._draws.noise_like(gen)
        drawn = draw_forcing(self.data_forcing.probability, self._draws.shared) and self.may_force
        forced = forced_samples(drawn, t, self.data_forcing.time_range)
        real = self.pair(real, gen, prompts)
        shown = teacher_data(gen, real if self.data_forcing.shown == "real" else gen, forced)
        scale = teacher_guidance(forced, self.dmd.guidance, self.data_forcing.guidance)
        x_t = self.schedule.add_noise(gen, eps, t)
        with torch.no_grad():
            fake = self.x0("fake", x_t, t, cond)
            teacher = self.guided_teacher(self.schedule.add_noise(shown, eps, t), t, cond, scale)
        gradient = dmd_gradient(gen, fake, teacher)
        loss = surrogate_loss(gen, gradient)
        if self._micro == self.accumulate - 1:  # the last batch, so that an iteration done anew counts once
            self.counts["student_steps"] += 1
            self.counts["forced_steps"] += drawn
        self._latest |= {
            "train/student_loss": loss.detach(),
            "train/dmd_gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
            "train/paired_gap": paired_gap(real, gen),
            "train/forced_share": self.counts["forced_steps"] / max(1, self.counts["student_steps"]),
        }
        if len(real) > 1:
            self._latest["train/unpaired_gap"] = paired_gap(real.roll(1, 0), gen)  # what the paired one is to be below
        if self.gan.weight:
            loss = loss + self.gan.weight * self.gan_generator_loss(x_t, t, cond)
        if self.diversity.weight:
            loss = loss + self.diversity.weight * self.first_step_loss(self._draws.noise_like(real), cond)
        return loss

    def fake_loss(self, real: Tensor, cond: Conditioning) -> Tensor:
        """Denoising score matching of the fake score on what the student makes now, plus the discriminator's loss
        where there is one (the two share no weights)."""
        with torch.no_grad():
            gen = self.generate(real, cond)
        t, eps = self.score_time(len(gen)), self._draws.noise_like(gen)
        x_t = self.schedule.add_noise(gen, eps, t)
        fake = self.x0("fake", x_t, t, cond)
        loss = fake_score_loss(self.schedule, fake, gen, x_t, t, self.dmd.fake_space)
        self._latest["train/fake_loss"] = loss.detach()
        if self.gan.weight:
            loss = loss + self.gan_discriminator_loss(x_t, real, t, eps, cond)
        return loss

    # ---- the loss's further terms, and what they are made of ---------------------------------------------------

    def gan_generator_loss(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """How far the student's noised clips are from being taken for real (2405.14867, section 4.3)."""
        loss = generator_loss(self.critic.judge(self.teacher_features(x_t, t, cond)))
        self._latest["train/gan_generator_loss"] = loss.detach()
        return loss

    def gan_discriminator_loss(self, x_t: Tensor, real: Tensor, t: Tensor, eps: Tensor, cond: Conditioning) -> Tensor:
        """What the discriminator gets wrong of noised real clips and of the student's `x_t`, plus weighted R1."""
        real_t, real_eps = (t, eps) if self.gan.same_noise else (self.score_time(len(t)), self._draws.noise_like(eps))

        @torch.no_grad()
        def features(clips: Tensor) -> list[Tensor]:
            return self.teacher_features(self.schedule.add_noise(clips, real_eps, real_t), real_t, cond)

        with torch.no_grad():
            made = self.teacher_features(x_t, t, cond)
        logits = self.critic(features(real))
        loss = discriminator_loss(logits, self.critic(made))
        self._latest["train/gan_discriminator_loss"] = loss.detach()
        if self.gan.r1_weight:
            near = real + self.gan.r1_sigma * self._draws.noise_like(real)
            loss = loss + self.gan.r1_weight * approximate_r1(logits, self.critic(features(near)))
        return loss

    def first_step_loss(self, z: Tensor, cond: Conditioning) -> Tensor:
        """DP-DMD (2602.03139): from noise z, the student's first step against the guided teacher's path from the
        same z to the student's second time. The DMD gradient never reaches this step (see `generate`)."""
        first, second = self.sampling.steps[:2]
        anchors = torch.linspace(first, second, self.diversity.anchor_steps + 1, dtype=torch.float64).tolist()
        t, t_k = (z.new_full((len(z),), time, dtype=torch.float64) for time in (first, second))
        with torch.no_grad():
            z_k = roll_to(partial(self.guided_teacher, cond=cond), self.schedule, z, anchors, "ode")
        loss = diversity_loss(self.schedule, self.x0("student", z, t, cond), z, z_k, t, t_k)
        self._latest["train/diversity_loss"] = loss.detach()
        return loss

    def generate(self, real: Tensor, cond: Conditioning) -> Tensor:
        """The student's clean latents from its training input at one of its own times.

        `data`: the input is the noised real clip, each at a time of its own. `rollout`: the input is where the
        student's own sampling, without gradient, stands at a time shared by batch and ranks. With DP-DMD that is
        not the first time, whose step has a loss of its own.
        """
        steps, draws = self.sampling.steps, self._draws
        if self.student.input == "data":
            t = torch.tensor(steps, dtype=torch.float64, device=real.device)[draws.indices(len(real), len(steps))]
            return self.x0("student", self.schedule.add_noise(real, draws.noise_like(real), t), t, cond)
        first = 1 if self.diversity.weight else 0
        last = draws.index(first, len(steps))
        denoise = partial(self.x0, "student", cond=cond)
        with torch.no_grad():
            x_t = roll_to(
                denoise, self.schedule, draws.noise_like(real), steps[: last + 1], self.sampling.kind, draws.noise_like
            )
        return denoise(x_t, x_t.new_full((len(x_t),), steps[last], dtype=torch.float64))

    def pair(self, real: Tensor, gen: Tensor, prompts: Sequence[str]) -> Tensor:
        """The real clips that go with the student's: the batch's own, or the nearest of so many of its caption."""
        count = self.data_forcing.nearest_of
        if count == 1 or not self.may_force:
            return real
        assert self.datamodule is not None  # setup() demands a cache
        drawn = [self.datamodule.same_caption_latents(prompt, count, self._draws.pairs) for prompt in prompts]
        return nearest_real(gen, real, drawn, count)

    def x0(self, role: Role, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """A role's estimate of the clean latents."""
        with self.network.act_as(role) as transformer:
            return self.backbone.x0(transformer, x_t, t, cond)

    def guided_teacher(self, x_t: Tensor, t: Tensor, cond: Conditioning, scale: float | Tensor | None = None) -> Tensor:
        """The teacher with classifier-free guidance, both calls in one batch.

        `scale` is one number or [B]; None for the recipe's. Where it is 1 for all, the unconditional call is saved.
        """
        scale = self.dmd.guidance if scale is None else scale
        if is_unguided(scale):
            return self.x0("teacher", x_t, t, cond)
        negative = self.negative_conditioning(cond)
        both = Conditioning.cat([self.backbone.unconditional(negative, cond), cond])
        uncond, conditional = self.x0("teacher", torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guide(uncond, conditional, scale)

    def teacher_features(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> list[Tensor]:
        """What the tapped blocks of the teacher make of x_t, without guidance: N x [B, S, D], with gradient to x_t."""
        with self.network.act_as("teacher") as transformer, tapped(transformer, self.critic.blocks, len(x_t)) as found:
            self.backbone.call(transformer, x_t, self.schedule.timestep(t), cond)
        return found

    # ---- draws --------------------------------------------------------------------------------------------

    @property
    def student_turn(self) -> bool:
        return (self.trainer.global_step + 1) % self.dmd.student_update_freq == 0

    @property
    def may_force(self) -> bool:
        """Whether the present iteration can be data-forced."""
        settings = self.data_forcing
        return settings.probability > 0 and (settings.until is None or self.trainer.global_step < settings.until)

    def _seed_draws(self) -> None:
        place = (self.seed, self.trainer.global_step, self._micro, self.global_rank)
        self._draws = Draws.of(*place, self.device)
        torch.manual_seed(hash_seed("global", *place))  # for networks of users' own, which may draw from it

    def score_time(self, batch_size: int) -> Tensor:
        settings = self.dmd.score_time
        return self._draws.times(batch_size, settings.low, settings.high, settings.shift)

    @property
    def between_iterations(self) -> bool:
        """Whether all batches of an iteration are done and none of the next."""
        return self._micro == 0

    # ---- optimizers ---------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self._parts = parts = {str(role): self.network.parameters_of(role) for role in TRAINED}
        fake: Any = parts["fake"]
        if self.discriminator is not None:  # not an optimizer of its own: one counted step an iteration
            parts["discriminator"] = list(self.discriminator.parameters())
            rate = {} if self.gan.lr is None else {"lr": self.gan.lr}
            fake = [{"params": fake}, {"params": parts["discriminator"], **rate}]
        optimizers = [self.student_optimizer(parts["student"]), self.fake_optimizer(fake)]
        schedulers = [self.lr_scheduler(optimizer) for optimizer in optimizers] if self.lr_scheduler else []
        self._recipe_groups = settings_of(optimizers)
        return optimizers, schedulers

    def on_fit_start(self) -> None:
        if self.backbone.offload:
            self.network.offload_teacher(self.device)

    def on_train_start(self) -> None:
        """A restored optimizer brings its old settings along; those of the recipe and command line win."""
        optimizers = as_list(self.optimizers(use_pl_optimizer=False))
        keep_settings(optimizers, as_list(self.lr_schedulers()), self._recipe_groups)

    def on_validation_model_zero_grad(self) -> None:
        """Keep what an iteration has gathered; Lightning drops gradients before a validation, and counts batches."""

    def _step_optimizer(self) -> None:
        self._micro = 0
        index = TRAINED.index("student" if self.student_turn else "fake")
        is_student = self.student_turn
        optimizer = as_list(self.optimizers())[index]
        optimizer.step()
        optimizer.zero_grad()
        if self.lr_scheduler:
            as_list(self.lr_schedulers())[index].step()
        if is_student and self.student.ema_decay is not None:
            self.network.update_average(self.student.ema_decay)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = self.clip(optimizer)
        self._latest |= {f"train/{name}_grad_norm": norm for name, norm in norms.items()}
        self.counts["skipped_steps"] += self._bad_gradients.drop(optimizer, norms, self.trainer.global_step)
        self._latest["train/skipped_steps"] = self.counts["skipped_steps"]

    def clip(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Clip the gradient of each part by its own norm; returns the norms before."""
        return clip_parts(optimizer, self._parts, self.gradient_clip)

    @property
    def latest(self) -> Mapping[str, Tensor | float]:
        """The last value of everything that training logs, by its name in the logs."""
        return MappingProxyType(self._latest)

    def _log_latest(self, batch: Batch) -> None:
        """Log the last value of everything, by iteration.

        Lightning's own logging counts batches, not iterations, and would show one role for ever when its interval
        is a multiple of the update ratio.
        """
        now = time.perf_counter()
        if self._clock is not None:
            samples = len(batch.prompts) * self.accumulate * self.trainer.world_size
            self._latest[SPEED] = samples / (now - self._clock)
        self._clock = now
        for name, value in self._latest.items():
            self.log(name, value, logger=False, prog_bar=name in SHOWN)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.trainer.global_step % every == 0:
            values = {name: float(value) for name, value in self._latest.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step=self.trainer.global_step)

    # ---- validation ---------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._denoising_errors(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._denoising_errors(batch, batch_idx, "test")

    def _denoising_errors(self, batch: Batch, batch_idx: int, stage: str) -> None:
        """Mean |x0 - real| of student and teacher at the student's times, on held-out clips and fixed noise."""
        real, cond = self.encode(batch)
        generator = torch.Generator(self.device).manual_seed(hash_seed(self.seed, stage, batch_idx))
        eps = torch.randn(real.shape, generator=generator, device=real.device)
        roles: dict[str, Role] = {"student": self.best_student, "teacher": "teacher"}
        for name, role in roles.items():
            gaps = []
            for step in self.sampling.steps:
                t = real.new_full((len(real),), step, dtype=torch.float64)
                gaps.append(paired_gap(real, self.x0(role, self.schedule.add_noise(real, eps, t), t, cond)))
            mean = torch.stack(gaps).mean()
            self.log(f"{stage}/{name}_x0_error", mean, batch_size=len(real), sync_dist=True, logger=False)

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._log_errors("val")

    def on_test_end(self) -> None:
        self._log_errors("test")

    def _log_errors(self, stage: str) -> None:
        """By iteration; Lightning's own logging counts batches."""
        values = {
            name: float(value)
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith(f"{stage}/") and name.endswith("_x0_error")
        }
        for logger in self.loggers if values else ():
            logger.log_metrics(values, step=self.trainer.global_step)

    # ---- sampling -----------------------------------------------------------------------------------------

    @property
    def best_student(self) -> Role:
        """The role to show and to export: the moving average where there is one."""
        return "student" if self.student.ema_decay is None else "ema"

    @torch.no_grad()
    def sample_latents(
        self,
        role: Role,
        prompt_cond: Conditioning,
        noise: Tensor,
        draw: Draw = torch.randn_like,
        teacher_steps: int = 50,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Clean latents [B, ...] from `noise`: the teacher's in `teacher_steps` guided steps, else in few."""
        if role == "teacher":
            times = self.backbone.teacher_times(teacher_steps, noise.shape[1:])
            denoise = partial(self.guided_teacher, cond=prompt_cond)
            return self.backbone.finish(sample(denoise, self.schedule, noise, times, "ode", on_step=on_step))
        denoise, steps = partial(self.x0, role, cond=prompt_cond), self.sampling.steps
        return self.backbone.finish(sample(denoise, self.schedule, noise, steps, self.sampling.kind, draw, on_step))

    # ---- networks, conditions, checkpoints ----------------------------------------------------------------

    @property
    def schedule(self) -> NoiseSchedule:
        return self.backbone.schedule

    @property
    def network(self) -> Roles:
        if self.roles is None:
            raise RuntimeError("the networks are not loaded yet; call configure_model() first")
        return self.roles

    @property
    def critic(self) -> Discriminator:
        if self.discriminator is None:
            raise RuntimeError(
                "there is no discriminator; set model.gan.weight above 0 and call configure_model() first"
            )
        return self.discriminator

    @property
    def datamodule(self) -> VideoDataModule | None:
        """The trainer's, if it is one of ours."""
        datamodule = getattr(self._trainer, "datamodule", None)
        return datamodule if isinstance(datamodule, VideoDataModule) else None

    def setup(self, stage: str) -> None:
        guard(self.loggers)  # type: ignore[arg-type]
        if self.datamodule is not None:
            for size in (self.datamodule.size, *self.datamodule.sizes):
                self.backbone.check_size(size)
            self.datamodule.require_teacher(self.backbone.identity())
        if stage == "fit":
            self._recipe = recipe_facts(self)
            settings = self.data_forcing
            cached = self.datamodule is not None and self.datamodule.cache is not None
            if settings.probability > 0 and settings.nearest_of > 1 and not cached:
                raise ValueError(
                    f"model.data_forcing.nearest_of is {settings.nearest_of}, which takes other clips' latents from a "
                    "cache, and there is none; run `lightning cache` and set data.cache, or set it to 1"
                )
            if settings.probability > 0 and settings.nearest_of > 1 and self.backbone.takes_image:
                raise ValueError(
                    f"model.data_forcing.nearest_of is {settings.nearest_of}, but clips of one caption begin with "
                    "different images, and this teacher's videos begin with a given one; set it to 1"
                )
            several = self.datamodule is not None and len(self.datamodule.sizes) > 1
            if several and (self.backbone.takes_image or (settings.probability > 0 and settings.nearest_of > 1)):
                raise ValueError(
                    "data.buckets trains neither image-to-video teachers nor model.data_forcing.nearest_of above 1; "
                    "set data.buckets: null"
                )
            try:
                self.backbone.few_step_scheduler(self.sampling.steps, self.sampling.kind)
            except ValueError as error:
                rank_zero_warn(f"this student could not be exported: {error}")

    def configure_model(self) -> None:
        """Load the teacher and build the roles on it; Lightning calls it once the strategy is known."""
        if self.roles is not None:
            return
        mesh = self.device_mesh
        self.build_roles(self.backbone.load_transformer(), blank=mesh is not None)
        if self.compiled:
            self.network.compile_blocks()
        if mesh is not None:
            self._shard(mesh["data_parallel"])
        resumed = self._trainer is not None and self.trainer.ckpt_path is not None
        if self.init_from is not None and not resumed:
            self.load_weights(self.init_from)

    def _shard(self, mesh: DeviceMesh) -> None:
        if self.backbone.quantization is not None or (self.backbone.offload and self.student.mode == "full"):
            raise ValueError(
                "trainer.strategy fsdp2 shards neither quantized weights nor a teacher that waits on the CPU; set "
                "model.quantization: null and model.offload: false, or take trainer.strategy: auto"
            )
        self.network.shard(mesh)
        if self.discriminator is not None:  # small, so every process keeps it
            average_gradients(self.discriminator)

    def build_roles(self, transformer: nn.Module, blank: bool = False) -> None:
        """Roles, and the discriminator if there is one, on the teacher's network; `blank` copies get their values when
        they are sharded."""
        student = self.student
        options = {"ema": student.ema_decay is not None, "checkpointing": student.gradient_checkpointing}
        if student.mode == "full":
            self.roles = FullRoles(transformer, **options, blank=blank)
        else:
            targets = student.targets or self.backbone.lora_targets
            alpha = student.alpha or student.rank
            self.roles = LoraRoles(transformer, targets, student.rank, alpha, seed=self.seed, **options)
        if self.gan.weight:
            self.discriminator = Discriminator(transformer, self.gan.blocks, self.seed)

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents [B, ...] float32 and conditioning of a batch, from the cache or by the pipeline's encoders."""
        self.backbone.to(self.device)
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, leave the frozen teacher out, and say what was distilled."""
        rewind(checkpoint["loops"], self._micro)
        owned = self.owned_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in owned}
        checkpoint[OURS] = {
            "counts": dict(self.counts),
            "latest": {name: float(value) for name, value in self._latest.items() if name != SPEED},
            "recipe": self._recipe,
            "logs": log_places(self.loggers),
            "runs": log_runs(self.loggers),
            "facts": {
                "Data": "not stated" if self.datamodule is None else self.datamodule.summary,
                "Iterations": str(checkpoint["global_step"]),
                "Started from": "a distilled student" if self.init_from else "the teacher",
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint[OURS]
        if self.trainer.state.fn == "fit" and "recipe" in ours:
            refuse_other_recipe(self._recipe, ours["recipe"])
        refuse_misfit(self.owned_keys(), set(checkpoint["state_dict"]))
        self.counts |= ours["counts"]
        self._latest = dict(ours.get("latest", {}))

    def owned_keys(self) -> set[str]:
        """The names, in the state dict, of what a checkpoint holds: all that is trained, but not the teacher."""
        head = {} if self.discriminator is None else self.discriminator.state_dict()
        return {f"roles.{name}" for name in self.network.owned()} | {f"discriminator.{name}" for name in head}

    def load_weights(self, path: str | Path) -> dict[str, str]:
        """Take student, fake score, average and discriminator (where both sides have one) from a checkpoint of this
        package.

        Returns what the checkpoint says of its making: name -> value.
        """
        checkpoint = read_checkpoint(path, lazily=True, like=only_weights)
        self.network.load_owned(below("roles.", checkpoint["state_dict"]))
        head = below("discriminator.", checkpoint["state_dict"])
        if self.discriminator is not None and head and not self.discriminator.take_over(head):
            rank_zero_warn(f"{path} has a discriminator on other blocks; this run begins with a new one")
        facts: dict[str, str] = checkpoint[OURS]["facts"]
        return facts
