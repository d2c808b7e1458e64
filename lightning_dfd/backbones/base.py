"""What a family of diffusers video pipelines says: a handful of short methods.

`Backbone` holds the calls of the network. What else a family can say is in its three bases, one topic each: `Family`
(family.py), `StockPipeline` (stock.py) and `Encoding` (encoding.py).

Axis legend: B batch, C channels, f, h, w frames, height and width of latents.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dfd.backbones.encoding import Encoding
from lightning_dfd.backbones.fit import check_parts
from lightning_dfd.backbones.identity import encoders_identity, networks_identity
from lightning_dfd.backbones.loader import Loader
from lightning_dfd.backbones.meta import meta_network
from lightning_dfd.backbones.stock import StockPipeline
from lightning_dfd.diffusion.noise import NoiseSchedule, Time, schedule_from_config
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.types import Conditioning, SampleKind


class Backbone(Encoding, StockPipeline):
    """One teacher pipeline, seen as the few things that distillation needs of it.

    It holds no trainable state. A new family overrides the abstract methods (about 40 lines) and is named in a recipe
    by `model.backbone: my_package.MyBackbone`.

    Args:
        source: folder of a whole diffusers pipeline, or hub id, with `@revision` (branch, tag or commit) or without.
        dtype: precision in which the frozen weights are loaded.
        max_sequence_length: text tokens per prompt; None for what the pipeline's call uses by itself.

    Attributes:
        configs: of the pipeline's parts.
        loader: loads these, quantised or offloaded if asked.
    """

    def __init__(self, source: str, dtype: torch.dtype = torch.float32, max_sequence_length: int | None = None) -> None:
        super().__init__(source, dtype, max_sequence_length)
        self.loader = Loader(self)

    @classmethod
    def variant(cls, pipeline_config: Mapping[str, Any]) -> type[Backbone]:
        """The class for a pipeline's model_index.json, where its `_class_name` alone does not say."""
        return cls

    def check_teacher(self) -> None:
        """Refuse, by configs alone, a teacher whose parts do not fit one another or that is not of the kind.

        Raises:
            ValueError: names the parts, what they have, and what they need.
        """
        check_parts(self)

    def identity(self) -> dict[str, str]:
        """What decides latents and embeddings, so that a cache can be refused for another teacher.

        Configs, weights and tokenizers count by content: another name or folder makes no other teacher, another commit
        of a hub repository only if one of these differs in it.

        Raises:
            FileNotFoundError: the weights are neither here nor known to the hub.
        """
        return encoders_identity(self)

    def network_identity(self) -> dict[str, str]:
        """`identity`, and what decides the teacher's own samples besides."""
        return self.identity() | networks_identity(self)

    # ---- the network ---------------------------------------------------------------------------------------

    def load_transformer(self) -> nn.Module:
        """The teacher's network, frozen and in evaluation mode. VAE and text encoder are not loaded."""
        return self.assemble(*map(self.loader.network, self.networks))

    def meta_transformer(self) -> nn.Module:
        """What `load_transformer` gives, on the meta device and from configs alone."""
        return self.assemble(*(meta_network(self.configs.part(name), self.dtype) for name in self.networks))

    def assemble(self, *networks: nn.Module) -> nn.Module:
        """The network that is called and trained, of the pipeline's `networks`."""
        (network,) = networks
        return network

    def targets_in(self, transformer: nn.Module) -> Sequence[str]:
        """The layers of the network that get adapters where a recipe names none."""
        return self.lora_targets

    @abstractmethod
    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """One network call, as the pipeline makes it: x_t [B, ...], timestep [B]; returns the raw output."""

    def network_input(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """What the network is handed in place of x_t [B, ...]: with the image's channels, or its frame, in it."""
        return self.keep_given(x_t, cond)

    def keep_given(self, latents: Tensor, cond: Conditioning) -> Tensor:
        """Latents [B, ...] with what the image fixes in them put back; for most teachers it fixes nothing."""
        return latents

    def unconditional(self, negative: Conditioning, cond: Conditioning) -> Conditioning:
        """What the network is told in the unguided half of guidance: cond (batch B) with `negative` (1) for prompts."""
        return cond | negative.expand(cond.batch_size)

    def x0(self, transformer: Any, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """The network's estimate of the clean latents, float32: x_t [B, ...] float32, t [B] in [0, 1] or a level.

        Raises:
            ValueError: the times are per frame, which no family takes yet.
        """
        if isinstance(t, Tensor) and t.ndim > 1:
            raise ValueError(f"{type(self).__name__} takes one time per clip, [B]; got times {list(t.shape)}")
        output = self.call(transformer, x_t, self.schedule.timestep(t), cond)
        return self.keep_given(self.schedule.to_x0(output.float(), x_t, t), cond)

    # ---- its schedulers, and the latents that these step ---------------------------------------------------

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise levels on which the network was trained, and what it predicts."""
        return schedule_from_config(self.configs.scheduler, self.frame_axis)

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        """The pipeline's own `num_steps` steps for latents of `shape` (no batch axis), from noise on.

        Raises ValueError, by name, for a scheduler whose steps are not known.
        """
        return teacher_times(self.configs.scheduler, num_steps)

    @abstractmethod
    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        """The stock scheduler with which `pipe(prompt, num_inference_steps=len(steps), guidance_scale=1)`
        samples at exactly these times. Raises ValueError where no stock scheduler does."""

    def pack(self, latents: Tensor) -> Tensor:
        """From our latents [B, ...] to the layout in which the pipeline's scheduler steps. Only moves numbers."""
        return latents

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `pack`; `shape` is that of one clip's latents, as `latent_shape` gives it."""
        return packed

    def pipeline_latents(self, latents: Tensor, cond: Conditioning) -> Tensor:
        """What the pipeline's call takes as its `latents`, to begin at ours [B, ...]: packed, with what is given."""
        return self.pack(self.keep_given(latents, cond))

    def finish(self, latents: Tensor) -> Tensor:
        """Sampled latents [B, ...] as the pipeline's call returns and decodes them: mostly unchanged."""
        return latents
