"""The LightningModule that trains: a loss made of terms, by turns of student and fake score.

Axis legend: B batch; latents are [B, ...] in the backbone's layout; times are [B].
Sources: DMD2, 2405.14867; DP-DMD, 2602.03139; Data-Forcing Distillation, 2606.18478.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_dfd.backbones import backbone_from_pretrained
from lightning_dfd.diffusion.draws import Draws, hash_seed
from lightning_dfd.files import expanded
from lightning_dfd.networks.quantization import Quantization
from lightning_dfd.networks.roles import TRAINED
from lightning_dfd.objectives.terms import Step, StudentInput, Term, fake_loss, student_loss
from lightning_dfd.runs.checkpoints import OURS, rewind
from lightning_dfd.runs.loggers import guard
from lightning_dfd.training import checks, saved
from lightning_dfd.training.assembly import loss_terms
from lightning_dfd.training.denoisers import Denoisers
from lightning_dfd.training.facts import Facts, recipe_facts
from lightning_dfd.training.journal import SHOWN, Journal
from lightning_dfd.training.optimization import Optimization, begin_training, mean_over, without_code
from lightning_dfd.training.optimizers import as_list
from lightning_dfd.training.schedules import Schedule
from lightning_dfd.training.settings import (
    DataForcingSettings,
    DiversitySettings,
    DMDSettings,
    GANSettings,
    SamplingSettings,
    StudentSettings,
)
from lightning_dfd.types import Batch, Conditioning, Role

ADAMW = partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)


class DistillationModule(Denoisers):
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
        checks.check_counts(gradient_clip, accumulate, seed)
        teacher = expanded(teacher, "model.teacher")
        init_from = init_from and expanded(init_from, "model.init_from")
        frozen = backbone_from_pretrained(teacher, getattr(torch, dtype), max_sequence_length, backbone)
        loader = frozen.loader
        loader.quantization, loader.offload, loader.vae_tiling = quantization, offload, vae_tiling
        checks.check_student(student, frozen)
        loss = loss_terms(dmd, data_forcing, gan, diversity, terms or [], seed)
        super().__init__(frozen, student, sampling, dmd, loss, seed, compile, init_from)
        # Hyperparameters are not saved into checkpoints: on resume the recipe and the command line decide.
        self.automatic_optimization = False
        self.gradient_clip, self.accumulate = gradient_clip, accumulate
        self.student_input = StudentInput(student.input, sampling.steps, sampling.kind)
        checks.check_loss(self.terms, student, self.student_input, frozen)
        self.optimization = Optimization(
            {"student": student_optimizer, "fake": fake_optimizer},
            lr_scheduler,
            {"student": student_lr_scheduler, "fake": fake_lr_scheduler},
            gradient_clip,
        )
        self.journal = Journal()
        self._recipe: Facts = {}
        self._micro = 0  # batches since the last optimizer step

    # ---- the step: docs/concepts.md in code ------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        role = self.role_in_turn
        torch.manual_seed(hash_seed("global", *self.place))  # for a user's network that draws from it
        real, cond = self.encode(batch)
        step = self.begin_step(real, cond, batch.prompts)
        loss = self.loss(role, step)
        self.manual_backward(loss / self.accumulate)
        self.journal.note(step.logs)
        self._micro += 1
        if self._micro == self.accumulate:
            self._end_iteration(role, step, len(batch.prompts))

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
        draws, others = draws or Draws.of(*self.place, self.device), partial(self._others, prompts)
        score_time = self.dmd.score_time
        return Step(self.networks, real, cond, draws, self.student_input, score_time, self.terms, others)

    def _others(self, prompts: Sequence[str], count: int, generator: torch.Generator) -> list[list[Tensor]]:
        assert self.datamodule is not None  # setup() demands a cache
        return [self.datamodule.same_caption_latents(prompt, count, generator) for prompt in prompts]

    def loss(self, role: Role, step: Step) -> Tensor:
        """The sum of the terms of a trained role's loss."""
        return (student_loss if role == "student" else fake_loss)(self.terms, step)

    def _end_iteration(self, role: Role, step: Step, samples: int) -> None:
        """Count, step the role's optimizer, and log."""
        if role == "student":  # once for all batches, so that an iteration done anew counts once
            self.journal.count_update(self.terms, step)
        self._micro = 0
        rates = self.optimization.step(role, as_list(self.optimizers()), as_list(self.lr_schedulers()))
        self.journal.note(rates)
        if role == "student" and self.student.ema_decay is not None:
            self.network.update_average(self.student.ema_decay)
        self.journal.clock(samples * self.accumulate * self.ranks.data_size)
        for name, value in self.journal.latest.items():
            self.log(name, value, logger=False, prog_bar=name in SHOWN)
        step_now, every = self.trainer.global_step, int(getattr(self.trainer, "log_every_n_steps", 0))
        if every and step_now % every == 0:
            values = self.journal.numbers()
            for logger in self.loggers:
                logger.log_metrics(values, step=step_now)
            self.follow(values)
            if step_now >= self.dmd.student_update_freq:  # both roles have had a turn
                self.optimization.refuse_unlogged("train/", set(values))

    def follow(self, values: Mapping[str, float]) -> None:
        """Show the schedules that watch a value what was logged just now; on all processes."""
        self.optimization.follow(values, mean_over(self.trainer.strategy, self.device))

    @property
    def role_in_turn(self) -> Role:
        """The role that this iteration updates."""
        return "fake" if (self.trainer.global_step + 1) % self.dmd.student_update_freq else "student"

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the run is, from which its draws follow: seed, iteration, batch within it, data rank."""
        return self.seed, self.trainer.global_step, self._micro, self.ranks.data_rank

    @property
    def between_iterations(self) -> bool:
        """Whether all batches of an iteration are done and none of the next."""
        return self._micro == 0

    # ---- validation ----------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_errors(batch, batch_idx, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_errors(batch, batch_idx, "test")

    def _log_errors(self, batch: Batch, batch_idx: int, stage: str) -> None:
        fits, size = self.trainer.state.fn == "fit", len(batch.prompts)
        for name, error in self.denoising_errors(batch, hash_seed(self.seed, stage, batch_idx)).items():
            self.log(f"{stage}/{name}_x0_error", error, batch_size=size, sync_dist=True, logger=not fits)

    def on_validation_end(self) -> None:
        """Within fit, log by iteration: Lightning's own logging counts batches."""
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        errors = {name: value for name, value in self.trainer.callback_metrics.items() if name.endswith("_x0_error")}
        for logger in self.loggers if errors else ():
            logger.log_metrics({name: float(value) for name, value in errors.items()}, step=self.trainer.global_step)

    # ---- building ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the recipe, before anything is loaded."""
        guard(self.loggers)
        data, trainer = self.datamodule, self.trainer
        if data is not None:
            checks.check_data(self.backbone, data)
        if stage == "fit":
            checks.check_loss(self.terms, self.student, self.student_input, self.backbone, data, known=True)
            rates = [term.learning_rate() for term in self.terms if type(term).build is not Term.build]
            self.optimization.check(rates, trainer.max_steps)
            checks.warn_unless_exportable(self.backbone, self.sampling)
            exact = {
                "trainer.precision": str(trainer.precision),
                "number of processes": self.ranks.size,
                "model.accumulate": self.accumulate,
                "model.compile": self.compiled,
            }
            self._recipe = recipe_facts(self.backbone, self.student, self.sampling, self.terms, self.seed, exact, data)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        roles: dict[Role, list[nn.Parameter]] = {role: self.network.parameters_of(role) for role in TRAINED}
        terms = {name: (module, self.term_rates[name]) for name, module in self.term_modules.items()}
        return self.optimization.build(roles, terms)

    def on_fit_start(self) -> None:
        if self.backbone.loader.offload:
            self.network.offload_teacher(self.device)

    def go_on(self) -> None:
        """Give restored optimizers and schedules what the recipe sets now. It is done once."""
        optimizers = as_list(self.optimizers(use_pl_optimizer=False))
        self.optimization.go_on(optimizers, as_list(self.lr_schedulers()), self.trainer.global_step)

    def on_train_start(self) -> None:
        self.go_on()  # before values are asked for that a callback has measured, or restored
        self.optimization.refuse_unlogged("val/", set(self.trainer.callback_metrics))
        begin_training(as_list(self.optimizers(use_pl_optimizer=False)))

    def on_validation_model_zero_grad(self) -> None:
        """Keep what an iteration has gathered; Lightning drops gradients before a validation, and counts batches."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        norms = self.optimization.clip(optimizer)
        self.journal.note({f"train/{name}_grad_norm": norm for name, norm in norms.items()})
        self.journal.count_skipped(self.optimization.drop_bad(optimizer, norms, self.trainer.global_step))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, leave the frozen teacher out, and say what was distilled."""
        rewind(checkpoint["loops"], self._micro)
        owned, iteration = self.owned_keys(), checkpoint["global_step"]
        checkpoint["state_dict"] = {key: value for key, value in checkpoint["state_dict"].items() if key in owned}
        without_code(checkpoint)
        plans = self.optimization.plans(self.trainer.optimizers, iteration)
        facts = saved.facts_of(self.datamodule, iteration, self.init_from)
        ours = {"plans": plans, "recipe": self._recipe, "facts": facts}
        checkpoint[OURS] = ours | self.journal.state() | saved.places_of(self.loggers)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        fits, ours = self.trainer.state.fn == "fit", checkpoint[OURS]
        saved.refuse_checkpoint(checkpoint, self.owned_keys(), self._recipe if fits else None)
        if fits:
            # Lightning would give the schedules all that the checkpoint holds, the old recipe's settings included.
            self.optimization.keep(ours.get("plans"), checkpoint["lr_schedulers"])
            checkpoint["lr_schedulers"] = []
        self.journal.load(ours)
