"""What DMD2 loses and what data forcing gives back, measured in a video world whose truth is known: docs/study.md.

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lightning_dfd.cli.trainer import DistillationTrainer
from lightning_dfd.data import VideoDataModule, list_clips, write_cache
from lightning_dfd.evaluation.generation import generate_videos, requests_for
from lightning_dfd.evaluation.metrics import VideoSuite
from lightning_dfd.evaluation.pictures import to_frames
from lightning_dfd.files import write_text
from lightning_dfd.toy import world
from lightning_dfd.toy.dataset import write_world
from lightning_dfd.toy.features import WorldReadings
from lightning_dfd.toy.judge_teacher import TEACHER
from lightning_dfd.toy.measure import read_clip, report_of
from lightning_dfd.toy.study_arms import Arm, all_arms
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

SIZE = VideoSize(world.FRAMES, world.SIZE, world.SIZE)
STEPS = {4: [0.999, 0.749, 0.499, 0.249], 2: [0.999, 0.499]}
READINGS = WorldReadings()


@dataclass(frozen=True)
class Scale:
    """How large the study is.

    `distil` are the iterations of DMD2 from the teacher, `go_on` those of what follows, `long` those of arms that show
    how long a recipe stays good. Arms are also measured after so many iterations: `curve` from the teacher, `looks` of
    what follows. `clips` are trained on, `real` ones compared with, `videos` sampled for a caption.
    """

    seeds: int
    distil: int
    go_on: int
    long: int
    curve: tuple[int, ...]
    looks: tuple[int, ...]
    clips: int
    real: int
    videos: int


FULL = Scale(
    seeds=5, distil=2000, go_on=600, long=1800, curve=(250, 500, 1000), looks=(200, 600, 1200), clips=480, real=600,
    videos=24,
)  # fmt: skip
QUICK = Scale(
    seeds=1, distil=20, go_on=6, long=8, curve=(10,), looks=(3,), clips=96, real=120, videos=4,
)  # fmt: skip


# ---- one arm --------------------------------------------------------------------------------------------------


def build_module(arm: Arm, seed: int, init_from: Path | None) -> DistillationModule:
    """The arm as a module, with what toy_dmd2.yaml sets for all."""
    adamw = partial(torch.optim.AdamW, betas=(0.0, 0.999), weight_decay=0.01)
    return DistillationModule(
        str(TEACHER),
        student=StudentSettings(mode=arm.mode, rank=32, input=arm.input, ema_decay=0.9),
        sampling=SamplingSettings(steps=STEPS[arm.steps]),
        dmd=DMDSettings(guidance=arm.guidance, student_update_freq=arm.student_update_freq),
        data_forcing=DataForcingSettings(**arm.forcing),
        gan=GANSettings(**arm.gan),
        diversity=DiversitySettings(**arm.diversity),
        terms=[term() for term in arm.terms],
        student_optimizer=partial(adamw, lr=arm.rate),
        fake_optimizer=partial(adamw, lr=arm.fake_rate),
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
        cache=str(cache_of(folder, arm, scale)), frames=SIZE.frames, height=SIZE.height, width=SIZE.width,
        fps=world.FPS, batch_size=8, seed=own_seed,
    )  # fmt: skip
    start = None if arm.start is None else checkpoint_of(folder, arm.start, seed)
    module = build_module(arm, own_seed, start)
    found: dict[int, dict[str, float]] = {}

    def look(iterations: int) -> None:
        found[iterations] = measure(module, arm.role or module.best_student, seed, folder, scale)

    iterations = 0
    if arm.role is not None:
        module.configure_model()
    else:
        iterations = scale.distil if arm.start is None else scale.long if arm.long else scale.go_on
        looks = [at for at in (scale.curve if arm.start is None else scale.looks) if at < iterations]
        trainer = DistillationTrainer(
            max_steps=iterations, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[Look(looks, look)],
            default_root_dir=str(folder),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        if arm.start is None:
            trainer.save_checkpoint(checkpoint_of(folder, arm.name, seed))
    look(iterations)
    write_result(folder, arm.name, arm.group, seed, iterations, found)


def be_quiet() -> None:
    """Keep what `lightning fit` would say once from burying the study's progress bar."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def cache_of(folder: Path, arm: Arm, scale: Scale) -> Path:
    kind = "curated" if arm.curated else "noisy"
    return folder / "clips" / f"{kind} {arm.clips or scale.clips} cache"


def checkpoint_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "checkpoints" / f"{name} {seed}.ckpt"


def result_of(folder: Path, name: str, seed: int) -> Path:
    return folder / "results" / f"{name} {seed}.json"


def write_result(
    folder: Path, name: str, group: str, seed: int, iterations: int, measured: Mapping[int, Mapping[str, float]]
) -> None:
    """The file that says that this arm is done with this seed; it appears only when it is complete."""
    record = {"arm": name, "group": group, "seed": seed, "iterations": iterations, "measured": measured}
    write_text(result_of(folder, name, seed), json.dumps(record, indent=1))


# ---- measures -------------------------------------------------------------------------------------------------


def measure(module: DistillationModule, role: Role, seed: int, folder: Path, scale: Scale) -> dict[str, float]:
    """Every measure of the study on `scale.videos` videos of each caption."""
    first = 10_000 * (seed + 1)  # no two seeds of the study share a noise
    requests = requests_for(world.CAPTIONS, range(first, first + scale.videos))
    videos = []
    for begin in range(0, len(requests), 48):
        with torch.no_grad():
            videos.append(generate_videos(module, role, requests[begin : begin + 48], SIZE))
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    return measure_videos(torch.cat(videos), prompts, seeds, folder)


def measure_videos(videos: Tensor, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> dict[str, float]:
    """Metrics of videos [B, C, F, H, W] in [-1, 1], and what the world's own measuring code reads from them.

    `colour` is their mean strength over that of clips whose captions are right. `shares_gap` is the total variation
    between the shares of a factor's values, from typical to rare, and the world's: the mean over factors.
    """
    suite = VideoSuite(READINGS, READINGS, min_videos=2)
    suite.load_real_state(load_file(folder / "real.safetensors"))
    for begin in range(0, len(videos), 48):
        part = slice(begin, begin + 48)
        suite.update(videos[part], prompts[part], seeds[part])
    report = report_of([read_clip(clip) for clip in to_frames(videos).numpy()], prompts)
    gaps = [
        0.5 * sum(abs(found - true) for found, true in zip(report.shares[factor], (*shares, 0.0), strict=True))
        for factor, shares in world.SHARES.items()
    ]
    return suite.compute() | {
        "kinds": report.kinds,
        "colour": report.strength / world.mean_strength(right=True),
        "obedience": report.obedience,
        "readable": report.readable,
        "shares_gap": sum(gaps) / len(gaps),
    }


# ---- the whole ------------------------------------------------------------------------------------------------


def prepare(folder: Path, scale: Scale, arms: Sequence[Arm]) -> None:
    """The training clips as caches, the moments of real clips, and the world measured as if it were an arm."""
    for name in ("results", "checkpoints", "clips"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    module = build_module(Arm("", ""), 0, None)
    for cache, arm in {cache_of(folder, arm, scale): arm for arm in arms}.items():
        clips = cache.with_name(cache.name.removesuffix(" cache"))
        write_world(clips, arm.clips or scale.clips, seed=0, right=arm.curated)
        write_cache(
            module.backbone, list_clips(clips).clips, cache, SIZE, world.FPS, negative_prompts=[""], batch_size=16
        )
    if not (folder / "real.safetensors").is_file():
        suite = VideoSuite(READINGS, READINGS, min_videos=2)
        for videos in to_model(world.draw_clips(scale.real, seed=500, right=True)[1]).split(48):
            suite.update_real(videos)
        save_file(suite.real_state(), folder / "real.safetensors")
    for seed in range(scale.seeds):
        for right, name in ((False, "the world"), (True, "its clips with right captions")):
            if not result_of(folder, name, seed).is_file():
                videos, captions = captioned_videos(scale.videos, seed=600 + seed, right=right)
                found = measure_videos(videos, captions, range(len(captions)), folder)
                write_result(folder, name, "world", seed, 0, {0: found})


def captioned_videos(each: int, seed: int, right: bool) -> tuple[Tensor, list[str]]:
    """`each` of the world's own videos [N, C, F, H, W] for every caption, as students are measured."""
    found: dict[str, list[world.Scene]] = {text: [] for text in world.CAPTIONS}
    for scene in world.draw_scenes(8 * each * len(world.CAPTIONS), seed, right):
        found[scene.caption].append(scene)
    scenes = [scene for of_caption in found.values() for scene in of_caption[:each]]
    return to_model(np.stack([world.render(scene) for scene in scenes])), [scene.caption for scene in scenes]


def run_study(folder: Path, scale: Scale, arms: Sequence[Arm], workers: int) -> None:
    """Run what has no result yet; arms that others start from go first."""
    prepare(folder, scale, arms)
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
    parser.add_argument("--only", help="only arms whose names begin with this, and what they start from")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    args = parser.parse_args()
    scale, arms = (QUICK if args.quick else FULL), all_arms()
    if args.only:
        picked = [arm for arm in arms if arm.name.startswith(args.only)]
        arms = [arm for arm in arms if arm in picked or arm.name in {other.start for other in picked}]
    if not args.report:
        run_study(args.output, scale, arms, args.workers)
    write_report(args.output, [arm.name for arm in all_arms()])
    print(f"\nOpen {args.output / 'report.md'}")


if __name__ == "__main__":
    main()
