"""The LightningModule: DMD2 with data forcing on any backbone.

Axis legend: B batch; latents are [B, ...] in the backbone's layout; times are [B].
Sources: DMD2, 2405.14867; Data-Forcing Distillation, 2606.18478.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from lightning_dfd.backbones import backbone_from_pretrained
from lightning_dfd.data import VideoDataModule
from lightning_dfd.noise import NoiseSchedule, shift_time
from lightning_dfd.objectives import (
    dmd_gradient,
    draw_forcing,
    fake_score_loss,
    guide,
    paired_gap,
    surrogate_loss,
    teacher_data,
)
from lightning_dfd.roles import TRAINED, FullRoles, LoraRoles, Roles
from lightning_dfd.sampler import Draw, roll_to, sample, teacher_times
from lightning_dfd.settings import DataForcingSettings, DMDSettings, SamplingSettings, StudentSettings
from lightning_dfd.types import Batch, Conditioning, Role

SHOWN = ("train/student_loss", "train/fake_loss", "train/paired_gap")  # on the progress bar
ADAMW: OptimizerCallable = partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)


class DistillationModule(LightningModule):
    """Distils a diffusers video pipeline into a few-step student by DMD2, with or without data forcing.

    One training step takes one counted optimizer step, so that `trainer.global_step` is the iteration. The
    student is updated in one of `dmd.student_update_freq` iterations, the fake score in all others.

    Args:
        teacher: hub id or folder of a diffusers video pipeline.
        backbone: import path of a Backbone subclass; null to choose by the pipeline's class.
        dtype: precision of the frozen weights. What is trained is float32; see trainer.precision.
        max_sequence_length: text tokens per prompt; null for the pipeline's default.
        student: what is trained.
        sampling: the student's times and kind of sampling.
        dmd: distribution matching.
        data_forcing: data forcing.
        student_optimizer: of the student.
        fake_optimizer: of the fake score.
        lr_scheduler: of both, stepped with its optimizer; null for a constant rate.
        gradient_clip: largest norm of a role's gradient.
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
        student: StudentSettings = StudentSettings(),  # noqa: B008 (frozen)
        sampling: SamplingSettings = SamplingSettings(),  # noqa: B008
        dmd: DMDSettings = DMDSettings(),  # noqa: B008
        data_forcing: DataForcingSettings = DataForcingSettings(),  # noqa: B008
        student_optimizer: OptimizerCallable = ADAMW,
        fake_optimizer: OptimizerCallable = ADAMW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float = 10.0,
        accumulate: int = 1,
        init_from: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Hyperparameters are not saved into checkpoints: on resume the recipe and the command line decide.
        self.automatic_optimization = False
        self.strict_loading = False  # the teacher is not in checkpoints; on_load_checkpoint checks the rest
        self.backbone = backbone_from_pretrained(teacher, getattr(torch, dtype), max_sequence_length, backbone)
        self.student, self.sampling, self.dmd, self.data_forcing = student, sampling, dmd, data_forcing
        self.student_optimizer, self.fake_optimizer = student_optimizer, fake_optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.init_from, self.seed = init_from, seed
        self.roles: Roles | None = None
        self.negative: Conditioning | None = None
        self.counts = {"student_steps": 0, "forced_steps": 0}
        self._micro = 0  # batches since the last optimizer step
        self._latest: dict[str, Tensor | float] = {}
        self._clock: float | None = None

    # ---- the step: docs/concepts.md in code ------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self._seed_draws()
        real, cond = self.encode(batch)
        loss = self.student_loss(real, cond) if self.student_turn else self.fake_loss(real, cond)
        self.manual_backward(loss / self.accumulate)
        self._micro += 1
        if self._micro == self.accumulate:
            self._step_optimizer()
            self._log_latest(batch)

    def student_loss(self, real: Tensor, cond: Conditioning) -> Tensor:
        """The surrogate of the DMD gradient, data-forced in a drawn share of the steps (2606.18478, eq. 9)."""
        gen = self.generate(real, cond)
        t, eps = self.score_time(len(gen)), self.noise_like(gen)
        forced = draw_forcing(self.data_forcing.probability, self._shared_draws)
        shown = teacher_data(gen, real, forced)
        with torch.no_grad():
            fake = self.x0("fake", self.schedule.add_noise(gen, eps, t), t, cond)
            teacher = self.guided_teacher(self.schedule.add_noise(shown, eps, t), t, cond)
        gradient = dmd_gradient(gen, fake, teacher)
        loss = surrogate_loss(gen, gradient)
        if self._micro == 0:
            self.counts["student_steps"] += 1
            self.counts["forced_steps"] += forced
        self._latest |= {
            "train/student_loss": loss.detach(),
            "train/dmd_gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
            "train/paired_gap": paired_gap(real, gen),
            "train/forced_share": self.counts["forced_steps"] / self.counts["student_steps"],
        }
        return loss

    def fake_loss(self, real: Tensor, cond: Conditioning) -> Tensor:
        """Denoising score matching of the fake score on what the student makes now."""
        with torch.no_grad():
            gen = self.generate(real, cond)
        t, eps = self.score_time(len(gen)), self.noise_like(gen)
        x_t = self.schedule.add_noise(gen, eps, t)
        fake = self.x0("fake", x_t, t, cond)
        loss = fake_score_loss(self.schedule, fake, gen, x_t, t, self.dmd.fake_space)
        self._latest["train/fake_loss"] = loss.detach()
        return loss

    def generate(self, real: Tensor, cond: Conditioning) -> Tensor:
        """The student's clean latents from its training input at one of its own times.

        `data`: the input is the noised real clip, each at a time of its own. `rollout`: the input is where the
        student's own sampling, without gradient, stands at a time shared by batch and ranks.
        """
        steps, draws = self.sampling.steps, self._draws
        if self.student.input == "data":
            pick = torch.randint(len(steps), (len(real),), generator=draws, device=real.device)
            t = torch.tensor(steps, dtype=torch.float64, device=real.device)[pick]
            return self.x0("student", self.schedule.add_noise(real, self.noise_like(real), t), t, cond)
        last = int(torch.randint(len(steps), (), generator=self._shared_draws))
        denoise = partial(self.x0, "student", cond=cond)
        with torch.no_grad():
            x_t = roll_to(
                denoise, self.schedule, self.noise_like(real), steps[: last + 1], self.sampling.kind, self.noise_like
            )
        return denoise(x_t, x_t.new_full((len(x_t),), steps[last], dtype=torch.float64))

    def x0(self, role: Role, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """A role's estimate of the clean latents."""
        with self.network.act_as(role) as transformer:
            return self.backbone.x0(transformer, x_t, t, cond)

    def guided_teacher(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The teacher with classifier-free guidance, both calls in one batch."""
        if self.dmd.guidance == 1.0:
            return self.x0("teacher", x_t, t, cond)
        negative = self.negative_conditioning(cond)
        both = Conditioning.cat([negative.expand(len(x_t)), cond])
        uncond, conditional = self.x0("teacher", torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guide(uncond, conditional, self.dmd.guidance)

    # ---- draws --------------------------------------------------------------------------------------------

    @property
    def student_turn(self) -> bool:
        return (self.trainer.global_step + 1) % self.dmd.student_update_freq == 0

    def _seed_draws(self) -> None:
        """Generators of this batch: a function of seed, iteration and rank alone, so that a resumed run draws
        what the uninterrupted one would. Ranks share the second one."""
        step = self.trainer.global_step
        own = _hash_seed(self.seed, "draws", step, self._micro, self.global_rank)
        self._draws = torch.Generator(self.device).manual_seed(own)
        self._shared_draws = torch.Generator().manual_seed(_hash_seed(self.seed, "shared", step))

    def noise_like(self, latents: Tensor) -> Tensor:
        return torch.randn(latents.shape, generator=self._draws, device=latents.device)

    def score_time(self, batch_size: int) -> Tensor:
        settings = self.dmd.score_time
        uniform = torch.rand(batch_size, generator=self._draws, device=self.device, dtype=torch.float64)
        return settings.low + (settings.high - settings.low) * shift_time(uniform, settings.shift)

    # ---- optimizers ---------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        makers = {"student": self.student_optimizer, "fake": self.fake_optimizer}
        optimizers = [makers[role](self.network.parameters_of(role)) for role in TRAINED]
        schedulers = [self.lr_scheduler(optimizer) for optimizer in optimizers] if self.lr_scheduler else []
        self._recipe_groups = [[_without_params(group) for group in opt.param_groups] for opt in optimizers]
        return optimizers, schedulers

    def on_train_start(self) -> None:
        """A restored optimizer brings its old settings along; those of the recipe and command line win."""
        optimizers = _as_list(self.optimizers(use_pl_optimizer=False))
        schedulers = _as_list(self.lr_schedulers())
        for index, (optimizer, recipe) in enumerate(zip(optimizers, self._recipe_groups, strict=True)):
            for group, fresh in zip(optimizer.param_groups, recipe, strict=True):
                scale = fresh.get("initial_lr", fresh["lr"]) / group.get("initial_lr", group["lr"])
                group.update(fresh, lr=group["lr"] * scale)
            if schedulers:
                schedulers[index].base_lrs = [group["initial_lr"] for group in recipe]

    def _step_optimizer(self) -> None:
        self._micro = 0
        index = TRAINED.index("student" if self.student_turn else "fake")
        is_student = self.student_turn
        optimizer = _as_list(self.optimizers())[index]
        optimizer.step()
        optimizer.zero_grad()
        if self.lr_scheduler:
            _as_list(self.lr_schedulers())[index].step()
        if is_student and self.student.ema_decay is not None:
            self.network.update_average(self.student.ema_decay)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        role = TRAINED[_as_list(self.optimizers(use_pl_optimizer=False)).index(optimizer)]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
        self._latest[f"train/{role}_grad_norm"] = norm

    def _log_latest(self, batch: Batch) -> None:
        """Log the last value of everything, by iteration.

        Lightning's own logging counts batches, not iterations, and would show one role for ever when its interval
        is a multiple of the update ratio.
        """
        now = time.perf_counter()
        if self._clock is not None:
            samples = len(batch.prompts) * self.accumulate * self.trainer.world_size
            self._latest["train/samples_per_s"] = samples / (now - self._clock)
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
        generator = torch.Generator(self.device).manual_seed(_hash_seed(self.seed, stage, batch_idx))
        eps = torch.randn(real.shape, generator=generator, device=real.device)
        roles: dict[str, Role] = {"student": self.best_student, "teacher": "teacher"}
        for name, role in roles.items():
            gaps = []
            for step in self.sampling.steps:
                t = real.new_full((len(real),), step, dtype=torch.float64)
                gaps.append(paired_gap(real, self.x0(role, self.schedule.add_noise(real, eps, t), t, cond)))
            self.log(f"{stage}/{name}_x0_error", torch.stack(gaps).mean(), batch_size=len(real), sync_dist=True)

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
            times = teacher_times(self.backbone.scheduler_config, teacher_steps)
            denoise = partial(self.guided_teacher, cond=prompt_cond)
            return sample(denoise, self.schedule, noise, times, "ode", on_step=on_step)
        denoise = partial(self.x0, role, cond=prompt_cond)
        return sample(denoise, self.schedule, noise, self.sampling.steps, self.sampling.kind, draw, on_step)

    # ---- networks, conditions, checkpoints ----------------------------------------------------------------

    @property
    def schedule(self) -> NoiseSchedule:
        return self.backbone.schedule

    @property
    def network(self) -> Roles:
        if self.roles is None:
            raise RuntimeError("the networks are not loaded yet; call configure_model() first")
        return self.roles

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, VideoDataModule):
            self.backbone.check_size(datamodule.size)
            datamodule.require_teacher(self.backbone.identity())
        if stage == "fit":
            try:
                self.backbone.few_step_scheduler(self.sampling.steps, self.sampling.kind)
            except ValueError as error:
                rank_zero_warn(f"this student could not be exported: {error}")

    def configure_model(self) -> None:
        """Load the teacher and build the roles on it; Lightning calls it once the strategy is known."""
        if self.roles is not None:
            return
        transformer = self.backbone.load_transformer()
        student = self.student
        options = {"ema": student.ema_decay is not None, "checkpointing": student.gradient_checkpointing}
        if student.mode == "full":
            self.roles = FullRoles(transformer, **options)
        else:
            targets = student.targets or self.backbone.lora_targets
            alpha = student.alpha or student.rank
            self.roles = LoraRoles(transformer, targets, student.rank, alpha, seed=self.seed, **options)
        resumed = self._trainer is not None and self.trainer.ckpt_path is not None
        if self.init_from is not None and not resumed:
            self.load_weights(self.init_from)

    def encode(self, batch: Batch) -> tuple[Tensor, Conditioning]:
        """Latents [B, ...] float32 and conditioning of a batch, from the cache or by the pipeline's encoders."""
        self.backbone.to(self.device)
        if batch.latents is not None and batch.cond is not None:
            return batch.latents.float(), batch.cond
        if batch.video is None:
            raise ValueError("a batch needs either video or both latents and cond")
        return self.backbone.encode_videos(batch.video), self.backbone.encode_prompts(batch.prompts)

    def negative_conditioning(self, like: Conditioning) -> Conditioning:
        """The negative prompt's conditioning, from the cache or encoded once, where `like` lives."""
        if self.negative is None:
            datamodule = getattr(self._trainer, "datamodule", None)
            prompt = self.dmd.negative_prompt
            cached = datamodule.negative_conditioning(prompt) if isinstance(datamodule, VideoDataModule) else None
            self.negative = cached or self.backbone.encode_prompts([prompt])
        name, tensor = next(iter(like.tensors.items()))
        if self.negative[name].device != tensor.device:
            self.negative = self.negative.to(tensor.device)
        return self.negative

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, leave the frozen teacher out, and say what was distilled."""
        owned = self._owned_keys()
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in owned}
        datamodule = getattr(self.trainer, "datamodule", None)
        data = "not stated"
        if isinstance(datamodule, VideoDataModule):
            data = f"{len(datamodule.clips)} clips of {Path(datamodule.folder or datamodule.cache or '').name}"
        checkpoint["lightning_dfd"] = {
            "counts": dict(self.counts),
            "facts": {
                "Data": data,
                "Iterations": str(checkpoint["global_step"]),
                "Started from": "a distilled student" if self.init_from else "the teacher",
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, given = self._owned_keys(), set(checkpoint["state_dict"])
        if own != given:
            example = sorted(own ^ given)[0]
            raise ValueError(
                f"the checkpoint does not fit this model: {len(own - given)} tensors are missing and "
                f"{len(given - own)} unexpected, as {example!r}. Use the student.mode, rank, targets and ema_decay "
                "with which it was made."
            )
        self.counts = dict(checkpoint["lightning_dfd"]["counts"])

    def _owned_keys(self) -> set[str]:
        return {f"roles.{name}" for role in self.network.held for name in self.network.names_of(role)}

    def load_weights(self, path: str | Path) -> dict[str, str]:
        """Take student, fake score and average (where both sides have one) from a checkpoint of this package.

        Returns what the checkpoint says of its making: name -> value.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"there is no checkpoint at {path}; a data-forcing recipe starts from a DMD2 student "
                "(run the dmd2 recipe first), or set model.init_from: null"
            )
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state: Mapping[str, Tensor] = checkpoint["state_dict"]
        for role in self.network.held:
            names = self.network.names_of(role)
            given = {shared: state[f"roles.{name}"] for name, shared in names.items() if f"roles.{name}" in state}
            if role == "ema" and not given:  # the start kept no average: it begins at the student
                given = self.network.weights_of("student")
            self.network.load_weights(role, given)
        facts: dict[str, str] = checkpoint["lightning_dfd"]["facts"]
        return facts


def _hash_seed(*parts: Any) -> int:
    """A seed in [0, 2^63) from any printable parts: neighbouring iterations get unrelated streams."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _as_list(value: Any) -> list[Any]:
    """Lightning answers with one object where there is only one."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
