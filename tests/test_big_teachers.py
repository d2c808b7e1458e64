"""Compiled blocks, a quantised base, and networks that wait on the CPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.data import VideoDataModule
from lightning_dfd.networks.offload import offload_blocks
from lightning_dfd.networks.quantization import Quantization
from lightning_dfd.networks.roles import RECOMPILE_LIMIT, Roles
from lightning_dfd.testing.tiny import TEXT_LENGTH, TINY
from lightning_dfd.training.settings import DMDSettings, GANSettings, SamplingSettings, StudentSettings
from lightning_dfd.types import VideoSize
from tests.test_module import fit, make_module, make_trainer
from tests.test_roles import inputs, make, student_gradients

ROOT = Path(__file__).parent.parent
TORCHAO = Path(sys.prefix) / "torchao"  # `make install` puts it there

# ---- compile ----------------------------------------------------------------------------------------------------


def outputs(roles: Roles, backbone: Backbone) -> dict[str, Tensor]:
    x_t, t, cond = inputs(backbone)
    found = {}
    for role in ("teacher", "student", "fake"):
        with torch.no_grad(), roles.act_as(role) as network:  # type: ignore[arg-type]
            found[role] = backbone.x0(network, x_t, t, cond)
    return found


@pytest.mark.parametrize(("name", "checkpointing"), [("cogvideox_5b", False), ("wan", True)])
@pytest.mark.slow(seconds=15)
def test_compiled_blocks_give_the_same_and_are_not_compiled_for_ever(
    tiny: dict[str, Path], name: str, checkpointing: bool
) -> None:
    backbone = backbone_from_pretrained(str(tiny[name]), max_sequence_length=TEXT_LENGTH)
    plain, compiled = (make(backbone, "lora", checkpointing=checkpointing) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled.compile_blocks("aot_eager")
    assert torch._dynamo.config.recompile_limit >= RECOMPILE_LIMIT
    expected = outputs(plain, backbone)
    for role, ours in outputs(compiled, backbone).items():
        torch.testing.assert_close(ours, expected[role], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected["student"], expected["teacher"], atol=1e-3)
    for mine, theirs in zip(student_gradients(compiled, backbone), student_gradients(plain, backbone), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    versions = graphs()
    assert 0 < versions <= 12
    for _ in range(2):  # roles go on taking turns
        student_gradients(compiled, backbone)
    assert graphs() == versions


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.slow(seconds=15)
def test_compiled_blocks_are_not_compiled_for_ever_under_a_gan(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The discriminator hangs new hooks on the blocks for every call."""
    seen: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(graphs())

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = make_module(tiny["wan"], gan=GANSettings(weight=0.1), dmd=DMDSettings(student_update_freq=2))
    module.configure_model()
    module.network.compile_blocks("aot_eager")
    fit(module, tmp_path, 6, Count())
    assert seen[1] > 0
    assert seen[-1] == seen[3], seen


# ---- quantisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torchao", "bitsandbytes"])
def test_a_missing_backend_is_an_error_that_names_its_extra(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    module = make_module(tiny["wan"], quantization=Quantization(backend, "int8"))
    with pytest.raises(ImportError, match=rf"pip install 'lightning-dfd\[{backend}\]'"):
        module.configure_model()


def test_what_cannot_be_quantised_is_refused(tiny: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="int8 or nf4"):
        Quantization("bitsandbytes", "fp8")
    with pytest.raises(ValueError, match=r"model\.student\.mode"):
        make_module(tiny["wan"], student=StudentSettings(mode="full"), quantization=Quantization("torchao", "int8"))


def test_configs_are_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bitsandbytes, which needs a GPU; torchao's are run below."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.45.0")
    with pytest.raises(ValueError, match="needs a GPU, and there is none; set backend: torchao"):
        Quantization("bitsandbytes", "int8").config(torch.bfloat16)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    int8, nf4 = (Quantization("bitsandbytes", kind).config(torch.bfloat16) for kind in ("int8", "nf4"))
    assert int8.load_in_8bit
    assert nf4.load_in_4bit
    assert (nf4.bnb_4bit_quant_type, nf4.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


@pytest.mark.slow(seconds=15)
def test_torchao_trains_resumes_and_leaves_the_teacher(tiny: dict[str, Path], tmp_path: Path) -> None:
    families = ("wan", "cogvideox")
    found = subprocess.run(
        [sys.executable, "-m", "tests.quantized", str(tmp_path), *(str(tiny[family]) for family in families)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(TORCHAO)}, capture_output=True, text=True,
    )  # fmt: skip
    assert not found.returncode, found.stderr[-3000:]
    same = {"trained": ["torch.float32"], "moved": True, "teacher_stays": True, "resumes": True}
    same |= {"base_gradients": 0, "base_saved": []}
    for family, kinds in zip(families, json.loads(found.stdout.splitlines()[-1]), strict=True):
        errors = {kind: measured.pop("error") for kind, measured in kinds.items()}
        assert 0 < errors["int8"] < 0.01, (family, errors)
        assert 0 < errors["fp8"] < 0.04, (family, errors)
        assert kinds == {"int8": {"stored": ["Int8Tensor"], **same}, "fp8": {"stored": ["Float8Tensor"], **same}}


@pytest.mark.slow(seconds=1)
def test_an_export_is_merged_into_the_teacher_as_published(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Of a quantised run no backend is needed for it."""
    options: dict[str, Any] = {"sampling": SamplingSettings(list(TINY["wan"].steps))}
    trainer = fit(make_module(tiny["wan"], **options), tmp_path, 5)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    module = make_module(tiny["wan"], quantization=Quantization("torchao", "int8"), **options)
    data = VideoDataModule(cache="none", frames=9, height=32, width=32)
    report = make_trainer(tmp_path, 1).export(module, data, str(tmp_path / "out"), str(tmp_path / "student.ckpt"))
    assert report.error < 1e-3
    assert (tmp_path / "out" / "transformer" / "config.json").is_file()


# ---- offload ----------------------------------------------------------------------------------------------------


def test_offloaded_encoders_give_the_same(backbone: Backbone, size: VideoSize) -> None:
    video = torch.rand(1, 3, size.frames, size.height, size.width) * 2 - 1
    latents, cond = backbone.encode_videos(video), backbone.encode_prompts(["a cat"])
    decoded = backbone.decode_latents(latents)
    waiting = backbone_from_pretrained(backbone.source, max_sequence_length=TEXT_LENGTH)
    waiting.loader.offload = True
    assert torch.equal(waiting.encode_videos(video), latents)
    for name, tensor in waiting.encode_prompts(["a cat"]).tensors.items():
        assert torch.equal(tensor, cond[name]), name
    assert torch.equal(waiting.decode_latents(latents), decoded)
    assert any(hasattr(part, "_diffusers_hook") for part in waiting.loader.vae.modules())


def test_an_offloaded_teacher_gives_the_same(backbone: Backbone) -> None:
    roles = make(backbone, "full")
    before = outputs(roles, backbone)
    offload_blocks(roles.networks["teacher"], torch.device("cpu"))  # type: ignore[index, union-attr]
    after = outputs(roles, backbone)
    for role, tensor in before.items():
        assert torch.equal(after[role], tensor), role


def test_full_tuning_with_offload_trains(tiny: dict[str, Path], tmp_path: Path) -> None:
    module = make_module(tiny["wan"], student=StudentSettings(mode="full"), offload=True)
    fit(module, tmp_path, 5)
    teacher: Any = module.network.networks["teacher"]  # type: ignore[index, union-attr]
    assert any(hasattr(part, "_diffusers_hook") for part in teacher.modules())
    with pytest.raises(ValueError, match=r"model\.gan\.weight is 0\.1; it must be 0 with model\.offload"):
        make_module(tiny["wan"], student=StudentSettings(mode="full"), offload=True, gan=GANSettings(weight=0.1))
