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
from PIL import Image
from torch import Tensor

from lightning_dfd.data import list_clips, read_video, write_video
from lightning_dfd.evaluation import pages
from lightning_dfd.evaluation.pictures import contact_sheet, enlarge, video_grid
from lightning_dfd.toy import world
from lightning_dfd.toy.dataset import write_world
from lightning_dfd.toy.measure import NOTHING, compare_with_world
from lightning_dfd.types import VideoSize

RECIPES = {"dmd2": "recipes/toy_dmd2.yaml", "dfd": "recipes/toy_dfd.yaml"}
TITLES = {
    "teacher": "Teacher, 50 steps with guidance",
    "dmd2": "Student after DMD2, 4 steps",
    "dfd": "Student after data forcing, 4 steps",
}
STAGES = {"dmd2": "DMD2", "dfd": "data forcing"}
CLIPS, SEEDS = 480, 8
SHOWN_CAPTIONS, SHOWN_SEEDS = 6, 4
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
    """One column of the page: clips uint8 [N, F, H, W, C] with their captions, and what they cost."""

    name: str
    clips: NDArray[np.uint8]
    captions: list[str]
    facts: Mapping[str, Any]


def run(*words: str) -> float:
    """Run `lightning` with these words, shown as it is run; returns the seconds it took."""
    print(f"\n$ lightning {shlex.join(words)}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lightning_dfd", *words], check=True)
    return time.perf_counter() - began


def distil(folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    """From rendered videos to samples and an export, all under `folder`; returns the seconds of each command."""
    write_world(folder / "data", CLIPS, seed=0)
    data = ["--data.folder", str(folder / "data"), "--data.cache", str(folder / "cache")]
    last = {stage: str(folder / stage / "checkpoints" / "last.ckpt") for stage in RECIPES}
    seconds = {"cache": run("cache", "-c", RECIPES["dmd2"], *data, "--encode_batch_size", "16")}
    for stage, recipe in RECIPES.items():
        start = ["--model.init_from", last["dmd2"]] if stage == "dfd" else []
        root = ["--trainer.default_root_dir", str(folder / stage)]
        seconds[stage] = run("fit", "-c", recipe, *data, *root, *start, *overrides)
    show = ["--prompts", json.dumps(world.CAPTIONS), "--seeds", json.dumps(list(range(SEEDS))), "--batch_size", "48"]
    for name in TITLES:
        what = ["--role", "teacher"] if name == "teacher" else ["--ckpt_path", last[name]]
        recipe = RECIPES["dfd" if name == "dfd" else "dmd2"]
        run("sample", "-c", recipe, *data, *what, *show, "--output", str(folder / "samples" / name))
    for kind in ("pipeline", "lora"):
        target = str(folder / f"export_{kind}")
        run("export", "-c", RECIPES["dfd"], *data, "--ckpt_path", last["dfd"], "--output", target, "--format", kind)
    return seconds


def load_shown(folder: Path, name: str) -> Shown:
    """What `lightning sample` wrote."""
    facts = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    listed = list_clips(folder).clips
    clips = torch.stack([read_video(clip.path, SIZE, None) for clip in listed]).permute(0, 2, 3, 4, 1).numpy()
    return Shown(name, clips, [clip.caption for clip in listed], facts)


def grid_of(shown: Shown) -> Tensor:
    """The grid on the page: a row for each of some captions, spread over shapes and colours; seeds across."""
    rows = np.linspace(0, len(world.CAPTIONS) - 1, SHOWN_CAPTIONS).round().astype(int)
    clips = torch.from_numpy(shown.clips).view(len(world.CAPTIONS), SEEDS, *shown.clips.shape[1:])
    picked = clips[torch.from_numpy(rows), :SHOWN_SEEDS].flatten(0, 1)
    return video_grid(enlarge(picked, 96), SHOWN_SEEDS)


def chroma(clips: NDArray[np.uint8]) -> float:
    """Mean of max - min over the channels of clips [N, F, H, W, C]. HSV saturation would divide by the brightness,
    and so count every speck on the dark backgrounds as colour."""
    return float(np.mean(clips.max(-1).astype(float) - clips.min(-1)))


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


def row_of(shown: Shown, real: NDArray[np.uint8], seconds: Mapping[str, float]) -> list[str]:
    """A line of the page's table, measured by plain code on all sampled clips."""
    report = compare_with_world(shown.clips, shown.captions)
    directions = report.shares["direction"]
    shares = " / ".join(f"{directions[name]:.2f}" for name in (*world.DIRECTION_SHARES, NOTHING))
    trained = f"{seconds[shown.name]:.0f} s" if shown.name in seconds else "-"
    return [
        TITLES[shown.name],
        str(shown.facts["network_calls_per_video"]),
        f"{1000 * shown.facts['sampling_seconds_per_video']:.0f} ms",
        trained,
        f"{100 * report.obedience:.0f} %",
        shares,
        f"{chroma(shown.clips) / chroma(real):.2f}",
    ]


HEADINGS = (
    "",
    "network calls per video",
    "sampling time per video",
    "training, start-up included",
    "shape and colour as captioned",
    "moves right / left / up / down / not",
    "colour (chroma), world = 1",
)


def page(folder: Path, columns: Sequence[Shown], seconds: Mapping[str, float], total: float) -> None:
    """outputs/demo/index.html: one file with the videos inside."""
    real_scenes, real = world.draw_clips(len(columns[0].clips), seed=1)
    truth = compare_with_world(real, [scene.caption for scene in real_scenes])
    rows = [row_of(shown, real, seconds) for shown in columns]
    shares = " / ".join(f"{share:.2f}" for share in (*world.DIRECTION_SHARES.values(), 0.0))
    rows.append(["The world itself", "", "", "", f"{100 * truth.obedience:.0f} %", shares, "1.00"])
    captions = [world.CAPTIONS[i] for i in np.linspace(0, len(world.CAPTIONS) - 1, SHOWN_CAPTIONS).round().astype(int)]
    videos = ""
    for shown in columns:
        write_video(folder / f"{shown.name}.mp4", grid_of(shown), world.FPS)
        sheet = contact_sheet(enlarge(torch.from_numpy(shown.clips[::SEEDS]), 64), 9)
        Image.fromarray(sheet.numpy()).save(folder / f"{shown.name}.png")
        videos += pages.video(folder / f"{shown.name}.mp4", TITLES[shown.name])
    card = (folder / "export_pipeline" / "README.md").read_text(encoding="utf-8")
    snippet = html.escape(card.split("```python\n")[1].split("```")[0])
    where = html.escape(str(folder))
    parts = [
        f"<p>Made by <code>make demo</code> in {total / 60:.1f} minutes. The same captions (rows) and the same "
        f"{SHOWN_SEEDS} seeds (columns) in all three:</p>",
        f'<div class="row">{videos}</div>',
        f"<ol>{''.join(f'<li>{caption}</li>' for caption in captions)}</ol>",
        "<h2>What it cost and what came out</h2>",
        pages.table(HEADINGS, rows),
        f"<p>Measured from the pixels of {len(columns[0].clips)} clips each, so a share is good to a few points. The "
        "captions leave the direction open; a student that keeps the world's diversity keeps its shares.</p>",
        "<h2>Training</h2>",
        pages.curves(*joined_curves(folder)),
        "<h2>The export</h2>",
        f"<p>In <code>{where}/export_pipeline</code>, and as a LoRA file in <code>export_lora</code>; from inside "
        f"<code>{where}</code>:</p>",
        f"<pre>{snippet}</pre>",
    ]
    pages.write_page(folder / "index.html", "From a 50-step teacher to a 4-step student", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    args, overrides = parser.parse_known_args()
    if args.output.exists():
        parser.error(f"{args.output} already exists; delete it or name another --output")
    began = time.perf_counter()
    args.output.mkdir(parents=True)
    seconds = distil(args.output, overrides)
    columns = [load_shown(args.output / "samples" / name, name) for name in TITLES]
    page(args.output, columns, seconds, time.perf_counter() - began)
    print(f"\nOpen {args.output / 'index.html'}")


if __name__ == "__main__":
    main()
