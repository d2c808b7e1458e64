"""How much the videos of one prompt differ, from their features.

Axis legend: N videos of all prompts, L of one prompt, F frames, D features. Computed in float64.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_dfd.evaluation.metrics.functional.videos import check_videos

PAPER_FRAMES = 16  # 2606.18478, eq. 26


def spaced_frames(videos: Tensor, count: int = PAPER_FRAMES) -> Tensor:
    """`count` evenly spaced frames of videos [B, C, F, H, W], first and last included; all if there are fewer."""
    check_videos(videos)
    frames = videos.shape[2]
    if frames <= count:
        return videos
    return videos[:, :, torch.linspace(0, frames - 1, count).round().long().to(videos.device)]


def mean_pairwise_cosine(features: Tensor) -> Tensor:
    """Mean cosine over the pairs of L vectors, [L, D] -> [] or, per frame, [L, F, D] -> [F]; needs L >= 2.

    Closed form: for unit vectors u the L(L-1) ordered pairs sum to |sum u|^2 - L. A vector of length zero has cosine 0
    with every other.
    """
    units = F.normalize(features.double(), dim=-1, eps=1e-300)
    count = len(features)
    pairs = units.sum(0).square().sum(-1) - units.square().sum(-1).sum(0)
    mean: Tensor = pairs / (count * (count - 1))
    return mean


def split_groups(features: Tensor, groups: Tensor) -> list[Tensor]:
    """The features [L, ...] of each group, from features [N, ...] and groups [N] of integers.

    Raises:
        ValueError: if there is no group, or one has fewer than two videos.
    """
    counts = Counter(groups.tolist())
    if not counts or min(counts.values()) < 2:
        raise ValueError(
            f"got groups with counts {dict(counts)}; need at least one group, and two videos or more in each. "
            "Generate more seeds of each prompt."
        )
    return [features[groups == group] for group in counts]


def prompt_diversity(features: Tensor, groups: Tensor) -> Tensor:
    """1 - mean pairwise cosine of the videos of a prompt, averaged over prompts (2606.18478, eq. 26).

    Args:
        features: [N, D], one vector per video: the paper's measure for frame features averaged over 16 evenly spaced
            frames. Or [N, F, D]: the paper's per-frame variant, pairs compared frame by frame, then averaged.
        groups: [N] integers, equal for the videos of one prompt.

    Returns:
        A float64 scalar in [0, 2]: 0 if the videos of each prompt have one direction, 1 if they are orthogonal.

    Raises:
        ValueError: if a group has fewer than two videos.
    """
    return torch.stack([1 - mean_pairwise_cosine(part).mean() for part in split_groups(features, groups)]).mean()


def vendi_score(features: Tensor) -> Tensor:
    """The effective number of different samples among L, features [L, D] (Friedman & Dieng, 2210.02410).

    exp(-sum of lambda log lambda) over the eigenvalues of K / L, K the matrix of cosines: a float64 scalar from 1 (all
    have one direction) to min(L, D) (all orthogonal). It grows with L: compare values of one L only.
    """
    units = F.normalize(features.double(), dim=-1, eps=1e-300)
    eigenvalues = torch.linalg.svdvals(units).square() / len(units)
    score: Tensor = torch.special.entr(eigenvalues).sum().exp()
    return score
