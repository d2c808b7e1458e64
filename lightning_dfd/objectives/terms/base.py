"""What a term of the loss is, and the values of a training step that it is made of.

The student's loss, and the fake score's, are sums of terms. A term is one object; it knows no trainer and no diffusers
pipeline, only functions `(x_t, t, cond) -> x0`:

>>> import torch
>>> from lightning_dfd.diffusion.draws import Draws
>>> from lightning_dfd.diffusion.noise import NoiseSchedule, Time
>>> from lightning_dfd.objectives.terms import DistributionMatching, Networks, Step, fake_loss, student_loss
>>> student, fake = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
>>> networks = Networks(
...     schedule=NoiseSchedule("flow"),
...     student=lambda x_t, t, cond: student(x_t),
...     fake=lambda x_t, t, cond: fake(x_t),
...     teacher=lambda x_t, t, cond, guidance: x_t * (1 - t[:, None]).float(),
... )
>>> step = Step(networks, torch.randn(8, 2), cond=None, draws=Draws.of(0, 0, 0, 0, torch.device("cpu")))
>>> student_loss([DistributionMatching()], step).backward()
>>> student.weight.grad.shape
torch.Size([2, 2])

Axis legend: B batch; latents are [B, ...]; times are [B] in [0, 1]; S tokens of a clip; D features of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.diffusion.noise import NoiseSchedule, Time
from lightning_dfd.diffusion.sampler import Denoise, Rollout, roll_to, stateless
from lightning_dfd.types import SampleKind

# What a network is told besides x_t and t. Terms hand it on and never look into it.
Condition = Any
Denoiser = Callable[[Tensor, Time, Condition], Tensor]
RollingDenoiser = Callable[[Rollout, Time, Condition], Rollout]
GuidedDenoiser = Callable[[Tensor, Time, Condition, "float | Tensor"], Tensor]
Features = Callable[[Tensor, Tensor, Condition, Sequence[int]], list[Tensor]]
Others = Callable[[int, torch.Generator], list[list[Tensor]]]
InputMode = Literal["data", "rollout"]


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise ValueError unless a setting is allowed: what came, and what it must be. Infinite numbers never are."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    finite = all(math.isfinite(number) for number in numbers if isinstance(number, float))
    if not (holds and finite):
        raise ValueError(f"{key} is {value}; it must be {allowed}")


@dataclass(frozen=True)
class ScoreTimeSettings:
    """The times at which teacher and fake score are asked: uniform, shifted, then fitted between low and high.

    Args:
        shift: 1 is uniform; above 1 moves times towards noise (2403.03206, eq. 23).
        low: the smallest time.
        high: the largest time.
    """

    shift: float = 1.0
    low: float = 0.001
    high: float = 0.999

    def __post_init__(self) -> None:
        require(0 < self.low < self.high <= 1, "model.dmd.score_time", (self.low, self.high), "0 < low < high <= 1")
        require(self.shift > 0, "model.dmd.score_time.shift", self.shift, "above 0")


@dataclass(frozen=True)
class StudentInput:
    """How the student's input is made in training.

    Args:
        mode: `data`, a noised real clip; `rollout`, the student's own sampling from pure noise, without gradient.
        steps: the times of the student's calls, falling.
        kind: how it samples between them.
    """

    mode: InputMode = "data"
    steps: Sequence[float] = (0.999, 0.937, 0.833, 0.624)
    kind: SampleKind = "ode"


@dataclass(frozen=True)
class Networks:
    """The roles as functions to x0, [B, ...] as x_t.

    Args:
        schedule: noise levels that all roles share.
        student, fake: `(x_t, t, cond) -> x0`.
        teacher: `(x_t, t, cond, guidance) -> x0`; guidance is one number or [B].
        features: `(x_t, t, cond, blocks) -> N x [B, S, D]`, what N blocks of the teacher, by their numbers, make of
            x_t, without guidance and with gradient to x_t.
        trained: modules that terms train, by name.
        rolling: the student in a rollout, `(rollout, t, cond) -> rollout`, with what it carries from call to call; None
            for one that carries nothing.
    """

    schedule: NoiseSchedule
    student: Denoiser
    fake: Denoiser
    teacher: GuidedDenoiser
    features: Features | None = None
    trained: Mapping[str, nn.Module] = field(default_factory=dict)
    rolling: RollingDenoiser | None = None


@dataclass(frozen=True)
class TeacherView:
    """What the teacher scores in an update of the student.

    Args:
        shown: latents [B, ...], without gradient; noised with the student's t and eps.
        guidance: one number or [B].
        real: the real clips that are paired with the student's, [B, ...].
    """

    shown: Tensor
    guidance: float | Tensor
    real: Tensor


class Step:
    """One batch of training. Every value is computed when it is first asked for, and kept.

    Args:
        networks: the roles.
        real: clean latents [B, ...].
        cond: their condition.
        draws: of this batch.
        student_input: how the student's input is made.
        score_time: the law of `t`.
        terms: all terms of the run, in order; `first_step` and `view` ask them.
        others: `(count, generator) ->` for each sample up to so many real clips of its caption, drawn; None where there
            are none to draw from.

    Attributes:
        logs: values that terms log, by name.
    """

    def __init__(
        self,
        networks: Networks,
        real: Tensor,
        cond: Condition,
        draws: Draws,
        student_input: StudentInput = StudentInput(),
        score_time: ScoreTimeSettings = ScoreTimeSettings(),
        terms: Sequence[Term] = (),
        others: Others | None = None,
    ) -> None:
        self.networks, self.real, self.cond, self.draws = networks, real, cond, draws
        self.student_input, self.score_time = student_input, score_time
        self.terms, self.others = tuple(terms), others
        self.logs: dict[str, Tensor] = {}
        self._coins: dict[str, Tensor] = {}

    @property
    def schedule(self) -> NoiseSchedule:
        return self.networks.schedule

    @cached_property
    def gen(self) -> Tensor:
        """The student's clean latents from its training input at one of its own times, with gradient.

        `data`: each clip is noised to a time of its own. `rollout`: the time is shared by batch and ranks. It is
        never one that a term trains apart (`Term.first_step`).
        """
        given, draws, real = self.student_input, self.draws, self.real
        if given.mode == "data":
            times = torch.tensor(list(given.steps), dtype=torch.float64, device=real.device)
            t = times[draws.indices(len(real), len(times))]
            return self.networks.student(self.schedule.add_noise(real, draws.noise_like(real), t), t, self.cond)
        first = max((term.first_step for term in self.terms), default=0)
        last = draws.index(first, len(given.steps))
        denoise, noise = self._rolling_student(), Rollout(draws.noise_like(real))
        with torch.no_grad():
            rolled = roll_to(denoise, self.schedule, noise, given.steps[: last + 1], given.kind, draws.noise_like)
        return denoise(rolled, real.new_full((len(real),), given.steps[last], dtype=torch.float64)).latents

    def _rolling_student(self) -> Denoise:
        student, rolling, cond = self.networks.student, self.networks.rolling, self.cond
        if rolling is None:
            return stateless(lambda x_t, t: student(x_t, t, cond))
        return lambda rollout, t: rolling(rollout, t, cond)

    @cached_property
    def _noise(self) -> tuple[Tensor, Tensor]:
        return self.draw_time(len(self.gen)), self.draws.noise_like(self.gen)

    @property
    def t(self) -> Tensor:
        """The score time, [B] float64."""
        return self._noise[0]

    @property
    def eps(self) -> Tensor:
        """The noise of the score time, [B, ...]."""
        return self._noise[1]

    @cached_property
    def x_t(self) -> Tensor:
        """`gen`, noised to `t` with `eps`."""
        return self.schedule.add_noise(self.gen, self.eps, self.t)

    def draw_time(self, count: int) -> Tensor:
        """Further score times, [count] float64."""
        law = self.score_time
        return self.draws.times(count, law.low, law.high, law.shift)

    def coin(self, name: str, probability: float) -> bool:
        """A draw that all ranks, and all batches of an iteration, share. The same name is the same draw."""
        if name not in self._coins:
            self._coins[name] = torch.rand((), generator=self.draws.shared)
        return bool(self._coins[name] < probability)

    def log(self, name: str, value: Tensor | float) -> None:
        """Log a scalar as `train/<name>`."""
        self.logs[f"train/{name}"] = torch.as_tensor(value).detach()


class Term:
    """One term of the loss. A subclass overrides what it needs; everything else adds nothing.

    It is named in a recipe, `model.terms: [{class_path: my_package.MyTerm, init_args: {weight: 0.1}}]`, by the
    arguments of its own `__init__`, and needs no change of this package.
    """

    key: ClassVar[str] = "model.terms"  # the recipe key that sets it
    first_step: int = 0  # the first of the student's sampling steps that rollouts train by the other terms
    pairs_clips: bool = False  # whether it rests on generated clips that are near the real ones they are paired with

    def build(self, features: Callable[[], FeatureShape]) -> Mapping[str, nn.Module]:
        """The modules that the term trains, by names of their own; they learn with the fake score.

        They are saved, clipped, sharded, optimised and planned with the rest. `features` says how many blocks the
        teacher has, and how wide a token of theirs is; it raises ValueError for a network without such blocks.
        """
        return {}

    def learning_rate(self) -> float | None:
        """Of the modules that `build` makes; None for the fake score's."""
        return None

    def view(self, step: Step, view: TeacherView) -> TeacherView:
        """Change what the teacher scores in an update of the student."""
        return view

    def change_gradient(self, step: Step, gradient: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
        """Change the DMD gradient [B, ...]: a weight for each sample, or a projection. All are float32, no gradient."""
        return gradient

    def student_loss(self, step: Step) -> Tensor | None:
        """A scalar to add to the student's loss."""
        return None

    def fake_loss(self, step: Step) -> Tensor | None:
        """A scalar to add to the loss of the fake score and of the modules of `build`; `step.gen` has no gradient."""
        return None

    def counted(self, step: Step) -> Mapping[str, int]:
        """What to count of an update of the student, once for all its batches: name -> by how much."""
        return {}

    def summary(self, counts: Mapping[str, int]) -> Mapping[str, float]:
        """Values to log that follow from the counts, by their whole names. `student_steps` is always counted."""
        return {}

    def check(self, recipe: TermRecipe) -> None:
        """Raise ValueError, in one line that names the key, where the rest of the recipe leaves no room for the term.
        Nothing is loaded yet."""

    def facts(self) -> Mapping[str, Any]:
        """What a checkpoint says of the term: recipe key -> text, number, null, or lists of these.

        A run cannot be resumed with another value. By default it is only that the term is there: name the settings
        that make a run what it is, and leave out those that a user may change, as weights.
        """
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        return {f"{self.key} {name}": "on"}

    def card(self) -> Mapping[str, str]:
        """Rows of an export's model card."""
        return {type(self).__qualname__: "a term of the loss"}

    def heaviest(self) -> Term:
        """The term as it takes most memory and work, with nothing left to a draw: what `lightning plan` plays."""
        return self


@dataclass(frozen=True)
class FeatureShape:
    """Of the teacher's blocks: how many there are, and features of a token."""

    blocks: int
    width: int


@dataclass(frozen=True)
class TermRecipe:
    """What terms may ask of the rest of a recipe.

    Args:
        student_input: how the student's input is made.
        adapters: whether the roles are adapters on one network.
        offload: whether the teacher waits on the CPU.
        cached: whether latents come from a cache; None while there are no data yet.
        takes_image: whether videos begin with a given image.
        sizes: how many sizes of video are trained.
    """

    student_input: StudentInput
    adapters: bool = True
    offload: bool = False
    cached: bool | None = None
    takes_image: bool = False
    sizes: int = 1


def check_terms(terms: Sequence[Term], recipe: TermRecipe) -> None:
    """Raise ValueError where a term does not fit `recipe`."""
    for term in terms:
        term.check(recipe)


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What terms say, in one mapping; a name that is taken gets a number."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            names = (name, *(f"{name} ({number})" for number in range(2, 1000)))
            found[next(free for free in names if free not in found)] = value
    return found


def student_loss(terms: Sequence[Term], step: Step) -> Tensor:
    """The sum of all terms of the student's loss, in their order.

    Raises:
        ValueError: the step was given other terms, so what they change in one another would be left out.
    """
    step.terms = step.terms or tuple(terms)
    if step.terms != tuple(terms):
        raise ValueError("student_loss and its Step are given different terms; give both the same")
    return _sum(terms, [term.student_loss(step) for term in terms], "student")


def fake_loss(terms: Sequence[Term], step: Step) -> Tensor:
    """The sum of all terms of the fake score's loss. The student's clips carry no gradient in it."""
    with torch.no_grad():
        _ = step.gen  # computed here, and kept
    return _sum(terms, [term.fake_loss(step) for term in terms], "fake score")


def _sum(terms: Sequence[Term], losses: Sequence[Tensor | None], role: str) -> Tensor:
    found = [loss for loss in losses if loss is not None]
    if not found:
        names = ", ".join(type(term).__name__ for term in terms) or "there are none"
        raise ValueError(f"no term trains the {role}: {names}")
    total = found[0]
    for loss in found[1:]:
        total = total + loss
    return total
