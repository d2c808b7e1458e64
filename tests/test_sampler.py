"""Rollouts: what a network carries from call to call, and times per frame. Networks here are one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.diffusion.noise import NoiseSchedule, Time, schedule_from_config
from lightning_dfd.diffusion.sampler import Denoise, Rollout, roll_to, sample, stateless
from lightning_dfd.objectives.terms import DistributionMatching, Networks, Step, StudentInput, student_loss
from lightning_dfd.types import SampleKind

FLOW = NoiseSchedule("flow")
TABLE = schedule_from_config(
    {
        "_class_name": "CogVideoXDDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    frame_axis=1,
)
STEPS = (0.999, 0.75, 0.5, 0.25)


def remembering(rollout: Rollout, t: Time) -> Rollout:
    """Each estimate leans on the last one, which it carries on: a network with a memory."""
    assert isinstance(t, Tensor)
    past = rollout.carried if isinstance(rollout.carried, Tensor) else torch.zeros_like(rollout.latents)
    x0 = 0.5 * rollout.latents + 0.25 * past
    return Rollout(x0, x0)


def by_hand(x: Tensor) -> Tensor:
    """`remembering`, sampled without the sampler."""
    past = torch.zeros_like(x)
    for t, t_next in zip(STEPS, [*STEPS[1:], 0.0], strict=True):
        past = x0 = 0.5 * x + 0.25 * past
        x = (1 - t_next) * x0 + t_next / t * (x - (1 - t) * x0)
    return x


def test_what_a_network_carries_goes_from_call_to_call() -> None:
    noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean = sample(remembering, FLOW, Rollout(noise), STEPS)
    torch.testing.assert_close(clean.latents, by_hand(noise))
    assert torch.equal(clean.carried, clean.latents)  # type: ignore[arg-type]
    forgetful = sample(stateless(lambda x, t: 0.5 * x), FLOW, Rollout(noise), STEPS)
    assert forgetful.carried is None
    assert not torch.allclose(clean.latents, forgetful.latents)


def test_a_rollout_goes_on_where_it_was_left() -> None:
    noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    half = roll_to(remembering, FLOW, Rollout(noise), STEPS[:3], "ode")
    resumed, whole = sample(remembering, FLOW, half, STEPS[2:]), sample(remembering, FLOW, Rollout(noise), STEPS)
    torch.testing.assert_close(resumed.latents, whole.latents)


def test_the_students_rollout_in_training_carries_too() -> None:
    """The one step with gradient gets what the steps before it left."""
    weight = torch.ones((), requires_grad=True)
    carried: list[bool] = []

    def student(rollout: Rollout, t: Time, cond: None) -> Rollout:
        carried.append(rollout.carried is not None)
        clean = remembering(rollout, t)
        return replace(clean, latents=weight * clean.latents)

    plain = lambda x_t, t, cond: 0.9 * x_t  # noqa: E731
    teacher = lambda x_t, t, cond, guidance: 0.8 * x_t  # noqa: E731
    networks = Networks(FLOW, plain, plain, teacher, rolling=student)
    calls = set()
    for iteration in range(20):
        draws = Draws.of(0, iteration, 0, 0, torch.device("cpu"))
        step = Step(networks, torch.randn(2, 3, 4, 2, 2), None, draws, StudentInput("rollout", STEPS))
        carried.clear()
        student_loss([DistributionMatching()], step).backward()
        calls.add(len(carried))
        assert carried == [number > 0 for number in range(len(carried))]
    assert calls == {1, 2, 3, 4}
    assert weight.grad is not None


def closed_form(x_t: Tensor, t: Time) -> Tensor:
    """An estimate that depends on its own frame's time alone; t is [B] or [B, f]."""
    assert isinstance(t, Tensor)
    level = t if t.ndim == 2 else t[:, None]
    axis = 1 if x_t.shape[1] == 4 else 2
    shape = [len(level), 1, 1, 1, 1]
    shape[axis] = level.shape[1]
    return x_t * (1 - 0.5 * level).reshape(shape).to(x_t)


@pytest.mark.parametrize("kind", ["ode", "sde"])
@pytest.mark.parametrize("schedule", [FLOW, TABLE], ids=["flow, [B, C, f, h, w]", "table, [B, f, C, h, w]"])
def test_times_per_frame_are_each_frames_own(schedule: NoiseSchedule, kind: SampleKind) -> None:
    axis = schedule.frame_axis
    shape = [2, 3, 3, 2, 2]
    shape[axis] = 4
    generator = torch.Generator().manual_seed(0)
    noise, fresh = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    times = torch.tensor([[0.999, 0.9, 0.6, 0.3], [0.9, 0.9, 0.5, 0.2]], dtype=torch.float64)
    ways = [times, times * 0.5, times * 0.25]
    denoise: Denoise = stateless(closed_form)
    together = sample(denoise, schedule, Rollout(noise), ways, kind, lambda x: fresh).latents
    for frame in range(4):
        own = noise.narrow(axis, frame, 1), fresh.narrow(axis, frame, 1)
        whole = [part.repeat_interleave(4, axis) for part in own]
        alone = sample(
            denoise, schedule, Rollout(whole[0]), [way[:, frame] for way in ways], kind, lambda x, w=whole: w[1]
        )
        torch.testing.assert_close(together.narrow(axis, frame, 1), alone.latents.narrow(axis, frame, 1))


def test_frames_that_are_clean_stay_so() -> None:
    """A given first frame has time 0 throughout; it must not become nan, nor move."""
    x = torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ways = [torch.tensor([[0.0, level, level, level]]) for level in (0.9, 0.5)]
    moved = roll_to(stateless(closed_form), FLOW, Rollout(x), ways, "ode").latents
    assert torch.equal(moved[:, :, 0], x[:, :, 0])
    assert bool(torch.isfinite(moved).all())
    assert not torch.equal(moved[:, :, 1], x[:, :, 1])
    moved.square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
