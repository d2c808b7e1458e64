"""Is the run healthy? Alarms of one line each, with what to do about them."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_dfd.callbacks.common import due, student_of
from lightning_dfd.training.module import DistillationModule

NORM = re.compile(r"train/(\w+)_grad_norm")  # of a role, or of a module that a term trains
WINDOW = 20  # readings that a rolling mean is over


class RunHealth(Callback):
    """Watches what the module and `VideoEvaluation` log, and warns in one line when something is wrong.

    Each alarm is logged as `health/<name>`, 1 while it lasts and 0 otherwise:

    * `not_distilled`: data forcing starts from the teacher itself, which the paper found not to converge in 1,400
      iterations (2606.18478).
    * `unpaired`: under data forcing the student's clips are hardly nearer to the real clips they are paired with
      than to other real clips, so eq. 7 of the paper does not hold.
    * `fake_score_behind`: the fake score's error has risen well above its lowest, so the gradient compares the
      student with what it was.
    * `gradient`: a gradient is not finite, or every update is clipped.
    * `diversity`, `saturation`: the student's share of the teacher's, as `VideoEvaluation` logs it, is out of range.

    Args:
        every: iterations between two readings.
        pairing: largest healthy ratio of the paired gap to that of other clips.
        fake_rise: largest healthy ratio of the fake loss to its lowest, rolling means of 20 readings.
        diversity: smallest healthy ratio of the student's diversity to the teacher's.
        saturation: healthy range of the ratio of the student's saturation to the teacher's.
        stop: whether an alarm ends the run, after its checkpoint.
    """

    def __init__(
        self,
        every: int = 10,
        pairing: float = 0.9,
        fake_rise: float = 3.0,
        diversity: float = 0.5,
        saturation: tuple[float, float] = (0.75, 1.25),
        stop: bool = False,
    ) -> None:
        self.every, self.pairing, self.fake_rise = every, pairing, fake_rise
        self.diversity, self.saturation, self.stop = diversity, saturation, stop
        self.alarms: dict[str, str] = {}  # those that last, by name
        self._recent: dict[str, deque[float]] = {}
        self._lowest_fake = math.inf
        self._done = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = student_of(pl_module)
        if not forces_data(module) or self._done >= 0:  # the latter in a resumed run
            return
        alarm = None
        if module.init_from is None and trainer.global_step == 0:
            alarm = (
                "data forcing starts from the teacher itself; distil first with the dmd2 recipe and set "
                "model.init_from to its checkpoint"
            )
        self._report(trainer, {"not_distilled": alarm})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not due(trainer, self.every, self._done):
            return
        self._done = trainer.global_step
        module = student_of(pl_module)
        readings = {name: float(value) for name, value in module.journal.latest.items()}
        readings |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        self._report(trainer, dict(self.check(module, readings)))

    @property
    def state_key(self) -> str:
        return self._generate_state_key(every=self.every, fake_rise=self.fake_rise, stop=self.stop)

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(values) for name, values in self._recent.items()}
        return {"alarms": self.alarms, "recent": recent, "lowest_fake": self._lowest_fake, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alarms = dict(state_dict["alarms"])
        self._recent = {name: deque(values, maxlen=WINDOW) for name, values in state_dict["recent"].items()}
        self._lowest_fake, self._done = state_dict["lowest_fake"], state_dict["done"]

    def check(self, module: DistillationModule, readings: Mapping[str, float]) -> Iterator[tuple[str, str | None]]:
        """Name and, if it is an alarm, text of all that can be told from these readings and those before."""
        yield "gradient", self._gradient_alarm(readings, module.gradient_clip)
        if "train/fake_loss" in readings:
            mean = self._rolling("fake", readings["train/fake_loss"])
            if mean is not None:
                self._lowest_fake = min(self._lowest_fake, mean)
                rise = mean / self._lowest_fake
                yield "fake_score_behind", too_high(
                    rise, self.fake_rise, "the fake score's error is {value:.1f} times its lowest",
                    "lower the student's learning rate, or raise the fake score's or model.dmd.student_update_freq",
                )  # fmt: skip
        if forces_data(module) and {"train/paired_gap", "train/unpaired_gap"} <= set(readings):
            ratio = self._rolling("pairing", readings["train/paired_gap"] / readings["train/unpaired_gap"])
            if ratio is not None:
                yield "unpaired", too_high(
                    ratio, self.pairing, "real clips are {value:.2f} as far from the student's clips paired with them "
                    "as from others", "set model.student.input: data, or model.data_forcing.nearest_of",
                )  # fmt: skip
        if "val/diversity_ratio" in readings:
            yield "diversity", too_low(
                readings["val/diversity_ratio"], self.diversity, "the student keeps {value:.2f} of the teacher's "
                "diversity", "lower model.dmd.guidance or the learning rate, or go on with data forcing",
            )  # fmt: skip
        if "val/saturation_ratio" in readings:
            ratio, (low, high) = readings["val/saturation_ratio"], self.saturation
            said, remedy = "the student's saturation is {value:.2f} of the teacher's", "lower model.dmd.guidance"
            yield "saturation", too_high(ratio, high, said, remedy) or too_low(ratio, low, said, "train longer")

    def _gradient_alarm(self, readings: Mapping[str, float], clip: float) -> str | None:
        norms = {NORM.fullmatch(name): value for name, value in readings.items()}
        for role, norm in ((found[1], value) for found, value in norms.items() if found):
            if not math.isfinite(norm):
                return f"the {role}'s gradient is {norm}: lower its learning rate, or use trainer.precision bf16-mixed"
            recent = self._recent.setdefault(role, deque(maxlen=WINDOW))
            recent.append(norm)
            if len(recent) == WINDOW and min(recent) > clip:
                return (
                    f"all of the {role}'s last {WINDOW} gradients were above model.gradient_clip={clip:g} (now "
                    f"{norm:.3g}): lower its learning rate, or raise the limit"
                )
        return None

    def _rolling(self, name: str, value: float) -> float | None:
        """The mean of the last readings of `name`; None until there are enough."""
        recent = self._recent.setdefault(name, deque(maxlen=WINDOW))
        recent.append(value)
        return sum(recent) / WINDOW if len(recent) == WINDOW else None

    def _report(self, trainer: Trainer, found: Mapping[str, str | None]) -> None:
        for name, text in found.items():
            if text is not None and name not in self.alarms:
                rank_zero_warn(f"run health, {name}, iteration {trainer.global_step}: {text}")
            if text is not None:
                self.alarms[name] = text
            else:
                self.alarms.pop(name, None)
        flags = {f"health/{name}": float(text is not None) for name, text in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(flags, step=trainer.global_step)
        if self.stop and self.alarms:
            trainer.should_stop = True


def forces_data(module: DistillationModule) -> bool:
    """Whether a term rests on pairs of generated and real clips."""
    return any(term.pairs_clips for term in module.terms)


def too_high(value: float, limit: float, said: str, remedy: str) -> str | None:
    return f"{said.format(value=value)} (healthy up to {limit:g}): {remedy}" if value > limit else None


def too_low(value: float, limit: float, said: str, remedy: str) -> str | None:
    return f"{said.format(value=value)} (healthy from {limit:g}): {remedy}" if value < limit else None
