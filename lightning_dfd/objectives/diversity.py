"""Diversity by target prediction: the student's first step follows the teacher's path (DP-DMD, 2602.03139).

Axis legend: all latents are [B, ...] of one shape, t and t_k are [B].
"""

from __future__ import annotations

from torch import Tensor

from lightning_dfd.diffusion.noise import NoiseSchedule


def diversity_loss(schedule: NoiseSchedule, x0: Tensor, z: Tensor, z_k: Tensor, t: Tensor, t_k: Tensor) -> Tensor:
    """How far the student's first step is from the teacher's, a scalar (2602.03139: its diversity loss).

    The paper matches velocities, of flow from t = 1: mse(v, (z - z_k) / (1 - t_k)). Said of x0, so that it holds for
    every schedule, that is

        mse(x0, x0*) / sigma_t^2,    x0* the one estimate from which an `ode` step takes z at t to z_k at t_k.

    For flow v = (z - x0) / t and x0* = (t z_k - t_k z) / (t - t_k), so v* = (z - z_k) / (t - t_k): the paper's. Where
    alpha^2 + sigma^2 = 1 it is the mse of v = (alpha z - x0) / sigma (2202.00512), with target
    v* = (cos(d) z - z_k) / sin(d), d the angle between the two times.

    Args:
        x0: the student's estimate from z at t, with gradient.
        z: where its first step starts: noise.
        z_k: where the teacher's guided steps from z end.
        t, t_k: the times of z and of z_k, t_k below t.

    Raises:
        ValueError: t and t_k mean one noise level, so no step leads from one to the other.
    """
    target = schedule.x0_of_step(z, z_k, t, t_k).detach()
    _, sigma = schedule.alpha_sigma(t)
    error = (x0.float() - target.float()).square().flatten(1).mean(1)
    return (error / sigma.square().to(error)).mean()
