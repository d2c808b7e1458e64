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
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_dfd.backbones import backbone_from_pretrained
from lightning_dfd.data import VideoDataModule
from lightning_dfd.diffusion.draws import Draws, hash_seed
from lightning_dfd.diffusion.noise import NoiseLevel, NoiseSchedule, Time
from lightning_dfd.diffusion.sampler import Draw, sample
from lightning_dfd.distributed.sharding import average_gradients
from lightning_dfd.files import differing, expanded
from lightning_dfd.networks.blocks import feature_shape, tapped
from lightning_dfd.networks.quantization import Quantization
from lightning_dfd.networks.roles import TRAINED, FullRoles, LoraRoles, Roles, check_targets
from lightning_dfd.objectives import guide, is_unguided, paired_gap
from lightning_dfd.objectives.terms import (
    GAN,
    DataForcing,
    DistributionMatching,
    FirstStep,
    Networks,
    Step,
    StudentInput,
    Term,
    TermRecipe,
    fake_loss,
    student_loss,
)
from lightning_dfd.runs.checkpoints import (
    FRAME_RATE,
    OURS,
    only_weights,
    read_checkpoint,
    refuse_misfit,
    rewind,
    strip_prefix,
    take_over,
)
from lightning_dfd.runs.loggers import guard
from lightning_dfd.runs.logs import log_places, log_runs
from lightning_dfd.training.facts import recipe_facts, refuse_other_recipe, student_facts
from lightning_dfd.training.optimizers import BadGradients, Groups, as_list, clip_parts, plain, settings_of
from lightning_dfd.training.schedules import (
    Schedule,
    Watching,
    build,
    go_on,
    plan_at,
    ready,
    refuse_unlogged,
    takes_a_value,
    trial,
)
from lightning_dfd.training.settings import (
    DataForcingSettings,
    DiversitySettings,
    DMDSettings,
    GANSettings,
    SamplingSettings,
    StudentSettings,
    check_counts,
)
from lightning_dfd.types import Batch, Conditioning, Role

SPEED = "train/samples_per_s"
SHOWN = ("train/student_loss", "train/fake_loss", "train/paired_gap")  # on the progress bar
ADAMW = partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)


class DistillationModule(LightningModule):
    """Distils a diffusers video pipeline into a few-step student by DMD2, with or without data forcing.

    One training step takes one counted optimizer step, so that `trainer.global_step` is the iteration. The
    student is updated in one of `dmd.student_update_freq` iterations, the fake score (with the GAN's discriminator,
    if there is one) in all others.

    Args:
        teacher: folder of a diffusers video pipeline, or its hub id, as `org/name` or `org/name@revision`.
        backbone: import path of a Backbone subclass, or `captured` for one that learns an unlisted pipeline's calls
            by watching it; null to choose by the pipeline's class.
        dtype: precision of the frozen weights. What is trained is float32; see trainer.precision.
        max_sequence_length: text tokens per prompt; null for the pipeline's default.
        quantization: of the frozen weights, for adapters; null for none.
        compile: compile the network's blocks by torch.compile: slower to start, then faster.
        offload: keep VAE and text encoders, and with full tuning the teacher, on the CPU but for what is computing.
        vae_tiling: decode videos in overlapping tiles: less memory, slightly other pixels. Latents are the same.
        student: what is trained.
        sampling: the student's times and kind of sampling.
        dmd: distribution matching.
        data_forcing: data forcing.
        gan: DMD2's GAN; off by default.
        diversity: DP-DMD's term for the student's first step; off by default.
        terms: further terms of the loss, by class path (docs/new_objective.md); null for none.
        student_optimizer: of the student.
        fake_optimizer: of the fake score, and of the discriminator.
        lr_scheduler: of both rates, by iteration: a class, or a function of the optimizer; null for constant rates.
        student_lr_scheduler: of the student's rate alone, instead of lr_scheduler.
        fake_lr_scheduler: of the fake score's, and of the discriminator's.
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
        vae_tiling: bool = False,
        student: StudentSettings = StudentSettings(),  # noqa: B008 (frozen)
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008
        dmd: DMDSettings = DMDSettings(),  # noqa: B008
        data_forcing: DataForcingSettings = DataForcingSettings(),  # noqa: B008
        gan: GANSettings = GANSettings(),  # noqa: B008
        diversity: DiversitySettings = DiversitySettings(),  # noqa: B008
        terms: list[Term] | None = None,
        student_optimizer: OptimizerCallable = ADAMW,
        fake_optimizer: OptimizerCallable = ADAMW,
        lr_scheduler: Schedule | None = None,
        student_lr_scheduler: Schedule | None = None,
        fake_lr_scheduler: Schedule | None = None,
        gradient_clip: float = 10.0,
        accumulate: int = 1,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_counts(gradient_clip, accumulate, seed)
        if quantization is not None:
            quantization.check(student.mode)
        # Hyperparameters are not saved into checkpoints: on resume the recipe and the command line decide.
        self.automatic_optimization = False
        self.strict_loading = False  # the teacher is not in checkpoints; on_load_checkpoint checks the rest
        teacher = expanded(teacher, "model.teacher")
        init_from = init_from and expanded(init_from, "model.init_from")
        self.backbone = backbone_from_pretrained(teacher, getattr(torch, dtype), max_sequence_length, backbone)
        self.backbone.quantization, self.backbone.offload = quantization, offload
        self.backbone.vae_tiling = vae_tiling
        if student.mode == "lora" and student.targets is not None:
            check_targets(self.backbone.blank_transformer(), student.targets)
        self.compiled = compile
        self.student, self.sampling, self.dmd = student, sampling, dmd
        self.data_forcing = data_forcing
        self.student_optimizer, self.fake_optimizer = student_optimizer, fake_optimizer
        if lr_scheduler is not None and (student_lr_scheduler is not None or fake_lr_scheduler is not None):
            raise ValueError(
                "model.lr_scheduler is of both roles; set it to null, or leave out model.student_lr_scheduler and "
                "model.fake_lr_scheduler"
            )
        self.lr_scheduler = lr_scheduler
        schedules = {"student": student_lr_scheduler or lr_scheduler, "fake": fake_lr_scheduler or lr_scheduler}
        self.schedules = {role: schedule for role, schedule in schedules.items() if schedule is not None}
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.init_from, self.seed = init_from, seed
        self.roles: Roles | None = None
        self.student_input = StudentInput(student.input, sampling.steps, sampling.kind)
        self.terms: tuple[Term, ...] = (
            DistributionMatching(dmd),
            DataForcing(data_forcing),
            *([GAN(gan, seed)] if gan.weight else []),
            *([FirstStep(diversity, dmd.guidance)] if diversity.weight else []),
            *(terms or []),
        )
        self.term_modules = nn.ModuleDict()  # what terms train, by name
        self._term_rates: dict[str, float | None] = {}
        self.negative: Conditioning | None = None
        self.loaded_from: dict[str, Any] = {"checkpoint": None, "iteration": None}  # of `load_weights`
        self.counts = {"student_steps": 0, "forced_steps": 0, "skipped_steps": 0}
        self._bad_gradients = BadGradients()
        self._parts: dict[str, list[nn.Parameter]] = {}  # what is clipped by a norm of its own, by name
        self._recipe: dict[str, dict[str, Any]] = {}
        self._settings: list[Groups] = []  # of the optimizers, before they had schedules
        self._built: list[Groups] = []  # and after
        self._optimizer_names: list[str] = []
        self._watching: list[Watching] = []
        self._followed: set[str] = set()
        self._kept: dict[str, Any] | None = None  # what on_load_checkpoint leaves for on_train_start
        self._micro = 0  # batches since the last optimizer step
        self._latest: dict[str, Tensor | float] = {}
        self._clock: float | None = None
        self.check_terms(TermRecipe(self.student_input, student.mode == "lora", offload))

    # ---- the step: docs/concepts.md in code ------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        role: Role = "student" if self.student_turn else "fake"
        torch.manual_seed(hash_seed("global", *self.place))  # for networks of users' own, which may draw from it
        real, cond = self.encode(batch)
        step = self.begin_step(real, cond, batch.prompts)
        loss = self.loss(role, step)
        self.manual_backward(loss / self.accumulate)
        self._latest |= step.logs
        self._micro += 1
        if self._micro == self.accumulate:
            if role == "student":  # once for all batches, so that an iteration done anew counts once
                self._count(step)
            self._step_optimizer()
            self._log_latest(batch)

    def begin_step(
        self, real: Tensor, cond: Conditioning, prompts: Sequence[str] = (), draws: Draws | None = None
    ) -> Step:
        """The values of a batch, each computed when a term asks for it.

        Args:
            real: clean latents [B, ...] float32.
            cond: their conditioning.
            prompts: their captions, by which other clips are found.
            draws: of this batch; None for those of the present place in the run.
        """
        return Step(
            self.networks,
            real,
            cond,
            draws or Draws.of(*self.place, self.device),
            self.student_input,
            self.dmd.score_time,
            self.terms,
            partial(self._others, prompts),
        )

    def loss(self, role: Role, step: Step) -> Tensor:
        """The sum of the terms of a trained role's loss."""
        return (student_loss if role == "student" else fake_loss)(self.terms, step)

    @property
    def networks(self) -> Networks:
        """The roles as the functions that terms call."""
        return Networks(
            self.schedule,
            partial(self.x0, "student"),
            partial(self.x0, "fake"),
            self.guided_teacher,
            self.teacher_features,
            dict(self.term_modules.items()),
        )

    def _count(self, step: Step) -> None:
        self.counts["student_steps"] += 1
        for term in self.terms:
            for name, number in term.counted(step).items():
                self.counts[name] = self.counts.get(name, 0) + number
        for term in self.terms:
            self._latest |= term.summary(self.counts)

    def _others(self, prompts: Sequence[str], count: int, generator: torch.Generator) -> list[list[Tensor]]:
        assert self.datamodule is not None  # setup() demands a cache
        return [self.datamodule.same_caption_latents(prompt, count, generator) for prompt in prompts]

    # ---- what the terms are made of ------------------------------------------------------------------------------

    def x0(self, role: Role, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """A role's estimate of the clean latents."""
        with self.network.act_as(role) as transformer:
            return self.backbone.x0(transformer, x_t, t, cond)

    def guided_teacher(
        self, x_t: Tensor, t: Time, cond: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """The teacher with classifier-free guidance, both calls in one batch.

        `guidance` is one number or [B]; None for the recipe's. Where it is 1 for all, the unconditional call is saved.
        """
        scale = self.dmd.guidance if guidance is None else guidance
        if is_unguided(scale):
            return self.x0("teacher", x_t, t, cond)
        negative = self.negative_conditioning(cond)
        twice = t.twice() if isinstance(t, NoiseLevel) else torch.cat([t, t])
        both = Conditioning.cat([self.backbone.unconditional(negative, cond), cond])
        uncond, conditional = self.x0("teacher", torch.cat([x_t, x_t]), twice, both).chunk(2)
        return guide(uncond, conditional, scale)

    def teacher_features(self, x_t: Tensor, t: Tensor, cond: Conditioning, blocks: Sequence[int]) -> list[Tensor]:
        """What blocks of the teacher make of x_t, without guidance: N x [B, S, D], with gradient to x_t."""
        with self.network.act_as("teacher") as transformer, tapped(transformer, blocks, len(x_t)) as found:
            self.backbone.call(transformer, x_t, self.schedule.timestep(t), cond)
        return found

    # ---- draws --------------------------------------------------------------------------------------------

    @property
    def student_turn(self) -> bool:
        return (self.trainer.global_step + 1) % self.dmd.student_update_freq == 0

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the run is, from which its draws follow: seed, iteration, batch within it, rank."""
        return self.seed, self.trainer.global_step, self._micro, self.global_rank

    @property
    def between_iterations(self) -> bool:
        """Whether all batches of an iteration are done and none of the next."""
        return self._micro == 0

    # ---- optimizers ---------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self._parts = parts = {str(role): self.network.parameters_of(role) for role in TRAINED}
        fake: Any = parts["fake"]
        if self.term_modules:  # no optimizers of their own: one counted step an iteration
            fake = [{"params": fake}]
            for name, module in self.term_modules.items():
                parts[name], rate = list(module.parameters()), self._term_rates[name]
                fake.append({"params": parts[name]} | ({} if rate is None else {"lr": rate}))
        makes = {"student": self.student_optimizer, "fake": self.fake_optimizer}
        given = {"student": parts["student"], "fake": fake}
        optimizers = [build(f"model.{role}_optimizer", makes[role], given[role]) for role in TRAINED]
        self._settings = [settings_of(optimizer) for optimizer in optimizers]
        schedulers: dict[str, Any] = {
            role: build(self._schedule_key(role), self.schedules[role], ready(optimizer))
            for role, optimizer in zip(TRAINED, optimizers, strict=True)
            if role in self.schedules
        }
        self._built = [settings_of(optimizer) for optimizer in optimizers]
        self._watching = [scheduler for scheduler in schedulers.values() if takes_a_value(scheduler)]
        named: Any = [
            {"scheduler": made, "interval": "step", "name": f"lr-{role}"} for role, made in schedulers.items()
        ]
        return optimizers, named

    def _schedule_key(self, role: str) -> str:
        return "model.lr_scheduler" if self.lr_scheduler is not None else f"model.{role}_lr_scheduler"

    def _try_optimizers(self) -> list[str]:
        """The optimizers' names; raises ValueError where they or their schedules do not fit the run."""
        rates = [term.learning_rate() for term in self.terms if type(term).build is not Term.build]
        heads = [{} if rate is None else {"lr": rate} for rate in rates]
        groups: dict[str, list[dict[str, Any]]] = {"student": [], "fake": [{}, *heads] if heads else []}
        makes = {"student": self.student_optimizer, "fake": self.fake_optimizer}
        return [
            trial(
                role, f"model.{role}_optimizer", makes[role], groups[role], self._schedule_key(role),
                self.schedules.get(role), self.trainer.max_steps,
            )
            for role in TRAINED
        ]  # fmt: skip

    def on_fit_start(self) -> None:
        if self.backbone.offload:
            self.network.offload_teacher(self.device)

    def on_train_start(self) -> None:
        """A restored optimizer brings its old settings along; the recipe's and the command line's win."""
        optimizers = as_list(self.optimizers(use_pl_optimizer=False))
        if self._kept is not None:
            self._go_on(optimizers, **self._kept)
            self._kept = None
        for scheduler in self._watching:
            if scheduler.monitor.startswith("val/"):  # measured at the start, or restored, by a callback
                refuse_unlogged(scheduler, self._followed | set(self.trainer.callback_metrics))
        for optimizer in optimizers:
            if callable(getattr(optimizer, "train", None)):  # schedule-free ones; they stay in it, see docs/recipes.md
                optimizer.train()

    def _go_on(
        self, optimizers: Sequence[torch.optim.Optimizer], plans: Sequence[Any] | None, schedules: Sequence[Any]
    ) -> None:
        by_optimizer = {id(scheduler.optimizer): scheduler for scheduler in as_list(self.lr_schedulers())}
        kept = iter(schedules)
        plans = plans or [None] * len(optimizers)
        for role, optimizer, built, plan in zip(TRAINED, optimizers, self._built, plans, strict=True):
            state = next(kept) if plan is not None and plan["schedule"] is not None else None
            go_on(role, optimizer, by_optimizer.get(id(optimizer)), built, plan, state, self.trainer.global_step)

    def on_validation_model_zero_grad(self) -> None:
        """Keep what an iteration has gathered; Lightning drops gradients before a validation, and counts batches."""

    def _step_optimizer(self) -> None:
        self._micro = 0
        is_student = self.student_turn
        optimizers = as_list(self.optimizers())
        for role, each in zip(TRAINED, optimizers, strict=True):
            if each.param_groups[0].get("lr") is not None:  # some choose it in each step
                self._latest[f"train/{role}_lr"] = float(each.param_groups[0]["lr"])
        optimizer = optimizers[TRAINED.index("student" if is_student else "fake")]
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in as_list(self.lr_schedulers()):  # of both, so that they count iterations
            if scheduler not in self._watching:
                scheduler.step()
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
            self.follow(values)
            if self.trainer.global_step >= self.dmd.student_update_freq:  # both roles have had a turn
                for scheduler in self._watching:
                    if scheduler.monitor.startswith("train/"):
                        refuse_unlogged(scheduler, values)

    def follow(self, values: Mapping[str, float]) -> None:
        """Show the schedules that watch a value, as ReduceLROnPlateau, what was logged just now; on all processes."""
        self._followed |= values.keys()
        for scheduler in self._watching:
            if scheduler.monitor in values:
                value = torch.tensor(values[scheduler.monitor], dtype=torch.float64, device=self.device)
                scheduler.step(float(self.trainer.strategy.reduce(value, reduce_op="mean")))

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
            mean, fits = torch.stack(gaps).mean(), self.trainer.state.fn == "fit"
            self.log(f"{stage}/{name}_x0_error", mean, batch_size=len(real), sync_dist=True, logger=not fits)

    def on_validation_end(self) -> None:
        """Within fit, log by iteration: Lightning's own logging counts batches."""
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        values = {
            name: float(value) for name, value in self.trainer.callback_metrics.items() if name.endswith("_x0_error")
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
            self._optimizer_names = self._try_optimizers()
            data = self.datamodule
            cached, sizes = data is not None and data.cache is not None, 1 if data is None else len(data.sizes)
            if sizes > 1 and self.backbone.takes_image:
                raise ValueError("data.buckets trains no image-to-video teachers; set data.buckets: null")
            adapters, image = self.student.mode == "lora", self.backbone.takes_image
            self.check_terms(TermRecipe(self.student_input, adapters, self.backbone.offload, cached, image, sizes))
            try:
                self.backbone.few_step_scheduler(self.sampling.steps, self.sampling.kind)
            except ValueError as error:
                rank_zero_warn(f"this student could not be exported: {error}")

    def configure_model(self) -> None:
        """Load the teacher and build the roles on it; Lightning calls it once the strategy is known."""
        if self.roles is not None:
            return
        resumed = self._trainer is not None and self.trainer.ckpt_path is not None
        start = None if resumed else self.init_from
        if start is not None:
            self.open_checkpoint(start, "model.init_from")  # refused before the teacher is loaded
        mesh = self.device_mesh
        self.build_roles(self.backbone.load_transformer(), blank=mesh is not None)
        if self.compiled:
            self.network.compile_blocks()
        if mesh is not None:
            self._shard(mesh["data_parallel"])
        if start is not None:
            self.load_weights(start, "model.init_from")

    def check_terms(self, recipe: TermRecipe) -> None:
        """Raise ValueError where a term does not fit `recipe`."""
        for term in self.terms:
            term.check(recipe)

    def _shard(self, mesh: DeviceMesh) -> None:
        if self.backbone.quantization is not None or (self.backbone.offload and self.student.mode == "full"):
            raise ValueError(
                "trainer.strategy fsdp2 shards neither quantized weights nor a teacher that waits on the CPU; set "
                "model.quantization: null and model.offload: false, or take trainer.strategy: auto"
            )
        self.network.shard(mesh)
        average_gradients(self.term_modules)  # small, so every process keeps them

    def build_roles(self, transformer: nn.Module, blank: bool = False) -> None:
        """Roles on the teacher's network, and what terms train; `blank` copies get values when they are sharded."""
        student = self.student
        options = {"ema": student.ema_decay is not None, "checkpointing": student.gradient_checkpointing}
        if student.mode == "full":
            self.roles = FullRoles(transformer, **options, blank=blank)
        else:
            targets = student.targets or self.backbone.targets_in(transformer)
            alpha = student.alpha or student.rank
            self.roles = LoraRoles(transformer, targets, student.rank, alpha, seed=self.seed, **options)
        for term in self.terms:
            for name, module in term.build(partial(feature_shape, transformer)).items():
                if name in self.term_modules:
                    raise ValueError(f"two terms train a module named {name!r}; give them different names")
                self.term_modules[name], self._term_rates[name] = module, term.learning_rate()

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
        if "lr_schedulers" in checkpoint:  # it is not of weights alone
            checkpoint["lr_schedulers"] = [plain(state) for state in checkpoint["lr_schedulers"]]
            for state in checkpoint["optimizer_states"]:
                state["param_groups"] = [plain(group) for group in state["param_groups"]]
        data = self.datamodule
        checkpoint[OURS] = {
            "plans": [
                plan_at(optimizer, settings, self.schedules.get(role), checkpoint["global_step"])
                for role, optimizer, settings in zip(TRAINED, self.trainer.optimizers, self._settings, strict=False)
            ],
            "counts": dict(self.counts),
            "latest": {name: float(value) for name, value in self._latest.items() if name != SPEED},
            "recipe": self._recipe,
            "logs": log_places(self.loggers),
            "runs": log_runs(self.loggers),
            "facts": {
                "Data": "not stated" if data is None else data.summary,
                **({} if data is None else {FRAME_RATE: f"{data.playing_rate:g}"}),
                "Iterations": str(checkpoint["global_step"]),
                "Started from": "a distilled student" if self.init_from else "the teacher",
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = checkpoint[OURS]
        if self.trainer.state.fn == "fit" and "recipe" in ours:
            refuse_other_recipe(self._recipe, ours["recipe"])
        refuse_misfit(self.owned_keys(), set(checkpoint["state_dict"]))
        if self.trainer.state.fn == "fit":
            if "lr_schedulers" not in checkpoint:
                raise ValueError(
                    "the checkpoint holds weights alone (save_weights_only), so no run can go on from it; begin a new "
                    "one with them by model.init_from"
                )
            plans = ours.get("plans")
            for role, own, plan in zip(TRAINED, self._optimizer_names, plans or [], strict=bool(plans)):
                if own != plan["optimizer"]:
                    raise ValueError(
                        f"model.{role}_optimizer is {own}, and the checkpoint's is {plan['optimizer']}; resume with "
                        "that, or begin a new run with the checkpoint's weights by model.init_from"
                    )
            # Lightning would give the schedules all that the checkpoint holds, the old recipe's settings included.
            self._kept = {"plans": plans, "schedules": checkpoint["lr_schedulers"]}
            checkpoint["lr_schedulers"] = []
        self.counts |= ours["counts"]
        self._latest = dict(ours.get("latest", {}))

    def owned_keys(self) -> set[str]:
        """The names, in the state dict, of what a checkpoint holds: all that is trained, but not the teacher."""
        trained = self.term_modules.state_dict()
        return {f"roles.{name}" for name in self.network.owned()} | {f"term_modules.{name}" for name in trained}

    def load_weights(self, path: str | Path, key: str = "ckpt_path") -> dict[str, str]:
        """Take student, fake score, average and, where both sides have them, the modules of terms from a checkpoint of
        this package.

        Args:
            path: of the checkpoint.
            key: what names it in a recipe or on the command line, for errors.

        Returns what the checkpoint says of its making: name -> value.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is none, or of another teacher or another kind of student.
        """
        checkpoint = self.open_checkpoint(path, key)
        self.network.load_owned(strip_prefix("roles.", checkpoint["state_dict"]))
        for name, module in self.term_modules.items():
            given = strip_prefix(f"term_modules.{name}.", checkpoint["state_dict"])
            if given and not take_over(module, given):
                rank_zero_warn(f"{path} has a {name} of other shapes; this run begins with a new one")
        facts: dict[str, str] = checkpoint[OURS]["facts"]
        self.loaded_from = {"checkpoint": str(path), "iteration": checkpoint["global_step"]}
        return facts

    def open_checkpoint(self, path: str | Path, key: str) -> dict[str, Any]:
        """A checkpoint whose weights fit this recipe, as far as it says; they are left on the disk. Raises as
        `load_weights`."""
        checkpoint = read_checkpoint(path, lazily=True, like=only_weights, key=key)
        self._refuse_other_student(checkpoint[OURS].get("recipe", {}).get("fixed", {}), f"{key} {path}")
        return checkpoint

    def _refuse_other_student(self, given: Mapping[str, Any], named: str) -> None:
        """Raise ValueError where what a checkpoint says of its recipe makes another network of its weights."""
        own = student_facts(self.student, self.backbone.lora_targets)
        if given.get("model.student.mode") != self.student.mode:  # the others are then beside the point
            own = {"model.student.mode": self.student.mode}
        wrong = differing(own, given)
        pipeline = str(given.get("model.teacher", self.backbone.pipeline_name)).split(" ")[0]
        if pipeline != self.backbone.pipeline_name:
            wrong = [f"the teacher is a {pipeline} there and a {self.backbone.pipeline_name} here"]
        if wrong:
            raise ValueError(
                f"{named} holds another student: {'; '.join(wrong)}. Give the recipe and the options with which it was "
                "trained, or the config.yaml beside the checkpoint"
            )
