"""What the tiny pipelines are put together from: text encoders and tokenizers that need no download."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import T5Tokenizer

from lightning_dfd.diffusion.noise import shifted_steps
from lightning_dfd.types import SampleKind, VideoSize

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SIZE, STEPS = VideoSize(9, 32, 48), shifted_steps(4, 5.0)
EVEN = (0.999, 0.749, 0.499, 0.249)  # of families with a table of noise levels
TEXT_LENGTH = 16  # tokens of a prompt, where the pipeline leaves the choice


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What to try a tiny pipeline with.

    Args:
        backbone: import path of its Backbone; None to choose by the pipeline's class.
        size: of videos that fit it, with more than one place along every axis of the latents.
        steps: times of a student that a stock scheduler samples at.
        kinds: of sampling for which there is one.
        text_length: tokens of a prompt; None for the pipeline's default.
        pixel_error: how far the pipeline's own frames, in [0, 1], may be from what its VAE decodes.
        least_steps: for which the pipeline's call can run.
        refuses: checks of lightning_dfd.testing for which the family has no way: what its ValueError says there, as a
            regular expression.
    """

    backbone: str | None = None
    size: VideoSize = SIZE
    steps: tuple[float, ...] = STEPS
    kinds: tuple[SampleKind, ...] = ("ode", "sde")
    text_length: int | None = TEXT_LENGTH
    pixel_error: float = 1e-4
    least_steps: int = 1
    refuses: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tiny(Trial):
    """A tiny pipeline: `build` makes it, with weights from the global generator."""

    build: Callable[[], Any]


def text_tokenizer(words: Iterable[str] = (), endings: Iterable[str] = ()) -> T5Tokenizer:
    """A T5 tokenizer of `words` and of `endings` right after a word, with single letters for everything else."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(set(words))]
    pieces += [(ending, -1.0) for ending in endings]
    pieces += [(letter, -8.0) for letter in LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def template_tokenizer(template: str, spelt: set[str]) -> T5Tokenizer:
    """A tokenizer of what stands around a template's {}, but for the words `spelt` letter by letter.

    Pipelines cut off a fixed number of tokens before the prompt; by choice of `spelt` the template has as many.
    """
    before, after = template.split("{}")
    return text_tokenizer(set(before.split()) - spelt, [after])


def text_encoder(config_class: Any, model_class: Any, vocabulary: int) -> Any:
    """A random two-layer T5 or UMT5 encoder with 32 features."""
    config = config_class(vocab_size=vocabulary, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    return model_class(config).eval()
