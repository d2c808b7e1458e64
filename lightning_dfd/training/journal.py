"""What training logs and counts, by iteration.

Lightning's own logging counts batches, and would show one role for ever where its interval is a multiple of the update
ratio.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lightning_dfd.objectives.terms import Step, Term

SPEED = "train/samples_per_s"
SHOWN = ("train/student_loss", "train/fake_loss", "train/paired_gap")  # on the progress bar


class Journal:
    """The last value of everything that training logs, and counts that a checkpoint keeps.

    Attributes:
        counts: by name; those of terms beside `student_steps` and `skipped_steps`.
    """

    def __init__(self) -> None:
        self.counts = {"student_steps": 0, "skipped_steps": 0}
        self._latest: dict[str, Tensor | float] = {}
        self._clock: float | None = None

    @property
    def latest(self) -> Mapping[str, Tensor | float]:
        """The last value of each, by its name in the logs."""
        return MappingProxyType(self._latest)

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        self._latest |= values

    def count_update(self, terms: Sequence[Term], step: Step) -> None:
        """Count an update of the student, with what terms count of it."""
        self.counts["student_steps"] += 1
        for term in terms:
            for name, number in term.counted(step).items():
                self.counts[name] = self.counts.get(name, 0) + number
        for term in terms:
            self._latest |= term.summary(self.counts)

    def count_skipped(self, skipped: bool) -> None:
        """Count an update that was left out, if it was."""
        self.counts["skipped_steps"] += skipped
        self._latest["train/skipped_steps"] = self.counts["skipped_steps"]

    def clock(self, samples: int) -> None:
        """Note the speed: `samples` since the last call."""
        now = time.perf_counter()
        if self._clock is not None:
            self._latest[SPEED] = samples / (now - self._clock)
        self._clock = now

    def numbers(self) -> dict[str, float]:
        """`latest` as plain numbers, which waits for the device."""
        return {name: float(value) for name, value in self._latest.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        latest = {name: value for name, value in self.numbers().items() if name != SPEED}
        return {"counts": dict(self.counts), "latest": latest}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of a checkpoint."""
        self.counts |= state["counts"]
        self._latest = dict(state.get("latest", {}))
