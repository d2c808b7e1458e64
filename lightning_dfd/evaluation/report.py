"""What `lightning evaluate` writes: a table, evaluation.json and index.html."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lightning_dfd.data import write_video
from lightning_dfd.evaluation import pages
from lightning_dfd.evaluation.folders import SHOWN_VIDEOS, Measured, unlike
from lightning_dfd.evaluation.metrics import relative_to_teacher
from lightning_dfd.evaluation.pictures import enlarge, video_grid

TEACHER = "teacher"  # the others are related to the folder of this name


@dataclass(frozen=True)
class Report:
    """What is written: folders and values by name, how they were measured, and what to know of them."""

    videos: dict[str, str]
    protocol: dict[str, str]
    values: dict[str, dict[str, float]]
    relative: dict[str, dict[str, float]]
    notes: list[str]

    @staticmethod
    def of(
        videos: Mapping[str, str],
        protocol: dict[str, str],
        real: Measured,
        found: Mapping[str, Measured],
        notes: Sequence[str] = (),
    ) -> Report:
        """From what was measured; `notes` come before those of the folders."""
        values = {name: measured.values for name, measured in found.items()}
        teacher = values.get(TEACHER, {})
        relative = {name: relative_to_teacher(own, teacher) for name, own in values.items() if name != TEACHER}
        more = [note for measured in (real, *found.values()) for note in measured.notes]
        return Report(dict(videos), protocol, values, relative, [*notes, *more, *unlike(found)])


def as_json(report: Report) -> str:
    """evaluation.json; what is no finite number is null, as JSON has no other word for it."""

    def finite(values: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
        return {
            name: {metric: value if math.isfinite(value) else None for metric, value in own.items()}
            for name, own in values.items()
        }

    record = {
        "protocol": report.protocol,
        "videos": report.videos,
        "values": finite(report.values),
        "relative_to_teacher": finite(report.relative),
        "notes": report.notes,
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a row a metric, a column a folder, its relation to the teacher in brackets."""
    metrics = list(dict.fromkeys(name for own in report.values.values() for name in own))

    def cell(name: str, metric: str) -> str:
        value, ratio = report.values[name].get(metric), report.relative.get(name, {}).get(f"{metric}_ratio")
        said = "-" if value is None else f"{value:.0f}" if metric.endswith("videos") else f"{value:.4g}"
        return said if ratio is None else f"{said} (x {ratio:.2f})"

    rows = [[metric, *(cell(name, metric) for name in report.values)] for metric in metrics]
    scores = {name: own["score"] for name, own in report.relative.items() if "score" in own}
    if scores:
        rows.append(["score", *(f"{scores[name]:.3f}" if name in scores else "-" for name in report.values)])
    return ["", *report.values], rows


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text in columns."""
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def write_page(
    path: Path,
    report: Report,
    found: Mapping[str, Measured],
    runs: Mapping[str, Mapping[str, pages.Curve]],
    fps: float,
) -> None:
    """index.html: the table, some videos of each folder, the curves of runs, and how it was measured."""
    explained = "Lower is better for distances and the score. docs/metrics.md says what each row is."
    if report.relative and TEACHER in report.values:
        explained = f"In brackets: in relation to the teacher. {explained}"
    parts = [pages.table(*table(report)), pages.paragraphs([explained, *report.notes])]
    with TemporaryDirectory() as scratch:
        grids = []
        for number, (name, measured) in enumerate(found.items()):
            grid = Path(scratch) / f"{number}.mp4"
            write_video(grid, grid_of(measured.shown), fps)
            grids.append(pages.video(grid, name))
    captions: dict[str, list[str]] = {}
    for name, measured in found.items():
        captions.setdefault("; ".join(filter(None, measured.shown)), []).append(name)
    rows = [f"Rows of {', '.join(names)}: {said}" for said, names in captions.items() if said]
    parts += ["<h2>Videos</h2>", f'<div class="row">{"".join(grids)}</div>', pages.paragraphs(rows)]
    panels, levels = logged_panels(runs)
    if panels:
        parts += ["<h2>While training</h2>", pages.curves(panels, levels)]
    facts = {**report.protocol, **{f"videos of {name}": folder for name, folder in report.videos.items()}}
    parts += ["<h2>How it was measured</h2>", pages.table(["", ""], [list(item) for item in facts.items()])]
    pages.write_page(path, "Videos beside real ones", parts)


def grid_of(shown: Mapping[str, Sequence[Tensor]]) -> Tensor:
    """A video [F, H', W', C] with a row for each caption, or several for none; short rows end in white."""
    columns = min(SHOWN_VIDEOS, max(len(row) for row in shown.values()))
    tiles = []
    for row in shown.values():
        tiles += [*row, *[torch.full_like(row[0], 255)] * (-len(row) % columns)]
    return video_grid(enlarge(torch.stack(tiles).permute(0, 2, 3, 4, 1)), columns)


Panels = dict[str, dict[str, pages.Curve]]
Levels = dict[str, dict[str, float]]


def logged_panels(runs: Mapping[str, Mapping[str, pages.Curve]]) -> tuple[Panels, Levels]:
    """What runs logged of their students, by metric and run, and the levels of their teachers."""
    panels: Panels = {}
    levels: Levels = {}
    for run, logged in runs.items():
        for name, curve in logged.items():
            root, _, metric = name.rpartition("/")
            if metric.endswith(("_ratio", "videos", "_error")):  # the teacher's level says as much as a ratio
                continue
            if root == "val":
                panels.setdefault(metric, {})[run] = curve
            elif root == "val/teacher":
                levels.setdefault(metric, {})[f"teacher of {run}"] = curve[1][-1]
    return panels, levels
