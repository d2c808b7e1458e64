"""Data forcing: what the teacher is shown (Data-Forcing Distillation, 2606.18478).

Axis legend: latents are [B, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_forcing(probability: float, generator: torch.Generator) -> bool:
    """Whether this step is data-forced: one draw, which realises the mixed update of eqs. 9 and 10.

    Give it a generator that all ranks seed alike, as they have to share the draw.
    """
    return bool(torch.rand((), generator=generator, device=generator.device) < probability)


def teacher_data(gen: Tensor, real: Tensor, forced: bool) -> Tensor:
    """The latents from which the teacher scores: the student's own, or in a data-forced step the real ones of
    the same condition (eq. 6). Both are noised with the same t and eps; the fake score always sees `gen`."""
    return real if forced else gen.detach()


def paired_gap(real: Tensor, gen: Tensor) -> Tensor:
    """Mean |real - gen|, a scalar. Data forcing holds only while pairs stay close (eq. 7): a large gap at its
    start means that the student was not distilled first, or that its inputs are unpaired."""
    return (real.float() - gen.detach().float()).abs().mean()
