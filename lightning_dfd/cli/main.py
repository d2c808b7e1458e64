"""The command line: `lightning plan|cache|fit|validate|test|sample|export -c recipe.yaml`, and `lightning evaluate`.

The same program is installed as `lightning`, `lightning-dfd` and runs as `python -m lightning_dfd`. It is
Lightning's own LightningCLI with OmegaConf interpolation over all `-c` files and the command line, with recipes
that inherit others, and with errors of one line.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import inspect
import os
import re
import shlex
import sys
import textwrap
import traceback
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import lightning.fabric.cli
import torch
import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.enums import StrEnum
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from lightning_dfd.callbacks.record import RecipeRecord
from lightning_dfd.cli import evaluate as evaluation
from lightning_dfd.cli.trainer import INTERRUPTED, DistillationTrainer
from lightning_dfd.data import VideoDataModule
from lightning_dfd.files import expanded as expanded_path
from lightning_dfd.networks.roles import TRAINED
from lightning_dfd.runs.signals import Stopped
from lightning_dfd.training.module import ADAMW, DistillationModule
from lightning_dfd.training.options import HIDDEN
from lightning_dfd.training.schedules import takes_optimizer

OWN_COMMANDS = {
    "fit": "train a student",
    "validate": "denoising errors on held-out clips",
    "test": "the same, as the test stage",
    "plan": "estimate memory, disk and work before anything is loaded",
    "cache": "encode the videos once, so that training loads no VAE and no text encoder",
    "sample": "make videos with the student or the teacher",
    "export": "write the student as a diffusers pipeline or a LoRA file",
    "evaluate": "measure folders of videos beside real ones",
}
STOCK_COMMANDS = ("fit", "validate", "test")
PARTS = ("model", "data", "trainer")
VERSIONS = ("lightning-dfd", "torch", "lightning", "diffusers", "peft")
NOT_KEYS = ("help", "config", "print_config")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS)
FABRIC_COMMANDS = ("run", "consolidate")  # Lightning's own `lightning` commands, passed on to it
HARMLESS = (  # warnings that mean nothing here
    "LightningCLI's args parameter is intended",
    "Total length of `list` across ranks is zero",  # no clips are held out
    r"Found \d+ module\(s\) in eval mode",  # networks stay in it on purpose, see Roles.train
    "Using ModelCheckpoint with manual optimization",  # its advice is for checkpoints that rate the step before
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own
    "Checkpoint directory .* exists and is not empty",  # a second run there is refused, and this one goes on
)
PARSING = {"parser_mode": "omegaconf+", "allow_abbrev": False}  # a part of a key is a misspelt key
USAGE = "\n".join(
    [
        "usage: lightning COMMAND -c recipe.yaml [--key value ...]",
        "",
        *(f"  {name:9} {what}" for name, what in OWN_COMMANDS.items()),
        "",
        "  lightning COMMAND --help [model|data|trainer]     the keys that a recipe or the command line can set",
        "  lightning fit --model.student_optimizer.help torch.optim.Adam     those of one class; also for",
        "                --model.lr_scheduler, --trainer.logger, --trainer.callbacks, --trainer.strategy",
        "  lightning COMMAND -c recipe.yaml --print_config     the whole recipe, resolved",
        "  lightning --version     of this package and of those that it stands on",
        "",
        "Example: lightning fit -c recipes/cogvideox_dmd2.yaml --data.folder my_videos",
        f"Lightning Fabric's own commands, {' and '.join(FABRIC_COMMANDS)}, work as ever.",
    ]
)


class OneLineParser(LightningArgumentParser):
    """Answers a mistake with one line and, for a misspelt key, the nearest ones."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a class within the recipe: the parser above adds the key, and may try others
            super().error(message, ex)
        self.exit(2, f"lightning: error: {one_line(str(message), known_keys(self))}\n")

    def add_function_arguments(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
        """Of a schedule's function, all but the optimizer, which training gives it; see ScheduleFunction."""
        if takes_optimizer(function):
            kwargs |= {"skip": {*(kwargs.get("skip") or ()), "optimizer"}, "fail_untyped": False}
        return super().add_function_arguments(function, *args, **kwargs)  # type: ignore[no-any-return]


REQUIRED = re.compile(r"the following arguments are required: (.+)")
REFUSED = re.compile(r"Option '([^']+)' is not accepted")
UNKNOWN_KEY = re.compile(r"(?:[Kk]ey|[Oo]ption) '([^']+)'|unrecognized arguments?: --([\w.+]+)")
UNMADE = re.compile(r"Problem with given class_path '([^']+)':\s+(.+)")
NOISE = (
    (r"\. Got value: (Namespace|NestedArg)\(.*\)$", ""),
    (r"Type typing\.Callable\[.*?\] expects a function or a callable class: ", ""),
    (r'^(?:Parser key "[^"]+": *)+', ""),
    (r"Unable to load config [\"'](.*)[\"']$", r"Expected the keys below it, or a YAML file of them. Got value: \1"),
    (r"typing\.|<class '|'>", ""),
    (r"\bNoneType\b", "null"),
    (r"\.\.$", "."),
)


def one_line(message: str, keys: Sequence[str]) -> str:
    """The cause in jsonargparse's report, with the key that it is about and, if that is unknown, a hint."""
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")] or [message]
    key, line = key_of(message), lines[-1]
    refused, missing = REFUSED.search(message), REQUIRED.search(message)
    if missing:
        return lacking(missing.group(1).split(", "), key)
    if refused and class_in(message):
        name, known = refused.group(1), parameters_of(class_in(message))
        if name == "class_path":
            return f"{key}: a class is given by class_path and init_args, and by no other key"
        if name not in known:  # else one of several types lacks it, and the other has something against its value
            return f"{key or class_in(message)} takes no {name}.{did_you_mean(name, known)} See --{key}.help"
        expected = re.findall(r"Expected an? .+", message)
        return f"{key}: {expected[0] if expected else lines[-1]}"
    subtypes = re.findall(r"Subtypes: \[(.+)\]", message)
    if subtypes and line.startswith("Given value"):
        line = f"Expected one of {subtypes[-1]}. {line}"
    for noise, plain in NOISE:
        line = re.sub(noise, plain, line)
    if key not in re.split(r"(?:Got|Given) value", line)[0]:
        line = f"{key}: {line}"
    unknown = UNKNOWN_KEY.search(line)
    if unknown:
        line += did_you_mean(unknown.group(1) or unknown.group(2), keys)
    return line


def key_of(message: str) -> str:
    """The key that one of jsonargparse's reports is about; empty where it does not say."""
    found: list[str] = re.findall(r'[Pp]arser key "([^"]+)"', message)
    key = found[0] if found else ""
    for inner in found[1:]:
        if inner.startswith(f"{key}."):
            key = inner
        elif inner != key:  # of a class within it
            key += f".init_args.{inner}"
    return key


def class_in(message: str) -> str:
    """The import path of the class whose parameters a report is about; empty if it is about none."""
    found = re.search(r"class_path[ =]'([\w.]+)'", message)
    return found.group(1) if found else ""


def parameters_of(class_path: str) -> list[str]:
    """The parameters with which a class is made, those that its parents take included."""
    module, _, name = class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)  # which jsonargparse has imported already
    return [name for one in getattr(found, "__mro__", [found]) for name in inspect.signature(one).parameters]


def lacking(keys: Sequence[str], within: str) -> str:
    """What to say of required keys that are not given: of a command, or `within` another key."""
    command = keys[0].partition(".")[0]
    names = [key.removeprefix(f"{command}.") for key in keys] if command in OWN_COMMANDS else list(keys)
    if within:
        return f"{within} lacks {' and '.join(keys)}"
    if "model.teacher" in names:
        return f"no teacher is named; give a recipe, as in: lightning {command} -c recipe.yaml (or --model.teacher)"
    return f"missing: {', '.join(f'--{name}' for name in names)}"


def known_keys(parser: Any) -> list[str]:
    """Every dotted key of a parser and of its subcommands."""
    keys: list[str] = []
    for action in parser._actions:
        if action.option_strings and action.dest not in NOT_KEYS:
            keys.append(action.dest)
        for subparser in (getattr(action, "_name_parser_map", None) or {}).values():
            keys += known_keys(subparser)
    return keys


def command_help(command: str, part: str | None, parser: Any) -> str:
    """The keys of a command, or of one part of its recipe, with what they mean.

    Without a part the trainer's are left out: they are Lightning's own, and as many as all others.
    """
    lines = [f"lightning {command} -c recipe.yaml [--key value ...]: {OWN_COMMANDS[command]}", ""]
    for action in parser._actions:
        root = action.dest.split(".")[0]
        shown = root == part if part else root != "trainer"
        if not shown or not action.option_strings or action.dest in NOT_KEYS or action.metavar == "CONFIG":
            continue
        if action.dest.endswith(".help"):  # said once, below
            continue
        if root == "trainer" and action.dest.removeprefix("trainer.") in HIDDEN:  # refused; docs/trainer.md says why
            continue
        plain = isinstance(action.default, (str, int, float, list)) and action.default not in (SUPPRESS, "")
        text = f"{action.help or ''}" + (f" [{action.default}]" if plain else "")
        name = f"  {action.option_strings[0]} {action.metavar if str(action.metavar).startswith('{') else ''}".rstrip()
        wrapped = textwrap.wrap(" ".join(text.replace("%%", "%").split()), 112) or [""]
        lines += [name, *(f"      {line}" for line in wrapped)]
    return "\n".join([*lines, "", *USAGE.splitlines()[len(OWN_COMMANDS) + 2 : len(OWN_COMMANDS) + 6]])


def did_you_mean(wrong: str, keys: Sequence[str]) -> str:
    """A hint with the keys that look most like `wrong`: whole, or by their last part."""
    wrong = wrong.split("=")[0].removeprefix("fit.").rstrip("+")
    near = difflib.get_close_matches(wrong, keys, n=2, cutoff=0.75)
    last = wrong.rsplit(".", 1)[-1]
    by_last = {key.rsplit(".", 1)[-1]: key for key in keys}
    near += [by_last[match] for match in difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.7)]
    roots = [key for key in keys if "." not in key]  # dictionaries, of which any item may be given
    near = near or difflib.get_close_matches(wrong.split(".")[0], roots, n=1, cutoff=0.75)
    return f" Did you mean {' or '.join(list(dict.fromkeys(near))[:2])}?" if near else ""


class DistillationCLI(LightningCLI):
    """LightningCLI with this package's trainer, and without what makes a checkpoint overrule the command line."""

    def __init__(self, command: str, *args: Any, recipes: Sequence[str] = (), **kwargs: Any) -> None:
        self.recipes = list(recipes)
        # The parser of one command alone: those of all seven take a second, at every start.
        chosen = {command: DistillationCLI.subcommands()[command]}
        self.subcommands = lambda: chosen  # type: ignore[method-assign]
        super().__init__(*args, **kwargs)

    def before_sample(self) -> None:
        self.trainer.recipes = self.recipes  # type: ignore[attr-defined]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The module's default optimizer in a form that can be written to a recipe."""
        adamw = {"class_path": "torch.optim.AdamW", "init_args": {**ADAMW.keywords}}
        parser.set_defaults({f"model.{role}_optimizer": adamw for role in TRAINED})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        own = {name: {"model", "datamodule"} for name in ("plan", "cache", "sample", "export")}
        stock = LightningCLI.subcommands()
        return {name: stock[name] | {"weights_only"} for name in STOCK_COMMANDS} | own

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand in STOCK_COMMANDS:
            kwargs["weights_only"] = True  # no pickled code from a checkpoint
        return kwargs

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words = list(args or [])
        if words and ({"--help", "-h"} & set(words)):
            part = next((word for word in words[1:] if word in PARTS), None)
            print(command_help(words[0], part, self._subcommand_parsers[words[0]]))
            raise SystemExit(0)
        super().parse_arguments(parser, words)

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ValueError(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        expand_paths(self.config[self.subcommand])

    def _parse_ckpt_path(self) -> None:
        """Checkpoints hold no hyperparameters that could beat the recipe and the command line."""


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
            config[name] = expanded_path(value, path.partition(".init_args")[0])
        elif isinstance(value, (Namespace, list)):
            expand_paths(value, path)


def expand_inherited(arguments: Sequence[str]) -> list[str]:
    """A command's words with its recipes, and what they inherit, before all else.

    So the command line wins wherever `-c` stands. Recipes keep their order. Each has its parents before it, from an
    `inherit:` list with paths relative to the recipe, which is passed on without that key.
    """
    command, recipes, others = split_recipes(arguments)
    chains = [text for recipe in recipes for text in recipe_chain(Path(expanded_path(recipe, "-c")))]
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
    found = [path.parent / expanded_path(parent, f"{path}: inherit") for parent in parents]
    chain = [text for parent in found for text in recipe_chain(parent, (*below, path.resolve()))]
    return [*chain, yaml.safe_dump(recipe)] if recipe else chain


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit 1 or 2 and one line on what the user can mend."""
    words = command_first(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if words[0] in FABRIC_COMMANDS:
        sys.argv = ["lightning", *words]
        lightning.fabric.cli._main()
        return
    if words[0] == "--version":
        print("\n".join(f"{name} {version(name)}" for name in VERSIONS))
        return
    if words[0] not in OWN_COMMANDS:
        near = did_you_mean(words[0], [*OWN_COMMANDS, *FABRIC_COMMANDS])
        said = "the command comes first, not" if words[0].startswith("-") else "there is no command"
        sys.exit(f"lightning: error: {said} {words[0]!r}.{near} Commands: {', '.join(OWN_COMMANDS)}")
    sys.path.append(os.getcwd())  # where a recipe's own classes are, as for `python -m`
    program, sys.argv = sys.argv, [sys.argv[0], *words]  # with which strategies start their further processes
    try:
        if words[0] == "evaluate":  # needs no model, and so none of LightningCLI
            evaluation.main(expand_inherited(words)[1:], OneLineParser)
        else:
            run(expand_inherited(bare_flags(words)), split_recipes(words)[1])
    except KeyboardInterrupt:  # while it loads; a run that trains ends as any other that is stopped
        print("\nlightning: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Stopped as stop:
        if stop.saved and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print(f"go on with: {program_name()} {shlex.join(to_go_on(words))}", file=sys.stderr)
        raise
    except BrokenPipeError:  # the reader of our output, a pager say, has had enough
        sys.exit(1)
    except Exception as error:
        line = one_line_of(error)
        if line is None or os.environ.get("DFD_TRACEBACK"):
            raise
        sys.exit(f"lightning: error: {line}")
    finally:
        sys.argv = program
        if torch.distributed.is_initialized():  # else gloo's threads may abort the process when it ends
            torch.distributed.destroy_process_group()


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


def program_name() -> str:
    """As the user called it."""
    called = Path(sys.argv[0])
    return "python -m lightning_dfd" if called.name == "__main__.py" else called.name


def command_first(words: Sequence[str]) -> list[str]:
    """The words, with the command before recipes that were named ahead of it."""
    words = list(words)
    place = 0
    while place < len(words) and words[place].startswith(("-c", "--config")):
        place += 1 if "=" in words[place] or words[place] not in ("-c", "--config") else 2
    return [*words[place : place + 1], *words[:place], *words[place + 1 :]]


def run(arguments: list[str], recipes: Sequence[str] = ()) -> DistillationCLI:
    """LightningCLI on these arguments, with `${...}` resolved over all recipes and overrides together.

    Args:
        recipes: as the user named them, for records of what was run.
    """
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    for harmless in HARMLESS:
        warnings.filterwarnings("ignore", message=harmless)
    # Lightning's enumerations, which its classes have as defaults: Timer's interval
    yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, value: dumper.represent_str(value.value))
    return DistillationCLI(
        arguments[0],
        DistillationModule,
        VideoDataModule,
        trainer_class=DistillationTrainer,
        parser_class=OneLineParser,
        parser_kwargs=PARSING | {arguments[0]: PARSING},
        save_config_callback=RecipeRecord,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        recipes=recipes,
        args=arguments,
    )


def one_line_of(error: Exception) -> str | None:
    """What to tell the user of an error that he can mend; None for any other, which keeps its traceback."""
    number = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    if number:  # safetensors tells what the system refused by the text alone
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f", {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}: make room, then run the command again; fit goes on with --ckpt_path last"
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename and not _is_ours(error):
        return f"{error.strerror}: {error.filename}; name another file or folder, or mend its permissions"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"out of memory: {str(error).strip().splitlines()[0]} `lightning plan --memory GIB` with the same recipe "
            "says what to change; docs/scaling.md lists it too"
        )
    cause: BaseException | None = error
    while cause is not None:  # jsonargparse wraps what the classes of a recipe raise while they are made
        mendable = isinstance(cause, MisconfigurationException)  # Lightning's word for what a recipe can cause
        mendable |= isinstance(cause, (ValueError, OSError, RuntimeError, ImportError)) and _is_ours(cause)
        if mendable or isinstance(cause, OmegaConfBaseException):
            return " ".join(str(cause).split())
        cause = cause.__cause__ if _is_jsonargparse(cause) else None
    if _is_jsonargparse(error):  # of one of several types it keeps the text alone
        unmade = UNMADE.search(str(error))
        return f"{unmade[1]} cannot be made: {unmade[2]}" if unmade else None
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error on purpose: then its message is written for the user. An error from
    further down keeps its traceback."""
    place = _raised_in(error)
    return place is not None and place.is_relative_to(Path(__file__).parent.parent)


def _is_jsonargparse(error: BaseException) -> bool:
    place = _raised_in(error)
    return place is not None and place.parent.name == "jsonargparse"


def _raised_in(error: BaseException) -> Path | None:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename) if frames else None


if __name__ == "__main__":
    main()
