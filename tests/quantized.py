"""What test_big_teachers.py runs with torchao, in a process of its own: diffusers looks for it when it is imported.

python -m tests.quantized FOLDER TEACHER ...  prints the measurements of each teacher as JSON, by kind.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.networks.quantization import KINDS, Quantization
from lightning_dfd.runs.checkpoints import read_checkpoint
from lightning_dfd.training.settings import DMDSettings, StudentSettings
from tests.test_module import fit, make_module
from tests.test_roles import inputs


@torch.no_grad()
def teacher_x0(module: Any) -> Tensor:
    with module.network.act_as("teacher") as network:
        x0: Tensor = module.backbone.x0(network, *inputs(module.backbone))
    return x0


def measure(teacher: Path, folder: Path, kind: Any) -> dict[str, Any]:
    student = StudentSettings(rank=4, gradient_checkpointing=True)

    def module(**options: Any) -> Any:
        return make_module(
            teacher, dtype="bfloat16", student=student, dmd=DMDSettings(student_update_freq=2), **options
        )

    def quantized() -> Any:
        return module(quantization=Quantization("torchao", kind))

    exact, trained = module(), quantized()
    for one in (exact, trained):
        one.configure_model()
    before, expected = teacher_x0(trained), teacher_x0(exact)
    fit(trained, folder, 4).save_checkpoint(folder / "whole.ckpt")
    fit(quantized(), folder, 2).save_checkpoint(folder / "half.ckpt")
    resumed = fit(quantized(), folder, 4, ckpt_path=str(folder / "half.ckpt"), start=2)
    resumed.save_checkpoint(folder / "resumed.ckpt")
    whole, again = (read_checkpoint(folder / f"{name}.ckpt")["state_dict"] for name in ("whole", "resumed"))
    parameters = dict(trained.network.named_parameters())
    return {
        "stored": sorted({type(value).__name__ for name, value in parameters.items() if "base_layer.weight" in name}),
        "error": float((before - expected).norm() / expected.norm()),
        "teacher_stays": torch.equal(teacher_x0(trained), before),
        "base_gradients": sum(value.grad is not None for name, value in parameters.items() if "lora_" not in name),
        "trained": sorted({str(value.dtype) for value in trained.network.parameters_of("student")}),
        "resumes": whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole),
        "moved": any(bool(value.any()) for name, value in whole.items() if "lora_B.student" in name),
        "base_saved": sorted(name for name in whole if "lora_" not in name),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *teachers = map(Path, sys.argv[1:])
    measured = [
        {kind: measure(teacher, folder / teacher.name / kind, kind) for kind in KINDS["torchao"]}
        for teacher in teachers
    ]
    print(json.dumps(measured))
