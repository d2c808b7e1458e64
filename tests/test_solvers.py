"""The teacher's steps are its scheduler's: replayed step by step against diffusers' own, with a network of one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from lightning_dfd import DistillationModule, VideoDataModule
from lightning_dfd.callbacks import VideoEvaluation, VideoSamples
from lightning_dfd.diffusion.noise import Time, schedule_from_config
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.diffusion.solvers import teacher_times
from lightning_dfd.testing.variants import link_with_scheduler

STEPS = (7, 10, 25, 30, 36, 50)
SPACINGS = ("leading", "trailing", "linspace")
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # Latte's and Allegro's
COG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}
FIRST = {"solver_order": 1}
UNIPC = {**FIRST, "disable_corrector": list(range(99))}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
BENT = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")  # other spacings of sigma


def spaced(name: str, **config: Any) -> list[tuple[str, dict[str, Any]]]:
    """The scheduler with every spacing of timesteps."""
    return [(name, {**config, "timestep_spacing": spacing, **offset(spacing)}) for spacing in SPACINGS]


def offset(spacing: str) -> dict[str, int]:
    return {"steps_offset": 1} if spacing == "leading" else {}


KNOWN = [
    *spaced("DDIMScheduler", **LINEAR, clip_sample=False),
    *spaced("DDIMScheduler", **LINEAR, clip_sample=False, set_alpha_to_one=False),
    *spaced("DDIMScheduler", **COG, clip_sample=False),
    *spaced("CogVideoXDDIMScheduler", **COG, snr_shift_scale=3.0),
    *spaced("CogVideoXDDIMScheduler", **COG, snr_shift_scale=1.0, set_alpha_to_one=False),
    *spaced("EulerDiscreteScheduler", **LINEAR),
    *spaced("EulerDiscreteScheduler", **LINEAR, final_sigmas_type="sigma_min"),
    *spaced("EulerDiscreteScheduler", **{**COG, "rescale_betas_zero_snr": False}),
    *(("EulerDiscreteScheduler", {**LINEAR, bent: True}) for bent in BENT),
    *spaced("UniPCMultistepScheduler", **LINEAR, **UNIPC),
    *spaced("UniPCMultistepScheduler", **COG, **UNIPC, final_sigmas_type="sigma_min"),
    *(("UniPCMultistepScheduler", {**LINEAR, **UNIPC, bent: True}) for bent in BENT),
    *spaced("DPMSolverMultistepScheduler", **LINEAR, **FIRST),
    *(("DPMSolverMultistepScheduler", {**LINEAR, **FIRST, bent: True}) for bent in (*BENT, "use_lu_lambdas")),
    ("DPMSolverSinglestepScheduler", {**LINEAR, **FIRST, "lower_order_final": True}),
    ("UniPCMultistepScheduler", {**FLOW, **UNIPC}),
    ("UniPCMultistepScheduler", {**FLOW, **UNIPC, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistepScheduler", {**FLOW, **UNIPC, "shift_terminal": 0.1}),
    ("UniPCMultistepScheduler", {**FLOW, **UNIPC, "use_karras_sigmas": True, "sigma_max": 200, "sigma_min": 0.01}),
    ("DPMSolverMultistepScheduler", {**FLOW, **FIRST}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "shift_terminal": 0.1}),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    *(("FlowMatchEulerDiscreteScheduler", {"shift": 5.0, bent: True}) for bent in BENT),
]


def network(x: Tensor, timestep: Tensor | float) -> Tensor:
    """Something that depends on all it is told, most of all on the timestep."""
    angle = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1) / 20
    return (0.5 * torch.tanh(x) + 0.5 * torch.cos(angle + torch.arange(x.shape[1]))).to(x)


def stock(name: str, config: dict[str, Any], steps: int, noise: Tensor) -> Tensor:
    """As a pipeline's loop does it."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        turned = config.get("invert_sigmas")  # Mochi's networks count time the other way and answer x0 - eps
        output = -network(x, 1000 - t) if turned else network(scaled(x, t), t)
        x = scheduler.step(output, t, x).prev_sample
    return x


def ours(name: str, config: dict[str, Any], steps: int, noise: Tensor) -> Tensor:
    scheduler = getattr(diffusers, name)(**config)
    full = {**scheduler.config, "_class_name": name}
    schedule = schedule_from_config(full)

    def denoise(x_t: Tensor, t: Time) -> Tensor:
        return schedule.to_x0(network(x_t, schedule.timestep(t)), x_t, t)

    steps_of_it = teacher_times(full, steps, inverted=bool(config.get("invert_sigmas")))
    return sample(stateless(denoise), schedule, Rollout(noise), steps_of_it).latents


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; of large latents, as untrained networks that predict noise make them, in their spread."""
    return float((one - other).abs().max() / other.std().clamp(min=1.0))


@pytest.mark.parametrize(("name", "config"), KNOWN)
def test_every_spacing_is_replayed(name: str, config: dict[str, Any]) -> None:
    noise = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    errors = {}
    for steps in STEPS:
        errors[steps] = distance(ours(name, config, steps, noise), stock(name, config, steps, noise))
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize(
    ("name", "config", "first_name", "first"),
    [
        ("UniPCMultistepScheduler", FLOW, "UniPCMultistepScheduler", {**FLOW, **UNIPC}),
        ("DPMSolverMultistepScheduler", LINEAR, "DPMSolverMultistepScheduler", {**LINEAR, **FIRST}),
        ("EulerAncestralDiscreteScheduler", LINEAR, "EulerDiscreteScheduler", LINEAR),
        ("CogVideoXDPMScheduler", COG, "CogVideoXDDIMScheduler", COG),
        (
            "DPMSolverMultistepScheduler",
            {**LINEAR, "algorithm_type": "sde-dpmsolver++"},
            "DPMSolverMultistepScheduler",
            {**LINEAR, **FIRST},
        ),
    ],
)
def test_solvers_of_higher_order_or_with_noise_are_followed_in_their_first_order(
    name: str, config: dict[str, Any], first_name: str, first: dict[str, Any]
) -> None:
    noise = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert distance(ours(name, config, 30, noise), stock(first_name, first, 30, noise)) < 1e-4


DDIM = {**LINEAR, "clip_sample": False}
REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("HeunDiscreteScheduler", LINEAR, 10, "HeunDiscreteScheduler is not supported"),
    ("PNDMScheduler", LINEAR, 10, "PNDMScheduler is not supported"),
    ("FlowMatchHeunDiscreteScheduler", {}, 10, "FlowMatchHeunDiscreteScheduler is not supported"),
    ("FlowMatchLCMScheduler", {}, 10, "FlowMatchLCMScheduler is not supported"),
    ("LCMScheduler", LINEAR, 10, "LCMScheduler is not supported"),
    ("DEISMultistepScheduler", FLOW, 10, "DEISMultistepScheduler is not supported"),
    ("DDIMScheduler", LINEAR, 10, "has clip_sample.*set it to false"),
    ("DDIMScheduler", {**DDIM, "thresholding": True}, 10, "has thresholding.*set it to false"),
    ("DDIMScheduler", {**DDIM, "timestep_spacing": "even"}, 10, "does not take 10 steps: even is not supported"),
    ("DDIMScheduler", {**DDIM, "steps_offset": 200}, 10, r"asks at row 1100 of a table of 1000; lower steps_offset"),
    ("DDIMScheduler", DDIM, 1001, "does not take 1001 steps"),
    ("DDIMScheduler", DDIM, 0, "cannot be sampled in 0 steps"),
    ("DDIMScheduler", {**DDIM, "timestep_spacing": "trailing"}, 61, "makes 62 network calls of 61 steps"),
    ("EulerDiscreteScheduler", {**LINEAR, "timestep_type": "continuous"}, 10, "timestep_type 'continuous'"),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, 10, "do not go together"),
    ("UniPCMultistepScheduler", {**FLOW, "use_exponential_sigmas": True}, 10, "up to 157.4, beyond 1"),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, 10, "does not take 10 steps: `mu` must be"),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"invert_sigmas": True},
        10,
        "has invert_sigmas True; this pipeline needs False",
    ),
    ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}, 1, "divides by zero in 1 steps; take more"),
]


@pytest.mark.parametrize(("name", "config", "steps", "reason"), REFUSED)
def test_others_are_refused_by_name_in_one_line(name: str, config: dict[str, Any], steps: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        teacher_times({"num_train_timesteps": 1000, **config, "_class_name": name}, steps)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("the teacher cannot be sampled")


def test_callbacks_refuse_a_teacher_before_anything_is_loaded(tiny: dict[str, Path], tmp_path: Path) -> None:
    heun = {"num_train_timesteps": 1000, **LINEAR, "_class_name": "HeunDiscreteScheduler"}
    link_with_scheduler(tiny["latte"], tmp_path / "heun", heun)
    module: Any = DistillationModule(str(tmp_path / "heun"))
    trainer: Any = SimpleNamespace(datamodule=VideoDataModule(folder="videos", frames=9, height=32, width=48))
    for callback in (VideoSamples(), VideoEvaluation()):
        with pytest.raises(ValueError, match="its HeunDiscreteScheduler is not supported"):
            callback.setup(trainer, module, "fit")
    VideoEvaluation(teacher=False).setup(trainer, module, "fit")
    assert module.roles is None
