"""What a teacher is: told apart by content, loaded from every format, refused where its parts do not fit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

from lightning_dfd.backbones import Backbone, backbone_from_pretrained, encoding, identity
from lightning_dfd.backbones.location import Location, chosen, locate
from lightning_dfd.testing import checks, trained
from lightning_dfd.testing.case import Case
from lightning_dfd.testing.tiny import TINY
from lightning_dfd.testing.tiny.cogvideox import cogvideox
from lightning_dfd.testing.tiny.parts import EVEN
from lightning_dfd.types import VideoSize

FORMATS: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "bin": {"safe_serialization": False},
    "shards": {"max_shard_size": "20KB"},
    "variant": {"variant": "fp16"},
}


def teacher(folder: Path | str, name: str = "wan", **options: Any) -> Backbone:
    trial = TINY[name]
    options = {"max_sequence_length": trial.text_length, "backbone": trial.backbone} | options
    return backbone_from_pretrained(str(folder), **options)


def change_config(folder: Path, part: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / part / "config.json" if part else folder / "model_index.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def copy_configs(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors")))


# ---- identity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_one_byte_makes_another_teacher(tiny: dict[str, Path], tmp_path: Path, format: str) -> None:
    """In whatever file, also where size and time of the file stay; a copy elsewhere is the same one."""
    folder = tmp_path / "teacher"
    DiffusionPipeline.from_pretrained(tiny["wan"]).save_pretrained(folder, **FORMATS[format])
    before = teacher(folder).network_identity()
    copied = teacher(shutil.copytree(folder, tmp_path / "copy")).network_identity()
    assert copied == before
    weights = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin")]
    assert len(weights) > 3 if format == "shards" else len(weights) == 3
    for path in [*weights, folder / "tokenizer" / "tokenizer.json"]:
        content, stat = path.read_bytes(), path.stat()
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        changed = teacher(folder)
        part = path.parent.name
        assert (changed.identity() != {key: before[key] for key in changed.identity()}) == (part != "transformer"), path
        assert changed.network_identity() != before, path
        path.write_bytes(content)
    assert teacher(folder).network_identity() == before


def test_scheduler_and_settings_belong_to_the_networks_identity(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["wan22"], tmp_path / "teacher"))
    known = [teacher(folder, "wan22")]
    told = [json.dumps(known[0].network_identity())]
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"shift": 5.0', '"shift": 3.0'))
    known.append(teacher(folder, "wan22"))
    told.append(json.dumps(known[1].network_identity()))
    change_config(folder, "", lambda index: index.update(boundary_ratio=0.5))
    known.append(teacher(folder, "wan22"))
    told.append(json.dumps(known[2].network_identity()))
    assert len({json.dumps(one.identity()) for one in known}) == 1
    assert len(set(told)) == 3


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "DIGESTS", tmp_path / "digests")
    monkeypatch.setattr(identity, "REMEMBERED", 1)
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    reads: list[Path] = []
    opened = Path.open

    def watched(one: Path, *args: Any, **options: Any) -> Any:
        if one == path:
            reads.append(one)
        return opened(one, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    first = identity.file_digests([path])
    assert identity.file_digests([path]) == first
    assert len(reads) == 1
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity.file_digests([path]) != first
    monkeypatch.setattr(identity, "DIGESTS", path / "no folder")  # a home that cannot be written costs time alone
    assert identity.file_digests([path]) == identity.file_digests([path])


def test_without_weights_there_is_no_identity(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_configs(tiny["wan"], tmp_path / "teacher")
    with pytest.raises(FileNotFoundError, match="no weights of vae and text_encoder here"):
        teacher(folder).identity()


# ---- the hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, with two commits of org/wan: `v1`, and `main` with other weights."""
    repo = tmp_path / "models--org--wan"
    for revision, commit in (("v1", "1" * 40), ("main", "2" * 40)):
        shutil.copytree(tiny["wan"], repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / revision).write_text(commit)
    path = repo / "snapshots" / ("2" * 40) / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: value + 0.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return repo


def test_a_revision_of_the_hub_is_taken_and_told_apart(tiny: dict[str, Path], hub: Path) -> None:
    local, old, new = (teacher(source) for source in (tiny["wan"], "org/wan@v1", "org/wan"))
    assert old.configs.location == teacher("org/wan@" + "1" * 40).configs.location == Location("org/wan", "1" * 40)
    assert old.network_identity() == local.network_identity()  # the same files in a folder
    assert new.network_identity() != old.network_identity()
    ours, theirs, changed = ({**one.loader.vae.state_dict()} for one in (old, local, new))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not all(torch.equal(ours[name], changed[name]) for name in ours)
    assert old.encode_prompts(["a cat"])["prompt_embeds"].shape == (1, 16, 32)
    assert sum(value.numel() for value in old.load_transformer().parameters()) > 0
    (hub / "refs" / "main").write_text("1" * 40)  # the branch moves: a teacher already made stays at its commit
    assert new.configs.location.revision == "2" * 40
    assert teacher("org/wan").identity() == old.identity()


def test_weights_that_are_not_here_are_known_by_the_hubs_sha256(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a cache never downloads the VAE."""
    whole = teacher("org/wan@v1").identity()
    path = hub / "snapshots" / ("1" * 40) / "vae" / "diffusion_pytorch_model.safetensors"
    sha = identity.file_digests([path])[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no weights of vae here"):  # offline
        teacher("org/wan@v1").identity()
    weights = SimpleNamespace(rfilename=f"vae/{path.name}", lfs=SimpleNamespace(sha256=sha), blob_id="git's")
    config = SimpleNamespace(rfilename="vae/config.json", lfs=None, blob_id="git's")
    listing = SimpleNamespace(siblings=[weights, config])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: listing)
    assert teacher("org/wan@v1").identity() == whole


def test_revisions_that_cannot_be(tiny: dict[str, Path], hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder and has no revisions; leave out @main"):
        locate(f"{tiny['wan']}@main")
    with pytest.raises(ValueError, match="a hub id with @ and a revision"):
        locate("org/wan@")
    odd = tmp_path / "wan@home"
    odd.mkdir()
    assert locate(str(odd)) == Location(str(odd))
    with pytest.raises(FileNotFoundError, match=r"'org/wan@v9': .*not hold it.*hf download org/wan --revision v9"):
        teacher("org/wan@v9")


# ---- formats and variants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bin", "shards", "variant"])
def test_every_format_is_loaded(tiny: dict[str, Path], tmp_path: Path, format: str) -> None:
    DiffusionPipeline.from_pretrained(tiny["wan"]).save_pretrained(tmp_path / "teacher", **FORMATS[format])
    ours, theirs = teacher(tmp_path / "teacher"), teacher(tiny["wan"])
    for one, other in ((ours.load_transformer(), theirs.load_transformer()), (ours.loader.vae, theirs.loader.vae)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    prompts = [one.encode_prompts(["a cat"])["prompt_embeds"] for one in (ours, theirs)]
    assert torch.equal(*prompts)


def test_of_a_variant_and_the_full_weights_the_full_ones_are_taken(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Component by component: here the VAE is there in both, the network as a variant alone."""
    folder = Path(shutil.copytree(tiny["wan"], tmp_path / "teacher"))
    vae, network = (folder / part / "diffusion_pytorch_model.safetensors" for part in ("vae", "transformer"))
    zeros = {name: torch.zeros_like(value) for name, value in load_file(vae).items()}
    save_file(zeros, vae.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    network.rename(network.with_name("diffusion_pytorch_model.fp16.safetensors"))
    ours, theirs = teacher(folder), teacher(tiny["wan"])
    assert any(bool(value.any()) for value in ours.loader.vae.parameters())
    for a, b in zip(ours.load_transformer().parameters(), theirs.load_transformer().parameters(), strict=True):
        assert torch.equal(a, b)
    assert ours.network_identity() == theirs.network_identity()
    assert type(ours.loader.pipeline()).__name__ == "WanPipeline"


def test_which_files_of_a_folder_are_chosen() -> None:
    def of(*names: str, dtype: torch.dtype = torch.float32) -> tuple[str | None, list[str]] | None:
        found = chosen(dict.fromkeys(names, "sha"), dtype)
        return None if found is None else (found.variant, list(found.files))

    plain, half, brain = (f"model{variant}.safetensors" for variant in ("", ".fp16", ".bf16"))
    assert of(plain, half, "config.json") == (None, [plain])
    assert of(half, brain) == ("bf16", [brain])  # the first by name, unless one is called like the precision
    assert of(half, brain, dtype=torch.float16) == ("fp16", [half])
    assert of("pytorch_model.bin", plain) == (None, [plain])
    assert of("pytorch_model.bin", half) == (None, ["pytorch_model.bin"])
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert of(*shards) == (None, shards)
    assert of(shards[0], "diffusion_pytorch_model.safetensors.index.json") is None  # not whole
    halves = [f"model.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert of(shards[0], *halves) == ("fp16", halves)
    older = [f"model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)]
    assert of(*older) == ("fp16", older)
    assert of("model.onnx", "flax_model.msgpack", "lora.safetensors") is None


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


def test_a_bin_file_never_runs_code(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "teacher"
    DiffusionPipeline.from_pretrained(tiny["wan"]).save_pretrained(folder, safe_serialization=False)
    encoder = folder / "text_encoder" / "model.safetensors"  # transformers writes nothing else
    torch.save(load_file(encoder), encoder.with_name("pytorch_model.bin"))
    encoder.unlink()
    assert teacher(folder).encode_prompts(["a cat"])["prompt_embeds"].isfinite().all()
    for path in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"):
        whole = (folder / path).read_bytes()
        (folder / path).write_bytes(pickle.dumps(Code()))
        with pytest.raises(FileNotFoundError, match=rf"damaged: {path}"):
            teacher(folder).loader.encoders  # noqa: B018
        (folder / path).write_bytes(whole)
    assert not (tmp_path / "ran").exists()


# ---- parts that do not fit --------------------------------------------------------------------------------------


def wider(*keys: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update({key: (config[key] or 1) + 3 for key in keys if key in config})


MISFITS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "input": ("transformer", wider("in_channels", "in_visual_dim"), "do not fit: the network takes"),
    "output": ("transformer", wider("out_channels", "out_visual_dim"), "do not fit: the network answers with"),
    "vae": ("vae", wider("latent_channels", "z_dim"), "do not fit: the network takes"),
    "text": (
        "transformer",
        wider("text_embed_dim", "text_dim", "caption_channels", "in_text_dim", "crossattn_proj_in_channels"),
        "features of text_encoder, whose config says",
    ),
    "quantised": (
        "transformer",
        lambda config: config.update(quantization_config={"quant_method": "bitsandbytes"}),
        r"is stored quantised \(bitsandbytes\)",
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_parts_that_do_not_fit_are_refused_from_their_configs(tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    if TINY[name].backbone == "captured":
        return
    teacher(copy_configs(tiny[name], tmp_path / "whole"), name)  # with no weights in reach
    for part, change, said in MISFITS.values():
        folder = copy_configs(tiny[name], tmp_path / "teacher")
        change_config(folder, part, change)
        with pytest.raises(ValueError, match=said):
            teacher(folder, name)
        shutil.rmtree(folder)


def test_a_network_of_another_kind_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    """An image-to-video network in a text-to-video pipeline, and a second network or an encoder that is another's."""
    folder = copy_configs(tiny["wan_i2v"], tmp_path / "text")
    change_config(folder, "", lambda index: index.update(_class_name="WanPipeline"))
    with pytest.raises(
        ValueError, match="takes 12 channels, and as a WanPipeline with 4 channels of latents it needs 4"
    ):
        teacher(folder, "wan")
    folder = copy_configs(tiny["wan22"], tmp_path / "staged")
    change_config(folder, "transformer_2", wider("in_channels"))
    with pytest.raises(ValueError, match="transformer_2 and VAE"):
        teacher(folder, "wan22")
    folder = copy_configs(tiny["wan_i2v"], tmp_path / "sight")
    change_config(folder, "image_encoder", wider("hidden_size"))
    with pytest.raises(ValueError, match="32 features of image_encoder, whose config says 35"):
        teacher(folder, "wan_i2v")
    change_config(folder, "", lambda index: index.update(image_encoder=[None, None]))
    with pytest.raises(ValueError, match="has no image_encoder"):
        teacher(folder, "wan_i2v")
    folder = copy_configs(tiny["wan"], tmp_path / "text encoder")
    change_config(folder, "text_encoder", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    with pytest.raises(ValueError, match=r"the text_encoder of .* is stored quantised \(gptq\)"):
        teacher(folder)


# ---- limits -----------------------------------------------------------------------------------------------------


def test_text_lengths_that_a_network_cannot_take(tiny: dict[str, Path]) -> None:
    fixed = "always takes {} text tokens; leave it null"
    for name, length in (("cogvideox", 16), ("wan_i2v", 512), ("skyreels_i2v", 512)):
        with pytest.raises(ValueError, match=fixed.format(length)):
            teacher(tiny[name], name, max_sequence_length=length - 1)
    teacher(tiny["cogvideox_5b"], "cogvideox_5b", max_sequence_length=9)
    for length in (0, -3):
        with pytest.raises(ValueError, match="takes at least 1, by default 512"):
            teacher(tiny["wan"], max_sequence_length=length)
    with pytest.raises(ValueError, match="at least 1 and at most 1024, by default 512"):
        teacher(tiny["kandinsky"], "kandinsky", max_sequence_length=1025)


@pytest.mark.parametrize(
    ("name", "size", "largest"),
    [
        ("wan", VideoSize(129, 16, 528), VideoSize(125, 512, 512)),
        ("wan_ti2v", VideoSize(129, 16, 16), VideoSize(125, 512, 512)),
        ("skyreels", VideoSize(9, 528, 16), VideoSize(125, 512, 512)),
        ("cosmos", VideoSize(41, 32, 32), VideoSize(29, 128, 128)),
        ("kandinsky", VideoSize(513, 32, 32), VideoSize(509, 2048, 2048)),
    ],
)
def test_sizes_for_which_a_network_has_no_positions(
    tiny: dict[str, Path], name: str, size: VideoSize, largest: VideoSize
) -> None:
    backbone = teacher(tiny[name], name)
    with pytest.raises(ValueError, match=f"has positions for at most {largest}; the nearest is"):
        backbone.check_size(size)
    assert backbone.sizes().largest == largest
    nearest = backbone.sizes().nearest(size)
    backbone.check_size(nearest)
    x_t = torch.zeros(1, *backbone.latent_shape(nearest))
    with torch.no_grad():
        backbone.x0(backbone.load_transformer(), x_t, torch.tensor([0.5]), backbone.dummy_prompts(1))


# ---- CogVideoX --------------------------------------------------------------------------------------------------


def later_cogvideox(image: bool) -> Any:
    """CogVideoX 1.5: patches of two latent frames, positions that are cut from a larger grid, `ofs` for images."""
    pipe: Any = cogvideox(rotary=True, image=image)
    pipe.transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=8 if image else 4, out_channels=4,
        time_embed_dim=8, text_embed_dim=32, sample_height=32, sample_width=32, sample_frames=9, patch_size=2,
        patch_size_t=2, patch_bias=False, max_text_seq_length=16, use_rotary_positional_embeddings=True,
        ofs_embed_dim=8 if image else None,
    )  # fmt: skip
    pipe.vae.register_to_config(invert_scale_latents=image)
    return pipe


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.slow(seconds=5)
def test_cogvideox_of_1_5_is_its_pipeline_and_exported(tmp_path: Path, image: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        later_cogvideox(image).save_pretrained(tmp_path / "teacher")
    case = Case(source=str(tmp_path / "teacher"), size=VideoSize(13, 32, 48), steps=EVEN)
    for frames, nearest in ((9, 13), (49, 53), (81, 85), (1, 5), (12, 13)):
        with pytest.raises(ValueError, match=rf"frames must be 8k \+ 5 .*nearest is {nearest} frames of 32x48"):
            case.teacher.check_size(VideoSize(frames, 32, 48))
    case.teacher.check_size(VideoSize(85, 32, 48))
    checks.layout(case, tmp_path)
    assert checks.replay(case, tmp_path) < 1e-4
    assert trained.export_pipeline(case, tmp_path) < 1e-3


def test_cogvideox_decodes_as_many_frames_as_it_was_given(tiny: dict[str, Path]) -> None:
    backbone = teacher(tiny["cogvideox"], "cogvideox")
    for frames in (1, 5, 9, 13):
        video = torch.zeros(1, 3, frames, 16, 16)
        assert backbone.decode_latents(backbone.encode_videos(video)).shape == video.shape


def test_learned_positions_are_for_one_height_and_width(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_configs(tiny["cogvideox_i2v"], tmp_path / "teacher")
    change_config(folder, "transformer", lambda config: config.update(use_learned_positional_embeddings=True))
    backbone = teacher(folder, "cogvideox_i2v")
    with pytest.raises(
        ValueError, match=r"the sides 32x32, for which the network has positions; the nearest is 9 frames of 32x32"
    ):
        backbone.check_size(VideoSize(9, 32, 48))
    with pytest.raises(ValueError, match="always takes 16 text tokens"):
        teacher(folder, "cogvideox_i2v", max_sequence_length=8)


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cogvideox", "latte", "ltx", "wan", "hunyuan15"])
def test_large_clips_are_encoded_and_decoded_one_by_one(
    tiny: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, size = teacher(tiny[name], name), TINY[name].size
    videos = torch.rand(3, 3, size.frames, size.height, size.width) * 2 - 1
    together = backbone.encode_videos(videos)
    decoded = backbone.decode_latents(together)
    handed: list[int] = []
    for method in ("encode", "decode"):
        call = getattr(backbone, method)
        monkeypatch.setattr(backbone, method, lambda group, call=call: handed.append(len(group)) or call(group))
    pixels = size.frames * size.height * size.width
    monkeypatch.setattr(encoding, "PIXELS_AT_ONCE", 2 * pixels)
    backbone.decode_latents(backbone.encode_videos(videos))
    assert handed == [2, 1, 2, 1]
    monkeypatch.setattr(encoding, "PIXELS_AT_ONCE", pixels - 1)
    torch.testing.assert_close(backbone.encode_videos(videos), together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone.decode_latents(together), decoded, rtol=1e-5, atol=1e-5)
    assert handed[4:] == [1] * 6


def test_a_vae_is_loaded_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    """Also where the networks are optional to the pipeline's class, as to Wan's."""
    for name in ("wan", "wan22", "wan_i2v"):
        folder = Path(shutil.copytree(tiny[name], tmp_path / name))
        for part in ("transformer", "transformer_2", "text_encoder", "image_encoder"):
            for path in (folder / part).glob("*.safetensors"):
                path.unlink()
        assert teacher(folder, name).loader.vae is not None


@pytest.mark.slow(seconds=1)
def test_tiles_are_for_decoding_alone(tiny: dict[str, Path]) -> None:
    """So that a cache and a checkpoint go with and without them."""
    plain, tiled = teacher(tiny["wan"]), teacher(tiny["wan"])
    tiled.loader.vae_tiling = True
    tiled.loader.vae.enable_tiling(64, 64, 32, 32)
    tiled.loader.vae.disable_tiling()
    video = torch.rand(1, 3, 5, 128, 128) * 2 - 1
    latents = plain.encode_videos(video)
    assert torch.equal(tiled.encode_videos(video), latents)
    ours, theirs = tiled.decode_latents(latents), plain.decode_latents(latents)
    assert ours.shape == theirs.shape
    assert not torch.equal(ours, theirs)
    assert not tiled.loader.vae.use_tiling
    assert tiled.network_identity() == plain.network_identity()
