"""Checkpoints of this package: what is trained, without the frozen teacher; written whole or not at all.

One is a file, or, where each process keeps its share of sharded weights, a folder: `checkpoint.ckpt` with everything
but tensors, and a folder of safetensors that it names.
"""

from __future__ import annotations

import glob
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.distributed.sharding import Like, read_tensors, write_tensors
from lightning_dfd.files import replacing

OURS = "lightning_dfd"  # the key under which a checkpoint holds what is this package's alone
FRAME_RATE = "Frames a second"  # the fact of a checkpoint that says at which rate its videos are to be played
SHARDS = "shards"  # and the one under which it names the files of a sharded checkpoint's tensors
STATE = "checkpoint.ckpt"  # of a sharded checkpoint: written last, so that until then it is the one before

# ---- reading --------------------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | Path, lazily: bool = False, like: Like | None = None, key: str = "ckpt_path"
) -> dict[str, Any]:
    """A checkpoint's content, on the CPU.

    Args:
        path: a file, or the folder of a sharded one.
        lazily: leave the tensors on the disk until they are used; those of a folder come without values.
        like: makes the tensors that those of a folder are read into, by names that begin with `state_dict/` or
            `optimizer_states/`; None for whole ones on the CPU.
        key: what names it in a recipe or on the command line, for errors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is cut short or damaged, or is not a checkpoint of this package.
    """
    path = Path(path)
    file = path / STATE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{key} is {str(path)!r}: {_what_is_there(path)}; {REMEDIES.get(key, REMEDY)}")
    if file.suffix == ".safetensors":
        raise ValueError(f"{key} is {str(path)!r}: {_what_weights(file)}; {REMEDIES.get(key, REMEDY)}")
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=lazily)
        ours = isinstance(content, dict) and {"state_dict", "global_step", OURS} <= set(content)
        if ours and SHARDS in content:
            device = "meta" if lazily else "cpu"
            _join(content, path, like or (lambda name, shape, dtype: torch.empty(shape, dtype=dtype, device=device)))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{key}: {path} is damaged, cut short or not a checkpoint ({why[:100]}); take another"
        ) from error
    if not ours:
        raise ValueError(f"{key}: {path} is not a checkpoint of this package; take one that `lightning fit` wrote")
    return content


REMEDY = "give a checkpoint that `lightning fit` wrote, or last for the newest of the recipe's run"
REMEDIES = {
    "model.init_from": "give a checkpoint that `lightning fit` wrote (data forcing starts from a DMD2 student, so run "
    "the dmd2 recipe first), or set model.init_from: null"
}


def _what_is_there(path: Path) -> str:
    """In place of a checkpoint."""
    if not path.is_dir():
        return "there is no such file or folder"
    if (path / "model_index.json").is_file():
        return "that is a diffusers pipeline, and no checkpoint of a run"
    near = (*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt"))
    inside = sorted(found.relative_to(path).as_posix() for found in near)
    last = next((name for name in inside if Path(name).name == "last.ckpt"), inside[0] if inside else None)
    if last is None and any(path.glob("*.safetensors")):
        return "that is a folder of weights, an exported LoRA or network, and no checkpoint of a run"
    return "that is a folder without checkpoints" if last is None else f"that is a folder; it holds {last}"


def _what_weights(file: Path) -> str:
    """A safetensors file."""
    beside = file.with_suffix(".ckpt")
    if beside.exists():
        return f"that is the copy of the weights alone; the checkpoint is {beside.name} beside it"
    return "those are weights alone, an exported LoRA or network, and no checkpoint of a run"


def only_weights(name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    """For `read_checkpoint`: of a folder, what is trained but not the optimizers' moments."""
    return torch.empty(shape, dtype=dtype) if name.startswith("state_dict/") else None


def newest_whole(paths: Iterable[Path]) -> Path | None:
    """The checkpoint that was written last, of those that can be read; None if there is none. The others that are
    newer are warned of."""
    written = {path: path / STATE if path.is_dir() else path for path in paths}
    there = [path for path, file in written.items() if file.is_file()]
    for path in sorted(there, key=lambda path: written[path].stat().st_mtime_ns, reverse=True):
        try:
            read_checkpoint(path, lazily=True)
        except ValueError as error:
            rank_zero_warn(f"passed over: {error}")
        else:
            return path
    return None


def strip_prefix(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


# ---- does it fit? ---------------------------------------------------------------------------------------------


def refuse_misfit(own: Set[str], given: Set[str]) -> None:
    """Raise ValueError unless a checkpoint to resume from holds exactly the tensors that this run trains."""
    if own != given:
        raise ValueError(
            f"the checkpoint does not fit this model: {len(own - given)} tensors are missing and "
            f"{len(given - own)} unexpected, as {min(own ^ given)!r}. Use the student.mode, rank, targets and "
            "ema_decay, and the terms of the loss (model.gan, model.terms), with which it was made."
        )


def take_over(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """Load another module's weights, if they are of the same names and shapes; says whether they are."""
    fits = {name: value.shape for name, value in module.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    if fits:
        module.load_state_dict(dict(weights))
    return fits


def rewind(loops: Mapping[str, Any], batches: int) -> None:
    """Take the batches of an unfinished iteration out of a checkpoint's counters: a resumed run does them anew."""
    fit = loops["fit_loop"]
    for counts in (fit["epoch_loop.batch_progress"]["total"], fit["epoch_loop.batch_progress"]["current"]):
        counts.update({name: count - batches for name, count in counts.items()})
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= batches


# ---- writing --------------------------------------------------------------------------------------------------

UNWRITTEN = (OSError, RuntimeError, SafetensorError)  # torch and safetensors wrap the system's errors


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
        if not self._save(write_checkpoint, checkpoint, Path(path)):
            return
        try:
            write_copy(checkpoint, copy_of(Path(path)))
        except UNWRITTEN as error:
            rank_zero_warn(f"{path} is written, but not the copy of its weights beside it ({_cause(error)})")

    def save_shards(self, checkpoint: dict[str, Any], path: Path) -> None:
        """As `save_checkpoint`, each process its share of the tensors; all processes have to take part."""
        self._save(write_shards, checkpoint, path)

    def _save(self, write: Callable[[Mapping[str, Any], Path], None], checkpoint: dict[str, Any], path: Path) -> bool:
        """Whether it could be written."""
        try:
            write(checkpoint, path)
        except UNWRITTEN as error:
            self.failed.add(int(checkpoint["global_step"]))
            rank_zero_warn(
                f"THE CHECKPOINT {path} COULD NOT BE WRITTEN ({_cause(error)}). Training goes on; the checkpoints "
                f"before it are kept. Saves failed in a row: {len(self.failed)}. Is the disk full?"
            )
            return False
        self.failed.clear()
        for spared in self._spared - {path}:
            self.remove_checkpoint(spared)
        self._spared.clear()
        return True

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """As `read_checkpoint`; never runs code from a checkpoint, whatever `weights_only` says."""
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(path)

    def load_lazily(self, path: Path, like: Like) -> dict[str, Any]:
        """As `load_checkpoint`, but tensors stay on the disk, and those of shards are read into what `like` makes."""
        return read_checkpoint(path, lazily=True, like=like)

    def remove_checkpoint(self, path: Any) -> None:
        if self.failed:
            self._spared.add(Path(path))
            return
        super().remove_checkpoint(path)
        copy_of(Path(path)).unlink(missing_ok=True)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, file or folder, and the copy of its weights."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    copy_of(path).unlink(missing_ok=True)


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write `path` so that a kill at any moment leaves the old file or the new; the old one's copy goes with it."""
    _sweep(path)
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(dict(checkpoint), file)
        flush_to_disk(temporary)
        if path.is_dir():  # a sharded one of that name
            _set_aside(path)
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


def write_shards(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write the folder `path` so that a kill at any moment leaves the old checkpoint or the new; on all processes.

    The tensors go to a new folder within it. It counts as soon as the file that names it is there.
    """
    rest, tensors = _apart(checkpoint)
    folder = path / _from_first(lambda: _new_folder(path, f"iteration_{checkpoint['global_step']}"))
    write_tensors(tensors, folder)

    def finish() -> str:
        files = {file.name: file.stat().st_size for file in folder.iterdir()}
        write_checkpoint(rest | {SHARDS: {"folder": folder.name, "files": files}}, path / STATE)
        for other in path.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)
        return ""

    _from_first(finish)


def _from_first(function: Callable[[], str]) -> str:
    """What `function` returns on the first process, on all; raises OSError on all where it does there."""
    ranks = Ranks.current()
    answer: str | OSError = ""
    if ranks.is_first:
        try:
            answer = function()
        except UNWRITTEN as error:
            answer = OSError(_cause(error))
    answer = ranks.broadcast(answer)
    if isinstance(answer, OSError):
        raise answer
    return answer


def _new_folder(path: Path, name: str) -> str:
    """Make a new folder in `path`; returns its name."""
    if path.is_file():  # a checkpoint that is not sharded
        _set_aside(path)
    path.mkdir(parents=True, exist_ok=True)
    names = (name, *(f"{name}_{count}" for count in range(1, 1000)))
    free = next(name for name in names if not (path / name).exists())
    (path / free).mkdir()
    return free


def _set_aside(path: Path) -> None:
    """Rename a checkpoint that is in the way of one of the other kind, so that it is there until that one is."""
    aside = path.with_name(f"{path.stem}-before{path.suffix}")
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.unlink(missing_ok=True)
    path.rename(aside)


def _apart(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint without its weights and moments, and these by names that say where they belong."""
    tensors = {f"state_dict/{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    optimizers = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        others: dict[int, dict[str, Any]] = {}
        for index, values in optimizer["state"].items():
            others[index] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            for key in values.keys() - others[index].keys():
                tensors[f"optimizer_states/{number}/{index}/{key}"] = values[key]
        optimizers.append(optimizer | {"state": others})
    given = {"optimizer_states": optimizers} if "optimizer_states" in checkpoint else {}
    return {**checkpoint, "state_dict": {}, **given}, tensors


def _join(checkpoint: dict[str, Any], path: Path, like: Like) -> None:
    """Undo `_apart`, with tensors from the files that the checkpoint names."""
    shards = checkpoint.pop(SHARDS)
    folder = path / Path(shards["folder"]).name
    for name, size in shards["files"].items():
        file = folder / Path(name).name
        if not file.is_file() or file.stat().st_size != size:
            raise OSError(f"{folder.name}/{file.name} is missing or not of {size} bytes")
    for name, tensor in read_tensors(folder, like).items():
        kind, _, place = name.partition("/")
        if kind == "state_dict":
            checkpoint["state_dict"][place] = tensor
        else:
            number, index, key = place.split("/", 2)
            checkpoint["optimizer_states"][int(number)]["state"][int(index)][key] = tensor


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
