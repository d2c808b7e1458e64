from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lightning_dfd.backbones import Backbone
from lightning_dfd.data import CacheError, LatentCache, collate, list_clips, read_video, write_cache
from lightning_dfd.distributed.ranks import Ranks
from lightning_dfd.types import Conditioning, VideoSize

SIZE = VideoSize(5, 16, 24)


class MeanBackbone(Backbone):
    """Latents [f, 1, 2, 3] are means of 8x8 pixels of the first of every two frames; prompts are their letters."""

    lora_targets = ()

    def __init__(self, name="teacher", dtype=torch.float32):
        super().__init__("nowhere", dtype)
        self.name = name
        self.videos = []  # how many in every call
        self.prompts = []

    def text_length(self):
        return 6

    def identity(self):
        return {"pipeline": "Mean", "weights": self.name}

    def check_size(self, size):
        if size.height % 8:
            raise ValueError(f"{size} does not fit")

    def encode_videos(self, videos):
        assert videos.min() >= -1
        assert videos.max() <= 1
        self.videos.append(len(videos))
        means = torch.nn.functional.avg_pool3d(videos[:, :, ::2].mean(dim=1, keepdim=True), (1, 8, 8))
        return means.transpose(1, 2)

    def encode_prompts(self, prompts):
        self.prompts += prompts
        codes = torch.zeros(len(prompts), 6, 2)
        for row, prompt in zip(codes, prompts, strict=True):
            for place, letter in enumerate(prompt[:6]):
                row[place] = ord(letter)
        return Conditioning({"embeds": codes.to(self.dtype), "mask": codes[..., 0] > 0})

    def compression(self):
        raise NotImplementedError

    latent_shape = normalise = denormalise = call = few_step_scheduler = compression


@pytest.fixture
def folder(tmp_path, make_clip):
    root = tmp_path / "videos"
    for i, caption in enumerate(["cat", "dog", "cat", "emu"]):
        path = make_clip(root / f"sub/{i}.mp4", shade=20 + 30 * i)
        path.with_suffix(".txt").write_text(caption)
    return root


def expected(path, backbone=None):
    video = read_video(path, SIZE, None).float() / 127.5 - 1
    return (backbone or MeanBackbone()).encode_videos(video[None])[0]


def files(cache):
    return {path: path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def test_written_then_read(tmp_path, folder):
    backbone, clips = MeanBackbone(), list_clips(folder).clips
    report = write_cache(backbone, clips, tmp_path / "cache", SIZE, None, ["", "ugly"], batch_size=3)
    assert (report.written, report.kept, report.problems) == (4, 0, ())
    assert backbone.videos == [3, 1]
    assert sorted(backbone.prompts) == ["", "cat", "dog", "emu", "ugly"]  # each text once
    cache = LatentCache.open(tmp_path / "cache")
    assert len(cache) == 4
    assert [(entry.name, entry.caption) for entry in cache.entries] == [(clip.name, clip.caption) for clip in clips]
    for index, clip in enumerate(clips):
        sample = cache.load(index)
        assert sample.prompt == clip.caption
        assert torch.equal(sample.latents, expected(clip.path))
        for name, value in backbone.encode_prompts([clip.caption]).tensors.items():
            assert torch.equal(sample.cond[name], value)
            assert sample.cond[name].dtype == value.dtype
    assert torch.equal(cache.negative_conditioning("ugly")["embeds"], backbone.encode_prompts(["ugly"])["embeds"])
    batch = collate([cache.load(1), cache.load(3)])
    assert batch.latents.shape == (2, 3, 1, 2, 3)
    assert batch.cond["mask"].shape == (2, 6)
    index = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert index["folder"] == "videos"
    names = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(".")]
    assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 5


def test_a_negative_prompt_is_not_the_caption_of_the_same_words(tmp_path, folder):
    """Some pipelines put an instruction before a prompt, and none before a negative one."""

    class Instructed(MeanBackbone):
        def encode_negative(self, prompts):
            return MeanBackbone.encode_prompts(self, [f"-{prompt}" for prompt in prompts])

    backbone = Instructed()
    write_cache(backbone, list_clips(folder).clips, tmp_path / "cache", SIZE, None, ["cat"])
    cache = LatentCache.open(tmp_path / "cache")
    assert torch.equal(cache.conditioning("cat")["embeds"], backbone.encode_prompts(["cat"])["embeds"])
    assert torch.equal(cache.negative_conditioning("cat")["embeds"], backbone.encode_prompts(["-cat"])["embeds"])
    with pytest.raises(ValueError, match="does not hold the embedding of the negative prompt 'dog'"):
        cache.negative_conditioning("dog")


def test_half_precision_is_stored_as_such(tmp_path, folder):
    backbone = MeanBackbone(dtype=torch.bfloat16)
    clips = list_clips(folder).clips
    write_cache(backbone, clips, tmp_path / "cache", SIZE, None)
    cache = LatentCache.open(tmp_path / "cache")
    with safe_open(cache.latents_path(0), framework="pt") as file:
        assert file.get_tensor("latents").dtype == torch.bfloat16
    sample = cache.load(0)
    assert sample.latents.dtype == torch.float32
    assert torch.equal(sample.latents, expected(clips[0].path).bfloat16().float())
    assert sample.cond["embeds"].dtype == torch.bfloat16


def test_a_restart_encodes_nothing_again(tmp_path, folder):
    clips = list_clips(folder).clips
    write_cache(MeanBackbone(), clips, tmp_path / "cache", SIZE, 8)
    before, again = files(tmp_path / "cache"), MeanBackbone()
    report = write_cache(again, clips, tmp_path / "cache", SIZE, 8)
    assert (report.written, report.kept) == (0, 4)
    assert (again.videos, again.prompts) == ([], [])
    assert files(tmp_path / "cache") == before


def test_an_interrupted_run_goes_on(tmp_path, folder):
    class Stopping(MeanBackbone):
        def encode_videos(self, videos):
            if len(self.videos) == 2:
                raise KeyboardInterrupt
            return super().encode_videos(videos)

    clips = list_clips(folder).clips
    with pytest.raises(KeyboardInterrupt):
        write_cache(Stopping(), clips, tmp_path / "cache", SIZE, None)
    with pytest.raises(FileNotFoundError, match=r"no finished cache .* lightning cache -c"):
        LatentCache.open(tmp_path / "cache")
    # a file that was cut short, as no run of ours leaves it but a full disk may
    done = sorted((tmp_path / "cache" / "latents").iterdir())
    done[0].write_bytes(done[0].read_bytes()[:-4])
    backbone = MeanBackbone()
    report = write_cache(backbone, clips, tmp_path / "cache", SIZE, None)
    assert (report.written, report.kept, len(backbone.videos)) == (3, 1, 3)
    cache = LatentCache.open(tmp_path / "cache")
    assert all(torch.equal(cache.load(i).latents, expected(clip.path)) for i, clip in enumerate(clips))


def test_what_an_interrupted_run_of_another_teacher_left_is_not_kept(tmp_path, folder):
    clips = list_clips(folder).clips
    write_cache(MeanBackbone("other"), clips, tmp_path / "cache", SIZE, None)
    (tmp_path / "cache" / "cache.json").unlink()
    backbone = MeanBackbone()
    assert write_cache(backbone, clips, tmp_path / "cache", SIZE, None).kept == 0
    assert sorted(backbone.prompts) == ["", "cat", "dog", "emu"]


def test_changed_and_new_videos_are_encoded(tmp_path, folder, make_clip):
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    changed = make_clip(folder / "sub/1.mp4", shade=150)
    os.utime(folder / "sub/2.mp4", ns=(1, 1))
    make_clip(folder / "new.mp4", shade=160)
    (folder / "new.txt").write_text("newt")
    backbone, clips = MeanBackbone(), list_clips(folder).clips
    report = write_cache(backbone, clips, tmp_path / "cache", SIZE, None)
    assert (report.written, report.kept) == (3, 2)
    assert backbone.prompts == ["newt"]
    cache = LatentCache.open(tmp_path / "cache")
    names = [entry.name for entry in cache.entries]
    assert names == ["new.mp4", *(f"sub/{i}.mp4" for i in range(4))]
    assert torch.equal(cache.load(names.index("sub/1.mp4")).latents, expected(changed))


def test_videos_that_cannot_be_read_are_named_and_left_out(tmp_path, folder, make_clip):
    clips = list_clips(folder).clips
    (folder / "sub/0.mp4").write_bytes(b"noise" * 100)
    make_clip(folder / "sub/1.mp4", frames=3)
    (folder / "sub/2.mp4").unlink()
    report = write_cache(MeanBackbone(), clips, tmp_path / "cache", SIZE, None, batch_size=2)
    assert (report.written, report.kept) == (1, 0)
    assert {problem.name for problem in report.problems} == {"sub/0.mp4", "sub/1.mp4", "sub/2.mp4"}
    reasons = {problem.name: problem.reason for problem in report.problems}
    assert reasons["sub/1.mp4"].startswith("too short, 3 frames where 5")
    assert [entry.name for entry in LatentCache.open(tmp_path / "cache").entries] == ["sub/3.mp4"]
    listed = json.loads((tmp_path / "cache" / "cache.json").read_text())["problems"]
    assert {problem["name"] for problem in listed} == set(reasons)
    with pytest.raises(ValueError, match=r"none of 3 clips could be read\. 3 left out: sub/"):
        write_cache(MeanBackbone(), clips[:3], tmp_path / "empty", SIZE, None)
    assert not (tmp_path / "empty" / "cache.json").exists()


def test_another_teacher_size_or_rate_is_refused_alike(tmp_path, folder):
    clips = list_clips(folder).clips
    write_cache(MeanBackbone(), clips, tmp_path / "cache", SIZE, None)
    before, cache = files(tmp_path / "cache"), LatentCache.open(tmp_path / "cache")
    cases = [
        (MeanBackbone("other"), SIZE, None, "teacher's weights is teacher in the cache and other here"),
        (MeanBackbone(), VideoSize(9, 16, 24), None, "frames is 5 in the cache and 9 here"),
        (MeanBackbone(), VideoSize(5, 24, 32), None, "height is 16 in the cache and 24 here, width is 24 .* 32 here"),
        (MeanBackbone(), SIZE, 8.0, r"fps is None in the cache and 8\.0 here"),
    ]
    for backbone, size, fps, message in cases:
        with pytest.raises(ValueError, match=f"{message}; name another folder or delete"):
            write_cache(backbone, clips, tmp_path / "cache", size, fps)
        with pytest.raises(ValueError, match=f"{message}; set data.cache to another folder and .*lightning cache -c"):
            cache.require(backbone.identity(), size, fps)
    assert files(tmp_path / "cache") == before
    cache.require(MeanBackbone().identity(), SIZE, None)


def test_a_size_that_does_not_fit_the_teacher_is_refused_first(tmp_path, folder):
    with pytest.raises(ValueError, match="does not fit"):
        write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", VideoSize(5, 15, 24), None)
    assert not (tmp_path / "cache").exists()


def test_unknown_prompt_and_damaged_files_have_a_remedy(tmp_path, folder):
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    cache = LatentCache.open(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"does not hold the embedding of the prompt 'gnu'; .*lightning cache -c"):
        cache.conditioning("gnu")
    cache.latents_path(0).write_bytes(cache.latents_path(0).read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"the latents of 'sub/0\.mp4', is damaged .*lightning cache -c"):
        cache.load(0)
    cache.latents_path(1).unlink()
    with pytest.raises(ValueError, match=r"does not hold the latents of 'sub/1\.mp4'"):
        cache.load(1)
    cache.latents_path(2).write_bytes(cache.latents_path(3).read_bytes())
    with pytest.raises(CacheError, match=r"is not the latents of 'sub/2\.mp4', but made from .* delete the"):
        cache.load(2)
    content = bytearray(cache.latents_path(3).read_bytes())
    content[-1] ^= 1
    cache.latents_path(3).write_bytes(content)
    with pytest.raises(CacheError, match=r"its checksum is wrong\); delete the file and make it again"):
        cache.load(3)


def test_a_bit_that_flipped_anywhere_is_noticed(tmp_path, folder):
    """Also in what a file says of its origin, which no tensor depends on."""
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    cache = LatentCache.open(tmp_path / "cache")
    content = cache.latents_path(0).read_bytes()
    assert len(content) < 2000
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        cache.latents_path(0).write_bytes(flipped)
        with pytest.raises(CacheError, match="is damaged"):
            cache.load(0)
    cache.latents_path(0).write_bytes(content)
    cache.load(0)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_work_and_the_first_writes_the_index(tmp_path, folder, count):
    """One after the other here: what the last gathers is what all gave."""
    clips = list_clips(folder).clips
    (folder / "sub/1.mp4").write_bytes(b"broken")
    write_cache(MeanBackbone(), clips, tmp_path / "alone", SIZE, None)
    given, encoded = {}, []
    for rank in [*range(1, count), 0]:
        backbone = MeanBackbone()

        class InTurn(Ranks):
            def gather(self, value):
                given[self.rank] = value
                return [given.get(one, value) for one in range(self.size)]

        report = write_cache(backbone, clips, tmp_path / "cache", SIZE, None, ranks=InTurn(rank, count))
        assert (tmp_path / "cache" / "cache.json").exists() == (rank == 0)
        encoded += backbone.prompts
    assert sorted(encoded) == ["", "cat", "dog", "emu"]  # each once
    assert (report.written, report.kept, [problem.name for problem in report.problems]) == (3, 0, ["sub/1.mp4"])
    alone, together = LatentCache.open(tmp_path / "alone"), LatentCache.open(tmp_path / "cache")
    assert together.entries == alone.entries
    assert all(torch.equal(together.load(i).latents, alone.load(i).latents) for i in range(3))


@pytest.mark.slow(seconds=2)
def test_reading_takes_no_memory_that_stays(tmp_path, folder):
    """Resident pages after many readings of latents of 4 MB, mapped from the disk."""

    class Large(MeanBackbone):
        def encode_videos(self, videos):
            return super().encode_videos(videos).repeat(1, 1, 400, 14, 30)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    write_cache(Large(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    cache = LatentCache.open(tmp_path / "cache")
    assert cache.latents_path(0).stat().st_size > 4 * 10**6
    for _ in range(5):
        cache.load(0)
    before = resident()
    for number in range(200):
        cache.load(number % len(cache))
    assert resident() - before < 40  # MiB, of the 800 that were read


def test_captions_are_all_embedded(tmp_path, folder):
    clips = [replace(clip, others=("a beast", f"beast {i}")) for i, clip in enumerate(list_clips(folder).clips)]
    backbone = MeanBackbone()
    write_cache(backbone, clips, tmp_path / "cache", SIZE, None, ["ugly"], more_captions=[""])
    assert sorted(backbone.prompts) == ["", "a beast", *(f"beast {i}" for i in range(4)), "cat", "dog", "emu", "ugly"]
    cache = LatentCache.open(tmp_path / "cache")
    assert cache.captions(1) == ("dog", "a beast", "beast 1")
    assert cache.load(1, "beast 1").prompt == "beast 1"
    assert torch.equal(cache.load(1, "").cond["embeds"], backbone.encode_prompts([""])["embeds"])


@pytest.mark.parametrize("key", ["latents", "prompt"])
@pytest.mark.parametrize("bad", ["../../etc/passwd", "/etc/passwd", "0123456789abcdeg", "0123456789abcdef\n", 7])
def test_no_path_leaves_the_folder(tmp_path, folder, key, bad):
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    path = tmp_path / "cache" / "cache.json"
    index = json.loads(path.read_text())
    index["entries"][1][key] = bad
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is not (16 hex digits|text)"):
        LatentCache.open(tmp_path / "cache")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "identity": 3}', "[" * 99999, "\xff"])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "cache.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"cache\.json cannot be read .* delete it and"):
        LatentCache.open(tmp_path)
