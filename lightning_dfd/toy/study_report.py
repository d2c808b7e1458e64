"""The study's results as tables and figures: `report.md` and PNGs beside it."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from lightning_dfd.files import write_text
from lightning_dfd.toy import world
from lightning_dfd.toy.judge_teacher import GUIDANCE
from lightning_dfd.toy.study_arms import Arm, all_arms
from lightning_dfd.toy.tables import table

COLUMNS = {  # heading -> name of the measure
    "kinds": "kinds",
    "colour": "colour",
    "obedience": "obedience",
    "readable": "readable",
    "shares gap": "shares_gap",
    "distance": "world_readings_fd",
    "diversity": "diversity",
    "saturation": "saturation",
    "motion": "motion",
}
GROUPS = {
    "world": "The world itself",
    "teacher": "The teacher",
    "distilled": "From the teacher",
    "going on": "Going on from DMD2",
    "2 steps": "Going on from DMD2 with 2 steps",
    "full": "Going on from DMD2 of all weights",
}
ERRORS = 3.0  # a difference counts if it is larger than so many of its standard errors


@dataclass(frozen=True)
class Results:
    """All seeds of one arm; `measured` maps iterations to measures, one dict a seed, in the order of `seeds`."""

    name: str
    group: str
    iterations: int
    seeds: tuple[int, ...]
    measured: dict[int, list[dict[str, float]]]

    def of(self, measure: str, iterations: int | None = None) -> NDArray[np.float64]:
        """One value a seed, at the end or after so many iterations."""
        looks = self.measured[self.iterations if iterations is None else iterations]
        return np.array([found[measure] for found in looks])


def read_results(folder: Path, order: Sequence[str]) -> dict[str, Results]:
    """Every arm that has results, by name, in this order; what it does not name comes first."""
    records: dict[str, list[dict]] = {}  # type: ignore[type-arg]
    for path in sorted((folder / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        records.setdefault(record["arm"], []).append(record)
    arms = {}
    for name, found in sorted(records.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1):
        first = found[0]
        looks = [int(look) for look in first["measured"]]
        measured = {look: [record["measured"][str(look)] for record in found] for look in looks}
        seeds = tuple(record["seed"] for record in found)
        arms[name] = Results(name, first["group"], first["iterations"], seeds, measured)
    return arms


def cell(values: NDArray[np.float64]) -> str:
    """Mean and, of more than one seed, the standard error of it."""
    digits = 1 if abs(values.mean()) >= 10 else 3
    spread = f" ± {standard_error(values):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def group_table(arms: Sequence[Results]) -> str:
    """Every arm after every number of iterations at which it was measured."""
    rows = [
        (f"{arm.name}, {look}" if look else arm.name, *(cell(arm.of(name, look)) for name in COLUMNS.values()))
        for arm in arms
        for look in sorted(arm.measured)
    ]
    return table(("arm", *COLUMNS), rows)


def counts(differences: NDArray[np.float64]) -> bool:
    """The protocol's rule: of at least three seeds, the mean is larger than three of its standard errors."""
    return len(differences) >= 3 and abs(differences.mean()) > ERRORS * standard_error(differences)


def difference_table(pairs: Sequence[tuple[Results, Results]]) -> str:
    """The first of each pair less the second, seed by seed, so that what the seeds share falls out, after every number
    of iterations at which both were measured; bold where it `counts`. An arm that is measured once, as a teacher, is
    compared with at the end."""
    rows = []
    for arm, reference in pairs:
        once = len(reference.measured) == 1
        for look in sorted(arm.measured if once else arm.measured.keys() & reference.measured.keys()):
            of_reference = None if once else look
            cells = []
            for name in COLUMNS.values():
                differences = arm.of(name, look) - reference.of(name, of_reference)
                cells.append(f"**{cell(differences)}**" if counts(differences) else cell(differences))
            rows.append((f"{arm.name}, {look}, less {reference.name}", *cells))
    return table(("arm", *COLUMNS), rows)


def given_back(arm: Results, look: int, base: Results, teacher: Results) -> tuple[float, float]:
    """Which share of the kinds that `base` has lost against the teacher an arm gives back, and which share of its
    excess of colour over the world's; 1 is all of it, and more is more than the teacher has."""
    lost = teacher.of("kinds").mean() - base.of("kinds").mean()
    excess = base.of("colour").mean() - 1
    return (
        float((arm.of("kinds", look).mean() - base.of("kinds").mean()) / lost),
        float((base.of("colour").mean() - arm.of("colour", look).mean()) / excess),
    )


def given_back_table(arms: Sequence[Results], base: Results, teacher: Results) -> str:
    rows = []
    for arm in arms:
        for look in sorted(arm.measured):
            kinds, colour = given_back(arm, look, base, teacher)
            rows.append(
                (f"{arm.name}, {look}", f"{kinds:.2f}", f"{colour:.2f}", f"{arm.of('obedience', look).mean():.3f}")
            )
    return table(("arm", "of the lost kinds", "of the excess of colour", "obedience"), rows)


def scatter(arms: Sequence[Results], path: Path, title: str) -> None:
    """Kinds against colour; the world is marked."""
    figure, axis = plt.subplots(figsize=(10, 6.5))
    for arm in arms:
        x, y = arm.of("colour"), arm.of("kinds")
        errors = (0.0, 0.0) if len(x) < 2 else (standard_error(x), standard_error(y))
        axis.errorbar(x.mean(), y.mean(), xerr=errors[0], yerr=errors[1], fmt="o", capsize=2)
        axis.annotate(arm.name, (x.mean(), y.mean()), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axis.axvline(1.0, linestyle="--", color="grey")
    axis.axhline(world.effective_kinds(), linestyle="--", color="grey")
    axis.set_xlabel("strength of colour, the world's is 1")
    axis.set_ylabel("kinds of clip for a caption (dashed: the world)")
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def over_iterations(arms: Sequence[Results], base: Results, path: Path) -> None:
    """What going on does over time, from the base on."""
    names = ("kinds", "colour", "obedience", "world_readings_fd")
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 5.2))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for arm, colour in zip(arms, itertools.cycle(colours), strict=False):
        looks = sorted(arm.measured)
        for axis, name in zip(axes, names, strict=True):
            means = [base.of(name).mean(), *(arm.of(name, look).mean() for look in looks)]
            axis.plot([0, *looks], means, marker="o", markersize=3, color=colour, label=arm.name)
            axis.set_title(name)
            axis.set_xlabel("iterations after DMD2")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=5, fontsize=8)
    figure.tight_layout(rect=(0, 0.25, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def commit_of(folder: Path) -> str:
    """The commit that is checked out, with `+` where files differ from it; `unknown` outside of a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def group_parts(folder: Path, group: str, results: dict[str, Results], arms: dict[str, Arm]) -> list[str]:
    """The tables and figures of one group of arms."""
    found = [arm for arm in results.values() if arm.group == group]
    if not found:
        return []
    parts = [f"### {GROUPS[group]}", group_table(found)]
    teacher = results.get(f"teacher s={GUIDANCE:g}")
    starts = {arms[arm.name].start for arm in found if arm.name in arms} - {None}
    base = results.get(str(next(iter(starts)))) if starts else None
    if group == "distilled" and teacher is not None:
        parts += [
            "Less the guided teacher, seed by seed; bold is what counts:",
            difference_table([(arm, teacher) for arm in found]),
        ]
    if base is None:
        return parts
    slug = group.replace(" ", "_")
    if teacher is not None:
        parts += ["Given back of what DMD2 lost against the guided teacher:", given_back_table(found, base, teacher)]
    continued = [arm for arm in found if arm.name.startswith("continued")]
    pairs = [(arm, reference) for reference in continued for arm in found if arm is not reference]
    parts += ["Less going on with DMD2, seed by seed; bold is what counts:", difference_table(pairs)]
    own = [
        (arm, results[str(arms[arm.name].control)])
        for arm in found
        if arm.name in arms and arms[arm.name].control in results
    ]
    if own:
        parts += ["Less the same without data, seed by seed:", difference_table(own)]
    over_iterations(found, base, folder / f"iterations_{slug}.png")
    scatter([base, *found, *([teacher] if teacher else [])], folder / f"kinds_{slug}.png", GROUPS[group])
    return [*parts, f"![over iterations](iterations_{slug}.png)", f"![kinds and colour](kinds_{slug}.png)"]


def write_report(folder: Path, order: Sequence[str]) -> None:
    """`report.md` and its figures, from whatever results there are, arms in this order."""
    results, arms = read_results(folder, order), {arm.name: arm for arm in all_arms()}
    seeds = sorted({seed for arm in results.values() for seed in arm.seeds})
    commit = commit_of(Path(__file__).parent)
    parts = [
        f"Commit {commit}, seeds {seeds}, {len(results)} arms; mean ± standard error over seeds. The number after an "
        "arm's name is the iterations after which it was measured."
    ]
    for group in GROUPS:
        parts += group_parts(folder, group, results, arms)
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
