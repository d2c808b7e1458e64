"""What to switch on when a recipe does not fit, each with the estimate after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_dfd.networks.quantization import BYTES, Quantization
from lightning_dfd.objectives.terms import TermRecipe, check_terms
from lightning_dfd.plan.estimate import Estimate, Setup, estimate


@dataclass(frozen=True)
class Advice:
    """A change, together with those before it, and the peak of training that is left, in bytes."""

    change: str
    peak: int


def advise(setup: Setup, now: Estimate, limit: float, tell: Callable[[str], None] = lambda _: None) -> list[Advice]:
    """Changes that help, cheapest first, each on top of the last, until the peak is within `limit` bytes.

    `tell` hears what is tried next.
    """
    given: list[Advice] = []
    for lever in LEVERS:
        if now.peak <= limit:
            break
        pulled = lever(setup)
        if pulled is None:
            continue
        change, changed = pulled
        tell(f"if you {change}")
        after = estimate(changed)
        if after.peak < now.peak:
            setup, now = changed, after
            given.append(Advice(change, now.peak))
    return given


Lever = Callable[[Setup], tuple[str, Setup] | None]


def _cache(setup: Setup) -> tuple[str, Setup] | None:
    if setup.cached:
        return None
    return "run lightning cache and set data.cache", replace(setup, cached=True)


def _tiles(setup: Setup) -> tuple[str, Setup] | None:
    if setup.module.backbone.loader.vae_tiling:
        return None
    changed = replace(setup, module=copy.deepcopy(setup.module))
    changed.module.backbone.loader.vae_tiling = True
    return "set model.vae_tiling: true", changed


def _half(setup: Setup) -> tuple[str, Setup] | None:
    if setup.module.backbone.dtype != torch.float32:
        return None
    changed = replace(setup, module=copy.deepcopy(setup.module), precision="bf16-mixed")
    changed.module.backbone.dtype = torch.bfloat16
    return "set model.dtype: bfloat16 and trainer.precision: bf16-mixed", changed


def _checkpointing(setup: Setup) -> tuple[str, Setup] | None:
    if setup.module.student.gradient_checkpointing:
        return None
    return "set model.student.gradient_checkpointing: true", _with_student(setup, gradient_checkpointing=True)


def _single(setup: Setup) -> tuple[str, Setup] | None:
    if setup.batch_size == 1:
        return None
    accumulate = setup.module.accumulate * setup.batch_size
    changed = replace(setup, module=copy.deepcopy(setup.module), batch_size=1)
    changed.module.accumulate = accumulate
    return f"set data.batch_size: 1 and model.accumulate: {accumulate}", changed


def _adapters(setup: Setup) -> tuple[str, Setup] | None:
    if setup.module.student.mode == "lora":
        return None
    return "set model.student.mode: lora", _with_student(setup, mode="lora")


def _offload(setup: Setup) -> tuple[str, Setup] | None:
    module = setup.module
    if module.backbone.loader.offload or module.student.mode == "lora":
        return None
    try:
        check_terms(module.terms, TermRecipe(module.student_input, adapters=False, offload=True))
    except ValueError:  # a term's gradient runs through the teacher
        return None
    changed = replace(setup, module=copy.deepcopy(module))
    changed.module.backbone.loader.offload = True
    return "set model.offload: true", changed


def _quantized(backend: Any, kind: Any) -> Lever:
    def lever(setup: Setup) -> tuple[str, Setup] | None:
        now = setup.module.backbone.loader.quantization
        if setup.module.student.mode == "full" or (now is not None and BYTES[now.kind] <= BYTES[kind]):
            return None
        changed = replace(setup, module=copy.deepcopy(setup.module))
        changed.module.backbone.loader.quantization = Quantization(backend, kind)
        return f"set model.quantization: {{backend: {backend}, kind: {kind}}}", changed

    return lever


def _with_student(setup: Setup, **changes: object) -> Setup:
    changed = replace(setup, module=copy.deepcopy(setup.module))
    changed.module.student = replace(changed.module.student, **changes)  # type: ignore[arg-type]
    return changed


LEVERS: tuple[Lever, ...] = (
    _cache,
    _half,
    _checkpointing,
    _tiles,
    _single,
    _offload,
    _adapters,
    _quantized("torchao", "int8"),
    _quantized("bitsandbytes", "nf4"),
)
