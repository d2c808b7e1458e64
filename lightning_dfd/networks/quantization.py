"""The frozen teacher in fewer bits, by diffusers' own quantisation: adapters train on it in full precision."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig

KINDS = {"torchao": ("int8", "fp8"), "bitsandbytes": ("int8", "nf4")}
TORCHAO = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}
BYTES = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 4 / 64}  # of a weight; nf4 has a float32 scale for every 64


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of the frozen teacher are stored.

    Args:
        backend: the library, an extra of this package: `torchao` or `bitsandbytes`.
        kind: `int8`, `fp8` (torchao) or `nf4` (bitsandbytes, 4 bits).
    """

    backend: Literal["torchao", "bitsandbytes"]
    kind: Literal["int8", "fp8", "nf4"]

    def __post_init__(self) -> None:
        allowed = KINDS[self.backend]
        if self.kind not in allowed:
            raise ValueError(
                f"model.quantization.kind is {self.kind}; with backend {self.backend} it must be {' or '.join(allowed)}"
            )

    def check(self, mode: str) -> None:
        """Raise ValueError for a student whose own weights are trained."""
        if mode == "full":
            raise ValueError(
                "model.quantization is for a base that stays frozen, and model.student.mode is full; "
                "set model.student.mode: lora, or model.quantization: null"
            )

    def config(self, dtype: torch.dtype) -> TorchAoConfig | BitsAndBytesConfig:
        """As diffusers takes it for one network; `dtype` is what products are computed in.

        Raises:
            ImportError: the backend is not installed.
            ValueError: diffusers runs it on a GPU alone, and there is none.
        """
        if importlib.util.find_spec(self.backend) is None:
            raise ImportError(
                f"model.quantization.backend is {self.backend}, which is not installed; "
                f"install it with: pip install 'lightning-dfd[{self.backend}]'"
            )
        if self.backend == "bitsandbytes" and not torch.accelerator.is_available():
            raise ValueError(
                "model.quantization.backend is bitsandbytes, which needs a GPU, and there is none; "
                "set backend: torchao, or model.quantization: null"
            )
        if self.backend == "torchao":
            return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), TORCHAO[self.kind])())
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
