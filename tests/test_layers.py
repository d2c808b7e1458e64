"""The rooms of the package: a line imports only from rooms above it in ROOMS, and no two files import one another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import lightning_dfd

PACKAGE = Path(lightning_dfd.__file__).parent
ROOMS = [
    "types files",
    "diffusion",
    "objectives",
    "distributed",
    "networks",
    "backbones",
    "data",
    "runs",
    "evaluation",
    "training",
    "callbacks export plan",
    "cli",
    "testing",
    "toy",
]
FRONT = ("__init__", "__main__", "settings", "features", "metrics", "tiny")  # addresses for users alone
LATE = {  # files that import where they use it, so that commands start quickly: what waits there
    "lightning_dfd.cli.main": "torch, for --help, --version and a misspelt command",
}


def modules() -> dict[str, Path]:
    """Every file of the package by its import path."""
    dotted = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in dotted.items()}


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[str]:
    """The files of the package that the code below `tree` imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from [inner] if inner in MODULES else [str(node.module)] if node.module in MODULES else []


GRAPH = {name: set(imports(ast.parse(path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} == {*" ".join(ROOMS).split(), *FRONT}


def test_imports_point_up_the_list() -> None:
    place = {name: number for number, line in enumerate(ROOMS) for name in line.split()}
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room(name) not in FRONT and room(name) != room(other)
        and (room(other) in FRONT or place[room(other)] >= place[room(name)])
    ]  # fmt: skip
    assert not wrong


def test_no_files_import_one_another() -> None:
    """A package's `__init__` gathers its files, so none of these may import it."""
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the circle
    assert len(order) == len(MODULES)


def test_imports_are_deferred_only_for_a_quick_start() -> None:
    deferred = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name not in LATE
    ]
    assert not deferred


def test_the_picture_shows_every_room_in_order() -> None:
    picture = (PACKAGE.parent / "docs" / "rooms.svg").read_text(encoding="utf-8")
    assert re.findall(r'class="n"[^>]*>(\w+)<', picture) == " ".join(ROOMS).split()


def test_old_addresses_lead_to_the_same_objects() -> None:
    """What README and docs name."""
    same = {
        "Backbone": "backbones",
        "DistillationModule": "training.module",
        "DistillationTrainer": "cli.trainer",
        "FSDP2Strategy": "distributed.strategy",
        "VideoDataModule": "data",
        "settings.DMDSettings": "training.settings",
        "settings.SamplingSettings": "training.settings",
        "features.FeatureExtractor": "evaluation.features",
        "metrics.VideoSuite": "evaluation.metrics",
        "metrics.functional.frechet_distance": "evaluation.metrics.functional",
        "tiny.save_tiny": "testing.tiny",
        "tiny.parts.text_encoder": "testing.tiny.parts",
        "callbacks.VideoEvaluation": "callbacks.evaluation",
        "testing.check_backbone": "testing",
    }
    for address, home in same.items():
        module, _, name = f"lightning_dfd.{address}".rpartition(".")
        moved = getattr(import_module(f"lightning_dfd.{home}"), name)
        assert getattr(import_module(module), name) is moved, address
