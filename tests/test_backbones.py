"""What backbones load, and what they refuse. That they are their pipelines is in test_contract.py."""

from __future__ import annotations

import pytest
import torch

from lightning_dfd.backbones import Backbone, backbone_from_pretrained
from lightning_dfd.types import VideoSize


def test_latent_layout_round_trip(backbone: Backbone, size: VideoSize) -> None:
    videos = torch.rand(2, 3, size.frames, size.height, size.width) * 2 - 1
    latents = backbone.encode_videos(videos)
    assert latents.shape == (2, *backbone.latent_shape(size))
    with torch.no_grad():
        raw = backbone.encode(videos)
    torch.testing.assert_close(backbone.denormalise(backbone.normalise(raw)), raw, rtol=1e-5, atol=1e-5)


def test_transformer_is_loaded_without_the_encoders(backbone: Backbone) -> None:
    backbone.load_transformer()
    assert not {"encoders", "vae"} & set(vars(backbone))


def test_sizes_that_do_not_divide_are_refused(backbone: Backbone, size: VideoSize) -> None:
    backbone.check_size(size)
    with pytest.raises(ValueError, match=f"nearest is {size}"):
        backbone.check_size(VideoSize(size.frames + 1, size.height + 1, size.width + 2))


def test_missing_and_unknown_teachers_are_named(tmp_path, tiny: dict) -> None:
    with pytest.raises(FileNotFoundError, match="hf download"):
        backbone_from_pretrained(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="not a subclass"):
        backbone_from_pretrained(str(tiny["wan"]), backbone="torch.nn.Linear")
    (tmp_path / "model_index.json").write_text('{"_class_name": "SomePipeline"}')
    with pytest.raises(ValueError, match=r"SomePipeline.*CogVideoXPipeline"):
        backbone_from_pretrained(str(tmp_path))
