"""Terms of the loss as a user writes them: in a file of their own, named in a recipe."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_dfd.cli import main as cli
from lightning_dfd.diffusion.draws import Draws
from lightning_dfd.diffusion.noise import NoiseSchedule
from lightning_dfd.objectives.terms import DistributionMatching, Networks, Step, Term, fake_loss, student_loss
from lightning_dfd.testing.tiny import TEXT_LENGTH

PAGE = (Path(__file__).parent.parent / "docs" / "new_objective.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
(RECIPE,) = (text for language, text in BLOCKS if language == "yaml")

# f-distill (2502.15681): each clip's gradient times h(r), r the density ratio that the discriminator knows.
WEIGHTING = '''
import torch
from torch import Tensor

from lightning_dfd.objectives.terms import Step, Term, TermRecipe

WEIGHTS = {"kl": lambda r: r, "js": lambda r: r / (1 + r), "hellinger": lambda r: r.sqrt()}


class FDivergence(Term):
    """Weights each clip's DMD gradient for another divergence than the reverse KL."""

    def __init__(self, divergence: str = "js", largest: float = 10.0) -> None:
        self.weight, self.largest, self.divergence = WEIGHTS[divergence], largest, divergence

    def build(self, features):
        return {"temperature": torch.nn.Linear(1, 1)}

    def fake_loss(self, step: Step) -> Tensor:
        return 1e-3 * step.networks.trained["temperature"](step.t.float().view(-1, 1)).square().mean()

    @torch.no_grad()
    def change_gradient(self, step: Step, gradient: Tensor, fake_x0: Tensor, teacher_x0: Tensor) -> Tensor:
        discriminator = step.networks.trained["discriminator"]
        features = step.networks.features(step.x_t, step.t, step.cond, discriminator.blocks)
        ratio = discriminator(features).mean(1).exp().clamp(1 / self.largest, self.largest)
        weight = self.weight(ratio)
        step.log("f_weight", weight.mean())
        return gradient * (weight / weight.mean()).view(-1, *[1] * (gradient.ndim - 1))

    def facts(self):
        return {"my_weighting.FDivergence": self.divergence}

    def card(self):
        return {"Divergence": self.divergence}
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder that holds the user's files, as `lightning` finds them there."""
    (tmp_path / "my_terms.py").write_text(PYTHON[0], encoding="utf-8")
    (tmp_path / "my_weighting.py").write_text(WEIGHTING, encoding="utf-8")
    (tmp_path / "projection.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("my_terms", "my_weighting"):
        sys.modules.pop(name, None)


def test_the_page_runs(folder: Path) -> None:
    names: dict[str, Any] = {}
    exec(PYTHON[1], names)
    assert names["student"].weight.grad.abs().sum() > 0


def test_the_projection_is_orthogonal_to_the_residual(folder: Path) -> None:
    projection = importlib.import_module("my_terms").Projection()
    generator = torch.Generator().manual_seed(0)
    gen, fake, gradient = (torch.randn(3, 2, 4, generator=generator) for _ in range(3))
    step = Step(networks(), gen, None, Draws.of(0, 0, 0, 0, torch.device("cpu")))
    step.gen = gen
    left = projection.change_gradient(step, gradient, fake, fake)
    assert ((left * (gen - fake)).flatten(1).sum(1)).abs().max() < 1e-5
    assert left.norm() < gradient.norm()


def networks() -> Networks:
    return Networks(
        NoiseSchedule("flow"), lambda x, t, c: 0.5 * x, lambda x, t, c: 0.9 * x, lambda x, t, c, scale: scale * 0.1 * x
    )


def test_terms_without_a_loss_are_refused() -> None:
    step = Step(networks(), torch.randn(2, 3), None, Draws.of(0, 0, 0, 0, torch.device("cpu")))
    with pytest.raises(ValueError, match="no term trains the student: Term"):
        student_loss([Term()], step)
    assert fake_loss([DistributionMatching(), Term()], step) == fake_loss([DistributionMatching()], step)


def test_a_coin_is_one_draw_for_a_name_and_has_its_probability() -> None:
    def coin(seed: int, name: str, probability: float = 0.3) -> bool:
        step = Step(networks(), torch.zeros(1), None, Draws.of(seed, 0, 0, 0, torch.device("cpu")))
        assert step.coin(name, probability) == step.coin(name, probability)
        return step.coin(name, probability)

    share = sum(coin(seed, "a") for seed in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)
    assert not any(coin(seed, "a", 0.0) for seed in range(100))
    assert all(coin(seed, "a", 1.0) for seed in range(100))


def words(tiny: Path, videos: Path, root: Path, *more: str) -> list[str]:
    """A short run of a tiny Wan with both terms and the GAN."""
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}
    keep = {"dirpath": f"{root}/checkpoints", "save_last": True, "enable_version_counter": False}
    recipe = {
        "trainer": {
            "max_epochs": -1, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "default_root_dir": str(root),
            "enable_progress_bar": False, "enable_model_summary": False, "logger": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}],
        },
        "model": {
            "teacher": str(tiny), "max_sequence_length": TEXT_LENGTH, "student": {"rank": 4}, "gan": {"weight": 0.1},
            "dmd": {"student_update_freq": 2}, "sampling": {"steps": [1.0, 0.75, 0.5, 0.25]},
            "student_optimizer": adamw, "fake_optimizer": adamw,
            "terms": [{"class_path": "my_terms.Projection"}, {"class_path": "my_weighting.FDivergence"}],
        },
        "data": {"folder": str(videos), "frames": 9, "height": 32, "width": 32, "batch_size": 2},
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ["-c", "recipe.yaml", *more]


@pytest.mark.slow(seconds=11)
def test_terms_of_a_user_in_a_recipe_a_resumed_run_the_plan_and_the_card(
    folder: Path, tiny: dict[str, Path], videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(root: str, steps: int, *more: str) -> dict[str, Any]:
        cli.main(["fit", *words(tiny["wan"], videos, folder / root, "--trainer.max_steps", str(steps), *more)])
        return torch.load(folder / root / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit("whole", 6)
    fit("halves", 3)
    halves = fit("halves", 6, "--ckpt_path", "last")
    assert {"term_modules.temperature.weight", "term_modules.temperature.bias"} <= set(whole["state_dict"])
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, halves["state_dict"][name]), name

    with pytest.raises(SystemExit) as refused:
        fit("halves", 8, "--ckpt_path", "last", "--model.terms", "null")
    assert "the loss is model.data_forcing + model.dmd + model.gan + model.terms FDivergence + " in str(refused.value)
    assert " there and model.data_forcing + model.dmd + model.gan here" in str(refused.value)

    capsys.readouterr()
    cli.main(["plan", *words(tiny["wan"], videos, folder / "plan", "--json", "true")])
    planned = json.loads(capsys.readouterr().out)
    assert any("temperature" in term for term in planned["terms"])

    export = words(tiny["wan"], videos, folder / "whole", "--ckpt_path", "last", "--output", str(folder / "student"))
    cli.main(["export", *export])
    card = (folder / "student" / "README.md").read_text(encoding="utf-8")
    assert "| Divergence | js |" in card
    assert "Projection" in card
