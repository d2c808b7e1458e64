"""Distillation of the mixture's exact teacher by the package's own terms: two small networks, and no trainer.

Axis legend: B points, D = 8 numbers of a point; captions are int64 [B]; times are [B] in [0, 1].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_dfd.diffusion.draws import Draws, hash_seed
from lightning_dfd.diffusion.noise import Time
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.files import replacing
from lightning_dfd.objectives.terms import (
    FeatureShape,
    Networks,
    Step,
    StudentInput,
    Term,
    fake_loss,
    student_loss,
)
from lightning_dfd.objectives.terms.base import InputMode
from lightning_dfd.toy.mixture.world import CAPTIONS, DIMENSIONS, SCHEDULE, Measures, World, measure

WIDTH, LAYERS = 128, 3
FREQUENCIES = torch.pi * torch.tensor([1.0, 2.0, 4.0, 8.0])
FOUR_STEPS = (0.999, 0.749, 0.499, 0.249)
FIFTY_STEPS = tuple(torch.linspace(0.999, 0.0, 51, dtype=torch.float64)[:-1].tolist())
CPU = torch.device("cpu")
PointDenoiser = Callable[[Tensor, Time, Tensor], Tensor]  # (x_t, t, captions) -> x0


class Network(nn.Module):
    """A perceptron with residual layers from points at time t, told a caption, to clean points [B, D]. It predicts
    flow, as Wan's network does."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Linear(DIMENSIONS + 1 + 2 * len(FREQUENCIES), WIDTH)
            self.caption = nn.Embedding(CAPTIONS, WIDTH)
            self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS - 1))
            self.last = nn.Linear(WIDTH, DIMENSIONS)

    def features(self, x_t: Tensor, t: Tensor, captions: Tensor) -> list[Tensor]:
        """What each layer makes of x_t: LAYERS x [B, WIDTH]."""
        time = t.float()[:, None]
        waves = time * FREQUENCIES
        inputs = torch.cat([x_t, time, waves.sin(), waves.cos()], 1)
        found = [nn.functional.silu(self.first(inputs) + self.caption(captions))]
        for layer in self.hidden:
            found.append(found[-1] + nn.functional.silu(layer(found[-1])))
        return found

    def forward(self, x_t: Tensor, t: Tensor, captions: Tensor) -> Tensor:
        return SCHEDULE.to_x0(self.last(self.features(x_t, t, captions)[-1]), x_t, t)


def fit_teacher(world: World, seed: int = 0, iterations: int = 4000, batch: int = 512) -> Network:
    """A network that has learnt the exact unguided teacher. Student and fake score start from it, and its features are
    what a GAN sees."""
    network, generator = Network(seed), torch.Generator().manual_seed(seed)
    optimizer = adamw(network.parameters(), 3e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        captions = torch.randint(CAPTIONS, (batch,), generator=generator)
        x0 = world.draw(captions, generator, world.wrong)
        t = 0.001 + 0.998 * torch.rand(batch, generator=generator, dtype=torch.float64)
        x_t = SCHEDULE.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        target = SCHEDULE.from_x0(world.posterior_mean(x_t, t, captions), x_t, t)
        loss = (SCHEDULE.from_x0(network(x_t, t, captions), x_t, t) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return network


def adamw(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The package's default optimizer."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), weight_decay=0.01, fused=True)


class Pair(nn.Module):
    """A student and its fake score. Both start as copies of `start`."""

    def __init__(self, start: Network) -> None:
        super().__init__()
        self.student, self.fake = copy.deepcopy(start), copy.deepcopy(start)

    def save(self, path: Path) -> None:
        """Write both to a safetensors file, whole or not at all."""
        with replacing(path) as temporary:
            save_file(self.state_dict(), temporary)

    @staticmethod
    def load(path: Path) -> Pair:
        """What `save` wrote."""
        pair = Pair(Network())
        pair.load_state_dict(load_file(path))
        return pair


@dataclass(frozen=True)
class Method:
    """How a student is trained.

    Args:
        terms: `iteration -> terms` of the loss.
        inputs: how the student's input is made; `mixed` draws one of the two ways for each iteration.
        steps: the student's times.
        student_update_freq: the student is updated once in so many iterations, the fake score in all others.
        lr, fake_lr: of AdamW.
        curated: clips come with right captions; else these are as often wrong as the teacher's.
        clips: how many clips there are; None for new ones in every batch.
        batch: clips in a batch.
    """

    terms: Callable[[int], Sequence[Term]]
    inputs: InputMode | Literal["mixed"] = "data"
    steps: Sequence[float] = FOUR_STEPS
    student_update_freq: int = 5
    lr: float = 3e-4
    fake_lr: float = 3e-4
    curated: bool = False
    clips: int | None = None
    batch: int = 128


class Clips:
    """An endless stream of clips with captions, a function of the seed."""

    def __init__(self, world: World, method: Method, seed: int) -> None:
        self.world, self.batch = world, method.batch
        self.wrong = 0.0 if method.curated else world.wrong
        self.generator = torch.Generator().manual_seed(hash_seed(seed, "clips"))
        self.pool = None if method.clips is None else self._draw(method.clips)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        captions = torch.arange(count) % CAPTIONS
        return self.world.draw(captions, self.generator, self.wrong), captions

    def next(self) -> tuple[Tensor, Tensor]:
        """Points [B, D] and their captions [B]."""
        if self.pool is None:
            return self._draw(self.batch)
        rows = torch.randint(len(self.pool[0]), (self.batch,), generator=self.generator)
        return self.pool[0][rows], self.pool[1][rows]

    def others(self, captions: Tensor, count: int, generator: torch.Generator) -> list[list[Tensor]]:
        """For each caption of [B], `count` clips of it, [D] each."""
        if self.pool is None:
            points = self.world.draw(captions.repeat_interleave(count), generator, self.wrong)
        else:
            same = (captions[:, None] == self.pool[1]).float()
            points = self.pool[0][torch.multinomial(same, count, replacement=True, generator=generator).flatten()]
        return [list(rows) for rows in points.view(len(captions), count, -1)]


def train(world: World, start: Network, pair: Pair, method: Method, seed: int, looks: Sequence[int]) -> Iterator[int]:
    """Train `pair` in place, by turns as the package's module does; yields at each of these iterations, rising.

    Args:
        start: the network whose features terms see.
        seed: of clips and of all noise.
    """

    def features(x_t: Tensor, t: Tensor, captions: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        found = start.features(x_t, t, captions)
        return [found[block][:, None] for block in blocks]  # one token a point

    built = [term.build(lambda: FeatureShape(LAYERS, WIDTH)) for term in method.terms(0)]
    modules = {name: module for part in built for name, module in part.items()}
    networks = Networks(SCHEDULE, pair.student, pair.fake, world.teacher, features, modules)
    extra = [parameter for module in modules.values() for parameter in module.parameters()]
    trained = {"student": [*pair.student.parameters()], "fake": [*pair.fake.parameters(), *extra]}
    optimizers = {"student": adamw(trained["student"], method.lr), "fake": adamw(trained["fake"], method.fake_lr)}
    clips = Clips(world, method, seed)
    for iteration in range(1, looks[-1] + 1):
        real, captions = clips.next()
        draws, terms = Draws.of(seed, iteration, 0, 0, CPU), tuple(method.terms(iteration))
        given = StudentInput(_input_mode(method, draws), method.steps)
        step = Step(networks, real, captions, draws, given, terms=terms, others=partial(clips.others, captions))
        role = "fake" if iteration % method.student_update_freq else "student"
        loss = (student_loss if role == "student" else fake_loss)(terms, step)
        optimizers[role].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained[role], 10.0)
        optimizers[role].step()
        if iteration in looks:
            yield iteration


def _input_mode(method: Method, draws: Draws) -> InputMode:
    if method.inputs != "mixed":
        return method.inputs
    return "data" if torch.rand((), generator=draws.pairs) < 0.5 else "rollout"


@torch.no_grad()
def draw_samples(denoise: PointDenoiser, steps: Sequence[float], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` points [N, D] in as many network calls as steps, and their captions [N], as many of each."""
    captions = torch.arange(count) % CAPTIONS
    generator = torch.Generator().manual_seed(hash_seed(seed, "samples"))
    noise = Rollout(torch.randn(count, DIMENSIONS, generator=generator))
    denoised = stateless(lambda x_t, t: denoise(x_t, t, captions))
    return sample(denoised, SCHEDULE, noise, steps).latents, captions


def judge(world: World, denoise: PointDenoiser, steps: Sequence[float], seed: int, count: int = 8000) -> Measures:
    """Measures of `count` samples from noise that no training has seen."""
    return measure(world, *draw_samples(denoise, steps, count, seed))
