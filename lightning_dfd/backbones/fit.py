"""Whether the parts of a teacher fit one another, by their configs alone: before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_dfd.backbones.family import Family

INPUT, OUTPUT = ("in_channels", "in_visual_dim"), ("out_channels", "out_visual_dim")  # by family


def check_parts(family: Family) -> None:
    """Refuse a pipeline whose parts do not fit one another. Encoders without a config are passed over.

    Raises:
        ValueError: names the parts that do not fit, what they have, and what it would have to be.
    """
    refuse_quantised(family)
    for name in family.networks:
        _check_channels(family, name, family.configs.part(name))
    for name, width in family.encoder_widths().items():
        config = family.configs.encoder(name) if name in family.configs.encoders else None
        features = family.features_of(name, config or {})
        if None not in (features, width) and features != width:
            raise ValueError(
                f"the network of {family.source} takes {width} features of {name}, whose config says {features}; set "
                f"model.teacher to a pipeline whose network and {name} belong together"
            )


def refuse_quantised(family: Family) -> None:
    """Raise ValueError for a pipeline with a part that was saved with fewer bits."""
    configs = {name: family.configs.part(name) for name in (*family.networks, "vae")}
    configs |= {name: family.configs.encoder(name) or {} for name in family.configs.encoders}
    for name, config in configs.items():
        if (stored := config.get("quantization_config")) is not None:
            method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
            raise ValueError(
                f"the {name} of {family.source} is stored quantised ({method}), which is not supported; set "
                "model.teacher to the pipeline in full precision, and model.quantization for fewer bits"
            )


def _check_channels(family: Family, name: str, config: Mapping[str, Any]) -> None:
    latents, (input_channels, output_channels) = family.latent_channels(), family.network_channels()
    takes = next((config[key] for key in INPUT if key in config), None)
    gives = next((config[key] or takes for key in OUTPUT if key in config), None)
    pairs = (("takes", takes, input_channels), ("answers with", gives, output_channels))
    for verb, has, needed in pairs:
        if has is not None and int(has) != needed:
            raise ValueError(
                f"{name} and VAE of {family.source} do not fit: the network {verb} {has} channels, and as a "
                f"{family.pipeline_name} with {latents} channels of latents it needs {needed}; set model.teacher to "
                "a pipeline whose network is of this kind, or correct _class_name in its model_index.json"
            )
