"""Sampling: the few-step student's and the many-step teacher's are one function.

Axis legend: B batch, f latent frames; latents are [B, ...]; times fall from (near) 1 towards 0.
Training rollouts, validation, `lightning sample` and the check of an export all call `roll_to` or `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_dfd.diffusion.noise import NoiseLevel, NoiseSchedule, Time
from lightning_dfd.diffusion.solvers import CLEAN, Level, SolverStep
from lightning_dfd.types import SampleKind


@dataclass(frozen=True)
class Rollout:
    """Latents on their way from noise to clean, and what the network carries from call to call.

    Args:
        latents: [B, ...].
        carried: whatever a network leaves for its next call, as a causal student its cache and position; None for one
            that sees the whole clip at once.
    """

    latents: Tensor
    carried: object | None = None


# From latents at time t to the clean latents that the network sees in them, with what the call leaves behind.
Denoise = Callable[[Rollout, Time], Rollout]
Draw = Callable[[Tensor], Tensor]  # latents [B, ...] -> standard normal noise of their shape, dtype and device
StudentTime = float | Tensor  # for all clips, or [B], or [B, f] for each frame


def stateless(denoise: Callable[[Tensor, Time], Tensor]) -> Denoise:
    """A network `(x_t, t) -> x0` that carries nothing, as one that `roll_to` and `sample` can call."""
    return lambda rollout, t: replace(rollout, latents=denoise(rollout.latents, t))


def roll_to(
    denoise: Denoise,
    schedule: NoiseSchedule,
    start: Rollout,
    times: Sequence[StudentTime],
    kind: SampleKind,
    draw: Draw = torch.randn_like,
) -> Rollout:
    """From latents at times[0] to latents at times[-1], calling the network at all times but the last.

    Args:
        kind: `ode` steps along the predicted direction; `sde` predicts x0 and adds fresh noise, as a
            DMD2 student does (2405.14867, backward simulation).
        draw: gives the fresh noise of `sde`, for latents of the shape that it is handed.
    """
    return _follow(denoise, schedule, start, _way(start.latents, times)[:-1], kind, draw)


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    start: Rollout,
    times: Sequence[StudentTime] | Sequence[SolverStep],
    kind: SampleKind = "ode",
    draw: Draw = torch.randn_like,
) -> Rollout:
    """Clean latents from noise in len(times) network calls.

    Args:
        start: noise [B, ...], with what the network is to begin with.
        times: a student's, largest first; or a teacher's steps, as `teacher_times` gives them.
    """
    first = times[0]
    scaled = replace(start, latents=start.latents * first.scale) if isinstance(first, SolverStep) else start
    return _follow(denoise, schedule, scaled, _way(start.latents, times), kind, draw)


def _follow(
    denoise: Denoise,
    schedule: NoiseSchedule,
    rollout: Rollout,
    way: Sequence[tuple[Time, Time | None]],
    kind: SampleKind,
    draw: Draw,
) -> Rollout:
    """Every step of the way from a rollout on; None is where latents are clean."""
    for t, t_next in way:
        x_t, clean = rollout.latents, denoise(rollout, t)
        x0 = clean.latents
        if t_next is None:
            rollout = clean
        elif kind == "ode":
            rollout = replace(clean, latents=schedule.ode_step(x0, x_t, t, t_next))
        else:
            rollout = replace(clean, latents=schedule.add_noise(x0, draw(x_t), t_next))
    return rollout


def _way(x: Tensor, times: Sequence[StudentTime] | Sequence[SolverStep]) -> list[tuple[Time, Time | None]]:
    """A teacher's steps; a student's lead from each time to the next, and from the last to clean latents."""

    def for_all(value: StudentTime) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(x.device, torch.float64)
        return x.new_full((len(x),), value, dtype=torch.float64)

    def level(step: SolverStep, at: Level) -> NoiseLevel:
        return NoiseLevel(for_all(step.timestep), *map(for_all, at))

    steps = [time for time in times if isinstance(time, SolverStep)]
    if steps:
        return [(level(step, step.start), None if step.end == CLEAN else level(step, step.end)) for step in steps]
    ts = [for_all(time) for time in times if not isinstance(time, SolverStep)]
    return list(zip(ts, [*ts[1:], None], strict=True))
