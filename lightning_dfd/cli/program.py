"""Lightning's own LightningCLI with OmegaConf interpolation over all `-c` files and the command line, recipes that
inherit others, and errors of one line."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning_utilities.core.enums import StrEnum

from lightning_dfd.callbacks.record import RecipeRecord
from lightning_dfd.cli import INTERRUPTED
from lightning_dfd.cli import evaluate as evaluation
from lightning_dfd.cli.errors import one_line, one_line_of
from lightning_dfd.cli.help import command_help, known_keys
from lightning_dfd.cli.recipes import bare_flags, expand_inherited, expand_paths, split_recipes, to_go_on
from lightning_dfd.cli.trainer import DistillationTrainer
from lightning_dfd.data import VideoDataModule
from lightning_dfd.distributed.ranks import is_first_process
from lightning_dfd.networks.roles import TRAINED
from lightning_dfd.runs.signals import Stopped
from lightning_dfd.training.module import ADAMW, DistillationModule
from lightning_dfd.training.options import HIDDEN
from lightning_dfd.training.schedules import takes_optimizer

STOCK_COMMANDS = ("fit", "validate", "test")
PARTS = ("model", "data", "trainer")
HARMLESS = (  # warnings that mean nothing here
    "LightningCLI's args parameter is intended",
    "Total length of `list` across ranks is zero",  # no clips are held out
    r"Found \d+ module\(s\) in eval mode",  # networks stay in it on purpose, see Roles.train
    "Using ModelCheckpoint with manual optimization",  # its advice is for checkpoints that rate the step before
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",  # Lightning's own
    "Checkpoint directory .* exists and is not empty",  # a second run there is refused, and this one goes on
)
PARSING = {"parser_mode": "omegaconf+", "allow_abbrev": False}  # a part of a key is a misspelt key


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
        found: list[str] = super().add_function_arguments(function, *args, **kwargs)
        return found


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
            print(command_help(words[0], part, self._subcommand_parsers[words[0]], HIDDEN))
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


def carry_out(words: Sequence[str]) -> None:
    """Run a command; ends with SystemExit 1 or 2 and one line on what the user can mend."""
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
        if stop.saved and is_first_process():
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


def program_name() -> str:
    """As the user called it."""
    called = Path(sys.argv[0])
    return "python -m lightning_dfd" if called.name == "__main__.py" else called.name
