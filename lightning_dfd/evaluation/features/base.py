"""What a feature extractor is: a frozen network that turns videos into features.

Axis legend: B videos, C = 3 channels, F frames, H height, W width, D features.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

FeatureKind = Literal["video", "frame"]


class FeatureExtractor:
    """A named callable from videos [B, C, F, H, W], float in [-1, 1], to float32 features on the videos' device.

    It is not an `nn.Module`, so that whatever holds one neither saves, casts, trains nor moves its network. It runs
    in evaluation mode, in float32, without gradient, and outside of autocast.

    Attributes:
        name: short and honest, as `i3d-logits`: names the network and the layer. It enters names of logged values
            and keys of cached statistics.
        kind: `video` gives [B, D], `frame` gives [B, F, D].
        fingerprint: changes when weights or preprocessing do, for keys of cached statistics.
    """

    name: str
    kind: FeatureKind
    fingerprint: str

    def __call__(self, videos: Tensor) -> Tensor:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureExtractor:
        """Copies of a metric share the network."""
        return self
