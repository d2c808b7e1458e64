"""Checkpoints of this package: what is trained, without the frozen teacher; written whole or not at all."""

from __future__ import annotations

import glob
import os
import pickle
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_dfd.data.files import replacing

OURS = "lightning_dfd"  # the key under which a checkpoint holds what is this package's alone

# ---- reading --------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. `lazily` leaves the tensors on the disk until they are used.

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
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is damaged, cut short or no checkpoint ({why[:100]}); take another") from error
    if not isinstance(content, dict) or not {"state_dict", "global_step", OURS} <= set(content):
        raise ValueError(f"{path} is no checkpoint of this package; take one that `lightning fit` wrote")
    return content


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The checkpoint that was written last, of those that can be read; None if there is none. The others that are
    newer are warned of."""
    files = [path for path in paths if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            read_checkpoint(path, lazily=True)
        except ValueError as error:
            rank_zero_warn(f"passed over: {error}")
        else:
            return path
    return None


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# ---- does it fit? ---------------------------------------------------------------------------------------------


def refuse_misfit(own: Set[str], given: Set[str]) -> None:
    """Raise ValueError unless a checkpoint to resume from holds exactly the tensors that this run trains."""
    if own != given:
        raise ValueError(
            f"the checkpoint does not fit this model: {len(own - given)} tensors are missing and "
            f"{len(given - own)} unexpected, as {min(own ^ given)!r}. Use the student.mode, rank, targets and "
            "ema_decay, and the gan.weight and gan.blocks, with which it was made."
        )


def differing(own: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """`key is <given> there and <own> here` for every key that both know and that differs."""
    return [
        f"{key} is {given[key]} there and {own[key]} here" for key in own if key in given and own[key] != given[key]
    ]


# ---- writing --------------------------------------------------------------------------------------------------


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and a copy of its weights as safetensors beside it.

    A checkpoint is written to a temporary file in its folder, flushed to the disk and only then given its name, so
    that a kill or a full disk leaves the one before. A save that fails is warned of and does not end the run; while
    the latest save has failed, nothing is removed, so that there is always one to go back to. The copy is of the
    same iteration as the checkpoint or is not there. Paths with a protocol (`s3://...`) are left to Lightning.

    Attributes:
        failed: iterations whose checkpoints could not be written, since the last that could.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed: set[int] = set()
        self._spared: set[Path] = set()  # whose removal was put off

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_checkpoint(checkpoint, Path(path))
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap the system's errors
            self.failed.add(int(checkpoint["global_step"]))
            rank_zero_warn(
                f"THE CHECKPOINT {path} COULD NOT BE WRITTEN ({_cause(error)}). Training goes on; the checkpoints "
                f"before it are kept. Saves failed in a row: {len(self.failed)}. Is the disk full?"
            )
            return
        try:
            write_copy(checkpoint, copy_of(Path(path)))
        except (OSError, RuntimeError, SafetensorError) as error:
            rank_zero_warn(f"{path} is written, but not the copy of its weights beside it ({_cause(error)})")
        self.failed.clear()
        for spared in self._spared - {Path(path)}:
            self.remove_checkpoint(spared)
        self._spared.clear()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """As `read_checkpoint`; never runs code from a checkpoint, whatever `weights_only` says."""
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        if self.failed:
            self._spared.add(Path(path))
            return
        super().remove_checkpoint(path)
        copy_of(Path(path)).unlink(missing_ok=True)


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write `path` so that a kill at any moment leaves the old file or the new; the old one's copy goes with it."""
    _sweep(path)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(dict(checkpoint), file)
        flush_to_disk(temporary)
        copy_of(path).unlink(missing_ok=True)  # so that it is never another checkpoint's
    with suppress(OSError):  # not every file system can do this for folders
        flush_to_disk(path.parent)


def write_copy(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write the weights alone, as safetensors with their iteration in the header, whole or not at all."""
    _sweep(path)
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint["state_dict"].items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"iteration": str(checkpoint["global_step"])})
        flush_to_disk(temporary)


def _sweep(path: Path) -> None:
    """Remove what a process left that was killed while it wrote `path`, which has one writer at a time."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def copy_of(path: Path) -> Path:
    """Where the safetensors beside a checkpoint are."""
    return path.with_name(path.name.removesuffix(".ckpt") + ".safetensors")


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: BaseException) -> str:
    """The system's own words where they are known, else the first line of the error's."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(cause or str(error).splitlines()[0])
