"""Whether the parts of a teacher fit one another, by their configs alone: before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dfd.backbones.base import Backbone

INPUT, OUTPUT = ("in_channels", "in_visual_dim"), ("out_channels", "out_visual_dim")  # by family
FEATURES = ("d_model", "hidden_size")  # of a text or image encoder


def check_parts(backbone: Backbone) -> None:
    """Refuse a pipeline whose parts do not fit one another. Encoders without a config are passed over.

    Raises:
        ValueError: names the parts that do not fit, what they have, and what it would have to be.
    """
    refuse_quantised(backbone)
    for name in backbone.networks:
        _check_channels(backbone, name, backbone.network_config(name))
    for name, width in backbone.encoder_widths().items():
        config = backbone.encoder_config(name) if name in backbone.encoder_names else None
        features = backbone.features_of(name, config or {})
        if None not in (features, width) and features != width:
            raise ValueError(
                f"the network of {backbone.source} takes {width} features of {name}, whose config says {features}; set "
                f"model.teacher to a pipeline whose network and {name} belong together"
            )


def refuse_quantised(backbone: Backbone) -> None:
    """Raise ValueError for a pipeline with a part that was saved with fewer bits."""
    configs = {name: backbone.network_config(name) for name in backbone.networks}
    configs |= {"vae": backbone.vae_config}
    configs |= {name: backbone.encoder_config(name) or {} for name in backbone.encoder_names}
    for name, config in configs.items():
        if (stored := config.get("quantization_config")) is not None:
            method = stored.get("quant_method") if isinstance(stored, Mapping) else stored
            raise ValueError(
                f"the {name} of {backbone.source} is stored quantised ({method}), which is not supported; set "
                "model.teacher to the pipeline in full precision, and model.quantization for fewer bits"
            )


def _check_channels(backbone: Backbone, name: str, config: Mapping[str, Any]) -> None:
    latents = backbone.latent_channels()
    takes = next((config[key] for key in INPUT if key in config), None)
    gives = next((config[key] or takes for key in OUTPUT if key in config), None)
    pairs = (("takes", takes, backbone.input_channels()), ("answers with", gives, backbone.output_channels()))
    for verb, has, needed in pairs:
        if has is not None and int(has) != needed:
            raise ValueError(
                f"{name} and VAE of {backbone.source} do not fit: the network {verb} {has} channels, and as a "
                f"{backbone.pipeline_name} with {latents} channels of latents it needs {needed}; set model.teacher to "
                "a pipeline whose network is of this kind, or correct _class_name in its model_index.json"
            )


def features_of(config: Mapping[str, Any]) -> int | None:
    """Features of a token by the config of a text or image encoder; None where it does not say."""
    inner = config.get("text_config")
    own = inner if isinstance(inner, Mapping) else config
    found = next((own[key] for key in FEATURES if own.get(key) is not None), None)
    return None if found is None else int(found)
