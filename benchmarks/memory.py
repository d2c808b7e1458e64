"""Peak memory of training with roles on one base, beside three copies of the network.

    python -m benchmarks.memory [CASE ...] --output outputs/memory

Every run trains a random teacher of about a hundred million parameters for four iterations on the CPU, in a process of
its own; measured as by `benchmarks.plan`. `three copies` is what most DMD code holds: a frozen teacher and two copies
that are trained whole. `three copies, adapters` trains the same adapters as we do, each on a copy of its own.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest.mock import patch

from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from tqdm import tqdm

from benchmarks.plan import CASES, MEASURES, MIB, in_fresh_process, save_teacher
from benchmarks.report import report
from lightning_dfd.networks.roles import TRAINED, Roles
from lightning_dfd.training import module
from lightning_dfd.types import Role

DEFAULT = ("cogvideox-lora", "cogvideox-lora-checkpointing", "wan-lora", "wan-lora-bf16")


class ThreeCopies(Roles):
    """As LoraRoles, but every trained role has a whole network below its adapter."""

    def __init__(
        self, transformer: nn.Module, targets: Sequence[str], rank: int, alpha: int, **options: object
    ) -> None:
        super().__init__()
        self.held = TRAINED
        self.networks = nn.ModuleDict({"teacher": transformer.requires_grad_(False)})
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
        for role in TRAINED:
            network = inject_adapter_in_model(config, copy.deepcopy(transformer), adapter_name=role)
            for name, parameter in network.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.float()
            if options["checkpointing"]:
                network.enable_gradient_checkpointing()
            self.networks[role] = network
        self.eval()

    def act_as(self, role: Role) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.networks[role])

    def names_of(self, role: Role) -> dict[str, str]:
        names = (name for name, _ in self.networks[role].named_parameters() if ".lora_" in name)
        return {f"networks.{role}.{name}": name for name in names}


def measure(case: str, kind: str, measured: str, teacher: str) -> int:
    """Bytes, in this process, which must be fresh."""
    settings = CASES[case]
    if kind == "three copies":
        settings = replace(settings, student=replace(settings.student, mode="full"))
    with patch.object(module, "LoraRoles", ThreeCopies if kind.endswith("adapters") else module.LoraRoles):
        return MEASURES[measured](settings, teacher)


KINDS = ("roles on one base", "three copies", "three copies, adapters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(DEFAULT)}; all by default")
    parser.add_argument("--output", default="outputs/memory", help="folder for memory.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.cases[0], *args.measure, args.teacher))
        return
    rows = []
    for case in tqdm(args.cases or DEFAULT, desc="memory"):
        with tempfile.TemporaryDirectory() as teacher:
            save_teacher(CASES[case], teacher)
            for measured in ("allocator", "resident"):
                peaks = [
                    in_fresh_process("benchmarks.memory", case, "--measure", kind, measured, "--teacher", teacher) / MIB
                    for kind in KINDS
                ]
                row = {"case": case, "measure": measured}
                row |= {f"{kind} MiB": round(peak) for kind, peak in zip(KINDS, peaks, strict=True)}
                row |= {f"/ {kind}": peaks[0] / peak for kind, peak in zip(KINDS[1:], peaks[1:], strict=True)}
                rows.append(row)
    report("memory", rows, args.output)


if __name__ == "__main__":
    main()
