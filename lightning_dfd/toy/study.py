"""What data forcing does, measured in a world whose diversity is known: the study of docs/study.md.

    python -m lightning_dfd.toy.study --output outputs/study [--quick]

Every arm is trained and measured once for each seed, in a process of its own, and leaves one JSON file; a study that
was broken off goes on with the arms that are missing. `report` turns the files into tables and figures. The arms, the
measures and how they are read were written down in docs/study.md before the first run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import logging
import multiprocessing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.cli.trainer import DistillationTrainer
from lightning_dfd.data import VideoDataModule, list_clips, write_cache
from lightning_dfd.evaluation.generation import generate_videos, requests_for
from lightning_dfd.evaluation.metrics import FrechetVideoDistance, VideoSuite
from lightning_dfd.evaluation.pictures import to_frames
from lightning_dfd.files import replacing
from lightning_dfd.toy import world
from lightning_dfd.toy.dataset import write_world
from lightning_dfd.toy.features import WorldReadings
from lightning_dfd.toy.measure import FREE_FACTORS, NOTHING, read_clip
from lightning_dfd.toy.study_report import write_report
from lightning_dfd.toy.train_teacher import to_model
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.settings import (
    DataForcingSettings,
    DiversitySettings,
    DMDSettings,
    GANSettings,
    SamplingSettings,
    StudentSettings,
)
from lightning_dfd.types import Role, VideoSize

TEACHER = Path(__file__).parent / "teacher"
SIZE = VideoSize(world.FRAMES, world.SIZE, world.SIZE)
GUIDANCE = 2.0
STEPS = {4: [0.999, 0.749, 0.499, 0.249], 2: [0.999, 0.499]}
READINGS = WorldReadings()


@dataclass(frozen=True)
class Scale:
    """How large the study is."""

    seeds: int
    distil: int  # iterations of DMD2 from the teacher
    go_on: int  # iterations of what follows
    looks: tuple[int, ...]  # also measured after so many of these
    clips: int  # training clips
    real: int  # clips of the world to compare with
    videos: int  # sampled for a caption


FULL = Scale(seeds=3, distil=500, go_on=300, looks=(100,), clips=480, real=600, videos=16)
QUICK = Scale(seeds=1, distil=40, go_on=10, looks=(5,), clips=96, real=120, videos=4)


@dataclass(frozen=True)
class Arm:
    """One way to make a student; with a `role` nothing is trained and that one is measured.

    `start` names the arm whose student and fake score it goes on from; None is the teacher.
    """

    name: str
    group: str
    start: str | None = None
    input: str = "data"
    steps: int = 4
    guidance: float = GUIDANCE
    forcing: Mapping[str, Any] = field(default_factory=dict)
    gan: Mapping[str, Any] = field(default_factory=dict)
    diversity: Mapping[str, Any] = field(default_factory=dict)
    role: Role | None = None


def all_arms() -> list[Arm]:
    """Every arm of the study, those that others start from first."""
    arms = [
        Arm(f"teacher s={scale:g}", "teacher", guidance=scale, role="teacher") for scale in (1.0, 1.5, 2.0, 3.0, 4.0)
    ]
    arms.append(Arm("the teacher in 4 unguided steps", "distilled", role="student"))  # an adapter that is still zero
    for kind in ("data", "rollout"):
        arms.append(Arm(f"dmd2 {kind}", "distilled", input=kind))
    arms += [
        Arm("dmd2 data 2 steps", "distilled", steps=2),
        Arm("dmd2+gan rollout", "distilled", input="rollout", gan={"weight": 0.03}),
        Arm("dp-dmd rollout", "distilled", input="rollout", diversity={"weight": 0.05}),
        Arm("forcing from the teacher", "distilled", forcing={"probability": 0.5}),
    ]
    high, unguided, nearest = {"time_range": [0.75, 1.0]}, {"guidance": 1.0}, {"nearest_of": 16}
    half, control = {"probability": 0.5}, {"probability": 0.5, "shown": "gen"}
    levers: dict[str, Mapping[str, Any]] = {
        "continued": {},
        "p=.25": {"probability": 0.25},
        "p=.5": half,
        "p=1": {"probability": 1.0},
        "p=.5 high t": half | high,
        "p=.5 nearest": half | nearest,
        "p=.5 unguided": half | unguided,
        "no data unguided": control | unguided,
        "p=.5 unguided high t": half | unguided | high,
        "no data unguided high t": control | unguided | high,
        "p=.5 unguided nearest": half | unguided | nearest,
        "p=.5 unguided high t nearest": half | unguided | high | nearest,
    }
    for kind in ("data", "rollout"):
        arms += [Arm(f"{name} ({kind})", kind, f"dmd2 {kind}", kind, forcing=keys) for name, keys in levers.items()]
    few = ("continued", "p=.5", "p=.5 unguided", "no data unguided")
    arms += [Arm(f"{name} (2 steps)", "2 steps", "dmd2 data 2 steps", steps=2, forcing=levers[name]) for name in few]
    return arms


# ---- one arm --------------------------------------------------------------------------------------------------


def build_module(arm: Arm, seed: int, init_from: Path | None) -> DistillationModule:
    """The arm as a module, with what toy_dmd2.yaml sets for all."""
    optimizer = partial(torch.optim.AdamW, lr=3e-4, betas=(0.0, 0.999), weight_decay=0.01)
    return DistillationModule(
        str(TEACHER),
        student=StudentSettings(rank=32, input=arm.input, ema_decay=0.9),  # type: ignore[arg-type]
        sampling=SamplingSettings(steps=STEPS[arm.steps]),
        dmd=DMDSettings(guidance=arm.guidance),
        data_forcing=DataForcingSettings(**arm.forcing),
        gan=GANSettings(**arm.gan),
        diversity=DiversitySettings(**arm.diversity),
        student_optimizer=optimizer,
        fake_optimizer=optimizer,
        init_from=None if init_from is None else str(init_from),
        seed=seed,
    )


class Look(Callback):
    """Calls `look(iterations)` after some iterations."""

    def __init__(self, at: Sequence[int], look: Callable[[int], None]) -> None:
        self.at, self.look, self.done = set(at), look, 0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step in self.at and trainer.global_step != self.done:
            self.done = trainer.global_step
            with torch.random.fork_rng():
                self.look(trainer.global_step)


def run_arm(arm: Arm, seed: int, folder: Path, scale: Scale) -> None:
    """Train and measure one arm with one seed; writes `<folder>/results/<arm> <seed>.json`."""
    torch.set_num_threads(1)
    be_quiet()
    own_seed = seed if arm.start is None else seed + 1000  # going on must not meet the start's clips and noise again
    data = VideoDataModule(
        cache=str(folder / "cache"), frames=SIZE.frames, height=SIZE.height, width=SIZE.width, fps=world.FPS,
        batch_size=8, seed=own_seed,
    )  # fmt: skip
    start = None if arm.start is None else checkpoint_of(folder, arm.start, seed)
    module = build_module(arm, own_seed, start)
    found: dict[int, dict[str, float]] = {}

    def look(iterations: int, last: bool = False) -> None:
        found[iterations] = measure(module, arm.role or module.best_student, seed, folder, scale, pretrained=last)

    iterations = 0
    if arm.role is not None:
        module.configure_model()
    else:
        iterations = scale.distil if arm.start is None else scale.go_on
        looks = () if arm.start is None else scale.looks
        trainer = DistillationTrainer(
            max_steps=iterations, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Look(looks, look)],
            default_root_dir=str(folder),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        if arm.start is None:
            trainer.save_checkpoint(checkpoint_of(folder, arm.name, seed))
    look(iterations, last=True)
    write_result(folder, arm.name, arm.group, seed, iterations, found)


def be_quiet() -> None:
    """Keep what `lightning fit` would say once from burying the study's progress bar."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def checkpoint_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "checkpoints" / f"{name} {seed}.ckpt"


def result_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "results" / f"{name} {seed}.json"


def write_result(
    folder: Path, name: str, group: str, seed: int, iterations: int, measured: Mapping[int, Mapping[str, float]]
) -> None:
    """The file that says that this arm is done with this seed; it appears only when it is complete."""
    record = {"arm": name, "group": group, "seed": seed, "iterations": iterations, "measured": measured}
    with replacing(result_of(folder, name, seed)) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


# ---- measures -------------------------------------------------------------------------------------------------


def measure(
    module: DistillationModule, role: Role, seed: int, folder: Path, scale: Scale, pretrained: bool
) -> dict[str, float]:
    """Every measure of the study on `scale.videos` videos of each caption."""
    first = 10_000 * (seed + 1)  # no two seeds of the study share a noise
    requests = requests_for(world.CAPTIONS, range(first, first + scale.videos))
    videos = []
    for begin in range(0, len(requests), 48):
        with torch.no_grad():
            videos.append(generate_videos(module, role, requests[begin : begin + 48], SIZE))
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    return measure_videos(torch.cat(videos), prompts, seeds, folder, pretrained)


def measure_videos(
    videos: Tensor, prompts: Sequence[str], seeds: Sequence[int], folder: Path, pretrained: bool
) -> dict[str, float]:
    """Metrics of videos [B, C, F, H, W] in [-1, 1], and what the world's own measuring code reads from them.

    With `pretrained` also `transnetv2_fd`, of every other video, as it takes longer than all else.
    """
    suite = VideoSuite(READINGS, READINGS, min_videos=2)
    suite.load_real_state(load_file(folder / "real.safetensors"))
    for begin in range(0, len(videos), 48):
        part = slice(begin, begin + 48)
        suite.update(videos[part], prompts[part], seeds[part])
    values = suite.compute() | world_measures(to_frames(videos).numpy(), prompts)
    if pretrained:
        distance = FrechetVideoDistance("transnetv2", min_samples=2)
        distance.load_real_state(load_file(folder / "real_transnetv2.safetensors"))
        for part in videos[::2].split(48):
            distance.update(part, real=False)
        values["transnetv2_fd"] = float(distance.compute())
    return values


def world_measures(clips: NDArray[np.uint8], captions: Sequence[str]) -> dict[str, float]:
    """What is read from the pixels of clips, uint8 [N, F, H, W, C], against the world's truth.

    `obedience`: share with the caption's shape and colour. `<factor>_gap`: total variation between the shares of a
    free factor's values, unreadable clips among them, and the world's. `modes_gap`: the same for the 24 joint values
    of direction, background and speed. `readable`: share of clips in which all three can be read.
    """
    readings = [read_clip(clip) for clip in clips]
    values: dict[str, float] = {
        "obedience": float(
            np.mean([world.caption(r.colour, r.shape) == c for r, c in zip(readings, captions, strict=True)])
        )
    }
    for factor, shares in FREE_FACTORS.items():
        values[f"{factor}_gap"] = total_variation([getattr(reading, factor) for reading in readings], shares)
        for value in (*shares, NOTHING):
            values[f"{factor} {value}"] = float(np.mean([getattr(reading, factor) == value for reading in readings]))
    joint = {
        f"{d} {b} {s}": p * q * r
        for d, p in world.DIRECTION_SHARES.items()
        for b, q in world.BACKGROUND_SHARES.items()
        for s, r in world.SPEED_SHARES.items()
    }
    modes = [" ".join(str(getattr(reading, factor)) for factor in FREE_FACTORS) for reading in readings]
    values["modes_gap"] = total_variation(modes, joint)
    values["readable"] = float(np.mean([NOTHING not in mode.split() for mode in modes]))
    return values


def total_variation(seen: Sequence[str], shares: Mapping[str, float]) -> float:
    """Half the sum of absolute differences between the shares of values seen and true shares, in [0, 1]."""
    names = {*seen, *shares}
    return 0.5 * sum(abs(seen.count(name) / len(seen) - shares.get(name, 0.0)) for name in names)


# ---- the whole ------------------------------------------------------------------------------------------------


def prepare(folder: Path, scale: Scale) -> None:
    """The training clips as a cache, the moments of real clips, and the world measured as if it were an arm."""
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_world(folder / "data", scale.clips, seed=0)
    module = build_module(Arm("", ""), 0, None)
    write_cache(
        module.backbone, list_clips(folder / "data").clips, folder / "cache", SIZE, world.FPS, negative_prompts=[""],
        batch_size=16,
    )  # fmt: skip
    if not (folder / "real.safetensors").is_file():
        suite, distance = VideoSuite(READINGS, READINGS, min_videos=2), FrechetVideoDistance("transnetv2")
        clips = world.draw_clips(scale.real, seed=500)[1]
        for videos in to_model(clips).split(48):
            suite.update_real(videos)
            distance.update(videos, real=True)
        save_file(distance.real_state(), folder / "real_transnetv2.safetensors")
        save_file(suite.real_state(), folder / "real.safetensors")
    for seed in range(scale.seeds):
        for name, through_vae in (("the world", False), ("the world through the VAE", True)):
            if result_of(folder, name, seed).is_file():
                continue
            videos, captions = captioned_videos(scale.videos, seed=600 + seed)
            if through_vae:
                decode, encode = module.backbone.decode_latents, module.backbone.encode_videos
                videos = torch.cat([decode(encode(part)) for part in videos.split(48)])
            found = measure_videos(videos, captions, range(len(captions)), folder, pretrained=True)
            write_result(folder, name, "world", seed, 0, {0: found})


def captioned_videos(each: int, seed: int) -> tuple[Tensor, list[str]]:
    """`each` of the world's own videos [N, C, F, H, W] for every caption, as students are measured."""
    scenes, clips = world.draw_clips(4 * each * len(world.CAPTIONS), seed)
    picked = [[i for i, scene in enumerate(scenes) if scene.caption == text][:each] for text in world.CAPTIONS]
    rows = [row for rows in picked for row in rows]
    return to_model(clips[rows]), [scenes[row].caption for row in rows]


def run_study(folder: Path, scale: Scale, arms: Sequence[Arm], workers: int) -> None:
    """Run what has no result yet; arms that others start from go first."""
    prepare(folder, scale)
    bases = [arm for arm in arms if arm.start is None]
    with tqdm(total=len(arms) * scale.seeds, desc="study", unit="run") as bar:
        for stage in (bases, [arm for arm in arms if arm.start is not None]):
            jobs = [(arm, seed) for seed in range(scale.seeds) for arm in stage]
            missing = [job for job in jobs if not result_of(folder, job[0].name, job[1]).is_file()]
            bar.update(len(jobs) - len(missing))
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
                futures = [pool.submit(run_arm, arm, seed, folder, scale) for arm, seed in missing]
                for future in concurrent.futures.as_completed(futures):
                    future.result()
                    bar.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/study"))
    parser.add_argument("--quick", action="store_true", help="one seed and few iterations: shows that all arms run")
    parser.add_argument("--report", action="store_true", help="only make tables and figures of the results there are")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    scale = QUICK if args.quick else FULL
    if not args.report:
        run_study(args.output, scale, all_arms(), args.workers)
    write_report(args.output, [arm.name for arm in all_arms()])
    print(f"\nOpen {args.output / 'report.md'}")


if __name__ == "__main__":
    main()
