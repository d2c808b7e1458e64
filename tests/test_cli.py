"""The command line: one-line errors, precedence of overrides, inheritance, and every recipe."""

from __future__ import annotations

import csv
import itertools
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from safetensors import SafetensorError
from safetensors.torch import save_file

from lightning_dfd.cli import errors, program, recipes
from lightning_dfd.cli import help as help_texts
from lightning_dfd.cli import main as cli
from lightning_dfd.data import VideoDataModule
from lightning_dfd.data.video import glance
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.toy import world
from lightning_dfd.training.checks import check_counts
from lightning_dfd.training.settings import DMDSettings, GANSettings, StudentSettings
from lightning_dfd.types import VideoSize

RECIPES = Path(__file__).parent.parent / "recipes"
PAIRS = sorted(path.stem.removesuffix("_dmd2") for path in RECIPES.glob("*_dmd2.yaml"))  # each has a `_dfd`


def family_of(recipe: str) -> str:
    """The tiny pipeline whose name begins a recipe's; of the toy's recipes, CogVideoX."""
    words = recipe.split("_")
    names = ("_".join(words[:count]) for count in range(len(words), 0, -1))
    return next((name for name in names if name in TINY), "cogvideox")


def size_for(recipe: str) -> VideoSize:
    """Not square, so that nobody swaps height and width unseen; but for the toy, whose world is square."""
    size = TINY[family_of(recipe)].size
    if recipe.startswith("toy"):
        return replace(size, width=world.SIZE)
    assert size.height != size.width
    return size


def small(tiny: dict[str, Path], recipe: str, videos: Path, root: Path) -> list[str]:
    """Arguments that bring any recipe down to a tiny pipeline on a CPU, at a size that is not square."""
    family, size = family_of(recipe), size_for(recipe)
    settings: dict[str, Any] = {
        "model.teacher": tiny[family],
        "model.dtype": "float32",
        "model.accumulate": 1,
        "model.student.rank": 4,
        "model.max_sequence_length": TINY[family].text_length,
        "data.folder": videos,
        "data.frames": size.frames,
        "data.height": size.height,
        "data.width": size.width,
        "data.fps": 8 * -(-size.frames // world.FRAMES),  # the clips are short, and frames may repeat
        "data.batch_size": 2,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 6,
        "trainer.log_every_n_steps": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.default_root_dir": root,
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command that must fail: its last line, which is the only one about the error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code not in (0, None)
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    text = stop.value.code if isinstance(stop.value.code, str) else said[-1]
    assert "\n" not in text
    return text


def recipe(name: str) -> str:
    return str(RECIPES / f"{name}.yaml")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--model.studnet.mode", "full"], "Did you mean model.student.mode"),
        (["--trainer.max_stepz", "3"], "Did you mean trainer.max_steps"),
        (["--model.student.mode", "ful"], "model.student.mode: Expected a Literal['lora', 'full']. Got value: ful"),
        (["--model.sampling.steps", "[0.1,0.9]"], "model.sampling.steps is [0.1, 0.9]; it must be a falling list"),
        (["--data.folder", "/nowhere"], "no folder '/nowhere'; data.folder must name a folder"),
        (["--model.teacher", "/nowhere"], "model.teacher is '/nowhere': there is no such folder"),
        (["--data.height", "33"], "the nearest is 9 frames of 32x48"),
        (["--data.cache", "/nowhere"], "make it with: lightning cache"),
        (["--model.init_from", "/nowhere"], "model.init_from is '/nowhere': there is no such file or folder"),
        (["--model.student.targets", "[to_q, to_quue]"], "'to_quue' is not a layer of the network; did you mean to_q"),
        (["--model.quantization", "{backend: torchao, kind: nf4}"], "model.quantization.kind is nf4; with backend"),
        (["--model.quantization.kind", "int8"], "model.quantization lacks backend"),
        (
            ["--model.student_optimizer.init_args.lr", "x"],
            "model.student_optimizer.init_args.lr: Expected one of float",
        ),
        (["--model.student_optimizer.init_args.lrr", "1"], "model.student_optimizer takes no lrr. Did you mean lr?"),
        (["--model.student", "null"], "model.student: Expected the keys below it, or a YAML file of them"),
        (["--model.backbone", "lightning_dfd.backbones.Backbone"], "lacks call, compression"),
        (["--seed_everything", "-1"], "seed_everything: -1 is not in bounds"),
        (["--ckpt_path", ""], "ckpt_path is ''; give a checkpoint's path, last, best, or null"),
        (["--ckpt_path", "hpc"], "ckpt_path is 'hpc'; give a checkpoint's path, last, best, or null"),
        (["--trainer.max_step", "3"], "unrecognized arguments: --trainer.max_step 3 Did you mean trainer.max_steps"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_line(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: Any, words: list[str], hint: str
) -> None:
    message = fail(
        capsys, "fit", "-c", recipe("wan_dmd2"), *small(tiny, "wan", videos, tmp_path), "--data.cache", "null", *words
    )
    assert hint in message


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: StudentSettings(alpha=0), "model.student.alpha is 0; it must be above 0"),
        (lambda: StudentSettings(alpha=-4), "model.student.alpha is -4; it must be above 0"),
        (lambda: StudentSettings(targets=[]), r"model.student.targets is \[\]; it must be names"),
        (lambda: DMDSettings(guidance=math.inf), "model.dmd.guidance is inf; it must be at least 1"),
        (lambda: GANSettings(weight=math.inf), "model.gan.weight is inf; it must be 0"),
        (lambda: check_counts(10.0, 0, 0), "model.accumulate is 0; it must be at least 1"),
        (lambda: check_counts(0.0, 1, 0), "model.gradient_clip is 0.0; it must be above 0"),
        (lambda: check_counts(math.nan, 1, 0), "model.gradient_clip is nan; it must be above 0"),
        (lambda: check_counts(10.0, 1, 2**64), "model.seed is 18446744073709551616; it must be between"),
        (lambda: VideoDataModule(""), "data.folder is '' and data.cache is None; name a folder"),
        (lambda: VideoDataModule("videos", fps=math.inf), "data.fps is inf; it must be a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_mistakes_in_recipes_are_named(capsys: Any, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {studdent: {mode: full}}")
    assert "Did you mean model.student.mode" in fail(capsys, "fit", "-c", recipe("wan_dmd2"), "-c", str(wrong))
    wrong.write_text("model: {teacher: '${model.nothing}'}")
    assert "nothing" in fail(capsys, "fit", "-c", recipe("wan_dmd2"), "-c", str(wrong))
    wrong.write_text("a: [")
    assert "is not YAML" in fail(capsys, "fit", "-c", str(wrong))
    wrong.write_text(f"inherit: [{wrong.name}]")
    assert "inherits itself" in fail(capsys, "fit", "-c", str(wrong))
    assert "there is no recipe" in fail(capsys, "fit", "-c", str(tmp_path / "none.yaml"))
    assert "is a folder; -c takes a recipe" in fail(capsys, "fit", "-c", str(tmp_path))
    wrong.write_text("inherit: [3]")
    assert "inherit is [3]; it must be a list of recipes" in fail(capsys, "fit", "-c", str(wrong))
    assert "Did you mean fit?" in fail(capsys, "fitt")
    assert "the command comes first, not '--model.seed'" in fail(capsys, "--model.seed", "3", "fit")
    assert "no teacher is named; give a recipe, as in: lightning fit -c recipe.yaml" in fail(capsys, "fit")
    assert "missing: --videos, --real, --output" in fail(capsys, "evaluate")


def test_a_module_that_fails_on_import_is_named(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fails_on_import.py").write_text("raise RuntimeError('no such card')")
    monkeypatch.syspath_prepend(tmp_path)
    words = [*small(tiny, "wan", videos, tmp_path), "--model.backbone", "fails_on_import.Mine"]
    message = fail(capsys, "fit", "-c", recipe("wan_dmd2"), *words)
    assert "model.backbone 'fails_on_import.Mine' cannot be imported: RuntimeError: no such card" in message


def test_help_fits_a_reader(capsys: Any) -> None:
    cli.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 30
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 140
    assert "--model.dmd.guidance" in text
    assert "--model.student_optimizer.help" in text
    assert "--trainer.max_steps" not in text
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help", "trainer"])
    assert "--trainer.max_steps" in capsys.readouterr().out


def printed(capsys: Any, *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit):
        cli.main(["fit", *words, "--print_config"])
    result: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return result


def test_out_of_memory_says_what_to_do() -> None:
    said = errors.one_line_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"))
    assert said is not None
    assert said.startswith("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. `lightning plan")
    assert "\n" not in said


class AbsentLogger(CSVLogger):
    """As one whose package is not installed."""

    def __init__(self, save_dir: str = "") -> None:
        raise ModuleNotFoundError("Requirement 'absent>=1' not met")


@pytest.mark.parametrize("given", ["{}", "[{}]"])
def test_a_logger_that_cannot_be_made_is_one_line(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: Any, given: str
) -> None:
    logger = given.replace("{}", "{class_path: tests.test_cli.AbsentLogger}")
    words = [*small(tiny, "wan", videos, tmp_path), "--trainer.logger", logger]
    said = "tests.test_cli.AbsentLogger cannot be made: Requirement 'absent>=1' not met"
    assert said in fail(capsys, "fit", "-c", recipe("wan_dmd2"), *words)


def test_lightnings_enumerations_can_be_written(capsys: Any) -> None:
    timer = "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '00:01:00:00'}}"
    with pytest.raises(SystemExit):
        cli.main(["fit", "-c", recipe("wan_dmd2"), timer, "--print_config"])
    assert "interval: step" in capsys.readouterr().out


def test_a_recipe_without_optimizers_has_the_default_and_can_be_written(capsys: Any) -> None:
    model = printed(capsys, "--model.teacher", "x", "--model.student_optimizer.init_args.lr", "1e-3")["model"]
    for role, rate in (("student", 1e-3), ("fake", 1e-5)):
        optimizer = model[f"{role}_optimizer"]
        assert optimizer["class_path"] == "torch.optim.AdamW"
        assert optimizer["init_args"]["lr"] == rate
        assert optimizer["init_args"]["weight_decay"] == 0.01


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("name", PAIRS)
def test_every_recipe_parses(capsys: Any, name: str) -> None:
    """Both of a pair as they stand, and with full_tuning.yaml over the second."""
    probability = 1.0 if name == "toy" else 0.5  # the paper's, but where a study says otherwise
    config = printed(capsys, "-c", recipe(f"{name}_dmd2"))
    assert config["model"]["data_forcing"]["probability"] == 0.0
    assert config["model"]["init_from"] is None
    assert config["model"]["student"]["mode"] == "lora"
    forced = printed(capsys, "-c", recipe(f"{name}_dfd"))
    assert forced["model"]["data_forcing"]["probability"] == probability
    assert forced["model"]["student"]["mode"] == "lora"
    full = printed(capsys, "-c", recipe(f"{name}_dfd"), "-c", recipe("full_tuning"))
    assert full["model"]["data_forcing"]["probability"] == probability
    assert full["model"]["init_from"] is not None
    assert full["model"]["student"]["mode"] == "full"
    assert full["model"]["student_optimizer"]["init_args"]["lr"] == 1e-5


def test_interpolation_sees_later_files_and_overrides(capsys: Any, tmp_path: Path) -> None:
    later = tmp_path / "later.yaml"
    later.write_text("model: {seed: 7}\ndata: {seed: '${model.seed}'}")
    config = printed(capsys, "-c", recipe("wan_dmd2"), "-c", str(later), "--model.seed", "9")
    assert config["data"]["seed"] == 9
    config = printed(capsys, "-c", recipe("wan_dmd2"), "--trainer.default_root_dir", "elsewhere")
    assert config["trainer"]["callbacks"][0]["init_args"]["dirpath"] == "elsewhere/checkpoints"


OPTIMIZER = "model.student_optimizer"


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--model.seed", "7", "-c", "A", "-c", "B"],
        ["fit", "-c", "A", "--model.seed=7", "-c", "B"],
        ["fit", "--model.seed", "7", "--config", "A", "--config=B"],
        ["fit", "--model.seed", "7", "-cA", "-c=B"],
        ["-c", "A", "fit", "--model.seed", "7", "-c", "B"],
        ["--config=A", "-cB", "fit", "--model.seed", "7"],
    ],
    ids=" ".join,
)
def test_the_command_line_wins_wherever_recipes_stand(capsys: Any, tmp_path: Path, words: list[str]) -> None:
    """Recipes keep their order; classes and what is appended to lists count as other words do."""
    (tmp_path / "A").write_text(f"inherit: ['{recipe('wan_dmd2')}']\nmodel: {{seed: 1, accumulate: 2}}\n")
    (tmp_path / "B").write_text("model: {seed: 3, accumulate: 4}\ntrainer: {callbacks: []}\n")
    words = [re.sub("[AB]$", lambda name: str(tmp_path / name.group()), word) for word in words]
    more = [f"--{OPTIMIZER}", "torch.optim.SGD", f"--{OPTIMIZER}.init_args.lr", "3"]
    more += ["--trainer.callbacks+=lightning_dfd.callbacks.RunHealth"]
    with pytest.raises(SystemExit):
        cli.main(
            [words[0], *words[1:], "--print_config", *more] if words[0] == "fit" else [*words, *more, "--print_config"]
        )
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["model"]["seed"], config["model"]["accumulate"]) == (7, 4)
    assert config["model"]["student_optimizer"]["class_path"] == "torch.optim.SGD"
    assert config["model"]["student_optimizer"]["init_args"]["lr"] == 3
    assert [one["class_path"] for one in config["trainer"]["callbacks"]] == ["lightning_dfd.callbacks.RunHealth"]


@pytest.mark.parametrize("command", list(help_texts.OWN_COMMANDS))
def test_recipes_come_first_for_every_command(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.yaml").write_text("x: 1")
    a = str(tmp_path / "a.yaml")
    assert recipes.expand_inherited([command, "--b", "2", "-c", a, "--d"]) == [command, "-c", a, "--b", "2", "--d"]
    with pytest.raises(ValueError, match="-c needs the path of a recipe"):
        recipes.expand_inherited([command, "-c", "--b", "2"])


def test_the_last_recipe_wins_over_what_it_inherits(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {seed: 1}")
    (tmp_path / "b.yaml").write_text("inherit: [a.yaml]\nmodel: {seed: 2}")
    (tmp_path / "c.yaml").write_text("inherit: [b.yaml]\ndata: {seed: 3}")
    words = recipes.expand_inherited(["fit", "-c", str(tmp_path / "c.yaml"), "--model.seed", "4"])
    assert words[:1] == ["fit"]
    assert words[-2:] == ["--model.seed", "4"]
    files = [word for flag, word in itertools.pairwise(words) if flag == "-c"]
    assert files[0] == str(tmp_path / "a.yaml")
    assert [yaml.safe_load(text) for text in files[1:]] == [{"model": {"seed": 2}}, {"data": {"seed": 3}}]


def little_evaluation(path: Path) -> list[str]:
    """A recipe with which the toy recipes measure 4 videos, as 8 clips are all that the test's folder has."""
    checkpoint = yaml.safe_load((RECIPES / "common.yaml").read_text(encoding="utf-8"))["trainer"]["callbacks"][0]
    toy = yaml.safe_load((RECIPES / "toy_evaluation.yaml").read_text(encoding="utf-8"))["trainer"]["callbacks+"]
    toy[0]["init_args"] |= {"prompts": 2, "seeds": 2, "min_videos": 4, "teacher_steps": 2, "every": 2}
    toy[1]["init_args"] |= {"prompts": 1, "teacher_steps": 2, "every": 2}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": [checkpoint, *toy]}}), encoding="utf-8")
    return ["-c", str(path)]


def test_every_recipe_has_its_pair() -> None:
    runnable = {path.stem for path in RECIPES.glob("*_d*.yaml") if path.stem != "data_forcing"}
    assert runnable == {f"{name}_{kind}" for name in PAIRS for kind in ("dmd2", "dfd")}


@pytest.mark.slow(seconds=4)
@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, "full" if number % 2 else "lora") for number, name in enumerate(PAIRS)],
)
def test_every_recipe_runs(tiny: dict[str, Path], videos: Path, tmp_path: Path, name: str, mode: str) -> None:
    """A turn of each role against tiny random pipelines on disk; data forcing starts from DMD2's checkpoint.

    One mode for each: the contract trains every family in both.
    """
    more = ["--data.cache", "null", "--model.student.mode", mode, "--model.dmd.student_update_freq", "2"]
    more += ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"]
    for kind in ("dmd2", "dfd"):
        toy = little_evaluation(tmp_path / "little.yaml") if name == "toy" else []
        words = [*toy, *small(tiny, name, videos, tmp_path / kind), *more]
        ran = program.run(recipes.expand_inherited(["fit", "-c", recipe(f"{name}_{kind}"), *words]))
        size = size_for(name)
        video = next(iter(ran.datamodule.train_dataloader())).video
        assert video.shape[1:] == (3, size.frames, size.height, size.width)
        last = tmp_path / kind / "checkpoints" / "last.ckpt"
        assert torch.load(last, weights_only=True)["global_step"] == 2
        with next((tmp_path / kind / "metrics").rglob("metrics.csv")).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for key in ("train/fake_loss", "train/student_loss"):
            values = [float(row[key]) for row in rows if row.get(key)]
            assert values, key
            assert all(map(math.isfinite, values)), key
        assert next((tmp_path / kind / "logs").rglob("config.yaml")).is_file()
        more = [*more, "--model.init_from", str(last)]


@pytest.mark.slow(seconds=3)
def test_override_survives_resume(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """What the command line says beats what the checkpoint's run said: settings, rates and the number of steps."""
    words = small(tiny, "wan", videos, tmp_path)
    cli.main(["fit", "-c", recipe("wan_dmd2"), *words])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    changed = ["--model.dmd.guidance", "2.5", "--trainer.max_steps", "9", "--model.fake_optimizer.init_args.lr", "3e-4"]
    ran = program.run(
        recipes.expand_inherited(["fit", "-c", recipe("wan_dmd2"), *words, *changed, "--ckpt_path", last])
    )
    assert ran.trainer.global_step == 9
    assert ran.model.dmd.guidance == 2.5
    fake = ran.model.optimizers(use_pl_optimizer=False)[1]
    assert fake.param_groups[0]["lr"] == pytest.approx(3e-4)


@pytest.mark.slow(seconds=9)
@pytest.mark.parametrize(
    "command", [["-m", "lightning_dfd"], ["-c", "from lightning_dfd.cli.main import main; main()"]]
)
def test_entry_points_are_the_same_program(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: lightning COMMAND")


@pytest.mark.slow(seconds=9)
def test_console_scripts_are_installed() -> None:
    scripts = Path(sys.executable).parent
    for name in ("lightning", "lightning-dfd"):
        done = subprocess.run([scripts / name, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: lightning COMMAND")


def test_processes_part_before_they_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lightning leaves gloo's threads running, which may abort the process in place of its exit code."""

    def stopped(*arguments: Any) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
        sys.exit(143)

    monkeypatch.setattr(program, "run", stopped)
    with pytest.raises(SystemExit, match="143"):
        cli.main(["fit"])
    assert not torch.distributed.is_initialized()


@pytest.mark.slow(seconds=9)
def test_fabrics_commands_are_passed_on() -> None:
    scripts = Path(sys.executable).parent
    done = subprocess.run([scripts / "lightning", "consolidate", "--help"], capture_output=True, text=True, check=True)
    assert "checkpoint" in done.stdout.lower()


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("command", ["validate", "test"])
def test_held_out_clips_are_measured(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: Any, command: str
) -> None:
    words = small(tiny, "wan", videos, tmp_path)
    cli.main(["fit", "-c", recipe("wan_dmd2"), *words])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    ran = program.run(
        recipes.expand_inherited(
            [command, "-c", recipe("wan_dmd2"), *words, "--ckpt_path", last, "--data.val_share", "0.4"]
        )
    )
    stage = "val" if command == "validate" else "test"
    measured = ran.trainer.callback_metrics
    assert measured[f"{stage}/student_x0_error"] != measured[f"{stage}/teacher_x0_error"]


@pytest.mark.slow(seconds=5)
def test_a_runs_own_config_serves_the_other_commands(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-c", recipe("wan_dmd2"), *small(tiny, "wan", videos, tmp_path), "--ckpt_path", "last"]
    words += ["--data.fps", "12"]
    assert "no whole checkpoint" in fail(capsys, "export", *words, "--output", str(tmp_path / "student"))
    cli.main(["fit", *words])  # begins, as there is none
    config = str(next((tmp_path / "logs").rglob("config.yaml")))
    last = ["--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")]
    cli.main(["export", "-c", config, *last, "--output", str(tmp_path / "student")])
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert f"8 clips of {videos.name}" in card
    assert "| Iterations | 6 |" in card
    assert 'export_to_video(video, "video.mp4", fps=12)' in card
    assert "| Frames a second | 12 |" in card
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "probe").write_text("")
    assert modes == {(tmp_path / "probe").stat().st_mode & 0o777}  # as the umask has it
    words = ["sample", "-c", config, "--ckpt_path", "last", "--output", str(tmp_path / "samples"), "--seeds", "[0]"]
    cli.main([*words, "--data.fps", "24"])  # the student plays at its own
    for name in ("grid.mp4", "0000.mp4"):
        assert glance(tmp_path / "samples" / name).rate == 12


@pytest.mark.slow(seconds=3)
def test_logs_count_iterations(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    """Also where several batches make an iteration, and rows hold the values of both roles."""
    words = [*small(tiny, "wan", videos, tmp_path), "--model.accumulate", "3", "--trainer.log_every_n_steps", "1"]
    cli.main(["fit", "-c", recipe("wan_dmd2"), *words])
    with next((tmp_path / "metrics").rglob("metrics.csv")).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["train/fake_loss"]]  # others are of RunHealth
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train/student_loss"]
    assert rows[-1]["train/fake_loss"]


@pytest.mark.slow(seconds=9)
def test_a_recipe_finds_classes_in_the_current_folder(tiny: dict[str, Path], videos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning_dfd.backbones import WanBackbone\nclass Mine(WanBackbone):\n    lora_targets = ('to_q',)\n"
    )
    scripts = Path(sys.executable).parent
    words = [*small(tiny, "wan", videos, tmp_path), "--model.backbone", "mine.Mine"]
    subprocess.run([scripts / "lightning", "fit", "-c", recipe("wan_dmd2"), *words], check=True, cwd=tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".to_q." in name for name in state)


def test_paths_of_a_recipe_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also in callbacks, loggers and inherited recipes, and after `-c=`, where shells leave `~` alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", "/elsewhere")
    (tmp_path / "mine.yaml").write_text(
        f"inherit: [{recipe('wan_dmd2')}, ~/data.yaml]\ntrainer: {{default_root_dir: ~/run}}\n"
        "model: {teacher: ~/teacher, init_from: $PLACE/last.ckpt}\n"
    )
    (tmp_path / "data.yaml").write_text("data: {folder: ~/videos, cache: $PLACE/cache}")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        program.DistillationCLI, "instantiate_classes", lambda self: seen.update(vars(self.config.fit)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(["fit", "-c=~/mine.yaml", "--model.dmd.negative_prompt", "~ $PLACE"])
    assert seen["data"].folder == f"{tmp_path}/videos"
    assert seen["data"].cache == "/elsewhere/cache"
    assert seen["model"].teacher == f"{tmp_path}/teacher"
    assert seen["model"].init_from == "/elsewhere/last.ckpt"
    assert seen["model"].dmd.negative_prompt == "~ $PLACE"
    assert seen["trainer"].default_root_dir == f"{tmp_path}/run"
    assert seen["trainer"].callbacks[0].init_args.dirpath == f"{tmp_path}/run/checkpoints"
    assert seen["trainer"].logger[0].init_args.save_dir == f"{tmp_path}/run"


def test_variables_that_are_not_set_are_named(capsys: Any) -> None:
    message = fail(capsys, "fit", "-c", recipe("wan_dmd2"), "--data.folder", "$NO_SUCH_PLACE/videos")
    assert "data.folder is $NO_SUCH_PLACE/videos, and the variable $NO_SUCH_PLACE is not set" in message


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["fit", "--trainer.default_root_dir", "{file}/run"], "trainer.default_root_dir"),
        (["cache", "--data.cache", "{file}/cache"], "data.cache"),
        (["cache", "--data.cache", "{file}"], "data.cache"),
        (["sample", "--output", "{file}/samples"], "output"),
        (["export", "--output", "{file}/student", "--ckpt_path", "x.ckpt"], "output"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_folders_that_cannot_be_written_are_one_line(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: Any, words: list[str], key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And said before anything is loaded."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("lightning_dfd.backbones.Backbone.load_transformer", lambda *words: 1 / 0)
    given = [word.replace("{file}", str(tmp_path / "file")) for word in words[1:]]
    message = fail(capsys, words[0], "-c", recipe("wan_dmd2"), *small(tiny, "wan", videos, tmp_path / "run"), *given)
    assert re.search(rf"{re.escape(key)} is \S+, which cannot be written \(", message)


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "run", lambda words, recipes: (tmp_path / "gone").rmdir())
    for kind, said in ((PermissionError, "Permission denied"), (NotADirectoryError, "Not a directory")):

        def refuse(self: Path, kind: Any = kind, said: str = said) -> None:
            raise kind(13 if kind is PermissionError else 20, said, str(self))

        monkeypatch.setattr(Path, "rmdir", refuse)
        assert f"{said}: {tmp_path / 'gone'}; name another" in fail(capsys, "fit")


def test_a_full_disk_of_safetensors_is_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # as Python ignores the signal, a write beyond it fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(SafetensorError) as raised:
            save_file({"w": torch.zeros(9999)}, tmp_path / "w.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (errors.one_line_of(raised.value) or "").startswith("File too large: make room, then run the command again")


HEAVY = ("torch", "lightning", "diffusers", "transformers", "matplotlib", "jsonargparse", "yaml")


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fitt"], []])
def test_help_versions_and_misspelt_commands_load_nothing_heavy(words: list[str]) -> None:
    asked = (
        "import sys\nfrom lightning_dfd.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", asked, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"
