"""What a diffusers pipeline does with its network and its scheduler, seen from outside.

The network is watched by forward hooks. The scheduler is no module, so for the time of a run the pipeline holds one of
a subclass that notes its calls. Pipelines change tensors in place: all that is noted is copied.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn


@dataclass(frozen=True)
class SchedulerStep:
    """One `scheduler.step`: what it was handed, and the sample that it answered."""

    output: Tensor
    timestep: Tensor
    sample: Tensor
    result: Tensor


@dataclass
class Recording:
    """One run of a pipeline: each network call's arguments by name and first output, each scheduler step, what
    `set_timesteps` was handed, and what the pipeline returned (None for a run that was broken off)."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    steps: list[SchedulerStep] = field(default_factory=list)
    handed: list[dict[str, Any]] = field(default_factory=list)
    result: Any = None

    @property
    def own(self) -> dict[str, Any]:
        """What the pipeline hands `set_timesteps` besides the number of steps: its own `sigmas`, or `mu`."""
        others = ("self", "num_inference_steps", "device")
        handed = {k: value for k, value in self.handed[-1].items() if value is not None and k not in others}
        return {k: value.tolist() if hasattr(value, "tolist") else value for k, value in handed.items()}


class _Enough(Exception):
    """Breaks a pipeline off at its first network call."""


def record(pipe: Any, first_call_only: bool = False, **arguments: Any) -> Recording:
    """Run `pipe(**arguments)` and note what it does, whatever modes of torch are on.

    The global random generators are as before afterwards.

    Args:
        first_call_only: break the run off before the network's first call, which is noted and does not happen.
    """
    recording = Recording()
    network, scheduler = pipe.transformer, pipe.scheduler
    signature = inspect.signature(network.forward)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.calls.append(_by_name(signature, args, kwargs))
        if first_call_only:
            raise _Enough

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recording.outputs.append(copied(first_tensor(output)))

    hooks = [network.register_forward_pre_hook(before, with_kwargs=True), network.register_forward_hook(after)]
    pipe.scheduler = _noting(scheduler, recording)
    pipe.set_progress_bar_config(disable=True)
    try:
        with _undisturbed():
            recording.result = pipe(**arguments, generator=torch.Generator().manual_seed(0), return_dict=False)[0]
    except _Enough:
        pass
    finally:
        pipe.scheduler = scheduler
        for hook in hooks:
            hook.remove()
    return recording


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Own random draws, no autocast, and tensors that may take part in training later."""
    cuda = torch.cuda.is_available()
    with (
        torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []),
        torch.inference_mode(False),
        torch.autocast("cuda" if cuda else "cpu", enabled=False),
    ):
        yield


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of a call's arguments by the names of the parameters, those in `**kwargs` included."""
    bound = signature.bind(*args, **kwargs).arguments
    named: dict[str, Any] = {}
    for name, value in bound.items():
        several = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= copied(value) if several else {name: copied(value)}
    return named


def _noting(scheduler: Any, recording: Recording) -> Any:
    """A scheduler like `scheduler` that notes its calls. Of a subclass: pipelines ask for classes and signatures."""
    kind = type(scheduler)
    step_signature, times_signature = (inspect.signature(f) for f in (kind.step, kind.set_timesteps))

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        recording.handed.append(_by_name(times_signature, (None, *args), kwargs))
        return kind.set_timesteps(self, *args, **kwargs)

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = _by_name(step_signature, (None, *args), kwargs)
        answer = kind.step(self, *args, **kwargs)
        result = answer[0] if isinstance(answer, tuple) else answer.prev_sample
        timestep = torch.as_tensor(given["timestep"])
        recording.steps.append(SchedulerStep(given["model_output"], timestep, given["sample"], copied(result)))
        return answer

    noting = type(f"Noting{kind.__name__}", (kind,), {"step": step, "set_timesteps": set_timesteps})
    made = _made(noting, scheduler.config)
    recording.handed.clear()  # some set times as they are made
    return made


def _made(kind: Any, config: Mapping[str, Any], **others: Any) -> Any:
    """A scheduler of what it knows of a config, without diffusers' warnings of the rest."""
    known = inspect.signature(kind.__init__).parameters
    return kind(**({name: value for name, value in config.items() if name in known} | others))


def first_order(scheduler: Any) -> Any:
    """A scheduler of the same times whose step is Euler's (flow) or DDIM's: what our sampler for teachers does."""
    config, kind = scheduler.config, type(scheduler)
    if config.get("prediction_type") == "flow_prediction":
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        return _made(FlowMatchEulerDiscreteScheduler, config, shift=shift)
    if "beta_schedule" not in config:
        return scheduler
    ddim = CogVideoXDDIMScheduler if kind.__name__.startswith("CogVideoX") else DDIMScheduler
    return _made(ddim, config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)


def first_tensor(output: Any) -> Tensor:
    """A network's output: a tensor, the first of a tuple, or a dataclass's `sample`."""
    if isinstance(output, Tensor):
        return output
    first: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return first


def copied(value: Any) -> Any:
    """`value` with copies of all tensors in it."""
    return mapped(value, lambda tensor: tensor.detach().clone())


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with all tensors in it changed, through tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def same(one: Any, other: Any) -> bool:
    """Whether two noted values are equal. Objects of other kinds than plain values and tensors never are: they may hold
    a state."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool(torch.equal(one, other))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    plain = one is None or isinstance(one, (bool, int, float, str, torch.dtype, torch.device))
    return plain and bool(one == other)
