"""An estimate as a table to read and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lightning_dfd.plan.advice import Advice
from lightning_dfd.plan.estimate import Estimate, Setup

GIB, MIB, TERA = 2**30, 2**20, 1e12
NAMES = {"fake": "fake score", "ema": "moving average"}


def facts(setup: Setup) -> dict[str, Any]:
    """What was planned for, by name."""
    module = setup.module
    student, quantization = module.student, module.backbone.loader.quantization
    return {
        "teacher": module.backbone.source,
        "size": str(setup.size),
        "batch size": setup.batch_size,
        "accumulate": module.accumulate,
        "student": student.mode + (f", rank {student.rank}" if student.mode == "lora" else ""),
        "gradient checkpointing": student.gradient_checkpointing,
        "teacher's precision": str(module.backbone.dtype).removeprefix("torch."),
        "quantization": quantization and f"{quantization.kind} by {quantization.backend}",
        "offload": module.backbone.loader.offload,
        "decoding in tiles": module.backbone.loader.vae_tiling,
        "trainer's precision": setup.precision,
        "latents": "from the cache" if setup.cached else "encoded while training",
    }


def as_text(setup: Setup, found: Estimate, limit: float | None, advice: Sequence[Advice]) -> str:
    """A table of GiB, the largest term, disk and work, and what to change if `limit` (bytes) is exceeded."""
    lines = [f"{name:24} {value}" for name, value in facts(setup).items() if value]
    lines += ["", f"{'at the peak of training':52} {'GiB':>9}"]
    lines += [f"{_readable(name):52} {size / GIB:9.2f}" for name, size in found.terms.items() if size]
    lines += [f"{'total':52} {found.peak / GIB:9.2f}", ""]
    lines += [f"{_readable(f'peak of the {name}'):52} {size / GIB:9.2f}" for name, size in found.peaks.items()]
    lines += [f"{'peak of lightning cache':52} {found.caching / GIB:9.2f}"]
    lines += [f"{'decoding samples, beside all weights':52} {found.decoding / GIB:9.2f}", ""]
    largest = max(found.terms, key=lambda name: found.terms[name])
    lines += [f"largest term: {_readable(largest)}, {found.terms[largest] / found.peak:.0%}"]
    lines += [f"a cache takes {found.latents / MIB:.1f} MiB per clip and {found.embedding / MIB:.1f} MiB per caption"]
    turns = ", ".join(f"{_readable(role)} {turn.flops / TERA:,.1f}" for role, turn in found.turns.items())
    lines += [f"an iteration takes {found.flops / TERA:,.1f} TFLOP in the mean ({turns})"]
    if found.text is None:
        lines += ["not counted: the text encoders, whose configs are not there"]
    if limit is not None:
        lines += ["", *_verdict(found, limit, advice)]
    return "\n".join(lines)


def _verdict(found: Estimate, limit: float, advice: Sequence[Advice]) -> list[str]:
    if found.peak <= limit:
        return [f"fits into {limit / GIB:g} GiB"]
    lines = [f"does NOT fit into {limit / GIB:g} GiB; each line together with those above it:"]
    lines += [f"  {one.change:70} {one.peak / GIB:9.2f}" for one in advice]
    if not advice or advice[-1].peak > limit:
        lines += ["  then lower data.frames, data.height and data.width, or take a smaller teacher"]
    return lines


def as_json(setup: Setup, found: Estimate, limit: float | None, advice: Sequence[Advice]) -> str:
    """Everything of the table; sizes in bytes."""
    content = {
        "facts": facts(setup),
        "terms": found.terms,
        "peaks": found.peaks,
        "peak": found.peak,
        "peak_of_cache": found.caching,
        "decoding": found.decoding,
        "text_encoders_counted": found.text is not None,
        "disk": {"clip": found.latents, "caption": found.embedding},
        "flops": {"mean": found.flops} | {str(role): turn.flops for role, turn in found.turns.items()},
        "limit": limit,
        "fits": None if limit is None else found.peak <= limit,
        "advice": [asdict(one) for one in advice],
    }
    return json.dumps(content, indent=2)


def _readable(name: str) -> str:
    return " ".join(NAMES.get(word, word) for word in name.split())
