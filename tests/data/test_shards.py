"""Tar shards beside and instead of files in folders."""

from __future__ import annotations

import io
import itertools
import json
import tarfile

import pytest
import torch
from test_cache import SIZE, MeanBackbone, files

from lightning_dfd.data import LatentCache, VideoDataModule, VideoError, list_clips, read_video, write_cache

SHAPE = {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}


def shard(path, members):
    """A tar of (name, content or TarInfo); contents get WebDataset's kind of headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size, info.mtime = len(content), 1_700_000_000
            tar.addfile(info, None if isinstance(content, tarfile.TarInfo) else io.BytesIO(content))
    return path


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


@pytest.fixture
def clips(tmp_path, make_clip):
    return [make_clip(tmp_path / f"made/{i}.mp4", shade=20 + 15 * i).read_bytes() for i in range(6)]


def reasons(listing):
    return {problem.name: problem.reason for problem in listing.problems}


def test_a_shard_holds_what_a_folder_would(tmp_path, clips):
    """The same clips, captions, order, latents and stream, with the shards at any place in the folder."""
    loose, packed = tmp_path / "loose", tmp_path / "packed"
    members = []
    for i, content in enumerate(clips):
        folder = loose / f"train-{i // 3}.tar"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04d}.mp4").write_bytes(content)
        (folder / f"{i:04d}.txt").write_text(f"clip {i}")
        pair = [(f"{i:04d}.mp4", content), (f"{i:04d}.txt", f"clip {i}".encode())]
        members += pair if i % 2 else pair[::-1]
    shard(packed / "train-0.tar", members[:6])
    shard(packed / "train-1.tar", members[6:])
    listed = list_clips(packed)
    assert not listed.problems
    assert [(clip.name, clip.captions) for clip in listed.clips] == [
        (clip.name, clip.captions) for clip in list_clips(loose).clips
    ]
    for clip in listed.clips:
        assert torch.equal(read_video(clip.source, SIZE, None), read_video(loose / clip.name, SIZE, None))
    batches = []
    for root in (loose, packed):
        data = VideoDataModule(str(root), **SHAPE, batch_size=2, num_workers=2 * (root is packed))
        data.setup()
        batches.append(list(itertools.islice(data.train_dataloader(), 7)))
    for one, other in zip(*batches, strict=True):
        assert one.prompts == other.prompts
        assert torch.equal(one.video, other.video)
    report = write_cache(MeanBackbone(), listed.clips, tmp_path / "cache", SIZE, None)
    assert report.written == 6
    before = files(tmp_path / "cache")
    assert write_cache(MeanBackbone(), listed.clips, tmp_path / "cache", SIZE, None).kept == 6
    assert files(tmp_path / "cache") == before
    index = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert index["folder"] == "packed"
    assert len(LatentCache.open(tmp_path / "cache")) == 6


def test_captions_and_keys_as_webdataset_has_them(tmp_path, clips):
    entry = {"text": ["long", "longer"], "short_text": "s"}
    shard(tmp_path / "root/a/s.tar", [
        ("x/1.mp4", clips[0]), ("x/1.json", json.dumps(entry).encode()), ("x/1.txt", b"not this"),
        ("y/1.mp4", clips[1]), ("y/1.txt", "\ufeffcaf\u00e9".encode()), ("y/1.jpg", b"..."),
        ("y/1.left.webm", clips[1]),
        ("2.mp4", clips[2]), ("3.MP4", clips[3]), ("3.txt", b"caf\xe9"), ("4.mp4", clips[4]), ("4.json", b"[1]"),
        ("5.mp4", clips[5]), ("5.txt", b" "),
    ])  # fmt: skip
    listing = list_clips(tmp_path / "root")
    assert {clip.name: clip.captions for clip in listing.clips} == {
        "a/s.tar/x/1.mp4": ("long", "longer", "s"),
        "a/s.tar/y/1.mp4": ("caf\u00e9",),
        "a/s.tar/y/1.left.webm": ("caf\u00e9",),
    }
    assert {clip.root.name for clip in listing.clips} == {"root"}
    assert reasons(listing) == {
        "a/s.tar/2.mp4": "no caption",
        "a/s.tar/3.MP4": "the caption is not UTF-8",
        "a/s.tar/4.mp4": "not a JSON object",
        "a/s.tar/5.mp4": "no caption",
    }
    assert len(list_clips(tmp_path / "root", need_captions=False).clips) >= 4


def test_no_name_leads_out_and_nothing_is_followed(tmp_path, clips):
    (tmp_path / "secret.mp4").write_bytes(clips[5])
    bad = ["../up.mp4", "/abs.mp4", "a/../../b.mp4", "C:\\c.mp4", "..\\d.mp4"]
    members = [(name, clips[0]) for name in bad]
    links = [link("sym.mp4", str(tmp_path / "secret.mp4")), link("hard.mp4", "good.mp4", tarfile.LNKTYPE)]
    texts = [(name.rsplit(".", 1)[0] + ".txt", b"x") for name, _ in (*members, *links)]
    shard(tmp_path / "root/s.tar", [("good.mp4", clips[1]), ("good.txt", b"good"), *members, *links, *texts])
    (tmp_path / "root/away.tar").symlink_to(shard(tmp_path / "other.tar", [("z.mp4", clips[0]), ("z.txt", b"z")]))
    (tmp_path / "root/pipe.tar").mkdir()
    listing = list_clips(tmp_path / "root")
    assert [clip.name for clip in listing.clips] == ["s.tar/good.mp4"]
    found = reasons(listing)
    assert "link that leads out" in found["away.tar"]
    assert found["pipe.tar"] == "no such file"
    assert all("leads out of the shard" in found[f"s.tar/{name}"] for name in bad)
    assert found["s.tar/sym.mp4"] == found["s.tar/hard.mp4"] == "no regular file"
    assert not [path for path in (tmp_path / "root").rglob("*.mp4")]  # nothing is unpacked


def test_damaged_shards_are_named_and_what_is_whole_is_used(tmp_path, clips):
    members = [pair for i in range(4) for pair in ((f"{i}.txt", f"clip {i}".encode()), (f"{i}.mp4", clips[i]))]
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    root = tmp_path / "root"
    root.mkdir()
    at = whole.find(b"2.mp4")
    cases = {
        "cut.tar": whole[: at + 512 + 100],
        "cut_at_header.tar": whole[:at],
        "overwritten.tar": whole[:at] + b"\xff" * 512 + whole[at + 512 :],
        "noise.tar": bytes(range(256)) * 20,
        "empty.tar": b"",
        "packed.tar.gz": whole,
    }
    for name, content in cases.items():
        (root / name).write_bytes(content)
    listing = list_clips(root)
    assert {clip.name for clip in listing.clips} == {
        f"{name}/{i}.mp4" for name in ("cut.tar", "cut_at_header.tar", "overwritten.tar") for i in range(2)
    }
    found = reasons(listing)
    assert found["cut.tar/2.mp4"].startswith("cut off, 100 of")
    assert "what follows is left out" in found["cut_at_header.tar"]
    assert "what follows is left out" in found["overwritten.tar"]
    assert "no tar file, or damaged" in found["noise.tar"]
    assert "empty.tar" in found
    assert "unpack it to .tar" in found["packed.tar.gz"]
    for name in ("cut.tar", "cut_at_header.tar", "overwritten.tar"):
        (root / name).unlink()
    with pytest.raises(ValueError, match=r"3 left out: empty\.tar: no tar file"):
        list_clips(root)


def test_a_broken_member_is_left_out_by_name(tmp_path, clips):
    """Its pixels damaged, or the shard gone; the clip beside it is still used."""
    path = shard(
        tmp_path / "root/s.tar", [("a.mp4", clips[0]), ("a.txt", b"a"), ("b.mp4", b"no video"), ("b.txt", b"b")]
    )
    data = VideoDataModule(str(tmp_path / "root"), **SHAPE)
    with pytest.warns(UserWarning, match=r"1 left out: s\.tar/b\.mp4: Invalid data"):
        data.setup()
    assert [clip.name for clip in data.clips] == ["s.tar/a.mp4"]
    path.unlink()
    with pytest.raises(VideoError, match=r"s\.tar/a\.mp4: No such file"):
        read_video(data.clips[0].source, SIZE, None)
