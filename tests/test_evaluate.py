"""`lightning evaluate` on small folders of toy clips, and its answers to what is wrong with them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_dfd.cli import evaluate as evaluation
from lightning_dfd.cli import main as cli
from lightning_dfd.data import read_video, write_video
from lightning_dfd.evaluation.folders import one_rate, source
from lightning_dfd.evaluation.metrics import VideoSuite
from lightning_dfd.evaluation.report import Report, as_json, table
from lightning_dfd.toy.world import draw_clips
from lightning_dfd.types import VideoSize
from tests.test_cli import fail

READINGS = "lightning_dfd.toy.features.WorldReadings"
SMALL = {"frames": 9, "height": 32, "width": 32, "min_videos": 5, "distance": READINGS, "diversity": READINGS}
SETTINGS = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]


def write_folder(folder: Path, seed: int, captions: list[str] | None) -> Path:
    """Toy clips, as many as captions, or 6 without any."""
    folder.mkdir(parents=True)
    names = [f"{number:02d}.mp4" for number in range(len(captions or range(6)))]
    for name, clip in zip(names, draw_clips(len(names), seed)[1], strict=True):
        write_video(folder / name, clip, 8)
    if captions is not None:
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in zip(names, captions, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: real clips without captions, a teacher and a student of three captions, of which one is single."""
    root = tmp_path_factory.mktemp("world")
    captions = ["a red cross", "a blue square", "alone", "a blue square", "a red cross", "a red cross"]
    folders = {"real": write_folder(root / "real", 1, None)}
    return folders | {
        name: write_folder(root / name, seed, captions) for seed, name in enumerate(("teacher", "student"), start=2)
    }


def command(world: dict[str, Path], output: Path, *more: str) -> list[str]:
    videos = [word for name in ("teacher", "student") for word in (f"--videos.{name}", str(world[name]))]
    return ["evaluate", *videos, "--real", str(world["real"]), "--output", str(output), *SETTINGS, *more]


def strict(path: Path) -> Any:
    """JSON without the words that JSON does not have."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.slow(seconds=5)
def test_table_record_and_page(world: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run" / "metrics" / "version_0"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,val/fvd,val/teacher/fvd\n0,9,5\n10,7,5\n", encoding="utf-8")
    output = tmp_path / "made" / "here"
    words = command(world, output, "--runs.mine", str(tmp_path / "run"), "--batch_size", "4")
    cli.main(words)
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["teacher", "student"]

    record = strict(output / "evaluation.json")
    suite = VideoSuite(READINGS, READINGS, min_videos=5)
    videos = {
        name: torch.stack([read_video(path, VideoSize(9, 32, 32), None) for path in sorted(folder.glob("*.mp4"))])
        / 127.5
        - 1
        for name, folder in world.items()
    }
    suite.update_real(videos["real"])
    single = torch.tensor([2])
    rest = torch.tensor([0, 1, 3, 4, 5])
    suite.update(videos["student"][single], [], [])
    suite.update(videos["student"][rest], ["red", "blue", "blue", "red", "red"], range(5))
    expected = suite.compute()
    assert record["values"]["student"] == pytest.approx(expected, rel=1e-6)
    ratios = record["relative_to_teacher"]["student"]
    teacher = record["values"]["teacher"]
    assert ratios["diversity_ratio"] == pytest.approx(expected["diversity"] / teacher["diversity"], rel=1e-6)
    assert f"{expected['world_readings_fd']:.4g} (x {ratios['world_readings_fd_ratio']:.2f})" in said
    assert f"{ratios['score']:.3f}" in said
    assert record["protocol"]["size"] == "9 frames of 32x32"
    assert record["videos"] == {name: str(world[name]) for name in ("teacher", "student")}
    assert record["notes"] == []

    assert sorted(path.name for path in output.iterdir()) == ["evaluation.json", "index.html"]
    page = (output / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:video/mp4;base64,[\w+/]{100}', page)) == 3
    assert "Rows of teacher, student: a blue square; a red cross; alone" in page
    assert 'alt="curves"' in page
    cli.main(words)  # an earlier evaluation is replaced
    assert strict(output / "evaluation.json") == record


@pytest.mark.slow(seconds=3)
def test_what_cannot_be_used_is_noted(world: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """Broken files, links out of the folder, no captions; and what then must not be compared."""
    folder = tmp_path / "plain"
    shutil.copytree(world["real"], folder)
    (folder / "broken.mp4").write_bytes(b"\x00\x01 not a video" * 50)
    (folder / "cut.mp4").write_bytes((folder / "00.mp4").read_bytes()[:800])
    (folder / "secret.mp4").symlink_to(world["real"] / "00.mp4")
    write_video(folder / "short.mp4", draw_clips(1, 0)[1][0, :5], 8)
    pair = tmp_path / "pair"
    shutil.copytree(world["teacher"], pair)
    (pair / "01.mp4").write_bytes(b"nothing")  # then the other video of its caption is alone
    out = tmp_path / "out"
    cli.main(command(world, out, "--videos.plain", str(folder), "--videos.pair", str(pair)))
    notes = strict(out / "evaluation.json")["notes"]
    said = capsys.readouterr().out.splitlines()
    assert {f"Note: {note}" for note in notes} < set(said)
    assert notes[0].startswith("plain: 4 left out: secret.mp4: a link that leads out of the folder")
    assert "broken.mp4: Invalid data" in notes[0]
    assert notes[1] == "plain: no caption has several videos, so there are no diversities"
    assert notes[2].startswith("pair: 1 left out: 01.mp4")
    assert "unequal numbers of videos (teacher 6, student 6, plain 6, pair 5)" in notes[3]
    assert "other captions" in notes[4]
    assert "diversity" not in strict(out / "evaluation.json")["values"]["plain"]
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "plain: 4 left out" in page
    assert "<td>-</td>" in page


@pytest.mark.slow(seconds=1)
def test_lists_lead_nowhere_else(world: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(world["student"], folder)
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"file_name": "../world/real/00.mp4", "text": "a"}\n{"file_name": "/etc/passwd", "text": "a"}')
    cli.main(command(world | {"student": folder}, tmp_path / "out"))
    record = strict(tmp_path / "out" / "evaluation.json")
    assert record["values"]["student"]["videos"] == 6
    assert "'..' leads out of the folder" in record["notes"][0]
    assert "absolute path" in record["notes"][0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vidoes.student", "x"], "Did you mean videos?"),
        (["--distanse", "x"], "Did you mean distance?"),
        (["--fps", "fast"], "fps: Expected one of float, null. Given value: fast"),
        (["--real", "/nowhere"], "real: there is no folder '/nowhere'"),
        (["--videos.other", "/nowhere"], "other: there is no folder '/nowhere'"),
        (["--videos.other", ""], "other: there is no folder ''"),
        (["--videos", "{}"], "give one or more, as --videos.student FOLDER"),
        (["--distance", "transnet"], "there is no extractor 'transnet'; did you mean 'transnetv2'?"),
        (["--diversity", "lightning_dfd.toy.features.World"], "has no attribute 'World'"),
        (["--distance", "dinov2=/nowhere"], "/nowhere cannot be loaded"),
        (["--distance", "i3d-logits=/nowhere"], "there is no file /nowhere; download https://"),
        (["--min_videos", "7"], "real: 6 usable videos"),
        (["--frames", "10"], "real: 0 usable videos"),
        (["--frames", "1"], "frames and min_videos must be 2 or more"),
        (["--batch_size", "0"], "batch_size and fps above 0"),
        (["--device", "gpu"], "this torch cannot use device 'gpu'"),
        (["--runs.mine", "/nowhere"], "no metrics/version_N/metrics.csv in /nowhere"),
        (["--output", "/dev/null"], "output is /dev/null, which cannot be written"),
        (["-c", "nowhere.yaml"], "there is no recipe nowhere.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(
    world: dict[str, Path], tmp_path: Path, capsys: Any, words: list[str], said: str
) -> None:
    assert said in fail(capsys, *command(world, tmp_path / "out", *words))
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.slow(seconds=2)
def test_empty_and_foreign_folders(world: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    said = fail(capsys, *command(world | {"real": tmp_path / "empty"}, tmp_path / "out"))
    assert "real: no video in" in said
    before = sorted(world["student"].iterdir())
    assert "holds something else" in fail(capsys, *command(world, world["student"]))
    assert sorted(world["student"].iterdir()) == before
    cli.main(command(world, tmp_path / "empty"))
    assert (tmp_path / "empty" / "index.html").is_file()


def test_keys_may_come_from_a_file(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(evaluation.VideoSuite, "__init__", lambda self, *words: given.update(words=words) or 1 / 0)
    lines = [f"videos: {{a: {world['student']}}}", f"real: {world['real']}", f"output: {tmp_path / 'out'}"]
    (tmp_path / "my.yaml").write_text("\n".join([*lines, "min_videos: 6", f"distance: {READINGS}"]), encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "-c", str(tmp_path / "my.yaml"), "--min_videos", "3"])
    assert given["words"] == (READINGS, "efficientnet-lite0", 3)


def test_help_fits_a_reader(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: lightning evaluate --videos.NAME FOLDER")
    assert len(text.splitlines()) < 70
    assert "Raises" not in text


def test_what_is_not_finite_is_null() -> None:
    report = Report({}, {}, {"a": {"x": math.nan, "y": 2.0}}, {"a": {"score": math.inf}}, [])
    record = json.loads(as_json(report))
    assert record["values"] == {"a": {"x": None, "y": 2.0}}
    assert record["relative_to_teacher"] == {"a": {"score": None}}
    assert table(report) == (["", "a"], [["x", "nan"], ["y", "2"], ["score", "inf"]])


@pytest.mark.slow(seconds=5)
def test_the_default_reading_and_extractors(world: dict[str, Path], tmp_path: Path, real_videos: Path) -> None:
    """Real videos of different sizes, two of one caption, in the size that is read if none is given."""
    folder = tmp_path / "real"
    folder.mkdir()
    for name in ("bikes", "carphone_pristine", "carphone_distorted"):
        shutil.copy(real_videos / f"{name}.mp4", folder / f"{name}.mp4")
        (folder / f"{name}.txt").write_text(name.partition("_")[0], encoding="utf-8")
    evaluation.evaluate({"same": str(folder)}, str(folder), str(tmp_path / "out"), min_videos=3)
    values = strict(tmp_path / "out" / "evaluation.json")["values"]["same"]
    assert values["transnetv2_fd"] == pytest.approx(0, abs=1e-6)
    assert 0 < values["diversity"] < 1
    assert 0.8 < values["consistency"] < 1


def moving(folder: Path, fps: float, count: int = 5, frames: int = 0) -> Path:
    """Videos of the same second of a scene, each in its own colour, at this rate."""
    folder.mkdir(parents=True)
    for number in range(count):
        clip = np.full((frames or round(2 * fps), 32, 32, 3), 30, np.uint8)
        for index, picture in enumerate(clip):
            place = int(28 * index / fps / 2)
            picture[8:16, place : place + 8] = (200, 50 + 40 * number, 90)
        write_video(folder / f"{number}.mp4", clip, fps)
    return folder


@pytest.mark.slow(seconds=2)
def test_folders_of_several_rates_are_read_at_the_lowest(tmp_path: Path, capsys: Any) -> None:
    folders = {"real": moving(tmp_path / "real", 32), "same": moving(tmp_path / "same", 8)}
    words = ["evaluate", "--videos.same", str(folders["same"]), "--real", str(folders["real"]), *SETTINGS]
    cli.main([*words, "--output", str(tmp_path / "out")])
    said = "videos differ in frames per second (real 32, same 8), so all are read at 8; --fps sets another rate"
    assert f"Note: {said}" in capsys.readouterr().out
    record = strict(tmp_path / "out" / "evaluation.json")
    assert record["protocol"]["fps"] == "8"
    assert record["notes"][0] == said
    assert said in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert record["values"]["same"]["world_readings_fd"] < 0.01


@pytest.mark.parametrize(
    ("rates", "fps", "read", "shown", "said"),
    [
        ({"real": [24, 24], "a": [24, 24]}, None, None, 24, ""),
        ({"real": [24], "a": [23.976]}, None, None, 23.976, ""),
        ({"real": [24, 25, 30], "a": [16]}, None, 16, 16, "real 24 to 30, a 16"),
        ({"real": [30, 2, 30], "a": [30]}, None, 30, 30, "real 2 to 30, a 30"),  # a single slow one decides nothing
        ({"real": [30], "a": [8]}, 10.0, 10, 10, ""),
    ],
)
def test_the_rate_at_which_folders_are_read(
    tmp_path: Path, rates: dict[str, list[float]], fps: float | None, read: float | None, shown: float, said: str
) -> None:
    sources = []
    for name, own in rates.items():
        for number, rate in enumerate(own):
            moving(tmp_path / name / str(number), rate, count=1, frames=4)
        sources.append(source(name, str(tmp_path / name), 1))
    found, notes = one_rate(sources, fps)
    assert found == (read, pytest.approx(shown, abs=1e-3))
    assert bool(notes) == bool(said)
    assert said in "".join(notes)


def test_paths_may_begin_at_home(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world["real"].parent))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(evaluation, "measure", lambda *words, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["evaluate", "--videos.a", "~/student", "--real", "~/real", "--output", "$OUT", *SETTINGS])
    assert (tmp_path / "out").is_dir()
