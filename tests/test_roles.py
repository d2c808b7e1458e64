"""Roles on one base: the two silent traps, the untouched teacher, gradients of adapters and whole networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.networks.roles import FullRoles, LoraRoles, Roles
from lightning_dfd.objectives import dmd_gradient, surrogate_loss
from lightning_dfd.types import Conditioning, VideoSize
from tests.conftest import random_conditioning

SIZE = VideoSize(9, 32, 32)


def make(backbone: Backbone, mode: str, **options: Any) -> Roles:
    transformer = backbone.load_transformer()
    roles: Roles
    if mode == "full":
        roles = FullRoles(transformer, **options)
    else:
        roles = LoraRoles(transformer, backbone.lora_targets, rank=4, alpha=8, **options)
    stir(roles)
    return roles


@torch.no_grad()
def stir(roles: Roles) -> None:
    """Move every trained role away from the teacher, each its own way."""
    generator = torch.Generator().manual_seed(7)
    for role in ("student", "fake"):
        for parameter in roles.parameters_of(role):  # type: ignore[arg-type]
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def inputs(backbone: Backbone) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *backbone.latent_shape(SIZE), generator=generator)
    cond = random_conditioning(backbone, 2, generator)
    return x_t, torch.tensor([0.9, 0.4], dtype=torch.float64), cond


def student_gradients(roles: Roles, backbone: Backbone) -> list[Tensor]:
    """Gradients of a DMD surrogate in which fake score and teacher are asked between forward and backward."""
    x_t, t, cond = inputs(backbone)

    def x0(role: Any) -> Tensor:
        with roles.act_as(role) as network:
            return backbone.x0(network, x_t, t, cond)

    roles.zero_grad()
    gen = x0("student")
    with torch.no_grad():
        fake, teacher = x0("fake"), x0("teacher")
    surrogate_loss(gen, dmd_gradient(gen, fake, teacher)).backward()
    return [parameter.grad.clone() for parameter in roles.parameters_of("student") if parameter.grad is not None]


def reference_gradients(roles: LoraRoles, backbone: Backbone) -> list[Tensor]:
    """The same from three separate copies, none of which ever changes its role."""
    x_t, t, cond = inputs(backbone)
    copies: dict[str, LoraRoles] = {}
    for role in ("student", "fake", "teacher"):
        copies[role] = copy.deepcopy(roles)
        copies[role]._layers = [m for m in copies[role].base.modules() if hasattr(m, "_active_adapter")]  # type: ignore[misc]
        copies[role]._switch(role)  # type: ignore[arg-type]
        copies[role].base.disable_gradient_checkpointing()  # type: ignore[operator]
    gen = backbone.x0(copies["student"].base, x_t, t, cond)
    with torch.no_grad():
        fake = backbone.x0(copies["fake"].base, x_t, t, cond)
        teacher = backbone.x0(copies["teacher"].base, x_t, t, cond)
    surrogate_loss(gen, dmd_gradient(gen, fake, teacher)).backward()
    return [p.grad.clone() for p in copies["student"].parameters_of("student") if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_role_switches_leave_gradients_as_they_are(backbone: Backbone, checkpointing: bool) -> None:
    """Trap A (requires_grad flips) and trap B (recomputation under another role), against separate networks."""
    roles = make(backbone, "lora", checkpointing=checkpointing)
    assert isinstance(roles, LoraRoles)
    ours, reference = student_gradients(roles, backbone), reference_gradients(roles, backbone)
    assert len(ours) == len(reference) == len(roles.parameters_of("student"))
    assert sum(float(g.norm()) for g in reference) > 0
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def gradients_with_backward_under_another_role(roles: LoraRoles, backbone: Backbone) -> list[Tensor]:
    x_t, t, cond = inputs(backbone)
    roles.zero_grad()
    with roles.act_as("student") as network:
        loss = backbone.x0(network, x_t, t, cond).square().mean()
    with roles.act_as("fake"):
        loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in roles.parameters_of("student")]


def test_recomputation_runs_under_the_role_of_its_forward(backbone: Backbone) -> None:
    """Trap B by itself; plain checkpointing does fall into it here, so this test can fail."""
    roles = make(backbone, "lora")
    assert isinstance(roles, LoraRoles)
    right = gradients_with_backward_under_another_role(roles, backbone)
    roles.base.enable_gradient_checkpointing()  # type: ignore[operator]
    wrong = gradients_with_backward_under_another_role(roles, backbone)
    checkpointed = make(backbone, "lora", checkpointing=True)
    assert isinstance(checkpointed, LoraRoles)
    ours = gradients_with_backward_under_another_role(checkpointed, backbone)
    for mine, expected in zip(ours, right, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-7)
    assert any((bad - expected).norm() > 0.1 * expected.norm() for bad, expected in zip(wrong, right, strict=True))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_only_the_acting_role_gets_gradients(backbone: Backbone, mode: str) -> None:
    roles = make(backbone, mode)
    student_gradients(roles, backbone)
    assert any(p.grad is not None and p.grad.any() for p in roles.parameters_of("student"))
    own = {id(p) for p in roles.parameters_of("student")}
    assert all(p.grad is None for p in roles.parameters() if id(p) not in own)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_teacher_is_bit_equal_after_training(backbone: Backbone, mode: str) -> None:
    x_t, t, cond = inputs(backbone)
    untouched = backbone.load_transformer()
    with torch.no_grad():
        before = backbone.x0(untouched, x_t, t, cond)
    roles = make(backbone, mode)
    optimizer = torch.optim.SGD([p for p in roles.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        student_gradients(roles, backbone)
        optimizer.step()
    with torch.no_grad(), roles.act_as("teacher") as network:
        assert torch.equal(backbone.x0(network, x_t, t, cond), before)
    with torch.no_grad(), roles.act_as("student") as network:
        assert not torch.allclose(backbone.x0(network, x_t, t, cond), before)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_every_role_starts_as_the_teacher(backbone: Backbone, mode: str) -> None:
    x_t, t, cond = inputs(backbone)
    transformer = backbone.load_transformer()
    roles: Roles = (
        FullRoles(transformer, ema=True)
        if mode == "full"
        else LoraRoles(transformer, backbone.lora_targets[:1], ema=True)
    )
    outputs = []
    for role in ("teacher", "student", "fake", "ema"):
        with torch.no_grad(), roles.act_as(role) as network:  # type: ignore[arg-type]
            outputs.append(backbone.x0(network, x_t, t, cond))
    for output in outputs:  # weights are the same, but copies lie otherwise in memory, and the last bit may differ
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_average_follows_the_student(backbone: Backbone, mode: str) -> None:
    roles = make(backbone, mode, ema=True)
    stir(roles)
    old = [p.clone() for p in roles.parameters_of("ema")]
    roles.update_average(0.9)
    for new, before, student in zip(roles.parameters_of("ema"), old, roles.parameters_of("student"), strict=True):
        torch.testing.assert_close(new.data, 0.9 * before.data + 0.1 * student.data)
        assert not new.requires_grad


def test_trained_weights_are_float32_on_a_bfloat16_base(tiny: dict[str, Path], family: str) -> None:
    backbone = backbone_from_pretrained(str(tiny[family]), torch.bfloat16, 16)
    for mode in ("lora", "full"):
        roles = make(backbone, mode)
        assert {p.dtype for p in roles.parameters_of("student")} == {torch.float32}
        gradients = student_gradients(roles, backbone)
        assert all(g.isfinite().all() for g in gradients)


def live(roles: LoraRoles) -> str:
    """The role that the base plays now, as its adapters tell."""
    layer = next(module for module in roles.modules() if isinstance(module, BaseTunerLayer))
    return "teacher" if layer.disable_adapters else layer.active_adapters[0]


def test_contexts_nest_and_come_back(backbone: Backbone) -> None:
    roles = make(backbone, "lora")
    assert isinstance(roles, LoraRoles)
    with roles.act_as("student"), roles.act_as("teacher"):
        assert live(roles) == "teacher"
    assert live(roles) == "teacher"
    context = roles.act_as("student")
    for _ in range(2):  # a second recomputation enters the same context again
        with context:
            assert live(roles) == "student"


def test_weights_round_trip_and_misfits_are_named(backbone: Backbone) -> None:
    roles, other = make(backbone, "lora"), make(backbone, "lora")
    stir(roles)
    other.load_weights("student", roles.weights_of("student"))
    for mine, theirs in zip(roles.parameters_of("student"), other.parameters_of("student"), strict=True):
        assert torch.equal(mine, theirs)
    narrow = LoraRoles(backbone.load_transformer(), backbone.lora_targets, rank=2)
    with pytest.raises(ValueError, match=r"student\.rank"):
        narrow.load_weights("student", roles.weights_of("student"))
    with pytest.raises(ValueError, match="ema_decay"):
        roles.act_as("ema")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["nonsense"], "'nonsense' is not a layer of the network; there are .*to_q"),
        (["to_q", "to_quue"], "'to_quue' is not a layer of the network; did you mean to_q"),
        (["to_q", "norm_out"], "'norm_out' is a .*, which takes no LoRA"),
        (
            ["ransformer_blocks.0.attn1.to_q"],
            "is not a layer of the network; did you mean transformer_blocks.0.attn1.to_q",
        ),
    ],
)
def test_every_target_has_to_name_layers(tiny: dict[str, Path], targets: list[str], said: str) -> None:
    """One wrong name among right ones would train fewer adapters than the recipe says."""
    network = backbone_from_pretrained(str(tiny["cogvideox"])).meta_transformer()
    with pytest.raises(ValueError, match=said):
        LoraRoles(network, targets)


def test_train_mode_is_ignored(backbone: Backbone) -> None:
    roles = nn.ModuleDict({"roles": make(backbone, "lora")}).train()
    assert not any(module.training for module in roles["roles"].modules())
