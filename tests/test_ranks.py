"""Who shares data and who shares a sequence; and that nothing but `Ranks` asks which process this is."""

from __future__ import annotations

import ast
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_dfd
from lightning_dfd.data import Sample, SeededStream, collate
from lightning_dfd.distributed.ranks import Ranks

PACKAGE = Path(lightning_dfd.__file__).parent
ASKS = {"global_rank", "world_size", "is_global_zero", "get_rank", "get_world_size"}
ALLOWED = {"distributed/ranks.py"}


def asked(tree: ast.AST) -> list[str]:
    """What code reads of a process's place among others."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_lightning = isinstance(node.value, ast.Name) and node.value.id == "rank_zero_only"
            if node.attr in ASKS or (of_lightning and node.attr == "rank"):
                found.append(f"{node.lineno}: {node.attr}")
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.lineno}: {alias.name}" for alias in node.names if alias.name in ASKS]
    return found


def test_only_ranks_ask_which_process_this_is() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): asked(ast.parse(path.read_text(encoding="utf-8")))
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in found.items() if lines and name not in ALLOWED} == {}
    assert found["distributed/ranks.py"]  # the search does find


def everyone(size: int, sequence: int) -> list[Ranks]:
    return [Ranks(rank, size, sequence) for rank in range(size)]


def load(index: int, k: int | None = None) -> Sample:
    return Sample(str(index), video=torch.zeros(3, 1, 2, 2, dtype=torch.uint8))


def clips_of(ranks: Ranks) -> list[str]:
    """The first clips of a process's stream."""
    stream = SeededStream(load, 11, seed=3, batch_size=2, start=1, ranks=ranks, parts=(7, 4))
    loader: DataLoader[Any] = DataLoader(stream, batch_size=2, collate_fn=collate)
    return [prompt for batch in islice(loader, 8) for prompt in batch.prompts]


def test_a_sequence_is_shared_by_neighbours() -> None:
    assert [(one.data_rank, one.sequence_rank) for one in everyone(4, 2)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {one.data_size for one in everyone(4, 2)} == {2}
    assert [one.is_first for one in everyone(4, 2)] == [True, False, False, False]


def test_those_that_share_a_sequence_get_the_same_clips() -> None:
    clips = [clips_of(one) for one in everyone(4, 2)]
    assert clips[0] == clips[1]
    assert clips[2] == clips[3]
    assert clips[0] != clips[2]
    assert [clips[0], clips[2]] == [clips_of(one) for one in everyone(2, 1)]  # as two processes without sharing


def test_a_cache_and_an_evaluation_are_shared_by_data() -> None:
    names = [f"clip {number}" for number in range(7)]
    shares = [one.share(names) for one in everyone(6, 2)]
    assert shares[0] == shares[1] == ["clip 0", "clip 3", "clip 6"]
    assert shares[2] == shares[3] == ["clip 1", "clip 4"]
    assert shares[4] == shares[5] == ["clip 2", "clip 5"]
    assert sorted(name for share in shares[::2] for name in share) == names


@pytest.mark.parametrize(("rank", "size", "sequence"), [(2, 2, 1), (-1, 2, 1), (0, 3, 2), (0, 2, 0)])
def test_what_cannot_be_is_refused(rank: int, size: int, sequence: int) -> None:
    with pytest.raises(ValueError, match="cannot be; rank is below size, and sequence divides size"):
        Ranks(rank, size, sequence)


def test_one_process_alone_needs_no_process_group() -> None:
    alone = Ranks.of(None)
    assert (alone.gather("value"), alone.broadcast("value")) == (["value"], "value")
    assert alone.largest(3, torch.device("cpu")) == 3


def test_the_running_processes_are_found(tmp_path: Path) -> None:
    assert Ranks.current().is_first
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        assert Ranks.current() == Ranks(0, 1)
    finally:
        torch.distributed.destroy_process_group()
