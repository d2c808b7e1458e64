"""What every benchmark says beside its numbers, and how it writes them."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_dfd.toy.study_report import commit_of


def machine() -> str:
    """The processor or GPU, and the versions that matter."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        device = f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} thread(s)"
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one kind as Markdown, numbers to three digits."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names)] + [[_shown(row[name]) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


def report(name: str, rows: Sequence[Mapping[str, Any]], output: str, **more: Any) -> None:
    """Print a table and write `<output>/<name>.json`, with machine, commit and command."""
    facts = {
        "machine": machine(),
        "commit": commit_of(Path(__file__).parent),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }
    print(table(rows))
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**facts, "rows": rows, **more}, indent=2), encoding="utf-8")
