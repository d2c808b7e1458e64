"""Run the contract on every family, and write what it measured: `python -m lightning_dfd.testing docs/backbones.md`."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from lightning_dfd.testing import Case, check_backbone
from lightning_dfd.testing.tiny import TINY, save_tiny

BEGIN, END = "<!-- contract -->", "<!-- /contract -->"
HEADER = (
    "| tiny pipeline | diffusers class | begins with | replay error | export error | LoRA | full | GAN |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def table_row(name: str, case: Case, found: Mapping[str, float | None]) -> str:
    """One family: largest differences of latents in replay, and relative ones of exports."""
    exports = [error for check, error in found.items() if check.startswith("export") and error is not None]

    def mark(*checks: str) -> str:
        return "no" if set(checks) & set(case.refuses) else "yes"

    cells = [
        name,
        case.teacher.pipeline_name,
        "an image" if case.teacher.takes_image else "text alone",
        f"{found['replay']:.0e}",
        f"{max(exports):.0e}",
        mark("train_lora", "export_lora"),
        mark("train_full", "export_full"),
        mark("gan"),
    ]
    return "| " + " | ".join(cells) + " |\n"


def write_table(page: Path, rows: str) -> None:
    """Put the table between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no lines {BEGIN} and {END} between which the table could stand")
    page.write_text(pattern.sub(lambda _: f"{BEGIN}\n{HEADER}{rows}{END}", text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="Markdown file with the table's marks")
    args = parser.parse_args()
    rows = ""
    with tempfile.TemporaryDirectory() as folder:
        for name, tiny in tqdm(TINY.items(), desc="families"):
            case = Case.of(save_tiny(name, Path(folder) / name / "tiny"), tiny)
            rows += table_row(name, case, check_backbone(case, Path(folder) / name / "checks", progress=True))
    write_table(args.page, rows)
    print(f"{len(TINY)} families keep the contract; {args.page} says how well")


if __name__ == "__main__":
    main()
