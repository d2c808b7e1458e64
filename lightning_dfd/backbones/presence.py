"""Is there a teacher at all? Said at once, before diffusers looks on the hub and tries again for a minute."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from lightning_dfd.backbones.location import INDEX, locate


def require_source(source: str) -> None:
    """Refuse a folder that is not there, and a hub id that this machine neither holds nor can ask for.

    A folder, and a pipeline that the hub's cache holds, cost no request. What else is wrong with them, or what the hub
    answers, is for whoever reads the configs to say.

    Raises:
        FileNotFoundError: there is no such folder, or the hub cannot be reached.
        ValueError: it is a file, or a folder with a revision.
    """
    path = Path(source)
    if source and path.is_dir():
        return
    if path.is_file():
        raise ValueError(
            f"model.teacher is the file {source!r}; give the folder of a whole pipeline, with its {INDEX}, or a hub id"
        )
    location = locate(source)
    repo, revision = location.repo, location.revision
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"model.teacher is {source!r}: there is no such folder, and it is not a hub id, which is org/name; correct "
            "the path, which is relative to the current folder"
        ) from error
    if isinstance(try_to_load_from_cache(repo, INDEX, revision=revision), str):
        return
    at = "" if revision is None else f" --revision {revision}"
    remedy = f"correct the path, or download the hub's {repo} first: hf download {repo}{at}"
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"model.teacher is {source!r}: there is no such folder, the hub's cache on this machine does not hold it, "
            f"and HF_HUB_OFFLINE is set; {remedy}"
        )
    try:
        get_hf_file_metadata(hf_hub_url(repo, INDEX, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError:  # the hub's answer
        return
    except Exception as error:  # the network's, of many kinds
        raise FileNotFoundError(
            f"model.teacher is {source!r}: there is no such folder, and the hub cannot be asked for it "
            f"({' '.join(str(error).split()) or type(error).__name__}); {remedy}"
        ) from error
