"""The documents are true: their commands parse, their keys, links and recipes exist. test_newcomer.py runs them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dfd.backbones import backbone_from_pretrained
from lightning_dfd.cli import evaluate as evaluation
from lightning_dfd.cli import help as help_texts
from lightning_dfd.cli import main as cli
from lightning_dfd.cli import program
from lightning_dfd.testing.tiny import TINY

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def page_named(name: str) -> Path:
    return next(page for page in PAGES if page.name == name)


def test_a_new_family_is_short() -> None:
    """The page's two files; test_newcomer.py runs them."""
    lines = [line for block in blocks(page_named("new_backbone.md"), "python")[:2] for line in block.splitlines()[1:]]
    assert len([line for line in lines if line.strip()]) <= 40


def test_every_family_is_in_the_table_of_backbones() -> None:
    """As `python -m lightning_dfd.testing docs/backbones.md` writes it."""
    assert re.findall(r"^\| (\w+) \| \w+Pipeline \|", prose(page_named("backbones.md")), re.MULTILINE) == list(TINY)


# ---- commands and keys ----------------------------------------------------------------------------------------


DICTIONARIES = {"videos", "runs"}  # of evaluate


class _Built(Exception):
    pass


@pytest.fixture(scope="module")
def keys() -> dict[str, set[str]]:
    """The keys that every command of the program knows."""
    found: dict[str, set[str]] = {}

    class Stopped(program.DistillationCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.update({name: set(help_texts.known_keys(sub)) for name, sub in self._subcommand_parsers.items()})
            raise _Built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "DistillationCLI", Stopped)
        for command in program.DistillationCLI.subcommands():
            with pytest.raises(_Built):
                program.run([command])
    found["evaluate"] = set(help_texts.known_keys(evaluation.make_parser(program.OneLineParser)))
    assert set(found) == set(help_texts.OWN_COMMANDS)
    return found


def is_known(key: str, keys: set[str]) -> bool:
    """A key of the parser, an item of a dictionary, or one of the arguments of a class that a key of it names."""
    if key in keys or key.partition(".")[0] in DICTIONARIES & keys:
        return True
    before, _, _ = key.partition(".init_args.")
    return before != key and f"{before}.help" in keys


def command_lines(page: Path) -> list[list[str]]:
    """All lines in shell blocks and all inline code that start our program with arguments."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in INLINE.findall(prose(page))]
    found = []
    for line in lines:
        words = (
            shlex.split(line.strip(), comments=True) if re.match(r"(lightning|python -m lightning_dfd) ", line) else []
        )
        words = words[3:] if words[:1] == ["python"] else words[1:]
        if words:
            found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_use_keys_that_exist(page: Path, keys: dict[str, set[str]]) -> None:
    for words in command_lines(page):
        assert words[0] in keys, f"{page.name}: lightning {words[0]}"
        for word in words[1:]:
            flag, _, _ = word.partition("=")
            if flag.startswith("--") and flag not in ("--help", "--print_config"):
                assert is_known(flag.removeprefix("--").rstrip("+"), keys[words[0]]), f"{page.name}: {words[0]} {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_the_text_exist(page: Path, keys: dict[str, set[str]]) -> None:
    everywhere = set().union(*keys.values())
    groups = {".".join(key.split(".")[:depth]) for key in everywhere for depth in (1, 2)}
    for code in INLINE.findall(prose(page)):
        for word in code.split():
            key = re.fullmatch(r"(?:--)?((?:model|data|trainer)\.[\w.]+?)[.:,]?(?:=\S*)?", word)
            if key and not key.group(1).endswith((".py", ".safetensors")):
                assert is_known(key.group(1), everywhere) or key.group(1) in groups, f"{page.name}: {key.group(1)}"
            bare = re.fullmatch(r"--(\w+)", word)
            if bare and page.name in ("recipes.md", "export.md"):
                assert bare.group(1) in everywhere | {"model", "data", "help", "print_config"}, f"{page.name}: {word}"


def full_commands() -> list[tuple[str, list[str]]]:
    """What is run from a recipe, each once."""
    found = {tuple(words): page.name for page in PAGES for words in command_lines(page)}
    return [
        (name, list(words))
        for words, name in found.items()
        if ("-c" in words or "--videos.student" in words) and "--print_config" not in words
    ]


@pytest.mark.slow(seconds=1)
@pytest.mark.parametrize(("page", "words"), full_commands(), ids=lambda value: str(value)[:60])
def test_commands_parse(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values too: recipes, files of the page, overrides. The command prints what it would run."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for block in blocks(page_named(page), "yaml", "python"):
        file = re.match(r"# ((\w+)\.(?:yaml|py))\n", block)
        if file:
            (tmp_path / file.group(1)).write_text(block, encoding="utf-8")
            monkeypatch.delitem(sys.modules, file.group(2), raising=False)
    for word in words:
        if word.endswith("/checkpoints/config.yaml"):  # that of the page's own run
            config = tmp_path / word
            config.parent.mkdir(parents=True)
            config.write_text(f"inherit: [{ROOT}/recipes/{config.parts[-3]}.yaml]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--print_config"])
    out = capsys.readouterr()
    assert stop.value.code in (0, None), out.err
    found = yaml.safe_load(out.out)
    assert found["real"] if words[0] == "evaluate" else found["model"]["teacher"]


# ---- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_and_recipes_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"
    for recipe in re.findall(r"recipes/(\w+\.yaml)", text):
        assert (ROOT / "recipes" / recipe).is_file(), f"{page.name} names recipes/{recipe}"
    for module in re.findall(r"python -m (lightning_dfd[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{page.name}: python -m {module}"


def test_every_recipe_is_described() -> None:
    text = page_named("recipes.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "recipes").glob("*.yaml") if f"`recipes/{path.name}`" not in text] == []


def test_every_key_is_described(keys: dict[str, set[str]]) -> None:
    text = page_named("recipes.md").read_text(encoding="utf-8")
    groups = {key.rpartition(".")[0] for key in keys["fit"]}
    own = {key for key in keys["fit"] - groups if key.startswith(("model.", "data.")) and not key.endswith(".help")}
    classes = {"model.student_optimizer", "model.fake_optimizer", "model.lr_scheduler", "model.student_lr_scheduler"}
    assert len(own) > 20
    assert sorted(key for key in own | classes if f"`{key}`" not in text) == []


def test_step_lists_can_be_exported(tiny: dict[str, Path]) -> None:
    """The table of docs/recipes.md, column by column."""
    table = re.findall(r"^\| \d+ \| (\[.*\]) \|$", prose(page_named("recipes.md")), re.MULTILINE)
    assert len(table) == 5
    for row in table:
        for family, steps in zip(("cogvideox", "wan", "wan"), row.split(" | "), strict=True):
            backbone = backbone_from_pretrained(str(tiny[family]))
            backbone.few_step_scheduler(json.loads(steps), "ode")
            backbone.few_step_scheduler(json.loads(steps), "sde")
