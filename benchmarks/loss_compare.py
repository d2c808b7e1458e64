"""Proof that a refactor changed nothing: seeded losses and trained weights of two revisions, compared bit by bit.

    python -m benchmarks.loss_compare HEAD~1 --output outputs/loss_compare

Each revision is checked out into a worktree of its own and trains the same recipes, on the same clips and teachers, by
its own `lightning fit`: the toy teacher by DMD2, with data forcing, with the GAN and with DP-DMD, as adapters and as
whole networks, on one process and on two (DDP, FSDP2); then every tiny family for one cycle of both roles. Only the
command line, metrics.csv and the checkpoint are looked at, so the code in between may move.

Weights are compared by their content and not by their names. A recipe key that was renamed goes into RENAMED.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.utils.logging import disable_progress_bar
from tqdm import tqdm

from lightning_dfd.data import write_video
from lightning_dfd.testing.tiny import TINY, save_tiny
from lightning_dfd.toy.dataset import write_world

ROOT = Path(__file__).parent.parent
TOY_ITERATIONS = 10  # two updates of the student
LONG_CLIPS, LONGEST = 4, 32  # for families: frames enough for each
SHARED = ("train/student_loss", "train/fake_loss", "train/student_grad_norm", "train/fake_grad_norm")
TERMS: dict[str, dict[str, Any]] = {
    "dmd2": {},
    "data forcing": {"model.student.input": "data", "model.data_forcing.probability": 0.5},
    "gan": {"model.gan.weight": 0.03, "model.gan.r1_weight": 100},
    "dp-dmd": {"model.diversity.weight": 0.05},
}
MODES = {"lora": {}, "full": {"model.student.mode": "full"}}
PROCESSES: dict[str, dict[str, Any]] = {
    "one process": {},
    "ddp": {"trainer.devices": 2, "trainer.strategy": "ddp_find_unused_parameters_true"},
    "fsdp2": {"trainer.devices": 2, "trainer.strategy": "fsdp2"},
}
RENAMED: dict[str, str] = {}  # recipe keys: in the newer revision -> in the older one


@dataclass(frozen=True)
class Run:
    """A short training run, as recipe keys over the recipe of `prepare`."""

    name: str
    recipe: str
    keys: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return self.name.replace(", ", "_").replace(" ", "_")


def runs(inputs: Path, only: str) -> list[Run]:
    """The runs whose names hold `only`."""
    toy = [
        Run(f"toy, {term}, {mode}, {processes}", "recipes/toy_dmd2.yaml", keys | mode_keys | process_keys)
        for term, keys in TERMS.items()
        for mode, mode_keys in MODES.items()
        for processes, process_keys in PROCESSES.items()
    ]
    families = [Run(f"family, {name}", "", family_keys(name, inputs)) for name in TINY]
    return [run for run in (*toy, *families) if only in run.name]


def family_keys(name: str, inputs: Path) -> dict[str, Any]:
    tiny = TINY[name]
    size = {f"data.{side}": getattr(tiny.size, side) for side in ("frames", "height", "width")}
    teacher = {"model.teacher": inputs / name, "model.max_sequence_length": tiny.text_length}
    teacher["data.folder"] = inputs / "long_clips"
    student = {"model.student.rank": 4, "model.data_forcing.probability": 0.5, "model.dmd.student_update_freq": 2}
    rates = {f"model.{role}_optimizer": '{"class_path": "torch.optim.AdamW"}' for role in ("student", "fake")}
    return {**teacher, **size, **student, **rates, "data.fps": 8, "data.batch_size": 1, "trainer.max_steps": 2}


def prepare(inputs: Path) -> None:
    """What both revisions are given: clips, teachers, and a recipe that keeps every value and the last weights."""
    write_world(inputs / "clips", clips=16, seed=0)
    write_long_clips(inputs / "long_clips")
    for name in tqdm(TINY, desc="tiny teachers"):
        if not (inputs / name).exists():
            save_tiny(name, inputs / name)
    root = "${trainer.default_root_dir}"
    keep = {"dirpath": f"{root}/checkpoints", "save_last": True, "enable_version_counter": False}
    recipe = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": TOY_ITERATIONS, "max_epochs": -1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1,
            "val_check_interval": 500, "check_val_every_n_epoch": None, "enable_progress_bar": False,
            "logger": [{
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": root, "name": "metrics", "version": "only", "flush_logs_every_n_steps": 1},
            }],
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}],
        },
        "data": {"folder": str(inputs / "clips"), "cache": None, "batch_size": 4},
    }  # fmt: skip
    (inputs / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def write_long_clips(folder: Path) -> None:
    """Clips of coarse noise, with captions."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(LONG_CLIPS):
        coarse = torch.randint(256, (LONGEST, 4, 6, 3), generator=generator, dtype=torch.uint8)
        write_video(folder / f"{number}.mp4", coarse.repeat_interleave(16, 1).repeat_interleave(16, 2), 8.0)
        (folder / f"{number}.txt").write_text(f"noise {number}", encoding="utf-8")


def train(run: Run, inputs: Path, tree: Path, root: Path, renamed: Mapping[str, str]) -> None:
    """Train by the code of `tree`; a run that is there already is left as it is."""
    if (root / "checkpoints" / "last.ckpt").exists():
        return
    recipes = [word for recipe in (run.recipe, str(inputs / "recipe.yaml")) if recipe for word in ("-c", recipe)]
    keys = {"trainer.default_root_dir": root} | run.keys
    options = [word for key, value in keys.items() for word in (f"--{renamed.get(key, key)}", str(value))]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] += f":{ROOT / 'tests' / 'stand_ins'}"  # for Cosmos' safety checker
    command = [sys.executable, "-m", "lightning_dfd", "fit", *recipes, *options]
    done = subprocess.run(command, cwd=tree, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{run.name} failed at {tree}:\n{done.stdout}")


def differences(before: Path, after: Path) -> list[str]:
    """What two runs' logs and trained weights do not share, in words."""
    found = []
    old, new = logged(before), logged(after)
    shared = [name for name in old if name in new and name.startswith(("train/", "val/")) and "samples" not in name]
    missing = [name for name in SHARED if name not in shared]
    found += [f"{name} is not logged by both" for name in missing]
    for name in shared:
        if old[name] != new[name]:
            step = next(i for i, (a, b) in enumerate(zip(old[name], new[name], strict=False)) if a != b)
            found.append(f"{name} differs from row {step} on: {old[name][step]} and {new[name][step]}")
    gone, come = weights(before), weights(after)
    if gone != come:
        found.append(f"{(gone - come).total()} of {gone.total()} trained tensors differ")
    return found


def logged(root: Path) -> dict[str, list[str]]:
    with (root / "metrics" / "only" / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def weights(root: Path) -> Counter[str]:
    """How often each tensor, by its content, is in a run's last checkpoint."""
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kinds = (f"{tuple(value.shape)} {value.dtype}".encode() for value in state.values())
    return Counter(
        hashlib.sha256(kind + value.contiguous().numpy().tobytes()).hexdigest()
        for kind, value in zip(kinds, state.values(), strict=True)
    )


def worktrees(revisions: Mapping[str, str], folder: Path) -> Iterator[Path]:
    """A worktree of each revision, as it is committed."""
    for side, revision in revisions.items():
        commit = subprocess.check_output(["git", "rev-parse", "--short", revision], cwd=ROOT, text=True).strip()
        tree = folder / f"{side}_{commit}"
        if not tree.exists():
            subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), commit], cwd=ROOT, check=True)
        yield tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="the older revision")
    parser.add_argument("after", nargs="?", default="HEAD", help="the newer one [HEAD]")
    parser.add_argument("--output", type=Path, default=Path("outputs/loss_compare"))
    parser.add_argument("--only", default="", help="runs whose names hold this, e.g. 'lora, one process'")
    args = parser.parse_args()
    output = args.output.resolve()
    inputs = output / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()  # of every tiny teacher's files
    prepare(inputs)
    before, after = worktrees({"before": args.before, "after": args.after}, output / "trees")
    results: dict[str, list[str]] = {}
    for run in tqdm(runs(inputs, args.only), desc="runs"):
        roots = {tree: output / "runs" / tree.name / run.folder for tree in (before, after)}
        for tree, root in roots.items():
            train(run, inputs, tree, root, RENAMED if tree == before else {})
        results[run.name] = differences(*roots.values())
        for line in results[run.name]:
            tqdm.write(f"{run.name}: {line}")
    (output / "result.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    equal = sum(not lines for lines in results.values())
    print(f"{before.name} and {after.name}: {equal} of {len(results)} runs are equal bit by bit")
    sys.exit(equal < len(results))


if __name__ == "__main__":
    main()
