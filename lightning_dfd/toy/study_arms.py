"""The arms of the study in the video world, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lightning_dfd.objectives.terms import Term
from lightning_dfd.toy.judge_teacher import GUIDANCE
from lightning_dfd.types import Role

DMD2 = "dmd2"  # the arm that others go on from
LOW = 1.5  # guidance of the teacher where it is forced, of the recipe


@dataclass(frozen=True)
class Arm:
    """One way to make a student; with a `role` nothing is trained and that one is measured.

    `start` names the arm whose student and fake score it goes on from; None is the teacher. `curated` clips have right
    captions. `control` names the arm that this one has to be better than, beside going on.
    """

    name: str
    group: str
    start: str | None = None
    control: str | None = None
    input: Literal["data", "rollout"] = "data"
    mode: Literal["lora", "full"] = "lora"
    steps: int = 4
    guidance: float = GUIDANCE
    curated: bool = False
    clips: int | None = None
    forcing: Mapping[str, Any] = field(default_factory=dict)
    gan: Mapping[str, Any] = field(default_factory=dict)
    diversity: Mapping[str, Any] = field(default_factory=dict)
    terms: tuple[Callable[[], Term], ...] = ()
    student_update_freq: int = 5
    rate: float = 3e-4
    fake_rate: float = 3e-4
    long: bool = False
    role: Role | None = None


def all_arms() -> list[Arm]:
    """Every arm of the study, those that others start from first."""
    return [*teachers(), *distilled(), *going_on()]


def teachers() -> list[Arm]:
    arms = [Arm(f"teacher s={scale:g}", "teacher", guidance=scale, role="teacher") for scale in (1.0, 2.0, 3.0, 4.0)]
    return [*arms, Arm("the teacher in 4 unguided steps", "teacher", role="student")]  # an adapter that is still zero


def distilled() -> list[Arm]:
    return [
        Arm(DMD2, "distilled"),
        Arm("dmd2 2 steps", "distilled", steps=2),
        Arm("dmd2 full", "distilled", mode="full"),
    ]


def forced(guidance: float | None, probability: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"probability": probability, "guidance": guidance, **more}


def going_on() -> list[Arm]:
    base = Arm("continued", "going on", DMD2, long=True)
    short = replace(base, long=False)
    arms = [
        base,
        replace(base, name="p=.5, the paper", forcing=forced(None, 0.5)),
        replace(short, name="p=.25", forcing=forced(None, 0.25)),
        replace(short, name="p=1", forcing=forced(None)),
        replace(short, name="p=.5, curated", forcing=forced(None, 0.5), curated=True),
    ]
    for guidance in (1.0, 1.5, 2.0):
        control = f"no data at s={guidance:g}"
        arms.append(replace(base, name=control, forcing=forced(guidance, shown="gen"), long=guidance == LOW))
        named = f"forced at s={guidance:g}, curated"
        arms.append(
            replace(base, name=named, control=control, forcing=forced(guidance), curated=True, long=guidance == LOW)
        )
    low = replace(short, control=f"no data at s={LOW:g}", forcing=forced(LOW), curated=True)
    return [
        *arms,
        replace(low, name=f"forced at s={LOW:g}", curated=False),
        replace(low, name=f"forced at s={LOW:g}, 60 curated clips", clips=60),
        replace(low, name=f"forced at s={LOW:g}, 12 curated clips", clips=12),
        replace(low, name=f"forced at s={LOW:g}, curated, rollout", input="rollout"),
        replace(low, name=f"forced at s={LOW:g}, curated, high t", forcing=forced(LOW, time_range=[0.75, 1.0])),
        replace(low, name=f"forced at s={LOW:g}, curated, nearest of 16", forcing=forced(LOW, nearest_of=16)),
        replace(low, name=f"forced at s={LOW:g}, curated, fake score's rate x3", fake_rate=9e-4),
        replace(short, name="GAN", gan={"weight": 0.03}),
        replace(short, name="DP-DMD", diversity={"weight": 0.05}, input="rollout"),
        *few("2 steps"),
        *few("full"),
    ]


def few(group: str) -> list[Arm]:
    """The question itself, asked again of students of another kind."""
    base = Arm(f"continued ({group})", group, f"{DMD2} {group}")
    base = replace(base, steps=2) if group == "2 steps" else replace(base, mode="full")
    control = replace(base, name=f"no data at s={LOW:g} ({group})", forcing=forced(LOW, shown="gen"))
    named = f"forced at s={LOW:g}, curated ({group})"
    return [base, control, replace(base, name=named, control=control.name, forcing=forced(LOW), curated=True)]
