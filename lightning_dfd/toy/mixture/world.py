"""A mixture of Gaussians with captions: its clips, its exact teacher, and how a set of clips compares with it.

A clip is a point. Its first two numbers show the caption, the other six one of twelve modes. All captions share the
modes, but each has typical and rare ones. A known share of the captions that the teacher knows is random, as captions
from the web are; so the teacher obeys only under guidance, and guidance costs modes.

Axis legend: N or B points, D = 8 numbers of a point, C captions, M modes, K = C * M components. Captions are int64,
0 to C - 1; `UNCONDITIONAL` stands for no caption.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dfd.diffusion.noise import NoiseSchedule, Time, append_dims
from lightning_dfd.evaluation.metrics.functional import Moments, frechet_distance
from lightning_dfd.objectives import guide, is_unguided

CAPTIONS, MODES = 4, 12
CAPTION_AXES, MODE_AXES = 2, 6
DIMENSIONS = CAPTION_AXES + MODE_AXES
UNCONDITIONAL = CAPTIONS
SCHEDULE = NoiseSchedule("flow")
STRAY_AT = 4.1  # standard deviations: the 99 % point of a distance in six dimensions (chi)


class World:
    """The mixture.

    Args:
        wrong: share of the teacher's captions that are random.
        caption_radius, mode_radius: distance of the centres from 0.
        spread: standard deviation of a component, in every direction.
        ratios: how often a caption's typical, ordinary and rare modes are drawn, relative to one another.
        seed: draws the directions of the modes.
    """

    def __init__(
        self,
        wrong: float = 0.3,
        caption_radius: float = 1.4,
        mode_radius: float = 2.0,
        spread: float = 0.35,
        ratios: tuple[float, float, float] = (5.0, 2.0, 1.0),
        seed: int = 0,
    ) -> None:
        self.wrong, self.spread = wrong, spread
        angles = torch.arange(CAPTIONS) * (2 * math.pi / CAPTIONS)
        self.caption_centres = caption_radius * torch.stack([angles.cos(), angles.sin()], 1)  # [C, 2]
        self.mode_centres = mode_radius * _spread_directions(MODES, MODE_AXES, seed)  # [M, 6]
        typical, ordinary, rare = ratios
        pattern = torch.tensor([typical] * 3 + [ordinary] * 4 + [rare] * 5)
        shares = torch.stack([pattern.roll(3 * caption) for caption in range(CAPTIONS)])
        self.shares = shares / shares.sum(1, keepdim=True)  # [C, M]: the truth
        captions, modes = torch.meshgrid(torch.arange(CAPTIONS), torch.arange(MODES), indexing="ij")
        self.centres = torch.cat(
            [self.caption_centres[captions.flatten()], self.mode_centres[modes.flatten()]], 1
        )  # [K, D]
        noisy = (1 - wrong) * torch.eye(CAPTIONS) + wrong / CAPTIONS
        known = torch.cat([noisy, torch.full((1, CAPTIONS), 1 / CAPTIONS)])
        self.log_weights = (known[:, :, None] * self.shares).flatten(1).log()  # [C + 1, K]: what the teacher knows

    def draw(self, captions: Tensor, generator: torch.Generator, wrong: float = 0.0) -> Tensor:
        """Points [N, D] for captions [N], a share `wrong` of which are replaced by random ones."""
        random = torch.randint(CAPTIONS, captions.shape, generator=generator)
        replaced = torch.rand(captions.shape, generator=generator) < wrong
        shown = torch.where(replaced, random, captions)
        modes = torch.multinomial(self.shares[shown], 1, generator=generator)[:, 0]
        noise = torch.randn(len(captions), DIMENSIONS, generator=generator)
        return self.centres[shown * MODES + modes] + self.spread * noise

    def posterior_mean(self, x_t: Tensor, t: Time, captions: Tensor) -> Tensor:
        """E[x0 | x_t, caption], [B, D]: Bayes over components, then a Gaussian's mean within each."""
        alpha, sigma = (append_dims(level, x_t).to(x_t) for level in SCHEDULE.alpha_sigma(t))
        variance = alpha.square() * self.spread**2 + sigma.square()  # [B, 1], of x_t in one component
        # |x_t - alpha c|^2 without the part that all components share
        fit = (2 * alpha * (x_t @ self.centres.T) - alpha.square() * self.centres.square().sum(1)) / (2 * variance)
        centre = (fit + self.log_weights[captions]).softmax(1) @ self.centres
        return centre + alpha * self.spread**2 / variance * (x_t - alpha * centre)

    def teacher(self, x_t: Tensor, t: Time, captions: Tensor, guidance: float | Tensor) -> Tensor:
        """The guided posterior mean, in the diffusers form (2207.12598): x0 [B, D]."""
        conditional = self.posterior_mean(x_t, t, captions)
        if is_unguided(guidance):
            return conditional
        nothing = torch.full_like(captions, UNCONDITIONAL)
        return guide(self.posterior_mean(x_t, t, nothing), conditional, guidance)

    @cached_property
    def mean_norm(self) -> Tensor:
        """The mean distance from 0 for each caption, [C], of 100,000 points."""
        generator = torch.Generator().manual_seed(0)
        found = [self.draw(torch.full((100_000,), c), generator).norm(dim=1).mean() for c in range(CAPTIONS)]
        return torch.stack(found)

    def moments(self, caption: int) -> tuple[Tensor, Tensor]:
        """The exact mean [D] and covariance [D, D] of a caption's points, float64."""
        modes = self.mode_centres.double()
        shares = self.shares[caption].double()
        mean = shares @ modes
        covariance = self.spread**2 * torch.eye(DIMENSIONS, dtype=torch.float64)
        centred = modes - mean
        covariance[CAPTION_AXES:, CAPTION_AXES:] += (centred.T * shares) @ centred
        return torch.cat([self.caption_centres[caption].double(), mean]), covariance


def _spread_directions(count: int, axes: int, seed: int) -> Tensor:
    """Unit vectors [count, axes] that keep away from one another: charges on a sphere, after some steps."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(count, axes, generator=generator), dim=1)
    for _ in range(200):
        apart = points[:, None] - points
        push = (apart / (apart.square().sum(2, keepdim=True) + 1e-3).pow(1.5)).sum(1)
        points = torch.nn.functional.normalize(points + 0.02 * push, dim=1)
    return points


class Measures(NamedTuple):
    """How points for captions compare with the truth. Shares and distances are means over captions.

    Attributes:
        obey: share of points that are nearest to their caption's centre.
        modes: effective number of modes of a caption, 1 / the chance that two of its points share their mode (Hill's
            number of order 2, without bias).
        gap: total variation between the shares of modes and the true ones.
        norm: mean distance from 0, over the true one. Above 1 is over-saturated.
        stray: share of points further from every mode's centre than all but 1 % of true ones.
        frechet: Fréchet distance to the exact mean and covariance.
    """

    obey: float
    modes: float
    gap: float
    norm: float
    stray: float
    frechet: float


def measure(world: World, points: Tensor, captions: Tensor) -> Measures:
    """Compare points [N, D], made for captions [N], with the truth; every caption needs some."""
    shown = torch.cdist(points[:, :CAPTION_AXES], world.caption_centres).argmin(1)
    distances, modes = torch.cdist(points[:, CAPTION_AXES:], world.mode_centres).min(1)
    rows = []
    for caption in range(CAPTIONS):
        mine = captions == caption
        counts, n = torch.bincount(modes[mine], minlength=MODES).double(), int(mine.sum())
        moments = Moments.of(points[mine])
        found = [
            (shown[mine] == caption).double().mean(),
            n * (n - 1) / (counts * (counts - 1)).sum(),
            (counts / n - world.shares[caption]).abs().sum() / 2,
            points[mine].norm(dim=1).double().mean() / world.mean_norm[caption],
            (distances[mine] > STRAY_AT * world.spread).double().mean(),
            frechet_distance(moments.mean, moments.covariance, *world.moments(caption)),
        ]
        rows.append(torch.stack(found))
    return Measures(*torch.stack(rows).mean(0).tolist())
