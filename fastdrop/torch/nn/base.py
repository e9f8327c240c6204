"""`Rated`, the base class of fastdrop's modules: where a drop probability comes from, and how a call is traced.

`nn.dropout`, `nn.weights` and `nn.recurrent` build on it. Schedulers and reports ask ``isinstance(module, Rated)`` to
tell fastdrop's modules from others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["RATE_TENSOR", "Rated", "is_traced", "trace_call"]

RATE_TENSOR = "rate_tensor"


class Rated(nn.Module):
    """A module that drops with probability ``p``, which a `DropoutScheduler` may change.

    `torch.compile` makes a constant of a float that it finds on a module. So a module that a scheduler drives holds the
    same number as a tensor too, and a compiled graph reads that tensor at each call.
    """

    p: float
    rate_tensor: Tensor | None = None  # float64 on the CPU, without axes; set by `drive`

    # TorchScript knows neither properties that compute nor annotations that are strings.
    __jit_unused_properties__ = ("p", "rate")
    __jit_ignored_attributes__ = (RATE_TENSOR, "couple_channels", "drop_prob", "gamma_scale", "p", "rate", "store")

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("p", "drop_prob") and self.rate_tensor is not None:
            self.drive(value)

    def drive(self, p: float) -> None:
        """Sets the tensor that compiled code reads. From now on it follows each change of p."""
        # A new tensor each time, because a graph may hold the old one for its backward pass.
        with torch.inference_mode(False):
            self.rate_tensor = torch.tensor(p, dtype=torch.float64, device="cpu")

    @property
    def rate(self) -> float | Tensor:
        """p for this call: a float, or the tensor while a compiler traces the call."""
        if self.rate_tensor is not None and torch.compiler.is_compiling():
            return self.rate_tensor
        return self.p

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if self.training:
                raise RuntimeError(
                    "fastdrop can't be scripted for training: call eval(), or fdt.revert(model) before torch.jit.script"
                )
            return self.evaluate_input(input)
        else:  # TorchScript doesn't read this branch
            if is_traced(self, input):
                return trace_call(self, input)  # type: ignore[no-any-return]
            if isinstance(input, Tensor) and input.is_quantized:
                return input  # nn.Dropout in a quantised model of torch does the same
            return self.drop_input(input)

    def drop_input(self, input: Tensor) -> Tensor:
        """What the module does in Python. `enable` gives this to the classes of timm and torchvision."""
        raise NotImplementedError

    def evaluate_input(self, input: Tensor) -> Tensor:
        """What the module does in evaluation when it is scripted. TorchScript compiles this."""
        return input


def is_traced(module: nn.Module, input: Any) -> bool:
    """Whether `torch.fx` traces a model that the module is part of."""
    return isinstance(input, fx.Proxy) and getattr(input.tracer, "root", None) is not module


def trace_call(module: nn.Module, proxy: Any, *args: Any, **kwargs: Any) -> Any:
    """Puts a call of the module into fx's graph, as happens to torch's own modules, so that the call follows eval()."""
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy, *args), kwargs)
