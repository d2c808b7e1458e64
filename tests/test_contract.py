"""Every family keeps the contract of lightning_dfd.testing, and the contract notices when one does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

from lightning_dfd.backbones.families.cogvideox import CogVideoXBackbone
from lightning_dfd.backbones.families.hunyuan15 import HunyuanVideo15Backbone
from lightning_dfd.backbones.families.kandinsky import Kandinsky5Backbone, Kandinsky5ImageBackbone
from lightning_dfd.backbones.families.latte import LatteBackbone
from lightning_dfd.backbones.families.sana_video import SanaVideoBackbone
from lightning_dfd.backbones.families.wan import WanBackbone, WanImageBackbone, WanStagedBackbone
from lightning_dfd.backbones.loader import Loader
from lightning_dfd.diffusion.noise import shift_time
from lightning_dfd.diffusion.solvers import Level, SolverStep
from lightning_dfd.testing import CHECKS, Case, check_backbone, run_check
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.types import Conditioning, SampleKind, VideoSize


class Cases(dict[str, Case]):
    """Of the tiny pipelines, by name, each when it is first asked for."""

    def __init__(self, tiny: dict[str, Path]) -> None:
        super().__init__()
        self.tiny = tiny

    def __missing__(self, name: str) -> Case:
        self[name] = Case.of(self.tiny[name], TINY[name])
        return self[name]


@pytest.fixture(scope="session")
def cases(tiny: dict[str, Path]) -> dict[str, Case]:
    return Cases(tiny)


LONG = {"held_out": 3, "train_full": 2, "export_lora": 1, "export_full": 1, "half_precision": 1}  # seconds


@pytest.mark.parametrize(
    "check",
    [pytest.param(name, marks=pytest.mark.slow(seconds=LONG[name]) if name in LONG else ()) for name in CHECKS],
)
@pytest.mark.parametrize("family", TINY)
def test_contract(cases: dict[str, Case], family: str, check: str, tmp_path: Path) -> None:
    run_check(check, cases[family], tmp_path)


# ---- backbones with one mistake each ------------------------------------------------------------------------


class WrongStatistics(WanBackbone):
    def statistics(self) -> tuple[Tensor, Tensor]:
        mean, std = super().statistics()
        return mean, 1.01 * std


class WrongTimes(WanBackbone):
    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        def moved(level: Level) -> Level:
            return 1 - shift_time(level[1], 1 / 1.01), shift_time(level[1], 1 / 1.01)

        steps = super().teacher_times(num_steps, shape)
        return tuple(SolverStep(step.timestep, moved(step.start), moved(step.end)) for step in steps)


class Rounds(WanBackbone):
    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        return tuple(step._replace(timestep=int(step.timestep)) for step in super().teacher_times(num_steps, shape))


class StepsToTheNextRow(CogVideoXBackbone):
    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        steps = super().teacher_times(num_steps, shape)
        ends = [*(step.start for step in steps[1:]), steps[-1].end]
        return tuple(step._replace(end=end) for step, end in zip(steps, ends, strict=True))


class WrongTimestep(WanBackbone):
    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return super().call(transformer, x_t, 0.99 * timestep, cond)


class DeafToPrompts(WanBackbone):
    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return super().call(transformer, x_t, timestep, Conditioning({"prompt_embeds": 0 * cond["prompt_embeds"]}))


class MixesPrompts(WanBackbone):
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        embeds = super().encode_prompts(prompts)["prompt_embeds"]
        return Conditioning({"prompt_embeds": embeds - embeds.mean(0) + embeds[:1]})


class LosesGradients(WanBackbone):
    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        return super().call(transformer, x_t, timestep, cond).detach().requires_grad_()


class ForgetsImages(WanImageBackbone):
    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        return super().encode_images(torch.zeros_like(images), frames)


class InstructsNegatives(SanaVideoBackbone):
    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        return self.encode_prompts(prompts)


class SeesPadding(Kandinsky5Backbone):
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        cond = super().encode_prompts(prompts)
        return cond | Conditioning({"prompt_length": cond["prompt_length"] + 1})


class ReturnsWhatItSampled(Kandinsky5ImageBackbone):
    def finish(self, latents: Tensor) -> Tensor:
        return latents


class OwnPadding(LatteBackbone):
    def unconditional(self, negative: Conditioning, cond: Conditioning) -> Conditioning:
        return cond | negative.expand(cond.batch_size)


class OtherGuider(HunyuanVideo15Backbone):
    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        super().prepare(pipe, guidance + 0.1)


class OtherScheduler(WanBackbone):
    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        return super().few_step_scheduler([shift_time(t, 1 / 1.2) for t in steps], kind)


class WrongShape(WanBackbone):
    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        channels, frames, height, width = super().latent_shape(size)
        return channels, frames, width, height


class OwnNetwork(WanBackbone):
    """Loads its network as Cosmos once did: past the shared loading."""

    def load_transformer(self) -> nn.Module:
        folder = self.configs.location.folder
        return WanTransformer3DModel.from_pretrained(folder, subfolder="transformer").eval().requires_grad_(False)


class QuantisesOne(WanStagedBackbone):
    def load_transformer(self) -> nn.Module:
        first, self.loader.quantization = self.loader.network("transformer"), None
        return self.assemble(first, self.loader.network("transformer_2"))


class OwnVAE(Loader):
    @cached_property
    def vae(self) -> Any:
        return AutoencoderKLWan.from_pretrained(self.stock.configs.location.folder, subfolder="vae").eval()


class LoadsItsVAE(WanBackbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loader = OwnVAE(self)


class OwnEncoders(Loader):
    @cached_property
    def encoders(self) -> Any:
        return self.pipeline(vae=self.vae, transformer=None)


class LoadsItsEncoders(WanBackbone):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.loader = OwnEncoders(self)


@pytest.mark.parametrize(
    ("mistake", "family", "checks"),
    [
        (WrongStatistics, "wan", ["decode"]),
        (WrongTimes, "wan", ["replay"]),
        (Rounds, "wan", ["replay"]),
        (StepsToTheNextRow, "cogvideox", ["replay"]),
        (WrongTimestep, "wan", ["x0", "replay"]),
        (DeafToPrompts, "wan", ["x0", "replay"]),
        (MixesPrompts, "wan", ["prompts"]),
        pytest.param(
            LosesGradients, "wan", ["checkpointing", "train_lora", "train_full"], marks=pytest.mark.slow(seconds=1)
        ),
        (ForgetsImages, "wan_i2v", ["x0", "replay", "image", "export_pipeline"]),
        (InstructsNegatives, "sanavideo", ["replay"]),
        (SeesPadding, "kandinsky", ["x0", "replay"]),
        (ReturnsWhatItSampled, "kandinsky_i2v", ["replay"]),
        (OwnPadding, "latte", ["replay"]),
        (OtherGuider, "hunyuan15", ["x0"]),
        pytest.param(OtherScheduler, "wan", ["export_pipeline", "export_full"], marks=pytest.mark.slow(seconds=1)),
        (WrongShape, "wan", ["layout"]),
        (OwnNetwork, "wan", ["quantization"]),
        (QuantisesOne, "wan22", ["quantization"]),
        (LoadsItsVAE, "wan", ["offload"]),
        (LoadsItsEncoders, "wan", ["offload"]),
    ],
)
def test_contract_notices(
    cases: dict[str, Case], mistake: type, family: str, checks: list[str], tmp_path: Path
) -> None:
    case = replace(cases[family], backbone=f"{__name__}.{mistake.__name__}")
    for check in checks:
        with pytest.raises((AssertionError, RuntimeError)):
            CHECKS[check](case, tmp_path)


def test_a_held_out_configuration_that_fails_can_be_repeated(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTRACT_SEED", "3")
    wrong = replace(cases["wan"], backbone=f"{__name__}.WrongTimes")
    with pytest.raises(AssertionError, match=r"differ.*; with CONTRACT_SEED=3: \d+ steps, .*_class_name"):
        run_check("held_out", wrong, tmp_path)


@pytest.mark.slow(seconds=13)
def test_the_whole_contract_in_one_line(cases: dict[str, Case], tmp_path: Path) -> None:
    found = check_backbone(cases["wan"], tmp_path)
    assert found.keys() == CHECKS.keys()
    with pytest.raises(AssertionError, match="was not refused"):
        run_check("layout", replace(cases["wan"], refuses={"layout": "no way"}), tmp_path)
    assert all(error is None or error < 0.05 for error in found.values())


def test_a_refusal_has_to_be_the_expected_one(cases: dict[str, Case], tmp_path: Path) -> None:
    other = replace(cases["wan22"], refuses={"gan": "something else"})
    with pytest.raises(AssertionError, match=r"has to be refused with 'something else', and it says: StagedNetwork"):
        run_check("gan", other, tmp_path)


@pytest.mark.slow(seconds=10)
def test_failing_checks_are_named_with_what_they_are_for(cases: dict[str, Case], tmp_path: Path) -> None:
    wrong = replace(cases["wan"], backbone=f"{__name__}.WrongTimes")
    with pytest.raises(AssertionError, match=r"(?s)checks failed\nreplay: 4 steps .* differ .*The pipeline's guided"):
        check_backbone(wrong, tmp_path)
