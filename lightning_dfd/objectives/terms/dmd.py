"""Distribution matching: the term that every run has (DMD2, 2405.14867)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_dfd.objectives.dfd import paired_gap
from lightning_dfd.objectives.dmd import ScoreSpace, dmd_gradient, fake_score_loss, surrogate_loss
from lightning_dfd.objectives.terms.base import ScoreTimeSettings, Step, TeacherView, Term, require


@dataclass(frozen=True)
class DMDSettings:
    """Distribution matching.

    Args:
        guidance: scale of the teacher's guidance, `uncond + guidance * (cond - uncond)`, as in diffusers.
        negative_prompt: what the teacher's unconditional call is told.
        student_update_freq: the student is updated once in so many iterations, the fake score in all others.
        fake_space: where the fake score's error is taken: `x0`, `eps`, or `output` (v or flow).
        score_time: see there.
    """

    guidance: float = 5.0
    negative_prompt: str = ""
    student_update_freq: int = 5
    fake_space: ScoreSpace = "x0"
    score_time: ScoreTimeSettings = field(default_factory=ScoreTimeSettings)

    def __post_init__(self) -> None:
        require(self.student_update_freq > 1, "model.dmd.student_update_freq", self.student_update_freq, "at least 2")
        require(self.guidance >= 1, "model.dmd.guidance", self.guidance, "at least 1, which is no guidance")


class DistributionMatching(Term):
    """The surrogate of the DMD gradient for the student, denoising score matching for the fake score.

    Other terms may change what the teacher is shown (data forcing), and the gradient before it becomes a loss.
    """

    key: ClassVar[str] = "model.dmd"

    def __init__(self, settings: DMDSettings = DMDSettings()) -> None:
        self.settings = settings

    def student_loss(self, step: Step) -> Tensor:
        gen, t, eps = step.gen, step.t, step.eps
        view = TeacherView(gen.detach(), self.settings.guidance, step.real)
        for term in step.terms:
            view = term.view(step, view)
        x_t = step.x_t
        with torch.no_grad():
            fake = step.networks.fake(x_t, t, step.cond)
            shown = step.schedule.add_noise(view.shown, eps, t)
            teacher = step.networks.teacher(shown, t, step.cond, view.guidance)
        gradient = dmd_gradient(gen, fake, teacher)
        for term in step.terms:
            gradient = term.change_gradient(step, gradient, fake.float(), teacher.float())
        loss = surrogate_loss(gen, gradient)
        step.log("student_loss", loss)
        step.log("dmd_gradient_norm", gradient.flatten(1).norm(dim=1).mean())
        step.log("paired_gap", paired_gap(view.real, gen))
        if len(view.real) > 1:  # what the paired gap has to be below
            step.log("unpaired_gap", paired_gap(view.real.roll(1, 0), gen))
        return loss

    def fake_loss(self, step: Step) -> Tensor:
        gen, x_t, t = step.gen, step.x_t, step.t
        fake = step.networks.fake(x_t, t, step.cond)
        loss = fake_score_loss(step.schedule, fake, gen, x_t, t, self.settings.fake_space)
        step.log("fake_loss", loss)
        return loss

    def facts(self) -> dict[str, str]:
        return {}  # its keys may be changed on resume

    def card(self) -> dict[str, str]:
        return {"Guidance of the teacher": f"{self.settings.guidance:g}"}
