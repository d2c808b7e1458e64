"""The study's results as tables and figures: `report.md` and PNGs beside it."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from lightning_dfd.toy import world

COLUMNS = {  # heading -> name of the measure
    "distance": "world_readings_fd",
    "TransNetV2-FD": "transnetv2_fd",
    "diversity": "diversity",
    "modes gap": "modes_gap",
    "direction gap": "direction_gap",
    "obedience": "obedience",
    "readable": "readable",
    "saturation": "saturation",
    "flickering": "flickering",
    "motion": "motion",
}
GROUPS = {
    "world": "The world itself",
    "teacher": "The teacher, 50 steps",
    "distilled": "From the teacher",
    "data": "Going on from `dmd2 data`, inputs `data`",
    "rollout": "Going on from `dmd2 rollout`, inputs `rollout`",
    "2 steps": "Going on from `dmd2 data 2 steps`",
}
CONTROLS = {  # arms without the group's own control: what each is to be better than
    "the teacher in 4 unguided steps": "teacher s=2",
    "dmd2 data": "teacher s=2",
    "dmd2 rollout": "teacher s=2",
    "dmd2 data 2 steps": "teacher s=2",
    "dmd2+gan rollout": "dmd2 rollout",
    "dp-dmd rollout": "dmd2 rollout",
    "forcing from the teacher": "dmd2 data",
}
NO_DATA = {  # arms with an unguided branch, and the same without data
    "p=.5 unguided": "no data unguided",
    "p=.5 unguided nearest": "no data unguided",
    "p=.5 unguided high t": "no data unguided high t",
    "p=.5 unguided high t nearest": "no data unguided high t",
}
BASES = {"data": "dmd2 data", "rollout": "dmd2 rollout", "2 steps": "dmd2 data 2 steps"}


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

    def found(self, iterations: int | None = None) -> set[str]:
        """The names of what was measured then."""
        return set(self.measured[self.iterations if iterations is None else iterations][0])


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
    """Mean and, of more than one seed, standard deviation over seeds."""
    digits = 1 if abs(values.mean()) >= 10 else 3
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def table(rows: Sequence[tuple[str, Sequence[str]]], headings: Sequence[str]) -> str:
    lines = ["| " + " | ".join(("arm", *headings)) + " |", "|---" * (len(headings) + 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join((name, *cells)) + " |" for name, cells in rows)])


def group_table(arms: Sequence[Results]) -> str:
    return table([(arm.name, [cell(arm.of(name)) for name in COLUMNS.values()]) for arm in arms], list(COLUMNS))


def counts(differences: NDArray[np.float64]) -> bool:
    """The protocol's rule: of at least three seeds all have one sign, and the mean is larger than the deviation."""
    one_sign = bool((differences > 0).all() or (differences < 0).all())
    return len(differences) >= 3 and one_sign and abs(differences.mean()) > differences.std(ddof=1)


def difference_table(pairs: Sequence[tuple[Results, Results]], iterations: int | None = None) -> str:
    """The first of each pair less the second, seed by seed, so that what the seeds share falls out; bold where it
    `counts`. At the end, or after so many iterations, for which not all is measured."""
    known = {
        heading: name for heading, name in COLUMNS.items() if all(name in a.found(iterations) for a, _ in pairs[:1])
    }
    rows = []
    for arm, reference in pairs:
        if arm.name == reference.name or arm.seeds != reference.seeds:
            continue
        differences = [arm.of(name, iterations) - reference.of(name, iterations) for name in known.values()]
        cells = [f"**{cell(values)}**" if counts(values) else cell(values) for values in differences]
        rows.append((f"{arm.name}, less {reference.name}", cells))
    return table(rows, list(known))


def shares_table(arms: Sequence[Results]) -> str:
    names = (*world.DIRECTION_SHARES, "none")
    return table([(arm.name, [cell(arm.of(f"direction {name}")) for name in names]) for arm in arms], names)


def scatter(arms: Sequence[Results], path: Path, title: str) -> None:
    """Distance against gap of the modes, both better towards the lower left."""
    figure, axis = plt.subplots(figsize=(9, 6))
    for arm in arms:
        x, y = arm.of("modes_gap"), arm.of("world_readings_fd")
        axis.errorbar(x.mean(), y.mean(), xerr=x.std(), yerr=y.std(), fmt="o", capsize=2)
        axis.annotate(arm.name, (x.mean(), y.mean()), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axis.set_xlabel("modes gap (total variation to the world)")
    axis.set_ylabel("distance to real clips")
    axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def over_iterations(arms: Sequence[Results], base: Results, path: Path) -> None:
    """What going on does over time, from the base on."""
    names = ("world_readings_fd", "diversity", "modes_gap", "saturation")
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 4.2))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for arm, colour in zip(arms, itertools.cycle(colours), strict=False):
        looks = sorted(arm.measured)
        for axis, name in zip(axes, names, strict=True):
            means = [base.of(name).mean(), *(arm.of(name, look).mean() for look in looks)]
            axis.plot([0, *looks], means, marker="o", markersize=3, color=colour, label=arm.name)
            axis.set_title(name)
            axis.set_xlabel("iterations after DMD2")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
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


def write_report(folder: Path, order: Sequence[str]) -> None:
    """`report.md` and its figures, from whatever results there are, arms in this order."""
    results = read_results(folder, order)
    seeds = sorted({seed for arm in results.values() for seed in arm.seeds})
    commit = commit_of(Path(__file__).parent)
    parts = [f"Commit {commit}, seeds {seeds}, {len(results)} arms; mean ± standard deviation over seeds."]
    for group, title in GROUPS.items():
        arms = [arm for arm in results.values() if arm.group == group]
        if not arms:
            continue
        parts += [f"### {title}", group_table(arms)]
        own = [(arm, results[CONTROLS[arm.name]]) for arm in arms if CONTROLS.get(arm.name) in results]
        if own:
            parts += ["Less its control, seed by seed; bold is what counts:", difference_table(own)]
        base = results.get(BASES.get(group, ""))
        reference = next((arm for arm in arms if arm.name.startswith("continued")), None)
        if base is None or reference is None:
            continue
        pairs = [(arm, reference) for arm in arms if arm is not reference]
        parts += ["Less `continued`, seed by seed; bold is what counts:", difference_table(pairs)]
        parts += [
            f"The same after {look} iterations:\n\n" + difference_table(pairs, look)
            for look in sorted(reference.measured)[:-1]
        ]
        without = [
            (results[f"{name} ({group})"], results[f"{control} ({group})"])
            for name, control in NO_DATA.items()
            if f"{name} ({group})" in results and f"{control} ({group})" in results
        ]
        parts += ["An unguided branch with data, less the same without:", difference_table(without)]
        parts += ["Going on, less its start:", difference_table([(arm, base) for arm in arms])]
        slug = group.replace(" ", "_")
        over_iterations(arms, base, folder / f"iterations_{slug}.png")
        scatter([base, *arms], folder / f"modes_{slug}.png", title)
        parts += [f"![over iterations](iterations_{slug}.png)", f"![distance and modes](modes_{slug}.png)"]
    parts += ["### Shares of directions", shares_table(list(results.values()))]
    (folder / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
