"""Runs commands, modules and code one after another in one process, because starting one takes seconds.

Reads requests from standard input, a JSON object a line: `kind` (lightning, module or code), `words` (arguments, for a
module its name first) or `code`, the `page` whose names the code shares, and the `log` that takes all output. Answers
each by one line: the exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any

HERE = os.getcwd()
PATH = sys.path[1:]  # without the folder of this file
NAMES: dict[str, dict[str, Any]] = {}


def carry_out(request: dict[str, Any]) -> None:
    importlib.invalidate_caches()
    if request["kind"] == "lightning":  # finds modules of the current folder by itself, or not at all
        from lightning_dfd.cli.main import main as lightning

        sys.path[:] = PATH
        lightning(request["words"])
        return
    sys.path[:] = [HERE, *PATH]
    if request["kind"] == "module":
        name, *words = request["words"]
        sys.argv = [name, *words]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    names = NAMES.setdefault(request["page"], {"__name__": request["page"]})
    exec(compile(request["code"], request["page"], "exec"), names)


def status_of(request: dict[str, Any]) -> int:
    """0 if all went well; anything else goes to the log."""
    try:
        carry_out(request)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        for name, module in list(sys.modules.items()):  # a later page may have another file of this name
            if os.path.dirname(getattr(module, "__file__", None) or "") == HERE:
                del sys.modules[name]
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        status = status_of(request)
        sys.stdout.flush()
        sys.stderr.flush()
        print(status, file=answers, flush=True)


if __name__ == "__main__":
    main()
