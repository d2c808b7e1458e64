"""The whole path on the toy world, ending in a page to look at.

    python -m lightning_dfd.toy.demo --output outputs/demo

Videos -> cached latents -> DMD2 -> data forcing -> samples of teacher and both students -> a diffusers export.
Every step is a command of `lightning` with the toy recipes, printed as it runs, so the page shows nothing that
the same commands would not give anybody.
"""

from __future__ import annotations

import argparse
import base64
import csv
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

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_dfd.data import read_video, write_video
from lightning_dfd.pictures import contact_sheet, enlarge, video_grid
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
CLIPS, SEEDS = 480, 8
SHOWN_CAPTIONS, SHOWN_SEEDS = 6, 4
CURVES = ("train/student_loss", "train/fake_loss", "train/paired_gap", "train/dmd_gradient_norm")
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
    videos = [read_video(folder / video["file"], SIZE, None) for video in facts["videos"]]
    clips = torch.stack(videos).permute(0, 2, 3, 4, 1).numpy()
    return Shown(name, clips, [video["prompt"] for video in facts["videos"]], facts)


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


def curves(folder: Path) -> None:
    """Losses and health of both stages, from their metrics.csv."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3))
    offset = 0
    for stage in RECIPES:
        newest = max((folder / stage / "metrics").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        with newest.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for axis, name in zip(axes, CURVES, strict=True):
            points = [(int(row["step"]) + offset, float(row[name])) for row in rows if row.get(name)]
            axis.plot(*zip(*points, strict=True), label=stage)
            axis.set_title(name.removeprefix("train/").replace("_", " "))
            axis.set_xlabel("iteration")
        offset += int(rows[-1]["step"]) + 1
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=90)
    plt.close(figure)


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
    "network calls a video",
    "sampling a video",
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
    table = "".join(
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
        for tag, row in [("th", HEADINGS), *(("td", row) for row in rows)]
    )
    captions = [world.CAPTIONS[i] for i in np.linspace(0, len(world.CAPTIONS) - 1, SHOWN_CAPTIONS).round().astype(int)]
    videos = ""
    for shown in columns:
        write_video(folder / f"{shown.name}.mp4", grid_of(shown), world.FPS)
        Image.fromarray(contact_sheet(enlarge(torch.from_numpy(shown.clips[::SEEDS]), 64), 9).numpy()).save(
            folder / f"{shown.name}.png"
        )
        encoded = base64.b64encode((folder / f"{shown.name}.mp4").read_bytes()).decode()
        videos += (
            f"<figure><figcaption>{TITLES[shown.name]}</figcaption>"
            f'<video src="data:video/mp4;base64,{encoded}" autoplay loop muted playsinline></video></figure>'
        )
    curve = base64.b64encode((folder / "curves.png").read_bytes()).decode()
    card = (folder / "export_pipeline" / "README.md").read_text(encoding="utf-8")
    snippet = html.escape(card.split("```python\n")[1].split("```")[0])
    (folder / "index.html").write_text(
        PAGE.format(
            total=f"{total / 60:.1f}",
            videos=videos,
            captions="".join(f"<li>{caption}</li>" for caption in captions),
            seeds=SHOWN_SEEDS,
            table=table,
            clips=len(columns[0].clips),
            curve=curve,
            snippet=snippet,
            folder=html.escape(str(folder)),
        ),
        encoding="utf-8",
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>lightning_dfd demo</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1320px; margin: 2em auto; padding: 0 1em; color: #222 }}
.row {{ display: flex; gap: 1em; flex-wrap: wrap }} figure {{ margin: 0 }} figcaption {{ font-weight: 600 }}
video, img {{ max-width: 100%; background: #fff }} table {{ border-collapse: collapse }}
th, td {{ border: 1px solid #ccc; padding: .3em .6em; text-align: left }} pre {{ background: #f4f4f4; padding: 1em }}
</style></head><body>
<h1>From a 50-step teacher to a 4-step student</h1>
<p>Made by <code>make demo</code> in {total} minutes. The same captions (rows) and the same {seeds} seeds
(columns) in all three:</p>
<div class="row">{videos}</div>
<ol>{captions}</ol>
<h2>What it cost and what came out</h2>
<table>{table}</table>
<p>Measured from the pixels of {clips} clips each, so a share is good to a few points. The captions leave the direction
open; a student that keeps the world's diversity keeps its shares.</p>
<h2>Training</h2>
<img alt="losses of both stages" src="data:image/png;base64,{curve}">
<h2>The export</h2>
<p>In <code>{folder}/export_pipeline</code>, and as a LoRA file in <code>export_lora</code>; from inside
<code>{folder}</code>:</p>
<pre>{snippet}</pre>
</body></html>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    args, overrides = parser.parse_known_args()
    if args.output.exists():
        parser.error(f"{args.output} is there already; delete it or name another --output")
    began = time.perf_counter()
    args.output.mkdir(parents=True)
    seconds = distil(args.output, overrides)
    columns = [load_shown(args.output / "samples" / name, name) for name in TITLES]
    curves(args.output)
    page(args.output, columns, seconds, time.perf_counter() - began)
    print(f"\nOpen {args.output / 'index.html'}")


if __name__ == "__main__":
    main()
