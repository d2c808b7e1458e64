"""The Fréchet distance of two sets of features, each taken for a Gaussian.

Axis legend: N samples, D features. Everything is float64. Source: Heusel et al., 1706.08500; of videos: Unterthiner
et al., 1812.01717.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What a set of features leaves behind: float64 sums, so that sets may be added up in parts.

    Attributes:
        n: how many samples, [].
        total: their sum, [D].
        outer: the sum of their outer products, [D, D].
    """

    n: Tensor
    total: Tensor
    outer: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Moments of features [N, D]."""
        features = features.double()
        n = torch.tensor(len(features), dtype=torch.float64, device=features.device)
        return Moments(n, features.sum(0), features.T @ features)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets together; sums of length 1 stand for no samples yet and fit any D.

        Raises:
            ValueError: if the features are of different lengths.
        """
        lengths = {len(self.total), len(other.total)} - {1}
        if len(lengths) > 1:
            raise ValueError(
                f"got features of lengths {sorted(lengths)}; need one length. "
                "Use one extractor for all videos, and statistics that were computed with it."
            )
        return Moments(self.n + other.n, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> Tensor:
        """[D]."""
        return self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """[D, D], with n - 1 below, as in `numpy.cov`; needs n >= 2."""
        return (self.outer - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


def _factor(cov: Tensor) -> Tensor:
    """X [D, rank] with X X^T = cov, for a covariance of any rank."""
    values, vectors = torch.linalg.eigh(cov)
    # Rounding leaves eigenvalues near zero, of either sign, where fewer samples than features leave true zeros.
    # Their roots would be far larger than they are.
    kept = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    factor: Tensor = vectors[:, kept] * values[kept].sqrt()
    return factor


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared Wasserstein-2 distance.

    The trace of the root is the sum of the singular values of X^T Y for any X X^T = cov_a, Y Y^T = cov_b. So taken, it
    needs no square root of rounding errors, and equal arguments give zero up to rounding.

    Args:
        mean_a, mean_b: [D].
        cov_a, cov_b: [D, D], symmetric, of any rank.

    Returns:
        A float64 scalar in squared units of the features, at least 0; NaN if an argument holds NaN or infinity.

    Raises:
        ValueError: if the lengths differ.
    """
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"got features of lengths {list(mean_a.shape)} and {list(mean_b.shape)}; need one length. "
            "Use statistics that were computed with the same extractor."
        )
    mean_a, cov_a, mean_b, cov_b = (value.double() for value in (mean_a, cov_a, mean_b, cov_b))
    distance: Tensor = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace()
    if not (cov_a.isfinite().all() and cov_b.isfinite().all()):
        return distance * torch.nan
    root = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    distance = distance - 2 * root
    return distance.clamp(min=0.0)
