"""The whole walk on real video files: (cache,) DMD2, data forcing, samples, export, stock diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from lightning_dfd.cli import main as cli
from lightning_dfd.cli import program, recipes
from lightning_dfd.data import LatentCache, read_first_frame, read_video
from lightning_dfd.export import posterior_means
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.types import VideoSize
from tests.test_cli import fail, recipe, small

pytestmark = pytest.mark.slow(seconds=15)

CAPTIONS = {"bikes.mp4": "people ride bikes", "bigbuckbunny.mp4": "a rabbit wakes up", "carphone_pristine.mp4": "a man"}


@pytest.fixture(scope="session")
def folder(real_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three real videos of different sizes and rates, and a broken one."""
    root = tmp_path_factory.mktemp("real")
    lines = []
    for name, text in CAPTIONS.items():
        shutil.copy(real_videos / name, root / name)
        lines.append({"file_name": name, "text": text})
    (root / "broken.mp4").write_bytes(b"\x00\x01 not a video" * 50)
    lines.append({"file_name": "broken.mp4", "text": "nothing"})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return root


@pytest.mark.parametrize(("name", "cached"), [("cogvideox", True), ("wan", False)])
def test_from_video_files_to_a_pipeline_on_disk(
    tiny: dict[str, Path], folder: Path, tmp_path: Path, capsys: Any, name: str, cached: bool
) -> None:
    words = [*small(tiny, name, folder, tmp_path), "--trainer.max_steps", "10"]
    cache = ["--data.cache", str(tmp_path / "cache") if cached else "null"]
    if cached:
        cli.main(["cache", "-c", recipe(f"{name}_dmd2"), *words, *cache])
        assert len(LatentCache.open(tmp_path / "cache")) == len(CAPTIONS)
    root = ["--trainer.default_root_dir", str(tmp_path / "dmd2")]
    cli.main(["fit", "-c", recipe(f"{name}_dmd2"), *words, *cache, *root])
    start = ["--model.init_from", str(tmp_path / "dmd2/checkpoints/last.ckpt")]
    root = ["--trainer.default_root_dir", str(tmp_path / "dfd")]
    dfd = ["-c", recipe(f"{name}_dfd"), *words, *cache, *start, *root]
    ran = program.run(recipes.expand_inherited(["fit", *dfd]))
    assert ran.trainer.global_step == 10
    loaded = ran.model.backbone.loader.loaded
    assert bool(loaded) != cached  # with a cache no VAE and no text encoder is loaded

    ckpt = ["--ckpt_path", str(tmp_path / "dfd/checkpoints/last.ckpt")]
    cli.main(["sample", *dfd, *ckpt, "--output", str(tmp_path / "samples"), "--prompts", '["a cat"]', "--seeds", "[3]"])
    with av.open(str(tmp_path / "samples" / "0000.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == (9, 32, 48)
    cli.main(["export", *dfd, *ckpt, "--output", str(tmp_path / "student")])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student")
    frames = pipe(
        "a cat", num_frames=9, height=32, width=48, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16
    ).frames[0]
    assert [np.asarray(frame).shape[:2] for frame in frames] == [(32, 48)] * 9


@pytest.mark.parametrize("name", ["cogvideox_i2v", "ltx_i2v"])
def test_from_video_files_to_an_image_to_video_pipeline(
    tiny: dict[str, Path], folder: Path, real_videos: Path, tmp_path: Path, capsys: Any, name: str
) -> None:
    """A clip's first frame is its image in training; a file's is in sampling, and in the exported pipeline."""
    size = TINY[name].size
    words = [*small(tiny, name, folder, tmp_path), "--data.cache", str(tmp_path / "cache")]
    cli.main(["cache", "-c", recipe(f"{name}_dmd2"), *words])
    root = ["--trainer.default_root_dir", str(tmp_path / "dmd2")]
    cli.main(["fit", "-c", recipe(f"{name}_dmd2"), *words, *root])
    start = ["--model.init_from", str(tmp_path / "dmd2/checkpoints/last.ckpt")]
    dfd = ["-c", recipe(f"{name}_dfd"), *words, *start, "--trainer.default_root_dir", str(tmp_path / "dfd")]
    ran = program.run(recipes.expand_inherited(["fit", *dfd]))
    assert not ran.model.backbone.loader.loaded  # images come from the cache too

    ckpt = ["--ckpt_path", str(tmp_path / "dfd/checkpoints/last.ckpt")]
    request = ["--prompts", '["a cat"]', "--seeds", "[3]", "--output", str(tmp_path / "samples")]
    image = tmp_path / "dog.png"
    still = read_first_frame(real_videos / "bikes.mp4", 272, 640)
    Image.fromarray(still.permute(1, 2, 0).numpy()).save(image)
    cli.main(["sample", *dfd, *ckpt, *request, "--images", f'["{image}"]'])
    shown = read_video(tmp_path / "samples" / "0000.mp4", size, None)
    assert shown.shape == (3, size.frames, size.height, size.width)
    assert "it is not a caption of the data" in fail(capsys, "sample", *dfd, *ckpt, *request)
    assert "2 images for 1 prompts" in fail(capsys, "sample", *dfd, *ckpt, *request, "--images", "[a.png, b.png]")

    cli.main(["export", *dfd, *ckpt, "--output", str(tmp_path / "student")])
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student")
    frame = read_first_frame(image, size.height, size.width)
    with posterior_means():
        latents = pipe(
            image=Image.fromarray(frame.permute(1, 2, 0).numpy()),
            prompt="a cat",
            num_frames=size.frames,
            height=size.height,
            width=size.width,
            num_inference_steps=4,
            guidance_scale=1.0,
            max_sequence_length=16,
            output_type="latent",
        ).frames
    if name == "ltx_i2v":  # its network is shown the image as the first frame, and leaves it alone
        backbone = ran.model.backbone
        given = backbone.encode_images(frame[None].float() / 127.5 - 1.0, size.frames)["image_latents"]
        shape = backbone.latent_shape(size)
        assert (backbone.unpack(latents, shape)[:, :, :1] - given).abs().max() < 1e-4


def test_broken_videos_are_named_and_left_out(
    tiny: dict[str, Path], folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    words = [*small(tiny, "wan", folder, tmp_path), "--data.cache", str(tmp_path / "cache")]
    cli.main(["cache", "-c", recipe("wan_dmd2"), *words])
    problems = json.loads((tmp_path / "cache" / "cache.json").read_text(encoding="utf-8"))["problems"]
    assert [problem["name"] for problem in problems] == ["broken.mp4"]
    cli.main(["fit", "-c", recipe("wan_dmd2"), *words, "--data.cache", "null"])
    assert any("broken.mp4" in str(warning.message) for warning in recwarn)
    problems = json.loads(next(tmp_path.rglob("problems.json")).read_text(encoding="utf-8"))
    assert [problem["name"] for problem in problems] == ["broken.mp4"]


def test_a_run_fails_only_if_nothing_is_left(tiny: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"nothing")
    (tmp_path / "videos" / "a.txt").write_text("a cat", encoding="utf-8")
    words = [*small(tiny, "wan", tmp_path / "videos", tmp_path), "--data.cache", "null"]
    assert "no usable video" in fail(capsys, "fit", "-c", recipe("wan_dmd2"), *words)


def test_cache_of_another_teacher_is_refused(tiny: dict[str, Path], folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = [*small(tiny, "cogvideox", folder, tmp_path), "--data.cache", str(tmp_path / "cache")]
    cli.main(["cache", "-c", recipe("cogvideox_dmd2"), *words])
    for other in ("other", "wan"):  # the same family with other weights, and another family
        message = fail(capsys, "fit", "-c", recipe("cogvideox_dmd2"), *words, "--model.teacher", str(tiny[other]))
        assert "holds the cache of something else: teacher's" in message
        assert "lightning cache" in message
    message = fail(capsys, "fit", "-c", recipe("cogvideox_dmd2"), *words, "--data.frames", "5")
    assert "frames is 9 in the cache and 5 here" in message


def test_samples_depend_on_prompt_and_seed_alone(tiny: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """Videos of one prompt and seed compare between roles, runs and batch sizes, with fresh noise in every step too."""
    words = [*small(tiny, "wan", folder, tmp_path), "--data.cache", "null", "--model.sampling.kind", "sde"]
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = ["sample", "-c", recipe("wan_dmd2"), *words]
    cli.main([*command, "--output", str(both), "--prompts", '["a cat", "a dog"]', "--seeds", "[1, 2]"])
    cli.main([*command, "--output", str(alone), "--prompts", '["a dog"]', "--seeds", "[2]", "--batch_size", "1"])
    size = VideoSize(9, 32, 48)
    one, other = read_video(both / "0003.mp4", size, None), read_video(alone / "0000.mp4", size, None)
    another = read_video(both / "0002.mp4", size, None)
    rounding = (one.float() - other.float()).abs().mean()  # of sums, and then by the codec
    assert rounding < 0.5 * (one.float() - another.float()).abs().mean()
    facts = json.loads((both / "samples.json").read_text(encoding="utf-8"))
    assert facts["network_calls_per_video"] == 4
    cli.main([*command, "--output", str(tmp_path / "t"), "--prompts", '["a cat"]', "--role", "teacher"])
    facts = json.loads((tmp_path / "t" / "samples.json").read_text(encoding="utf-8"))
    assert facts["network_calls_per_video"] == 100


def test_samples_can_be_evaluated(tiny: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """The folders of `sample` are what `evaluate` takes: prompts, seeds, and neither grid nor contact sheet."""
    words = [*small(tiny, "wan", folder, tmp_path), "--data.cache", "null"]
    request = ["--prompts", '["a cat", "a dog"]', "--seeds", "[1, 2]"]
    cli.main(["sample", "-c", recipe("wan_dmd2"), *words, "--output", str(tmp_path / "samples"), *request])
    videos = [f"--videos.{name}={tmp_path / 'samples'}" for name in ("teacher", "student")]
    size = ["--frames", "9", "--height", "32", "--width", "48", "--min_videos", "3", "--diversity", "transnetv2"]
    cli.main(["evaluate", *videos, "--real", str(folder), "--output", str(tmp_path / "out"), *size])
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert record["values"]["student"]["videos"] == 4
    assert record["values"]["student"]["diversity"] > 0
    assert record["relative_to_teacher"]["student"]["score"] == pytest.approx(0, abs=1e-6)
    rates, broken = record["notes"]
    assert rates.startswith(
        "videos differ in frames per second (real 25 to 29.97, teacher 8, student 8), so all are read at 8"
    )
    assert broken.startswith("real:")  # its broken file
