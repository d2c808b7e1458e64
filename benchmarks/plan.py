"""How near `lightning plan` comes: its estimate beside the measured peak of real training on a CPU.

    python -m benchmarks.plan [CASE ...] --output outputs/plan

Every case trains a random teacher of about a hundred million parameters for four iterations in a process of its own.
Two measures: what torch's allocator handed out, event by event, and by how much the process grew (its largest resident
set less the one before the teacher was loaded, which also holds what the allocator and kernels keep for themselves).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from lightning.pytorch.callbacks import Callback
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, IterableDataset

from lightning_dfd import DistillationModule, DistillationTrainer
from lightning_dfd.plan import Setup, estimate
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.training.settings import DMDSettings, StudentSettings
from lightning_dfd.types import Batch, VideoSize

MIB = 2**20
SIZE = VideoSize(9, 160, 128)
WARM_UP = 2  # iterations after which all optimizer states exist


@dataclass(frozen=True)
class Case:
    family: str
    student: StudentSettings
    size: VideoSize = SIZE
    batch_size: int = 2
    dtype: str = "float32"
    precision: str = "32-true"
    text_tokens: int = 32
    options: dict[str, Any] = field(default_factory=dict)


LORA, FULL = StudentSettings(rank=32), StudentSettings(mode="full")
CASES = {
    "cogvideox-lora": Case("cogvideox_5b", LORA),
    "cogvideox-lora-checkpointing": Case("cogvideox_5b", StudentSettings(rank=32, gradient_checkpointing=True)),
    "cogvideox-full": Case("cogvideox_5b", FULL),
    "wan-lora": Case("wan", LORA),
    "wan-lora-bf16": Case("wan", LORA, dtype="bfloat16", precision="bf16-mixed"),
}


def large_transformer(family: str) -> torch.nn.Module:
    """About a hundred million parameters, otherwise like the published networks."""
    if family == "wan":
        return WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=32, freq_dim=256,
            ffn_dim=3072, num_layers=10, rope_max_seq_len=64,
        )  # fmt: skip
    return CogVideoXTransformer3DModel(
        num_attention_heads=12, attention_head_dim=64, num_layers=8, in_channels=4, out_channels=4, text_embed_dim=32,
        sample_height=20, sample_width=16, sample_frames=9, max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip


def save_teacher(case: Case, folder: str | Path) -> None:
    pipe = TINY[case.family].build()
    pipe.register_modules(transformer=large_transformer(case.family))
    pipe.to(getattr(torch, case.dtype)).save_pretrained(folder)


def make_module(case: Case, teacher: str | Path) -> DistillationModule:
    return DistillationModule(
        str(teacher),
        dtype=case.dtype,  # type: ignore[arg-type]
        max_sequence_length=case.text_tokens,
        student=case.student,
        dmd=DMDSettings(student_update_freq=2),
        **case.options,
    )


def planned_peak(case: Case, teacher: str | Path) -> int:
    """Bytes, by the rules of a CPU, with latents from a cache."""
    setup = Setup(make_module(case, teacher), case.size, case.batch_size, True, case.precision, device="cpu")
    return estimate(setup).peak


# ---- the measured side ------------------------------------------------------------------------------------------


class Latents(IterableDataset[Batch]):
    """Endless random batches, as from a cache."""

    def __init__(self, module: DistillationModule, case: Case) -> None:
        self.module, self.case = module, case

    def __iter__(self) -> Iterator[Batch]:
        backbone, count = self.module.backbone, self.case.batch_size
        for _ in itertools.count():
            latents = torch.randn(count, *backbone.latent_shape(self.case.size))
            cond = backbone.dummy_prompts(count) | backbone.dummy_images(count, self.case.size)
            yield Batch(("",) * count, latents=latents, cond=cond)


class AllocatorPeak(Callback):
    """The most bytes that torch's allocator had handed out, from iteration WARM_UP on."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == WARM_UP and pl_module.between_iterations:
            tensors = [*pl_module.parameters(), *pl_module.buffers(), batch.latents, *batch.cond.tensors.values()]
            for optimizer in trainer.optimizers:
                states = optimizer.state.values()
                tensors += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
            self.before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.profile.__exit__(None, None, None)
        assert self.profile.profiler is not None
        events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.peak = self.before + max(itertools.accumulate(changes))


def train(case: Case, teacher: str | Path, *callbacks: Callback) -> None:
    """Four iterations, two of either role."""
    module = make_module(case, teacher)
    module.negative = module.backbone.dummy_prompts(1)
    trainer = DistillationTrainer(
        max_steps=2 * WARM_UP,
        accelerator="cpu",
        precision=case.precision,  # type: ignore[arg-type]
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(Latents(module, case), batch_size=None))


def allocator_peak(case: Case, teacher: str | Path) -> int:
    watch = AllocatorPeak()
    train(case, teacher, watch)
    return watch.peak


def resident_peak(case: Case, teacher: str | Path) -> int:
    """By how much this process, which must be fresh, grows at most."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    train(case, teacher)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


MEASURES: dict[str, Callable[[Case, str | Path], int]] = {
    "planned": planned_peak,
    "allocator": allocator_peak,
    "resident": resident_peak,
}


def in_fresh_process(*words: str) -> int:
    """The number that `python -m <words>` prints last."""
    # large blocks are given back to the system at once, so that the resident set follows the allocator
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def measured(measure: str, case: str, teacher: str) -> int:
    return in_fresh_process("benchmarks.plan", case, "--measure", measure, "--teacher", teacher)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--output", default="outputs/plan", help="folder for plan.json")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(MEASURES[args.measure](CASES[args.cases[0]], args.teacher))
        return
    rows = {}
    print(f"{'MiB':32}{'planned':>10}{'allocator':>11}{'ratio':>7}{'resident':>10}{'ratio':>7}")
    for name in args.cases or CASES:
        with tempfile.TemporaryDirectory() as teacher:
            save_teacher(CASES[name], teacher)
            rows[name] = row = {measure: measured(measure, name, teacher) for measure in MEASURES}
        planned, allocator, resident = (row[measure] / MIB for measure in MEASURES)
        shares = (planned / allocator, planned / resident)
        print(f"{name:32}{planned:10.0f}{allocator:11.0f}{shares[0]:7.2f}{resident:10.0f}{shares[1]:7.2f}", flush=True)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
