"""Where a teacher's files are: a folder, or a hub repository at one commit; and which of them hold its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, try_to_load_from_cache

INDEX = "model_index.json"
# As diffusers and transformers name them: `model.fp16-00001-of-00002.safetensors`, by older versions also
# `model-00001-of-00002.fp16.safetensors`.
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[^.]+?))?"
    r"(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?(?:\.(?P<older>[^.]+))?\.(?P<format>safetensors|bin)"
)
FORMATS = ("safetensors", "bin")  # the former is read where both are there
VARIANTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}  # the usual names, by precision


@dataclass(frozen=True)
class Location:
    """A pipeline's folder, or a hub repository with a revision (None for its main branch)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def folder(self) -> Path | None:
        """The folder; None for a hub repository."""
        return Path(self.repo) if Path(self.repo).is_dir() else None

    @property
    def held(self) -> Path | None:
        """The folder with all that this machine has of it, for a hub repository at a commit; None if there is none."""
        if self.folder is not None:
            return self.folder
        found = try_to_load_from_cache(self.repo, INDEX, revision=self.revision)
        return Path(found).parent if isinstance(found, str) else None


@dataclass(frozen=True)
class Weights:
    """The weight files of one component that are loaded.

    Args:
        variant: what stands in their names, as `fp16`; None for the plain ones.
        files: by name: the path, or for a file that only the hub has, the SHA-256 of its content.
    """

    variant: str | None
    files: Mapping[str, Path | str]


def locate(source: str | Location) -> Location:
    """A folder, or `org/name` or `org/name@revision` on the hub; the revision is a branch, a tag or a commit.

    Raises:
        ValueError: a revision of a folder, or an empty one.
    """
    if isinstance(source, Location):
        return source
    repo, at, revision = source.rpartition("@")
    if not at or Path(source).is_dir():
        return Location(source)
    if Path(repo).is_dir():
        raise ValueError(
            f"model.teacher is {source!r}, but {repo} is a folder and has no revisions; leave out @{revision}"
        )
    if not repo or not revision:
        raise ValueError(f"model.teacher is {source!r}; give a folder, a hub id, or a hub id with @ and a revision")
    return Location(repo, revision)


def pinned(location: Location) -> Location:
    """A hub repository at the commit that its revision means now, so that all parts come from the same one."""
    if location.folder is not None:
        return location
    _, commit = DiffusionPipeline.load_config(location.repo, revision=location.revision, return_commit_hash=True)
    return Location(location.repo, commit or location.revision)


def weights_of(location: Location, part: str, dtype: torch.dtype = torch.float32) -> Weights | None:
    """What is loaded of component `part` of a pinned location; None if it has no weights, or none can be found.

    The plain files before those of a variant, and of several variants the one that is named like `dtype`. Of a hub
    repository whole weights on this machine count before those that would be downloaded.
    """
    held = location.held
    if held is not None and (held / part).is_dir():
        found = chosen({path.name: path for path in (held / part).iterdir()}, dtype)
        if found is not None or location.folder is not None:
            return found
    if location.folder is not None:
        return None
    try:
        files = _on_hub(location.repo, location.revision)
    except Exception:  # offline, or any fault on the way: who needs the files says so
        return None
    return chosen({Path(name).name: key for name, key in files.items() if Path(name).parent == Path(part)}, dtype)


def chosen(files: Mapping[str, Path | str], dtype: torch.dtype) -> Weights | None:
    """Which weights are loaded of the files in a component's folder; None if no set of them is whole."""
    sets: dict[tuple[str, str], list[re.Match[str]]] = {}
    for match in filter(None, map(WEIGHTS.fullmatch, files)):
        sets.setdefault((match["variant"] or match["older"] or "", match["format"]), []).append(match)
    preferred = ("", VARIANTS.get(dtype))

    def rank(key: tuple[str, str]) -> tuple[int, str, int]:
        variant, format = key
        return preferred.index(variant) if variant in preferred else len(preferred), variant, FORMATS.index(format)

    for key in sorted(sets, key=rank):
        if _is_whole(sets[key]):
            names = sorted(match.string for match in sets[key])
            return Weights(key[0] or None, {name: files[name] for name in names})
    return None


def _is_whole(matches: Iterable[re.Match[str]]) -> bool:
    numbers: dict[str, set[str]] = {}
    for match in matches:
        if match["count"] is None:
            return True
        numbers.setdefault(match["count"], set()).add(match["number"])
    return any(len(found) == int(count) for count, found in numbers.items())


@cache
def _on_hub(repo: str, commit: str) -> dict[str, str]:
    """The files of a repository at a commit, by path: the SHA-256 of large ones, git's id of others."""
    siblings = HfApi().model_info(repo, revision=commit, files_metadata=True).siblings or []
    return {one.rfilename: one.lfs.sha256 if one.lfs else str(one.blob_id) for one in siblings}
