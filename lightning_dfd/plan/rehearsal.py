"""An iteration played through without weights: the module's own code on fake tensors, its memory and work counted.

Nothing is computed and no memory is taken, but every operation, recomputation and release is that of a real step, so
what is kept for the backward pass follows from the network itself and not from a formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.networks.blocks import networks_within
from lightning_dfd.networks.roles import TRAINED
from lightning_dfd.plan.components import replace_tensors, size_of
from lightning_dfd.plan.meter import Meter
from lightning_dfd.plan.rules import Rules
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.types import Role, VideoSize

CPU = torch.device("cpu")
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True)
class Turn:
    """One role's update: most bytes alive at once, bytes of its gradients, and floating point operations."""

    peak: int
    gradients: int
    flops: int


@dataclass(frozen=True)
class Rehearsal:
    """Bytes that stay, and the turns.

    Args:
        base: the frozen teacher's weights and buffers.
        weights: of every trained role, of the average, and of the modules that terms train.
        states: of each role's optimizer; those of terms' modules are with the fake score's.
        turns: by the role that is updated.
    """

    base: int
    weights: Mapping[str, int]
    states: Mapping[str, int]
    turns: Mapping[Role, Turn]


def rehearse(module: DistillationModule, size: VideoSize, batch_size: int, precision: str, device: str) -> Rehearsal:
    """Play one update of the student and one of the fake score.

    Args:
        module: without networks; is given ones without weights.
        precision: the trainer's, as `bf16-mixed`.
        device: `cuda` or `cpu`: whose rules of mixed precision and of optimizers to follow.
    """
    backbone = module.backbone
    module.terms = tuple(term.heaviest() for term in module.terms)
    with torch.device("meta"):
        module.build_roles(backbone.meta_transformer())
    if precision in WHOLE:
        module.network.to(WHOLE[precision])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with Meter() as meter:
        with fake:
            replace_tensors(module, lambda like: torch.empty(like.shape, dtype=like.dtype, device=CPU))
        weights: dict[str, int] = {role: _bytes(module.network.parameters_of(role)) for role in module.network.held}
        weights |= {name: size_of(part) for name, part in module.term_modules.items()}
        base = meter.live - sum(weights.values())
        optimizers = _optimizers(module, device)
        states: dict[str, int] = {role: _fill_states(optimizer, meter) for role, optimizer in optimizers.items()}
        module.negative = backbone.dummy_prompts(1)
        with _inside_networks(module, fake, Rules(device)):
            turns = {
                role: _turn(module, role, optimizers[role], meter, size, batch_size, AUTOCAST.get(precision))
                for role in TRAINED
            }
    return Rehearsal(base, weights, states, turns)


def _turn(
    module: DistillationModule,
    role: Role,
    optimizer: Optimizer,
    meter: Meter,
    size: VideoSize,
    batch_size: int,
    autocast: torch.dtype | None,
) -> Turn:
    """As `DistillationModule.training_step`, for the last batch of an iteration."""
    backbone = module.backbone
    real = torch.randn(batch_size, *backbone.latent_shape(size))
    cond = backbone.dummy_prompts(batch_size) | backbone.dummy_images(batch_size, size)
    if module.accumulate > 1:  # in all batches but the first the gradients are there from the start
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
    meter.restart()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        step = module.begin_step(real, cond, draws=_Longest.of(0, 0, 0, 0, CPU))
        module.loss(role, step).backward()
    del step
    flops = meter.flops * module.accumulate
    gradients = sum(_bytes(p.grad for p in group["params"] if p.grad is not None) for group in optimizer.param_groups)
    module.optimization.clip(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    if role == "student" and "ema" in module.network.held:
        module.network.update_average(0.9)
    return Turn(meter.peak, gradients, flops)


def _optimizers(module: DistillationModule, device: str) -> dict[Role, Optimizer]:
    """The recipe's; where they choose by device between one and many tensors at a time, as on `device`."""
    made: Any = module.configure_optimizers()
    for optimizer in made[0]:
        for group in optimizer.param_groups:
            if device == "cuda" and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True
    return dict(zip(TRAINED, made[0], strict=True))


def _fill_states(optimizer: Optimizer, meter: Meter) -> int:
    """Take a step, so that moments exist as they do from the second iteration on; returns their bytes."""
    before = meter.live
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return meter.live - before


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class _Longest(Draws):
    def index(self, first: int, end: int) -> int:
        return end - 1


@contextmanager
def _inside_networks(module: DistillationModule, *modes: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter `modes` while a network runs, or one of its blocks by itself, as checkpoints recompute it."""

    def enter(*_: Any) -> None:
        for mode in modes:
            mode.__enter__()

    def leave(*_: Any) -> None:
        for mode in reversed(modes):
            mode.__exit__(None, None, None)

    handles = []
    for part in (*networks_within(module), *module.network.blocks()):
        handles.append(part.register_forward_pre_hook(enter))
        handles.append(part.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
