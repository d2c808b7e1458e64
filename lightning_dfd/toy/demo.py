"""The whole path on the toy world, ending in a page to look at.

    python -m lightning_dfd.toy.demo --output outputs/demo

Videos -> cached latents -> DMD2 -> data forcing -> samples of teacher and both students -> a diffusers export.
Every step is a command of `lightning` with the toy recipes, printed as it runs, so the page shows nothing that
the same commands would not give anybody.
"""

from __future__ import annotations

import argparse
import html
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_dfd.data import list_clips, read_video, write_video
from lightning_dfd.evaluation import pages
from lightning_dfd.evaluation.pictures import contact_sheet, encode_gif, enlarge, video_grid
from lightning_dfd.toy import world
from lightning_dfd.toy.dataset import write_world
from lightning_dfd.toy.measure import WorldReport, read_clip, report_of, standard_errors
from lightning_dfd.types import VideoSize

RECIPES = {"dmd2": "recipes/toy_dmd2.yaml", "dfd": "recipes/toy_dfd.yaml"}
TITLES = {"teacher": "The teacher", "dmd2": "DMD2", "dfd": "DMD2 + data forcing"}
COLOURS = ("#8a8f98", "#d9594c", "#2f7fd1")  # of the bars, in the order of TITLES
STAGES = {"dmd2": "DMD2", "dfd": "data forcing"}
CLIPS, CURATED = 480, 480  # to train on; the curated ones are for data forcing
SEEDS, SHOWN_SEEDS = 32, 8  # for each caption: measured, shown
SHOWN = tuple(
    world.caption(colour, shape) for colour, shape in zip(world.COLOURS, (*world.SHAPES, "cross"), strict=True)
)
QUALITY = {  # what VideoEvaluation logs -> title
    "world_readings_fd": "distance to real clips (FVD-style)",
    "diversity": "diversity",
    "saturation": "saturation",
    "score": "score, 0 is as good as the teacher",
}
TRAINING = {
    "train/student_loss": "student loss",
    "train/fake_loss": "fake score's loss",
    "train/paired_gap": "paired gap",
    "train/dmd_gradient_norm": "DMD gradient norm",
}
SIZE = VideoSize(world.FRAMES, world.SIZE, world.SIZE)


@dataclass(frozen=True)
class Shown:
    """What one column of the page shows: clips uint8 [N, F, H, W, C] with their captions, what they cost, what was
    read from their pixels, and the standard errors of that."""

    name: str
    clips: NDArray[np.uint8]
    captions: list[str]
    facts: Mapping[str, Any]
    report: WorldReport
    errors: Mapping[str, float]


def run(*words: str) -> float:
    """Run `lightning` with these words, shown as it is run; returns the seconds it took."""
    print(f"\n$ lightning {shlex.join(words)}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lightning_dfd", *words], check=True)
    return time.perf_counter() - began


def distil(folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    """From rendered videos to samples and an export, all under `folder`; returns the seconds of each command."""
    write_world(folder / "data", CLIPS, seed=0)
    write_world(folder / "curated", CURATED, seed=1, right=True)
    data = {
        stage: ["--data.folder", str(folder / source), "--data.cache", str(folder / f"{source}_cache")]
        for stage, source in (("dmd2", "data"), ("dfd", "curated"))
    }
    last = {stage: str(folder / stage / "checkpoints" / "last.ckpt") for stage in RECIPES}
    seconds = {}
    for stage, recipe in RECIPES.items():
        run("cache", "-c", recipe, *data[stage], "--encode_batch_size", "16")
        start = ["--model.init_from", last["dmd2"]] if stage == "dfd" else []
        root = ["--trainer.default_root_dir", str(folder / stage)]
        seconds[stage] = run("fit", "-c", recipe, *data[stage], *root, *start, *overrides)
    show = ["--prompts", json.dumps(world.CAPTIONS), "--seeds", json.dumps(list(range(SEEDS))), "--batch_size", "96"]
    for name in TITLES:
        what = ["--role", "teacher"] if name == "teacher" else ["--ckpt_path", last[name]]
        stage = "dfd" if name == "dfd" else "dmd2"
        run("sample", "-c", RECIPES[stage], *data[stage], *what, *show, "--output", str(folder / "samples" / name))
    for kind in ("pipeline", "lora"):
        target = str(folder / f"export_{kind}")
        run(
            "export",
            "-c",
            RECIPES["dfd"],
            *data["dfd"],
            "--ckpt_path",
            last["dfd"],
            "--output",
            target,
            "--format",
            kind,
        )
    return seconds


def load_shown(folder: Path, name: str) -> Shown:
    """What `lightning sample` wrote, and what is read from it."""
    facts = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    listed = list_clips(folder).clips
    clips = torch.stack([read_video(clip.path, SIZE, None) for clip in listed]).permute(0, 2, 3, 4, 1).numpy()
    captions, readings = [clip.caption for clip in listed], [read_clip(clip) for clip in clips]
    seeds = [number % SEEDS for number in range(len(clips))]
    errors = standard_errors(readings, captions, seeds)
    return Shown(name, clips, captions, facts, report_of(readings, captions), errors)


def grid_of(shown: Shown) -> Tensor:
    """The grid on the page: a row for each of `SHOWN`, seeds across."""
    clips = torch.from_numpy(shown.clips).view(len(world.CAPTIONS), SEEDS, *shown.clips.shape[1:])
    picked = clips[[world.CAPTIONS.index(text) for text in SHOWN], :SHOWN_SEEDS].flatten(0, 1)
    return video_grid(enlarge(picked, 96), SHOWN_SEEDS)


def true_strength(folder: Path, clips: int) -> float:
    """The mean strength of colours in clips of the world with right captions. They are written and read as samples
    are, since a video file pales the colours of small shapes."""
    strengths = []
    for scene in world.draw_scenes(clips, seed=2, right=True):
        write_video(folder / "one.mp4", world.render(scene), world.FPS)
        frames = read_video(folder / "one.mp4", SIZE, None).permute(1, 2, 3, 0).numpy()
        strengths.append(read_clip(frames).strength)
    (folder / "one.mp4").unlink()
    return float(np.mean(strengths))


def measured(shown: Sequence[Shown], truth: float) -> str:
    """The three bars of the first screen: kinds of clip, colour (over its `truth`) and obedience."""

    def bars(measure: str, unit: float) -> dict[str, tuple[float, float]]:
        found = {TITLES[one.name]: (getattr(one.report, measure), one.errors[measure]) for one in shown}
        return {title: (unit * value, unit * error) for title, (value, error) in found.items()}

    panels = {
        "How many kinds of clip for a caption": bars("kinds", 1.0),
        "How strong the colours": bars("strength", 1 / truth),
        "How often the caption is obeyed, %": bars("obedience", 100.0),
    }
    levels = zip(
        panels, ("the world", "the world", "a perfect model"), (world.effective_kinds(), 1.0, 100.0), strict=True
    )
    return pages.bars(panels, {title: (said, level) for title, said, level in levels}, COLOURS)


def joined_curves(folder: Path) -> tuple[dict[str, dict[str, pages.Curve]], dict[str, dict[str, float]]]:
    """Panels of what both stages logged, data forcing after DMD2 on one axis, and the teacher's levels by panel."""
    panels: dict[str, dict[str, pages.Curve]] = {}
    levels: dict[str, dict[str, float]] = {}
    offset = 0.0
    for stage in RECIPES:
        logged = pages.logged_curves(folder / stage)
        for name, title in {**{f"val/{name}": title for name, title in QUALITY.items()}, **TRAINING}.items():
            x, y = logged[name]
            panels.setdefault(title, {})[STAGES[stage]] = ([offset + step for step in x], y)
        for name, title in QUALITY.items():
            if f"val/teacher/{name}" in logged:
                levels[title] = {"teacher": logged[f"val/teacher/{name}"][1][-1]}
        offset += max(logged["train/fake_loss"][0])
    return panels, levels


HEADINGS = (
    "",
    "network calls per video",
    "sampling time per video",
    "training, start-up included",
    "kinds of clip for a caption",
    "strength of colour, world = 1",
    "shape and colour as captioned",
    "every factor can be read",
    *(f"{factor}, typical to rare" for factor in world.FACTORS),
)


def row_of(shown: Shown, seconds: Mapping[str, float], truth: float) -> list[str]:
    """A line of the page's table."""
    report, errors = shown.report, shown.errors
    return [
        TITLES[shown.name],
        str(shown.facts["network_calls_per_video"]),
        f"{1000 * shown.facts['sampling_seconds_per_video']:.0f} ms",
        f"{seconds[shown.name]:.0f} s" if shown.name in seconds else "-",
        f"{report.kinds:.1f} ± {errors['kinds']:.1f}",
        f"{report.strength / truth:.2f} ± {errors['strength'] / truth:.2f}",
        f"{100 * report.obedience:.0f} ± {100 * errors['obedience']:.0f} %",
        f"{100 * report.readable:.0f} %",
        *(" / ".join(f"{share:.2f}" for share in report.shares[factor][:-1]) for factor in world.FACTORS),
    ]


def truth_row() -> list[str]:
    shares = (" / ".join(f"{share:.2f}" for share in world.SHARES[factor]) for factor in world.FACTORS)
    return [
        "Clips of the world with right captions",
        *("-",) * 3,
        f"{world.effective_kinds():.1f}",
        "1",
        "100 %",
        "100 %",
        *shares,
    ]


def grids(folder: Path, shown: Sequence[Shown]) -> str:
    """The videos of the first screen; contact sheets are left beside them."""
    figures = []
    for one in shown:
        write_video(folder / f"{one.name}.mp4", grid_of(one), world.FPS)
        first = [number for number, text in enumerate(one.captions) if text in SHOWN and number % SEEDS < SHOWN_SEEDS]
        sheet = contact_sheet(enlarge(torch.from_numpy(one.clips[first]), 48), 9)
        Image.fromarray(sheet.numpy()).save(folder / f"{one.name}.png")
        calls = one.facts["network_calls_per_video"]
        figures.append(pages.video(folder / f"{one.name}.mp4", f"{TITLES[one.name]}: {calls} network calls per video"))
    return f'<div class="grids">{"".join(figures)}</div>'


def banner(shown: Sequence[Shown]) -> bytes:
    """The first screen's videos in one animated GIF, for a README."""
    plates, gap = [], 12
    for one in shown:
        grid = grid_of(one)[:, ::3, ::3]  # each pixel of a clip once
        count, _, width, _ = grid.shape
        plate = Image.new("RGB", (width, 20), "white")
        calls = one.facts["network_calls_per_video"]
        ImageDraw.Draw(plate).text(
            (2, 4), f"{TITLES[one.name]}: {calls} network calls", "black", ImageFont.load_default(13)
        )
        title = torch.from_numpy(np.array(plate)).expand(count, -1, -1, -1)
        plates.append(torch.nn.functional.pad(torch.cat([title, grid], dim=1), (0, 0, 0, gap), value=255))
    return encode_gif(torch.cat(plates, dim=2), world.FPS)


STYLE = """<style>
.grids { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1em } .grids video { width: 100% }
</style>"""


def page(folder: Path, shown: Sequence[Shown], seconds: Mapping[str, float], total: float) -> None:
    """index.html in `folder`: one file with the videos inside."""
    (folder / "demo.gif").write_bytes(banner(shown))
    truth = true_strength(folder, clips=400)
    card = (folder / "export_pipeline" / "README.md").read_text(encoding="utf-8")
    snippet = html.escape(card.split("```python\n")[1].split("```")[0])
    where = html.escape(str(folder))
    rows = "; ".join(html.escape(text) for text in SHOWN)
    parts = [
        STYLE,
        "<p>A video model needs many slow steps. Fast students by DMD2 show the same few clips in garish colours again "
        "and again. Data forcing gives variety and colour back, at the same speed. "
        f"Rows are captions ({rows}), columns are {SHOWN_SEEDS} seeds, the same in all three.</p>",
        grids(folder, shown),
        measured(shown, truth),
        "<h2>What it cost and what came out</h2>",
        pages.table(HEADINGS, [*(row_of(one, seconds, truth) for one in shown), truth_row()]),
        f"<p>Read from the pixels of {len(shown[0].clips)} clips of each model by plain code, which knows the world's "
        f"truth: {world.KINDS} kinds of clip are possible for a caption, and some are rarer than others. The effective "
        "number of kinds is 1 / the probability that two clips for a caption are of one kind. Bars and ± show one "
        f"standard error over {SEEDS} seeds. All of this took <code>make demo</code> {total / 60:.1f} minutes.</p>",
        "<h2>Training</h2>",
        pages.curves(*joined_curves(folder)),
        "<h2>The export</h2>",
        f"<p>In <code>{where}/export_pipeline</code>, and as a LoRA file in <code>export_lora</code>; from inside "
        f"<code>{where}</code>:</p>",
        f"<pre>{snippet}</pre>",
    ]
    pages.write_page(folder / "index.html", "A slow video model made fast, with its variety and its colours", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    args, overrides = parser.parse_known_args()
    if args.output.exists():
        parser.error(f"{args.output} already exists; delete it or name another --output")
    began = time.perf_counter()
    args.output.mkdir(parents=True)
    seconds = distil(args.output, overrides)
    shown = [load_shown(args.output / "samples" / name, name) for name in TITLES]
    page(args.output, shown, seconds, time.perf_counter() - began)
    print(f"\nOpen {args.output / 'index.html'}")


if __name__ == "__main__":
    main()
