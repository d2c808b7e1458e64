"""Memory, traffic and time of whole distillations on 1, 8 and 64 GPUs, on paper.

    python -m benchmarks.published outputs/published
    python -m benchmarks.scaling --published outputs/published --output outputs/scaling

From `lightning plan` for one GPU; what several change is arithmetic, and what it assumes is in docs/scaling.md.
"""

from __future__ import annotations

import argparse
import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.report import report
from lightning_dfd.cli import main as cli

ROOT = Path(__file__).parent.parent
GIB = 2**30
GPUS = (1, 8, 64)
A_NODE = 8
PEAK = 989e12  # floating point operations a second of an H100 or H200 in bfloat16, dense
MFU = 0.4
WITHIN, BETWEEN = 400e9, 50e9  # bytes a second of a GPU, within a node and between nodes
BATCH = 64  # clips of an iteration
ITERATIONS = 1300  # the recipes': 1000 of DMD2 and 300 of data forcing
EVERY = 5  # iterations for one update of the student


@dataclass(frozen=True)
class Case:
    teacher: str
    recipe: str
    mode: str

    def words(self, published: Path) -> list[str]:
        words = ["plan", "-c", str(ROOT / "recipes" / f"{self.recipe}.yaml")]
        if self.mode == "full":
            words += ["-c", str(ROOT / "recipes" / "full_tuning.yaml"), "--model.student.ema_decay", "null"]
        words += ["--model.teacher", str(published / self.teacher), "--data.cache", "any", "--data.batch_size", "1"]
        return [*words, "--model.accumulate", "1", "--json", "true"]


CASES = [
    Case(teacher, recipe, mode)
    for teacher, recipe in (
        ("cogvideox-2b", "cogvideox_dmd2"), ("cogvideox-5b", "cogvideox_5b_dmd2"),
        ("wan-1.3b", "wan_dmd2"), ("wan-14b", "wan_14b_dmd2"),
    )
    for mode in ("lora", "full")
]  # fmt: skip


def plan(case: Case, published: Path) -> dict[str, Any]:
    text = io.StringIO()
    with redirect_stdout(text):
        cli.main(case.words(published))
    found: dict[str, Any] = json.loads(text.getvalue())
    return found


def share_of_a_block(folder: Path) -> float:
    """Of the network's parameters, in its largest block."""
    import diffusers

    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    blocks = [block for child in network.children() if isinstance(child, torch.nn.ModuleList) for block in child]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    return max(sizes) / sum(parameter.numel() for parameter in network.parameters())


def rows_of(case: Case, published: Path) -> list[dict[str, Any]]:
    found = plan(case, published)
    terms: dict[str, int] = found["terms"]
    local = sum(size for name, size in terms.items() if name.startswith("activations"))
    kept = sum(terms.values()) - local  # what FSDP2 spreads
    trained = {role: terms[f"{role} weights"] for role in ("student", "fake")}
    network = terms["teacher"] + (sum(trained.values()) if case.mode == "lora" else 0)  # that one call gathers
    called = network if case.mode == "lora" else max(trained.values())
    gathered = 2 * share_of_a_block(published / case.teacher) * called  # a block and the next one
    rows = []
    for gpus in GPUS:
        batches = -(-BATCH // gpus)
        remote = (gpus - 1) / gpus
        # a call with gradient gathers its network twice, one without once; the student's turn has one call more
        if case.mode == "lora":
            gathers = (2 + 1 + 1 / EVERY) * called
        else:
            fake_turn = 2 * trained["fake"] + trained["student"]
            student_turn = 2 * trained["student"] + trained["fake"] + terms["teacher"]
            gathers = ((EVERY - 1) * fake_turn + student_turn) / EVERY
        gradients = max(trained.values())
        for strategy in ("ddp", "fsdp2"):
            if gpus == 1 and strategy == "fsdp2":
                continue
            if strategy == "fsdp2":
                memory = kept / gpus + gathered + local
                traffic = batches * remote * (gathers + gradients)
            else:
                reduced = sum(trained.values())  # in DDP's buckets, those of the role that rests as well
                memory = kept + local + (reduced if gpus > 1 else 0)
                traffic = batches * 2 * remote * reduced
            compute = batches * found["flops"]["mean"] / (PEAK * MFU)
            wire = traffic / (WITHIN if gpus <= A_NODE else BETWEEN)
            rows.append({
                "teacher": case.teacher, "student": case.mode, "GPUs": gpus,
                "strategy": "none" if gpus == 1 else strategy, "GiB a GPU": round(memory / GIB, 1),
                "fits 80": "yes" if memory < 0.9 * 80 * GIB else "no",
                "GB sent": round(traffic / 1e9, 1), "compute s": round(compute, 1), "wire s": round(wire, 1),
                "hours": round(ITERATIONS * max(compute, wire) / 3600, 1),
                "GPU hours": round(gpus * ITERATIONS * max(compute, wire) / 3600),
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, default=Path("outputs/published"), help="folders of configs")
    parser.add_argument("--output", default="outputs/scaling", help="folder for scaling.json")
    args = parser.parse_args()
    rows = [row for case in tqdm(CASES, desc="planning") for row in rows_of(case, args.published)]
    report("scaling", rows, args.output, mfu=MFU, peak=PEAK, within=WITHIN, between=BETWEEN, batch=BATCH)


if __name__ == "__main__":
    main()
