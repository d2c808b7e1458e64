"""The keys of a recipe below `model:`, with the defaults of the method (2405.14867, 2606.18478, 2602.03139).

They are plain dataclasses, so that the command line, a recipe and Python code set them alike. Those of a term of the
loss stand beside the term, in objectives/terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from lightning_dfd.objectives.terms import (
    DataForcingSettings,
    DiversitySettings,
    DMDSettings,
    GANSettings,
    ScoreTimeSettings,
    require,
)
from lightning_dfd.types import SampleKind

__all__ = [
    "DMDSettings",
    "DataForcingSettings",
    "DiversitySettings",
    "GANSettings",
    "SamplingSettings",
    "ScoreTimeSettings",
    "StudentSettings",
]


RENAMED = {"renoise": "sde"}  # values of earlier versions, and what they are called now


@dataclass(frozen=True)
class StudentSettings:
    """What is trained.

    Args:
        mode: `lora` puts student and fake score as adapters on the one frozen teacher; `full` trains a whole
            copy of the teacher for each.
        rank: of the adapters.
        alpha: adapters are scaled by alpha / rank; null for alpha = rank.
        targets: names of the linear layers that get adapters; null for the backbone's list.
        input: what the student is given in training. `data`: a noised real clip at one of its own times, so
            that its output pairs with that clip. `rollout`: its own samples, from pure noise down to that time.
        ema_decay: of a moving average of the student, kept beside it and exported instead of it; null for none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
    """

    mode: Literal["lora", "full"] = "lora"
    rank: int = 64
    alpha: int | None = None
    targets: list[str] | None = None
    input: Literal["data", "rollout"] = "data"
    ema_decay: float | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(self.rank > 0, "model.student.rank", self.rank, "above 0")
        above = self.alpha is None or self.alpha > 0
        require(above, "model.student.alpha", self.alpha, "above 0, or null for alpha = rank")
        named = self.targets is None or (bool(self.targets) and all(self.targets))
        require(named, "model.student.targets", self.targets, "names of linear layers, or null for the backbone's")
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "model.student.ema_decay", decay, "between 0 and 1, or null")


@dataclass(frozen=True)
class SamplingSettings:
    """How the student samples, in training, in validation and once exported.

    Args:
        steps: the times of its network calls, falling, in (0, 1].
        kind: `ode` steps along the predicted direction, `sde` predicts x0 and adds fresh noise.
    """

    steps: list[float] = field(default_factory=lambda: [0.999, 0.937, 0.833, 0.624])
    kind: SampleKind = "ode"

    def __post_init__(self) -> None:
        kinds = get_args(SampleKind)
        now = f", which {self.kind} is called now" if self.kind in RENAMED else ""
        require(self.kind in kinds, "model.sampling.kind", self.kind, f"{' or '.join(kinds)}{now}")
        falling = all(a > b for a, b in zip(self.steps[:-1], self.steps[1:], strict=True))
        inside = bool(self.steps) and self.steps[0] <= 1 and self.steps[-1] > 0
        require(falling and inside, "model.sampling.steps", self.steps, "a falling list of times in (0, 1]")
