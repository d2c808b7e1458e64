"""Any pipeline that can be understood by watching it: the fallback where there is no backbone for a family.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import diffusers
import torch
from diffusers import ClassifierFreeGuidance
from torch import Tensor, nn

from lightning_dfd.backbones.base import Backbone
from lightning_dfd.backbones.captured.inference import Facts, Failed
from lightning_dfd.backbones.captured.proof import Proof, scheduler_config
from lightning_dfd.backbones.captured.recorder import first_tensor, mapped
from lightning_dfd.backbones.captured.runs import Runs
from lightning_dfd.backbones.configs import Configs
from lightning_dfd.backbones.fit import refuse_quantised
from lightning_dfd.backbones.flow import few_step_flow_scheduler, few_step_own_scheduler
from lightning_dfd.backbones.meta import dtype_of
from lightning_dfd.backbones.sizes import Sizes
from lightning_dfd.diffusion.noise import NoiseSchedule
from lightning_dfd.diffusion.solvers import SolverStep, teacher_times
from lightning_dfd.types import Conditioning, SampleKind, VideoSize

_PROVEN: dict[str, Facts] = {}  # by what decides a teacher's samples: a process proves a teacher once


class CapturedBackbone(Backbone):
    """Calls the network as its pipeline was seen to call it, after proof that this gives the pipeline's own latents.

    What a prompt is to the network is found out by running the pipeline up to its first network call. The proof runs
    the whole pipeline twice for 4 steps at a small size, when the backbone is first used. Where one of its checks fails
    it refuses and names the check. A subclass may override what comes out wrong; the proof then tries its methods.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "ffn.net.0.proj", "ffn.net.2")

    def __init__(self, source: str, dtype: torch.dtype = torch.float32, max_sequence_length: int | None = None) -> None:
        self.configs = Configs(str(source))
        self.runs = Runs(self)
        parts = {name: kind for name, (_, kind) in self.configs.parts.items()}
        if not {"transformer", "vae", "scheduler"} <= parts.keys():
            seen = f"the components are {', '.join(parts)}; needed are transformer, vae and scheduler"
            raise self.runs.refused("call", seen)
        if unknown := [name for name in (self.runs.pipeline, parts["transformer"]) if not hasattr(diffusers, name)]:
            raise self.runs.refused("call", f"diffusers has no {unknown[0]}")
        if max_sequence_length is not None and "max_sequence_length" not in self.runs.parameters:
            raise ValueError(
                f"model.max_sequence_length is {max_sequence_length}, but {self.runs.pipeline} takes none; "
                "leave it null"
            )
        super().__init__(source, dtype, max_sequence_length)

    @cached_property
    def facts(self) -> Facts:
        """Learned from the pipeline, and proven; once a process for a teacher. Raises CaptureRefused."""
        key = str([type(self), self.network_identity()])
        if key not in _PROVEN:
            try:
                with self.runs.whole_pipeline() as pipe:
                    _PROVEN[key] = Proof(self, self.runs, pipe, self._go_by).facts()
            except Failed as failure:
                raise self.runs.refused(*failure.args) from failure
            finally:
                vars(self).pop("facts", None)  # what was tried for the proof
        return _PROVEN[key]

    def _go_by(self, facts: Facts) -> None:
        vars(self)["facts"] = facts

    @property
    def _small(self) -> VideoSize:
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
        parameter = self.runs.parameters.get("max_sequence_length")
        return 0 if parameter is None else int(parameter.default)

    def compression(self) -> tuple[int, int]:
        return self.facts.latents.temporal, self.facts.latents.spatial

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return replace(super().schedule, frame_axis=self.facts.latents.order.index(2))

    def sizes(self) -> Sizes:
        return replace(super().sizes(), multiple=self.facts.latents.multiple)

    def latent_shape(self, size: VideoSize) -> tuple[int, ...]:
        inputs, shape = self.facts.inputs, self.facts.latents.shape(size)
        seen = inputs.split(self.runs.at(size).calls[0][inputs.sample])[0]
        if seen.shape != shape:
            raise self.runs.refused("history", f"latents of {size} are {tuple(seen.shape)}, not {shape}")
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
        calls = [self.runs.first_call(prompt, self._small).calls[0] for prompt in prompts]
        parts = [Conditioning({name: call[name] for name in self.facts.inputs.prompt}) for call in calls]
        return Conditioning.cat(parts).to(self.loader.device)

    def guidance_arguments(self, scale: float) -> dict[str, float]:
        return {"guidance_scale": scale} if "guidance_scale" in self.runs.parameters else {}

    def prepare(self, pipe: Any, guidance: float = 1.0) -> None:
        """Give a pipeline that holds a guider one of plain classifier-free guidance."""
        if "guider" in self.configs.parts:
            pipe.guider = _guider(guidance)

    def preparation(self) -> tuple[str, ...]:
        return ("pipe.guider = pipe.guider.new(guidance_scale=1.0)",) if "guider" in self.configs.parts else ()

    def teacher_times(self, num_steps: int, shape: Sequence[int]) -> tuple[SolverStep, ...]:
        seen = self.runs.at(self.facts.latents.size(shape), num_steps)
        return teacher_times(self.configs.scheduler, num_steps, **seen.own)

    def call(self, transformer: Any, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        inputs, count = self.facts.inputs, len(x_t)

        def as_seen(name: str, value: Tensor) -> Tensor:
            dtype = inputs.dtypes[name]  # the frozen weights' own becomes that of the network which is called
            return value.to(x_t.device, dtype_of(transformer) if dtype == self.dtype else dtype)

        def for_all(value: Tensor) -> Tensor:
            one = value.ndim > 0 and len(value) == 1
            return (value.expand(count, *value.shape[1:]) if one else value).to(x_t.device)

        seen = self.runs.at(self.facts.latents.size(x_t.shape[1:])).calls[0]
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
            name = self.configs.scheduler["_class_name"]
            raise ValueError(
                f"no few-step scheduler is known for a pipeline with {name}: override few_step_scheduler in a "
                "backbone of your own (docs/new_backbone.md)"
            )
        own = self.runs.at(self._small, len(steps)).own
        given = own.get("sigmas") or [t / self.schedule.num_train_timesteps for t in own.get("timesteps", ())]
        scheduler = few_step_own_scheduler(steps, kind, given) if given else few_step_flow_scheduler(steps, kind)
        runs_at = [step.start[1] for step in teacher_times(scheduler_config(scheduler), len(steps), **own)]
        if max(abs(a - b) for a, b in zip(runs_at, steps, strict=True)) > 1e-4:
            raise ValueError(f"with the stock scheduler the pipeline runs at {runs_at}, the student at {list(steps)}")
        return scheduler

    def stand_ins(self) -> dict[str, Any]:
        """The network without weights, whose config some pipelines read as they are put together."""
        return {"transformer": self.runs.network}

    def load_transformer(self) -> nn.Module:
        assert self.facts  # the proof comes first
        return super().load_transformer()

    def dummy_prompts(self, batch_size: int) -> Conditioning:
        raise ValueError(
            "lightning plan reads nothing but configs, and model.backbone: captured learns how "
            f"{self.runs.pipeline} calls its network by running it; write a backbone for it (docs/new_backbone.md)"
        )

    def check_teacher(self) -> None:
        """By running it, when it is first used; of configs nothing but that no part is stored quantised."""
        refuse_quantised(self)

    def identity(self) -> dict[str, str]:
        return super().identity() | {"backbone": "captured"}


@cache
def _guider(scale: float) -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(guidance_scale=scale)
