"""The command line: `lightning plan|cache|fit|validate|test|sample|export -c recipe.yaml`, and `lightning evaluate`.

The same program is installed as `lightning`, `lightning-dfd` and runs as `python -m lightning_dfd`. Help, versions and
misspelt commands are answered here, without torch; `program.py` does the rest.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

from lightning_dfd.cli import INTERRUPTED
from lightning_dfd.cli.help import FABRIC_COMMANDS, OWN_COMMANDS, USAGE, did_you_mean

VERSIONS = ("lightning-dfd", "torch", "lightning", "diffusers", "peft")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends with SystemExit 1 or 2 and one line on what the user can mend."""
    words = command_first(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if words[0] == "--version":
        print("\n".join(f"{name} {version(name)}" for name in VERSIONS))
        return
    if words[0] not in (*OWN_COMMANDS, *FABRIC_COMMANDS):
        near = did_you_mean(words[0], [*OWN_COMMANDS, *FABRIC_COMMANDS])
        said = "the command comes first, not" if words[0].startswith("-") else "there is no command"
        sys.exit(f"lightning: error: {said} {words[0]!r}.{near} Commands: {', '.join(OWN_COMMANDS)}")
    if words[0] in FABRIC_COMMANDS:
        from lightning.fabric.cli import _main

        sys.argv = ["lightning", *words]
        _main()
        return
    load_program()(words)


def load_program() -> Callable[[Sequence[str]], None]:
    """`carry_out`, with torch and Lightning, which take seconds to load.

    Nothing that they load is garbage. Without the collector, which looks through it all again and again, they load in
    three quarters of the time.
    """
    loaded = "lightning_dfd.cli.program" in sys.modules
    gc.disable()
    try:
        from lightning_dfd.cli.program import carry_out
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        if not loaded:
            gc.freeze()
        gc.enable()
    return carry_out


def command_first(words: Sequence[str]) -> list[str]:
    """The words, with the command before recipes that were named ahead of it."""
    words = list(words)
    place = 0
    while place < len(words) and words[place].startswith(("-c", "--config")):
        place += 1 if "=" in words[place] or words[place] not in ("-c", "--config") else 2
    return [*words[place : place + 1], *words[:place], *words[place + 1 :]]


if __name__ == "__main__":
    main()
