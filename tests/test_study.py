"""The study: its arms are complete, its numbers are what they say, and it goes on where it was broken off."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_dfd.toy import study, world
from lightning_dfd.toy.study_arms import all_arms
from lightning_dfd.toy.study_report import Results, cell, counts, given_back, read_results, write_report

TINY = study.Scale(
    seeds=1, distil=2, go_on=2, long=3, curve=(1,), looks=(1, 2), clips=12, real=24, videos=2,
)  # fmt: skip


def test_every_arm_can_be_built_and_starts_from_one_before_it() -> None:
    arms = all_arms()
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names)
    for arm in arms:
        for other in (arm.start, arm.control):
            assert other is None or names.index(other) < names.index(arm.name)
        study.build_module(arm, seed=0, init_from=None)


def test_every_claim_has_its_control_without_data() -> None:
    """What would an arm with another guidance say without the same guidance and no data?"""
    arms = {arm.name: arm for arm in all_arms()}
    for arm in arms.values():
        if arm.forcing.get("guidance") is not None and arm.forcing.get("shown") != "gen":
            control = arms[str(arm.control)].forcing
            assert control["shown"] == "gen"
            assert (control["guidance"], control["probability"]) == (
                arm.forcing["guidance"],
                arm.forcing["probability"],
            )


@pytest.mark.slow(seconds=5)
def test_the_world_measures_as_itself(tmp_path: Path) -> None:
    study.prepare(tmp_path, TINY, [])
    videos, captions = study.captioned_videos(24, seed=3, right=True)
    found = study.measure_videos(videos, captions, [number % 24 for number in range(len(captions))], tmp_path)
    assert captions == [caption for caption in world.CAPTIONS for _ in range(24)]
    assert found["obedience"] == 1
    assert found["readable"] > 0.99
    assert found["kinds"] == pytest.approx(world.effective_kinds(), rel=0.35)
    assert found["colour"] == pytest.approx(1, abs=0.04)
    assert found["shares_gap"] < 0.08
    collapsed = study.measure_videos(videos[:1].repeat(24, 1, 1, 1, 1), captions[:24], range(24), tmp_path)
    assert collapsed["kinds"] == pytest.approx(1)
    assert collapsed["shares_gap"] > 0.4


class HereAndNow(concurrent.futures.Executor):
    """In place of a pool of processes, each of which imports everything anew."""

    def __init__(self, workers: int, mp_context: Any) -> None: ...

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*arguments, **options))
        return future


@pytest.mark.slow(seconds=30)
def test_a_broken_off_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first arm in a process of its own, as all are otherwise."""
    arms = [arm for arm in all_arms() if arm.name in ("teacher s=3", "dmd2", "continued", "p=.5, the paper")]
    study.run_study(tmp_path, TINY, [arm for arm in arms if arm.name == "dmd2"], workers=1)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", HereAndNow)
    kept = study.result_of(tmp_path, "dmd2", 0)
    written = kept.stat().st_mtime_ns
    study.run_study(tmp_path, TINY, arms, workers=1)
    assert kept.stat().st_mtime_ns == written
    record = json.loads(study.result_of(tmp_path, "p=.5, the paper", 0).read_text(encoding="utf-8"))
    assert list(record["measured"]) == ["1", "2", "3"]
    assert {"world_readings_fd", "diversity", "kinds", "colour", "obedience"} <= set(record["measured"]["1"])
    write_report(tmp_path, [arm.name for arm in arms])
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Less going on with DMD2, seed by seed" in report
    assert (tmp_path / "iterations_going_on.png").is_file()
    found = read_results(tmp_path, [])["p=.5, the paper"]
    row = next(line for line in report.splitlines() if line.startswith("| p=.5, the paper, 3"))
    assert cell(found.of("kinds")) in row


def results(name: str, kinds: float, colour: float) -> Results:
    return Results(name, "", 5, (0,), {5: [{"kinds": kinds, "colour": colour}]})


def test_what_is_given_back_is_a_share_of_what_was_lost() -> None:
    base, teacher = results("dmd2", 10, 1.4), results("teacher", 30, 1.1)
    assert given_back(base, 5, base, teacher) == (0, 0)
    assert given_back(results("half", 20, 1.2), 5, base, teacher) == pytest.approx((0.5, 0.5))
    assert given_back(results("more than the teacher", 40, 1.0), 5, base, teacher) == pytest.approx((1.5, 1.0))


@pytest.mark.parametrize(("values", "text"), [([1.0, 2.0], "1.500 ± 0.500"), ([20.0], "20.0")])
def test_cells_show_mean_and_standard_error(values: list[float], text: str) -> None:
    assert cell(np.array(values)) == text


@pytest.mark.parametrize(
    ("values", "does"),
    [([1.0, 1.1, 0.9], True), ([-1.0, -1.1, -0.9], True), ([1.0, 2.0, 3.0, 0.1, 0.2], False), ([1.0, 1.0], False)],
)
def test_what_counts_is_what_the_protocol_says(values: list[float], does: bool) -> None:
    assert counts(np.array(values)) == does
