"""Loading a pipeline's parts, each when it is first needed: networks, VAE, encoders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_dfd.backbones.loading import load_part, load_pipeline
from lightning_dfd.backbones.stock import StockPipeline
from lightning_dfd.networks.offload import offload_leaves
from lightning_dfd.networks.quantization import Quantization


class Loader:
    """The parts of one teacher's pipeline, frozen and in evaluation mode.

    A run on cached latents never touches VAE and text encoders, so these are loaded on first use.

    Args:
        stock: the teacher.

    Attributes:
        device: where VAE and encoders run.
        quantization: of the networks; None for none.
        offload: keep VAE and encoders on the CPU, except while they compute.
        vae_tiling: decode in overlapping tiles, for less memory.
    """

    def __init__(self, stock: StockPipeline) -> None:
        self.stock = stock
        self.device = torch.device("cpu")
        self.quantization: Quantization | None = None
        self.offload = False
        self.vae_tiling = False

    def pipeline(self, **components: Any) -> Any:
        """The stock pipeline, without the parts that are given as None."""
        stock = self.stock
        return load_pipeline(stock.configs.location, stock.dtype, stock.pipeline_class, **components)

    def network(self, name: str) -> nn.Module:
        """One of the teacher's networks, quantised if that was asked. Nothing else is loaded."""
        options: dict[str, Any] = {}
        if self.quantization is not None:
            options["quantization_config"] = self.quantization.config(self.stock.dtype)
        return self._part(name, **options).eval().requires_grad_(False)

    @cached_property
    def vae(self) -> Any:
        """The VAE alone: to decode samples on a cache, whose text embeddings are there."""
        vae = self._part("vae")
        self.stock.prepare_vae(vae)
        return self._placed(vae)

    @cached_property
    def encoders(self) -> Any:
        """The pipeline with all that encodes prompts and images, but without the networks that denoise."""
        pipe = self.pipeline(vae=self.vae, **self.stock.stand_ins())
        for name in self.stock.networks:
            setattr(pipe, name, None)
        self.stock.prepare(pipe)
        for name in self.stock.configs.encoders:
            self._placed(getattr(pipe, name))
        return pipe

    @property
    def loaded(self) -> set[str]:
        """Which of `vae` and `encoders` are in memory."""
        return {"vae", "encoders"} & set(vars(self))

    def release(self, *names: str) -> None:
        """Let `vae` or `encoders` go; they are loaded again on their next use."""
        for name in names:
            vars(self).pop(name, None)

    def to(self, device: torch.device) -> None:
        """Where VAE and encoders run, now or once they are loaded."""
        moved, self.device = device != self.device, device
        if moved and self.offload:
            self.release("vae", "encoders")  # their hooks know the old device
        elif moved:
            for name in self.loaded:
                getattr(self, name).to(device)

    @contextmanager
    def tiles(self) -> Iterator[None]:
        """Within it the VAE works on tiles, if `vae_tiling`. Encoding never does: latents are the same either way."""
        change = self.vae_tiling and not getattr(self.vae, "use_tiling", False)
        if change:
            self.vae.enable_tiling()
        try:
            yield
        finally:
            if change:
                self.vae.disable_tiling()

    def _part(self, name: str, **options: Any) -> nn.Module:
        configs = self.stock.configs
        return load_part(configs.location, name, configs.parts[name], self.stock.dtype, **options)

    def _placed(self, network: nn.Module) -> nn.Module:
        """Freeze an encoder and bring it to the device, or let it go there layer by layer."""
        network.eval().requires_grad_(False)
        if self.offload:
            offload_leaves(network, self.device)
            return network
        return network.to(self.device)
