"""The texts of help and hints. Nothing here imports torch, so that `lightning --help` answers at once."""

from __future__ import annotations

import difflib
import textwrap
from argparse import SUPPRESS
from collections.abc import Collection, Sequence
from typing import Any

OWN_COMMANDS = {
    "fit": "train a student",
    "validate": "denoising errors on held-out clips",
    "test": "the same, as the test stage",
    "plan": "estimate memory, disk and work before anything is loaded",
    "cache": "encode the videos once, so that training loads no VAE and no text encoder",
    "sample": "generate videos with the student or the teacher",
    "export": "write the student as a diffusers pipeline or a LoRA file",
    "evaluate": "measure folders of videos beside real ones",
}
FABRIC_COMMANDS = ("run", "consolidate")  # Lightning's own `lightning` commands, passed on to it
NOT_KEYS = ("help", "config", "print_config")
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
        f"Lightning Fabric's own commands, {' and '.join(FABRIC_COMMANDS)}, work too.",
    ]
)


def command_help(command: str, part: str | None, parser: Any, hidden: Collection[str] = ()) -> str:
    """The keys of a command, or of one part of its recipe, with what they mean.

    Without a part the trainer's are left out: they are Lightning's own, and as many as all others. Of the trainer's,
    those that are `hidden` are left out as well: they are refused; docs/trainer.md says why.
    """
    lines = [f"lightning {command} -c recipe.yaml [--key value ...]: {OWN_COMMANDS[command]}", ""]
    for action in parser._actions:
        root = action.dest.split(".")[0]
        shown = root == part if part else root != "trainer"
        if not shown or not action.option_strings or action.dest in NOT_KEYS or action.metavar == "CONFIG":
            continue
        if action.dest.endswith(".help"):  # said once, below
            continue
        if root == "trainer" and action.dest.removeprefix("trainer.") in hidden:
            continue
        plain = isinstance(action.default, (str, int, float, list)) and action.default not in (SUPPRESS, "")
        text = f"{action.help or ''}" + (f" [{action.default}]" if plain else "")
        name = f"  {action.option_strings[0]} {action.metavar if str(action.metavar).startswith('{') else ''}".rstrip()
        wrapped = textwrap.wrap(" ".join(text.replace("%%", "%").split()), 112) or [""]
        lines += [name, *(f"      {line}" for line in wrapped)]
    return "\n".join([*lines, "", *USAGE.splitlines()[len(OWN_COMMANDS) + 2 : len(OWN_COMMANDS) + 6]])


def known_keys(parser: Any) -> list[str]:
    """Every dotted key of a parser and of its subcommands."""
    keys: list[str] = []
    for action in parser._actions:
        if action.option_strings and action.dest not in NOT_KEYS:
            keys.append(action.dest)
        for subparser in (getattr(action, "_name_parser_map", None) or {}).values():
            keys += known_keys(subparser)
    return keys


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
