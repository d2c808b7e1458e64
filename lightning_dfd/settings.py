"""The keys of a recipe below `model:`, with the defaults of the method (2405.14867, 2606.18478).

They are plain dataclasses, so that the command line, a recipe and Python code set them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_dfd.objectives.dmd import ScoreSpace
from lightning_dfd.types import SampleKind


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
        _require(self.rank > 0, "model.student.rank", self.rank, "above 0")
        decay = self.ema_decay
        _require(decay is None or 0 < decay < 1, "model.student.ema_decay", decay, "between 0 and 1, or null")


@dataclass(frozen=True)
class SamplingSettings:
    """How the student samples, in training, in validation and once exported.

    Args:
        steps: the times of its network calls, falling, in (0, 1].
        kind: `ode` steps along the predicted direction, `renoise` predicts x0 and adds fresh noise.
    """

    steps: list[float] = field(default_factory=lambda: [0.999, 0.937, 0.833, 0.624])
    kind: SampleKind = "ode"

    def __post_init__(self) -> None:
        falling = all(a > b for a, b in zip(self.steps[:-1], self.steps[1:], strict=True))
        inside = bool(self.steps) and self.steps[0] <= 1 and self.steps[-1] > 0
        _require(falling and inside, "model.sampling.steps", self.steps, "a falling list of times in (0, 1]")


@dataclass(frozen=True)
class ScoreTimeSettings:
    """From which times teacher and fake score are asked: uniform, shifted, then fitted between low and high.

    Args:
        shift: 1 is uniform; above 1 moves times towards noise (2403.03206, eq. 23).
        low: the smallest time.
        high: the largest time.
    """

    shift: float = 1.0
    low: float = 0.001
    high: float = 0.999

    def __post_init__(self) -> None:
        _require(0 < self.low < self.high <= 1, "model.dmd.score_time", (self.low, self.high), "0 < low < high <= 1")
        _require(self.shift > 0, "model.dmd.score_time.shift", self.shift, "above 0")


@dataclass(frozen=True)
class DMDSettings:
    """Distribution matching.

    Args:
        guidance: scale of the teacher's guidance, `uncond + guidance * (cond - uncond)`, as in diffusers.
        negative_prompt: what the teacher's unconditional call is told.
        student_update_freq: the student is updated once in so many iterations, the fake score in all others.
        fake_space: where the fake score's error is taken: `x0`, `eps`, or `output` (v or flow).
        score_time: see there.
    """

    guidance: float = 5.0
    negative_prompt: str = ""
    student_update_freq: int = 5
    fake_space: ScoreSpace = "x0"
    score_time: ScoreTimeSettings = field(default_factory=ScoreTimeSettings)

    def __post_init__(self) -> None:
        _require(self.student_update_freq > 1, "model.dmd.student_update_freq", self.student_update_freq, "at least 2")
        _require(self.guidance >= 1, "model.dmd.guidance", self.guidance, "at least 1, which is no guidance")


@dataclass(frozen=True)
class DataForcingSettings:
    """Data forcing (2606.18478).

    Args:
        probability: share of student updates in which the teacher scores the real clip; 0 is DMD2, the paper
            takes 0.5.
    """

    probability: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.probability <= 1, "model.data_forcing.probability", self.probability, "between 0 and 1")


def _require(holds: bool, key: str, value: float | Sequence[float] | None, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{key} is {value}; it must be {allowed}")
