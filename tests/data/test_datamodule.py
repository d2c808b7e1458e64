from __future__ import annotations

import itertools
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from test_cache import SIZE, MeanBackbone

from lightning_dfd.data import VideoDataModule, list_clips, read_video, write_cache
from lightning_dfd.data.loading import held_out

SHAPE = {"frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}


class Recorder(LightningModule):
    """Trains one number and remembers which batches it was given."""

    def __init__(self, accumulate=1):
        super().__init__()
        self.accumulate = accumulate
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.prompts)
        (self.weight * (batch.video if batch.latents is None else batch.latents).mean()).backward()
        if len(self.seen) % self.accumulate == 0:
            self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        self.validated += batch.prompts

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, "enable_checkpointing": False, **kwargs})


@pytest.fixture
def folder(tmp_path, make_clip):
    root = tmp_path / "videos"
    for i in range(7):
        path = make_clip(root / f"{i}.mp4", shade=20 + 15 * i)
        path.with_suffix(".txt").write_text(f"clip {i}")
    return root


@pytest.fixture
def cache(tmp_path, folder):
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    return tmp_path / "cache"


def first(data, batches):
    return list(itertools.islice(data.train_dataloader(), batches))


@pytest.fixture(autouse=True)
def _lightning_s_advice():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|limit_train_batches).*")
        yield


def test_pixels_without_a_trainer(folder):
    data = VideoDataModule(str(folder), **SHAPE, batch_size=2)
    data.setup("fit")
    assert data.size == SIZE
    assert [clip.name for clip in data.clips] == [f"{i}.mp4" for i in range(7)]
    batches = first(data, 4)
    assert batches[0].video.shape == (2, 3, 5, 16, 24)
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    assert sorted(prompts[:7]) == [f"clip {i}" for i in range(7)]
    paths = {clip.caption: clip.path for clip in data.clips}
    for prompt, video in zip(batches[0].prompts, batches[0].video, strict=True):
        assert torch.equal(video, read_video(paths[prompt], SIZE, None).float() / 127.5 - 1)
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []
    assert data.negative_conditioning("") is None
    data.require_teacher({"anything": "at all"})


def test_latents_in_the_same_order_as_pixels(folder, cache):
    pixels, latents = VideoDataModule(str(folder), **SHAPE), VideoDataModule(cache=str(cache), **SHAPE)
    shutil.rmtree(folder / "nothing", ignore_errors=True)
    for data in (pixels, latents):
        data.setup()
    from_videos, from_cache = first(pixels, 9), first(latents, 9)
    assert [batch.prompts for batch in from_cache] == [batch.prompts for batch in from_videos]
    for seen, cached in zip(from_videos, from_cache, strict=True):
        assert cached.video is None
        assert torch.equal(cached.latents, MeanBackbone().encode_videos(seen.video))
        assert torch.equal(cached.cond["embeds"], MeanBackbone().encode_prompts(cached.prompts)["embeds"])
    assert [clip.name for clip in latents.clips] == [clip.name for clip in pixels.clips]


def test_a_cache_needs_no_videos_and_no_setup_to_be_asked(folder, cache):
    shutil.rmtree(folder)
    data = VideoDataModule(cache=str(cache), **SHAPE)
    data.require_teacher(MeanBackbone().identity())
    assert torch.equal(data.negative_conditioning("")["embeds"], torch.zeros(1, 6, 2))
    with pytest.raises(ValueError, match="teacher's weights is teacher in the cache and other here"):
        data.require_teacher(MeanBackbone("other").identity())
    with pytest.raises(ValueError, match="frames is 5 in the cache and 49 here"):
        VideoDataModule(cache=str(cache)).require_teacher(MeanBackbone().identity())
    data.setup()
    assert len(data.clips) == 7


def test_a_resumed_run_goes_on_in_the_stream(tmp_path, cache):
    def run(module, **kwargs):
        data = VideoDataModule(cache=str(cache), **SHAPE, batch_size=2)
        runner = trainer(tmp_path, **{"max_epochs": -1, **{k: v for k, v in kwargs.items() if k != "ckpt_path"}})
        runner.fit(module, data, ckpt_path=kwargs.get("ckpt_path"))
        return runner

    whole, begun, resumed = Recorder(), Recorder(), Recorder()
    run(whole, max_steps=10)
    run(begun, max_steps=5).save_checkpoint(tmp_path / "five.ckpt")
    run(resumed, max_steps=10, ckpt_path=tmp_path / "five.ckpt")
    assert len(whole.seen) == 10
    assert begun.seen + resumed.seen == whole.seen

    counted, rest = Recorder(accumulate=2), Recorder(accumulate=2)
    run(counted, max_steps=2).save_checkpoint(tmp_path / "two.ckpt")
    run(rest, max_steps=5, ckpt_path=tmp_path / "two.ckpt")
    assert counted.seen + rest.seen == whole.seen


@pytest.mark.parametrize("num_workers", [0, 1])
def test_epochs_do_not_repeat_the_beginning(tmp_path, cache, num_workers):
    """limit_train_batches makes a Trainer ask for a new iterator again and again."""
    module = Recorder()
    data = VideoDataModule(cache=str(cache), **SHAPE, num_workers=num_workers)
    trainer(tmp_path, max_epochs=3, limit_train_batches=3).fit(module, data)
    assert module.seen == [batch.prompts for batch in first_of(cache, 9)]


def first_of(cache, batches):
    data = VideoDataModule(cache=str(cache), **SHAPE)
    data.setup()
    return first(data, batches)


def test_held_out_clips_are_never_trained_on(tmp_path, folder, cache):
    module, data = Recorder(), VideoDataModule(str(folder), **SHAPE, val_share=0.3, batch_size=2)
    trainer(tmp_path, max_steps=12, max_epochs=-1, val_check_interval=6, num_sanity_val_steps=0).fit(module, data)
    held = [clip.caption for clip in data.held_out]
    trained = {prompt for prompts in module.seen for prompt in prompts}
    assert held
    assert module.validated == 2 * held  # once each, in order, at steps 6 and 12
    assert trained == {clip.caption for clip in data.clips}
    assert trained.isdisjoint(held)
    assert len(trained) + len(held) == 7
    again = VideoDataModule(cache=str(cache), **SHAPE, val_share=0.3)
    again.setup()
    assert [clip.name for clip in again.held_out] == [clip.name for clip in data.held_out]
    assert [batch.prompts for batch in again.test_dataloader()] == [(caption,) for caption in held]


def captioned(folder):
    names = [f"{i}.mp4" for i in range(7)]
    lines = [{"file_name": name, "text": f"clip {i}", "short_text": [f"c{i}", "c"]} for i, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))


@pytest.mark.slow(seconds=2)
@pytest.mark.parametrize("workers", [0, 2])
def test_captions_are_drawn_by_seed_and_place(tmp_path, folder, workers):
    captioned(folder)
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None, more_captions=[""])
    options = {**SHAPE, "batch_size": 5, "caption_dropout": 0.25, "num_workers": workers}
    pixels, latents = VideoDataModule(str(folder), **options), VideoDataModule(cache=str(tmp_path / "cache"), **options)
    seen = []
    for data in (pixels, latents):
        data.setup()
        seen.append([prompt for batch in first(data, 40) for prompt in batch.prompts])
    assert seen[0] == seen[1]
    if not workers:
        shares = [sum(test(prompt) for prompt in seen[0]) / 200 for test in (lambda p: not p, lambda p: p == "c")]
        assert shares == pytest.approx([0.25, 0.25], abs=0.08)
        plain = VideoDataModule(str(folder), **SHAPE, batch_size=5)
        plain.setup()
        undropped = [prompt for batch in first(plain, 40) for prompt in batch.prompts]
        assert all(prompt in ("", other) for prompt, other in zip(seen[0], undropped, strict=True))
        assert [plain.clips[0].caption] == [clip.caption for clip in plain.clips if clip.name == "0.mp4"]
        assert "" not in undropped


def test_dropout_wants_the_empty_caption_in_the_cache(tmp_path, folder):
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None, ["ugly"])
    with pytest.raises(ValueError, match=r"caption_dropout is 0\.1, and .* does not hold the empty caption; run"):
        VideoDataModule(cache=str(tmp_path / "cache"), **SHAPE, caption_dropout=0.1).setup()


def test_every_clip_goes_to_the_bucket_that_suits_it(tmp_path, make_clip):
    root = tmp_path / "videos"
    shapes = {"wide": (9, 16, 32), "high": (9, 32, 16), "long": (17, 16, 24), "short": (6, 16, 24), "tiny": (3, 16, 24)}
    for name, (frames, height, width) in shapes.items():
        for i in range(2):
            path = make_clip(root / f"{name}{i}.mp4", frames=frames, height=height, width=width)
            path.with_suffix(".txt").write_text(name)
    buckets = [[5, 16, 24], [9, 16, 24], [5, 16, 32], [5, 24, 16]]
    want = {"wide": (5, 16, 32), "high": (5, 24, 16), "long": (9, 16, 24), "short": (5, 16, 24)}
    options = {**SHAPE, "buckets": buckets, "batch_size": 2, "val_share": 1e-9}
    data = VideoDataModule(str(root), **options)
    with pytest.warns(UserWarning, match=r"2 left out: tiny0\.mp4: too short, 3 frames where 5"):
        data.setup()
    batches = first(data, 30)
    for batch in batches:
        assert {want[prompt] for prompt in batch.prompts} == {tuple(batch.video.shape[2:])}
    assert {prompt for batch in batches for prompt in batch.prompts} >= set(want) - set(data.held_out[0].caption)
    assert [batch.video.shape[0] for batch in data.val_dataloader()] == [1]

    report = write_cache(MeanBackbone(), list_clips(root).clips, tmp_path / "cache", data.sizes, None)
    assert (report.written, len(report.problems)) == (8, 2)
    cached = VideoDataModule(cache=str(tmp_path / "cache"), **options)
    cached.require_teacher(MeanBackbone().identity())
    cached.setup()
    assert [batch.prompts for batch in first(cached, 30)] == [batch.prompts for batch in batches]
    for batch, seen in zip(first(cached, 30), batches, strict=True):
        assert torch.equal(batch.latents, MeanBackbone().encode_videos(seen.video))
    again = write_cache(MeanBackbone(), list_clips(root).clips, tmp_path / "cache", data.sizes, None)
    assert (again.written, again.kept) == (0, 8)
    with pytest.raises(ValueError, match=r"buckets is 5 frames of 16x24, 9 .* in the cache and absent here"):
        VideoDataModule(cache=str(tmp_path / "cache"), **SHAPE).require_teacher(MeanBackbone().identity())


def test_holding_out_is_stable_and_about_the_share():
    names = [f"folder/{i:05d}.mp4" for i in range(5000)]
    chosen = {names[i] for i in held_out(names, 0.1)}
    assert 0.085 < len(chosen) / 5000 < 0.115
    fewer = list(reversed(names[::2]))
    assert {fewer[i] for i in held_out(fewer, 0.1)} == chosen & set(fewer)
    assert len(held_out(names[:3], 1e-9)) == 1
    assert held_out(names, 0.0) == []


def test_unusable_videos_are_named(tmp_path, folder, make_clip):
    (folder / "1.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    make_clip(folder / "2.mp4", frames=3)
    (folder / "3.txt").unlink()
    module, data = Recorder(), VideoDataModule(str(folder), **SHAPE)
    with pytest.warns(UserWarning, match=r"problems\.json\)\. 3 left out: 3\.mp4: no caption") as caught:
        trainer(tmp_path / "run", max_steps=1).fit(module, data)
    assert len([warning for warning in caught if "left out" in str(warning.message)]) == 1
    assert [clip.name for clip in data.clips] == ["0.mp4", "4.mp4", "5.mp4", "6.mp4"]
    listed = json.loads((tmp_path / "run" / "problems.json").read_text())
    assert [problem["name"] for problem in listed] == ["3.mp4", "1.mp4", "2.mp4"]
    assert listed[2]["reason"].startswith("too short, 3 frames where 5 are needed")

    alone = VideoDataModule(str(folder), **SHAPE)
    with pytest.warns(UserWarning, match="3 left out"):
        alone.setup()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match=r"no usable video in .*videos\. 7 left out"),
    ):
        VideoDataModule(str(folder), frames=50, height=16, width=24).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"data\.folder and data\.cache are both empty"),
        ({"folder": "x", "frames": 0}, "frames 0"),
        ({"folder": "x", "fps": 0.0}, r"fps 0\.0"),
        ({"folder": "x", "batch_size": 0}, "batch_size 0"),
        ({"folder": "x", "buckets": [[5, 16]]}, r"buckets is \[\[5, 16\]\]; give sizes as"),
        ({"folder": "x", "buckets": []}, "or null for none"),
        ({"folder": "x", "caption_dropout": 1.0}, r"caption_dropout must be .* got 1\.0"),
        ({"folder": "x", "val_share": 1.0}, r"val_share must be .* got 1\.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        VideoDataModule(**arguments)


def test_what_is_missing_is_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no finished cache .*lightning cache -c"):
        VideoDataModule(cache=str(tmp_path / "gone")).setup()
    with pytest.raises(FileNotFoundError, match="no folder"):
        VideoDataModule(str(tmp_path / "gone")).setup()
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        VideoDataModule(str(folder)).train_dataloader()
    for path in list(folder.glob("[1-6].*")):
        path.unlink()
    with pytest.raises(ValueError, match="holds out all 1 clips"):
        VideoDataModule(str(folder), **SHAPE, val_share=0.1).setup()


# ---- a cache beside its folder ----------------------------------------------------------------------------------


def said_of(folder, cache, stage="fit"):
    """The warnings of a setup with both."""
    data = VideoDataModule(str(folder), str(cache), **SHAPE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup(stage)
    assert len(data.clips) == 7  # whatever the folder holds
    return [str(warning.message) for warning in caught]


def test_a_folder_that_is_its_cache_s_is_passed_over_in_silence(folder, cache, make_clip):
    assert said_of(folder, cache) == []
    (folder / "unrelated.pdf").write_bytes(b"x")
    make_clip(folder / "uncaptioned.mp4")
    assert said_of(folder, cache) == []
    shutil.rmtree(folder)
    assert said_of(folder, cache) == []


def test_clips_that_the_cache_does_not_know_are_named(folder, cache, make_clip):
    for i in range(5):
        make_clip(folder / f"new{i}.mp4").with_suffix(".txt").write_text("new")
    make_clip(folder / "1.mp4", shade=90)
    (folder / "2.txt").write_text("another caption")
    (folder / "3.mp4").unlink()
    (folder / "4.txt").unlink()
    (line,) = said_of(folder, cache)
    assert "5 new (new0.mp4, new1.mp4, new2.mp4, ...)" in line
    assert "1 changed (1.mp4)" in line
    assert "1 with other captions (2.mp4)" in line
    assert "2 vanished (3.mp4, 4.mp4)" in line
    assert f"run: lightning cache -c RECIPE --data.folder {folder} --data.cache {cache}" in line
    assert said_of(folder, cache, "validate") == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_cache(MeanBackbone(), list_clips(folder).clips, cache, SIZE, None)
        VideoDataModule(str(folder), str(cache), **SHAPE).setup("fit")


def test_an_empty_folder_beside_a_cache_is_named(folder, cache):
    for path in folder.iterdir():
        path.unlink()
    (line,) = said_of(folder, cache)
    assert "7 vanished (0.mp4, 1.mp4, 2.mp4, ...)" in line


def test_what_was_left_out_of_the_cache_is_not_new(tmp_path, folder, make_clip):
    make_clip(folder / "short.mp4", frames=3).with_suffix(".txt").write_text("short")
    write_cache(MeanBackbone(), list_clips(folder).clips, tmp_path / "cache", SIZE, None)
    assert said_of(folder, tmp_path / "cache") == []


def test_a_cache_without_stamps_is_compared_by_names_and_captions(folder, cache):
    """As earlier versions wrote them."""
    index = json.loads((cache / "cache.json").read_text())
    for entry in index["entries"]:
        del entry["source"]
    del index["rate"]
    (cache / "cache.json").write_text(json.dumps(index))
    (folder / "2.txt").write_text("another caption")
    (line,) = said_of(folder, cache)
    assert "with other captions (2.mp4). To cache" in line
    assert "changed" not in line


# ---- the rate of samples ----------------------------------------------------------------------------------------


def test_samples_play_at_the_rate_of_what_was_trained_on(tmp_path, make_clip):
    root = tmp_path / "videos"
    for number, rate in enumerate((12, 24, 24, 30)):
        make_clip(root / f"{number}.mp4", fps=rate).with_suffix(".txt").write_text("x")
    assert VideoDataModule(str(root), **SHAPE, fps=16).playing_rate == 16
    data = VideoDataModule(str(root), **SHAPE)
    assert VideoDataModule(str(root), **SHAPE).playing_rate == 24
    data.setup()
    assert data.playing_rate == 24
    cache = tmp_path / "cache"
    for _ in range(2):  # a second run, which encodes nothing, keeps it
        write_cache(MeanBackbone(), list_clips(root).clips, cache, SIZE, None)
    shutil.rmtree(root)
    assert VideoDataModule(str(root), str(cache), **SHAPE).playing_rate == 24
    root.mkdir()
    assert VideoDataModule(str(root), **SHAPE).playing_rate == 8
    assert VideoDataModule(cache=str(tmp_path / "gone"), **SHAPE).playing_rate == 8


def test_paths_of_the_data_may_begin_at_home(tmp_path, folder, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(cache))
    data = VideoDataModule("~/videos", "$PLACE", **SHAPE)
    assert (data.folder, data.cache) == (str(folder), str(cache))
