"""The Fréchet distance beside a plain one in numpy and scipy: the same value, in what time.

    python -m benchmarks.fvd --output outputs/fvd

Both get the same features, in turn. The metric adds sums up batch by batch, so that it keeps no features, and takes the
distance from them at the end; the plain way keeps all features and takes mean, covariance and distance at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from benchmarks.report import report
from lightning_dfd.evaluation.metrics.functional.frechet import Moments, frechet_distance

SETS = {"I3D, 400 logits": (400, 2048), "I3D, few videos": (400, 300), "V-JEPA, 1024": (1024, 2048)}
BATCH = 16
T = TypeVar("T")


def plain(a: np.ndarray, b: np.ndarray) -> float:
    """As StyleGAN-V's and most FVD code has it: the square root of a matrix product."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root).real)


def sums(a: torch.Tensor, b: torch.Tensor) -> list[Moments]:
    """What the metric keeps, batch by batch."""
    return [reduce(add, map(Moments.of, features.split(BATCH))) for features in (a, b)]


def distance(real: Moments, made: Moments) -> float:
    return float(frechet_distance(real.mean, real.covariance, made.mean, made.covariance))


def timed(function: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="outputs/fvd", help="folder for fvd.json")
    args = parser.parse_args()
    rows = []
    for name, (features, videos) in tqdm(SETS.items(), desc="fvd"):
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
        a, b = (torch.randn(videos, features, generator=generator, dtype=torch.float64) @ mix for _ in range(2))
        b = b * 1.1 + 0.1
        updates, distances, plain_ones = [], [], []
        for _ in range(args.repeats):
            seconds, moments = timed(sums, a, b)
            updates.append(seconds)
            distances.append(timed(distance, *moments))
            plain_ones.append(timed(plain, a.numpy(), b.numpy()))
        ours, reference = distances[0][1], plain_ones[0][1]
        rows.append({
            "features": name, "videos of each": videos, "sums ms a batch of 16": ms(updates) * BATCH / (2 * videos),
            "distance ms": ms([one[0] for one in distances]), "scipy ms": ms([one[0] for one in plain_ones]),
            "distance / scipy": statistics.median(
                own[0] / its[0] for own, its in zip(distances, plain_ones, strict=True)
            ),
            "relative difference": abs(ours - reference) / reference,
        })  # fmt: skip
    report("fvd", rows, args.output, repeats=args.repeats)


if __name__ == "__main__":
    main()
