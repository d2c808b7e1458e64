"""Objectives against an independent plain implementation in NumPy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_dfd.diffusion.noise import NoiseSchedule, schedule_from_config
from lightning_dfd.diffusion.sampler import Rollout, roll_to, stateless
from lightning_dfd.objectives import (
    approximate_r1,
    discriminator_loss,
    diversity_loss,
    dmd_gradient,
    fake_score_loss,
    forced_samples,
    generator_loss,
    guide,
    is_unguided,
    nearest_real,
    paired_gap,
    surrogate_loss,
    teacher_data,
    teacher_guidance,
)
from lightning_dfd.testing.tiny.cogvideox import cogvideox_scheduler


def draws(*shape: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_gradient_equals_a_plain_loop() -> None:
    gen, fake, teacher = draws(3, 2, 4, count=3)
    expected = np.zeros((3, 2, 4))
    for b in range(3):
        scale = np.mean([abs(float(a) - float(c)) for a, c in zip(gen[b].flatten(), teacher[b].flatten(), strict=True)])
        for index in np.ndindex(2, 4):
            expected[(b, *index)] = (float(fake[b][index]) - float(teacher[b][index])) / (scale + 1e-6)
    result = dmd_gradient(gen, fake, teacher)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-5)


def test_surrogate_has_the_gradient_and_the_value() -> None:
    gen, gradient = draws(3, 2, 4, count=2)
    gen = gen.float().requires_grad_()
    loss = surrogate_loss(gen, gradient.float())
    loss.backward()
    torch.testing.assert_close(gen.grad, gradient.float() / gen.numel(), rtol=1e-4, atol=1e-6)
    assert loss.item() == pytest.approx(0.5 * float(np.mean(gradient.numpy() ** 2)), rel=1e-4)


@pytest.mark.parametrize("space", ["x0", "eps", "output"])
def test_fake_loss_equals_its_definition(space: str) -> None:
    fake, gen, eps = draws(3, 5, count=3)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    schedule = NoiseSchedule("flow")
    x_t = (1 - t.view(-1, 1)) * gen + t.view(-1, 1) * eps
    # By hand, for flow: the output is (x_t - x0) / t, the noise (x_t - (1 - t) x0) / t.
    weight = {"x0": np.ones(3), "output": 1 / t.numpy(), "eps": (1 - t.numpy()) / t.numpy()}[space]
    expected = np.mean((weight[:, None] * (fake - gen).numpy()) ** 2)
    assert fake_score_loss(schedule, fake, gen, x_t, t, space).item() == pytest.approx(expected)  # type: ignore[arg-type]


def test_fake_loss_does_not_train_the_student() -> None:
    fake, gen = draws(2, 3, count=2)
    gen.requires_grad_()
    fake.requires_grad_()
    t = torch.full((2,), 0.5)
    fake_score_loss(NoiseSchedule("flow"), fake, gen, gen.detach(), t).backward()
    assert gen.grad is None
    assert fake.grad is not None


def test_guidance_is_the_diffusers_form() -> None:
    uncond, cond = draws(2, 3, count=2)
    torch.testing.assert_close(guide(uncond, cond, 5.0), uncond + 5 * (cond - uncond))
    torch.testing.assert_close(guide(uncond, cond, 1.0), cond)


def test_data_forcing_shows_real_data_only_when_forced() -> None:
    gen, real = draws(2, 3, count=2)
    gen.requires_grad_()
    assert torch.equal(teacher_data(gen, real, torch.tensor([True, True])), real)
    shown = teacher_data(gen, real, torch.tensor([False, True]))
    assert not shown.requires_grad
    assert torch.equal(shown, torch.stack([gen[0].detach(), real[1]]))


def test_paired_gap_is_the_mean_distance() -> None:
    gen, real = draws(2, 3, count=2)
    assert paired_gap(real, gen).item() == pytest.approx(float(np.abs(real.numpy() - gen.numpy()).mean()), rel=1e-6)


# ---- levers of data forcing -----------------------------------------------------------------------------------


def test_guidance_of_each_sample_equals_separate_calls() -> None:
    uncond, cond = draws(3, 2, 4, count=2)
    mixed = guide(uncond, cond, torch.tensor([5.0, 1.0, 2.5], dtype=torch.float64))
    for b, scale in enumerate((5.0, 1.0, 2.5)):
        torch.testing.assert_close(mixed[b], guide(uncond[b], cond[b], scale))


def test_unguided_means_one_for_all() -> None:
    assert is_unguided(1.0)
    assert is_unguided(torch.ones(3))
    assert not is_unguided(5.0)
    assert not is_unguided(torch.tensor([1.0, 5.0]))


def test_forcing_by_time_is_of_each_sample() -> None:
    t = torch.tensor([0.1, 0.5, 0.75, 0.9], dtype=torch.float64)
    assert forced_samples(True, t, [0.5, 0.75]).tolist() == [False, True, True, False]
    assert forced_samples(True, t).all()
    assert not forced_samples(False, t).any()
    assert not forced_samples(False, t, [0.0, 1.0]).any()


def test_guidance_of_the_forced_branch() -> None:
    forced = torch.tensor([True, False])
    assert teacher_guidance(forced, 5.0, None) == 5.0
    scale = teacher_guidance(forced, 5.0, 1.0)
    assert isinstance(scale, torch.Tensor)
    assert scale.tolist() == [1.0, 5.0]


def test_nearest_equals_a_plain_loop() -> None:
    gen, real = draws(3, 2, 4, count=2, seed=1)
    clips = [list(draws(2, 4, count=6, seed=10 + b)) for b in range(3)]
    clips[0].insert(1, real[0].clone())  # the own clip among those drawn: no candidate a second time
    clips[1] = clips[1][:1]  # fewer than asked for
    clips[2] = []
    result = nearest_real(gen, real, clips, 4)
    for b, others in enumerate((clips[0][:1] + clips[0][2:4], clips[1], [])):
        candidates = [real[b], *others]
        errors = [float(np.mean((c.numpy() - gen[b].numpy()) ** 2)) for c in candidates]
        assert torch.equal(result[b], candidates[int(np.argmin(errors))])
    assert torch.equal(nearest_real(gen, real, clips, 1), real)


# ---- GAN ------------------------------------------------------------------------------------------------------


def test_gan_losses_equal_a_plain_loop() -> None:
    real, fake = draws(4, 3, count=2)
    plus = lambda x: float(np.mean(np.log1p(np.exp(x.numpy()))))  # noqa: E731
    assert discriminator_loss(real, fake).item() == pytest.approx(plus(-real) + plus(fake), rel=1e-5)
    assert generator_loss(fake).item() == pytest.approx(plus(-fake), rel=1e-5)
    zero = torch.zeros(4, 3)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * np.log(2))


def test_approximate_r1_is_the_squared_gradient() -> None:
    """For D(x) = w.x it is sigma^2 |w|^2 in the mean, and nothing for a constant."""
    (weight,) = draws(8, count=1)
    x, eps = draws(20000, 8, count=2, seed=1)
    result = approximate_r1(x @ weight[:, None], (x + 0.1 * eps) @ weight[:, None])
    assert result.item() == pytest.approx(0.01 * float(weight.square().sum()), rel=0.05)
    assert approximate_r1(torch.ones(4, 2), torch.ones(4, 2)).item() == 0


# ---- DP-DMD ---------------------------------------------------------------------------------------------------


def schedules() -> dict[str, NoiseSchedule]:
    config = dict(cogvideox_scheduler(3.0).config)
    return {
        "flow": NoiseSchedule("flow"),
        "v": schedule_from_config(config | {"_class_name": "CogVideoXDDIMScheduler"}),
    }


@pytest.mark.parametrize("kind", ["flow", "v"])
@pytest.mark.parametrize("steps", [1, 5])
def test_no_diversity_loss_where_the_student_lands_on_the_teachers_path(kind: str, steps: int) -> None:
    schedule = schedules()[kind]
    z, matrix = draws(3, 6, count=2)
    teacher = lambda x, t: torch.tanh(x + t.view(-1, 1)) + matrix  # noqa: E731
    t, t_k = torch.full((3,), 0.999, dtype=torch.float64), torch.full((3,), 0.749, dtype=torch.float64)
    times = torch.linspace(0.999, 0.749, steps + 1, dtype=torch.float64).tolist()
    z_k = roll_to(stateless(teacher), schedule, Rollout(z), times, "ode").latents
    right = schedule.x0_of_step(z, z_k, t, t_k)
    torch.testing.assert_close(schedule.ode_step(right, z, t, t_k), z_k)
    assert diversity_loss(schedule, right, z, z_k, t, t_k).item() == pytest.approx(0, abs=1e-12)
    if steps == 1:
        assert diversity_loss(schedule, teacher(z, t), z, z_k, t, t_k).item() == pytest.approx(0, abs=1e-12)
    else:
        assert diversity_loss(schedule, teacher(z, t), z, z_k, t, t_k).item() > 1e-4


def test_diversity_loss_is_the_papers_for_flow() -> None:
    """mse(v, (z - z_k) / (1 - t_k)) from t = 1, with v = z - x0 there."""
    x0, z, z_k = draws(3, 6, count=3)
    t, t_k = torch.ones(3, dtype=torch.float64), torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    expected = np.mean(((z - x0).numpy() - (z - z_k).numpy() / (1 - t_k.numpy())[:, None]) ** 2)
    assert diversity_loss(NoiseSchedule("flow"), x0, z, z_k, t, t_k).item() == pytest.approx(expected, rel=1e-5)


def test_diversity_loss_is_of_v_where_power_is_kept() -> None:
    """The target is the rotation's rate: v* = (cos(d) z - z_k) / sin(d) for an angle d between the times."""
    schedule = schedules()["v"]
    x0, z, z_k = draws(3, 6, count=3)
    t, t_k = torch.full((3,), 0.999, dtype=torch.float64), torch.full((3,), 0.749, dtype=torch.float64)
    (alpha, sigma), (alpha_k, sigma_k) = ([float(one[0]) for one in schedule.alpha_sigma(at)] for at in (t, t_k))
    angle = np.arctan2(sigma, alpha) - np.arctan2(sigma_k, alpha_k)
    v = (alpha * z - x0) / sigma
    target = (np.cos(angle) * z - z_k) / np.sin(angle)
    expected = float((v - target).square().mean())
    assert diversity_loss(schedule, x0, z, z_k, t, t_k).item() == pytest.approx(expected, rel=1e-5)


def test_times_of_one_noise_level_are_refused() -> None:
    z, z_k = draws(2, 3, count=2)
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="one noise level"):
        diversity_loss(schedules()["v"], z, z, z_k, t, t - 1e-5)
