"""Objectives against an independent plain implementation in NumPy loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_dfd.noise import NoiseSchedule
from lightning_dfd.objectives import (
    dmd_gradient,
    draw_forcing,
    fake_score_loss,
    guide,
    paired_gap,
    surrogate_loss,
    teacher_data,
)


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
    assert teacher_data(gen, real, True) is real
    shown = teacher_data(gen, real, False)
    assert not shown.requires_grad
    torch.testing.assert_close(shown, gen.detach())


def test_forcing_draw_has_its_probability() -> None:
    generator = torch.Generator().manual_seed(0)
    share = np.mean([draw_forcing(0.3, generator) for _ in range(4000)])
    assert share == pytest.approx(0.3, abs=0.03)
    assert not any(draw_forcing(0.0, generator) for _ in range(100))
    assert all(draw_forcing(1.0, generator) for _ in range(100))


def test_paired_gap_is_the_mean_distance() -> None:
    gen, real = draws(2, 3, count=2)
    assert paired_gap(real, gen).item() == pytest.approx(float(np.abs(real.numpy() - gen.numpy()).mean()), rel=1e-6)
