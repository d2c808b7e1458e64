"""The exact study's results as Markdown tables: `report.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_dfd.files import write_text
from lightning_dfd.toy.mixture.arms import BASE, CONTINUED, GROUPS, TRUTH, Arm
from lightning_dfd.toy.mixture.world import Measures
from lightning_dfd.toy.tables import table

Values = NDArray[np.float64]  # one a seed


@dataclass(frozen=True)
class Results:
    """All seeds of one arm: look -> measures, one dict a seed in the order of `seeds`."""

    seeds: tuple[int, ...]
    measured: dict[int, list[dict[str, float]]]
    seconds: float

    @property
    def last(self) -> int:
        return max(self.measured)

    def of(self, measure: str, look: int, seeds: Sequence[int] | None = None) -> Values:
        """One value a seed, of these or all."""
        found = zip(self.seeds, self.measured[look], strict=True)
        return np.array([values[measure] for seed, values in found if seeds is None or seed in seeds])

    def shared(self, other: Results) -> list[int]:
        """The seeds that both have."""
        return [seed for seed in self.seeds if seed in other.seeds]


def read_results(folder: Path) -> dict[str, Results]:
    """Every arm that has results, by name."""
    records: dict[str, list[dict]] = {}  # type: ignore[type-arg]
    for path in sorted((folder / "results").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        records.setdefault(record["arm"], []).append(record)
    found = {}
    for name, runs in records.items():
        measured = {int(look): [run["measured"][look] for run in runs] for look in runs[0]["measured"]}
        found[name] = Results(tuple(run["seed"] for run in runs), measured, sum(run["seconds"] for run in runs))
    return found


def cell(values: Values) -> str:
    """Mean and, of more than one seed, standard deviation over seeds."""
    digits = 2 if abs(values.mean()) >= 3 else 3
    spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{spread}"


def errors_apart(differences: Values) -> float:
    """The mean difference in its own standard errors; what the protocol counts is beyond 3."""
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    return float(differences.mean() / error) if error > 0 else 0.0


def difference_cell(differences: Values) -> str:
    """Mean difference and, in brackets, how many standard errors that is; bold beyond 3."""
    apart = errors_apart(differences)
    text = f"{differences.mean():+.3f} ({apart:+.0f})"
    return f"**{text}**" if abs(apart) > 3 else text


def given_back(arm: Results, look: int, other: Results, at: int, measure: str, truth: float) -> Values:
    """The share of what `other` has lost that the arm gives back: 0 as `other`, 1 as the truth, one value a seed."""
    seeds = arm.shared(other)
    start = other.of(measure, at, seeds)
    share: Values = (arm.of(measure, look, seeds) - start) / (truth - start)
    return share


def values_table(arms: Sequence[Arm], results: dict[str, Results]) -> str:
    """Every arm at every look."""
    rows = [
        (arm.name, str(look), *(cell(results[arm.name].of(name, look)) for name in Measures._fields))
        for arm in arms
        for look in sorted(results[arm.name].measured)
    ]
    return table(("arm", "iterations", *Measures._fields), rows)


def difference_table(pairs: Sequence[tuple[str, str]], results: dict[str, Results]) -> str:
    """The first of each pair less the second, seed by seed, at the last look that both have; if none, of each."""
    rows = []
    for name, other in pairs:
        one, two = results[name], results[other]
        seeds = one.shared(two)
        if len(seeds) < 2:
            continue
        look = max(one.measured.keys() & two.measured.keys(), default=None)
        at, then = (one.last, two.last) if look is None else (look, look)
        differences = [one.of(measure, at, seeds) - two.of(measure, then, seeds) for measure in Measures._fields]
        rows.append((f"{name}, less {other}", str(at), *map(difference_cell, differences)))
    return table(("arms", "iterations", *Measures._fields), rows)


def recovery_table(arms: Sequence[Arm], results: dict[str, Results]) -> str:
    """What each arm gives back of lost modes, excess norm and gap, against DMD2 and against going on."""
    goals = {name: float(results[TRUTH].of(name, 0).mean()) for name in ("modes", "norm", "gap")}
    rows = []
    for arm in arms:
        mine = results[arm.name]
        for look in sorted(mine.measured):
            cells = [cell(mine.of("obey", look))]
            for against in (BASE, CONTINUED):
                other = results[against]
                at = look if look in other.measured and against == CONTINUED else other.last
                for measure, goal in goals.items():
                    cells.append(cell(given_back(mine, look, other, at, measure, goal)))
            rows.append((arm.name, str(look), *cells))
    back = [f"{name}, of {against}" for against in (BASE, CONTINUED) for name in goals]
    return table(("arm", "iterations", "obey", *back), rows)


def write_report(folder: Path, arms: Sequence[Arm]) -> None:
    """`report.md`, from whatever results there are."""
    results = read_results(folder)
    known = [arm for arm in arms if arm.name in results]
    seeds = sorted({seed for arm in known for seed in results[arm.name].seeds})
    minutes = sum(result.seconds for result in results.values()) / 60
    parts = [f"{len(known)} arms, seeds {seeds}; {minutes:.0f} minutes of processor time. Mean ± sd over seeds."]
    for group, title in GROUPS.items():
        mine = [arm for arm in known if arm.group == group]
        if not mine:
            continue
        parts += [f"### {title}", values_table(mine, results)]
        pairs = [(arm.name, other) for arm in mine for other in arm.controls if other in results]
        if pairs:
            parts += ["Differences, seed by seed, and in standard errors; bold beyond 3:"]
            parts += [difference_table(pairs, results)]
        after = [arm for arm in mine if arm.start]
        if after and {TRUTH, BASE, CONTINUED} <= results.keys():
            parts += ["Given back, of what DMD2 has lost and of what going on has lost (0 nothing, 1 all):"]
            parts += [recovery_table(after, results)]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
