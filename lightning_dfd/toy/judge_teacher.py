"""Judge the toy teacher by its own samples: it has to know its world, and to need guidance as large teachers do.

    python -m lightning_dfd.toy.judge_teacher

Samples 600 clips from the stock pipeline in each of three ways, reads them by plain code and prints a table. The exit
code is 1 if a bound does not hold. It takes about ten minutes on one CPU thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXPipeline
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_dfd.toy import world
from lightning_dfd.toy.measure import WorldReport, compare_with_world
from lightning_dfd.toy.tables import table

TEACHER = Path(__file__).parent / "teacher"
GUIDANCE = 3.0  # at which the toy recipes distil
TEXT_LENGTH = 8  # tokens, padding included


@dataclass(frozen=True)
class Bound:
    """What has to hold of a report, in words and as a test of it."""

    said: str
    holds: Callable[[WorldReport], bool]


@dataclass(frozen=True)
class Way:
    """One way to sample the teacher, and what has to hold then."""

    name: str
    steps: int
    guidance: float
    bounds: tuple[Bound, ...]


def relative(strength: float, right: bool) -> float:
    return strength / world.mean_strength(right)


WAYS = (
    Way("50 steps without guidance", 50, 1.0, (
        Bound("obeys 60 to 85 %", lambda report: 0.6 <= report.obedience <= 0.85),
        Bound("every share within 5 points of the world's", lambda report: max(report.worst_gap.values()) <= 0.05),
        Bound("colours within 3 % of the world's", lambda report: abs(relative(report.strength, False) - 1) <= 0.03),
    )),
    Way(f"50 steps at guidance {GUIDANCE:g}", 50, GUIDANCE, (
        Bound("obeys at least 97 %", lambda report: report.obedience >= 0.97),
        Bound("has lost a fifth of the kinds", lambda report: report.kinds <= 0.8 * world.effective_kinds()),
        Bound("colours at least 8 % too strong", lambda report: relative(report.strength, True) >= 1.08),
    )),
    Way("4 steps without guidance", 4, 1.0, (
        Bound("obeys at most 70 %, or a factor of 15 % cannot be read",
              lambda report: report.obedience <= 0.7 or report.readable <= 0.85),
    )),
)  # fmt: skip


@torch.no_grad()
def sample_clips(pipe: Any, captions: Sequence[str], seed: int, steps: int, guidance: float) -> NDArray[np.uint8]:
    """Clips, uint8 [N, F, H, W, C], from the pipeline's own call."""
    pipe.set_progress_bar_config(disable=True)
    clips = []
    for start in tqdm(range(0, len(captions), 60), desc=f"{steps} steps at guidance {guidance:g}"):
        frames = pipe(
            list(captions[start : start + 60]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXT_LENGTH,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="np",
        ).frames
        clips.append(np.rint(np.asarray(frames) * 255).astype(np.uint8))
    return np.concatenate(clips)


def judge_teacher(folder: Path, clips: int, ways: Sequence[Way] = WAYS, seed: int = 0) -> list[WorldReport]:
    """A report for each of `ways` on so many clips of the pipeline in `folder`, captions in equal numbers."""
    pipe: Any = CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    captions = [world.CAPTIONS[i % len(world.CAPTIONS)] for i in range(clips)]
    return [compare_with_world(sample_clips(pipe, captions, seed, way.steps, way.guidance), captions) for way in ways]


def broken_bounds(reports: Sequence[WorldReport], ways: Sequence[Way] = WAYS) -> list[str]:
    """What does not hold, in words."""
    return [
        f"{way.name}: {bound.said}"
        for way, report in zip(ways, reports, strict=True)
        for bound in way.bounds
        if not bound.holds(report)
    ]


def table_of(reports: Sequence[WorldReport]) -> str:
    """The reports as a Markdown table, the world's own truth in its last row."""
    rows = []
    for way, report in zip(WAYS, reports, strict=True):
        factor = max(report.worst_gap, key=lambda name: report.worst_gap[name])
        worst = f"{factor}, off by {100 * report.worst_gap[factor]:.1f} points"
        shares = (f"{100 * share:.1f} %" for share in (report.obedience, report.readable))
        rows.append((way.name, *shares, f"{report.kinds:.1f}", f"{report.strength:.3f}", worst))
    kinds = f"{world.effective_kinds():.1f}"
    for said, right in (("the world", False), ("its clips whose captions are right", True)):
        obedience = "100 %" if right else f"{100 * world.right_share():.1f} %"
        rows.append((said, obedience, "100 %", kinds, f"{world.mean_strength(right):.3f}", ""))
    return table(("", "obeys", "readable", "effective kinds", "strength of colour", "worst share"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--clips", type=int, default=600, help="sampled in each way")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reports = judge_teacher(args.teacher, args.clips)
    print(table_of(reports))
    broken = broken_bounds(reports)
    if broken:
        sys.exit("does not hold: " + "; ".join(broken))


if __name__ == "__main__":
    main()
