"""The fault suite at small N, and that it can tell a loss from a rescue. At large N: `make faults`."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_dfd.runs.loggers import guard
from lightning_dfd.training.optimizers import MAX_SKIPPED, BadGradients
from tests.faults import caches, folders, runs, suite
from tests.faults.broken_videos import BROKEN
from tests.faults.folders import GOOD
from tests.faults.unusual_videos import UNUSUAL
from tests.faults.videos import Expected

# a few of every group, the quick ones: every fault is for `make faults`
FEW = (
    "video: (empty|playlist|named pipe|unknown codec|cut off$|noise in pixels|turned|mirrored|alpha|ten|variable|odd)"
    "|caption: (very long|Latin|a link)|list: (nested|csv (too many|with))"
    "|path: (parent$|link out$|a device|endless path)|shard: (whole|cut|member (larger|a link|leads))"
    "|cache: (latents: (cut|bit flipped in the n|not a|another)|prompt: gone|index (nested|fps))"
    "|run: (disk full, (cache|log)|some|all|latents|logger|hub)"
)


@pytest.mark.slow(seconds=7)
def test_a_few_of_every_kind_are_named_or_survived(tmp_path: Path) -> None:
    results = suite.run_all(tmp_path, seeds=1, only=FEW, progress=False)
    assert [result for result in results if result.kind == "lost"] == []
    assert {result.group for result in results} == {"video", "caption", "list", "path", "shard", "cache", "run"}
    assert len(results) > 35
    assert f"| all | {len(results)} |" in suite.table(results)


def test_there_are_two_hundred() -> None:
    """At the default of four variants."""
    makers = BROKEN, UNUSUAL, folders.CAPTIONS, folders.LISTS, folders.PATHS, folders.SHARDS
    kinds = sum(len(kinds) for kinds in (*makers, caches.CHANGES, runs.TRIALS))
    assert 4 * kinds >= 200


@pytest.mark.parametrize(
    ("expected", "others", "lines", "kind"),
    [
        (Expected("bad.mp4"), {}, ["bad.mp4: broken"], "named"),
        (Expected("bad.mp4"), {}, ["something else"], "lost"),
        (Expected("bad.mp4"), {}, [], "lost"),
        (Expected("bad.mp4"), {"x": 0}, [], "lost"),
        (Expected("bad.mp4", True), {}, ["bad.mp4: broken"], "lost"),
        (Expected("bad.mp4", True, caption="y"), {"x": 0}, [], "lost"),
        (Expected("bad.mp4", None, torch.zeros(3, 1, 2, 2)), {"x": 0}, [], "survived"),
        (Expected("bad.mp4", None, torch.zeros(3, 1, 2, 2)), {"x": 99}, [], "lost"),
        (Expected("bad.mp4", None, torch.zeros(3, 1, 2, 2), undetectable=True), {"x": 99}, [], "undetected"),
    ],
)
def test_judgement(expected: Expected, others: dict[str, int], lines: list[str], kind: str) -> None:
    videos = {prompt: torch.full((3, 1, 2, 2), float(level)) for prompt, level in others.items()}
    assert suite.judge(expected, {GOOD: None, **videos}, lines).kind == kind
    assert suite.judge(expected, dict(videos), lines).kind == "lost"  # without the good one


def test_tracebacks_and_hangs_are_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path, rng: np.random.Generator) -> Any:
        raise KeyError("a bug")

    def hangs(folder: Path, rng: np.random.Generator) -> Any:
        while True:
            try:
                np.linalg.svd(np.ones((20, 20)))
            except Exception:
                continue

    monkeypatch.setattr(suite, "SECONDS", 1)
    broken = suite.Fault("x", "y", fails).try_out(tmp_path / "a", 0)
    assert (broken.kind, broken.said) == ("lost", "traceback: KeyError: 'a bug'")
    assert "still running" in suite.Fault("x", "y", hangs).try_out(tmp_path / "b", 0).said


def test_gradients_that_are_not_finite_are_dropped_for_each_role() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, bad = torch.optim.AdamW([weight], lr=0.1), BadGradients()
    for iteration in range(3 * MAX_SKIPPED):
        weight.grad = torch.ones(2)
        norm = torch.tensor(1.0 if iteration % 3 else float("inf"))
        assert bad.drop(optimizer, {"fake": torch.tensor(1.0), "discriminator": norm}, iteration) == (not iteration % 3)
        before = weight.detach().clone()
        optimizer.step()
        assert torch.equal(weight, before) == (not iteration % 3)
    for iteration in range(MAX_SKIPPED - 1):  # the other's good ones do not count for this one
        assert bad.drop(optimizer, {"student": torch.tensor(float("nan"))}, iteration)
        assert not bad.drop(optimizer, {"fake": torch.tensor(1.0)}, iteration)
    with pytest.raises(RuntimeError, match=r"iteration 77: the last 10 gradients of the student were not finite"):
        bad.drop(optimizer, {"student": torch.tensor(float("nan"))}, 77)


def test_a_guarded_logger_warns_once_by_name_and_stays_what_it_is(tmp_path: Path) -> None:
    class Remote(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise ConnectionError("gone")

    loggers = [Remote(tmp_path), CSVLogger(tmp_path / "csv", flush_logs_every_n_steps=1)]
    guard(loggers)
    guard(loggers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for logger in loggers:
                logger.log_metrics({"a": 1.0}, step=step)
    assert len(caught) == 1
    assert str(caught[0].message).startswith("Remote failed (ConnectionError: gone); training goes on")
    assert isinstance(loggers[0], Remote)
    assert len((Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()) == 4


def test_a_kill_leaves_the_rows_of_a_csv_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's own writer empties the file when a new column comes."""
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    guard([logger])
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step=step)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(csv.DictWriter, "writerows", killed)
    with pytest.raises(KeyboardInterrupt):
        logger.log_metrics({"b": 1.0}, step=3)
    monkeypatch.undo()
    file = Path(logger.log_dir) / "metrics.csv"
    assert [row["step"] for row in csv.DictReader(file.read_text().splitlines())] == ["0", "1", "2"]
    logger.log_metrics({"c": 1.0}, step=4)
    rows = [*csv.DictReader(file.read_text().splitlines())]
    assert [(row["step"], row["a"], row["b"], row["c"]) for row in rows[-2:]] == [
        ("3", "", "1.0", ""),
        ("4", "", "", "1.0"),
    ]
