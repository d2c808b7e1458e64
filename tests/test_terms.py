"""The terms of the loss beside DMD, in a module: GAN, DP-DMD, the levers of data forcing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_dfd import DistillationModule, VideoDataModule
from lightning_dfd.data import list_clips, write_cache, write_video
from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.diffusion.noise import NoiseSchedule
from lightning_dfd.diffusion.sampler import Rollout
from lightning_dfd.networks.blocks import blocks_of
from lightning_dfd.objectives import generator_loss
from lightning_dfd.objectives.terms import GAN as GANTerm
from lightning_dfd.objectives.terms import (
    DataForcing,
    Discriminator,
    DistributionMatching,
    FirstStep,
    Networks,
    ScoreTimeSettings,
    Step,
    StudentInput,
    TeacherView,
    Term,
    student_loss,
)
from lightning_dfd.training.facts import recipe_facts
from lightning_dfd.training.settings import (
    DataForcingSettings,
    DiversitySettings,
    DMDSettings,
    GANSettings,
    SamplingSettings,
    StudentSettings,
)
from lightning_dfd.types import Conditioning
from tests.test_module import MODES, Watch, fit, make_batches, make_module, make_trainer

GAN = GANSettings(weight=0.03)
TURNS = DMDSettings(student_update_freq=2)


def inputs(module: DistillationModule, k: int = 50) -> tuple[Tensor, Conditioning, tuple[str, ...]]:
    batch = make_batches(module, 1, k)[0]
    assert batch.latents is not None
    assert batch.cond is not None
    return batch.latents, batch.cond, batch.prompts


def ready(folder: Path, root: Path, steps: int = 2, **options: Any) -> DistillationModule:
    """A module that has trained a little."""
    module = make_module(folder, **({"dmd": TURNS} | options))
    fit(module, root, steps)
    return module


def discriminator(module: DistillationModule) -> Discriminator:
    found = module.term_modules["discriminator"]
    assert isinstance(found, Discriminator)
    return found


def loss_and_logs(module: DistillationModule, role: Any, *given: Any) -> tuple[Tensor, dict[str, float]]:
    """A role's loss of the next batch of the run, and what its terms log."""
    step = module.begin_step(*given)
    loss = module.loss(role, step)
    return loss, {name: float(value) for name, value in step.logs.items()}


def first_step_loss(module: DistillationModule, z: Tensor, cond: Conditioning) -> float:
    (term,) = (term for term in module.terms if isinstance(term, FirstStep))
    draws = Draws.of(0, 0, 0, 0, module.device)
    return term.loss_from(module.begin_step(z, cond, draws=draws), z, module.sampling.steps).item()


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        latest = pl_module.journal.latest
        self.seen.append((float(latest["train/fake_loss"]), float(latest.get("train/student_loss", 0.0))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cogvideox", (0.446539, 0.0426926)), ("wan", (0.679072, 0.0334706))],
)
def test_the_default_recipe_gives_the_losses_it_always_gave(
    tiny: dict[str, Path], tmp_path: Path, name: str, expected: tuple[float, float]
) -> None:
    """Recorded before there was any term beside DMD, in the last of 8 iterations."""
    losses = Losses()
    fit(make_module(tiny[name], dmd=TURNS), tmp_path, 8, losses)
    assert losses.seen[-1] == pytest.approx(expected, rel=1e-3)


# ---- GAN ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gan_trains_the_student_and_leaves_the_teacher(
    tiny: dict[str, Path], family: str, tmp_path: Path, mode: Any, checkpointing: bool
) -> None:
    """The gradient of the generator's loss, against the autograd of a network that nothing switches."""
    student = StudentSettings(mode=mode, rank=4, gradient_checkpointing=checkpointing)
    module = make_module(tiny[family], student=student, gan=GAN, dmd=TURNS)
    module.configure_model()
    real, cond, _ = inputs(module)
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    with torch.no_grad():
        before = module.x0("teacher", Rollout(real), t, cond).latents
    fit(module, tmp_path, 2)  # a turn of each
    with torch.no_grad():
        assert torch.equal(module.x0("teacher", Rollout(real), t, cond).latents, before)

    gen = module.begin_step(real, cond).gen
    gen.retain_grad()
    judge = discriminator(module)
    clean_t = module.schedule.add_noise(gen, torch.zeros_like(gen), t)
    generator_loss(judge.judge(module.teacher_features(clean_t, t, cond, judge.blocks))).backward()
    assert gen.grad is not None
    own = {id(parameter) for parameter in module.network.parameters_of("student")}
    assert all(p.grad is not None for p in module.network.parameters_of("student"))
    assert any(p.grad is not None and p.grad.any() for p in module.network.parameters_of("student"))
    assert all(p.grad is None for p in module.parameters() if id(p) not in own)

    untouched = module.backbone.load_transformer()  # a teacher of its own, without adapters or checkpoints
    seen: list[Any] = []
    blocks_of(untouched)[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    again = gen.detach().requires_grad_()
    x_t = module.schedule.add_noise(again, torch.zeros_like(gen), t)
    module.backbone.call(untouched, x_t, module.schedule.timestep(t), cond)
    tokens = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    torch.nn.functional.softplus(-judge([tokens])).mean().backward()
    torch.testing.assert_close(gen.grad, again.grad, rtol=1e-4, atol=1e-8)


def test_student_loss_is_the_sum_of_its_terms(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Each term draws after those before it, so switching one on changes no other."""
    student, steps = StudentSettings(rank=4, input="rollout"), SamplingSettings(steps=[0.999, 0.5])
    options: dict[str, Any] = {"student": student, "sampling": steps}
    weights = {"gan": 0.3, "diversity": 0.7}
    module = ready(
        tiny["wan"], tmp_path, gan=GANSettings(weight=0.3), diversity=DiversitySettings(weight=0.7), **options
    )
    total, parts = loss_and_logs(module, "student", *inputs(module))
    expected = parts["train/student_loss"]
    expected += weights["gan"] * parts["train/gan_generator_loss"]
    expected += weights["diversity"] * parts["train/diversity_loss"]
    assert total.item() == pytest.approx(expected, rel=1e-6)
    module.terms = tuple(term for term in module.terms if not isinstance(term, GANTerm))
    _, without = loss_and_logs(module, "student", *inputs(module))
    assert without["train/student_loss"] == parts["train/student_loss"]


def test_discriminator_learns_in_the_fake_scores_turns(tiny: dict[str, Path], tmp_path: Path) -> None:
    class Heads(Watch):
        def snapshot(self, module: DistillationModule, role: Any) -> list[Tensor]:
            source = discriminator(module).parameters() if role == "fake" else module.network.parameters_of(role)
            return [p.detach().clone() for p in source]

    watch = Heads()
    module = make_module(tiny["wan"], gan=GAN, dmd=DMDSettings(student_update_freq=3))
    trainer = fit(module, tmp_path, 4, watch)
    assert trainer.global_step == 4
    assert watch.moved == [(1, "fake"), (2, "fake"), (3, "student"), (4, "fake")]
    logged = trainer.callback_metrics
    for name in ("gan_generator_loss", "gan_discriminator_loss"):
        assert torch.isfinite(logged[f"train/{name}"]), name
    for part in ("student", "fake", "discriminator"):  # the student's is of iteration 3
        assert logged[f"train/{part}_grad_norm"] > 0


def test_the_gan_changes_nothing_in_the_fake_score(tiny: dict[str, Path], tmp_path: Path) -> None:
    """They share an optimizer and an iteration, but neither weights nor clipping."""
    options = {"gradient_clip": 1e-3, "fake_optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    without, with_gan = (make_module(tiny["wan"], gan=gan, **options) for gan in (GANSettings(), GAN))
    with_gan.configure_model()
    before = [p.detach().clone() for p in discriminator(with_gan).parameters()]
    for module in (without, with_gan):
        fit(module, tmp_path, 1)
    pairs = zip(without.network.parameters_of("fake"), with_gan.network.parameters_of("fake"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    moved = [(a.detach() - b).norm() for a, b in zip(discriminator(with_gan).parameters(), before, strict=True)]
    assert float(torch.stack(moved).norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("same", [True, False])
def test_real_and_made_share_time_and_noise(tiny: dict[str, Path], tmp_path: Path, same: bool) -> None:
    module = ready(tiny["wan"], tmp_path, gan=GANSettings(weight=0.03, same_noise=same, r1_weight=2.0, r1_sigma=0.5))
    real, cond, _ = inputs(module)
    seen: list[tuple[Tensor, Tensor]] = []
    features = module.teacher_features
    module.teacher_features = lambda x_t, t, *rest: seen.append((x_t, t)) or features(x_t, t, *rest)  # type: ignore
    loss_and_logs(module, "fake", real, cond)
    (made, t), (noised, real_t), (near, near_t) = seen
    assert torch.equal(t, real_t) == same
    assert torch.equal(real_t, near_t)
    gen = module.begin_step(real, cond).gen
    eps = [
        ((x - (1 - time.float().view(-1, 1, 1, 1, 1)) * clean) / time.float().view(-1, 1, 1, 1, 1)).detach()
        for x, time, clean in ((made, t, gen), (noised, real_t, real))
    ]
    assert torch.allclose(*eps, atol=1e-3) == same
    moved = (near - noised) / (1 - near_t.float().view(-1, 1, 1, 1, 1))
    assert moved.std().item() == pytest.approx(0.5, rel=0.1)


def test_r1_is_part_of_the_discriminators_loss(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = ready(tiny["wan"], tmp_path, gan=GANSettings(weight=0.03, r1_weight=100.0))
    real, cond, _ = inputs(module)
    with_r1, logs = loss_and_logs(module, "fake", real, cond)
    assert with_r1 > logs["train/fake_loss"] + logs["train/gan_discriminator_loss"]
    with torch.no_grad():  # a head that answers alike to everything
        for parameter in discriminator(module).parameters():
            parameter.zero_()
    constant, logs = loss_and_logs(module, "fake", real, cond)
    assert constant.item() == pytest.approx(logs["train/fake_loss"] + 2 * 0.693147, rel=1e-5)


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_resume_with_a_gan_equals_the_uninterrupted_run(tiny: dict[str, Path], tmp_path: Path, mode: Any) -> None:
    def module() -> DistillationModule:
        return make_module(
            tiny["wan"],
            student=StudentSettings(mode=mode, rank=4),
            gan=GANSettings(weight=0.1, r1_weight=10.0, same_noise=False, lr=3e-4),
            dmd=TURNS,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1)),
        )

    whole, first, second = module(), module(), module()
    fit(whole, tmp_path, 8)
    fit(first, tmp_path, 5).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, tmp_path, 8, ckpt_path=str(tmp_path / "half.ckpt"), start=5)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(
        discriminator(whole).heads[0].logit.weight, discriminator(module_at_start(tiny["wan"])).heads[0].logit.weight
    )


def module_at_start(folder: Path) -> DistillationModule:
    module = make_module(folder, gan=GAN)
    module.configure_model()
    return module


def test_rates_of_two_groups_are_the_recipes_on_resume(tiny: dict[str, Path], tmp_path: Path) -> None:
    def module(fake: float, head: float | None) -> DistillationModule:
        return make_module(
            tiny["wan"], gan=GANSettings(weight=0.1, lr=head), fake_optimizer=lambda p: torch.optim.AdamW(p, lr=fake)
        )

    fit(module(1e-5, None), tmp_path, 2).save_checkpoint(tmp_path / "x.ckpt")
    resumed = module(2e-5, 3e-4)
    fit(resumed, tmp_path, 4, ckpt_path=str(tmp_path / "x.ckpt"), start=2)
    _, optimizer = resumed.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-5, 3e-4])


def test_checkpoints_hold_the_head_only_with_a_gan(tiny: dict[str, Path], tmp_path: Path) -> None:
    for name, gan in (("on", GANSettings(weight=0.1)), ("off", GANSettings())):
        fit(make_module(tiny["wan"], gan=gan), tmp_path, 2).save_checkpoint(tmp_path / f"{name}.ckpt")
        state = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert len([key for key in state if key.startswith("term_modules.discriminator.")]) == (
            4 if name == "on" else 0
        )
    other = make_module(tiny["wan"], gan=GAN)
    with pytest.raises(ValueError, match=r"checkpoint is of another recipe|does not fit this model"):
        fit(other, tmp_path, 3, ckpt_path=str(tmp_path / "off.ckpt"), start=2)


@pytest.mark.slow(seconds=1)
def test_a_start_with_or_without_a_head(tiny: dict[str, Path], tmp_path: Path) -> None:
    source = make_module(tiny["wan"], gan=GAN)
    fit(source, tmp_path, 2).save_checkpoint(tmp_path / "on.ckpt")
    fit(make_module(tiny["wan"]), tmp_path, 2).save_checkpoint(tmp_path / "off.ckpt")

    def started(name: str, gan: GANSettings) -> DistillationModule:
        module = make_module(tiny["wan"], gan=gan, init_from=str(tmp_path / name), seed=5)
        module.configure_model()
        return module

    taken = discriminator(started("on.ckpt", GAN)).state_dict()
    assert all(torch.equal(taken[key], value) for key, value in discriminator(source).state_dict().items())
    assert not started("on.ckpt", GANSettings()).term_modules
    new = discriminator(started("off.ckpt", GAN)).state_dict()
    assert not torch.equal(new["heads.0.logit.weight"], taken["heads.0.logit.weight"])
    with pytest.warns(UserWarning, match="a discriminator of other shapes"):
        started("on.ckpt", GANSettings(weight=0.03, blocks=[0, 1]))


# ---- DP-DMD ---------------------------------------------------------------------------------------------------

ROLLOUT = StudentSettings(rank=4, input="rollout")
STEPS = SamplingSettings(steps=[0.999, 0.749, 0.499, 0.249])


def test_first_step_loss_is_nothing_for_the_teachers_own_map(tiny: dict[str, Path], family: str) -> None:
    """An untrained student is the teacher: without guidance one anchor step is its own first step, five are not."""
    for anchors, guidance, zero in ((1, 1.0, True), (5, 1.0, False), (1, 4.0, False)):
        module = make_module(
            tiny[family],
            student=ROLLOUT,
            sampling=STEPS,
            dmd=DMDSettings(guidance=guidance),
            diversity=DiversitySettings(weight=0.05, anchor_steps=anchors),
        )
        module.configure_model()
        real, cond, _ = inputs(module)
        loss = first_step_loss(module, torch.randn(real.shape, generator=torch.Generator().manual_seed(0)), cond)
        assert (loss < 1e-9) == zero, (anchors, guidance, loss)


def test_first_step_loss_equals_the_method_written_out(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Three Euler steps of the guided teacher, and velocities, in plain tensor code (flow)."""
    module = ready(
        tiny["wan"],
        tmp_path,
        student=ROLLOUT,
        sampling=SamplingSettings(steps=[1.0, 0.7, 0.3]),
        diversity=DiversitySettings(weight=0.05, anchor_steps=3),
    )
    real, cond, _ = inputs(module)
    z = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))

    def velocity(role: Any, x: Tensor, time: float, condition: Conditioning) -> Tensor:
        with torch.no_grad(), module.network.act_as(role) as transformer:
            at = torch.full((2,), 1000 * time)
            return transformer(x, at, condition["prompt_embeds"], return_dict=False)[0]

    negative, x = module.backbone.encode_negative([""]).expand(2), z
    for now, then in ((1.0, 0.9), (0.9, 0.8), (0.8, 0.7)):
        uncond, conditional = velocity("teacher", x, now, negative), velocity("teacher", x, now, cond)
        x = x + (then - now) * (uncond + module.dmd.guidance * (conditional - uncond))
    expected = (velocity("student", z, 1.0, cond) - (z - x) / 0.3).square().mean().item()
    assert first_step_loss(module, z, cond) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow(seconds=3)
def test_dmd_leaves_the_first_step_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The student's calls with gradient: DMD's at a later time, DP-DMD's at the first. It trains, both kinds."""
    for kind in ("ode", "sde"):
        module = make_module(
            tiny["wan"],
            student=ROLLOUT,
            sampling=SamplingSettings(steps=[1.0, 0.7, 0.3], kind=kind),  # type: ignore[arg-type]
            diversity=DiversitySettings(weight=0.05),
            dmd=TURNS,
        )
        times: list[float] = []
        plain = module.x0

        def x0(role: Any, x_t: Tensor, t: Tensor, cond: Conditioning, plain: Any = plain, times: Any = times) -> Tensor:
            if role == "student" and torch.is_grad_enabled():
                times.append(round(float(t[0]), 3))
            return plain(role, x_t, t, cond)

        module.x0 = x0  # type: ignore[method-assign]
        trainer = fit(module, tmp_path, 12)
        assert torch.isfinite(trainer.callback_metrics["train/diversity_loss"])
        assert times[1::2] == [1.0] * 6
        assert set(times[::2]) == {0.7, 0.3}


def test_where_dp_dmd_cannot_be(tiny: dict[str, Path]) -> None:
    diversity = DiversitySettings(weight=0.05)
    with pytest.raises(ValueError, match=r"model\.student\.input is data; it must be rollout with model\.diversity"):
        make_module(tiny["wan"], diversity=diversity)
    with pytest.raises(ValueError, match=r"model\.sampling\.steps is \[1\.0\]; it must be two times or more"):
        make_module(tiny["wan"], diversity=diversity, student=ROLLOUT, sampling=SamplingSettings(steps=[1.0]))


# ---- levers of data forcing -----------------------------------------------------------------------------------


def teacher_calls(module: DistillationModule) -> list[tuple[Tensor, Tensor, Any]]:
    """What `guided_teacher` is asked from now on: x_t, t, scale."""
    calls: list[tuple[Tensor, Tensor, Any]] = []
    plain = module.guided_teacher

    def guided(x_t: Tensor, t: Tensor, cond: Conditioning, scale: Any = None) -> Tensor:
        calls.append((x_t, t, scale))
        return plain(x_t, t, cond, scale)

    module.guided_teacher = guided  # type: ignore[method-assign]
    return calls


def clean(module: DistillationModule, x_t: Tensor, t: Tensor, real: Tensor, cond: Conditioning) -> list[str]:
    """What each sample of x_t is a noised version of, by the draws of this batch."""
    step = module.begin_step(real, cond)
    gen, eps = step.gen, step.eps
    kinds = []
    for b in range(len(real)):
        matches = {
            name: torch.allclose(module.schedule.add_noise(x, eps, t)[b], x_t[b], atol=1e-5)
            for name, x in (("real", real), ("gen", gen))
        }
        kinds.append("+".join(name for name, match in matches.items() if match))
    return kinds


@pytest.mark.parametrize("shown", ["real", "gen"])
def test_forcing_of_a_time_range_with_a_guidance_of_its_own(tiny: dict[str, Path], tmp_path: Path, shown: Any) -> None:
    """Batches until one has a sample on either side: each sample's teacher is what a separate call would be."""
    levers = DataForcingSettings(1.0, guidance=1.0, time_range=[0.6, 1.0], shown=shown)
    module = ready(tiny["wan"], tmp_path, data_forcing=levers)
    calls = teacher_calls(module)
    met = set()
    for seed in range(12):
        module.seed = seed
        real, cond, prompts = inputs(module, 60 + seed)
        loss_and_logs(module, "student", real, cond, prompts)
        x_t, t, scale = calls[-1]
        inside = (t >= 0.6).tolist()
        assert scale.tolist() == [1.0 if one else 5.0 for one in inside]
        assert clean(module, x_t, t, real, cond) == [shown if one else "gen" for one in inside]
        met |= set(inside)
        together = module.guided_teacher(x_t, t, cond, scale)
        for b in range(2):
            alone = Conditioning({name: value[b : b + 1] for name, value in cond.tensors.items()})
            apart = module.guided_teacher(x_t[b : b + 1], t[b : b + 1], alone, float(scale[b]))
            torch.testing.assert_close(together[b : b + 1], apart, rtol=1e-4, atol=1e-5)
    assert met == {True, False}


def test_guidance_of_one_saves_the_unconditional_call(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = ready(tiny["wan"], tmp_path)
    real, cond, _ = inputs(module)
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    sizes: list[int] = []
    plain = module.x0
    module.x0 = lambda role, x, t, cond: sizes.append(len(x.latents)) or plain(role, x, t, cond)  # type: ignore
    for scale in (1.0, torch.ones(2), torch.tensor([1.0, 5.0]), None):
        module.guided_teacher(real, t, cond, scale)
    assert sizes == [2, 2, 4, 4]


@pytest.fixture
def clips(tiny: dict[str, Path], tmp_path: Path) -> VideoDataModule:
    """A cache of the tiny Wan: five clips of one caption, one of another."""
    folder, cache = tmp_path / "clips", tmp_path / "cache"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for k in range(6):
        frames = torch.randint(256, (9, 4, 4, 3), generator=generator, dtype=torch.uint8)
        write_video(folder / f"{k}.mp4", frames.repeat_interleave(8, 1).repeat_interleave(8, 2), 8.0)
        (folder / f"{k}.txt").write_text("a dog" if k == 5 else "a cat")
    data = VideoDataModule(str(folder), str(cache), 9, 32, 32, batch_size=2)
    backbone = make_module(tiny["wan"]).backbone
    write_cache(backbone, list_clips(folder).clips, cache, data.size, None)
    data.setup()
    return data


def test_latents_of_a_caption(clips: VideoDataModule) -> None:
    generator = torch.Generator().manual_seed(0)
    cats, dogs = (clips.same_caption_latents(prompt, 16, generator) for prompt in ("a cat", "a dog"))
    assert (len(cats), len(dogs)) == (5, 1)
    assert len({float(latents.sum()) for latents in cats}) == 5
    one, again = (clips.same_caption_latents("a cat", 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert len(one) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert clips.same_caption_latents("a horse", 3, generator) == []
    assert clips.summary == "6 clips of clips"
    with pytest.raises(ValueError, match="no cache to take latents from"):
        VideoDataModule(clips.folder, frames=9, height=32, width=32).same_caption_latents("a cat", 3, generator)


def test_pairs_are_the_nearest_clips_of_the_caption(
    tiny: dict[str, Path], tmp_path: Path, clips: VideoDataModule
) -> None:
    module = make_module(tiny["wan"], data_forcing=DataForcingSettings(1.0, nearest_of=16), dmd=TURNS)
    trainer = make_trainer(tmp_path, 2)
    trainer.fit(module, datamodule=clips)
    assert torch.isfinite(trainer.callback_metrics["train/paired_gap"])
    cats = clips.same_caption_latents("a cat", 16, torch.Generator())
    (dog,) = clips.same_caption_latents("a dog", 16, torch.Generator())
    step = module.begin_step(torch.stack([cats[0], dog]), Conditioning({}), ("a cat", "a dog"))
    step.gen = torch.stack([cats[3] + 0.01, cats[3]])
    (term,) = (term for term in module.terms if isinstance(term, DataForcing))
    paired = term.view(step, TeacherView(step.gen, 1.0, step.real)).real
    assert torch.equal(paired[0], cats[3])
    assert torch.equal(paired[1], dog)  # whatever is near, it has to be of the caption


@pytest.mark.slow(seconds=2)
def test_candidates_are_a_function_of_the_iteration(
    tiny: dict[str, Path], tmp_path: Path, clips: VideoDataModule
) -> None:
    """So that a resumed run pairs as the uninterrupted one: two of five clips are looked at."""

    def module() -> DistillationModule:
        return make_module(tiny["wan"], data_forcing=DataForcingSettings(1.0, nearest_of=2), dmd=TURNS)

    whole, first, second = module(), module(), module()
    make_trainer(tmp_path, 6).fit(whole, datamodule=clips)
    trainer = make_trainer(tmp_path, 3)
    trainer.fit(first, datamodule=clips)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(tmp_path, 6).fit(second, datamodule=clips, ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nearest_needs_a_cache(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = make_module(tiny["wan"], data_forcing=DataForcingSettings(0.5, nearest_of=16))
    with pytest.raises(ValueError, match=r"nearest_of is 16.*run lightning cache and set data\.cache"):
        fit(module, tmp_path, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataForcingSettings(guidance=0.5), r"data_forcing\.guidance is 0\.5; it must be at least 1, or null"),
        (lambda: DataForcingSettings(time_range=[0.9, 0.1]), r"data_forcing\.time_range is \[0\.9, 0\.1\]"),
        (lambda: DataForcingSettings(time_range=[0.9]), r"data_forcing\.time_range is \[0\.9\]"),
        (lambda: DataForcingSettings(nearest_of=0), r"data_forcing\.nearest_of is 0"),
        (lambda: DataForcingSettings(nearest_of=4, shown="gen"), r"nearest_of is 4; it must be 1 with shown: gen"),
        (lambda: GANSettings(weight=-1), r"model\.gan\.weight is -1"),
        (lambda: GANSettings(r1_weight=-1), r"model\.gan\.r1_weight is -1"),
        (lambda: GANSettings(r1_sigma=0), r"model\.gan\.r1_sigma is 0"),
        (lambda: GANSettings(lr=0), r"model\.gan\.lr is 0"),
        (lambda: DiversitySettings(weight=-1), r"model\.diversity\.weight is -1"),
        (lambda: DiversitySettings(anchor_steps=0), r"model\.diversity\.anchor_steps is 0"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_latest_can_be_read_and_not_written(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = ready(tiny["wan"], tmp_path)
    assert float(module.journal.latest["train/student_loss"]) >= 0
    with pytest.raises(TypeError):
        module.journal.latest["train/student_loss"] = 0.0  # type: ignore[index]


# ---- terms of a user, and what they must not be able to break ---------------------------------------------------


class Critical(Term):
    """The student's loss runs through its module, which its own loss leaves where it is."""

    def __init__(self, fact: Any = 1.0) -> None:
        self.fact = fact

    def build(self, features: Any) -> dict[str, nn.Module]:
        head = nn.Linear(1, 1, bias=False)
        nn.init.constant_(head.weight, 0.5)
        return {"critical": head}

    def student_loss(self, step: Step) -> Tensor:
        step.log("a_number", 0.5)
        return 100 * step.networks.trained["critical"](step.gen.mean().view(1, 1)).sum()

    def fake_loss(self, step: Step) -> Tensor:
        (weight,) = step.networks.trained["critical"].parameters()
        return 0 * weight.sum()

    def facts(self) -> dict[str, Any]:
        return {"fact": self.fact, "model.seed": "mine"}


def test_the_students_loss_does_not_train_what_terms_train(tiny: dict[str, Path], tmp_path: Path) -> None:
    rate = partial(torch.optim.SGD, lr=0.01)
    module = ready(tiny["wan"], tmp_path, 4, terms=[Critical()], fake_optimizer=rate)
    (weight,) = module.term_modules["critical"].parameters()
    assert weight.item() == 0.5
    assert float(module.journal.latest["train/a_number"]) == 0.5


def facts_with(module: DistillationModule, *terms: Term) -> dict[str, Any]:
    facts = recipe_facts(module.backbone, module.student, module.sampling, terms, 3, {}, None)
    return facts["fixed"]


def test_facts_of_terms_can_be_read_from_a_checkpoint_and_do_not_collide(tiny: dict[str, Path]) -> None:
    module = make_module(tiny["wan"])
    fixed = facts_with(module, Critical(np.float64(0.1)), Critical(0.5))
    assert (fixed["fact"], fixed["fact (2)"]) == (0.1, 0.5)
    assert type(fixed["fact"]) is float
    assert (fixed["model.seed"], fixed["model.seed (2)"]) == (3, "mine")
    with pytest.raises(ValueError, match=r"facts\(\) of Critical gives fact as a PosixPath; give text, numbers"):
        facts_with(module, Critical(Path("a")))


def test_a_step_and_a_loss_of_other_terms_are_refused() -> None:
    plain = lambda x_t, t, cond: 0.9 * x_t  # noqa: E731
    networks = Networks(NoiseSchedule("flow"), plain, plain, lambda x_t, t, cond, guidance: 0.8 * x_t)
    terms = [DistributionMatching(), DataForcing(DataForcingSettings(1.0))]

    def loss(*given: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        real, draws = torch.randn(4, 3, generator=generator), Draws.of(0, 0, 0, 0, torch.device("cpu"))
        return float(student_loss(terms, Step(networks, real, None, draws, *given)))

    asked = (StudentInput(), ScoreTimeSettings())
    assert loss() == loss(*asked, terms)
    with pytest.raises(ValueError, match="given different terms; give both the same"):
        loss(*asked, terms[:1])


def test_a_network_refuses_times_per_frame(tiny: dict[str, Path]) -> None:
    module = make_module(tiny["wan"])
    latents, cond, _ = inputs(module)
    with pytest.raises(ValueError, match=r"WanBackbone takes one time per clip, \[B\]; got times \[2, 3\]"):
        module.backbone.x0(None, latents, torch.full((2, 3), 0.5), cond)
