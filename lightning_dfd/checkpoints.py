"""Reading checkpoints of this package: what is trained, without the frozen teacher."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is cut short or damaged, or is no checkpoint of this package.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}; a data-forcing recipe starts from a DMD2 student "
            "(run the dmd2 recipe first), or set model.init_from: null"
        )
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, cut short or no checkpoint ({why[:100]}); take another") from error
    if not isinstance(content, dict) or not {"state_dict", "lightning_dfd"} <= set(content):
        raise ValueError(f"{path} is no checkpoint of this package; take one that `lightning fit` wrote")
    return content


def refuse_misfit(own: Set[str], given: Set[str]) -> None:
    """Raise ValueError unless a checkpoint to resume from holds exactly the tensors that this run trains."""
    if own != given:
        raise ValueError(
            f"the checkpoint does not fit this model: {len(own - given)} tensors are missing and "
            f"{len(given - own)} unexpected, as {min(own ^ given)!r}. Use the student.mode, rank, targets and "
            "ema_decay, and the gan.weight and gan.blocks, with which it was made."
        )


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
