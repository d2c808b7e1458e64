"""Runs the arms of the study in the exact world, each seed in a process of its own.

Every run writes one JSON file when it is complete, so that a study that was broken off goes on.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lightning_dfd.files import write_text
from lightning_dfd.toy.mixture.arms import Arm, all_arms
from lightning_dfd.toy.mixture.training import CPU, Network, Pair, fit_teacher, judge, train
from lightning_dfd.toy.mixture.world import CAPTIONS, Measures, World, measure


@dataclass(frozen=True)
class Scale:
    """How large a study is.

    Args:
        seeds: of runs.
        shorter: iterations are divided by it.
        fit: iterations of the network that all arms start from.
        samples: measured at each look.
    """

    seeds: Sequence[int] = tuple(range(10, 20))
    shorter: int = 1
    fit: int = 4000
    samples: int = 8000


FULL = Scale()
QUICK = Scale(seeds=(10, 11), shorter=50, fit=200, samples=800)


def result_of(folder: Path, name: str, seed: int) -> Path:
    """The file that says that this arm is done with this seed."""
    return folder / "results" / f"{name} {seed}.json"


def pair_of(folder: Path, name: str, seed: int) -> Path:
    """Student and fake score at the end of an arm, from which others go on."""
    return folder / "checkpoints" / f"{name} {seed}.safetensors"


def start_network(folder: Path, world: World, scale: Scale) -> Network:
    """The network that all arms start from, fitted once."""
    path = folder / "checkpoints" / "start.safetensors"
    if not path.is_file():
        Pair(fit_teacher(world, iterations=scale.fit)).save(path)
    return Pair.load(path).student


def run_arm(arm: Arm, seed: int, world: World, folder: Path, scale: Scale) -> None:
    """Train and measure one arm with one seed, and write its result."""
    began = time.process_time()
    found: dict[int, Measures] = {}
    if arm.method is None:
        found[0] = _without_training(arm, world, seed, scale)
    else:
        start = start_network(folder, world, scale)
        pair = Pair.load(pair_of(folder, arm.start, seed)) if arm.start else Pair(start)
        looks = [max(arm.method.student_update_freq, look // scale.shorter) for look in arm.looks]
        # another stream of clips and noise than DMD2's
        training = train(world, start, pair, arm.method, 2 * seed + bool(arm.start), looks)
        for look, _ in zip(arm.looks, training, strict=True):
            found[look] = judge(world, pair.student, arm.method.steps, seed, scale.samples)
        if not arm.start:
            pair.save(pair_of(folder, arm.name, seed))
    measured = {look: values._asdict() for look, values in found.items()}
    record = {"arm": arm.name, "seed": seed, "seconds": time.process_time() - began, "measured": measured}
    write_text(result_of(folder, arm.name, seed), json.dumps(record, indent=1))


def _without_training(arm: Arm, world: World, seed: int, scale: Scale) -> Measures:
    """The exact teacher's samples or, where an arm says no guidance, the world's own."""
    if arm.guidance is None:
        captions = torch.arange(scale.samples) % CAPTIONS
        return measure(world, world.draw(captions, torch.Generator(CPU).manual_seed(seed)), captions)
    return judge(world, partial(world.teacher, guidance=arm.guidance), arm.steps, seed, scale.samples)


def run_study(folder: Path, scale: Scale, arms: Sequence[Arm], workers: int) -> None:
    """Run what has no result yet, each seed in a process of its own."""
    start_network(folder, World(), scale)
    names = [arm.name for arm in arms]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(run_seed, names, seed, folder, scale) for seed in scale.seeds]
        for future in tqdm(concurrent.futures.as_completed(futures), "study", len(futures), unit="seed"):
            future.result()


def run_seed(names: Sequence[str], seed: int, folder: Path, scale: Scale) -> None:
    """All arms of these names that have no result yet. An arm itself holds functions, which no process can send."""
    torch.set_num_threads(1)
    world = World()
    for arm in all_arms():
        if arm.name in names and not result_of(folder, arm.name, seed).is_file():
            run_arm(arm, seed, world, folder, scale)
