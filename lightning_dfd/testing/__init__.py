"""The contract of a backbone, checked on a tiny pipeline of its family: layouts, replay, memory, roles, training,
exports.

In the tests of a user's backbone it is one line:

    def test_contract(tmp_path): check_backbone(Case(str(tiny_folder), backbone="my_package.MyBackbone"), tmp_path)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from lightning_dfd.testing import checks, memory, trained
from lightning_dfd.testing.case import Case, require

Check = Callable[[Case, Path], float | None]
CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        checks.layout, checks.decode, checks.prompts, checks.x0, checks.replay, checks.held_out, checks.image,
        checks.cache, memory.quantization, memory.offload, trained.roles_lora, trained.roles_full,
        trained.checkpointing, trained.train_lora, trained.train_full, trained.gan, trained.export_pipeline,
        trained.export_lora, trained.export_full, trained.half_precision,
    )
}  # fmt: skip


def run_check(name: str, case: Case, folder: Path) -> float | None:
    """One check; what the case refuses has to end in the ValueError that it names, and answers None.

    Raises:
        AssertionError: it failed, or did not refuse.
    """
    if name not in case.refuses:
        return CHECKS[name](case, folder)
    expected = case.refuses[name]
    try:
        CHECKS[name](case, folder)
    except ValueError as error:
        require(re.search(expected, str(error)), f"{name} has to be refused with {expected!r}, and it says: {error}")
        return None
    raise AssertionError(f"{name} is listed among what this family refuses, and was not refused")


def check_backbone(case: Case, folder: str | Path, progress: bool = False) -> dict[str, float | None]:
    """Run every check; returns the errors measured, by the name of the check.

    Args:
        case: the backbone and its tiny pipeline.
        folder: an empty one, for caches, checkpoints and exports.
        progress: show a progress bar.

    Raises:
        AssertionError: checks failed, by name, with what they are for.
    """
    found: dict[str, float | None] = {}
    failed = []
    for name in tqdm(CHECKS, desc="contract", disable=not progress):
        place = Path(folder) / name
        place.mkdir(parents=True)
        try:
            found[name] = run_check(name, case, place)
        except Exception as error:
            failed.append(
                f"{name}: {error} ({type(error).__name__})\n    {' '.join((CHECKS[name].__doc__ or '').split())}"
            )
    if failed:
        raise AssertionError(f"{len(failed)} of {len(CHECKS)} checks failed\n" + "\n".join(failed))
    return found


__all__ = ["CHECKS", "Case", "check_backbone", "run_check"]
