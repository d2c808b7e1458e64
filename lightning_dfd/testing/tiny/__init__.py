"""Tiny random pipelines of every family, built with no download: for tests, and to try a recipe on any machine.

    python -m lightning_dfd.tiny cogvideox outputs/tiny_cogvideox
    lightning fit -c recipes/cogvideox_dfd.yaml --model.teacher outputs/tiny_cogvideox ...

They are genuine diffusers pipelines in all but size and training: what they make is noise.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_dfd.files import respect_umask
from lightning_dfd.testing.tiny import (
    allegro,
    cogvideox,
    cosmos,
    hunyuan,
    hunyuan15,
    kandinsky,
    latte,
    ltx,
    mochi,
    sana_video,
    skyreels,
    wan,
)
from lightning_dfd.testing.tiny.parts import TEXT_LENGTH, Tiny, Trial

TINY: dict[str, Tiny] = {
    **allegro.TINY,
    **cogvideox.TINY,
    **cosmos.TINY,
    **hunyuan.TINY,
    **hunyuan15.TINY,
    **kandinsky.TINY,
    **latte.TINY,
    **ltx.TINY,
    **mochi.TINY,
    **sana_video.TINY,
    **skyreels.TINY,
    **wan.TINY,
}


def save_tiny(name: str, folder: str | Path, seed: int = 0) -> Path:
    """Save the tiny pipeline `name` of TINY, with weights drawn from `seed`; returns the folder.

    The last layers, which some families start at zero, are drawn as well, so that every output depends on every
    input.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = TINY[name].build()
        for network in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            for parameter in () if network is None else network.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.02)
    pipe.save_pretrained(folder)
    respect_umask(Path(folder))
    return Path(folder)


__all__ = ["TEXT_LENGTH", "TINY", "Tiny", "Trial", "save_tiny"]
