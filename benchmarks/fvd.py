"""The Fréchet distance beside a plain one in numpy and scipy: the same value, and in how much of its time.

    python -m benchmarks.fvd --output outputs/fvd

Both get the same features; the distance is computed by either in turn. `update` is what a run pays for each batch: the
sums that the metric keeps, beside the plain way of keeping all features and taking mean and covariance at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from benchmarks.report import report
from lightning_dfd.metrics.functional.frechet import Moments, frechet_distance

SETS = {"I3D, 400 logits": (400, 2048), "I3D, few videos": (400, 300), "V-JEPA, 1024": (1024, 2048)}
BATCH = 16


def plain(a: np.ndarray, b: np.ndarray) -> float:
    """As StyleGAN-V's and most FVD code has it: the square root of a matrix product."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root).real)


def ours(a: torch.Tensor, b: torch.Tensor) -> float:
    sides = []
    for features in (a, b):
        moments = Moments.of(features[:BATCH])
        for batch in features[BATCH:].split(BATCH):
            moments = moments + Moments.of(batch)
        sides += [moments.mean, moments.covariance]
    return float(frechet_distance(*sides))


def timed(function: Callable[..., float], *arguments: Any) -> tuple[float, float]:
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


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
        pairs = [(timed(ours, a, b), timed(plain, a.numpy(), b.numpy())) for _ in range(args.repeats)]
        own, reference = ([pair[side][0] for pair in pairs] for side in (0, 1))
        values = pairs[0][0][1], pairs[0][1][1]
        rows.append({
            "features": name, "videos of each": videos, "ours s": statistics.median(own),
            "scipy s": statistics.median(reference),
            "ours / scipy": statistics.median(mine / its for mine, its in zip(own, reference, strict=True)),
            "relative difference": abs(values[0] - values[1]) / values[1],
        })  # fmt: skip
    report("fvd", rows, args.output, repeats=args.repeats)


if __name__ == "__main__":
    main()
