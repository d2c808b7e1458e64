"""Recipes on the command line: `-c`, what they inherit, and the paths in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from lightning_dfd.files import expanded

PATH_KEYS = {
    "cache", "ckpt_path", "default_root_dir", "dir", "dirpath", "folder", "images", "init_from", "output",
    "prompts_file", "root_dir", "save_dir", "statistics", "teacher",
}  # fmt: skip


def expand_paths(config: Any, key: str = "") -> None:
    """Replace `~` and environment variables in every path of a parsed recipe, in place, callbacks and loggers too."""
    items = list(enumerate(config)) if isinstance(config, list) else list(vars(config).items())
    for name, value in items:
        path = f"{key}.{name}".removeprefix(".") if isinstance(name, str) else key
        if isinstance(value, str) and path.rpartition(".")[2] in PATH_KEYS:
            config[name] = expanded(value, path.partition(".init_args")[0])
        elif isinstance(value, (Namespace, list)):
            expand_paths(value, path)


def expand_inherited(arguments: Sequence[str]) -> list[str]:
    """A command's words with its recipes, and what they inherit, before all else.

    So the command line wins wherever `-c` stands. Recipes keep their order. Each has its parents before it, from an
    `inherit:` list with paths relative to the recipe, which is passed on without that key.
    """
    command, recipes, others = split_recipes(arguments)
    chains = [text for recipe in recipes for text in recipe_chain(Path(expanded(recipe, "-c")))]
    return [*command, *(word for text in chains for word in ("-c", text)), *others]


def split_recipes(words: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """The command (none or one word), the values of `-c` and `--config` in their order, and the other words."""
    command: list[str] = []
    recipes: list[str] = []
    others: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        flag, _, value = word.partition("=")
        if word.startswith("-c") and flag != "-c":  # argparse takes -crecipe.yaml too
            flag, value = "-c", word[2:]
        if flag in ("-c", "--config"):
            if not value and (not pending or pending[0].startswith("-")):
                raise ValueError(f"{flag} needs the path of a recipe")
            recipes.append(value or pending.pop(0))
        elif not command and not others and not word.startswith("-"):
            command.append(word)
        else:
            others.append(word)
    return command, recipes, others


def recipe_chain(path: Path, below: tuple[Path, ...] = ()) -> list[str]:
    """A recipe and all that it inherits, eldest first, as what `-c` takes: paths, or the YAML itself."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; -c takes a recipe, a YAML file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}")
    if path.resolve() in below:
        raise ValueError(f"{path} inherits itself, by way of {' -> '.join(p.name for p in below)}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise OSError(f"the recipe {path} cannot be read: {error.strerror}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds no keys; a recipe has trainer, model and data")
    if "inherit" not in recipe:
        return [str(path)]
    parents = recipe.pop("inherit")
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"{path}: inherit is {parents!r}; it must be a list of recipes, as [common.yaml]")
    found = [path.parent / expanded(parent, f"{path}: inherit") for parent in parents]
    chain = [text for parent in found for text in recipe_chain(parent, (*below, path.resolve()))]
    return [*chain, yaml.safe_dump(recipe)] if recipe else chain


def bare_flags(words: Sequence[str]) -> list[str]:
    """`--overwrite` without a value, which the parser wants one for."""
    followed = [*words[1:], ""]
    return [
        f"{word}=true" if word == "--overwrite" and after not in ("true", "false") else word
        for word, after in zip(words, followed, strict=True)
    ]


def to_go_on(words: Sequence[str]) -> list[str]:
    """The same command with `--ckpt_path last`."""
    kept: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        flag, _, value = word.partition("=")
        if flag not in ("--ckpt_path", "--overwrite"):
            kept.append(word)
        elif not value and (flag == "--ckpt_path" or pending[:1] in (["true"], ["false"])):
            pending.pop(0)
    return [*kept, "--ckpt_path", "last"]
