"""The examples in docstrings run and give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

from tests.test_layers import MODULES

SHOWN = sorted(name for name, path in MODULES.items() if ">>>" in path.read_text(encoding="utf-8"))


def test_there_are_examples() -> None:
    assert "lightning_dfd.objectives.terms.base" in SHOWN


@pytest.mark.parametrize("name", SHOWN)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
