"""The keys of a recipe below `model:`, with the defaults of the method (2405.14867, 2606.18478, 2602.03139).

They are plain dataclasses, so that the command line, a recipe and Python code set them alike.
"""

from __future__ import annotations

import math
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
        above = self.alpha is None or self.alpha > 0
        _require(above, "model.student.alpha", self.alpha, "above 0, or null for alpha = rank")
        named = self.targets is None or (bool(self.targets) and all(self.targets))
        _require(named, "model.student.targets", self.targets, "names of linear layers, or null for the backbone's")
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
    """Data forcing (2606.18478). All but `probability` are levers beyond the paper, whose behaviour is the default.

    Args:
        probability: share of student updates in which the teacher scores the real clip; 0 is DMD2, the paper
            takes 0.5.
        guidance: of the teacher where it is forced; null for dmd.guidance.
        time_range: [low, high] of the score times that are forced, of each sample; null for all.
        nearest_of: pair with the nearest of so many real clips of the caption; above 1 it needs a cache.
        shown: what the teacher is shown where forced; `gen` is a control that uses no real clip.
        until: last iteration of data forcing, plain DMD2 after it; null for no end.
    """

    probability: float = 0.0
    guidance: float | None = None
    time_range: list[float] | None = None
    nearest_of: int = 1
    shown: Literal["real", "gen"] = "real"
    until: int | None = None

    def __post_init__(self) -> None:
        key = "model.data_forcing"
        _require(0 <= self.probability <= 1, f"{key}.probability", self.probability, "between 0 and 1")
        _require(self.guidance is None or self.guidance >= 1, f"{key}.guidance", self.guidance, "at least 1, or null")
        times = self.time_range
        inside = times is None or (len(times) == 2 and 0 <= times[0] < times[1] <= 1)
        _require(inside, f"{key}.time_range", times, "[low, high] with 0 <= low < high <= 1, or null")
        _require(self.nearest_of >= 1, f"{key}.nearest_of", self.nearest_of, "at least 1, the batch's own clip")
        paired = self.nearest_of == 1 or self.shown == "real"
        _require(paired, f"{key}.nearest_of", self.nearest_of, "1 with shown: gen, where no real clip is shown")
        _require(self.until is None or self.until >= 0, f"{key}.until", self.until, "0 or more iterations, or null")


@dataclass(frozen=True)
class GANSettings:
    """DMD2's GAN (2405.14867): a discriminator on the teacher's features, trained along with the fake score.

    Args:
        weight: of the generator's loss in the student's; 0 builds no discriminator.
        r1_weight: of the approximate R1 (2501.08316) in the discriminator's loss; peers take 100 to 1000.
        r1_sigma: standard deviation of the noise that it puts on clean latents.
        same_noise: real and made clips get the same time and noise in the discriminator's update.
        blocks: numbers of the teacher's blocks whose features it sees; null for the middle and later ones.
        lr: of the discriminator, which otherwise shares the fake score's optimizer; null for the fake score's.
    """

    weight: float = 0.0
    r1_weight: float = 0.0
    r1_sigma: float = 0.1
    same_noise: bool = True
    blocks: list[int] | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "model.gan.weight", self.weight, "0 (off) or above")
        _require(self.r1_weight >= 0, "model.gan.r1_weight", self.r1_weight, "0 (off) or above")
        _require(self.r1_sigma > 0, "model.gan.r1_sigma", self.r1_sigma, "above 0")
        _require(self.lr is None or self.lr > 0, "model.gan.lr", self.lr, "above 0, or null")

    def check_offload(self, student: StudentSettings) -> None:
        """Raise ValueError where a gradient has to run through a teacher that waits on the CPU."""
        apart = student.mode == "lora" or self.weight == 0
        why = "with model.offload and model.student.mode: full, as the GAN's gradient runs through the teacher"
        _require(apart, "model.gan.weight", self.weight, f"0 {why}")


@dataclass(frozen=True)
class DiversitySettings:
    """DP-DMD (2602.03139): the student's first step learns the teacher's path, DMD trains the others.

    Args:
        weight: of the first step's loss in the student's; 0 is off, the paper takes 0.05.
        anchor_steps: guided steps of the teacher from the student's first time to its second.
    """

    weight: float = 0.0
    anchor_steps: int = 5

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "model.diversity.weight", self.weight, "0 (off) or above")
        _require(self.anchor_steps >= 1, "model.diversity.anchor_steps", self.anchor_steps, "at least 1")

    def check(self, student: StudentSettings, sampling: SamplingSettings) -> None:
        """Raise ValueError where the rest of the recipe leaves no room for the term."""
        if self.weight == 0:
            return
        why = "with model.diversity.weight above 0, since the first of the student's own steps is trained apart"
        _require(student.input == "rollout", "model.student.input", student.input, f"rollout {why}")
        _require(len(sampling.steps) > 1, "model.sampling.steps", sampling.steps, f"two times or more {why}")


def _require(holds: bool, key: str, value: float | str | Sequence[float | str] | None, allowed: str) -> None:
    """Raise ValueError unless the value is allowed; infinite numbers never are."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
    if not (holds and finite):
        raise ValueError(f"{key} is {value}; it must be {allowed}")


def check_counts(gradient_clip: float, accumulate: int, seed: int) -> None:
    """Raise ValueError for what DistillationModule cannot train with."""
    _require(gradient_clip > 0, "model.gradient_clip", str(gradient_clip), "above 0; .inf clips nothing")
    _require(accumulate > 0, "model.accumulate", accumulate, "at least 1 batch")
    _require(0 <= seed < 2**63, "model.seed", seed, "between 0 and 2^63 - 1")
