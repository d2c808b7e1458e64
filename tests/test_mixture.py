"""The exact world: its teacher is exact, its measures are what they say, and terms learn in it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dfd.toy.mixture import study
from lightning_dfd.toy.mixture.arms import BASE, CONTINUED, TRUTH, all_arms, dmd, falling
from lightning_dfd.toy.mixture.report import Results, errors_apart, given_back, read_results, write_report
from lightning_dfd.toy.mixture.training import (
    FIFTY_STEPS,
    FOUR_STEPS,
    Clips,
    Method,
    Network,
    Pair,
    draw_samples,
    fit_teacher,
    judge,
    train,
)
from lightning_dfd.toy.mixture.world import CAPTIONS, DIMENSIONS, MODES, SCHEDULE, UNCONDITIONAL, World, measure

WORLD = World()
TINY = study.Scale(seeds=(10, 11), shorter=50, fit=20, samples=200)


def captioned(count: int) -> Tensor:
    return torch.arange(count) % CAPTIONS


def draws(count: int, wrong: float = 0.0) -> tuple[Tensor, Tensor]:
    captions = captioned(count)
    return WORLD.draw(captions, torch.Generator().manual_seed(1), wrong), captions


# ---- the teacher ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caption", [0, 3, UNCONDITIONAL])
@pytest.mark.parametrize("time", [0.05, 0.5, 0.95])
def test_the_posterior_mean_is_tweedies(caption: int, time: float) -> None:
    """alpha E[x0 | x_t] = x_t + sigma^2 d/dx_t log p(x_t), of a density that torch's own mixture gives."""
    t = torch.full((16,), time, dtype=torch.float64)
    clean, _ = draws(16)
    x_t = SCHEDULE.add_noise(clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(2)), t)
    x_t = x_t.double().requires_grad_()
    variance = ((1 - time) * WORLD.spread) ** 2 + time**2
    components = torch.distributions.Independent(
        torch.distributions.Normal((1 - time) * WORLD.centres.double(), variance**0.5), 1
    )
    weights = torch.distributions.Categorical(logits=WORLD.log_weights[caption].double())
    density = torch.distributions.MixtureSameFamily(weights, components).log_prob(x_t).sum()
    (score,) = torch.autograd.grad(density, x_t)
    expected = (x_t + time**2 * score) / (1 - time)
    found = WORLD.posterior_mean(x_t.detach().float(), t, torch.full((16,), caption))
    torch.testing.assert_close(found.double(), expected.detach(), atol=2e-4, rtol=1e-3)


def test_guidance_extrapolates_and_1_is_the_posterior_mean() -> None:
    x_t, captions = torch.randn(8, DIMENSIONS), captioned(8)
    t = torch.full((8,), 0.7, dtype=torch.float64)
    conditional = WORLD.teacher(x_t, t, captions, 1.0)
    assert torch.equal(conditional, WORLD.posterior_mean(x_t, t, captions))
    nothing = WORLD.posterior_mean(x_t, t, torch.full((8,), UNCONDITIONAL))
    mixed = WORLD.teacher(x_t, t, captions, torch.tensor([1.0, 4.0] * 4))
    torch.testing.assert_close(mixed[::2], conditional[::2])
    torch.testing.assert_close(mixed[1::2], (nothing + 4 * (conditional - nothing))[1::2])


def test_the_unguided_teacher_draws_what_it_knows() -> None:
    """Many steps without guidance give the shares of the noisy captions, and their obedience."""
    points, captions = draw_samples(partial(WORLD.teacher, guidance=1.0), FIFTY_STEPS, 8000, seed=0)
    known = WORLD.log_weights[:CAPTIONS].exp().view(CAPTIONS, CAPTIONS, MODES)
    nearest = torch.cdist(points, WORLD.centres).argmin(1)
    for caption in range(CAPTIONS):
        mine = nearest[captions == caption]
        shares = torch.bincount(mine % MODES, minlength=MODES) / len(mine)
        assert (shares - known[caption].sum(0)).abs().max() < 0.03
        obeyed = (mine // MODES == caption).float().mean()
        assert obeyed == pytest.approx(float(known[caption, caption].sum()), abs=0.04)


def test_guidance_costs_modes_and_colour() -> None:
    plain, guided = (judge(WORLD, partial(WORLD.teacher, guidance=s), FIFTY_STEPS, 0, 4000) for s in (1.0, 4.0))
    assert plain.obey < 0.85
    assert guided.obey > 0.97
    assert guided.modes < 0.8 * WORLD_MODES
    assert guided.norm > 1.08


# ---- measures ---------------------------------------------------------------------------------------------------

WORLD_MODES = float((1 / WORLD.shares.square().sum(1)).mean())


def test_the_world_measures_as_itself() -> None:
    found = measure(WORLD, *draws(16_000))
    assert found.obey > 0.99
    assert found.modes == pytest.approx(WORLD_MODES, rel=0.03)
    assert found.gap < 0.03
    assert found.norm == pytest.approx(1, abs=0.01)
    assert found.stray == pytest.approx(0.01, abs=0.004)
    assert found.frechet < 0.01


def test_what_is_wrong_is_measured() -> None:
    points, captions = draws(8000)
    good = measure(WORLD, points, captions)
    assert measure(WORLD, 1.3 * points, captions).norm == pytest.approx(1.3 * good.norm, rel=1e-4)
    assert measure(WORLD, points.roll(1, 0), captions).obey < 0.01
    one = WORLD.centres[captions * MODES]  # of each caption its one mode
    collapsed = measure(WORLD, one, captions)
    assert collapsed.modes == pytest.approx(1)
    assert collapsed.gap == pytest.approx(float(1 - WORLD.shares[:, 0].mean()))
    assert collapsed.stray == 0
    assert measure(WORLD, 3 * one, captions).stray == 1
    assert measure(WORLD, draws(8000, wrong=1.0)[0], captions).obey == pytest.approx(1 / CAPTIONS, abs=0.02)


def test_a_shift_is_its_square_in_frechet_distance() -> None:
    points, captions = draws(16_000)
    shifted = measure(WORLD, points + torch.tensor([0.5] + [0.0] * (DIMENSIONS - 1)), captions)
    assert shifted.frechet == pytest.approx(0.25, abs=0.03)


# ---- training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start() -> Network:
    return fit_teacher(WORLD, iterations=300, batch=256)


def test_dmd2_learns_to_obey(start: Network) -> None:
    pair = Pair(start)
    before = judge(WORLD, pair.student, FOUR_STEPS, 0, 2000)
    looks = list(train(WORLD, start, pair, Method(dmd(), lr=1e-3, fake_lr=1e-3), 0, (100, 200)))
    after = judge(WORLD, pair.student, FOUR_STEPS, 0, 2000)
    assert looks == [100, 200]
    assert after.obey > before.obey + 0.05


@pytest.mark.parametrize("inputs", ["data", "rollout", "mixed"])
def test_a_run_is_a_function_of_its_seed(start: Network, inputs: str) -> None:
    def trained(seed: int) -> dict[str, Tensor]:
        pair = Pair(start)
        list(train(WORLD, start, pair, Method(dmd(), inputs=inputs, batch=8), seed, (10,)))  # type: ignore[arg-type]
        return pair.state_dict()

    one, again, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["student.last.weight"], other["student.last.weight"])


def test_a_pair_is_kept_as_it_was(start: Network, tmp_path: Path) -> None:
    pair = Pair(start)
    pair.save(tmp_path / "pair.safetensors")
    loaded = Pair.load(tmp_path / "pair.safetensors").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in pair.state_dict().items())


@pytest.mark.parametrize("clips", [None, 12])
def test_clips_are_of_their_caption(clips: int | None) -> None:
    stream = Clips(WORLD, Method(dmd(), curated=True, clips=clips, batch=400), seed=0)
    points, captions = stream.next()
    assert measure(WORLD, points, captions).obey > 0.97
    others = stream.others(captions, 3, torch.Generator().manual_seed(0))
    assert [len(rows) for rows in others] == [3] * 400
    assert measure(WORLD, torch.stack([rows[2] for rows in others]), captions).obey > 0.97
    if clips:
        assert len({tuple(point) for point in points.tolist()}) == clips


def test_guidance_falls_and_stays() -> None:
    terms = falling(4.0, 1.0, 100)
    assert [terms(i)[1].settings.guidance for i in (0, 50, 100, 500)] == [4.0, 2.5, 1.0, 1.0]  # type: ignore[attr-defined]


# ---- the study --------------------------------------------------------------------------------------------------


def test_arms_are_compared_with_arms_that_there_are() -> None:
    arms = all_arms()
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    for arm in arms:
        assert {*arm.controls} <= {*names}
        assert arm.start is None or names.index(arm.start) < names.index(arm.name)


def test_every_arm_runs_and_the_report_shows_it(tmp_path: Path) -> None:
    arms = all_arms()
    study.run_seed([arm.name for arm in arms], 10, tmp_path, TINY)
    study.run_seed([TRUTH, BASE, CONTINUED], 11, tmp_path, TINY)
    write_report(tmp_path, arms)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"| {arm.name} | {arm.looks[-1] if arm.method else 0} |" in report for arm in arms)
    assert f"{CONTINUED}, less {BASE}" in report


def test_a_broken_off_study_goes_on(tmp_path: Path) -> None:
    study.run_seed([TRUTH], 10, tmp_path, TINY)
    kept = study.result_of(tmp_path, TRUTH, 10)
    written = kept.stat().st_mtime_ns
    for seed in TINY.seeds:
        study.run_seed([TRUTH], seed, tmp_path, TINY)
    assert kept.stat().st_mtime_ns == written
    assert len(read_results(tmp_path)[TRUTH].seeds) == 2
    assert json.loads(kept.read_text(encoding="utf-8"))["measured"]["0"]["obey"] > 0.95


def test_differences_are_counted_in_their_standard_errors() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 2.0]).numpy()
    assert errors_apart(values) == pytest.approx(2 / (values.std(ddof=1) / 2))


def test_what_is_given_back_is_counted_from_the_start_to_the_truth() -> None:
    def results(*values: float) -> Results:
        return Results((10, 11, 12)[: len(values)], {0: [{"modes": value} for value in values]}, 0.0)

    back = given_back(results(6.0, 8.0), 0, results(4.0, 4.0, 4.0), 0, "modes", 8.0)
    assert back.tolist() == [0.5, 1.0]
