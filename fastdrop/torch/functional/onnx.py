"""Export to ONNX, which has one kind of dropout: an operator whose mask is drawn by the runtime that runs the model."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch.compilers import constant_in_graphs

__all__ = ["drop", "is_exported", "refuse"]


@constant_in_graphs
def is_exported() -> bool:
    """Whether `torch.onnx.export` looks at the call. It is asked while a call is traced, and not by the graph."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def drop(x: Tensor, p: Any, source: tuple[Any, Any, Any], mask_shape: Any = None, scaling: str = "inverted") -> Tensor:
    """Dropout as ONNX has it. ``source`` is the generator, the seed and the part of the call."""
    if mask_shape is not None or scaling != "inverted":
        refuse("decisions that elements share, and no other scaling than 1 / (1 - p)")
    if isinstance(p, Tensor) or any(given is not None for given in source):
        refuse("seed, generator, part or tensor for p")
    y: Tensor = torch.ops.aten.native_dropout.default(x, p, True)[0]
    return y


def refuse(missing: str) -> None:
    raise RuntimeError(f"ONNX's Dropout has no {missing}: call model.eval() before torch.onnx.export")
