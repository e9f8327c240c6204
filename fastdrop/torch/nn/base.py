"""`Rated`, the base class of fastdrop's modules: where a drop probability comes from, and how a call is traced.

Modules that may have a seed or a generator of their own are `Seeded`.

`nn.dropout`, `nn.weights` and `nn.recurrent` build on it. Schedulers and reports ask ``isinstance(module, Rated)`` to
tell fastdrop's modules from others.
"""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, fx, nn

from ...core import checks
from ..functional.plan import Whole
from ..runtime import layouts, names, seeds, tracing
from ..runtime.dispatch import hide_from_dynamo

__all__ = ["OWN_SOURCE", "RATE_TENSOR", "Rated", "Seeded", "SourceOptions", "is_traced", "trace_call"]

RATE_TENSOR = "rate_tensor"
OWN_SOURCE = "own_source"


class SourceOptions(TypedDict, total=False):
    """The arguments of all modules that may draw from a source of their own, or a part of a whole's mask."""

    seed: int | None
    generator: torch.Generator | None
    layout: Whole


class CallOptions(TypedDict, total=False):
    """What a module gives the function that drops."""

    seed: int | None
    generator: torch.Generator | None
    part: Whole


class OwnSource:
    """Where one module's masks come from: a generator, or the stream of a seed, whose n-th call in training draws from
    ``mix(seed, n)``. Modules may share one. It is copied and pickled with them, and goes on from where it was."""

    def __init__(self, seed: int | None = None, generator: torch.Generator | None = None) -> None:
        if seed is not None and generator is not None:
            raise ValueError("seed and generator must not both be given")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, but got {type(generator).__name__}")
        self.seed = None if seed is None else checks.uint64("seed", seed)
        self.generator, self.calls = generator, 0

    def next(self) -> CallOptions:
        """The arguments of the function that drops, for the next call."""
        if torch.compiler.is_compiling():  # a number on the host that each call changes would be a constant there
            raise RuntimeError(
                "a module with a seed or a generator of its own can't be compiled: leave it out, or call a function of "
                "fastdrop.torch with seed, an int or a tensor"
            )
        if seeds.sample_seeds() is not None or names.are_in_force():  # masks that others decide
            return {}
        if self.seed is None:
            return {"generator": self.generator}
        if tracing.is_recorded():
            raise RuntimeError(
                "a module with a seed of its own can't be traced in training, because each call of the trace would "
                "have the same mask: call eval(), or give the module a generator"
            )
        seeds.refuse_recomputation()
        self.calls += 1
        return {"seed": seeds.mix(self.seed, self.calls) >> 1}  # 63 bits, as of torch's generators

    def position(self) -> Any:
        """How far it is, for `move_to`."""
        return self.calls if self.generator is None else self.generator.get_state()

    def move_to(self, position: Any) -> None:
        if self.generator is None:
            self.calls = position
        else:
            self.generator.set_state(position)

    def __repr__(self) -> str:
        return f"seed={self.seed}" if self.generator is None else f"generator={self.generator}"


class Rated(nn.Module):
    """A module that drops with probability ``p``, which a `DropoutScheduler` may change.

    `torch.compile` makes a constant of a float that it finds on a module. So a module that a scheduler drives holds the
    same number as a tensor too, and a compiled graph reads that tensor at each call.
    """

    p: float
    rate_tensor: Tensor | None = None  # float64 on the CPU, without axes; set by `drive`
    own_source: OwnSource | None = None  # None: torch's default generator; only `Seeded` modules have one
    layout: Any = None  # of which whole inputs are parts: what functions take as ``part``; only of `Seeded` modules

    # TorchScript knows neither properties that compute nor annotations that are strings.
    __jit_unused_properties__ = ("p", "rate", "seed", "generator")
    __jit_ignored_attributes__ = (
        *(RATE_TENSOR, OWN_SOURCE, "couple_channels", "drop_prob", "gamma_scale", "generator", "layout"),
        *("noise_shape", "p", "rate", "seed", "store"),
    )

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
            if self.own_source is None and self.layout is None:
                return self.drop_input(input)
            return self._drop_from_own_source(input)

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        """What the module does in Python. `enable` gives this to the classes of timm and torchvision."""
        raise NotImplementedError

    def _drop_from_own_source(self, input: Tensor) -> Tensor:
        return self.drop_input(input, **self.source_options())

    def source_options(self) -> CallOptions:
        """What the function that drops is to draw from in this call, where that is not torch's default generator, and
        its ``part`` if the module has a layout."""
        if not self.training:
            return {}
        options: CallOptions = {} if self.own_source is None else self.own_source.next()
        if self.layout is not None:
            options["part"] = self.layout
        return options

    def evaluate_input(self, input: Tensor) -> Tensor:
        """What the module does in evaluation when it is scripted. TorchScript compiles this."""
        return input


class Seeded(Rated):
    """A module that may have a seed or a generator of its own. Setting either starts anew."""

    def draw_from(self, layout: Whole = None, **source: Any) -> None:
        """What constructors call with their ``seed``, ``generator`` and ``layout``."""
        if layout is not None:
            self.layout = layouts.as_layout(layout) or layout
        own = OwnSource(**source)
        self.own_source = None if own.seed is None and own.generator is None else own

    @property
    def seed(self) -> int | None:
        return None if self.own_source is None else self.own_source.seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self.draw_from(seed=seed)

    @property
    def generator(self) -> torch.Generator | None:
        return None if self.own_source is None else self.own_source.generator

    @generator.setter
    def generator(self, generator: torch.Generator | None) -> None:
        self.draw_from(generator=generator)

    def source_repr(self) -> str:
        own = "" if self.own_source is None else f", {self.own_source}"
        return own if self.layout is None else f"{own}, layout={layouts.describe(self.layout)}"


def is_traced(module: nn.Module, input: Any) -> bool:
    """Whether `torch.fx` traces a model that the module is part of."""
    return isinstance(input, fx.Proxy) and getattr(input.tracer, "root", None) is not module


def trace_call(module: nn.Module, proxy: Any, *args: Any, **kwargs: Any) -> Any:
    """Puts a call of the module into fx's graph, as happens to torch's own modules, so that the call follows eval()."""
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (proxy, *args), kwargs)


hide_from_dynamo(OwnSource.next, Rated._drop_from_own_source)
