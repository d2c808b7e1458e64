"""A teacher that is not there is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from lightning_dfd.backbones import presence
from lightning_dfd.backbones.presence import require_source


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were asked for, once each."""
    asked: list[str] = []

    def refuse(url: str, **_: object) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(presence, "get_hf_file_metadata", refuse)
    return asked


@pytest.mark.parametrize("source", ["/no/where", "./nowhere", "../nowhere", "a/b/c", "", "a b", "org/name/"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(no_network: list[str], source: str) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder, and it is not a hub id"):
        require_source(source)
    assert not no_network


def test_the_hub_is_asked_once(no_network: list[str]) -> None:
    for source in ("outputs/teacher", "teacher", "org/name@main"):
        with pytest.raises(
            FileNotFoundError, match=r"the hub cannot be asked for it .Name or service not known.; correct"
        ):
            require_source(source)
    assert len(no_network) == 3


def test_offline_nothing_is_asked(no_network: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set; .* hf download org/name"):
        require_source("org/name")
    assert not no_network


def test_folders_and_cached_pipelines_cost_no_request(
    no_network: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require_source(str(tmp_path))
    held = {"org/name": str(tmp_path / "model_index.json")}
    monkeypatch.setattr(presence, "try_to_load_from_cache", lambda repo, *_, **__: held.get(repo))
    require_source("org/name")
    require_source("org/name@main")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is the file"):
        require_source(str(tmp_path / "file"))
    with pytest.raises(ValueError, match="is a folder and has no revisions; leave out @main"):
        require_source(f"{tmp_path}@main")
    assert not no_network
