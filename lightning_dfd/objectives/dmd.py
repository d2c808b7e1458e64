"""Distribution matching: the gradient, its surrogate loss, and the loss of the fake score.

Axis legend: all latents are [B, ...] of one shape, t is [B]. Sources: DMD, 2311.18828; DMD2, 2405.14867.
These functions know no network: they take what networks returned.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_dfd.diffusion.noise import NoiseSchedule, append_dims

ScoreSpace = Literal["x0", "eps", "output"]


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance in the diffusers form, `uncond + scale * (cond - uncond)` (2207.12598).

    `scale` is one number, or [B] for one of each sample. Peers that write `cond + w * (cond - uncond)` mean
    scale = w + 1.
    """
    if isinstance(scale, Tensor):
        scale = append_dims(scale, cond)
    return uncond + scale * (cond - uncond)


def is_unguided(scale: float | Tensor) -> bool:
    """Whether guidance is 1 for every sample, so that the unconditional call would not count."""
    return bool((scale == 1).all()) if isinstance(scale, Tensor) else scale == 1


def dmd_gradient(gen: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """The gradient of the distribution matching loss in the student's output (2311.18828, eqs. 7 and 8).

    Args:
        gen: the student's clean estimate [B, ...].
        fake_x0: the fake score's estimate from the noised `gen`.
        teacher_x0: the guided teacher's estimate, from the noised `gen` or, under data forcing, real latents.

    Returns:
        (fake_x0 - teacher_x0) / (mean |gen - teacher_x0| + 1e-6), float32, the mean being each sample's own.
    """
    gen, fake_x0, teacher_x0 = gen.detach().float(), fake_x0.float(), teacher_x0.float()
    scale = (gen - teacher_x0).abs().flatten(1).mean(1) + 1e-6
    return (fake_x0 - teacher_x0) / append_dims(scale, gen)


def surrogate_loss(gen: Tensor, gradient: Tensor) -> Tensor:
    """A scalar whose gradient in `gen` is `gradient` over the number of elements (2405.14867, as released)."""
    target = (gen.float() - gradient).detach()
    return 0.5 * F.mse_loss(gen.float(), target)


def fake_score_loss(
    schedule: NoiseSchedule,
    fake_x0: Tensor,
    gen: Tensor,
    x_t: Tensor,
    t: Tensor,
    space: ScoreSpace = "x0",
) -> Tensor:
    """Denoising score matching of the fake score on the student's samples (2405.14867, eq. 3).

    Args:
        fake_x0: its clean estimate, with gradient, from x_t = add_noise(gen, eps, t).
        gen: the student's samples; detached here.
        space: where the squared error is taken: clean latents, noise, or what the network itself predicts
            (v or flow).
    """
    gen = gen.detach()
    if space == "x0":
        return F.mse_loss(fake_x0, gen)
    change = schedule.to_eps if space == "eps" else schedule.from_x0
    return F.mse_loss(change(fake_x0, x_t, t), change(gen, x_t, t))
