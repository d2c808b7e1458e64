"""What is checked of roles, training and exports: each a function that raises AssertionError, or answers the error that
it measured.

Axis legend: B batch, C channels, F frames, H height, W width; latents are [B, ...] in the backbone's layout.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dfd.cli.trainer import DistillationTrainer
from lightning_dfd.diffusion.sampler import Rollout
from lightning_dfd.export import export_student
from lightning_dfd.networks.roles import FullRoles, LoraRoles, Roles
from lightning_dfd.testing.case import PROMPTS, Case, gap, require
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.settings import DataForcingSettings, DMDSettings, GANSettings
from lightning_dfd.types import Batch, Role, SampleKind

HELD: tuple[Role, ...] = ("student", "fake", "ema")


# ---- roles ------------------------------------------------------------------------------------------------------


def roles_lora(case: Case, folder: Path) -> float:
    """Adapters on one base: every role starts as the teacher, gets its own gradients alone, and leaves the base."""
    roles = LoraRoles(case.teacher.load_transformer(), case.teacher.lora_targets, 4, 8, ema=True)
    return _check_roles(case, roles)


def roles_full(case: Case, folder: Path) -> float:
    """Separate networks: the same."""
    return _check_roles(case, FullRoles(case.teacher.load_transformer(), ema=True))


def checkpointing(case: Case, folder: Path) -> float:
    """Gradients are the same with activations recomputed, while other roles are asked in between; and the same as
    those of a network of its own (`roles.py` says what goes wrong there)."""
    plain, recomputed = (
        LoraRoles(case.teacher.load_transformer(), case.teacher.lora_targets, 4, 8, checkpointing=on)
        for on in (False, True)
    )
    for roles in (plain, recomputed):
        stir(roles)
    alone = copy.deepcopy(plain)
    alone._layers = [layer for layer in alone.base.modules() if hasattr(layer, "_active_adapter")]  # type: ignore[misc]
    alone._switch("student")
    x_t, t, cond = case.inputs()
    case.teacher.x0(alone.base, x_t, t, cond).square().mean().backward()
    expected = [parameter.grad for parameter in alone.parameters_of("student")]
    error = 0.0
    for roles in (plain, recomputed):
        found = student_gradients(case, roles)
        for mine, theirs in zip(found, expected, strict=True):
            require(mine is not None and theirs is not None, "a parameter of the student has no gradient")
            assert mine is not None
            assert theirs is not None
            error = max(error, gap(mine, theirs) / (float(theirs.abs().max()) + 1e-6))
    require(error < 1e-3, f"gradients differ by {error:.1e} of the largest, of adapters on a shared base")
    return error


@torch.no_grad()
def stir(roles: Roles) -> None:
    """Move every trained role away from the teacher, each its own way."""
    generator = torch.Generator().manual_seed(7)
    for role in roles.held:
        for parameter in roles.parameters_of(role):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def student_gradients(case: Case, roles: Roles) -> list[Tensor | None]:
    """Of the student's mean square, with another role asked before the backward pass."""
    x_t, t, cond = case.inputs()
    roles.zero_grad()
    with roles.act_as("student") as network:
        loss = case.teacher.x0(network, x_t, t, cond).square().mean()
    with torch.no_grad(), roles.act_as("fake") as network:
        case.teacher.x0(network, x_t, t, cond)
    with roles.act_as("fake"):
        loss.backward()
    return [parameter.grad for parameter in roles.parameters_of("student")]


def _check_roles(case: Case, roles: Roles) -> float:
    x_t, t, cond = case.inputs()

    @torch.no_grad()
    def made(role: Role) -> Tensor:
        with roles.act_as(role) as network:
            return case.teacher.x0(network, x_t, t, cond)

    before = made("teacher")
    error = max(gap(made(role), before) for role in HELD)
    require(error < 1e-5, f"a role does not start as the teacher: x0 differs by {error:.1e}")
    stir(roles)
    outputs = [made(role) for role in ("teacher", *HELD)]
    require(torch.equal(outputs[0], before), "training a role changed the teacher")
    apart = [gap(one, other) for i, one in enumerate(outputs) for other in outputs[:i]]
    require(min(apart) > 1e-4, "two roles that were moved apart answer the same")
    student_gradients(case, roles)
    own = {id(parameter) for parameter in roles.parameters_of("student")}
    given = {id(parameter) for parameter in roles.parameters() if parameter.grad is not None}
    require(given and given <= own, "a gradient of the student's loss reached another role")
    return error


# ---- training ---------------------------------------------------------------------------------------------------


def train_lora(case: Case, folder: Path) -> float | None:
    """A DMD step and a data-forced one, with adapters; the checkpoint holds what is trained and comes back."""
    return _check_training(case, folder, "lora")


def train_full(case: Case, folder: Path) -> float | None:
    """The same with whole networks."""
    return _check_training(case, folder, "full")


def gan(case: Case, folder: Path) -> float | None:
    """The discriminator's hooks find the teacher's features, with gradient to the student's clips."""
    module = case.module(gan=GANSettings(weight=0.1, r1_weight=1.0), dmd=DMDSettings(student_update_freq=2))
    trainer = _fit(case, module, folder, 2)
    for name in ("gan_generator_loss", "gan_discriminator_loss"):
        require(torch.as_tensor(module.journal.latest[f"train/{name}"]).isfinite(), f"{name} is not finite")
    x_t, t, cond = case.inputs()
    x_t.requires_grad_()
    discriminator: Any = module.term_modules["discriminator"]
    discriminator.judge(module.teacher_features(x_t, t, cond, discriminator.blocks)).sum().backward()
    require(x_t.grad is not None and x_t.grad.any(), "the discriminator's verdict does not reach the clip")
    require(trainer.global_step == 2, "an iteration took another number of counted steps than one")
    return None


def _check_training(case: Case, folder: Path, mode: str) -> float | None:
    for probability in (0.0, 1.0):
        options: dict[str, Any] = {
            "dmd": DMDSettings(student_update_freq=2),
            "data_forcing": DataForcingSettings(probability),
            "student_optimizer": partial(torch.optim.SGD, lr=1.0),
            "fake_optimizer": partial(torch.optim.SGD, lr=1.0),
        }
        module = case.module(mode, **options)
        x_t, t, cond = case.inputs()
        with torch.no_grad():
            before = {role: module.x0(role, Rollout(x_t), t, cond).latents for role in ("teacher", "student", "fake")}
        trainer = _fit(case, module, folder, 2)
        with torch.no_grad():
            after = {role: module.x0(role, Rollout(x_t), t, cond).latents for role in ("teacher", "student", "fake")}
        require(torch.equal(after["teacher"], before["teacher"]), "training changed the teacher")
        for role in ("student", "fake"):
            require(gap(after[role], before[role]) > 0, f"two iterations left the {role} as it was")
        forced = module.journal.counts["forced_steps"]
        require(forced == int(probability), f"{forced} forced steps at probability {probability:g}")
    path = folder / f"{mode}.ckpt"
    trainer.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["state_dict"]
    require(set(state) == {f"roles.{name}" for name in module.network.owned()}, "the checkpoint holds other weights")
    fresh = case.module(mode, init_from=str(path))
    with torch.no_grad():
        error = gap(fresh.x0("student", Rollout(x_t), t, cond).latents, after["student"])
    require(error == 0.0, f"the student from the checkpoint differs by {error:.1e}")
    return error


def _fit(case: Case, module: DistillationModule, folder: Path, steps: int) -> DistillationTrainer:
    trainer = DistillationTrainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder),
    )  # fmt: skip
    batches: Any = [Batch(PROMPTS, video=case.videos())] * steps
    trainer.fit(module, DataLoader(batches, batch_size=None))
    require(trainer.global_step == steps, f"{trainer.global_step} counted steps in {steps} iterations")
    return trainer


# ---- exports ----------------------------------------------------------------------------------------------------


def export_pipeline(case: Case, folder: Path) -> float:
    """The student's merged adapters, reloaded in stock diffusers, give its latents; by every kind of sampling."""
    return max(_export(case, folder / kind, "pipeline", "lora", kind) for kind in case.kinds)


def export_lora(case: Case, folder: Path) -> float:
    """So does its LoRA file, whose alpha is not its rank."""
    return _export(case, folder / "lora", "lora", "lora", "ode")


def export_full(case: Case, folder: Path) -> float:
    """So does a fully tuned student."""
    return _export(case, folder / "full", "pipeline", "full", "ode")


def half_precision(case: Case, folder: Path) -> float:
    """In bfloat16 the teacher answers, what is trained stays float32, and exports are the student."""
    transformer = case.load(torch.bfloat16).load_transformer()
    x_t, t, cond = case.inputs()
    with torch.no_grad():
        made = case.teacher.x0(transformer, x_t, t, cond)
    require(made.dtype == torch.float32 and made.isfinite().all(), "x0 of a bfloat16 network is not finite float32")
    module = case.module(dtype="bfloat16")
    dtypes = {parameter.dtype for parameter in module.network.parameters_of("student")}
    require(dtypes == {torch.float32}, f"the student's parameters are {dtypes} on a bfloat16 teacher")
    return export_student(module, folder / "bf16", case.size, "pipeline", {}).error


def _export(case: Case, output: Path, form: Any, mode: str, kind: SampleKind) -> float:
    module = case.module(mode, kind)
    stir(module.network)  # far from the teacher, so that a missing adapter cannot pass
    report = export_student(module, output, case.size, form, {})
    x_t, t, cond = case.inputs()
    with torch.no_grad():
        inputs = Rollout(x_t), t, cond
        moved = gap(module.x0("student", *inputs).latents, module.x0("teacher", *inputs).latents)
    require(moved > 1e-3, "the student that was exported hardly differs from the teacher")
    require(report.error < 1e-3, f"stock diffusers' latents differ by {report.error:.1e} from our sampler's")
    return report.error
