"""Sampling: the few-step student's and the many-step teacher's are one function.

Axis legend: B batch; latents are [B, ...]; times fall from (near) 1 towards 0.
Training rollouts, validation, `lightning sample` and the check of an export all call `roll_to` or `sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_dfd.diffusion.noise import NoiseLevel, NoiseSchedule, Time
from lightning_dfd.diffusion.solvers import CLEAN, Level, SolverStep
from lightning_dfd.types import SampleKind

Denoise = Callable[[Tensor, Time], Tensor]  # (x_t [B, ...], t [B]) -> x0 [B, ...]
Draw = Callable[[Tensor], Tensor]  # latents [B, ...] -> standard normal noise of their shape, dtype and device


def roll_to(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Sequence[float],
    kind: SampleKind,
    draw: Draw = torch.randn_like,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """From latents x at times[0] to latents at times[-1], calling the network at all times but the last.

    Args:
        kind: `ode` steps along the predicted direction; `renoise` predicts x0 and adds fresh noise, as a
            DMD2 student does (2405.14867, backward simulation).
        draw: gives the fresh noise of `renoise`, for latents of the shape that it is handed.
        on_step: called after every network call, for a progress bar.
    """
    return _follow(denoise, schedule, x, _way(x, times)[:-1], kind, draw, on_step)


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    noise: Tensor,
    times: Sequence[float] | Sequence[SolverStep],
    kind: SampleKind = "ode",
    draw: Draw = torch.randn_like,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Clean latents [B, ...] from `noise` [B, ...] in len(times) network calls.

    Args:
        times: a student's, largest first; or a teacher's steps, as `teacher_times` gives them.
    """
    first = times[0]
    x = noise * first.scale if isinstance(first, SolverStep) else noise
    return _follow(denoise, schedule, x, _way(noise, times), kind, draw, on_step)


def _follow(
    denoise: Denoise,
    schedule: NoiseSchedule,
    x: Tensor,
    way: Sequence[tuple[Time, Time | None]],
    kind: SampleKind,
    draw: Draw,
    on_step: Callable[[], None] | None,
) -> Tensor:
    """Every step of the way from x on; None is where latents are clean."""
    for t, t_next in way:
        x0 = denoise(x, t)
        if t_next is None:
            x = x0
        else:
            x = schedule.ode_step(x0, x, t, t_next) if kind == "ode" else schedule.add_noise(x0, draw(x), t_next)
        if on_step is not None:
            on_step()
    return x


def _way(x: Tensor, times: Sequence[float] | Sequence[SolverStep]) -> list[tuple[Time, Time | None]]:
    """A teacher's steps; a student's lead from each time to the next, and from the last to clean latents."""

    def for_all(value: float) -> Tensor:
        return x.new_full((len(x),), value, dtype=torch.float64)

    def level(step: SolverStep, at: Level) -> NoiseLevel:
        return NoiseLevel(for_all(step.timestep), *map(for_all, at))

    steps = [time for time in times if isinstance(time, SolverStep)]
    if steps:
        return [(level(step, step.start), None if step.end == CLEAN else level(step, step.end)) for step in steps]
    ts = [for_all(time) for time in times if not isinstance(time, SolverStep)]
    return list(zip(ts, [*ts[1:], None], strict=True))
