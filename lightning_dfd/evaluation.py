"""`lightning evaluate`: folders of videos, whoever made them, measured beside real ones.

Axis legend: N videos, C = 3 channels, F frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from lightning_dfd import pages
from lightning_dfd.data import Clip, VideoError, first_problems, list_clips, read_video, write_video
from lightning_dfd.metrics import VideoSuite, relative_to_teacher
from lightning_dfd.pictures import enlarge, to_frames, video_grid
from lightning_dfd.types import VideoSize

SHOWN_PROMPTS, SHOWN_SEEDS = 4, 4


@dataclass(frozen=True)
class Measured:
    """One folder: its values, and a few of its videos, uint8 [N, F, H, W, C], a prompt's seeds in one row."""

    values: dict[str, float]
    shown: Tensor
    columns: int


def evaluate(
    videos: dict[str, str],
    real: str,
    output: str,
    frames: int = 16,
    height: int = 224,
    width: int = 224,
    fps: float | None = None,
    distance: str = "transnetv2",
    diversity: str = "efficientnet-lite0",
    min_videos: int = 64,
    runs: dict[str, str] | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> None:
    """Measure folders of videos beside real ones: a table, evaluation.json and index.html.

    A folder is captioned as training data are: by metadata.jsonl (as `lightning sample` writes), metadata.csv or a
    .txt beside each video. Videos of one caption count as its seeds; captions with a single video are left out of the
    diversities. If a folder is named `teacher`, all others are also given in relation to it.

    Args:
        videos: name -> folder of sampled videos, as {teacher: a, student: b}.
        real: folder of real videos.
        output: folder for evaluation.json and index.html.
        frames: frames read of each video.
        height: pixels; videos are scaled to cover height x width and cropped at the centre.
        width: pixels.
        fps: frames per second at which they are read; null for consecutive frames.
        distance: extractor of the Frechet distance, `name` or `name=weights`; i3d-logits makes it FVD.
        diversity: extractor of the diversities, likewise.
        min_videos: fewer on either side are refused, as the distance would be mostly bias.
        runs: name -> default_root_dir of runs whose logged curves the page shows.
        batch_size: videos measured together.
        device: where features are computed, as cpu or cuda.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: a folder has too few usable videos.
    """
    size = VideoSize(frames, height, width)
    suite = VideoSuite(distance, diversity, min_videos).to(torch.device(device))
    curves = {name: pages.logged_curves(Path(root)) for name, root in (runs or {}).items()}
    for part in batches(real, usable_clips(real), size, fps, batch_size):
        suite.update_real(part.videos.to(device))
    found = {name: measure(suite, folder, size, fps, batch_size) for name, folder in videos.items()}
    values = {name: measured.values for name, measured in found.items()}
    teacher = values.get("teacher", {})
    relative = {name: relative_to_teacher(own, teacher) for name, own in values.items() if name != "teacher"}
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    protocol = {"real": real, "size": str(size), "fps": str(fps), **suite.fingerprint()}
    record = {"protocol": protocol, "values": values, "relative_to_teacher": relative}
    (folder / "evaluation.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    write_page(folder, found, relative, curves, protocol, fps or 8.0)
    print(text_table(*rows_of(values, relative)))
    print(f"\nOpen {folder / 'index.html'}; the numbers are in evaluation.json beside it")


@dataclass(frozen=True)
class Part:
    """Some videos [N, C, F, H, W] in [-1, 1] with their clips."""

    videos: Tensor
    clips: list[Clip]


def usable_clips(folder: str) -> Sequence[Clip]:
    """The folder's videos, captioned or not; what cannot be used is named in a warning."""
    listing = list_clips(folder, need_captions=False)
    if listing.problems:
        warnings.warn(f"{folder}{first_problems(listing.problems)}", stacklevel=2)
    return listing.clips


def batches(folder: str, clips: Sequence[Clip], size: VideoSize, fps: float | None, batch_size: int) -> Iterator[Part]:
    """The folder's videos in order. One that cannot be decoded is named in a warning and left out."""
    videos: list[Tensor] = []
    kept: list[Clip] = []
    for number, clip in enumerate(tqdm(clips, desc=f"reading {folder}", unit="video")):
        try:
            videos.append(read_video(clip.path, size, fps).float() / 127.5 - 1.0)
            kept.append(clip)
        except VideoError as error:
            warnings.warn(f"{folder}: {clip.name} is left out: {error}", stacklevel=2)
        if videos and (len(videos) == batch_size or number == len(clips) - 1):
            yield Part(torch.stack(videos), kept)
            videos, kept = [], []


def measure(suite: VideoSuite, folder: str, size: VideoSize, fps: float | None, batch_size: int) -> Measured:
    """One folder by the suite, which is reset first."""
    suite.reset()
    clips = sorted(usable_clips(folder), key=lambda clip: clip.caption)
    several = {caption for caption, count in Counter(clip.caption for clip in clips).items() if caption and count > 1}
    groups = [[clip for clip in clips if (clip.caption in several) == grouped] for grouped in (True, False)]
    shown: dict[str, list[Tensor]] = {}
    for grouped, group in zip((True, False), groups, strict=True):
        for part in batches(folder, group, size, fps, batch_size):
            prompts = [clip.caption for clip in part.clips] if grouped else []
            # every file is a seed of its own: what was drawn for it need not be known
            seeds = [int.from_bytes(hashlib.sha256(clip.name.encode()).digest()[:4], "big") for clip in part.clips]
            suite.update(part.videos.to(suite.frechet.device), prompts, seeds if grouped else [])
            for clip, video in zip(part.clips, to_frames(part.videos), strict=True):
                row = shown.setdefault(clip.caption, [])
                if len(row) < SHOWN_SEEDS and len(shown) <= SHOWN_PROMPTS:
                    row.append(video)
    videos = [video for row in list(shown.values())[:SHOWN_PROMPTS] for video in row]
    columns = max(len(row) for row in shown.values()) if several else SHOWN_SEEDS
    return Measured(suite.compute(diversity=bool(several)), torch.stack(videos), columns)


def rows_of(
    values: Mapping[str, Mapping[str, float]], relative: Mapping[str, Mapping[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row a metric, a column a folder, its relation to the teacher in brackets."""
    metrics = list(dict.fromkeys(name for own in values.values() for name in own))
    rows = []
    for metric in metrics:
        cells = [metric]
        for name, own in values.items():
            ratio = relative.get(name, {}).get(f"{metric}_ratio")
            digits = (
                f"{own[metric]:.0f}" if metric.endswith("videos") else f"{own[metric]:.4g}" if metric in own else "-"
            )
            cells.append(digits + (f" (x {ratio:.2f})" if ratio is not None else ""))
        rows.append(cells)
    if any("score" in own for own in relative.values()):
        rows.append(["score", *(f"{relative[n]['score']:.3f}" if n in relative else "0" for n in values)])
    return ["", *values], rows


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text in columns."""
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_page(
    folder: Path,
    found: Mapping[str, Measured],
    relative: Mapping[str, Mapping[str, float]],
    runs: Mapping[str, Mapping[str, pages.Curve]],
    protocol: Mapping[str, str],
    fps: float,
) -> None:
    """index.html: the table, a grid of each folder's videos, and the curves of runs."""
    grids = []
    for number, (name, measured) in enumerate(found.items()):
        path = folder / f"grid_{number}.mp4"
        write_video(path, video_grid(enlarge(measured.shown), measured.columns), fps)
        grids.append(pages.video(path, name))
    values = {name: measured.values for name, measured in found.items()}
    parts = [pages.table(*rows_of(values, relative))]
    parts += ["<p>In brackets: in relation to the teacher. Compare distances of equal numbers of videos only.</p>"]
    parts += [f'<div class="row">{"".join(grids)}</div>']
    names = sorted({name for run in runs.values() for name in run if name.startswith("val/") and "teacher" not in name})
    if names:
        panels = {name: {label: run[name] for label, run in runs.items() if name in run} for name in names}
        parts += ["<h2>While training</h2>", pages.curves(panels, {})]
    parts += ["<h2>Protocol</h2>", pages.table(["", ""], [list(item) for item in protocol.items()])]
    pages.write_page(folder / "index.html", "Videos beside real ones", parts)


def main(arguments: Sequence[str], parser_class: type[ArgumentParser]) -> None:
    """`lightning evaluate` with these words."""
    parser = parser_class(prog="lightning evaluate", description="Measure folders of videos beside real ones.")
    parser.add_argument("-c", "--config", action="config", help="a YAML file with these keys")
    parser.add_function_arguments(evaluate)
    given = parser.parse_args(list(arguments)).as_dict()
    given.pop("config")
    evaluate(**given)
