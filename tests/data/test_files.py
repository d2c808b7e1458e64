"""Paths that users give, folders that cannot be written, and the permissions of what is written."""

from __future__ import annotations

import errno
import os
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from lightning_dfd.files import expanded, replacing, require_writable, respect_umask


def test_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIPS", "/clips")
    assert expanded("~/videos", "x") == f"{tmp_path}/videos"
    assert expanded("~", "x") == str(tmp_path)
    assert expanded("$CLIPS/a", "x") == expanded("${CLIPS}/a", "x") == "/clips/a"
    assert expanded("~/$CLIPS", "x") == f"{tmp_path}//clips"
    for plain in ("a/b", "/a/~b", "org/name", "a~1", "last"):
        assert expanded(plain, "x") == plain
    with pytest.raises(ValueError, match=r"data\.cache is \$GONE/x, and the variable \$GONE is not set"):
        expanded("$GONE/x", "data.cache")
    with pytest.raises(ValueError, match=r"there is no home folder of '~nobody-of-this-name'"):
        expanded("~nobody-of-this-name/x", "data.cache")
    (tmp_path / "$GONE").mkdir()
    assert expanded(f"{tmp_path}/$GONE", "x") == f"{tmp_path}/$GONE"


def test_a_folder_that_can_be_written_is_not_made(tmp_path):
    require_writable(tmp_path / "a" / "b", "output")
    require_writable("s3://bucket/run", "output")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run" / "deep"):
        with pytest.raises(OSError, match=r"output is .*, which cannot be written \(.*file is not a folder\); name"):
            require_writable(place, "output")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, number):
    def refuse(**options):
        raise OSError(number, os.strerror(number), str(options["dir"]))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=rf"cannot be written \({os.strerror(number)}\); name another folder"):
        require_writable(tmp_path / "a", "output")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
        (tmp_path / "deep").mkdir()
        save_file({"a": torch.zeros(2)}, tmp_path / "deep" / "b.safetensors")
        respect_umask(tmp_path)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"a.safetensors": mode, "a.txt": mode, "b.safetensors": mode}
