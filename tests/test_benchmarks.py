"""That benchmarks compare like with like."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fvd, report, step


def test_both_distances_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(60, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    assert fvd.distance(*fvd.sums(a, b * 1.2)) == pytest.approx(fvd.plain(a.numpy(), b.numpy() * 1.2), rel=1e-9)


def test_a_step_is_the_sum_of_its_parts() -> None:
    parts = {"forward": 0.5, "backward": 0.3, "optimizer": 0.1}
    batches = [{"role": role, "seconds": 1.0, "bare": 0.8, "parts": parts} for role in ("student", "fake")]
    row = step.row("toy", batches)
    assert row["batch / bare"] == pytest.approx(1.25)
    assert sum(value for name, value in row.items() if name.endswith("%")) == pytest.approx(125)


def test_tables_are_short() -> None:
    assert report.table([{"a": 0.12345, "b": 12345.6, "c": 7}]).splitlines()[2] == "| 0.123 | 12346 | 7 |"
