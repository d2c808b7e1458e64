"""Errors of one line: what a user can mend, from jsonargparse's reports and from exceptions."""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from lightning_dfd.cli.help import OWN_COMMANDS, did_you_mean
from lightning_dfd.training.settings import RENAMED

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS)
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


OLD = {  # what earlier versions took, and what to say of it
    **{old: f"it is called {now} now" for old, now in RENAMED.items()},
    "data_forcing.until": "it is gone; train without data forcing in a second run, by model.init_from",
}


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
    for old, now in OLD.items():
        if re.search(rf"\b{re.escape(old)}\b", line):
            return f"{line.rstrip('.')}: {now}"
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


# ---- exceptions ------------------------------------------------------------------------------------------------


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
