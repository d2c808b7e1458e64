"""Stock schedulers for few-step students of flow-matching families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler

from lightning_dfd.diffusion.noise import shift_time, shifted_steps
from lightning_dfd.types import SampleKind

TOLERANCE = 1e-4  # of t: a tenth of a timestep


def few_step_flow_scheduler(steps: Sequence[float], kind: SampleKind) -> Any:
    """A FlowMatchEuler scheduler whose own N steps are `steps`, for pipelines that pass it nothing but N.

    Such a pipeline's scheduler spaces N times between 1 and its smallest sigma, shifts them, and stretches the
    result to `shift_terminal`. The shift `k` for which this gives the s-shifted `1 - i/N` solves a fixed point,
    since the smallest sigma depends on k as well. The scheduler is right for this N only.

    Raises:
        ValueError: `steps` are not a shift of 1, 1 - 1/N, ..., 1/N.
    """
    num, last = len(steps), steps[-1]
    shift = _shift(steps, shifted_steps(num, 1.0))
    if num == 1:
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=kind == "sde")
    baked = shift
    for _ in range(50):
        gap = (1.0 - shift_time(0.001, baked)) / (num - 1)
        baked = shift * num * gap / (shift * num * gap - (shift - 1.0))
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        shift=baked, shift_terminal=last, stochastic_sampling=kind == "sde"
    )
    scheduler.set_timesteps(num)
    runs_at = scheduler.sigmas[:-1].tolist()
    if max(abs(a - b) for a, b in zip(runs_at, steps, strict=True)) > TOLERANCE:
        raise ValueError(f"the stock flow scheduler runs at {runs_at}, the student at {list(steps)}")
    return scheduler


def few_step_own_scheduler(steps: Sequence[float], kind: SampleKind, own: Sequence[float], **config: Any) -> Any:
    """A FlowMatchEuler scheduler that makes `steps` of the `own` N times that a pipeline hands it: it shifts them.

    Args:
        own: the times that the pipeline's call passes for N steps, largest first.
        config: what else the family's scheduler has to be told.

    Raises:
        ValueError: `steps` are not a shift of `own`.
    """
    return FlowMatchEulerDiscreteScheduler(
        shift=_shift(steps, own), stochastic_sampling=kind == "sde", use_dynamic_shifting=False, **config
    )


def _shift(steps: Sequence[float], own: Sequence[float]) -> float:
    """The shift that takes the times `own` to `steps`, from their last ones; ValueError if the others differ."""
    last, unshifted = steps[-1], own[-1]
    shift = last * (1.0 - unshifted) / (unshifted * (1.0 - last)) if len(steps) > 1 else 1.0
    expected = [shift_time(t, shift) for t in own]
    if max(abs(a - b) for a, b in zip(steps, expected, strict=True)) > TOLERANCE:
        wanted, base, nearest = ([round(t, 4) for t in times] for times in (steps, own, expected))
        raise ValueError(
            f"no stock flow scheduler samples at {wanted}: it can only shift {base}, and with the same last step "
            f"that is {nearest}; set model.sampling.steps to a shifted list"
        )
    return shift
