from __future__ import annotations

import itertools
import json
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dfd.data import OrderedSamples, Sample, SeededStream, VideoError, collate, list_clips
from lightning_dfd.data.stream import ClipVideos
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.types import Conditioning, VideoSize


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"video")


def problems(listing):
    return {problem.name: problem.reason for problem in listing.problems}


# ---- listing ----------------------------------------------------------------------------------------------------


def test_sidecars_are_found_in_order_and_in_subfolders(tmp_path):
    touch(tmp_path, "b.mp4", "a/x.MKV", "a/y.webm", "c.gif", ".hidden.mp4", ".git/z.mp4", "notes.pdf")
    for name, text in (("b.txt", " a bus \n"), ("a/x.txt", "\ufeffan axe"), ("c.txt", "  \n"), (".git/z.txt", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    listing = list_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in listing.clips] == [("a/x.MKV", "an axe"), ("b.mp4", "a bus")]
    assert listing.clips[0].path == tmp_path / "a" / "x.MKV"
    assert problems(listing) == {"a/y.webm": "no caption: y.txt: no such file", "c.gif": "no caption"}


def test_sidecar_that_is_not_utf8(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_text("fine")
    listing = list_clips(tmp_path)
    assert [clip.name for clip in listing.clips] == ["b.mp4"]
    assert problems(listing) == {"a.mp4": "the caption is not UTF-8"}


def test_jsonl(tmp_path):
    touch(tmp_path, "a.mp4", "sub/b.mp4", "c.mp4", "unlisted.mp4")
    lines = [
        b'\xef\xbb\xbf{"file_name": "a.mp4", "text": "a cat", "caption": "ignored"}',
        b"",
        '{"file_name": "./sub/b.mp4", "caption": "a line\u2028break"}'.encode(),
        b'{"file_name": "c.mp4", "text": ',
        b"[1, 2]",
        b'{"file_name": "c.mp4", "text": "caf\xe9"}',
        b'{"text": "no file"}',
        b'{"file_name": "gone.mp4", "text": "gone"}',
        b'{"file_name": "c.mp4"}',
        b'{"file_name": "c.mp4", "text": 3}',
        b'{"file_name": "a.mp4", "text": "again"}',
        b"[" * 100_000,
        b'{"file_name": "c.mp4", "text": "\\ud800"}',
    ]
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    listing = list_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in listing.clips] == [
        ("a.mp4", "a cat"),
        ("sub/b.mp4", "a line\u2028break"),
    ]
    reasons = [str(problem) for problem in listing.problems]
    expected = [
        "metadata.jsonl line 4: malformed JSON",
        "metadata.jsonl line 5: not a JSON object",
        "metadata.jsonl line 6: not UTF-8",
        "metadata.jsonl line 7: no file_name",
        "gone.mp4: no such file",
        "c.mp4: no caption",
        "c.mp4: the caption is int, not text",
        "a.mp4: listed twice",
        "metadata.jsonl line 12: malformed JSON",
        "c.mp4: the caption is not UTF-8",
    ]
    assert len(reasons) == len(expected)
    for reason, beginning in zip(reasons, expected, strict=True):
        assert reason.startswith(beginning)
        assert "\n" not in reason


def test_long_and_short_captions(tmp_path):
    touch(tmp_path, *(f"{i}.mp4" for i in range(6)))
    entries = [
        {"text": "a long one", "short_text": "short"},
        {"text": ["one", " two ", "one", ""], "short_caption": ["three"]},
        {"short_text": "short alone"},
        {"text": ["one", 2]},
        {"text": []},
        {"text": None, "caption": "of the second key"},
    ]
    lines = [json.dumps({"file_name": f"{i}.mp4", **entry}) for i, entry in enumerate(entries)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    listing = list_clips(tmp_path)
    assert {clip.name: clip.captions for clip in listing.clips} == {
        "0.mp4": ("a long one", "short"),
        "1.mp4": ("one", "two", "three"),
        "2.mp4": ("short alone",),
        "5.mp4": ("of the second key",),
    }
    assert problems(listing) == {"3.mp4": "the caption is int, not text", "4.mp4": "no caption"}
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text,short_text\n0.mp4,long,short\n1.mp4,long,\n")
    assert [clip.captions for clip in list_clips(tmp_path).clips] == [("long", "short"), ("long",)]


def test_csv(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4", "d.mp4")
    (tmp_path / "metadata.csv").write_bytes(
        b'file_name,caption,views\r\na.mp4,"one, two\r\nthree",3\r\nb.mp4,one, two,3\r\n'
        b"c.mp4,caf\xe9,1\r\nd.mp4,,1\r\n,a caption,1\r\n"
    )
    listing = list_clips(tmp_path)
    assert [(clip.name, clip.caption) for clip in listing.clips] == [("a.mp4", "one, two\r\nthree")]
    assert [str(problem) for problem in listing.problems] == [
        "metadata.csv line 4: more cells than columns; put captions with commas in double quotes",
        "c.mp4: the caption is not UTF-8",
        "d.mp4: no caption",
        ": not a file name in UTF-8",
    ]
    (tmp_path / "metadata.csv").write_text("file,words\na.mp4,b\n")
    with pytest.raises(ValueError, match=r"columns \['file', 'words'\]; need file_name and one of"):
        list_clips(tmp_path)


def test_nothing_outside_the_folder_is_read(tmp_path):
    root = tmp_path / "root"
    touch(tmp_path, "outside.mp4", "other/z.mp4")
    touch(root, "in.mp4", "b.mp4")
    (tmp_path / "outside.txt").write_text("secret")
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "folder").symlink_to(tmp_path / "other")
    (root / "inner.mp4").symlink_to(root / "in.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    names = ["in.mp4", "inner.mp4", "link.mp4", "folder/z.mp4", "loop.mp4", "../outside.mp4", "a/../in.mp4"]
    names += [str(tmp_path / "outside.mp4"), "C:\\a.mp4", "..\\a.mp4", "a\0.mp4", "."]
    rows = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    listing = list_clips(root)
    assert [clip.name for clip in listing.clips] == ["in.mp4", "inner.mp4"]
    assert [problem.name for problem in listing.problems] == names[2:]
    reasons = problems(listing)
    assert "leads out" in reasons["link.mp4"]
    assert "leads out" in reasons["folder/z.mp4"]
    assert "'..'" in reasons["../outside.mp4"]
    assert "absolute" in reasons[str(tmp_path / "outside.mp4")]
    assert "absolute" in reasons["C:\\a.mp4"]

    (root / "metadata.jsonl").unlink()
    (root / "in.txt").write_text("fine")
    (root / "link.txt").write_text("a caption for what is outside")
    (root / "b.txt").symlink_to(tmp_path / "outside.txt")
    listing = list_clips(root)
    assert [clip.name for clip in listing.clips] == ["in.mp4"]
    assert "leads out" in problems(listing)["link.mp4"]
    assert "leads out" in problems(listing)["b.mp4"]
    assert "secret" not in str(listing)

    (tmp_path / "metadata.jsonl").write_text('{"file_name": "in.mp4", "text": "x"}')
    (root / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    with pytest.raises(ValueError, match="link that leads out"):
        list_clips(root)


def test_the_root_itself_may_be_a_link(tmp_path):
    touch(tmp_path / "real", "a.mp4")
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert [clip.name for clip in list_clips(tmp_path / "link").clips] == ["a.mp4"]


def test_nothing_there_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone"):
        list_clips(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"metadata\.jsonl .* \.txt beside them$"):
        list_clips(tmp_path)
    touch(tmp_path, *(f"{i}.mp4" for i in range(5)))
    with pytest.raises(ValueError, match=r"5 left out: 0\.mp4: no caption.*; and 2 more$"):
        list_clips(tmp_path)


# ---- the stream -------------------------------------------------------------------------------------------------


def load(index, k=None):
    """A clip that says which one it is."""
    return Sample(f"clip {index}", video=torch.full((3, 1, 2, 2), index, dtype=torch.uint8))


def load_some(index, k=None):
    if index in (2, 5):
        raise VideoError(f"{index}.mp4: broken")
    return load(index, k)


def take(stream, batches, workers=0):
    loader = DataLoader(stream, batch_size=stream.batch_size, num_workers=workers, collate_fn=collate)
    return [batch.prompts for batch in itertools.islice(loader, batches)]


def test_every_epoch_is_its_own_permutation():
    stream = SeededStream(load, count=7, seed=3, batch_size=1)
    items = [stream.item(k).prompt for k in range(21)]
    epochs = [items[:7], items[7:14], items[14:]]
    assert all(sorted(epoch) == [f"clip {i}" for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert items != [SeededStream(load, 7, seed=4, batch_size=1).item(k).prompt for k in range(21)]
    assert stream.item(2).prompt == items[2]  # in any order


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("loader", [load, load_some])
@pytest.mark.filterwarnings("ignore:left out")
def test_workers_change_nothing(workers, loader):
    alone = take(SeededStream(loader, count=7, seed=0, batch_size=3), 8)
    assert take(SeededStream(loader, count=7, seed=0, batch_size=3), 8, workers) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_skips_batches(workers):
    whole = take(SeededStream(load, count=7, seed=0, batch_size=2), 9)
    assert take(SeededStream(load, count=7, seed=0, batch_size=2, start=5), 4, workers) == whole[5:]


def test_two_ranks_see_what_one_with_twice_the_batch_sees():
    whole = take(SeededStream(load, count=7, seed=0, batch_size=4), 6)
    ranks = [take(SeededStream(load, 7, 0, batch_size=2, ranks=Ranks(rank, 2)), 6) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == whole


def test_broken_clips_are_left_out_and_named_once():
    stream = SeededStream(load_some, count=7, seed=0, batch_size=1)
    with pytest.warns(UserWarning, match="left out") as caught:
        items = [stream.item(k).prompt for k in range(70)]
    assert sorted(str(warning.message) for warning in caught) == [f"left out: {i}.mp4: broken" for i in (2, 5)]
    assert set(items) == {f"clip {i}" for i in (0, 1, 3, 4, 6)}
    for epoch in range(10):
        order = stream.order(epoch)
        for position in range(7):
            rest = (order[(position + offset) % 7] for offset in range(7))
            assert items[7 * epoch + position] == f"clip {next(i for i in rest if i not in (2, 5))}"
    fresh = SeededStream(load_some, 7, 0, batch_size=1)
    k = 7 + fresh.order(1).index(5)
    with pytest.warns(UserWarning, match="left out"):
        assert fresh.item(k).prompt == items[k]  # whatever was asked before


def test_nothing_left_is_an_error():
    def fail(index, k=None):
        raise VideoError(f"{index}.mp4: broken")

    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=r"nothing left .* all 3 clips"):
        next(iter(SeededStream(fail, count=3, seed=0, batch_size=1)))
    with pytest.raises(ValueError, match="at least one clip"):
        SeededStream(load, count=0, seed=0, batch_size=1)


def test_other_errors_are_not_hidden():
    def fail(index, k=None):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        next(iter(SeededStream(fail, count=3, seed=0, batch_size=1)))


def test_a_batch_of_all_ranks_is_of_one_part():
    parts, seen = (5, 0, 2, 9), []
    whole = [SeededStream(load, 16, 3, batch_size=4, parts=parts).item(k).prompt for k in range(4 * 60)]
    ranks = [take(SeededStream(load, 16, 3, 2, ranks=Ranks(rank, 2), parts=parts), 60) for rank in range(2)]
    assert [prompt for both in zip(*ranks, strict=True) for prompts in both for prompt in prompts] == whole
    for begin in range(0, len(whole), 4):
        numbers = [int(prompt.split()[1]) for prompt in whole[begin : begin + 4]]
        assert len({sum(number >= start for start in (5, 7)) for number in numbers}) == 1
        seen.append(sum(numbers[0] >= start for start in (5, 7)))
    epoch = sorted(seen[:6])
    assert epoch == [0, 0, 1, 2, 2, 2]  # as many batches of each as it takes to show its clips
    assert sorted(seen[6:12]) == epoch
    assert seen[:6] != seen[6:12] or seen[6:12] != seen[12:18]
    large = [prompt for prompt in whole if int(prompt.split()[1]) >= 7]
    assert sorted(large[:9]) == sorted(f"clip {i}" for i in range(7, 16))  # every clip once before one comes again
    assert sorted(large[9:18]) == sorted(large[:9]) != large[:9]


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_resume_and_have_workers(workers):
    options = {"count": 16, "seed": 0, "batch_size": 3, "parts": (5, 11)}
    alone = take(SeededStream(load, **options), 20)
    assert take(SeededStream(load, **options), 20, workers) == alone
    assert take(SeededStream(load, **options, start=7), 13, workers) == alone[7:]


@pytest.mark.filterwarnings("ignore:left out")
def test_what_is_broken_is_replaced_within_its_part():
    stream = SeededStream(load_some, 8, 0, batch_size=1, parts=(3, 5))  # 2 and 5 are broken
    assert {stream.item(k).prompt for k in range(80)} == {f"clip {i}" for i in (0, 1, 3, 4, 6, 7)}
    samples = OrderedSamples(load_some, 8, (3, 5))
    assert [samples[i].prompt for i in range(8)] == [f"clip {i}" for i in (0, 1, 0, 3, 4, 6, 6, 7)]
    with pytest.raises(ValueError, match="the parts hold 7 clips, not 8"):
        SeededStream(load, 8, 0, batch_size=1, parts=(3, 4))


@pytest.mark.parametrize("workers", [0, 2])
def test_ordered_samples(workers):
    loader = DataLoader(OrderedSamples(load, 5), batch_size=2, num_workers=workers, collate_fn=collate)
    assert [batch.prompts for batch in loader] == [("clip 0", "clip 1"), ("clip 2", "clip 3"), ("clip 4",)]


@pytest.mark.filterwarnings("ignore:left out")
def test_ordered_samples_leave_out_what_is_broken():
    samples = OrderedSamples(load_some, 6)
    assert [samples[i].prompt for i in range(6)] == [f"clip {i}" for i in (0, 1, 3, 3, 4, 0)]


# ---- batches ----------------------------------------------------------------------------------------------------


def test_collate_pixels(tmp_path, make_clip):
    paths = [make_clip(tmp_path / f"{i}.mp4", shade=20 + i) for i in range(2)]
    for path in paths:
        path.with_suffix(".txt").write_text(path.stem)
    videos = ClipVideos(list_clips(tmp_path).clips, (VideoSize(5, 16, 16),) * 2, None)
    batch = collate([videos.load(0), videos.load(1)])
    assert batch.prompts == ("0", "1")
    assert batch.video.shape == (2, 3, 5, 16, 16)
    assert batch.video.dtype == torch.float32
    torch.testing.assert_close((batch.video[1] + 1) * 127.5, videos.load(1).video.float())
    assert collate([load(255)]).video.max() == 1.0
    assert collate([load(0)]).video.min() == -1.0


def test_collate_latents():
    samples = [
        Sample(
            str(i), latents=torch.full((2, 3), i, dtype=torch.bfloat16), cond=Conditioning({"e": torch.full((1, 4), i)})
        )
        for i in range(3)
    ]
    batch = collate(samples)
    assert batch.video is None
    assert batch.latents.dtype == torch.float32
    assert torch.equal(batch.latents[:, 0, 0], torch.arange(3.0))
    assert torch.equal(batch.cond["e"][:, 0], torch.arange(3))


def test_streams_of_good_clips_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(SeededStream(load, count=3, seed=0, batch_size=2), 4)


# ---- names and links --------------------------------------------------------------------------------------------

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café/é.mp4") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("listed", "stored"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_names_meet_in_either_of_unicode_s_forms(tmp_path, listed, stored):
    touch(tmp_path, stored)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": listed, "text": "a cup"}), encoding="utf-8")
    (clip,) = list_clips(tmp_path).clips
    assert clip.name == COMPOSED
    assert clip.path.is_file()
    assert clip.root == tmp_path.resolve()
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / stored).with_name(Path(listed).name).with_suffix(".txt").write_text("a mug")
    (clip,) = list_clips(tmp_path).clips
    assert (clip.name, clip.caption) == (COMPOSED, "a mug")


def test_a_name_in_mixed_forms_is_found(tmp_path):
    touch(tmp_path, f"{Path(DECOMPOSED).parent}/{Path(COMPOSED).name}")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{COMPOSED},a cup\n", encoding="utf-8")
    assert [clip.name for clip in list_clips(tmp_path).clips] == [COMPOSED]


def hub_snapshot(root):
    """A dataset as the hub's cache holds it: files are links to blobs."""
    repository = root / "datasets--someone--clips"
    touch(repository / "blobs", "0a1b", "2c3d", "4e5f")
    (repository / "blobs" / "2c3d").write_text("a dog")
    (repository / "blobs" / "4e5f").write_text('{"file_name": "a/dog.mp4", "text": "a listed dog"}')
    snapshot = repository / "snapshots" / "1234abcd"
    (snapshot / "a").mkdir(parents=True)
    (snapshot / "a" / "dog.mp4").symlink_to("../../../blobs/0a1b")
    (snapshot / "a" / "dog.txt").symlink_to("../../../blobs/2c3d")
    return snapshot


def test_links_within_the_hub_s_cache_are_followed(tmp_path):
    snapshot = hub_snapshot(tmp_path)
    for root, name in ((snapshot, "a/dog.mp4"), (snapshot / "a", "dog.mp4")):
        listing = list_clips(root)
        assert [(clip.name, clip.caption) for clip in listing.clips] == [(name, "a dog")]
        assert not listing.problems
    (tmp_path / "link").symlink_to(snapshot)
    assert len(list_clips(tmp_path / "link").clips) == 1
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/4e5f")
    assert [clip.caption for clip in list_clips(snapshot).clips] == ["a listed dog"]


def test_links_out_of_the_hub_s_cache_are_refused(tmp_path):
    snapshot = hub_snapshot(tmp_path)
    touch(tmp_path, "secret.mp4", "datasets--other--clips/blobs/ffff", "datasets--someone--clips/refs/main")
    targets = {
        "out.mp4": tmp_path / "secret.mp4",
        "other.mp4": tmp_path / "datasets--other--clips/blobs/ffff",
        "refs.mp4": tmp_path / "datasets--someone--clips/refs/main",
        "through.mp4": tmp_path / "datasets--someone--clips/blobs/beyond",
    }
    targets["through.mp4"].symlink_to(tmp_path / "secret.mp4")
    for name, target in targets.items():
        (snapshot / name).symlink_to(target)
        (snapshot / name).with_suffix(".txt").write_text("x")
    listing = list_clips(snapshot)
    assert [clip.name for clip in listing.clips] == ["a/dog.mp4"]
    assert sorted(problems(listing)) == sorted(targets)
    assert all("leads out" in reason for reason in problems(listing).values())
    plain = tmp_path / "plain" / "snapshots" / "v1"  # a folder of that name alone is no cache
    touch(tmp_path / "plain" / "blobs", "x")
    plain.mkdir(parents=True)
    (plain / "a.mp4").symlink_to("../../blobs/x")
    (plain / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="leads out"):
        list_clips(plain)


def test_captioned_files_that_are_no_videos_are_named(tmp_path):
    touch(tmp_path, "a.mp4", "a.json", "b.xyz", "c.MTS", "d", "notes.txt", "e.json")
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(name)
    listing = list_clips(tmp_path)
    assert [clip.name for clip in listing.clips] == ["a.mp4", "c.MTS"]
    assert problems(listing) == {
        "b.xyz": ".xyz is not a video suffix; rename or convert it",
        "d": "it has no suffix; rename or convert it",
    }
