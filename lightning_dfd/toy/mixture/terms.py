"""Terms that the study tries and the package does not have, written as a user would write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lightning_dfd.objectives import paired_gap, teacher_data
from lightning_dfd.objectives.terms import Discriminator, Step, TeacherView, Term


class Projection(Term):
    """Takes the part along the student's residual out of the DMD gradient (PDMD, 2609.35768)."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def change_gradient(self, step: Step, gradient: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
        g = gradient.flatten(1)
        r = (step.gen.detach().float() - fake_x0).flatten(1)
        along = (g * r).sum(1, keepdim=True) / r.square().sum(1, keepdim=True).clamp_min(1e-12)
        return (g - self.strength * along * r).view_as(gradient)


WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "hellinger": lambda r: r.sqrt(),
}


class FDivergence(Term):
    """Weights each clip's DMD gradient for another divergence than the reverse KL (f-distill, 2502.15681); the density
    ratio is what the GAN's discriminator knows."""

    def __init__(self, divergence: str, largest: float = 10.0) -> None:
        self.weight, self.largest = WEIGHTS[divergence], largest

    @torch.no_grad()
    def change_gradient(self, step: Step, gradient: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
        discriminator = step.networks.trained["discriminator"]
        assert isinstance(discriminator, Discriminator)
        assert step.networks.features is not None
        features = step.networks.features(step.x_t, step.t, step.cond, discriminator.blocks)
        ratio = discriminator(features).mean(1).exp().clamp(1 / self.largest, self.largest)
        weight = self.weight(ratio)
        return gradient * (weight / weight.mean()).view(-1, *[1] * (gradient.ndim - 1))


class PairedForcing(Term):
    """Data forcing of every step, but only where the pair is close: |real - gen| is below a share of what it is for
    clips that are no pair. It is the validity condition of data forcing (2606.18478, eq. 7), asked of each clip."""

    pairs_clips = True

    def __init__(self, largest_share: float) -> None:
        self.largest_share = largest_share

    def view(self, step: Step, view: TeacherView) -> TeacherView:
        gen, real = step.gen.detach(), view.real
        gap = (gen - real).abs().flatten(1).mean(1)
        close = gap < self.largest_share * paired_gap(real.roll(1, 0), gen)
        return replace(view, shown=teacher_data(gen, real, close))
