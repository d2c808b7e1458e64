"""Any pipeline that can be understood by watching it: the fallback where there is no backbone for a family.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import diffusers
import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor, nn

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.blank import dtype_of
from lightning_dfd.backbones.captured.inference import (
    TOLERANCE,
    CaptureRefused,
    Facts,
    Failed,
    Latents,
    find_layout,
    find_prompt,
    find_scaling,
    learn_inputs,
    raw_shape,
)
from lightning_dfd.backbones.captured.recorder import Recording, first_order, first_tensor, mapped, record
from lightning_dfd.backbones.fit import refuse_quantised
from lightning_dfd.backbones.flow import few_step_flow_scheduler, few_step_own_scheduler
from lightning_dfd.backbones.loading import parts_of
from lightning_dfd.diffusion.noise import Time
from lightning_dfd.diffusion.sampler import Rollout, sample, stateless
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.objectives import guide
from lightning_dfd.types import Conditioning, SampleKind, VideoSize

STEPS, GUIDANCE = 4, 3.0  # of the proof's runs
PROMPT, OTHERS, NEGATIVE = "a cat", ("two dogs", ""), "bad"
MEASURED = VideoSize(25, 64, 64)  # a clip by which the VAE's compression is measured
ARGUMENTS = ("prompt", "num_inference_steps", "generator", "latents", "output_type")

_PROVEN: dict[str, Facts] = {}  # by what decides a teacher's samples: a process proves a teacher once


class CapturedBackbone(Backbone):
    """Calls the network as its pipeline was seen to call it, after proof that this gives the pipeline's own latents.

    What a prompt is to the network is found out by running the pipeline up to its first network call. The proof runs
    the whole pipeline twice for 4 steps at a small size, when the backbone is first used. Where one of its checks fails
    it refuses and names the check. A subclass may override what comes out wrong; the proof then tries its methods.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, source: str, dtype: torch.dtype = torch.float32, max_sequence_length: int | None = None) -> None:
        self.source = str(source)
        self.pipeline = str(self.pipeline_config["_class_name"])
        self.parts = {name: kind for name, (_, kind) in parts_of(self.pipeline_config).items()}
        if not {"transformer", "vae", "scheduler"} <= self.parts.keys():
            seen = f"the components are {', '.join(self.parts)}; needed are transformer, vae and scheduler"
            raise self._refused("call", seen)
        self.text_parts = tuple(name for name in self.parts if name.startswith(("text_", "tokenizer")))
        if unknown := [name for name in (self.pipeline, self.parts["transformer"]) if not hasattr(diffusers, name)]:
            raise self._refused("call", f"diffusers has no {unknown[0]}")
        if max_sequence_length is not None and "max_sequence_length" not in self._parameters:
            raise ValueError(
                f"model.max_sequence_length is {max_sequence_length}, but {self.pipeline} takes none; leave it null"
            )
        self._seen: dict[tuple[VideoSize, int], Recording] = {}
        super().__init__(source, dtype, max_sequence_length)

    # ---- what the pipeline was seen to do -----------------------------------------------------------------

    @cached_property
    def facts(self) -> Facts:
        """Learned from the pipeline, and proven; once a process for a teacher. Raises CaptureRefused."""
        key = str([type(self), self.network_identity()])
        if key not in _PROVEN:
            try:
                with self._whole_pipeline() as pipe:
                    _PROVEN[key] = self._learn_and_prove(pipe)
            except Failed as failure:
                raise self._refused(*failure.args) from failure
        return _PROVEN[key]

    def _refused(self, check: str, seen: str) -> CaptureRefused:
        return CaptureRefused(self.pipeline, check, seen)

    @contextmanager
    def _whole_pipeline(self) -> Iterator[Any]:
        """The pipeline with its network, in place of `encoders`, on an accelerator where there is one."""
        before = self.device
        pipe = self.load_pipeline()
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
        for name in ("transformer", "vae", *self.encoder_names):
            getattr(pipe, name).eval().requires_grad_(False).to(self.device)
        self.encoders, self.vae = pipe, pipe.vae
        try:
            yield pipe
        finally:
            self.device = before
            self._seen.clear()
            for name in ("encoders", "vae"):
                self.__dict__.pop(name, None)

    def _learn_and_prove(self, pipe: Any) -> Facts:
        own = pipe.scheduler
        pipe.scheduler = first_order(own)
        size, temporal, spatial, multiple, raw = self._smallest(pipe)
        try:
            run = self._whole_run(pipe, size, output_type="pt")
        except CaptureRefused:  # some take no scheduler but their own
            pipe.scheduler = own
            run = self._whole_run(pipe, size, output_type="pt")
        inputs = learn_inputs(run, STEPS)
        longer = VideoSize(4 * temporal + 1, size.width, size.height)
        others = [(prompt, size) for prompt in OTHERS] + [(PROMPT, longer)]
        inputs = find_prompt(inputs, [run.calls[0], *(self._first_call(*other).calls[0] for other in others)])
        order, channels = find_layout(run.steps[0].sample, raw, temporal, spatial, size)
        unit = torch.ones(channels)
        latents = Latents(order, channels, temporal, spatial, multiple, 0 * unit, unit)
        self.facts = Facts(inputs, latents)  # the proof calls our methods, which go by it
        try:
            self._learn_scaling(run)
            self._prove(pipe, run, size)
            return self.facts
        finally:
            del self.facts

    def _smallest(self, pipe: Any) -> tuple[VideoSize, int, int, int, tuple[int, ...]]:
        """A small size that the pipeline takes, the VAE's compression, the multiple of sides, its latents' shape."""
        clip = torch.zeros(1, 3, MEASURED.frames, MEASURED.height, MEASURED.width)
        try:
            latents = pipe.vae.encode(clip.to(self.device, pipe.vae.dtype)).latent_dist.mode()
            raw = tuple(latents.shape)
            temporal, spatial = (MEASURED.frames - 1) // max(raw[2] - 1, 1), MEASURED.height // raw[3]
        except Exception as error:
            raise self._refused(
                "layout", f"its {type(pipe.vae).__name__} does not encode {MEASURED}: {error}"
            ) from error
        if raw_shape(raw[1], temporal, spatial, MEASURED) != raw:
            raise self._refused("layout", f"its {type(pipe.vae).__name__} makes {raw} of {MEASURED}")
        patch = self.transformer_config.get("patch_size", 1)
        base = spatial * (patch if isinstance(patch, int) else patch[-1])
        for multiple in (base, 2 * base, 4 * base):
            size = VideoSize(temporal + 1, 2 * multiple, 3 * multiple)
            try:
                self._first_call(PROMPT, size)
            except CaptureRefused as failure:
                reason = failure
                continue
            return size, temporal, spatial, multiple, raw
        raise reason

    # ---- the proof ----------------------------------------------------------------------------------------

    def _learn_scaling(self, run: Recording) -> None:
        """The VAE's scaling, by decoding the run's latents as its pipeline did."""

        def decoded(mean: Tensor, std: Tensor) -> Tensor:
            self.facts = replace(self.facts, latents=replace(self.facts.latents, mean=mean, std=std))
            return (self.decode_latents(run.steps[-1].result).transpose(1, 2) + 1) / 2

        decoded(*find_scaling(self.vae, decoded, run.result.float()))

    @torch.no_grad()
    def _prove(self, pipe: Any, run: Recording, size: VideoSize) -> None:
        """Our calls and our sampler against the runs of the pipeline."""
        cond, other = (self.encode_prompts([prompt]) for prompt in (PROMPT, OTHERS[0]))
        negative = self.encode_negative([NEGATIVE])
        noised = torch.cat([step.sample.float() for step in run.steps])
        timesteps = torch.stack([step.timestep.flatten()[0] for step in run.steps]).to(noised.device)
        both = Conditioning.cat([cond.expand(STEPS), other.expand(STEPS)])  # other rows that must not matter
        output = self.call(pipe.transformer, torch.cat([noised] * 2), torch.cat([timesteps] * 2), both)[:STEPS]
        self._compare("batch", output, torch.cat([step.output for step in run.steps]))

        try:
            times = teacher_times(_config(pipe.scheduler), STEPS, **run.own)
            schedule = self.schedule
        except (ValueError, KeyError) as error:
            raise self._refused(
                "replay", f"no noise schedule is known for {type(pipe.scheduler).__name__}: {error}"
            ) from error

        def denoise(x_t: Tensor, t: Time, scale: float = 1.0) -> Tensor:
            x0 = self.x0(pipe.transformer, x_t, t, cond)
            return x0 if scale == 1 else guide(self.x0(pipe.transformer, x_t, t, negative), x0, scale)

        unguided = sample(stateless(denoise), schedule, Rollout(noised[:1]), times).latents
        self._compare("replay", unguided, run.steps[-1].result, "without guidance: ")
        guided = self._whole_run(pipe, size, GUIDANCE, output_type="latent", negative_prompt=NEGATIVE)
        noise = guided.steps[0].sample.float()
        ours = sample(stateless(partial(denoise, scale=GUIDANCE)), schedule, Rollout(noise), times).latents
        if not isinstance(guided.result, Tensor) or guided.result.shape != ours.shape:
            seen = f"the pipeline returns latents {tuple(guided.result.shape)}, its steps are on {tuple(ours.shape)}"
            raise self._refused("history", seen)
        self._compare("replay", ours, guided.result, f"with guidance {GUIDANCE:g}: ")

    def _compare(self, check: str, ours: Tensor, theirs: Tensor, where: str = "") -> None:
        if ours.shape != theirs.shape:
            raise self._refused(check, f"ours are {tuple(ours.shape)}, the pipeline's {tuple(theirs.shape)}")
        ours, theirs = ours.float(), theirs.float()
        error = float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())
        if not error <= TOLERANCE[self.dtype]:
            raise self._refused(
                check, f"{where}relative difference {error:.1e}, allowed is {TOLERANCE[self.dtype]:.0e}"
            )

    # ---- runs of the pipeline -----------------------------------------------------------------------------

    def _whole_run(self, pipe: Any, size: VideoSize, scale: float = 1.0, **arguments: Any) -> Recording:
        return self._record(pipe, PROMPT, size, STEPS, scale, **arguments)

    def _first_call(self, prompt: str, size: VideoSize, steps: int = STEPS) -> Recording:
        """What the network is first told of a prompt at a size, without its weights."""
        pipe = self.encoders
        network = pipe.transformer
        pipe.transformer = self._blank
        try:
            return self._record(pipe, prompt, size, steps, 1.0, first_call_only=True, output_type="latent")
        finally:
            pipe.transformer = network

    def _record(self, pipe: Any, prompt: str, size: VideoSize, steps: int, scale: float, **arguments: Any) -> Recording:
        sizes = self.size_arguments(size)
        if missing := [name for name in (*ARGUMENTS, *sizes) if name not in self._parameters]:
            raise self._refused("call", f"its call has no {' and no '.join(missing)}")
        arguments |= {"prompt": prompt, "num_inference_steps": steps, **sizes, **self.guidance_arguments(scale)}
        if "max_sequence_length" in self._parameters:
            arguments["max_sequence_length"] = self.max_sequence_length
        self.prepare(pipe, scale)
        try:
            return record(pipe, **arguments)
        except Exception as error:
            raise self._refused(
                "call", f"with a prompt and {size} it stops: {type(error).__name__}: {error}"
            ) from error

    def _at(self, size: VideoSize, steps: int = STEPS) -> Recording:
        """The first call at a size. Text encoders that are loaded for it alone are let go."""
        if (size, steps) not in self._seen:
            held = {"encoders", "vae"} & set(vars(self))
            self._seen[size, steps] = self._first_call(PROMPT, size, steps)
            for name in {"encoders", "vae"} - held:
                self.__dict__.pop(name, None)
        return self._seen[size, steps]

    @cached_property
    def _blank(self) -> nn.Module:
        return self.blank_transformer()

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """Of the pipeline's call."""
        return inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters

    @property
    def small(self) -> VideoSize:
        """The size at which prompts are encoded, which is all the same to them."""
        latents = self.facts.latents
        return VideoSize(latents.temporal + 1, 2 * latents.multiple, 3 * latents.multiple)

    # ---- a backbone by what was learned --------------------------------------------------------------------

    def targets_in(self, transformer: nn.Module) -> Sequence[str]:
        """Those of the usual names that the network has, as its family is not known."""
        paths = [f".{name}" for name, _ in transformer.named_modules()]
        return [target for target in self.lora_targets if any(path.endswith(f".{target}") for path in paths)]

    def text_length(self) -> int:
        """0 for a pipeline whose call takes no `max_sequence_length`."""
        parameter = self._parameters.get("max_sequence_length")
        return 0 if parameter is None else int(parameter.default)

    def compression(self) -> tuple[int, int]:
        return self.facts.latents.temporal, self.facts.latents.spatial

    def side_multiple(self) -> int:
        return self.facts.latents.multiple

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        inputs, shape = self.facts.inputs, self.facts.latents.shape(size)
        seen = inputs.split(self._at(size).calls[0][inputs.sample])[0]
        if seen.shape != shape:
            raise self._refused("history", f"latents of {size} are {tuple(seen.shape)}, not {shape}")
        return shape[1:]

    def normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return ((latents - mean) / std).permute(self.facts.latents.order)

    def denormalise(self, latents: Tensor) -> Tensor:
        order = self.facts.latents.order
        raw = latents.permute([order.index(place) for place in range(len(order))])
        mean, std = self._statistics(raw)
        return raw * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        latents = self.facts.latents
        return latents.mean.view(1, -1, 1, 1, 1).to(like), latents.std.view(1, -1, 1, 1, 1).to(like)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt by prompt: the pipeline is run up to its network for each."""
        calls = [self._first_call(prompt, self.small).calls[0] for prompt in prompts]
        parts = [Conditioning({name: call[name] for name in self.facts.inputs.prompt}) for call in calls]
        return Conditioning.cat(parts).to(self.device)

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": scale} if "guidance_scale" in self._parameters else {}

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        """Give a pipeline that holds a guider one of plain classifier-free guidance."""
        if "guider" in self.parts:
            pipe.guider = _guider(guidance)

    def preparation(self) -> tuple[str, ...]:
        return ("pipe.guider = pipe.guider.new(guidance_scale=1.0)",) if "guider" in self.parts else ()

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        seen = self._at(self.facts.latents.size(shape), num_steps)
        return teacher_times(self.scheduler_config, num_steps, **seen.own)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        inputs, count = self.facts.inputs, len(x_t)

        def as_seen(name: str, value: Tensor) -> Tensor:
            dtype = inputs.dtypes[name]  # the frozen weights' own becomes that of the network which is called
            return value.to(x_t.device, dtype_of(transformer) if dtype == self.dtype else dtype)

        def for_all(value: Tensor) -> Tensor:
            one = value.ndim > 0 and len(value) == 1
            return (value.expand(count, *value.shape[1:]) if one else value).to(x_t.device)

        seen = self._at(self.facts.latents.size(x_t.shape[1:])).calls[0]
        arguments = {name: mapped(value, for_all) for name, value in seen.items()}
        rest = inputs.split(arguments[inputs.sample])[1]
        arguments[inputs.sample] = torch.cat([x_t, rest.to(x_t)], inputs.axis)
        arguments[inputs.timestep] = timestep.view(-1, *(1 for _ in inputs.timestep_shape)).expand(
            count, *inputs.timestep_shape
        )
        arguments |= {name: cond[name] for name in inputs.prompt}
        arguments |= {name: as_seen(name, value) for name, value in arguments.items() if isinstance(value, Tensor)}
        output = first_tensor(transformer(**arguments))
        for axis, length in enumerate(x_t.shape):
            output = output.narrow(axis, 0, length)
        return output

    def few_step_scheduler(self, steps: Sequence[float], kind: SampleKind) -> Any:
        if self.schedule.prediction != "flow":
            name = self.scheduler_config["_class_name"]
            raise ValueError(
                f"no few-step scheduler is known for a pipeline with {name}: override few_step_scheduler in a "
                "backbone of your own (docs/new_backbone.md)"
            )
        own = self._at(self.small, len(steps)).own
        given = own.get("sigmas") or [t / self.schedule.num_train_timesteps for t in own.get("timesteps", ())]
        scheduler = few_step_own_scheduler(steps, kind, given) if given else few_step_flow_scheduler(steps, kind)
        runs_at = [step.start[1] for step in teacher_times(_config(scheduler), len(steps), **own)]
        if max(abs(a - b) for a, b in zip(runs_at, steps, strict=True)) > 1e-4:
            raise ValueError(f"with the stock scheduler the pipeline runs at {runs_at}, the student at {list(steps)}")
        return scheduler

    @cached_property
    def encoders(self) -> Any:
        """The pipeline with VAE and text encoders; its network, without weights, is there only while it runs."""
        pipe = self.load_pipeline(transformer=self._blank, vae=self.vae)
        pipe.transformer = None
        for name in self.encoder_names:
            self._place(getattr(pipe, name))
        return pipe

    def load_transformer(self) -> nn.Module:
        assert self.facts  # the proof comes first
        return super().load_transformer()

    def blank_prompts(self, batch_size: int) -> Conditioning:
        raise ValueError(
            "lightning plan reads nothing but configs, and model.backbone: captured learns how "
            f"{self.pipeline} calls its network by running it; write a backbone for it (docs/new_backbone.md)"
        )

    def check_teacher(self) -> None:
        """By running it, when it is first used; of configs nothing but that no part is stored quantised."""
        refuse_quantised(self)

    def identity(self) -> dict[str, str]:
        return super().identity() | {"backbone": "captured"}


@cache
def _guider(scale: float) -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(guidance_scale=scale)


def _config(scheduler: Any) -> dict[str, Any]:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}
