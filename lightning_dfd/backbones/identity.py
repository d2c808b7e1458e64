"""What makes a teacher this one and no other: digests of configs and of the content of files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from lightning.pytorch.utilities import rank_zero_info

from lightning_dfd.backbones.family import Family
from lightning_dfd.backbones.loading import teacher_not_found
from lightning_dfd.backbones.location import Location, Weights, weights_of
from lightning_dfd.files import digest

# Content is read once: digests of files of at least REMEMBERED bytes are kept, with the file's state, in this folder.
DIGESTS = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lightning_dfd" / "digests"
REMEMBERED = 1 << 26
SETTLED = 2.0  # seconds after which a file's times tell one state of it from the next
CHUNK = 1 << 22
SLOW = 4 << 30  # bytes whose reading is worth a line: some seconds


def encoders_identity(family: Family) -> dict[str, str]:
    """What decides latents and embeddings: see `Backbone.identity`."""
    configs = family.configs
    encoders = {name: config_digest(configs.encoder(name) or {}) for name in configs.encoders}
    return {
        "pipeline": family.pipeline_name,
        "vae": config_digest(configs.vae),
        "text_length": str(family.max_sequence_length),
        **encoders,
        "weights": _weights(family, "vae", *configs.encoders),
        "tokenizers": _tokenizers(family),
    }


def networks_identity(family: Family) -> dict[str, str]:
    """What decides the teacher's own samples besides: its networks, its scheduler, its pipeline's settings."""
    settings = {name: value for name, value in family.configs.pipeline.items() if not isinstance(value, (list, tuple))}
    return {
        **{name: config_digest(family.configs.part(name)) for name in family.networks},
        "scheduler": config_digest(family.configs.scheduler),
        "settings": config_digest(settings),
        "dtype": str(family.dtype),
        "network_weights": _weights(family, *family.networks),
    }


def _weights(family: Family, *parts: str) -> str:
    location = family.configs.location
    return weights_digest(location, {name: weights_of(location, name, family.dtype) for name in parts})


def _tokenizers(family: Family) -> str:
    """Of the parts without weights that say what the encoders are shown: small files, which have to be here."""
    parts, location = family.configs.processors, family.configs.location
    folder = location.folder
    if folder is None:
        patterns = [f"{name}/*" for name in parts]
        try:
            folder = Path(snapshot_download(location.repo, revision=location.revision, allow_patterns=patterns))
        except OSError as error:
            raise teacher_not_found(location, error) from error
    return config_digest({name: folder_digest(folder / name) for name in parts})


def config_digest(config: Mapping[str, Any]) -> str:
    """Of a config less the keys that say where and by which version it was written."""
    written = ("transformers_version", "torch_dtype", "dtype", "architectures")
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in written}
    return digest(json.dumps(kept, sort_keys=True, default=str))


def weights_digest(location: Location, parts: Mapping[str, Weights | None]) -> str:
    """Of the content of all weight files of these components, whatever their names.

    Raises:
        FileNotFoundError: a component has no weights.
    """
    if missing := [part for part, weights in parts.items() if weights is None]:
        raise FileNotFoundError(
            f"{location} has no weights of {' and '.join(missing)} here, so it cannot be told from another teacher; "
            "give a folder written by save_pretrained, or download it whole with: hf download <id>"
        )
    files = [(part, file) for part, weights in parts.items() if weights for file in weights.files.values()]
    paths = [file for _, file in files if isinstance(file, Path)]
    told = dict(zip(paths, file_digests(paths), strict=True))
    lines = [f"{part} {told[file] if isinstance(file, Path) else file}" for part, file in files]
    return digest("\n".join(lines))


def folder_digest(folder: Path) -> str:
    """Of names and content of the files in a small folder, a tokenizer's say; nothing is told of an absent one."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    lines = [f"{path.name} {digest}" for path, digest in zip(files, file_digests(files), strict=True)]
    return digest("\n".join(lines))


def file_digests(paths: Iterable[Path]) -> list[str]:
    """The SHA-256 of each file's whole content, as the hub gives it for large files.

    A gigabyte takes about a second of one core, several files go side by side, and it happens once: digests are
    remembered by path, size, times and inode.
    """
    paths = list(paths)
    found = {path: _remembered(path) for path in paths}
    unknown = [path for path, digest in found.items() if digest is None]
    size = sum(path.stat().st_size for path in unknown)
    if size > SLOW:
        rank_zero_info(f"reading {size / 2**30:.0f} GiB of the teacher's weights, once, to tell them from others")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found |= dict(zip(unknown, pool.map(_read, unknown), strict=True))
    return [str(found[path]) for path in paths]


def _read(path: Path) -> str:
    before = _state(path)
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    stat = path.stat()
    settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED
    if stat.st_size >= REMEMBERED and settled and _state(path) == before:
        with suppress(OSError):  # it only saves time: a home that cannot be written is read again
            _remember(path, digest.hexdigest())
    return digest.hexdigest()


def _state(path: Path) -> str:
    """What changes when a file is written to; the time of its last change of state cannot be set by hand."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def _note(path: Path) -> Path:
    return DIGESTS / hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]


def _remember(path: Path, digest: str) -> None:
    DIGESTS.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=DIGESTS, delete=False) as file:
        file.write(f"{digest} {_state(path)}")
    os.replace(file.name, _note(path))


def _remembered(path: Path) -> str | None:
    try:
        digest, _, state = _note(path).read_text(encoding="utf-8").partition(" ")
    except (OSError, UnicodeDecodeError):
        return None
    return digest if state == _state(path) else None
