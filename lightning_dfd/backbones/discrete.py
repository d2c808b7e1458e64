"""Stock schedulers for few-step students of families with a table of noise levels: CogVideoX, Latte, Allegro."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, LCMScheduler

from lightning_dfd.diffusion.noise import NoiseSchedule
from lightning_dfd.types import SampleKind


def few_step_discrete_scheduler(schedule: NoiseSchedule, steps: Sequence[float], kind: SampleKind) -> Any:
    """DDIM's scheduler for `ode`, LCM's for `sde`, both on the teacher's own table.

    Left to themselves, as a pipeline's default call leaves them, both take N rows that are T // N apart. LCM's ends at
    row T // N - 1; DDIM's can end at any lower row as well.

    Args:
        schedule: the teacher's, with a table of T rows.

    Raises:
        ValueError: the rows of `steps` are others.
    """
    table = schedule.alphas_cumprod
    assert table is not None
    rows: list[int] = schedule.timestep(torch.tensor(steps, dtype=torch.float64)).tolist()
    gap = len(table) // len(rows)
    last = min(rows[-1], gap - 1) if kind == "ode" else gap - 1
    runs_at = [last + gap * i for i in reversed(range(len(rows)))]
    if runs_at != rows:
        raise ValueError(
            f"stock schedulers run {len(rows)} steps at {runs_at} ({kind}), this student samples at {rows}; "
            f"set model.sampling.steps: {[row / len(table) for row in runs_at]}"
        )
    before = torch.cat([table.new_ones(1), table[:-1]])
    own: dict[str, Any] = {
        "num_train_timesteps": len(table),
        "trained_betas": (1.0 - table / before).tolist(),
        "prediction_type": schedule.prediction,
        "set_alpha_to_one": True,
        "clip_sample": False,
    }
    if kind == "ode":
        return DDIMScheduler(**own, timestep_spacing="leading", steps_offset=last)
    # The scaling makes LCM's boundary condition vanish: x0 as predicted.
    return LCMScheduler(**own, original_inference_steps=len(rows), timestep_scaling=1e6)
