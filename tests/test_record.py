"""A record of the run: its recipe beside the checkpoints and in every logger, and one run at the tracking server."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import Logger

from lightning_dfd.cli import main as cli
from lightning_dfd.runs.checkpoints import OURS, read_checkpoint
from tests.test_cli import fail, recipe, small


class Remote(Logger):
    """A tracking server, by Lightning's interface alone: no folder, no version."""

    params: list[Any] = []  # noqa: RUF012 (the command line makes the instance)

    @property
    def name(self) -> str:
        return "remote"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any) -> None:
        self.params.append(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


@pytest.mark.slow(seconds=3)
def test_the_recipe_reaches_every_logger_and_lies_beside_the_checkpoints(
    tiny: dict[str, Path], videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Remote.params.clear()
    words = [*small(tiny, "wan", videos, tmp_path), "--trainer.max_steps", "1"]
    remote = ["--trainer.logger+", "tests.test_record.Remote"]
    cli.main(["fit", "-c", recipe("wan_dmd2"), *words, *remote])
    beside = yaml.safe_load((tmp_path / "checkpoints" / "config.yaml").read_text(encoding="utf-8"))
    assert beside["model"]["dmd"]["guidance"] == 5.0
    assert beside["trainer"]["callbacks"][0]["init_args"]["dirpath"] == f"{tmp_path}/checkpoints"  # resolved
    assert {*beside} == {"seed_everything", "trainer", "model", "data"}  # so that it serves every command
    assert Remote.params == [beside]
    for name in ("logs", "metrics"):
        assert yaml.safe_load((tmp_path / name / "version_0" / "hparams.yaml").read_text(encoding="utf-8")) == beside
    refused = [*words, *remote, "--model.seed", "7", "--ckpt_path", "last"]
    assert "model.seed is 0 there and 7 here" in fail(capsys, "fit", "-c", recipe("wan_dmd2"), *refused)
    assert yaml.safe_load((tmp_path / "checkpoints" / "config.yaml").read_text(encoding="utf-8")) == beside
    assert len(Remote.params) == 1
    off = [*words, "--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path / "off")]
    cli.main(["fit", "-c", recipe("wan_dmd2"), *off])
    assert (tmp_path / "off" / "checkpoints" / "config.yaml").is_file()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package; returns what `wandb.init` was called with."""
    begun: list[dict[str, Any]] = []

    class Config(dict[str, Any]):
        def update(self, *args: Any, **kwargs: Any) -> None:
            super().update(*args)

    def init(**settings: Any) -> Any:
        begun.append(settings)
        run = settings["id"] or f"run{len(begun)}"
        return SimpleNamespace(id=run, name=run, config=Config(), log=lambda *_, **__: None)

    modules = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}
    modules["wandb"].__dict__.update(init=init, run=None, require=lambda _: None)
    modules["wandb.sdk.lib"].__dict__.update(RunDisabled=type("RunDisabled", (), {}))
    modules["wandb.wandb_run"].__dict__.update(Run=type("Run", (), {}))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    return begun


@pytest.mark.slow(seconds=3)
def test_a_resumed_run_is_the_same_run_of_wandb(
    tiny: dict[str, Path],
    videos: Path,
    tmp_path: Path,
    wandb: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "wandb.yaml"
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "mine"}}
    own.write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}), encoding="utf-8")
    words = ["-c", recipe("wan_dmd2"), "-c", str(own), *small(tiny, "wan", videos, tmp_path), "--ckpt_path", "last"]
    cli.main(["fit", *words, "--trainer.max_steps", "1"])
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")[OURS]["runs"] == {"W&B mine": "run1"}
    monkeypatch.chdir(tmp_path)
    cli.main(["fit", *words, "--trainer.max_steps", "2"])
    assert not (tmp_path / "config.yaml").exists()  # W&B's folder is the current one
    assert [(begun["id"], begun["resume"]) for begun in wandb] == [(None, "allow"), ("run1", "allow")]
    cli.main(["fit", *words, "--trainer.max_steps", "3", "--trainer.logger.init_args.id", "other"])
    assert wandb[-1]["id"] == "other"


def test_versions_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"torch {version('torch')}"
    assert [line.split()[0] for line in lines] == ["lightning-dfd", "torch", "lightning", "diffusers", "peft"]
    assert all(re.fullmatch(r"[\w-]+ \d+\.\d+\S*", line) for line in lines)
