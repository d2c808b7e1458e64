"""Exports are the student: the same latents from stock diffusers, in a process that cannot import this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_dfd import DistillationModule
from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.backbones.families.mochi import own_times
from lightning_dfd.diffusion.noise import shift_time, shifted_steps
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.export import ExportFormat, call_arguments, export_student
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.training.settings import SamplingSettings, StudentSettings
from lightning_dfd.types import SampleKind, VideoSize

SIZE = VideoSize(9, 32, 32)

ELSEWHERE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning_dfd", "lightning"):
            raise ImportError(name + " is not allowed here")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
"""
CALL = """
{code}
tensors = load_file({noise!r})
latents = pipe(prompt="a cat", latents=tensors["noise"], generator=torch.Generator().manual_seed(3),
               output_type="latent", **{call!r}).frames
assert "lightning_dfd" not in sys.modules
save_file({{"latents": latents.contiguous()}}, {noise!r} + ".out")
del pipe
"""
FORMS: dict[str, ExportFormat] = {  # hunyuan15 and latte cannot load adapters; the contract has every family in both
    "cogvideox": "pipeline", "hunyuan15": "lora", "latte": "lora", "ltx": "pipeline", "wan": "lora",
}  # fmt: skip


def make_student(folder: Path, family: str, kind: SampleKind = "ode", **student: Any) -> DistillationModule:
    """A student that is far from its teacher, so that a missing adapter cannot pass."""
    module = DistillationModule(
        str(folder),
        student=StudentSettings(**({"rank": 4, "alpha": 8} | student)),
        sampling=SamplingSettings(list(TINY[family].steps), kind),
        max_sequence_length=TINY[family].text_length,
    )
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.network.parameters_of(module.best_student):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def call_of(backbone: Backbone, folder: Path, noise: torch.Tensor) -> str:
    """Code that calls an export as its model card says, and saves the latents beside it."""
    file = str(folder / "noise.safetensors")
    save_file({"noise": backbone.pack(noise).contiguous()}, file)
    call = call_arguments(backbone, getattr(diffusers, backbone.pipeline_name), SIZE, 4)
    return CALL.format(code=card_code(folder), noise=file, call=call)


def card_code(folder: Path) -> str:
    """The code of the model card up to the call."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n(.*?)\nvideo = ", card, re.DOTALL)
    assert match
    return match.group(1)


@pytest.mark.slow(seconds=12)
def test_exports_equal_our_sampler_in_another_process(tiny: dict[str, Path], tmp_path: Path) -> None:
    """A fresh one with stock diffusers alone; one for all, as starting it takes longest."""
    expected, script = {}, ELSEWHERE
    for family, form in FORMS.items():
        module, folder = make_student(tiny[family], family), tmp_path / family
        assert export_student(module, folder, SIZE, form, {"Data": "clips"}).error < 1e-4
        noise = torch.randn(1, *module.backbone.latent_shape(SIZE), generator=torch.Generator().manual_seed(5))
        script += call_of(module.backbone, folder, noise)
        cond = module.backbone.encode_prompts(["a cat"])
        made = [module.sample_latents(role, cond, noise) for role in ("student", "fake")]
        expected[family] = [module.backbone.pack(latents) for latents in made]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for family, (ours, teacher) in expected.items():
        theirs = load_file(tmp_path / family / "noise.safetensors.out")["latents"]
        assert (theirs - ours).square().mean().sqrt() < 1e-3 * ours.std(), family
        assert (theirs - teacher).square().mean().sqrt() > 0.02 * ours.std(), family  # twenty times what is allowed


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize("family", ["latte", "wan"])
def test_lora_file_keeps_its_alpha(tiny: dict[str, Path], family: str, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    module = make_student(tiny[family], family)
    export_student(module, folder, SIZE, "lora", {})
    if hasattr(getattr(diffusers, module.backbone.pipeline_name), "load_lora_weights"):
        path, prefix = folder / "pytorch_lora_weights.safetensors", "transformer."
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
    else:
        path, prefix = folder / "adapter_model.safetensors", ""
        config = json.loads((folder / "adapter_config.json").read_text())
    assert config[f"{prefix}lora_alpha"] == 8
    assert config[f"{prefix}r"] == 4
    weights = load_file(path)
    assert all(re.fullmatch(rf"{prefix}.*\.lora_[AB]\.weight", name) for name in weights)
    assert len(weights) == len(module.network.parameters_of("student"))


def test_a_wrong_export_fails_and_leaves_nothing(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check can fail: a scheduler at other times is caught."""
    module = make_student(tiny["wan"], "wan")
    wrong = module.backbone.few_step_scheduler(shifted_steps(4, 2.0), "ode")
    monkeypatch.setattr(module.backbone, "few_step_scheduler", lambda steps, kind: wrong)
    with pytest.raises(RuntimeError, match="the export is not the student"):
        export_student(module, tmp_path / "student", SIZE, "pipeline", {})
    assert list(tmp_path.iterdir()) == []


def test_refusals(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = make_student(tiny["wan"], "wan", mode="full")
    with pytest.raises(ValueError, match="--format pipeline"):
        export_student(module, tmp_path / "student", SIZE, "lora", {})
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        export_student(module, tmp_path / "there", SIZE, "pipeline", {})


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_cogvideox_schedulers_run_at_the_students_times(tiny: dict[str, Path], num: int, kind: Any) -> None:
    backbone = backbone_from_pretrained(str(tiny["cogvideox"]))
    rows = [1000 // num * (num - i) - 1 for i in range(num)]
    scheduler = backbone.few_step_scheduler([row / 1000 for row in rows], kind)
    scheduler.set_timesteps(num)
    assert scheduler.timesteps.tolist() == rows


@pytest.mark.parametrize(("num", "last"), [(1, 700), (3, 332), (4, 124), (4, 0), (6, 100), (6, 165), (7, 141)])
def test_ode_ends_at_any_row_that_the_gap_leaves(tiny: dict[str, Path], num: int, last: int) -> None:
    """Stock DDIM steps from row to row as our sampler does, and from the last to clean latents."""
    backbone = backbone_from_pretrained(str(tiny["latte"]))
    rows = [last + 1000 // num * i for i in reversed(range(num))]
    scheduler = backbone.few_step_scheduler([row / 1000 for row in rows], "ode")
    scheduler.set_timesteps(num)
    assert scheduler.timesteps.tolist() == rows
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    theirs = x
    for row in scheduler.timesteps:
        theirs = scheduler.step(0.5 * theirs.sin(), row, theirs).prev_sample

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return backbone.schedule.to_x0(0.5 * x_t.sin(), x_t, t)

    ours = sample(stateless(denoise), backbone.schedule, Rollout(x), [row / 1000 for row in rows]).latents
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_flow_schedulers_run_at_the_students_times(tiny: dict[str, Path], num: int, shift: float) -> None:
    backbone = backbone_from_pretrained(str(tiny["wan"]))
    steps = shifted_steps(num, shift)
    scheduler = backbone.few_step_scheduler(steps, "ode")
    scheduler.set_timesteps(num)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in steps], abs=0.1)


@pytest.mark.parametrize("num", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_schedulers_that_are_handed_times_shift_them(tiny: dict[str, Path], num: int, shift: float) -> None:
    """LTX passes 1, 1 - 1/N, ..., 1/N and a shift by size, which the few-step scheduler leaves out."""
    steps = shifted_steps(num, shift)
    scheduler = backbone_from_pretrained(str(tiny["ltx"])).few_step_scheduler(steps, "ode")
    scheduler.set_timesteps(num, sigmas=shifted_steps(num, 1.0), mu=2.0)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in steps], abs=0.1)


@pytest.mark.parametrize("num", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.1, 1.0])
def test_mochis_scheduler_shifts_the_times_of_its_pipeline(tiny: dict[str, Path], num: int, shift: float) -> None:
    own = own_times(num)
    steps = [shift_time(t, shift) for t in own]
    scheduler = backbone_from_pretrained(str(tiny["mochi"])).few_step_scheduler(steps, "ode")
    scheduler.set_timesteps(num, sigmas=own)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * (1 - t) for t in steps], abs=0.1)


def test_times_that_no_stock_scheduler_runs_at_are_refused(tiny: dict[str, Path]) -> None:
    cogvideox = backbone_from_pretrained(str(tiny["cogvideox"]))
    with pytest.raises(ValueError, match=r"student samples at \[999, 937, 833, 624\]"):
        cogvideox.few_step_scheduler([0.999, 0.937, 0.833, 0.624], "ode")
    with pytest.raises(ValueError, match=r"set model\.sampling\.steps: \[0\.998, 0\.665, 0\.332\]"):
        cogvideox.few_step_scheduler([0.999, 0.666, 0.332], "ode")
    with pytest.raises(ValueError, match=r"run 4 steps at \[999, 749, 499, 249\] \(sde\)"):
        cogvideox.few_step_scheduler([0.874, 0.624, 0.374, 0.124], "sde")
    with pytest.raises(ValueError, match="cannot run 1 step"):
        backbone_from_pretrained(str(tiny["mochi"])).few_step_scheduler([1.0], "ode")
    with pytest.raises(ValueError, match="no stock flow scheduler"):
        backbone_from_pretrained(str(tiny["wan"])).few_step_scheduler([0.9, 0.5, 0.3, 0.1], "ode")
