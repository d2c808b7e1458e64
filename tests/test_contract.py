"""Every family keeps the contract of lightning_dfd.testing, and the contract notices when one does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dfd.testing import CHECKS, Case
from lightning_dfd.tiny import TINY


@pytest.fixture(scope="session")
def cases(tiny: dict[str, Path]) -> dict[str, Case]:
    return {
        name: Case(str(tiny[name]), None, this.size, this.steps, this.kinds, this.text_length)
        for name, this in TINY.items()
    }


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", TINY)
def test_contract(cases: dict[str, Case], family: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](cases[family], tmp_path)
