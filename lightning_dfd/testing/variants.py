"""Configurations that the tiny pipelines do not have: other steps, spacings, solvers, sizes and lengths of text."""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers

from lightning_dfd.testing.case import Case
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.types import VideoSize

STEPS = {7: 4, 10: 4, 25: 2, 30: 2, 36: 1, 50: 1}  # and how often each is drawn: few cost less
SPACINGS = ("leading", "trailing", "linspace")
# Of first order: what our sampler does of a scheduler's solver.
FIRST_ORDER: Mapping[str, Mapping[str, Any]] = {
    "UniPCMultistepScheduler": {"solver_order": 1, "disable_corrector": list(range(max(STEPS)))},
    "DPMSolverMultistepScheduler": {"solver_order": 1},
}


def vary(case: Case, folder: Path, seed: int) -> tuple[Case, int, str]:
    """The case with another scheduler in the pipeline, other text lengths and sizes; a number of steps; both in words.

    Args:
        folder: to be made, for the pipeline: links to the case's, but for the scheduler.
    """
    draw = random.Random(seed)
    (steps,) = draw.choices(list(STEPS), list(STEPS.values()))
    call = inspect.signature(getattr(diffusers, case.teacher.pipeline_name).__call__).parameters
    solvers = [name for name in FIRST_ORDER if name != "DPMSolverMultistepScheduler" or "sigmas" not in call]
    scheduler = _scheduler(draw, dict(case.teacher.configs.scheduler), solvers)
    link_with_scheduler(Path(case.source), folder, scheduler)
    text = case.text_length
    least, most = case.teacher.text_limits()
    if text == TEXT_LENGTH and least != most:
        text = draw.choice((11, TEXT_LENGTH, 19))
    frames, height, width = (
        side + draw.choice((-1, 0, 1)) * unit
        for side, unit in zip((case.size.frames, case.size.height, case.size.width), (4, 16, 16), strict=True)
    )
    size = case.teacher.sizes().nearest(VideoSize(frames, height, width))
    words = f"{steps} steps, {size}, {text} text tokens, {json.dumps(scheduler)}"
    return replace(case, source=str(folder), text_length=text, size=size), steps, words


def _scheduler(draw: random.Random, config: dict[str, Any], solvers: Sequence[str]) -> dict[str, Any]:
    """Another scheduler's config: of tables another spacing, of flow another shift, of either perhaps another class.

    Args:
        solvers: that the pipeline can be given. DPM-Solver's cannot be handed sigmas.
    """
    name = config["_class_name"]
    if not name.startswith("FlowMatch"):
        config |= {"timestep_spacing": draw.choice(SPACINGS), "steps_offset": draw.choice((0, 1))}
        config["set_alpha_to_one"] = draw.choice((True, False))
        if name == "DDIMScheduler":
            name = draw.choice((name, "EulerDiscreteScheduler", *solvers))
    elif not config.get("invert_sigmas") and not config.get("use_dynamic_shifting"):
        shift = draw.choice((1.0, 3.0, 5.0, 8.0))
        config |= {"shift": shift, "flow_shift": shift}
        if other := draw.choice((None, *solvers)):
            name = other
            config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {**config, **FIRST_ORDER.get(name, {}), "_class_name": name}


def link_with_scheduler(source: Path, folder: Path, scheduler: Mapping[str, Any]) -> None:
    """A pipeline's folder with another scheduler, of links to `source` otherwise."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.name not in ("model_index.json", "scheduler"):
            (folder / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
