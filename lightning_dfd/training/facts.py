"""What a checkpoint says of its recipe, and what has to agree for a run to go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import VideoDataModule
from lightning_dfd.files import differing, digest
from lightning_dfd.objectives.terms import Term, joined
from lightning_dfd.training.optimizers import DROPPED, plain
from lightning_dfd.training.settings import RENAMED, SamplingSettings, StudentSettings

Facts = dict[str, dict[str, Any]]


def recipe_facts(
    backbone: Backbone,
    student: StudentSettings,
    sampling: SamplingSettings,
    terms: Sequence[Term],
    seed: int,
    exact: Mapping[str, Any],
    data: VideoDataModule | None,
) -> Facts:
    """What a checkpoint says of its recipe: `fixed` makes the run what it is; `exact` merely has to agree for a
    resumed run to be bit-equal. Other keys (rates, scales, lengths, logs) are the user's to change.

    Args:
        exact: further ones of these, by recipe key.
    """
    teacher = backbone.network_identity()
    dtype = teacher.pop("dtype")
    fixed: dict[str, Any] = {
        "model.teacher": f"{teacher['pipeline']} {digest(teacher)[:12]}",
        "model.student.input": student.input,
        "model.student.ema_decay": "null" if student.ema_decay is None else "a number",
        "model.sampling.steps": [float(step) for step in sampling.steps],
        "model.sampling.kind": sampling.kind,
        "the loss": " + ".join(sorted(_name_of(term) for term in terms)),
        "model.seed": seed,
    }
    fixed |= student_facts(student, backbone.lora_targets)
    exact = {**exact, "model.dtype": dtype, "model.quantization": str(backbone.loader.quantization)}
    if data is not None:
        fixed["data.frames, height, width"] = [data.size.frames, data.size.height, data.size.width]
        fixed["data.fps"] = data.fps
        fixed["data.seed"] = data.seed
        names = [clip.name for clip in data.clips]
        exact["data.batch_size"] = data.batch_size
        exact["clips"] = f"{len(names)} ({digest(names)[:12]})"
        exact["data.cache"] = "null" if data.cache is None else "a folder"
    return {"fixed": joined([fixed, *map(checked_facts, terms)]), "exact": exact}


def checked_facts(term: Term) -> dict[str, Any]:
    """A term's facts, as a checkpoint may hold them: it is read without running code.

    Raises:
        ValueError: a value is of a kind that it may not hold.
    """
    facts = {name: plain(value) for name, value in term.facts().items()}
    for name, value in facts.items():
        if value is DROPPED:
            kind = type(term.facts()[name]).__name__
            raise ValueError(
                f"facts() of {type(term).__qualname__} gives {name} as a {kind}; give text, numbers, null, or lists"
            )
    return facts


def _name_of(term: Term) -> str:
    """The recipe key that brings a term, with the class of one of the user's."""
    return term.key if term.key != Term.key else f"{term.key} {type(term).__qualname__}"


def student_facts(student: StudentSettings, own_targets: Sequence[str]) -> dict[str, Any]:
    """What makes a network of the student's weights; `own_targets` are the backbone's."""
    facts: dict[str, Any] = {"model.student.mode": student.mode}
    if student.mode == "full":
        return facts
    targets = list(student.targets or own_targets)
    alpha = student.alpha or student.rank
    return facts | {"model.student.rank": student.rank, "model.student.alpha": alpha, "model.student.targets": targets}


def refuse_other_recipe(own: Mapping[str, Mapping[str, Any]], given: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError where `recipe_facts` of a run and of the checkpoint to resume from differ in what is fixed;
    warn where the resumed run will merely not be bit-equal."""
    old = [value for value in given["fixed"].values() if value in tuple(RENAMED)]
    if old:
        raise ValueError(
            f"the checkpoint is of an earlier version: {old[0]} is called {RENAMED[old[0]]} now; begin a new run with "
            "its weights by model.init_from"
        )
    wrong = differing(own["fixed"], given["fixed"])
    if wrong:
        raise ValueError(
            f"the checkpoint is of another recipe: {'; '.join(wrong)}. Resume with the recipe that made it, or begin "
            "a new run with its weights by model.init_from"
        )
    inexact = differing(own["exact"], given["exact"])
    if inexact:
        rank_zero_warn(f"the resumed run will not equal the uninterrupted one bit by bit: {'; '.join(inexact)}")
