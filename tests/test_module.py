"""The LightningModule: what a step does, what a checkpoint holds, what a resumed run does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_dfd import DistillationModule, DistillationTrainer
from lightning_dfd.diffusion.sampler import Rollout
from lightning_dfd.objectives import guide
from lightning_dfd.testing.tiny import TEXT_LENGTH
from lightning_dfd.training.settings import DataForcingSettings, DMDSettings, SamplingSettings, StudentSettings
from lightning_dfd.types import Batch, Conditioning, VideoSize
from tests.conftest import random_conditioning

SIZE = VideoSize(9, 32, 32)
MODES = ["lora", pytest.param("full", marks=pytest.mark.slow(seconds=1))]


def make_module(folder: Path, **options: Any) -> DistillationModule:
    defaults = {"student": StudentSettings(rank=4), "max_sequence_length": TEXT_LENGTH}
    return DistillationModule(str(folder), **(defaults | options))


def make_batches(module: DistillationModule, count: int, start: int = 0) -> list[Batch]:
    shape = module.backbone.latent_shape(SIZE)
    batches = []
    for k in range(start, start + count):
        generator = torch.Generator().manual_seed(k)
        latents = torch.randn(2, *shape, generator=generator)
        cond = random_conditioning(module.backbone, 2, generator)
        batches.append(Batch(("a cat", "a dog"), latents=latents, cond=cond))
    return batches


class Endless(IterableDataset[Batch]):
    """The batches from number `start` on, without end, as VideoDataModule gives them."""

    def __init__(self, module: DistillationModule, start: int) -> None:
        self.module, self.start = module, start

    def __iter__(self) -> Iterator[Batch]:
        for k in itertools.count(self.start):
            yield make_batches(self.module, 1, k)[0]


def make_trainer(root: Path, steps: int, *callbacks: Callback, **options: Any) -> DistillationTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return DistillationTrainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=str(root),
        callbacks=list(callbacks),
        **(quiet | {"enable_checkpointing": False} | options),
    )


def fit(module: DistillationModule, root: Path, steps: int, *callbacks: Callback, **options: Any) -> Any:
    ckpt_path = options.pop("ckpt_path", None)
    start = options.pop("start", 0)
    trainer = make_trainer(root, steps, *callbacks, **options)
    stream = Endless(module, start * module.accumulate)
    trainer.fit(module, DataLoader(stream, batch_size=None), ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Watch(Callback):
    """Which role's weights moved in which iteration."""

    def __init__(self) -> None:
        self.moved: list[tuple[int, str]] = []
        self.before: dict[str, list[Tensor]] = {}

    def snapshot(self, module: DistillationModule, role: Any) -> list[Tensor]:
        return [p.detach().clone() for p in module.network.parameters_of(role)]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = {role: self.snapshot(pl_module, role) for role in ("student", "fake")}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for role, before in self.before.items():
            if any(not torch.equal(a, b) for a, b in zip(before, self.snapshot(pl_module, role), strict=True)):
                self.moved.append((trainer.global_step, role))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("student_input", ["data", "rollout"])
def test_one_counted_step_an_iteration_and_turns(
    tiny: dict[str, Path], family: str, tmp_path: Path, mode: Any, student_input: Any
) -> None:
    settings = StudentSettings(mode=mode, rank=4, input=student_input, ema_decay=0.9)
    module = make_module(tiny[family], student=settings, dmd=DMDSettings(student_update_freq=3))
    watch = Watch()
    trainer = fit(module, tmp_path, 4, watch)
    assert trainer.global_step == 4
    assert watch.moved == [(1, "fake"), (2, "fake"), (3, "student"), (4, "fake")]


def test_accumulation_steps_once_in_so_many_batches(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = make_module(tiny["wan"], accumulate=3, dmd=DMDSettings(student_update_freq=2))
    watch = Watch()
    trainer = fit(module, tmp_path, 4, watch)
    assert trainer.global_step == 4
    assert watch.moved == [(1, "fake"), (2, "student"), (3, "fake"), (4, "student")]
    assert module.journal.counts["student_steps"] == 2


def test_teacher_is_bit_equal_before_and_after_training(tiny: dict[str, Path], family: str, tmp_path: Path) -> None:
    module = make_module(tiny[family], data_forcing=DataForcingSettings(0.5))
    module.configure_model()
    batch = make_batches(module, 1)[0]
    assert batch.latents is not None
    assert batch.cond is not None
    t = torch.tensor([0.9, 0.3], dtype=torch.float64)
    with torch.no_grad():
        before = module.x0("teacher", Rollout(batch.latents), t, batch.cond).latents
        fit(module, tmp_path, 5)
        assert torch.equal(module.x0("teacher", Rollout(batch.latents), t, batch.cond).latents, before)
        assert not torch.equal(module.x0("student", Rollout(batch.latents), t, batch.cond).latents, before)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_student_loss_equals_the_method_written_out(tiny: dict[str, Path], tmp_path: Path, probability: float) -> None:
    """One student step in `data` mode, recomputed from METHOD with plain tensor code on the same draws (flow)."""
    module = make_module(tiny["wan"], data_forcing=DataForcingSettings(probability))
    fit(module, tmp_path, 5)  # moves student and fake score off the teacher
    batch = make_batches(module, 1, start=50)[0]
    assert batch.latents is not None
    assert batch.cond is not None
    real, cond = batch.latents, batch.cond
    loss = module.loss("student", module.begin_step(real, cond, batch.prompts))

    draws = module.begin_step(real, cond).draws.own
    pick = torch.randint(4, (2,), generator=draws)
    eps_in = torch.randn(real.shape, generator=draws)
    t_in = torch.tensor(module.sampling.steps, dtype=torch.float64)[pick]
    u = torch.rand(2, generator=draws, dtype=torch.float64)
    eps = torch.randn(real.shape, generator=draws)
    t = 0.001 + 0.998 * u

    def noised(x: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        s = time.float().view(-1, 1, 1, 1, 1)
        return (1 - s) * x + s * noise

    def net(role: Any, x: Tensor, time: Tensor, condition: Conditioning) -> Tensor:
        with module.network.act_as(role) as transformer:
            out = transformer(x, (1000 * time).float(), condition["prompt_embeds"], return_dict=False)[0]
        return x - time.float().view(-1, 1, 1, 1, 1) * out

    with torch.no_grad():
        gen = net("student", noised(real, eps_in, t_in), t_in, cond)
        fake = net("fake", noised(gen, eps, t), t, cond)
        shown = noised(real if probability else gen, eps, t)
        negative = module.backbone.encode_negative([""]).expand(2)
        teacher = guide(net("teacher", shown, t, negative), net("teacher", shown, t, cond), module.dmd.guidance)
        weight = 1 / ((gen - teacher).abs().flatten(1).mean(1) + 1e-6)
        expected = 0.5 * ((fake - teacher) * weight.view(-1, 1, 1, 1, 1)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_rollout_input_is_the_students_own_sampling(tiny: dict[str, Path], tmp_path: Path) -> None:
    """With one step there is nothing to roll: the input is pure noise, whatever the data."""
    settings = StudentSettings(rank=4, input="rollout")
    module = make_module(tiny["wan"], student=settings, sampling=SamplingSettings(steps=[1.0]))
    fit(module, tmp_path, 1)
    batch = make_batches(module, 1)[0]
    assert batch.latents is not None
    assert batch.cond is not None
    outputs = []
    for scale in (1.0, 100.0):
        outputs.append(module.begin_step(batch.latents * scale, batch.cond).gen)
    assert torch.equal(*outputs)


def test_checkpoint_holds_what_is_trained_and_nothing_of_the_teacher(
    tiny: dict[str, Path], family: str, tmp_path: Path
) -> None:
    for mode in ("lora", "full"):
        module = make_module(tiny[family], student=StudentSettings(mode=mode, rank=4, ema_decay=0.9))  # type: ignore[arg-type]
        fit(module, tmp_path, 1).save_checkpoint(tmp_path / "x.ckpt")
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        total = sum(len(module.network.parameters_of(role)) for role in module.network.held)
        assert len(state) == total
        assert not any("teacher" in name or "base_layer" in name for name in state)


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_equals_the_uninterrupted_one(tiny: dict[str, Path], tmp_path: Path, mode: Any) -> None:
    def module() -> DistillationModule:
        settings = StudentSettings(mode=mode, rank=4, ema_decay=0.9)
        return make_module(
            tiny["wan"],
            student=settings,
            data_forcing=DataForcingSettings(0.5),
            dmd=DMDSettings(student_update_freq=2),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1)),
        )

    whole = module()
    fit(whole, tmp_path, 5)
    first = module()
    fit(first, tmp_path, 3).save_checkpoint(tmp_path / "half.ckpt")
    second = module()
    trainer = fit(second, tmp_path, 5, ckpt_path=str(tmp_path / "half.ckpt"), start=3)
    assert trainer.global_step == 5
    assert second.journal.counts == whole.journal.counts
    for role in whole.network.held:
        for a, b in zip(whole.network.parameters_of(role), second.network.parameters_of(role), strict=True):
            assert torch.equal(a, b)


def test_new_settings_win_on_resume(tiny: dict[str, Path], tmp_path: Path) -> None:
    def module(lr: float) -> DistillationModule:
        return make_module(tiny["wan"], student_optimizer=lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=lr))

    fit(module(1e-5), tmp_path, 2).save_checkpoint(tmp_path / "x.ckpt")
    resumed = module(3e-4)
    fit(resumed, tmp_path, 4, ckpt_path=str(tmp_path / "x.ckpt"), start=2)
    student, fake = resumed.optimizers(use_pl_optimizer=False)  # type: ignore[misc]
    assert student.param_groups[0]["lr"] == pytest.approx(3e-4)
    assert student.param_groups[0]["weight_decay"] == pytest.approx(3e-4)
    assert fake.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_data_forcing_starts_from_another_run(tiny: dict[str, Path], tmp_path: Path) -> None:
    first = make_module(tiny["cogvideox"])
    fit(first, tmp_path, 6).save_checkpoint(tmp_path / "dmd2.ckpt")
    second = make_module(
        tiny["cogvideox"], init_from=str(tmp_path / "dmd2.ckpt"), student=StudentSettings(rank=4, ema_decay=0.9)
    )
    second.configure_model()
    for role, source in (("student", "student"), ("fake", "fake"), ("ema", "student")):
        pairs = zip(second.network.parameters_of(role), first.network.parameters_of(source), strict=True)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(FileNotFoundError, match="run the dmd2 recipe first"):
        make_module(tiny["cogvideox"], init_from="nowhere.ckpt").configure_model()


def test_checkpoint_of_another_student_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    fit(make_module(tiny["wan"]), tmp_path, 1).save_checkpoint(tmp_path / "x.ckpt")
    other = make_module(tiny["wan"], student=StudentSettings(mode="full"))
    with pytest.raises(ValueError, match=r"student\.mode"):
        fit(other, tmp_path, 2, ckpt_path=str(tmp_path / "x.ckpt"), start=1)


def test_everything_is_logged(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = make_module(tiny["wan"], data_forcing=DataForcingSettings(1.0))
    trainer = fit(module, tmp_path, 6)
    logged = trainer.callback_metrics
    names = ["student_loss", "fake_loss", "dmd_gradient_norm", "paired_gap", "forced_share", "samples_per_s"]
    for name in [*names, "student_grad_norm", "fake_grad_norm"]:
        assert torch.isfinite(logged[f"train/{name}"]), name
    assert logged["train/forced_share"] == 1.0


def test_gradients_are_clipped(tiny: dict[str, Path], tmp_path: Path) -> None:
    """With plain SGD at rate 1 a role moves by exactly its clipped gradient."""
    module = make_module(tiny["wan"], gradient_clip=1e-4, fake_optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    module.configure_model()
    before = [p.detach().clone() for p in module.network.parameters_of("fake")]
    fit(module, tmp_path, 1)
    moved = [(a - b).norm() for a, b in zip(module.network.parameters_of("fake"), before, strict=True)]
    assert float(torch.stack(moved).norm()) == pytest.approx(1e-4, rel=1e-2)


def test_validation_compares_student_and_teacher(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = make_module(tiny["wan"])
    trainer = make_trainer(tmp_path, 1)
    results = trainer.validate(module, DataLoader(make_batches(module, 2), batch_size=None), verbose=False)  # type: ignore[arg-type]
    assert results[0]["val/student_x0_error"] == pytest.approx(results[0]["val/teacher_x0_error"])


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"model\.sampling\.steps is \[0\.1, 0\.5\]; it must be a falling list"):
        SamplingSettings(steps=[0.1, 0.5])
    with pytest.raises(ValueError, match=r"model\.data_forcing\.probability is 2"):
        DataForcingSettings(2)
    with pytest.raises(ValueError, match=r"student_update_freq is 1; it must be at least 2"):
        DMDSettings(student_update_freq=1)
