"""A room of the package imports only from rooms below it, function bodies included."""

from __future__ import annotations

import ast
from pathlib import Path

import lightning_dfd

PACKAGE = Path(lightning_dfd.__file__).parent
GROUND_FIRST = [
    "types",
    "noise",
    "draws",
    "objectives",
    "sampler",
    "offload",
    "sharding",
    "quantization",
    "backbones",
    "roles",
    "discriminator",
    "data",
    "features",
    "metrics",
    "settings",
    "optimizers",
    "loggers",
    "checkpoints",
    "resume",
    "strategies",
    "options",
    "module",
    "plan",
    "pictures",
    "pages",
    "generation",
    "callbacks",
    "export",
    "trainer",
    "evaluation",
    "cli",
    "tiny",
    "testing",
    "toy",
]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "lightning_dfd" else [base]
        rooms |= {name.split(".")[1] for name in names if name.startswith("lightning_dfd.")}
    return rooms


def test_every_room_has_its_place() -> None:
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(GROUND_FIRST)


def test_imports_point_down() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        below = GROUND_FIRST[: GROUND_FIRST.index(room) + 1]
        wrong += [f"{path.relative_to(PACKAGE)} imports {other}" for other in imported_rooms(path) - set(below)]
    assert not wrong


def test_no_internal_import_is_deferred() -> None:
    deferred = []
    for path in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                deferred += [
                    f"{path.name}:{node.lineno}"
                    for node in ast.walk(function)
                    if isinstance(node, (ast.Import, ast.ImportFrom))
                ]
    assert not deferred
