"""What recordings of a pipeline say of its calls, or by which check it cannot be said.

Axis legend: B batch, C channels, F frames, H height, W width; f, h, w the same in latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_dfd.backbones.captured.recorder import Recording, same
from lightning_dfd.types import VideoSize

# Every check: what holds if it passes, and what a subclass overrides if it does not.
CAPTURE_CHECKS: dict[str, tuple[str, str]] = {
    "call": ("the pipeline runs from a prompt and a size, and has the usual components", "call and encode_prompts"),
    "sample": ("one network input is the sample that the scheduler is handed, or begins with its channels", "call"),
    "output": ("the network's output is what the scheduler is handed", "call or x0"),
    "timestep": ("one network input is the scheduler's timestep", "call"),
    "constant": ("all other network inputs are the same in every step", "call"),
    "history": ("there is one loop over one block of latents, with one network call a step", "call and x0"),
    "prompt": ("what the network is told of a prompt is tensors of one shape, whatever the prompt", "encode_prompts"),
    "layout": ("latents are the VAE's, with at most their axes in another order", "latent_shape and normalise"),
    "decode": ("latents decode to the pipeline's pixels", "normalise, denormalise and decode"),
    "batch": ("the network gives a clip of a batch what it gives the clip alone", "call"),
    "replay": (
        "our sampler gives the pipeline's latents, with and without guidance",
        "schedule, x0, call or guidance_arguments",
    ),
}

# The VAE's latents are [B, C, f, h, w]; how pipelines order these axes.
LAYOUTS = ((0, 1, 2, 3, 4), (0, 2, 1, 3, 4), (0, 2, 3, 4, 1))

# Largest root mean square difference of latents, relative; the others are what rounding leaves.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class CaptureRefused(ValueError):
    """A pipeline that the captured backbone does not understand.

    Args:
        pipeline: the pipeline's class.
        check: the name in CAPTURE_CHECKS.
        seen: what was found in its place.
    """

    def __init__(self, pipeline: str, check: str, seen: str) -> None:
        holds, override = CAPTURE_CHECKS[check]
        super().__init__(
            f"{pipeline} cannot be distilled with model.backbone: captured. Check `{check}` failed "
            f"({holds}): {seen}. Write a Backbone for it that overrides {override} (docs/new_backbone.md)"
        )
        self.pipeline, self.check, self.seen = pipeline, check, seen

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pipeline, self.check, self.seen)


class Failed(Exception):
    """A check's name and what was seen; becomes a CaptureRefused where the pipeline's name is known."""


@dataclass(frozen=True)
class Inputs:
    """How the network is called.

    Args:
        sample: name of the argument that is, or begins with, the noised latents.
        axis, extra: its last `extra` places along `axis` are conditioning, what comes before is the noised latents.
        timestep: name of the argument that is told the time.
        timestep_shape: its shape without the batch axis.
        prompt: names of the tensors [1, ...] that do not follow the clip's size.
        dtypes: of all arguments that are tensors.
    """

    sample: str
    axis: int
    extra: int
    timestep: str
    timestep_shape: tuple[int, ...]
    prompt: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The noised latents in the argument `sample`, and what comes after them."""
        length = value.shape[self.axis] - self.extra
        return value.narrow(self.axis, 0, length), value.narrow(self.axis, length, self.extra)


@dataclass(frozen=True)
class Latents:
    """What latents are.

    Args:
        order: their axes, named by the places of the VAE's.
        channels, temporal, spatial: of the VAE, and its compression.
        multiple: of pixels that the sides of a clip have to be.
        mean, std: of the VAE's latents by channel, [C] each, by which they are normalised.
    """

    order: tuple[int, ...]
    channels: int
    temporal: int
    spatial: int
    multiple: int
    mean: Tensor
    std: Tensor

    def shape(self, size: VideoSize) -> tuple[int, ...]:
        """[1, ...] for one clip, in the pipeline's layout."""
        return _ordered(raw_shape(self.channels, self.temporal, self.spatial, size), self.order)

    def size(self, shape: Sequence[int]) -> VideoSize:
        """The inverse; `shape` is without the batch axis."""
        places = dict(zip(self.order, (1, *shape), strict=True))
        return VideoSize((places[2] - 1) * self.temporal + 1, places[3] * self.spatial, places[4] * self.spatial)


@dataclass(frozen=True)
class Facts:
    """All that is known of a pipeline."""

    inputs: Inputs
    latents: Latents


def raw_shape(channels: int, temporal: int, spatial: int, size: VideoSize) -> tuple[int, ...]:
    """Shape of the VAE's latents of one clip, [1, C, f, h, w]."""
    return 1, channels, (size.frames - 1) // temporal + 1, size.height // spatial, size.width // spatial


def _ordered(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[place] for place in order)


def learn_inputs(run: Recording, num_steps: int) -> Inputs:
    """How the network is called, from one whole run without guidance; `prompt` is for `find_prompt` to tell."""
    if not run.calls or not run.steps:
        raise Failed("history", f"the run made {len(run.calls)} network calls and {len(run.steps)} scheduler steps")
    first = run.calls[0]
    sample, axis = _find_sample(run)
    extra = first[sample].shape[axis] - run.steps[0].sample.shape[axis]
    _check_loop(run, num_steps, sample, axis)
    _check_output(run)
    timestep = _find_timestep(run, sample)
    dtypes = {name: value.dtype for name, value in first.items() if isinstance(value, Tensor)}
    inputs = Inputs(sample, axis, extra, timestep, tuple(first[timestep].shape[1:]), (), dtypes)
    _check_constants(run, inputs)
    return inputs


def _find_sample(run: Recording) -> tuple[str, int]:
    """The argument that is the step's sample or begins with it along one axis, and that axis."""
    found = {}
    for name, value in run.calls[0].items():
        axis = _begins_with(value, run.steps[0].sample)
        if axis is not None:
            found[name] = axis
    if not found:
        shapes = {name: tuple(v.shape) for name, v in run.calls[0].items() if isinstance(v, Tensor)}
        raise Failed("sample", f"the scheduler is handed {tuple(run.steps[0].sample.shape)}, the network {shapes}")
    return next(iter(found.items()))


def _begins_with(whole: Any, part: Tensor) -> int | None:
    """The axis along which `whole` begins with `part` (1, if they are equal); None where it does not."""
    if not isinstance(whole, Tensor) or whole.ndim != part.ndim or whole.ndim < 3:
        return None
    longer = [axis for axis in range(whole.ndim) if whole.shape[axis] != part.shape[axis]] or [1]
    axis, length = longer[0], part.shape[longer[0]]
    fits = len(longer) == 1 and axis > 0 and whole.shape[axis] >= length
    return axis if fits and torch.equal(whole.narrow(axis, 0, length), part.to(whole.dtype)) else None


def _check_loop(run: Recording, num_steps: int, sample: str, axis: int) -> None:
    """One loop of `num_steps`, each from where the last one ended, all on what the network is given."""
    counts = len(run.handed), len(run.calls), len(run.steps)
    if counts != (1, num_steps, num_steps):
        loops, calls, steps = counts
        raise Failed("history", f"{num_steps} steps were {loops} loops, {calls} network calls, {steps} scheduler steps")
    for i, (step, then) in enumerate(itertools.pairwise(run.steps), start=2):
        if not same(step.result.to(then.sample.dtype), then.sample):
            raise Failed("history", f"step {i} does not begin where the one before ended")
        if _begins_with(run.calls[i - 1][sample], then.sample) != axis:
            raise Failed("sample", f"{sample} is the sample in the first step and another in step {i}")


def _check_output(run: Recording) -> None:
    for i, (output, step) in enumerate(zip(run.outputs, run.steps, strict=True)):
        if _begins_with(output.float(), step.output.float()) is None:
            shapes = f"{tuple(output.shape)} and {tuple(step.output.shape)}"
            raise Failed("output", f"they differ in step {i + 1} (shapes {shapes})")


def _find_timestep(run: Recording, sample: str) -> str:
    for name, value in run.calls[0].items():
        if not isinstance(value, Tensor) or name == sample or value.ndim == 0 or len(value) != 1:
            continue
        pairs = zip(run.calls, run.steps, strict=True)
        if all(bool((call[name] == step.timestep.to(call[name].dtype)).all()) for call, step in pairs):
            return name
    times = [round(float(step.timestep.flatten()[0]), 3) for step in run.steps]
    raise Failed("timestep", f"none of {', '.join(run.calls[0])} is [B, ...] and all the scheduler's {times}")


def _check_constants(run: Recording, inputs: Inputs) -> None:
    first, sample = run.calls[0], inputs.sample
    for i, call in enumerate(run.calls[1:], start=2):
        for name in first.keys() | call.keys():
            if name == inputs.timestep:
                continue
            pair = [values.get(name) for values in (first, call)]
            if name == sample:
                pair = [inputs.split(value)[1] for value in pair if value is not None]
            if not same(*pair):
                kind = "its channels after the noised latents" if name == sample else f"a {type(pair[0]).__name__}"
                raise Failed("constant", f"{name} ({kind}) is another in step {i} than in the first")


def find_prompt(inputs: Inputs, calls: Sequence[Mapping[str, Any]]) -> Inputs:
    """Which inputs are a prompt's: the tensors [1, ...] that do not follow the clip's size.

    Args:
        calls: of several prompts at one size, and last of the first one at another size.
    """
    rests = [inputs.split(call[inputs.sample])[1] for call in calls[:-1]]
    if not all(same(rests[0], rest) for rest in rests):
        raise Failed("prompt", f"what comes after the noised latents in {inputs.sample} follows it")
    names = [name for name in calls[0] if name not in (inputs.sample, inputs.timestep)]
    prompt = []
    for name in names:
        values = [call.get(name) for call in calls]
        shapes = [_shape(value) for value in values]
        if any(isinstance(value, Tensor) and value.is_meta for value in values):
            raise Failed("prompt", f"{name} is made from the network's weights, before its call")
        batched = isinstance(values[0], Tensor) and shapes[0][:1] == (1,)
        if batched and len(set(shapes)) == 1 and same(values[0], values[-1]):
            prompt.append(name)
        elif not all(same(values[0], value) for value in values[1:-1]):
            raise Failed("prompt", f"{name} is {_listed(shapes[:-1])} for several prompts")
    if not prompt:
        raise Failed("prompt", f"no tensor [1, ...] among {', '.join(names)} is one of the prompt alone")
    return replace(inputs, prompt=tuple(prompt))


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def find_layout(
    sample: Tensor, raw: Sequence[int], temporal: int, spatial: int, size: VideoSize
) -> tuple[tuple[int, ...], int]:
    """The order of the pipeline's axes and the VAE's channels.

    Args:
        sample: the pipeline's latents at `size`, [1, ...].
        raw: shape of the VAE's latents at any size, [1, C, f, h, w].
    """
    expected, shape = raw_shape(raw[1], temporal, spatial, size), tuple(sample.shape)
    for order in LAYOUTS:
        if _ordered(expected, order) == shape:
            return order, raw[1]
    seen = f"latents of {size} are {shape}, the VAE's are {expected}"

    def but_frames(lengths: Sequence[int], order: Sequence[int]) -> list[int]:
        return [length for length, place in zip(lengths, order, strict=True) if place != 2]

    frames_alone = len(shape) == 5 and any(
        but_frames(shape, order) == but_frames(_ordered(expected, order), order) for order in LAYOUTS
    )
    raise Failed("history" if frames_alone else "layout", seen)


def find_scaling(vae: Any, decoded: Callable[[Tensor, Tensor], Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of the VAE's latents with which they decode to the pipeline's pixels.

    Args:
        decoded: pixels in [0, 1] for a mean and a deviation.
        pixels: the pipeline's.
    """
    found = []
    for name, mean, std in _scalings(vae):
        ours = decoded(mean, std)
        if ours.shape != pixels.shape:
            raise Failed("decode", f"ours are {tuple(ours.shape)}, the pipeline's {tuple(pixels.shape)}")
        found.append((float((ours - pixels).abs().max()), name, mean, std))
    error, name, mean, std = min(found, key=lambda item: item[0])
    tolerance = max(1e-3, TOLERANCE[vae.dtype])
    if not error <= tolerance:
        raise Failed("decode", f"the nearest scaling, {name}, is {error:.1e} off; allowed is {tolerance:.0e}")
    return mean, std


def _scalings(vae: Any) -> list[tuple[str, Tensor, Tensor]]:
    """The scalings that pipelines use, as far as this VAE knows their numbers."""
    config = vae.config
    channels = int(config.get("latent_channels") or config.get("z_dim") or 1)
    factor = torch.tensor(float(config.get("scaling_factor") or 1.0)).expand(channels)
    shift = torch.tensor(float(config.get("shift_factor") or 0.0)).expand(channels)
    found = [
        ("scaling_factor", shift * 0, 1 / factor),
        ("shift_factor and scaling_factor", shift, 1 / factor),
        ("none", shift * 0, factor**0),
    ]
    weights = dict(vae.named_buffers())  # where some VAEs keep them
    mean, std = (weights.get(key, config.get(key)) for key in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.as_tensor(value).float().cpu().flatten() for value in (mean, std))
        found += [
            ("latents_mean and latents_std", mean, std),
            ("latents_mean, latents_std and scaling_factor", mean, std / float(config.get("scaling_factor") or 1.0)),
        ]
    return found
