"""What a recipe needs: memory by term, disk for its cache, and work in an iteration. Only configs are read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dfd.backbones import Backbone
from lightning_dfd.backbones.encoding import clips_at_once
from lightning_dfd.backbones.meta import meta_network
from lightning_dfd.plan.components import (
    meta_encoders,
    replace_tensors,
    size_of,
    spared_by_offload,
    spared_by_quantization,
)
from lightning_dfd.plan.meter import Meter
from lightning_dfd.plan.rehearsal import Turn, rehearse
from lightning_dfd.training.module import DistillationModule
from lightning_dfd.types import Role, VideoSize

DECODING = "decoding of samples"
SAMPLED = 8  # videos that callbacks sample together by default


@dataclass(frozen=True)
class Setup:
    """A recipe, as far as it decides about memory.

    Args:
        module: without networks; it stays as it is.
        cached: whether latents come from a cache.
        precision: the trainer's, as `bf16-mixed`.
        device: `cuda` or `cpu`: whose rules of mixed precision and of optimizers count.
        samples: whether videos are sampled while training, by callbacks.
    """

    module: DistillationModule
    size: VideoSize
    batch_size: int
    cached: bool
    precision: str
    device: str = "cuda"
    samples: bool = False


@dataclass(frozen=True)
class Estimate:
    """Bytes, of one device, and floating point operations.

    Args:
        base: the frozen teacher's weights and buffers.
        weights: trained ones of each role, the average's, and those of terms' modules.
        states: the optimizers' of each role; those of terms' modules are with the fake score's.
        turns: most bytes alive in a role's update, all of the above included.
        vae: weights.
        text: weights of the text encoders; None if their configs are not there.
        encoding: most bytes that the VAE holds while it encodes one batch, besides its weights.
        decoding: the same, while it decodes sampled videos: one clip, of small ones several.
        samples: whether that happens while training.
        cached: whether VAE and text encoders are left out of training.
        offload: whether they wait on the CPU.
        latents, embedding: on disk, of a clip and of a caption.
        student_share: of the iterations in which the student is updated.
    """

    base: int
    weights: Mapping[str, int]
    states: Mapping[str, int]
    turns: Mapping[Role, Turn]
    vae: int
    text: int | None
    encoding: int
    decoding: int
    samples: bool
    cached: bool
    offload: bool
    latents: int
    embedding: int
    student_share: float

    @property
    def encoders(self) -> int:
        """Weights that stay in memory only to encode while training."""
        return 0 if self.cached or self.offload else self.vae + (self.text or 0)

    @property
    def decoder(self) -> int:
        """Weights of the VAE, where it is in memory for samples alone."""
        return self.vae if self.cached and not self.offload else 0

    @property
    def resident(self) -> int:
        """What is there all the time from the second iteration on."""
        return self.base + sum(self.weights.values()) + sum(self.states.values()) + self.encoders

    @property
    def caching(self) -> int:
        """The peak of `lightning cache`."""
        return self.encoding + (0 if self.offload else self.vae + (self.text or 0))

    @cached_property
    def peaks(self) -> dict[str, int]:
        """The most bytes alive, by what training is doing."""
        peaks = {f"{role} update": turn.peak + self.encoders for role, turn in self.turns.items()}
        if not self.cached:
            peaks["encoding"] = self.resident + self.encoding
        if self.samples:
            peaks[DECODING] = self.resident + self.decoder + self.decoding
        return peaks

    @property
    def peak(self) -> int:
        return max(self.peaks.values())

    @cached_property
    def terms(self) -> dict[str, int]:
        """The bytes at the peak of training, by what they are."""
        busiest = max(self.peaks, key=lambda name: self.peaks[name])
        terms = {"teacher": self.base}
        terms |= {f"{role} weights": size for role, size in self.weights.items()}
        terms |= {f"{role} optimizer states": size for role, size in self.states.items()}
        terms |= {"VAE": self.vae, "text encoders": self.text or 0} if self.encoders else {}
        terms |= {"VAE": self.decoder} if busiest == DECODING and self.decoder else {}
        for role, turn in self.turns.items():
            if busiest == f"{role} update":
                terms[f"{role} gradients"] = turn.gradients
        return terms | {f"activations and temporaries of the {busiest}": self.peak - sum(terms.values())}

    @property
    def flops(self) -> float:
        """Of a mean iteration."""
        student, fake = (self.turns[role].flops for role in ("student", "fake"))
        return student * self.student_share + fake * (1.0 - self.student_share)


def estimate(setup: Setup, tell: Callable[[str], None] = lambda _: None) -> Estimate:
    """Play a recipe's iteration through without weights.

    Args:
        tell: hears what is done next; the whole takes minutes for large networks.

    Raises:
        FileNotFoundError: the teacher's configs cannot be reached.
        ValueError: the size does not fit the teacher, or its calls are not known from its configs.
    """
    prompts = setup.module.backbone.dummy_prompts(1)  # refuses where nothing can be planned, before it is copied
    setup.module.backbone.check_size(setup.size)
    module = copy.deepcopy(setup.module)
    backbone = module.backbone
    tell(f"one update of the student and one of the fake score, {setup.size}")
    done = rehearse(module, setup.size, setup.batch_size, setup.precision, setup.device)
    spared = _spared(module)
    tell("the text encoders")
    text = meta_encoders(backbone)
    tell("encoding and decoding by the VAE")
    vae, encoding, decoding = measure_vae(backbone, setup.size, 1 if setup.cached else setup.batch_size)
    half = backbone.dtype in (torch.bfloat16, torch.float16)  # what `lightning cache` stores
    images = backbone.dummy_images(1, setup.size).tensors.values()
    latents = torch.Size(backbone.latent_shape(setup.size)).numel() + sum(tensor.numel() for tensor in images)
    return Estimate(
        base=done.base - spared,
        weights=done.weights,
        states=done.states,
        turns={role: replace(turn, peak=turn.peak - spared) for role, turn in done.turns.items()},
        vae=vae,
        text=None if text is None else sum(map(size_of, text.values())),
        encoding=encoding,
        decoding=decoding,
        samples=setup.samples,
        cached=setup.cached,
        offload=backbone.loader.offload,
        latents=latents * (2 if half else 4),
        embedding=sum(tensor.nbytes for tensor in prompts.tensors.values()),
        student_share=1.0 / module.dmd.student_update_freq,
    )


def _spared(module: DistillationModule) -> int:
    """Bytes of the teacher that quantisation saves, or that wait on the CPU."""
    backbone = module.backbone
    network = backbone.meta_transformer()
    if backbone.loader.quantization is not None:
        return spared_by_quantization(network, backbone.loader.quantization)
    return spared_by_offload(network) if backbone.loader.offload and module.student.mode == "full" else 0


def measure_vae(backbone: Backbone, size: VideoSize, batch_size: int) -> tuple[int, int, int]:
    """Bytes of the VAE's weights, and the most that it holds besides while it encodes a batch of videos and while it
    decodes sampled ones."""
    backbone = copy.copy(backbone)
    vae = meta_network(backbone.configs.vae, backbone.dtype)
    backbone.prepare_vae(vae)
    together = min(SAMPLED, clips_at_once(size.frames * size.height * size.width))
    with Meter() as meter, FakeTensorMode(allow_non_fake_inputs=True):
        replace_tensors(vae, lambda like: torch.empty(like.shape, dtype=like.dtype))
        weights = meter.live
        backbone.loader = copy.copy(backbone.loader)
        backbone.loader.vae = vae
        backbone.encode_videos(torch.empty(batch_size, 3, size.frames, size.height, size.width))
        encoding = meter.peak - weights
        meter.restart()
        backbone.decode_latents(torch.empty(together, *backbone.latent_shape(size)))
    return weights, encoding, meter.peak - weights
