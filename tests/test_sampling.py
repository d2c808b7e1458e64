"""`lightning sample`: what it is asked, the folder that it writes to, and its record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dfd.cli import main as cli
from lightning_dfd.cli.sampling import clear, samples_folder, wanted, write_samples
from lightning_dfd.cli.trainer import DistillationTrainer
from lightning_dfd.data import VideoDataModule, list_clips, read_video
from lightning_dfd.evaluation.generation import Request, requests_for
from lightning_dfd.runs.checkpoints import read_checkpoint
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.training.saved import open_checkpoint
from lightning_dfd.training.settings import StudentSettings
from lightning_dfd.types import VideoSize
from tests.test_cli import recipe, small

SIZE = VideoSize(5, 32, 48)


def few(count: int, stop_after: int | None = None) -> Iterator[Tensor]:
    """Videos, until the process is killed."""
    for number in range(count):
        if number == stop_after:
            raise KeyboardInterrupt
        yield torch.full((SIZE.frames, SIZE.height, SIZE.width, 3), number, dtype=torch.uint8)


def asked(prompts: int, seeds: int = 2) -> list[Request]:
    return requests_for([f"prompt {number}" for number in range(prompts)], range(seeds))


def write(folder: Path, requests: list[Request], stop_after: int | None = None) -> None:
    record = {"videos": len(requests)}
    write_samples(samples_folder(str(folder)), few(len(requests), stop_after), requests, record, 8.0)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- what is asked ----------------------------------------------------------------------------------------------


def test_one_value_is_a_list_of_it(tmp_path: Path) -> None:
    assert wanted("a dog", None, 3, "dog.png").prompts == ("a dog",)
    assert wanted("a dog", None, 3, "dog.png").images == (Path("dog.png"),)
    assert wanted(["a dog", "a cat"], None, [3, 1, 3], None).seeds == (3, 1)
    assert wanted(None, None, None, None).seeds == (0, 1)
    (tmp_path / "p.txt").write_text("\ufeffa dog: running\n\n [a] cat \n", encoding="utf-8")
    assert wanted(None, str(tmp_path / "p.txt"), None, None).prompts == ("a dog: running", "[a] cat")
    (tmp_path / "p.jsonl").write_text('{"text": "a dog"}\n\n{"caption": "a c\u00e4t"}\n', encoding="utf-8")
    assert wanted(None, str(tmp_path / "p.jsonl"), None, None).prompts == ("a dog", "a c\u00e4t")
    (tmp_path / "P.JSONL").write_text('{"text": "a\u2028dog"}\n', encoding="utf-8")  # a break of lines within the text
    assert wanted(None, str(tmp_path / "P.JSONL"), None, None).prompts == ("a\u2028dog",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("", None, None, None), "prompts is ''; give one text or a list"),
        (([], None, None, None), r"prompts is \[\]; give one text or a list"),
        ((["a", " "], None, None, None), "none empty"),
        (("a", "p.txt", None, None), "both prompts and prompts_file"),
        (("a", None, [], None), r"seeds is \[\]; give one number"),
        (("a", None, -1, None), "seeds is -1; give one number"),
        (("a", None, 2**64, None), "seeds is 18446744073709551616"),
        (("a", None, 0, ["a.png", "b.png"]), "got 2 images for 1 prompts; give one for each prompt"),
        ((None, None, 0, "a.png"), "got 1 images for 0 prompts"),
    ],
)
def test_what_cannot_be_shown_is_refused(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wanted(*given)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe", "is not UTF-8"),
        ("p.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("p.jsonl", b'{"txt": "a"}', "line 1: no prompt"),
        ("p.jsonl", b'["a"]', "line 1: no prompt"),
        ("p.jsonl", b'{"text": 3}', "line 1: no prompt"),
        ("p.csv", b"file_name,text\na.mp4,a dog\n", "write a text file with one prompt to a line"),
        ("nowhere.txt", None, "cannot be read: No such file"),
    ],
)
def test_files_of_prompts_are_checked(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=said):
        wanted(None, str(tmp_path / name), None, None)


# ---- the folder -------------------------------------------------------------------------------------------------


def test_a_reused_folder_keeps_no_old_videos_and_all_other_files(tmp_path: Path) -> None:
    write(tmp_path, asked(3))
    others = {"notes.txt", "0000.txt", "mine.mp4"}
    for name in others:
        (tmp_path / name).write_text("kept", encoding="utf-8")
    write(tmp_path, asked(1))
    made = {"0000.mp4", "0001.mp4", "metadata.jsonl", "samples.json", "grid.mp4", "contact.png"}
    assert names(tmp_path) == made | others
    assert [clip.caption for clip in list_clips(tmp_path).clips] == ["prompt 0"] * 2


def test_a_killed_call_leaves_what_it_wrote(tmp_path: Path) -> None:
    write(tmp_path, asked(4))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, asked(3), stop_after=2)
    assert names(tmp_path) == {"0000.mp4", "0001.mp4", "metadata.jsonl", "samples.json"}
    assert len(list_clips(tmp_path).clips) == 2
    assert json.loads((tmp_path / "samples.json").read_text(encoding="utf-8"))["finished"] is False
    (tmp_path / "0005.mp4").write_bytes(b"written just before the kill, and not yet listed")
    (tmp_path / ".0006.mp4.77.tmp").write_bytes(b"")
    clear(tmp_path)
    assert names(tmp_path) == set()


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds something else \(clip.mp4\); name a new or an empty folder"):
        samples_folder(str(tmp_path))
    for place in (tmp_path / "clip.mp4", tmp_path / "clip.mp4" / "below", Path("/proc/here")):
        with pytest.raises(OSError, match=r"output is .*, which cannot be written \(.+\); name another folder"):
            samples_folder(str(place))
    with pytest.raises(ValueError, match="output is empty"):
        samples_folder("")
    assert names(tmp_path) == {"clip.mp4"}
    assert samples_folder(str(tmp_path / "new" / "one")).is_dir()


@pytest.mark.slow(seconds=2)
def test_the_grid_is_small_however_many_videos(tmp_path: Path) -> None:
    """All frames of all videos would not fit into memory."""
    write(tmp_path / "many", asked(13, 9))
    assert len(list_clips(tmp_path / "many").clips) == 13 * 9
    grid = read_video(tmp_path / "many" / "grid.mp4", VideoSize(5, 12 * 132, 8 * 196), None)
    assert grid.shape[-2:] == (12 * 132, 8 * 196)  # four times the pixels of 32x48, with gaps


# ---- the checkpoint ---------------------------------------------------------------------------------------------


def student_of(teacher: Path, **settings: Any) -> DistillationModule:
    return DistillationModule(str(teacher), student=StudentSettings(**settings))


def test_what_is_no_checkpoint_is_told_by_what_it_is(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(b"")
    (tmp_path / "run" / "checkpoints" / "last.safetensors").write_bytes(b"")
    (tmp_path / "lora").mkdir()
    lora = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    lora.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "nowhere", "there is no such file or folder"),
        (tmp_path / "empty", "that is a folder without checkpoints"),
        (tmp_path / "run", "that is a folder; it holds checkpoints/last.ckpt"),
        (tmp_path / "run" / "checkpoints", "that is a folder; it holds last.ckpt"),
        (
            tmp_path / "run" / "checkpoints" / "last.safetensors",
            "that is the copy of the weights alone; the checkpoint is last.ckpt",
        ),
        (tmp_path / "lora", "that is a folder of weights, an exported LoRA"),
        (lora, "those are weights alone, an exported LoRA"),
        (tiny["wan"], "that is a diffusers pipeline"),
    ):
        for key, remedy in (("ckpt_path", "or last for the newest"), ("model.init_from", "set model.init_from: null")):
            with pytest.raises((FileNotFoundError, ValueError)) as refused:
                read_checkpoint(path, key=key)
            assert str(refused.value).startswith(f"{key} is '{path}': {said}")
            assert remedy in str(refused.value)
            assert ("dmd2 recipe" in str(refused.value)) == (key == "model.init_from")


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"output": "{videos}/0.mp4", "prompts": "a dog"}, "cannot be written"),
        ({"role": "ema"}, "role is ema, and the recipe keeps no moving average"),
        ({"prompts": "a dog", "images": "dog.png"}, "a WanPipeline takes none"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"prompts": "a dog", "ckpt_path": "/nowhere"}, "ckpt_path is '/nowhere': there is no such file"),
        ({"prompts": "a dog", "ckpt_path": "last"}, "the recipe's run has no whole checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_nothing_is_loaded_for_what_cannot_be_done(
    tiny: dict[str, Path],
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.setattr(DistillationModule, "configure_model", lambda self: pytest.fail("the networks were loaded"))
    trainer = DistillationTrainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    data = VideoDataModule(str(videos), frames=9, height=32, width=32)
    output = str(given.pop("output", tmp_path / "out")).format(videos=videos)
    with pytest.raises((ValueError, OSError), match=said):
        trainer.sample(student_of(tiny["wan"]), data, output, **given)


@pytest.mark.slow(seconds=4)
def test_the_record_says_what_made_the_videos(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    words = ["-c", recipe("wan_dmd2"), *small(tiny, "wan", videos, tmp_path)]
    cli.main(["fit", *words])
    out, last = tmp_path / "out", str(tmp_path / "checkpoints" / "last.ckpt")
    sample = ["sample", *words, "--output", str(out), "--ckpt_path", last]
    cli.main([*sample, "--prompts", "a dog: it runs", "--seeds", "3"])
    record = json.loads((out / "samples.json").read_text(encoding="utf-8"))
    assert record.pop("sampling_seconds_per_video") > 0
    assert record == {
        "videos": 1, "role": "student", "teacher": str(tiny["wan"]), "pipeline": "WanPipeline", "seeds": [3],
        "frames": 9, "height": 32, "width": 48, "fps": 8.0, "kind": "ode", "guidance": 1.0, "steps": 4,
        "times": [1.0, 0.9375, 0.83333, 0.625], "network_calls_per_video": 4, "recipes": [recipe("wan_dmd2")],
        "checkpoint": last, "iteration": 6, "finished": True,
    }  # fmt: skip
    listed = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert listed == [{"file_name": "0000.mp4", "text": "a dog: it runs", "seed": 3}]
    for other, said in (
        (student_of(tiny["wan"], rank=8), "model.student.rank is 4 there and 8 here"),
        (student_of(tiny["wan"], rank=4, alpha=8), "model.student.alpha is 4 there and 8 here"),
        (student_of(tiny["wan"], mode="full"), "model.student.mode is lora there and full here"),
        (student_of(tiny["cogvideox"], rank=4), "the teacher is a WanPipeline there and a CogVideoXPipeline here"),
    ):
        with pytest.raises(ValueError, match=f"ckpt_path .* holds another student: .*{said}"):
            open_checkpoint(last, "ckpt_path", other.student, other.backbone)
    data = VideoDataModule(str(out), frames=9, height=32, width=32, fps=8)
    data.setup()
    assert data.clips[0].caption == "a dog: it runs"
