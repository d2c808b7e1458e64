"""The study: its arms are complete, its numbers are what they say, and it goes on where it was broken off."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_dfd.toy import study, world
from lightning_dfd.toy.study_report import cell, counts, read_results, write_report

TINY = study.Scale(seeds=1, distil=2, go_on=2, looks=(1,), clips=12, real=24, videos=2)


def test_every_arm_can_be_built_and_starts_from_one_before_it() -> None:
    arms = study.all_arms()
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    for arm in arms:
        assert arm.start is None or names.index(arm.start) < names.index(arm.name)
        study.build_module(arm, seed=0, init_from=None)
    # what would an unguided arm say without its control at the same guidance?
    for kind in ("data", "rollout"):
        for lever in ("unguided", "unguided high t"):
            assert {f"p=.5 {lever} ({kind})", f"no data {lever} ({kind})"} <= set(names)


def test_total_variation() -> None:
    shares = {"a": 0.5, "b": 0.5}
    assert study.total_variation(["a", "b"], shares) == 0
    assert study.total_variation(["a"], shares) == 0.5
    assert study.total_variation(["none", "none"], shares) == 1


@pytest.mark.slow(seconds=3)
def test_the_world_measures_as_itself() -> None:
    videos, captions = study.captioned_videos(30, seed=3)
    clips = ((videos.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().byte().numpy()
    found = study.world_measures(clips, captions)
    assert captions == [caption for caption in world.CAPTIONS for _ in range(30)]
    assert found["obedience"] > 0.99
    assert found["readable"] > 0.99
    assert found["direction_gap"] < 0.06
    collapsed = study.world_measures(np.stack([clips[0]] * 100), captions[:100])
    assert collapsed["modes_gap"] > 0.75


class HereAndNow(concurrent.futures.Executor):
    """In place of a pool of processes, each of which imports everything anew."""

    def __init__(self, workers: int, mp_context: Any) -> None: ...

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments, **options))
        return future


@pytest.mark.slow(seconds=32)
def test_a_broken_off_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first arm in a process of its own, as all are otherwise."""
    arms = [arm for arm in study.all_arms() if arm.name in ("dmd2 data", "continued (data)", "p=.5 (data)")]
    study.run_study(tmp_path, TINY, arms[:1], workers=1)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", HereAndNow)
    kept = study.result_of(tmp_path, "dmd2 data", 0)
    written = kept.stat().st_mtime_ns
    study.run_study(tmp_path, TINY, arms, workers=1)
    assert kept.stat().st_mtime_ns == written
    record = json.loads(study.result_of(tmp_path, "p=.5 (data)", 0).read_text(encoding="utf-8"))
    assert list(record["measured"]) == ["1", "2"]
    assert {"world_readings_fd", "diversity", "modes_gap", "obedience"} <= set(record["measured"]["1"])
    assert "transnetv2_fd" in record["measured"]["2"]
    write_report(tmp_path, [arm.name for arm in arms])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Less `continued`, seed by seed" in report
    assert (tmp_path / "iterations_data.png").is_file()
    found = read_results(tmp_path, [])["p=.5 (data)"]
    row = next(line for line in report.splitlines() if line.startswith("| p=.5 (data)"))
    assert cell(found.of("diversity")) in row


@pytest.mark.parametrize(("values", "text"), [([1.0, 2.0], "1.500 ± 0.707"), ([20.0], "20.0")])
def test_cells_show_mean_and_spread(values: list[float], text: str) -> None:
    assert cell(np.array(values)) == text


@pytest.mark.parametrize(
    ("values", "does"),
    [([1.0, 2.0, 3.0], True), ([-1.0, -2.0, -1.5], True), ([1.0, 2.0, -0.1], False), ([0.1, 0.2, 4.0], False),
     ([1.0, 1.0], False)],
)  # fmt: skip
def test_what_counts_is_what_the_protocol_says(values: list[float], does: bool) -> None:
    assert counts(np.array(values)) == does
