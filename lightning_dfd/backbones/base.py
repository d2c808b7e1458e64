"""What a family of diffusers video pipelines has to say for itself: a handful of short methods.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, PipelineQuantizationConfig
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from lightning_dfd.backbones.blank import blank_network
from lightning_dfd.backbones.fit import check_parts, features_of
from lightning_dfd.backbones.identity import identity_of, network_identity_of
from lightning_dfd.backbones.loading import load_pipeline, read_config, teacher_not_found
from lightning_dfd.backbones.location import Location, locate, pinned
from lightning_dfd.diffusion.noise import NoiseSchedule, Time, schedule_from_config
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.networks.offload import offload_leaves
from lightning_dfd.networks.quantization import Quantization
from lightning_dfd.types import Conditioning, SampleKind, VideoSize

PIXELS_AT_ONCE = 1 << 24  # that a VAE is handed: about one clip of 49x480x720
TEXT_WIDTHS = ("text_embed_dim", "text_dim", "caption_channels", "in_text_dim")  # what the families' configs call it


class Backbone(ABC):
    """One teacher pipeline, seen as the few things that distillation needs of it.

    It holds no trainable state. `load_transformer` loads the network alone; VAE and text encoder are loaded on
    first use, so that a run on cached latents never touches them. A new family overrides the abstract methods
    (about 40 lines) and is named in a recipe by `model.backbone: my_package.MyBackbone`.

    Args:
        source: folder of a whole diffusers pipeline, or hub id, with `@revision` (branch, tag or commit) or without.
        dtype: precision in which the frozen weights are loaded.
        max_sequence_length: text tokens per prompt; None for what the pipeline's call uses by itself.

    Attributes:
        quantization: of the network that `load_transformer` gives; None for none.
        offload: keep VAE and text encoders on the CPU, but for what is computing.
        vae_tiling: decode in overlapping tiles, for less memory.
    """

    quantization: Quantization | None = None
    offload = False
    vae_tiling = False
    lora_targets: ClassVar[tuple[str, ...]]  # names of the linear layers that LoRA adapts
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")  # the pipeline's components for prompts
    image_parts: ClassVar[tuple[str, ...]] = ()  # and for images, besides the VAE
    least_frames: ClassVar[int] = 1  # of a video
    takes_image: ClassVar[bool] = False  # whether videos begin with a given image; then `encode_images` is there too
    networks: ClassVar[tuple[str, ...]] = ("transformer",)  # the pipeline's components that denoise
    pipeline_class: ClassVar[str | None] = None  # of diffusers, where another is meant than the folder names
    longest_text: ClassVar[int | None] = None  # text tokens for which the network has positions; None without limit

    def __init__(self, source: str, dtype: torch.dtype = torch.float32, max_sequence_length: int | None = None) -> None:
        self.source = str(source)
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.max_sequence_length = self.text_length() if max_sequence_length is None else max_sequence_length
        if self.text_length_is_fixed and self.max_sequence_length != self.text_length():
            raise ValueError(
                f"model.max_sequence_length is {max_sequence_length}, but this pipeline always takes "
                f"{self.text_length()} text tokens; leave it null"
            )
        most = self.longest_text or math.inf
        if max_sequence_length is not None and not 1 <= max_sequence_length <= most:
            upto = "" if math.isinf(most) else f" and at most {most}"
            raise ValueError(
                f"model.max_sequence_length is {max_sequence_length}; this pipeline takes at least 1{upto}, by default "
                f"{self.text_length()}"
            )

    @classmethod
    def variant(cls, pipeline_config: Mapping[str, Any]) -> type[Backbone]:
        """The class for a pipeline's model_index.json, where its `_class_name` alone does not say."""
        return cls

    @cached_property
    def location(self) -> Location:
        """Where the pipeline is: its folder, or the hub's repository at the commit that its revision means now."""
        try:
            return pinned(locate(self.source))
        except OSError as error:
            raise teacher_not_found(self.source, error) from error

    def check_teacher(self) -> None:
        """Refuse, by configs alone, a teacher whose parts do not fit one another or that is not of the kind.

        Raises:
            ValueError: names the parts, what they have, and what they need.
        """
        check_parts(self)

    # ---- what a family says -------------------------------------------------------------------------------

    @abstractmethod
    def text_length(self) -> int:
        """Text tokens per prompt where a recipe does not say."""

    @abstractmethod
    def compression(self) -> tuple[int, int]:
        """(temporal, spatial) compression of the VAE."""

    @abstractmethod
    def normalise(self, latents: Tensor) -> Tensor:
        """From the VAE's latents [B, C, f, h, w] to what the network sees, in its layout."""

    @abstractmethod
    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""

    @abstractmethod
    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """One network call, as the pipeline makes it: x_t [B, ...], timestep [B]; returns the raw output."""

    @abstractmethod
    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        """The stock scheduler with which `pipe(prompt, num_inference_steps=len(steps), guidance_scale=1)`
        samples at exactly these times. Raises ValueError where no stock scheduler does."""

    # ---- what follows from it; override where a family differs ---------------------------------------------

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        """Shape of one clip's latents, without the batch axis, in the backbone's layout: [C, f, h, w]."""
        temporal, spatial = self.compression()
        frames = (size.frames - 1) // temporal + 1
        return self.latent_channels(), frames, size.height // spatial, size.width // spatial

    @property
    def text_length_is_fixed(self) -> bool:
        """Whether pipeline or network leave no choice of text tokens."""
        return False

    def latent_channels(self) -> int:
        """Channels of the latents; of the network's input there may be more, for an image."""
        own = next((self.vae_config[key] for key in ("latent_channels", "z_dim") if key in self.vae_config), None)
        return int(self.transformer_config["in_channels"] if own is None else own)

    def input_channels(self) -> int:
        """Channels that the network has to take."""
        return self.latent_channels()

    def output_channels(self) -> int:
        """Channels that the network has to answer with."""
        return self.latent_channels()

    def encoder_widths(self) -> dict[str, int | None]:
        """Features of a token that the network takes from each of the pipeline's encoders, by the encoder's name; None
        where its config does not say."""
        return {
            "text_encoder": next(
                (self.transformer_config[key] for key in TEXT_WIDTHS if key in self.transformer_config), None
            )
        }

    def features_of(self, name: str, config: Mapping[str, Any]) -> int | None:
        """Features of a token that the encoder `name` gives, by its config; None where that does not say."""
        return features_of(config)

    def patches(self) -> tuple[int, int]:
        """Latent frames, and rows or columns, of one patch of the network's."""
        config = self.transformer_config
        patch = config["patch_size"]
        sides = (patch,) if isinstance(patch, int) else patch
        frames = sides[0] if len(sides) == 3 else config.get("patch_size_t") or 1
        return int(frames), math.lcm(*map(int, sides[-2:]))

    def side_multiple(self) -> int:
        """Height and width have to be multiples of this: one patch of the network's."""
        return self.compression()[1] * self.patches()[1]

    def most_patches(self) -> tuple[int, int, int] | None:
        """Patches along frames, height and width for which the network has positions; None for any number."""
        return None

    def pack(self, latents: Tensor) -> Tensor:
        """From our latents [B, ...] to the layout in which the pipeline's scheduler steps. Only moves numbers."""
        return latents

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of `pack`; `shape` is that of one clip's latents, as `latent_shape` gives it."""
        return packed

    def pipeline_latents(self, latents: Tensor, cond: Conditioning) -> Tensor:
        """What the pipeline's call takes as its `latents`, to begin at ours [B, ...]: packed, with what is given."""
        return self.pack(self.keep_given(latents, cond))

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        """The pipeline's own `num_steps` steps for latents of `shape` (no batch axis), from noise on.

        Raises ValueError, by name, for a scheduler whose steps are not known.
        """
        return teacher_times(self.scheduler_config, num_steps)

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        """How the pipeline's call is told to use classifier-free guidance of this scale; 1 is none."""
        return {"guidance_scale": scale}

    def size_arguments(self, size: VideoSize) -> dict[str, Any]:
        """How the pipeline's call is told what size of video to make."""
        return {"num_frames": size.frames, "height": size.height, "width": size.width}

    def image_arguments(self, image: Any) -> dict[str, Any]:
        """How an image-to-video pipeline's call is given the image with which the video begins."""
        return {"image": image}

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:  # noqa: B027, most families need nothing
        """Set on a stock pipeline what its call takes no arguments for."""

    def preparation(self) -> tuple[str, ...]:
        """`prepare` without guidance as lines of code about `pipe`, for model cards."""
        return ()

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of B prompts, as the pipeline's own call makes it.

        Right for every pipeline whose `encode_prompt` answers (positive, negative), or (positive, its mask,
        negative, its mask): `prompt_embeds` [B, L, D] and `prompt_attention_mask` [B, L].
        """
        return self._encode(prompts)

    def encode_negative(self, prompts: Sequence[str]) -> Conditioning:
        """As `encode_prompts`, of prompts to guide away from, which some pipelines encode in another way."""
        return self.encode_prompts(prompts)

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str], **options: Any) -> Conditioning:
        """`encode_prompts` with further arguments of the pipeline's `encode_prompt`."""
        embeds, *others = self.encoders.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
            **options,
        )
        masks = {"prompt_attention_mask": others[0]} if len(others) == 3 else {}
        return Conditioning({"prompt_embeds": embeds} | masks)

    def targets_in(self, transformer: nn.Module) -> Sequence[str]:
        """The layers of the network that get adapters where a recipe names none."""
        return self.lora_targets

    def blank_transformer(self) -> nn.Module:
        """What `load_transformer` gives, on the meta device and from the config alone."""
        return blank_network(self.transformer_config, self.dtype)

    def blank_prompts(self, batch_size: int) -> Conditioning:
        """Zeros in the shapes of `encode_prompts`, and masks of ones, from the transformer's config alone."""
        tokens = (batch_size, self.max_sequence_length)
        embeds = torch.zeros(*tokens, self.text_width(), dtype=self.dtype)
        mask = torch.ones(tokens, dtype=torch.int64)
        return Conditioning({"prompt_embeds": embeds, "prompt_attention_mask": mask})

    def text_width(self) -> int:
        """Features of a text token."""
        width = next((self.transformer_config[key] for key in TEXT_WIDTHS if key in self.transformer_config), None)
        if width is None:
            raise ValueError(
                f"the transformer's config of {self.source} has none of {', '.join(TEXT_WIDTHS)}, from which the size "
                f"of text embeddings follows; override text_width in {type(self).__name__}"
            )
        return int(width)

    def blank_images(self, batch_size: int, size: VideoSize) -> Conditioning:
        """Zeros in the shapes of `encode_images`."""
        return Conditioning({})

    def prepare_vae(self, vae: Any) -> None:  # noqa: B027, most need nothing
        """Set on a VAE what it cannot do without."""

    def unconditional(self, negative: Conditioning, cond: Conditioning) -> Conditioning:
        """What the network is told in the unguided half of guidance: cond (batch B) with `negative` (1) for prompts."""
        return cond | negative.expand(cond.batch_size)

    def encode_images(self, images: Tensor, frames: int) -> Conditioning:
        """What the network is told of the images [B, C, H, W], in [-1, 1], with which videos of `frames` begin.

        Joined to the prompts' conditioning; kept where a negative prompt takes the prompt's place. Nothing for
        text-to-video.
        """
        return Conditioning({})

    def network_input(self, x_t: Tensor, cond: Conditioning) -> Tensor:
        """What the network is handed in place of x_t [B, ...]: with the image's channels, or its frame, in it."""
        return self.keep_given(x_t, cond)

    def keep_given(self, latents: Tensor, cond: Conditioning) -> Tensor:
        """Latents [B, ...] with what the image fixes in them put back; for most teachers it fixes nothing."""
        return latents

    def finish(self, latents: Tensor) -> Tensor:
        """Sampled latents [B, ...] as the pipeline's call returns and decodes them: mostly as they are."""
        return latents

    def x0(self, transformer: Any, x_t: Tensor, t: Time, cond: Conditioning) -> Tensor:
        """The network's estimate of the clean latents, float32: x_t [B, ...] float32, t [B] in [0, 1] or a level."""
        output = self.call(transformer, x_t, self.schedule.timestep(t), cond)
        return self.keep_given(self.schedule.to_x0(output.float(), x_t, t), cond)

    @torch.no_grad()
    def encode_videos(self, videos: Tensor) -> Tensor:
        """Latents as the network sees them, float32, of videos [B, C, F, H, W] in [-1, 1].

        The mean of the VAE's posterior, so that a cache does not depend on a draw. Few at a time, as in decoding.
        """
        groups = videos.split(clips_at_once(videos[0, 0].numel()))
        latents = [self.encode(group.to(self.device, self.vae.dtype)) for group in groups]
        return self.normalise(torch.cat(latents).float())

    def encode(self, videos: Tensor) -> Tensor:
        """The VAE's encoder: videos [B, C, F, H, W] to latents [B, C, f, h, w] as it gives them."""
        latents: Tensor = self.vae.encode(videos).latent_dist.mode()
        return latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Videos [B, C, F, H, W] in [-1, 1], float32.

        Large ones clip by clip: a VAE takes gigabytes for one, and some fail where a tensor passes 2^31 elements.
        """
        scaled = self.denormalise(latents.to(self.device).float()).to(self.vae.dtype)
        temporal, spatial = self.compression()
        frames, height, width = scaled.shape[2:]
        groups = scaled.split(clips_at_once(((frames - 1) * temporal + 1) * height * width * spatial**2))
        with _tiles(self.vae, self.vae_tiling):
            return torch.cat([self.decode(group).float().clamp(-1.0, 1.0) for group in groups])

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's decoder: latents [B, C, f, h, w] as it wants them, to videos [B, C, F, H, W]."""
        frames: Tensor = self.vae.decode(latents).sample
        return frames

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return schedule_from_config(self.scheduler_config)

    @cached_property
    def scheduler_config(self) -> Mapping[str, Any]:
        return read_config(DDIMScheduler, self.location, "scheduler")

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        return read_config(AutoencoderKL, self.location, "vae")

    @cached_property
    def pipeline_config(self) -> Mapping[str, Any]:
        return read_config(DiffusionPipeline, self.location)

    @cached_property
    def transformer_config(self) -> Mapping[str, Any]:
        return read_config(AutoencoderKL, self.location, "transformer")

    def network_config(self, name: str) -> Mapping[str, Any]:
        """The config of one of `networks`."""
        return self.transformer_config if name == "transformer" else read_config(AutoencoderKL, self.location, name)

    def encoder_config(self, name: str) -> Mapping[str, Any] | None:
        """The config of one of `encoder_names`; None where it cannot be reached, as in a folder of a few configs."""
        try:
            return read_config(AutoencoderKL, self.location, name)
        except FileNotFoundError:
            return None

    @property
    def pipeline_name(self) -> str:
        return self.pipeline_class or str(self.pipeline_config["_class_name"])

    def load_pipeline(self, **components: Any) -> Any:
        """The pipeline, without the components that are given as None."""
        return load_pipeline(self.location, self.dtype, self.pipeline_class, **components)

    def load_transformer(self) -> nn.Module:
        """The teacher's network, frozen and in evaluation mode. VAE and text encoder are not loaded."""
        transformer: nn.Module = self.load_networks().transformer
        return transformer.eval().requires_grad_(False)

    def load_networks(self) -> Any:
        """The pipeline with nothing but what denoises, quantised if that was asked."""
        options: dict[str, Any] = {}
        if self.quantization is not None:
            config: Any = self.quantization.config(self.dtype)
            options["quantization_config"] = PipelineQuantizationConfig(
                quant_mapping=dict.fromkeys(self.networks, config)
            )
        return self.load_pipeline(vae=None, **dict.fromkeys((*self.text_parts, *self.image_parts)), **options)

    @cached_property
    def vae(self) -> Any:
        """The VAE alone: to decode samples on a cache, whose text embeddings are there."""
        pipe = self.load_pipeline(**dict.fromkeys((*self.networks, *self.text_parts, *self.image_parts)))
        self.prepare(pipe)
        self.prepare_vae(pipe.vae)
        return self._place(pipe.vae)

    @cached_property
    def encoders(self) -> Any:
        """The pipeline with all that encodes prompts and images but without the transformer."""
        pipe = self.load_pipeline(vae=self.vae, **dict.fromkeys(self.networks))
        self.prepare(pipe)
        for name in self.encoder_names:
            self._place(getattr(pipe, name))
        return pipe

    def _place(self, network: Any) -> Any:
        """Freeze an encoder and bring it to the device, or let it go there part by part."""
        network.eval().requires_grad_(False)
        if not self.offload:
            return network.to(self.device)
        offload_leaves(network, self.device)
        return network

    @property
    def encoder_names(self) -> tuple[str, ...]:
        """The networks among the pipeline's parts for prompts and images, without those that it does not have."""
        parts = (*self.text_parts, *self.image_parts)
        encoders = (name for name in parts if name.startswith(("text_encoder", "image_encoder")))
        return tuple(name for name in encoders if (self.pipeline_config.get(name) or [None])[0] is not None)

    def to(self, device: torch.device) -> None:
        """Where VAE and text encoder run, now or once they are loaded."""
        moved = device != self.device
        self.device = device
        for name in ("vae", "encoders"):
            if moved and name in self.__dict__:
                if self.offload:
                    del self.__dict__[name]  # its hooks know the old device; loaded again on next use
                else:
                    getattr(self, name).to(device)

    def check_size(self, size: VideoSize) -> None:
        """Raise ValueError, naming the nearest size that works, for one that does not fit."""
        nearest = self.nearest_size(size)
        if nearest != size:
            largest = self.largest_size()
            too_large = largest is not None and any(
                getattr(size, side) > getattr(largest, side) for side in ("frames", "height", "width")
            )
            rule = f"the network has positions for at most {largest}" if too_large else self.size_rule()
            raise ValueError(
                f"{size} does not fit {self.source}: {rule}; "
                f"the nearest is {nearest} (data.frames, data.height, data.width)"
            )

    def nearest_size(self, size: VideoSize) -> VideoSize:
        """The size nearest to `size` that pipeline, network and VAE can make; of two the longer."""
        (temporal, _), (patch, _), multiple = self.compression(), self.patches(), self.side_multiple()
        latents = max(1, math.floor(((size.frames - 1) / temporal + 1) / patch + 0.5)) * patch
        nearest = VideoSize(
            frames=max(self.least_frames, (latents - 1) * temporal + 1),
            height=max(1, round(size.height / multiple)) * multiple,
            width=max(1, round(size.width / multiple)) * multiple,
        )
        largest = self.largest_size()
        if largest is None:
            return nearest
        return VideoSize(
            *(min(getattr(nearest, side), getattr(largest, side)) for side in ("frames", "height", "width"))
        )

    def largest_size(self) -> VideoSize | None:
        """The longest, highest and widest video for which the network has positions; None for no limit."""
        most = self.most_patches()
        if most is None:
            return None
        (temporal, spatial), (frames, side), multiple = self.compression(), self.patches(), self.side_multiple()
        height, width = (count * side * spatial // multiple * multiple for count in most[1:])
        return VideoSize((most[0] * frames - 1) * temporal + 1, height, width)

    def size_rule(self) -> str:
        """The rule of `nearest_size` in words."""
        temporal, patch = self.compression()[0], self.patches()[0]
        least = f", at least {self.least_frames}," if self.least_frames > 1 else ""
        frames = f"{temporal * patch}k + {temporal * (patch - 1) + 1}"
        return f"frames must be {frames}{least} and both sides multiples of {self.side_multiple()}"

    def identity(self) -> dict[str, str]:
        """What decides latents and embeddings, so that a cache can be refused for another teacher.

        Configs, weights and tokenizers count by content: another name or folder makes no other teacher, another commit
        of a hub repository only if one of these differs in it.

        Raises:
            FileNotFoundError: the weights are neither here nor known to the hub.
        """
        return identity_of(self)

    def network_identity(self) -> dict[str, str]:
        """`identity`, and what decides the teacher's own samples besides."""
        return self.identity() | network_identity_of(self)


def clips_at_once(pixels: int) -> int:
    """Clips of so many pixels (frames included) that a VAE is handed together."""
    return max(1, PIXELS_AT_ONCE // pixels)


@contextmanager
def _tiles(vae: Any, wanted: bool) -> Iterator[None]:
    """Within it the VAE works on tiles, if wanted; encoding never does, so that latents are the same either way."""
    change = wanted and not getattr(vae, "use_tiling", False)
    if change:
        vae.enable_tiling()
    try:
        yield
    finally:
        if change:
            vae.disable_tiling()


def cleaned_captions() -> dict[str, bool]:
    """That captions be cleaned, as some calls have it by default, which warn at each where packages for it lack."""
    return {"clean_caption": is_bs4_available() and is_ftfy_available()}
