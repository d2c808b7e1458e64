"""What a checkpoint holds besides Lightning's own, whether it fits, and weights taken from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import VideoDataModule
from lightning_dfd.files import differing
from lightning_dfd.networks.roles import Roles
from lightning_dfd.runs.checkpoints import (
    FRAME_RATE,
    OURS,
    only_weights,
    read_checkpoint,
    refuse_misfit,
    strip_prefix,
    take_over,
)
from lightning_dfd.runs.logs import log_places, log_runs
from lightning_dfd.training.facts import refuse_other_recipe, student_facts
from lightning_dfd.training.settings import StudentSettings

NETWORK, TERMS = "roles.", "term_modules."  # where the module keeps what a checkpoint holds


def owned_keys(network: Roles, terms: nn.ModuleDict) -> set[str]:
    """The names, in the module's state dict, of what a checkpoint holds: all that is trained, but not the teacher."""
    return {f"{NETWORK}{name}" for name in network.owned()} | {f"{TERMS}{name}" for name in terms.state_dict()}


def facts_of(data: VideoDataModule | None, iteration: int, init_from: str | None) -> dict[str, str]:
    """What an export and its model card say of a checkpoint's making."""
    rate = {} if data is None else {FRAME_RATE: f"{data.playing_rate:g}"}
    return {
        "Data": "not stated" if data is None else data.summary,
        **rate,
        "Iterations": str(iteration),
        "Started from": "a distilled student" if init_from else "the teacher",
    }


def places_of(loggers: Sequence[Any]) -> dict[str, Any]:
    """Where a resumed run's logs go on."""
    return {"logs": log_places(loggers), "runs": log_runs(loggers)}


def refuse_checkpoint(
    checkpoint: Mapping[str, Any], owned: set[str], recipe: Mapping[str, Mapping[str, Any]] | None
) -> None:
    """Raise ValueError where a checkpoint cannot be gone on from, or does not fit.

    Args:
        owned: as `owned_keys`.
        recipe: `recipe_facts` of the run that is to go on; None where the checkpoint is only measured.
    """
    ours = checkpoint[OURS]
    if recipe is not None and "recipe" in ours:
        refuse_other_recipe(recipe, ours["recipe"])
    refuse_misfit(owned, set(checkpoint["state_dict"]))
    if recipe is not None and "lr_schedulers" not in checkpoint:
        raise ValueError(
            "the checkpoint holds weights alone (save_weights_only), so no run can go on from it; begin a new one with "
            "them by model.init_from"
        )


def open_checkpoint(path: str | Path, key: str, student: StudentSettings, backbone: Backbone) -> dict[str, Any]:
    """A checkpoint whose weights fit this recipe, as far as it says; they are left on the disk.

    Args:
        path: of the checkpoint.
        key: what names it in a recipe or on the command line, for errors.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is none, or of another teacher or another kind of student.
    """
    checkpoint = read_checkpoint(path, lazily=True, like=only_weights, key=key)
    given = checkpoint[OURS].get("recipe", {}).get("fixed", {})
    own = student_facts(student, backbone.lora_targets)
    if given.get("model.student.mode") != student.mode:  # the others are then beside the point
        own = {"model.student.mode": student.mode}
    wrong = differing(own, given)
    pipeline = str(given.get("model.teacher", backbone.pipeline_name)).split(" ")[0]
    if pipeline != backbone.pipeline_name:
        wrong = [f"the teacher is a {pipeline} there and a {backbone.pipeline_name} here"]
    if wrong:
        raise ValueError(
            f"{key} {path} holds another student: {'; '.join(wrong)}. Give the recipe and the options with which it "
            "was trained, or the config.yaml beside the checkpoint"
        )
    return checkpoint


def take_weights(checkpoint: Mapping[str, Any], path: str | Path, network: Roles, terms: nn.ModuleDict) -> None:
    """Give the roles, and the modules of terms that both sides have, a checkpoint's weights.

    Raises:
        ValueError: the roles' do not fit.
    """
    network.load_owned(strip_prefix(NETWORK, checkpoint["state_dict"]))
    for name, module in terms.items():
        given = strip_prefix(f"{TERMS}{name}.", checkpoint["state_dict"])
        if given and not take_over(module, given):
            rank_zero_warn(f"{path} has a {name} of other shapes; this run begins with a new one")
