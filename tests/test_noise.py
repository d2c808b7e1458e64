"""Schedules against diffusers' own tables, and round trips."""

from __future__ import annotations

import diffusers
import pytest
import torch

from lightning_dfd.diffusion.noise import NoiseSchedule, schedule_from_config, shift_time, shifted_steps

COG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


def cog(snr_shift: float, **changes: object) -> tuple[diffusers.CogVideoXDDIMScheduler, NoiseSchedule]:
    scheduler = diffusers.CogVideoXDDIMScheduler(**(COG | changes), snr_shift_scale=snr_shift)
    return scheduler, schedule_from_config(dict(scheduler.config))


@pytest.mark.parametrize("snr_shift", [1.0, 3.0])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_table_equals_diffusers(snr_shift: float, zero_snr: bool) -> None:
    scheduler, schedule = cog(snr_shift, rescale_betas_zero_snr=zero_snr)
    assert schedule.alphas_cumprod is not None
    assert schedule.alphas_cumprod.dtype == torch.float64
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-6, atol=1e-9)
    assert (schedule.alphas_cumprod[-1] == 0) == zero_snr


def test_plain_ddpm_table_equals_diffusers() -> None:
    scheduler = diffusers.DDIMScheduler(beta_schedule="linear")
    schedule = schedule_from_config(dict(scheduler.config))
    assert schedule.prediction == "epsilon"
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-8)


def test_add_noise_equals_diffusers() -> None:
    scheduler, schedule = cog(3.0)
    x0, eps = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    rows = torch.tensor([0, 249, 700, 999])
    expected = scheduler.add_noise(x0, eps, rows)
    torch.testing.assert_close(schedule.add_noise(x0, eps, rows / 1000), expected, rtol=1e-5, atol=1e-5)


def all_schedules() -> list[NoiseSchedule]:
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    return [cog(3.0)[1], NoiseSchedule("flow"), schedule_from_config(dict(scheduler.config))]


@pytest.mark.parametrize("schedule", all_schedules(), ids=lambda schedule: schedule.prediction)
def test_round_trips(schedule: NoiseSchedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(6, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.001, 0.2, 0.5, 0.75, 0.9, 0.999], dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    output = schedule.from_x0(x0, x_t, t)
    torch.testing.assert_close(schedule.to_x0(output, x_t, t), x0)
    torch.testing.assert_close(schedule.to_eps(x0, x_t, t), eps)


def test_outputs_are_what_their_names_say() -> None:
    x0, eps, t = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9])
    flow = NoiseSchedule("flow")
    torch.testing.assert_close(flow.from_x0(x0, flow.add_noise(x0, eps, t), t), eps - x0, rtol=1e-4, atol=1e-5)
    velocity = cog(1.0)[1]
    alpha, sigma = (level.float().view(-1, 1) for level in velocity.alpha_sigma(t))
    expected = alpha * eps - sigma * x0
    torch.testing.assert_close(velocity.from_x0(x0, velocity.add_noise(x0, eps, t), t), expected, rtol=1e-4, atol=1e-5)


def test_terminal_step_is_pure_noise_and_starts_the_table() -> None:
    schedule = cog(3.0)[1]
    for t in (0.999, 1.0):
        assert schedule.timestep(torch.tensor(t)).item() == 999
    alpha, sigma = schedule.alpha_sigma(torch.tensor(0.999))
    assert alpha.item() == 0.0
    assert sigma.item() == 1.0


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_round_trip(shift: float) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, shift), 1 / shift), t)  # 1 / s undoes s


def test_shifted_steps_are_the_published_ones() -> None:
    assert shifted_steps(4, 5.0) == pytest.approx([1.0, 0.9375, 0.83333, 0.625], abs=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="prediction_type 'sample'"):
        schedule_from_config({"_class_name": "DDIMScheduler", "prediction_type": "sample"})
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedule_from_config({**COG, "num_train_timesteps": 1000, "prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="squaredcos"):
        schedule_from_config({**COG, "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
