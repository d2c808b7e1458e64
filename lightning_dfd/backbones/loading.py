"""Reading a pipeline's configs and loading its parts, with errors that say what is wrong with the teacher."""

from __future__ import annotations

import importlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_dfd.backbones.location import Location, locate, weights_of

# What a teacher that is missing, damaged or of another make raises somewhere in diffusers and transformers; the last
# is of a .bin file, which both read as plain tensors only (`weights_only`), that holds code.
UNREADABLE = (
    OSError,
    ImportError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_pipeline(source: str | Location, dtype: torch.dtype, name: str | None = None, **components: Any) -> Any:
    """`from_pretrained` of the pipeline's class, or of the class `name`, which neither downloads nor loads components
    that are given (as None). Components whose weights are there as a variant only are loaded from it."""
    location = locate(source)
    index = read_config(DiffusionPipeline, location)
    for part, (library, kind) in parts_of(index).items():
        if part in components or not _is_network(library, kind):
            continue
        weights = weights_of(location, part, dtype)
        if weights is not None and weights.variant is not None:
            components[part] = load_part(location, part, (library, kind), dtype)
    # Of its own class: DiffusionPipeline's loads what is given as None all the same where the class has it as
    # optional, as Wan's has its networks.
    pipeline = getattr(diffusers, name or str(index["_class_name"]), DiffusionPipeline)
    try:
        return pipeline.from_pretrained(location.repo, revision=location.revision, dtype=dtype, **components)
    except torch.OutOfMemoryError:  # no fault of the teacher's
        raise
    except UNREADABLE as error:
        raise teacher_not_found(location, error) from error


def load_part(location: Location, part: str, kind: tuple[str, str], dtype: torch.dtype, **options: Any) -> nn.Module:
    """One component of a pipeline by itself; `kind` is its library and class, as `parts_of` gives them."""
    library, name = kind
    try:
        network_class = getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise teacher_not_found(f"{location}, {part}", error) from error
    weights = weights_of(location, part, dtype)
    if weights is not None and weights.variant is not None:
        options["variant"] = weights.variant
    try:
        network: nn.Module = network_class.from_pretrained(
            location.repo, subfolder=part, revision=location.revision, dtype=dtype, **options
        )
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise teacher_not_found(f"{location}, {part}", error) from error
    return network


def parts_of(pipeline_config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that a model_index.json says are there, by name: library and class."""
    entries = {name: part for name, part in pipeline_config.items() if isinstance(part, (list, tuple))}
    return {name: (str(part[0]), str(part[1])) for name, part in entries.items() if part[0] is not None}


def _is_network(library: str, kind: str) -> bool:
    found = getattr(importlib.import_module(library), kind, None) if library in ("diffusers", "transformers") else None
    return isinstance(found, type) and issubclass(found, nn.Module)


def read_config(reader: Any, source: str | Location, folder: str | None = None) -> dict[str, Any]:
    """The JSON config of one component of a pipeline; `reader` is any diffusers class with its file name."""
    location = locate(source)
    try:
        config: dict[str, Any] = reader.load_config(location.repo, subfolder=folder, revision=location.revision)
    except OSError as error:
        raise teacher_not_found(location if folder is None else f"{location}, {folder}", error) from error
    return config


def teacher_not_found(source: str | Location, error: Exception) -> FileNotFoundError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    folder = Path(str(source).partition(", ")[0])
    damaged = _damaged_files(folder) if folder.is_dir() else []
    named = f"damaged: {', '.join(damaged)}. " if damaged else ""
    return FileNotFoundError(
        f"no diffusers pipeline could be read from '{source}': {reason} {named}"
        "Give a folder written by save_pretrained, or a hub id that this machine can reach "
        "(download it first with: hf download <id>)."
    )


def _damaged_files(folder: Path) -> list[str]:
    """The files of a pipeline that are cut off, no JSON, or hold more than tensors."""
    damaged = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix == ".bin":
                torch.load(path, "meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (ValueError, OSError, SafetensorError, RuntimeError, pickle.UnpicklingError):
            damaged.append(path.relative_to(folder).as_posix())
    return damaged
