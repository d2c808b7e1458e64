"""The JSON configs of a pipeline's parts: all that is known of a teacher before its weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline

from lightning_dfd.backbones.loading import parts_of, read_config, teacher_not_found
from lightning_dfd.backbones.location import Location, locate, pinned

ENCODERS = ("text_encoder", "image_encoder")  # how the names of parts begin
PROCESSORS = ("tokenizer", "text_", "image_processor", "feature_extractor")


class Configs:
    """Each config is read when it is first asked for.

    Args:
        source: folder of a whole diffusers pipeline, or hub id, with `@revision` or without.

    Raises:
        FileNotFoundError: by every property, where a config cannot be read.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._others: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def location(self) -> Location:
        """The pipeline's folder, or the hub's repository at the commit that its revision means now."""
        try:
            return pinned(locate(self.source))
        except OSError as error:
            raise teacher_not_found(self.source, error) from error

    @cached_property
    def pipeline(self) -> Mapping[str, Any]:
        """The model_index.json."""
        return read_config(DiffusionPipeline, self.location)

    @cached_property
    def parts(self) -> Mapping[str, tuple[str, str]]:
        """The parts that the pipeline has, by name: library and class."""
        return parts_of(self.pipeline)

    @cached_property
    def scheduler(self) -> Mapping[str, Any]:
        return read_config(DDIMScheduler, self.location, "scheduler")

    @cached_property
    def vae(self) -> Mapping[str, Any]:
        return read_config(AutoencoderKL, self.location, "vae")

    @cached_property
    def transformer(self) -> Mapping[str, Any]:
        return read_config(AutoencoderKL, self.location, "transformer")

    def part(self, name: str) -> Mapping[str, Any]:
        """The config of any network in the pipeline."""
        if name in ("transformer", "vae"):
            return self.transformer if name == "transformer" else self.vae
        if name not in self._others:
            self._others[name] = read_config(AutoencoderKL, self.location, name)
        return self._others[name]

    def encoder(self, name: str) -> Mapping[str, Any] | None:
        """The config of one of `encoders`; None where it cannot be read, as in a folder of a few configs."""
        try:
            return self.part(name)
        except FileNotFoundError:
            return None

    @property
    def encoders(self) -> tuple[str, ...]:
        """The networks that encode prompts and images, besides the VAE; those of prompts first."""
        names = (name for name in self.parts if name.startswith(ENCODERS))
        return tuple(sorted(names, key=lambda name: (name.startswith("image"), name)))

    @property
    def processors(self) -> tuple[str, ...]:
        """The parts without weights that prepare prompts and images for `encoders`."""
        return tuple(name for name in self.parts if name.startswith(PROCESSORS) and name not in self.encoders)
