"""The arms of the study in the exact world: what is trained, from where, and beside what it is read.

Why each is there is in docs/study_exact.md. Terms are made anew in every iteration, so that a lever may follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning_dfd.objectives.terms import (
    GAN,
    DataForcing,
    DataForcingSettings,
    DistributionMatching,
    DiversitySettings,
    DMDSettings,
    FirstStep,
    GANSettings,
    Term,
)
from lightning_dfd.toy.mixture.terms import FDivergence, PairedForcing, Projection
from lightning_dfd.toy.mixture.training import FIFTY_STEPS, FOUR_STEPS, Method

GUIDANCE = 4.0  # of the teacher, wherever an arm says nothing else
TWO_STEPS = (0.999, 0.499)
TRUTH, BASE, CONTINUED = "the world", "DMD2", "continued"
RECIPE = "p=1, guidance 1.5"
DISTILLED, AFTER, LONG = (500, 1000, 2000), (300, 1000), (300, 1000, 3000)
GROUPS = {
    "untrained": "The world and its exact teacher",
    "distilled": "From the teacher",
    "lead": "Going on from DMD2: every step forced, curated clips",
    "paper": "Going on from DMD2: data forcing with the full guidance",
    "levers": "Going on from DMD2: one lever of the recipe changed",
    "two": "Two steps",
}


@dataclass(frozen=True)
class Arm:
    """One way to get a student, or samples without one.

    Args:
        name: of files and rows.
        group: of tables.
        method: how it is trained; None for none.
        start: the arm whose students it goes on from; None for the teacher.
        looks: iterations after which it is measured.
        controls: arms that it is compared with, seed by seed.
        guidance: of the exact teacher that is sampled where nothing is trained; None for the world's own clips.
        steps: of that sampling.
    """

    name: str
    group: str
    method: Method | None = None
    start: str | None = None
    looks: Sequence[int] = AFTER
    controls: Sequence[str] = ()
    guidance: float | None = None
    steps: Sequence[float] = FIFTY_STEPS


def dmd(guidance: float = GUIDANCE, *others: Term) -> Callable[[int], tuple[Term, ...]]:
    """The terms of DMD2, and others, in all iterations."""
    terms = (DistributionMatching(DMDSettings(guidance=guidance)), *others)
    return lambda iteration: terms


def forced(
    probability: float = 1.0, guidance: float | None = 1.5, rest: float = GUIDANCE, **levers: Any
) -> Callable[[int], tuple[Term, ...]]:
    """The terms of data forcing. By default those of the recipe."""
    return dmd(rest, DataForcing(DataForcingSettings(probability=probability, guidance=guidance, **levers)))


def falling(first: float, last: float, iterations: int) -> Callable[[int], tuple[Term, ...]]:
    """Data forcing of every step, its guidance falling evenly over so many iterations."""

    def terms(iteration: int) -> tuple[Term, ...]:
        return tuple(forced(guidance=last + (first - last) * max(0.0, 1 - iteration / iterations))(iteration))

    return terms


def all_arms() -> list[Arm]:
    """Every arm, each after the one that it starts from."""
    return [*_untrained(), *_distilled(), *_lead(), *_paper(), *_levers(), *_two_steps()]


def _untrained() -> list[Arm]:
    teachers = [Arm(f"teacher, guidance {s:g}", "untrained", guidance=s) for s in (1.0, 1.5, 2.0, 3.0, GUIDANCE)]
    few = [
        Arm(f"teacher in {len(steps)} steps, guidance {s:g}", "untrained", guidance=s, steps=steps)
        for steps in (FOUR_STEPS, TWO_STEPS)
        for s in (1.0, GUIDANCE)
    ]
    return [Arm(TRUTH, "untrained"), *teachers, *few]


def _distilled() -> list[Arm]:
    def arm(name: str, method: Method, control: str = BASE) -> Arm:
        return Arm(name, "distilled", method, looks=DISTILLED, controls=(control,))

    gan, rollout = GAN(GANSettings(weight=0.03)), "DMD2, rollout"
    first_step = FirstStep(DiversitySettings(weight=0.05), GUIDANCE)
    return [
        Arm(BASE, "distilled", Method(dmd()), looks=(*DISTILLED, 4000), controls=(f"teacher, guidance {GUIDANCE:g}",)),
        arm(rollout, Method(dmd(), inputs="rollout")),
        arm("DMD2, guidance 1.5", Method(dmd(1.5))),
        arm("DMD2 with GAN", Method(dmd(GUIDANCE, gan))),
        arm("f-divergence, JS", Method(dmd(GUIDANCE, gan, FDivergence("js"))), "DMD2 with GAN"),
        arm("PDMD", Method(dmd(GUIDANCE, Projection()))),
        arm("DP-DMD, rollout", Method(dmd(GUIDANCE, first_step), inputs="rollout"), rollout),
        arm("recipe without DMD2", Method(forced(), curated=True)),
    ]


def _after(
    name: str,
    group: str,
    terms: Callable[[int], Sequence[Term]],
    controls: Sequence[str] = (CONTINUED,),
    looks: Sequence[int] = AFTER,
    **method: Any,
) -> Arm:
    """An arm that goes on from DMD2."""
    return Arm(name, group, Method(terms, **method), BASE, looks, controls)


def _lead() -> list[Arm]:
    arm = partial(_after, group="lead")
    arms = [
        arm(CONTINUED, terms=dmd(), controls=(BASE,), looks=LONG),
        arm("continued, rollout", terms=dmd(), inputs="rollout"),
    ]
    for s in (1.0, 1.5, 2.0):
        without = f"no data, guidance {s:g}"
        data = forced(guidance=s)
        looks = AFTER if s == 1.0 else LONG
        arms += [arm(without, terms=dmd(s), looks=looks, curated=True)]
        arms += [arm(f"p=1, guidance {s:g}", terms=data, controls=(CONTINUED, without), looks=looks, curated=True)]
    return arms


def _paper() -> list[Arm]:
    arm, both = partial(_after, group="paper"), (CONTINUED, "p=.5, full guidance")
    return [
        arm("p=.25, full guidance", terms=forced(0.25, None)),
        arm("p=.5, full guidance", terms=forced(0.5, None), looks=LONG),
        arm("p=1, full guidance", terms=forced(1.0, None)),
        arm("p=.5, full guidance, curated", terms=forced(0.5, None), controls=both, curated=True),
        arm("p=.5, full guidance, rollout", terms=forced(0.5, None), controls=both, inputs="rollout"),
    ]


def _levers() -> list[Arm]:
    high, low = [0.5, 1.0], [0.0, 0.5]
    arm = partial(_after, group="levers", controls=(CONTINUED, RECIPE))
    return [
        arm("captions as they come", terms=forced(), looks=LONG),
        arm("p=.5", terms=forced(0.5), looks=LONG, curated=True),
        arm("p=.5, guidance 1.5 in all steps", terms=forced(0.5, rest=1.5), curated=True),
        arm("full guidance", terms=forced(guidance=None), curated=True),
        arm("guidance falls from 4 to 1 in 1,000", terms=falling(4.0, 1.0, 1000), looks=LONG, curated=True),
        arm("forced at t > .5 only", terms=forced(time_range=high), curated=True),
        arm("forced at t < .5 only", terms=forced(time_range=low), curated=True),
        arm("nearest of 16", terms=forced(nearest_of=16), curated=True),
        arm("rollout inputs", terms=forced(), inputs="rollout", curated=True),
        arm("rollout inputs, nearest of 16", terms=forced(nearest_of=16), inputs="rollout", curated=True),
        arm("mixed inputs", terms=forced(), inputs="mixed", curated=True),
        arm("only where pairs are close", terms=dmd(1.5, PairedForcing(0.6)), curated=True),
        *(arm(f"{count} clips", terms=forced(), looks=LONG, clips=count, curated=True) for count in (12, 60, 480)),
        arm("student one in 2", terms=forced(), student_update_freq=2, curated=True),
        arm("student one in 10", terms=forced(), student_update_freq=10, curated=True),
        arm("a third of the student's rate", terms=forced(), lr=1e-4, curated=True),
        arm("three times the fake score's rate", terms=forced(), fake_lr=1e-3, curated=True),
    ]


def _two_steps() -> list[Arm]:
    """DMD2 with two steps, and from it the same."""
    base, going = f"{BASE}, 2 steps", f"{CONTINUED}, 2 steps"

    def after(name: str, terms: Any, *controls: str, curated: bool = False) -> Arm:
        return Arm(name, "two", Method(terms, steps=TWO_STEPS, curated=curated), base, AFTER, controls)

    return [
        Arm(base, "two", Method(dmd(), steps=TWO_STEPS), looks=(4000,)),
        after(going, dmd(), base),
        after("no data, guidance 1.5, 2 steps", dmd(1.5), going),
        after(f"{RECIPE}, 2 steps", forced(), going, "no data, guidance 1.5, 2 steps", curated=True),
    ]
