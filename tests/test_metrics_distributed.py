"""Metrics over two gloo processes, one of which may see no videos, against one process."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dfd.evaluation.metrics import (
    ColourStatistics,
    FrameConsistency,
    FrechetVideoDistance,
    MotionAmount,
    PromptDiversity,
    VendiScore,
    VideoSuite,
)
from tests.together import in_two_processes

pytestmark = pytest.mark.slow

COUNT = 10
PROMPTS = ["a cat", "ein Fuß"] * (COUNT // 2)
SEEDS = [2**62 + row for row in range(COUNT)]


def frame_means(videos: Tensor) -> Tensor:
    """[B, F, 6]."""
    return torch.cat([videos.mean((3, 4)), videos[..., :2, :].mean((3, 4))], 1).transpose(1, 2)


def make_videos(seed: int) -> Tensor:
    return torch.rand(COUNT, 3, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run(name: str, rows: list[int]) -> Any:
    """One metric, filled with some rows of the real and the generated videos."""
    real, generated = make_videos(0)[rows], make_videos(1)[rows]
    prompts, seeds = [PROMPTS[row] for row in rows], [SEEDS[row] for row in rows]
    if name == "distance":
        distance = FrechetVideoDistance(frame_means, min_samples=COUNT)
        if rows:
            distance.update(real, real=True)
            distance.update(generated, real=False)
        value = distance.compute()
        return value, distance.real_count, distance.generated_count
    if name == "colour":
        colour = ColourStatistics()
        if rows:
            colour.update(real, real=True)
            colour.update(generated, real=False)
        return colour.compute()
    if name in ("motion", "consistency"):
        mean = MotionAmount() if name == "motion" else FrameConsistency(frame_means)
        if rows:
            mean.update(generated)
        return mean.compute()
    if name == "suite":
        suite = VideoSuite(frame_means, frame_means, min_videos=COUNT)
        if rows:
            suite.update_real(real)
            suite.update(generated, prompts, seeds)
        return suite.compute()
    prompted = {
        "video": lambda: PromptDiversity(frame_means),
        "frame": lambda: PromptDiversity(frame_means, "frame"),
        "vendi": lambda: VendiScore(frame_means),
    }[name]()
    for part in (rows[:2], rows[2:]):  # several elements of a list state
        if part:
            chosen = [rows.index(row) for row in part]
            prompted.update(generated[chosen], [prompts[i] for i in chosen], [seeds[i] for i in chosen])
    return prompted.compute()


NAMES = ("distance", "colour", "motion", "consistency", "video", "frame", "vendi", "suite")
# Rows of each rank. Only what drops repeated (prompt, seed) pairs is given some twice.
SHARES = {
    "one rank is empty": ([*range(COUNT)], []),
    "the first is empty": ([], [*range(COUNT)]),
    "unequal shares": ([*range(7)], [7, 8, 9]),
    "padded": ([*range(7)], [7, 8, 9, 0, 1, 2, 3]),
}
PADDED = ("video", "frame", "vendi")


def reference(rank: int) -> dict[str, Any]:
    """Every rank loads the same real moments, which are those of all ranks' videos."""
    rows = [*range(7)] if rank == 0 else [7, 8, 9]
    source = FrechetVideoDistance(frame_means)
    source.update(make_videos(0)[rows], real=True)
    state = source.real_state()
    source.update(make_videos(0)[:1], real=True)  # the states are this rank's own again
    metric = FrechetVideoDistance(frame_means, min_samples=COUNT)
    metric.load_real_state(state)
    metric.update(make_videos(1)[rows], real=False)
    own = source.real_count
    colour = ColourStatistics()
    colour.update(make_videos(0)[rows], real=True)
    colour.load_real_state(colour.real_state())
    colour.update(make_videos(1)[rows], real=False)
    return {
        "colour": colour.compute(),
        "n": int(state["n"]),
        "own": own,
        "value": metric.compute(),
        "counted": metric.real_count,
    }


def refusals(rank: int) -> dict[str, Any]:
    """What is refused on all ranks, and that the metrics go on with their own states."""
    distance = FrechetVideoDistance(frame_means, min_samples=COUNT)
    rows = [*range(4)] if rank == 0 else []
    if rows:
        distance.update(make_videos(0)[rows], real=True)
        distance.update(make_videos(1)[rows], real=False)
    with pytest.raises(ValueError, match="4 real and 4 generated") as few:
        distance.compute()
    rest = [4, 5] if rank == 0 else [6, 7, 8, 9]
    distance.update(make_videos(0)[rest], real=True)
    distance.update(make_videos(1)[rest], real=False)
    diversity = PromptDiversity(frame_means)
    prompts = ["both", "both"] if rank == 0 else ["both", "löne"]
    diversity.update(make_videos(0)[rest[:2]], prompts, [2 * rank, 2 * rank + 1])
    with pytest.raises(ValueError, match="löne") as lonely:
        diversity.compute()
    nothing = PromptDiversity(frame_means)
    with pytest.raises(ValueError, match="no videos"):
        nothing.compute()
    return {"few": str(few.value), "then": distance.compute(), "lonely": str(lonely.value)}


def worker(folder: str) -> None:
    warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {}
    for share, rows in SHARES.items():
        for name in PADDED if share == "padded" else NAMES:
            results[f"{share}: {name}"] = run(name, rows[rank])
    results["reference"] = reference(rank)
    results["refusals"] = refusals(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(worker, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("share", "name"), [(share, name) for share in SHARES for name in (PADDED if share == "padded" else NAMES)]
)
def test_two_ranks_equal_one(ranks: list[dict[str, Any]], share: str, name: str) -> None:
    expected = run(name, [*range(COUNT)])
    for result in ranks:
        torch.testing.assert_close(result[f"{share}: {name}"], expected, rtol=2e-10, atol=1e-14)


def test_counts_are_of_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["one rank is empty: distance"][1:] == (COUNT, COUNT)


def test_reference_is_of_all_ranks_and_counted_once(ranks: list[dict[str, Any]]) -> None:
    expected = run("distance", [*range(COUNT)])[0]
    for rank, result in enumerate(ranks):
        loaded = result["reference"]
        assert (loaded["n"], loaded["counted"]) == (COUNT, COUNT)
        assert loaded["own"] == (8 if rank == 0 else 4)
        torch.testing.assert_close(loaded["value"], expected, rtol=2e-10, atol=0)
        torch.testing.assert_close(loaded["colour"], run("colour", [*range(COUNT)]), rtol=2e-10, atol=0)


def test_refusals_count_all_ranks_and_leave_states_alone(ranks: list[dict[str, Any]]) -> None:
    expected = run("distance", [*range(COUNT)])[0]
    for result in ranks:
        refused = result["refusals"]
        assert "needs 10 or more" in refused["few"]
        assert "1 of 2 prompts" in refused["lonely"]
        torch.testing.assert_close(refused["then"], expected, rtol=2e-10, atol=0)
