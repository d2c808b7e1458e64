"""Data forcing: in part of the updates the teacher scores a real clip (2606.18478)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from lightning_dfd.objectives.dfd import forced_samples, nearest_real, teacher_data, teacher_guidance
from lightning_dfd.objectives.terms.base import Step, TeacherView, Term, TermRecipe, require


@dataclass(frozen=True)
class DataForcingSettings:
    """Data forcing (2606.18478). All but `probability` are levers beyond the paper, whose behaviour is the default.

    Args:
        probability: share of student updates in which the teacher scores the real clip; 0 is DMD2, the paper
            takes 0.5.
        guidance: of the teacher where it is forced; null for dmd.guidance.
        time_range: [low, high] of the score times that are forced, of each sample; null for all.
        nearest_of: pair with the nearest of so many real clips of the caption; above 1 it needs a cache.
        shown: what the teacher is shown where forced; `gen` is a control that uses no real clip.
    """

    probability: float = 0.0
    guidance: float | None = None
    time_range: list[float] | None = None
    nearest_of: int = 1
    shown: Literal["real", "gen"] = "real"

    def __post_init__(self) -> None:
        key = "model.data_forcing"
        require(0 <= self.probability <= 1, f"{key}.probability", self.probability, "between 0 and 1")
        require(self.guidance is None or self.guidance >= 1, f"{key}.guidance", self.guidance, "at least 1, or null")
        times = self.time_range
        inside = times is None or (len(times) == 2 and 0 <= times[0] < times[1] <= 1)
        require(inside, f"{key}.time_range", times, "[low, high] with 0 <= low < high <= 1, or null")
        require(self.nearest_of >= 1, f"{key}.nearest_of", self.nearest_of, "at least 1, the batch's own clip")
        paired = self.nearest_of == 1 or self.shown == "real"
        require(paired, f"{key}.nearest_of", self.nearest_of, "1 with shown: gen, where no real clip is shown")


class DataForcing(Term):
    """Shows the teacher the paired real clip, in a drawn share of the student's updates (2606.18478, eqs. 6 and 9)."""

    key: ClassVar[str] = "model.data_forcing"

    def __init__(self, settings: DataForcingSettings = DataForcingSettings(), rehearsed: bool = False) -> None:
        self.settings, self.rehearsed = settings, rehearsed
        self.pairs_clips = settings.probability > 0 and settings.shown == "real"

    def view(self, step: Step, view: TeacherView) -> TeacherView:
        settings = self.settings
        if self.rehearsed:  # forced or not, the teacher sees one batch; only its guidance costs
            forced_guidance = settings.guidance if settings.probability else None
            return replace(view, guidance=max(float(view.guidance), forced_guidance or 1.0))
        forced = forced_samples(self.drawn(step), step.t, settings.time_range)
        real = view.real
        if settings.nearest_of > 1 and settings.probability > 0:
            if step.others is None:
                raise ValueError(f"{self.key}.nearest_of is {settings.nearest_of}, and the step knows no other clips")
            real = nearest_real(step.gen, real, step.others(settings.nearest_of, step.draws.pairs), settings.nearest_of)
        shown = teacher_data(step.gen, real if settings.shown == "real" else step.gen, forced)
        return TeacherView(shown, teacher_guidance(forced, float(view.guidance), settings.guidance), real)

    def drawn(self, step: Step) -> bool:
        """Whether this update is forced: one draw, which realises the mixed update of eqs. 9 and 10."""
        return step.coin(self.key, self.settings.probability)

    def counted(self, step: Step) -> dict[str, int]:
        return {"forced_steps": int(self.drawn(step))}

    def summary(self, counts: Mapping[str, int]) -> dict[str, float]:
        return {"train/forced_share": counts.get("forced_steps", 0) / max(1, counts["student_steps"])}

    def check(self, recipe: TermRecipe) -> None:
        key, count = f"{self.key}.nearest_of", self.settings.nearest_of
        if count == 1 or self.settings.probability == 0 or recipe.cached is None:
            return
        cache = "1 without a cache, from which other clips' latents come; run lightning cache and set data.cache"
        require(recipe.cached, key, count, cache)
        image = "1 with an image-to-video teacher, as clips of one caption begin with different images"
        require(not recipe.takes_image, key, count, image)
        require(recipe.sizes == 1, key, count, "1 with data.buckets")

    def facts(self) -> dict[str, str]:
        return {f"{self.key}.probability": "above 0" if self.settings.probability else "0"}

    def card(self) -> dict[str, str]:
        settings = self.settings
        said = f"probability {settings.probability:g}"
        if settings.guidance is not None:
            said += f", guidance {settings.guidance:g} where forced"
        return {"Data forcing": said + (", without real clips (a control)" if settings.shown == "gen" else "")}

    def heaviest(self) -> Term:
        return DataForcing(self.settings, rehearsed=True)
