"""Sampling: the few-step student's and the many-step teacher's are one function.

Axis legend: B batch; latents are [B, ...]; times fall from (near) 1 towards 0.
Training rollouts, validation, `lightning sample` and the check of an export all call `roll_to` or `sample`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from lightning_dfd.noise import NoiseSchedule
from lightning_dfd.types import SampleKind

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x_t [B, ...], t [B]) -> x0 [B, ...]
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
    for now, then in itertools.pairwise(times):
        t, t_next = (x.new_full((len(x),), time, dtype=torch.float64) for time in (now, then))
        x0 = denoise(x, t)
        x = schedule.ode_step(x0, x, t, t_next) if kind == "ode" else schedule.add_noise(x0, draw(x), t_next)
        if on_step is not None:
            on_step()
    return x


def sample(
    denoise: Denoise,
    schedule: NoiseSchedule,
    noise: Tensor,
    times: Sequence[float],
    kind: SampleKind = "ode",
    draw: Draw = torch.randn_like,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Clean latents [B, ...] from `noise` [B, ...] in len(times) network calls."""
    x = roll_to(denoise, schedule, noise, times, kind, draw, on_step)
    x0 = denoise(x, x.new_full((len(x),), times[-1], dtype=torch.float64))
    if on_step is not None:
        on_step()
    return x0


def teacher_times(scheduler_config: Mapping[str, Any], num_steps: int, **own: Any) -> tuple[float, ...]:
    """The times at which the teacher's own scheduler would take `num_steps` steps, largest first.

    A fresh scheduler is made for it, since a used one carries state. `sample` with these times and kind `ode`
    is Euler's method for flow and DDIM for the others, whatever solver the pipeline is set to.

    Args:
        own: what the pipeline hands to `set_timesteps` besides: its own `sigmas`, or `mu`.
    """
    scheduler = getattr(diffusers, scheduler_config["_class_name"]).from_config(dict(scheduler_config))
    scheduler.set_timesteps(num_steps, **own)
    total = scheduler.config.num_train_timesteps
    if scheduler_config["_class_name"].startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
        sigmas = scheduler.sigmas[:num_steps].double()
        return tuple((1.0 - sigmas if scheduler.config.get("invert_sigmas") else sigmas).tolist())
    return tuple((scheduler.timesteps[:num_steps].double() / total).tolist())
