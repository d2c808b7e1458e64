"""The steps that a teacher's own scheduler takes, from its config alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import diffusers
import numpy as np

from lightning_dfd.diffusion.noise import schedule_from_config

Level = tuple[float, float]  # alpha and sigma
CLEAN: Level = (1.0, 0.0)

# Solvers whose first-order steps `teacher_times` knows: of flow, of tables row by row, and of tables by sigma / alpha.
FLOW_SOLVER = "FlowMatchEulerDiscreteScheduler"
ROW_SOLVERS = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "DDIMScheduler")
EULER_SOLVERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
MULTISTEP_SOLVERS = ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
SOLVERS = (FLOW_SOLVER, *ROW_SOLVERS, *EULER_SOLVERS, *MULTISTEP_SOLVERS)


class SolverStep(NamedTuple):
    """One step of a teacher: what the network is told, and the noise levels before and after.

    A step need not end where the next begins. diffusers' DDIM steps from row t to row t - T // n and asks next at the
    next row of its list, which is another one where n does not divide T.

    Args:
        scale: what latents are multiplied by before it; 1 but for a first step that begins at weaker noise.
    """

    timestep: float
    start: Level
    end: Level
    scale: float = 1.0


def teacher_times(
    scheduler_config: Mapping[str, Any], num_steps: int, inverted: bool = False, **own: Any
) -> tuple[SolverStep, ...]:
    """The steps that the teacher's own scheduler would take, `num_steps` of them, by its solver of first order.

    Timesteps, spacing and noise levels are the scheduler's own. The step is Euler's for flow and DDIM's for tables:
    what the scheduler does at `solver_order` 1 and without noise of its own. A fresh scheduler is made for it, since a
    used one carries state.

    Args:
        inverted: the pipeline counts time the other way, as Mochi's does.
        own: what the pipeline hands to `set_timesteps` besides: its own `sigmas`, or `mu`.

    Raises:
        ValueError: the scheduler, or one of its settings, is none that this is known for, by name.
    """
    name = str(scheduler_config["_class_name"])
    if name not in SOLVERS:
        raise _refused(name, f"is not supported; supported are {', '.join(SOLVERS)}")
    if num_steps < 1:
        raise ValueError(f"the teacher cannot be sampled in {num_steps} steps; take at least 1")
    scheduler = getattr(diffusers, name).from_config(dict(scheduler_config))
    _check_settings(name, scheduler.config, inverted)
    if "sigmas" in own:
        own["sigmas"] = np.array(own["sigmas"])  # as pipelines hand them
    try:
        scheduler.set_timesteps(num_steps, **own)
    except (ValueError, TypeError, AssertionError, IndexError, ZeroDivisionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _refused(name, f"does not take {num_steps} steps: {reason}") from error
    told = scheduler.timesteps.double().tolist()
    if len(told) != num_steps:
        raise _refused(name, f"makes {len(told)} network calls of {num_steps} steps; take another number of steps")
    steps = _row_steps(scheduler, told) if name in ROW_SOLVERS else _sigma_steps(name, scheduler, told)
    if not all(math.isfinite(value) for step in steps for level in (step.start, step.end) for value in level):
        raise _refused(name, f"divides by zero in {num_steps} steps; take more")
    if not all(step.start[1] > 0 for step in steps):
        raise _refused(name, f"asks where there is no noise in {num_steps} steps; take another number of steps")
    return steps


def _check_settings(name: str, config: Mapping[str, Any], inverted: bool) -> None:
    if bool(config.get("invert_sigmas")) != inverted:
        raise _refused(name, f"has invert_sigmas {not inverted}; this pipeline needs {inverted}")
    if config.get("thresholding"):
        raise _refused(name, "has thresholding, which changes latents as no step of ours does; set it to false")
    if name == "DDIMScheduler" and config["clip_sample"]:
        raise _refused(name, "has clip_sample, which cuts latents to [-1, 1]; set it to false")
    if config.get("timestep_type", "discrete") != "discrete":
        raise _refused(name, f"has timestep_type {config['timestep_type']!r}; set it to 'discrete'")
    flow = bool(config.get("use_flow_sigmas"))
    if name in MULTISTEP_SOLVERS and flow != (config["prediction_type"] == "flow_prediction"):
        raise _refused(
            name,
            f"has prediction_type {config['prediction_type']!r} with use_flow_sigmas {flow}, which do not go together",
        )


def _row_steps(scheduler: Any, told: Sequence[float]) -> tuple[SolverStep, ...]:
    """DDIM's: from row t to row t - T // n of the table, below its first row to `final_alpha_cumprod`."""
    table = schedule_from_config({**scheduler.config, "_class_name": type(scheduler).__name__}).alphas_cumprod
    assert table is not None
    name, gap = type(scheduler).__name__, len(table) // len(told)
    if max(told) >= len(table):
        raise _refused(name, f"asks at row {max(told):.0f} of a table of {len(table)}; lower steps_offset")

    def level(row: int) -> Level:
        squared = float(scheduler.final_alpha_cumprod) if row < 0 else float(table[row])
        return math.sqrt(squared), math.sqrt(1.0 - squared)

    return tuple(SolverStep(row, level(int(row)), level(int(row) - gap)) for row in told)


def _sigma_steps(name: str, scheduler: Any, told: Sequence[float]) -> tuple[SolverStep, ...]:
    """From each of the scheduler's sigmas to the next: of flow they are times, of tables sigma / alpha."""
    sigmas, scale = scheduler.sigmas.double().tolist(), 1.0
    if name == FLOW_SOLVER or scheduler.config.get("use_flow_sigmas"):
        if scheduler.config.get("invert_sigmas"):  # Mochi's, whose time runs the other way
            total = scheduler.config.num_train_timesteps
            told, sigmas = [total - timestep for timestep in told], [1.0 - sigma for sigma in sigmas]
        if max(sigmas) > 1:
            raise _refused(name, f"spaces flow's times up to {max(sigmas):.4g}, beyond 1; leave its other spacings off")
        levels = [(1.0 - sigma, sigma) for sigma in sigmas]
    else:
        levels = [(1.0 / math.hypot(1.0, sigma), sigma / math.hypot(1.0, sigma)) for sigma in sigmas]
        if name in EULER_SOLVERS:  # they carry x / alpha, and return it
            scale = float(scheduler.init_noise_sigma) * levels[0][0]
            levels[-1] = (1.0, sigmas[-1])
    steps = [SolverStep(timestep, *ends) for timestep, ends in zip(told, itertools.pairwise(levels), strict=True)]
    return steps[0]._replace(scale=scale), *steps[1:]


def _refused(name: str, reason: str) -> ValueError:
    return ValueError(f"the teacher cannot be sampled: its {name} {reason} (scheduler_config.json of model.teacher)")
