"""Statistics of reference data, computed once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_dfd.files import ShardMember, digest, replacing

ENDS = 1 << 16  # bytes


def cached_statistics(
    folder: str | Path, key: Mapping[str, str], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `compute` returns, from a file of `folder` if it was computed for the same key before.

    For a single process; several that compute together use `read_statistics` and `write_statistics` in one of them.

    Args:
        folder: where the files lie; created where missing.
        key: everything that decides the result: `data_fingerprint` of the data, the extractor's name and
            fingerprint, and the protocol (frames, size, rate, number of clips).
        compute: gives named tensors. Their dtypes are kept.

    Returns:
        The tensors on the CPU, the same whether computed or read.
    """
    found = read_statistics(folder, key)
    if found is None:
        found = {name: value.detach().cpu() for name, value in compute().items()}
        write_statistics(folder, key, found)
    return found


def read_statistics(folder: str | Path, key: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The tensors of a key, on the CPU; None if they must be computed.

    A file that is damaged, or of another key, counts as missing, with a warning that names it.
    """
    path, text = _path(folder, key), _text(key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            other = (file.metadata() or {}).get("key")
            if other == text:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            reason = f"it was computed for {other}"
    except SafetensorError as error:
        reason = f"it is damaged: {error}"
    warnings.warn(f"{path} cannot be used, its statistics are computed again ({reason})", stacklevel=2)
    return None


def write_statistics(folder: str | Path, key: Mapping[str, str], statistics: Mapping[str, Tensor]) -> None:
    """Keep tensors for `read_statistics` with the same key. The file appears only when it is complete."""
    # safetensors refuses tensors that share memory
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in statistics.items()}
    with replacing(_path(folder, key)) as temporary:
        save_file(whole, temporary, metadata={"key": _text(key)})


def data_fingerprint(paths: Iterable[str | Path | ShardMember]) -> str:
    """16 hex digits for a set of files, in any order: from their names, sizes, and first and last 64 KiB.

    Not from times, which differ between copies of one data set: the ranks of a run on several machines would
    disagree on what is cached. Not from all bytes, which for videos takes as long as decoding them; an encoded video's
    table of frame sizes is at one of its ends, so a change in its middle shows there.

    Raises:
        OSError: a file cannot be read.
        ValueError: there are no files.
    """
    lines = sorted(_line(path if isinstance(path, ShardMember) else Path(path)) for path in paths)
    if not lines:
        raise ValueError("there are no files to make a fingerprint of; name the reference videos")
    return digest("\n".join(lines))


def _line(source: Path | ShardMember) -> str:
    if isinstance(source, ShardMember):
        path, begin, size = source.path, source.offset, source.size
    else:
        path, begin, size = source, 0, source.stat().st_size
    with path.open("rb") as file:
        file.seek(begin)
        ends = hashlib.sha256(file.read(min(ENDS, size)))
        file.seek(begin + max(0, size - ENDS))
        ends.update(file.read(min(ENDS, size)))
    return f"{ends.hexdigest()} {size} {PurePosixPath(source.name).name}"


def _text(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _path(folder: str | Path, key: Mapping[str, str]) -> Path:
    return Path(folder) / f"{digest(_text(key))}.safetensors"
