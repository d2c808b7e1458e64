"""HTML pages of one file, with their pictures and videos inside: something to open, send and keep."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1320px }
body { margin: 2em auto; padding: 0 1em; color: #222 }
.row { display: flex; gap: 1em; flex-wrap: wrap } figure { margin: 0 } figcaption { font-weight: 600 }
video, img { max-width: 100%; background: #fff } table { border-collapse: collapse }
th, td { border: 1px solid #ccc; padding: .3em .6em; text-align: left } pre { background: #f4f4f4; padding: 1em }"""

Curve = tuple[Sequence[float], Sequence[float]]  # x and y


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """A page of `parts`, each HTML already."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>\n{STYLE}\n</style>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n', encoding="utf-8"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with escaped cells."""
    lines = [("th", headings), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def paragraphs(texts: Sequence[str]) -> str:
    """Each text, escaped, as a paragraph."""
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def video(path: Path, caption: str) -> str:
    """An mp4 file that plays for ever, below its caption."""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><figcaption>{html.escape(caption)}</figcaption>"
        f'<video src="data:video/mp4;base64,{encoded}" autoplay loop muted playsinline></video></figure>'
    )


def curves(
    panels: Mapping[str, Mapping[str, Curve]], levels: Mapping[str, Mapping[str, float]], across: int = 4
) -> str:
    """A picture with a panel for each title, its curves by label, and dashed levels by label."""
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(4 * across, 3 * down), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, (x, y) in lines.items():
            axis.plot(x, y, label=label, marker="." if len(x) < 30 else None)
        for label, level in levels.get(title, {}).items():
            axis.axhline(level, linestyle="--", color="grey", label=label)
        axis.set_title(title)
        axis.set_xlabel("iteration")
        if lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    return _inline(figure, "curves")


def _inline(figure: Figure, alt: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    plt.close(figure)
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def bars(
    panels: Mapping[str, Mapping[str, tuple[float, float]]],
    levels: Mapping[str, tuple[str, float]],
    colours: Sequence[str],
) -> str:
    """A picture with a panel for each title, in it a bar for each label with its value and standard error, and below
    the title a dashed level with its own label."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 2.6), squeeze=False)
    for axis, (title, found) in zip(axes.flat, panels.items(), strict=True):
        places = range(len(found))[::-1]  # the first on top
        values, errors = zip(*found.values(), strict=True)
        axis.barh(places, values, xerr=errors, color=colours, capsize=4, height=0.7)
        for place, value, error in zip(places, values, errors, strict=True):
            axis.annotate(
                f"{value:.3g}", (value + error, place), xytext=(4, 0), textcoords="offset points", va="center"
            )
        said, level = levels[title]
        axis.axvline(level, linestyle="--", color="black")
        axis.annotate(said, (level, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
        axis.set_yticks(places, list(found))
        axis.set_xlim(0, 1.2 * max(level, *(value + error for value, error in zip(values, errors, strict=True))))
        axis.set_title(title, pad=18, fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return _inline(figure, "bars")


def logged_curves(root: Path) -> dict[str, Curve]:
    """What the newest metrics.csv below a run's `default_root_dir` holds: name -> steps and values.

    Raises:
        FileNotFoundError: the run wrote none.
    """
    files = sorted(root.glob("metrics/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no metrics/version_N/metrics.csv in {root}; name a run's trainer.default_root_dir")
    with files[-1].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else {}) if name not in ("step", "epoch")]
    points = {name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in names}
    return {name: ([x for x, _ in found], [y for _, y in found]) for name, found in points.items() if found}
