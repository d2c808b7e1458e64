"""Loggers that may fail without ending a run: a tracking server that is gone, a disk that is full."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
_FAILED: WeakSet[Logger] = WeakSet()  # those that were warned of
_GUARDED: WeakSet[type[Logger]] = WeakSet()  # classes that `guard` made


def guard(loggers: Sequence[Logger]) -> None:
    """Make what these loggers raise one warning each, wherever they are called from, Lightning itself included.

    A logger becomes an instance of a subclass of its own class, so that `isinstance` says what it did.
    """
    for logger in loggers:
        if type(logger) not in _GUARDED:
            logger.__class__ = _guarded(type(logger))


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
    guarded = type(kind.__name__, (kind,), {name: _survivor(getattr(kind, name)) for name in CALLS})
    _GUARDED.add(guarded)
    return guarded


def _survivor(method: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(method)
    def call(self: Logger, *args: Any, **kwargs: Any) -> None:
        with surviving(self):
            method(self, *args, **kwargs)

    return call
