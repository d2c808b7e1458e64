"""Folders that hold nothing but the configs of published teachers, for `lightning plan` on a machine without them.

    python -m benchmarks.published outputs/published
    lightning plan -c recipes/wan_dmd2.yaml --model.teacher outputs/published/wan-14b --data.cache any

Where diffusers' classes have the published sizes as defaults (CogVideoX-2B, Wan 14B, both VAEs), nothing is repeated
here. The other numbers are from memory of the published configs and not compared with them; the counts of parameters
that are printed should be those in the models' names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanTransformer3DModel,
)
from transformers import T5Config, UMT5Config

from lightning_dfd.testing.tiny.cogvideox import cogvideox_scheduler

XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "cogvideox-2b": {},
    "cogvideox-5b": {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
    "wan-1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan-14b": {},
}


def write(name: str, folder: Path) -> int:
    """Write the configs of one pipeline; returns the transformer's number of parameters."""
    wan = name.startswith("wan")
    with torch.device("meta"):
        transformer = (WanTransformer3DModel if wan else CogVideoXTransformer3DModel)(**TRANSFORMERS[name])
        vae = (AutoencoderKLWan if wan else AutoencoderKLCogVideoX)()
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0) if wan else cogvideox_scheduler(1.0 if "5b" in name else 3.0)
    scheduler.save_config(folder / "scheduler")
    text = UMT5Config(vocab_size=256384, **XXL) if wan else T5Config(vocab_size=32128, **XXL)
    text.save_pretrained(folder / "text_encoder")
    index = {
        "_class_name": "WanPipeline" if wan else "CogVideoXPipeline",
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "UMT5EncoderModel" if wan else "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast" if wan else "T5Tokenizer"],
        "transformer": ["diffusers", type(transformer).__name__],
        "vae": ["diffusers", type(vae).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return sum(parameter.numel() for parameter in transformer.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    output = Path(parser.parse_args().output)
    for name in TRANSFORMERS:
        print(f"{output / name}: {write(name, output / name) / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
