"""Stands for NVIDIA's cosmos_guardrail, without which no Cosmos pipeline can be made, in tests on random weights.

It lets everything pass; never use it with a trained model.
"""

from __future__ import annotations

from typing import Any


class CosmosSafetyChecker:
    def to(self, *args: Any, **kwargs: Any) -> CosmosSafetyChecker:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames
