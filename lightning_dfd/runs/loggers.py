"""Loggers that may fail without ending a run: a tracking server that is gone, a disk that is full; and CSV logs that
a kill leaves whole."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dfd.files import replacing

CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
_FAILED: WeakSet[Logger] = WeakSet()  # those that were warned of
_GUARDED: WeakSet[type[Logger]] = WeakSet()  # classes that `guard` made


def guard(loggers: Sequence[Any]) -> None:
    """Make what these loggers raise one warning each, wherever they are called from, Lightning itself included.

    A logger becomes an instance of a subclass of its own class, so that `isinstance` says what it did.
    """
    for logger in loggers:
        if type(logger) not in _GUARDED:
            kind: Any = type(logger)
            logger.__class__ = _guarded(kind)


@contextmanager
def surviving(logger: Logger) -> Iterator[None]:
    """What this logger raises inside is warned of once and does not leave the block."""
    try:
        yield
    except Exception as error:  # whatever it is, training is worth more than its log
        if logger not in _FAILED:
            _FAILED.add(logger)
            name = type(logger).__name__
            rank_zero_warn(f"{name} failed ({type(error).__name__}: {error}); training goes on, its log has gaps")


@functools.cache
def _guarded(kind: type[Logger]) -> type[Logger]:
    methods = {name: getattr(kind, name) for name in CALLS}
    if issubclass(kind, CSVLogger):
        methods["save"] = _saving_whole(methods["save"])
    guarded = type(kind.__name__, (kind,), {name: _survivor(method) for name, method in methods.items()})
    _GUARDED.add(guarded)
    return guarded


def _survivor(method: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(method)
    def call(self: Logger, *args: Any, **kwargs: Any) -> None:
        with surviving(self):
            method(self, *args, **kwargs)

    return call


# ---- CSV ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a CSV file and its columns."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader), list(reader.fieldnames or ())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write a CSV file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, fieldnames=columns)
        table.writeheader()
        table.writerows(rows)


class _WholeWriter(ExperimentWriter):
    """Lightning's empties the file before it writes it anew with more columns; a kill then takes all rows with it."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        write_rows(path, read_rows(path)[0], fieldnames)


def _saving_whole(save: Callable[[CSVLogger], None]) -> Callable[[CSVLogger], None]:
    @functools.wraps(save)
    def call(logger: CSVLogger) -> None:
        if type(logger._experiment) is ExperimentWriter and "://" not in logger.log_dir:
            logger._experiment.__class__ = _WholeWriter
        save(logger)

    return call
