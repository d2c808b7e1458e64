"""Kills toy runs at random, starts them again, and compares their ends with those of uninterrupted runs, bit by bit.

    python -m tests.faults.kills --kills 60 --output outputs/kills      (or: make kills)

A run of a few iterations, with everything that has a state (two optimizers, a discriminator, moving average,
schedulers, accumulation, data forcing, alarms, logs), is started again and again with one command line, which ends in
`--ckpt_path last`, and killed at random: mostly by SIGKILL of all its processes, now and then by SIGTERM or SIGUSR1.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_dfd.cli import main as cli
from lightning_dfd.data import write_video
from lightning_dfd.files import replacing
from lightning_dfd.runs.checkpoints import OURS, newest_whole, read_checkpoint
from lightning_dfd.testing.tiny import TEXT_LENGTH, save_tiny
from lightning_dfd.toy.world import draw_clips

ROOT = Path(__file__).parents[2]
ITERATIONS = 16
KILLS_OF_A_RUN = 5
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1)
DDP = {"trainer.devices": 2, "trainer.strategy": "ddp_find_unused_parameters_true"}
SHARDED = json.dumps({"class_path": "lightning_dfd.FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}})
VARIANTS: dict[str, dict[str, Any]] = {
    "lora, 0 workers": {},
    "lora, 2 workers": {"data.num_workers": 2},
    "full, 0 workers": {"model.student.mode": "full"},
    "full, 2 workers": {"model.student.mode": "full", "data.num_workers": 2},
    "lora, 2 processes": DDP,
    "full, 2 processes, sharded": {"model.student.mode": "full", "trainer.devices": 2, "trainer.strategy": SHARDED},
}


class Bell(Callback):
    """Writes the number of every iteration that begins to a file, by which the killer takes aim."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            with replacing(self.path) as temporary:  # a kill must leave a number
                temporary.write_text(str(trainer.global_step), encoding="utf-8")


@dataclass
class Tally:
    """Of one variant. `bit_equal` and `lost` count runs: the latter could not be continued, or ended elsewhere."""

    variant: str
    kills: int = 0
    signals: dict[str, int] = field(default_factory=dict)
    while_saving: int = 0
    iterations_again: int = 0
    runs: int = 0
    bit_equal: int = 0
    lost: list[str] = field(default_factory=list)


# ---- the run --------------------------------------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """A tiny teacher, eight clips, their cache, and the recipe."""
    save_tiny("wan", folder / "teacher")
    scenes, clips = draw_clips(8, seed=0)
    (folder / "videos").mkdir()
    for number, (scene, clip) in enumerate(zip(scenes, clips, strict=True)):
        write_video(folder / "videos" / f"{number}.mp4", clip, 8)
        (folder / "videos" / f"{number}.txt").write_text(scene.caption, encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder)), encoding="utf-8")
    code = wait(start(["cache", "-c", str(folder / "recipe.yaml")], folder / "cache.log"))
    if code:
        raise RuntimeError(f"the cache could not be made (exit code {code}); see {folder / 'cache.log'}")


def recipe(folder: Path) -> dict[str, Any]:
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    root = "${trainer.default_root_dir}"
    keep = {"dirpath": f"{root}/checkpoints", "filename": "{step}", "every_n_train_steps": 2, "save_top_k": 1}
    keep |= {"save_last": True, "enable_version_counter": False}
    logs = {"save_dir": root, "name": "metrics", "flush_logs_every_n_steps": 1}
    return {
        "seed_everything": 0,
        "trainer": {
            "max_steps": ITERATIONS, "max_epochs": -1, "devices": 1, "accelerator": "cpu", "log_every_n_steps": 1,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder / "run"),
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logs}],
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep},
                {"class_path": "lightning_dfd.callbacks.RunHealth", "init_args": {"every": 1}},
                {"class_path": "tests.faults.kills.Bell", "init_args": {"path": f"{root}.bell"}},
            ],
        },
        "model": {
            "teacher": str(folder / "teacher"), "max_sequence_length": TEXT_LENGTH, "accumulate": 2,
            "student": {"rank": 4, "ema_decay": 0.9}, "gan": {"weight": 0.03}, "data_forcing": {"probability": 0.5},
            "dmd": {"student_update_freq": 3}, "student_optimizer": adamw, "fake_optimizer": adamw,
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": 4}},
        },
        "data": {
            "folder": str(folder / "videos"), "cache": str(folder / "cache"), "frames": 9, "height": 32, "width": 32,
            "fps": 8, "batch_size": 2,
        },
    }  # fmt: skip


def command(folder: Path, root: Path, settings: Mapping[str, Any]) -> list[str]:
    """The one command line that starts the run and goes on with it."""
    options = {"trainer.default_root_dir": root, "ckpt_path": "last"} | settings
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return ["fit", "-c", str(folder / "recipe.yaml"), *words]


def start(words: Sequence[str], log: Path, afresh: bool = False) -> int:
    """The id of a new process, first of its group, that runs the command line.

    It is forked from this one, which has imported everything; `afresh` starts Python anew, as DDP's launcher does
    for its other processes.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(ROOT)
        if afresh:
            os.execv(sys.executable, [sys.executable, "-m", "lightning_dfd", *words])
        cli.main(words)
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The exit code, negative for a signal. What is left of the group ends too, as it would with its machine, while
    the dead first process still keeps the group's number from being given to another."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- the killing ----------------------------------------------------------------------------------------------


def kill_at(pid: int, bell: Path, iteration: int, number: int, chance: random.Random) -> bool:
    """Wait for `iteration` to begin and a random part of it or of the next two, then kill; False if it had ended."""
    first, began, now = -1, 0.0, -1
    while now < iteration:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            return False
        time.sleep(0.005)
        now = int(bell.read_text(encoding="utf-8")) if bell.is_file() else -1
        if first < 0 <= now:
            first, began = now, time.perf_counter()
    pace = (time.perf_counter() - began) / (now - first) if now > first else 0.2
    time.sleep(chance.uniform(0, 2 * pace))
    if number == signal.SIGKILL:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
    return True


def kill_often(words: Sequence[str], root: Path, numbers: Sequence[int], tally: Tally, chance: random.Random) -> None:
    """Start and kill the run as often as there are `numbers`; raises RuntimeError where it does not go on."""
    bell, log, afresh = Path(f"{root}.bell"), Path(f"{root}.log"), "--trainer.devices" in words
    points = sorted(chance.randrange(ITERATIONS) for _ in numbers)
    for number, point in zip(numbers, points, strict=True):
        bell.unlink(missing_ok=True)
        pid = start(words, log, afresh)
        if not kill_at(pid, bell, point, number, chance):
            wait(pid)
            saved = read_checkpoint(root / "checkpoints" / "last.ckpt", lazily=True)["global_step"]
            if saved != ITERATIONS:
                raise RuntimeError(f"the run ended by itself at iteration {saved}; see {log}")
            return  # it was done before it could be killed
        code = wait(pid)
        reached = int(bell.read_text(encoding="utf-8"))
        last = newest_whole((root / "checkpoints").glob("*.ckpt"))
        saved = 0 if last is None else int(read_checkpoint(last, lazily=True)["global_step"])
        tally.kills += 1
        name = signal.Signals(number).name
        tally.signals[name] = tally.signals.get(name, 0) + 1
        tally.while_saving += is_half_saved(root / "checkpoints")
        tally.iterations_again += max(0, reached - saved)
        if number != signal.SIGKILL and saved < ITERATIONS and (code != 128 + number or saved < reached):
            raise RuntimeError(f"{name} in iteration {reached + 1}: exit code {code}, saved was iteration {saved}")


def is_half_saved(folder: Path) -> bool:
    """Whether a checkpoint was being written: a file that has not got its name, or a second folder of shards."""
    sharded = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return any(folder.rglob(".*.tmp")) or any(sum(one.is_dir() for one in path.iterdir()) > 1 for path in sharded)


def outcome(root: Path) -> dict[str, Any]:
    """Everything by which two runs are compared: the last checkpoint without paths, and the logs without times."""
    checkpoint = read_checkpoint(root / "checkpoints" / "last.ckpt")
    checkpoint["callbacks"] = {key: value for key, value in checkpoint["callbacks"].items() if "RunHealth" in key}
    checkpoint[OURS].pop("logs")
    # A start that was killed before its first checkpoint leaves a log of its own; the run's is the newest.
    file = max((root / "metrics").rglob("metrics.csv"), key=lambda path: int(path.parent.name.partition("_")[2]))
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    logs = [{key: row[key] for key in sorted(row) if key != "train/samples_per_s"} for row in rows]
    return {name: checkpoint[name] for name in sorted(checkpoint)} | {"logs": logs}


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    """Where two nested structures differ, bit by bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield at
    elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from differences(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{at}/{index}")
    elif type(a) is not type(b) or a != b:
        yield at


def killed_runs(folder: Path, name: str, kills: int, chance: random.Random) -> Tally:
    """Runs of one variant, killed `kills` times together, each compared with the uninterrupted one."""
    tally, settings = Tally(name), VARIANTS[name]
    slug = name.replace(", ", "_").replace(" ", "")
    whole = folder / f"{slug}_whole"
    afresh = "trainer.devices" in settings
    if wait(start(command(folder, whole, settings), Path(f"{whole}.log"), afresh)):
        raise RuntimeError(f"the uninterrupted run failed; see {whole}.log")
    expected, numbers = outcome(whole), list(islice(cycle(SIGNALS), kills))
    for first in range(0, kills, KILLS_OF_A_RUN):
        root = folder / f"{slug}_{first}"
        words = command(folder, root, settings)
        tally.runs += 1
        try:
            kill_often(words, root, numbers[first : first + KILLS_OF_A_RUN], tally, chance)
            code = wait(start(words, Path(f"{root}.log"), afresh))
            wrong = [f"exit code {code}"] if code else [*differences(expected, outcome(root))]
        except (RuntimeError, OSError, ValueError) as error:
            wrong = [str(error)]
        if wrong:
            tally.lost.append(f"{root.name}: {', '.join(wrong[:5])}")
        else:
            tally.bit_equal += 1
            shutil.rmtree(root)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of all variants together")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, default=Path("outputs/kills"), help="folder, made anew")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    prepare(folder)
    tallies, began = [], time.perf_counter()
    for index, name in enumerate(given.variants):
        share = given.kills // len(given.variants) + (index < given.kills % len(given.variants))
        if share:
            tallies.append(killed_runs(folder, name, share, random.Random(f"{given.seed} {name}")))
            print(row(tallies[-1]), flush=True)
    report = {
        "kills": sum(tally.kills for tally in tallies),
        "runs": sum(tally.runs for tally in tallies),
        "bit_equal": sum(tally.bit_equal for tally in tallies),
        "lost": sum(len(tally.lost) for tally in tallies),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "variants": [asdict(tally) for tally in tallies],
    }
    (folder / "kills.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "variants"}))
    sys.exit(report["lost"] > 0)


def row(tally: Tally) -> str:
    signals = ", ".join(f"{count} {name}" for name, count in tally.signals.items())
    return (
        f"| {tally.variant} | {tally.kills} ({signals}) | {tally.while_saving} | {tally.iterations_again} | "
        f"{tally.bit_equal} of {tally.runs} | {'; '.join(tally.lost) or 'none'} |"
    )


if __name__ == "__main__":
    main()
