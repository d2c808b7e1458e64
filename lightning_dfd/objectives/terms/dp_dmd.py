"""DP-DMD (2602.03139): the student's first step follows the teacher's path, DMD trains the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_dfd.diffusion.noise import Time
from lightning_dfd.diffusion.sampler import Rollout, roll_to, stateless
from lightning_dfd.objectives.diversity import diversity_loss
from lightning_dfd.objectives.terms.base import Step, Term, TermRecipe, require


@dataclass(frozen=True)
class DiversitySettings:
    """DP-DMD (2602.03139): the student's first step learns the teacher's path, DMD trains the others.

    Args:
        weight: of the first step's loss in the student's; 0 is off, the paper takes 0.05.
        anchor_steps: guided steps of the teacher from the student's first time to its second.
    """

    weight: float = 0.0
    anchor_steps: int = 5

    def __post_init__(self) -> None:
        require(self.weight >= 0, "model.diversity.weight", self.weight, "0 (off) or above")
        require(self.anchor_steps >= 1, "model.diversity.anchor_steps", self.anchor_steps, "at least 1")


class FirstStep(Term):
    """From noise z, the student's first step against the guided teacher's path from z to the student's second time.

    The DMD gradient never reaches that step: rollouts are trained from the second one on. The authors' code takes one
    z for this and for DMD, and sends the DMD gradient through all later steps of its rollout. Here a rollout draws a z
    of its own and one step for the gradient: docs/concepts.md compares the two.
    """

    key: ClassVar[str] = "model.diversity"
    first_step = 1

    def __init__(self, settings: DiversitySettings, guidance: float) -> None:
        self.settings, self.guidance = settings, guidance

    def student_loss(self, step: Step) -> Tensor:
        z = step.draws.noise_like(step.gen)
        loss = self.loss_from(step, z, step.student_input.steps)
        step.log("diversity_loss", loss)
        return self.settings.weight * loss

    def loss_from(self, step: Step, z: Tensor, steps: Sequence[float]) -> Tensor:
        """The unweighted loss of noise z [B, ...], a scalar."""
        first, second = steps[:2]
        anchors = torch.linspace(first, second, self.settings.anchor_steps + 1, dtype=torch.float64).tolist()
        t, t_k = (z.new_full((len(z),), time, dtype=torch.float64) for time in (first, second))

        def teacher(x_t: Tensor, t: Time) -> Tensor:
            return step.networks.teacher(x_t, t, step.cond, self.guidance)

        with torch.no_grad():
            z_k = roll_to(stateless(teacher), step.schedule, Rollout(z), anchors, "ode").latents
        return diversity_loss(step.schedule, step.networks.student(z, t, step.cond), z, z_k, t, t_k)

    def check(self, recipe: TermRecipe) -> None:
        given = recipe.student_input
        why = f"with {self.key}.weight above 0, since the first of the student's own steps is trained apart"
        require(given.mode == "rollout", "model.student.input", given.mode, f"rollout {why}")
        require(len(given.steps) > 1, "model.sampling.steps", list(given.steps), f"two times or more {why}")

    def facts(self) -> dict[str, str]:
        return {f"{self.key}.weight": "above 0"}

    def card(self) -> dict[str, str]:
        return {"DP-DMD": f"weight {self.settings.weight:g}, {self.settings.anchor_steps} anchor steps"}
