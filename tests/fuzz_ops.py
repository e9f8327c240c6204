"""Calls the ops ``torch.ops.fastdrop.*`` with arguments that mostly do not fit: no call may touch memory of others.

    make fuzz SECONDS=600                            # with seeds of its own, which it prints
    python -m tests.fuzz_ops --seed 5 --call 1234    # one call again

Ops and the types of their arguments are read from their schemas, so that new ops are covered as they are. An argument
gets what its name calls for (`RECIPES`), or something of its type, and some arguments are then changed. A call must
raise ValueError, TypeError or RuntimeError, or give what its fake kernel says. Calls run in a child process, under an
allocator that ends each tensor at a page that nobody may touch (c/guard_alloc.c; without a compiler or glibc, without
it). A call is a function of seed and number, so one that ends the child can be described by its parent.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdrop as fd
import fastdrop.torch as fdt
from fastdrop import backends

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.complex64, torch.complex128, torch.int32, torch.int64, torch.uint8, torch.bool)
ALLOWED = (ValueError, TypeError, RuntimeError, MemoryError)
# As extents the larger ones take more memory than there is: a mask of fewer cells may be drawn, for minutes.
WILD_INTS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 31, 33, 2**12, 2**36 + 1, 2**40, 2**62, 2**63 - 1)
WILD_FLOATS = (0.0, 1.0, 0.5, 1e-30, -1.0, 2.0, math.inf, -math.inf, math.nan)
FILL = b"\xa5" * 8  # guard_alloc's: of a result that nobody wrote
MEMORY = 3 << 30
ROOT = Path(__file__).resolve().parents[1]
SEARCHED = 1 << 22  # elements of results that are looked through for FILL

# ---- arguments ----


@dataclass(frozen=True)
class Spec:
    """A tensor to be made: what a call is described by."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "dense"
    grad: bool = False

    def __repr__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        rest = "".join(f", {word}" for word in (self.layout, "grad" * self.grad) if word and word != "dense")
        return f"<{name} {list(self.shape)}{rest}>"

    def make(self, generator: torch.Generator) -> Tensor:
        x = LAYOUTS[self.layout](self._dense(self.shape, generator))
        return x.requires_grad_() if self.grad and (x.is_floating_point() or x.is_complex()) else x

    def _dense(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(shape, dtype=self.dtype, generator=generator)
        if self.dtype is torch.bool:
            return torch.rand(shape, generator=generator) < 0.5
        low, high = (0, 255) if self.dtype is torch.uint8 else (-(2**31), 2**31 - 1)
        return torch.randint(low, high, shape, dtype=self.dtype, generator=generator)


def _reversed(x: Tensor) -> Tensor:
    axes = list(range(x.dim()))[::-1]
    return x.permute(axes).contiguous().permute(axes)


def _every_second(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 1]


def _expanded(x: Tensor) -> Tensor:
    """The first entry of each of some axes, everywhere."""
    for axis in range(0, x.dim(), 2):
        x = x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)
    return x


def _windows(x: Tensor) -> Tensor:
    """Rows that overlap one another."""
    if x.dim() < 2 or not x.numel():
        return x
    return x.as_strided(x.shape, [1] * x.dim())


def _unaligned(x: Tensor) -> Tensor:
    """At an odd address. Torch's own loops crash there for numbers of 16 bytes."""
    size = x.numel() * x.element_size()
    if not size or x.is_complex():
        return x
    memory = torch.empty(size + 1, dtype=torch.uint8)
    memory[1:] = x.contiguous().flatten().view(torch.uint8)
    return torch.frombuffer(memory.numpy().data, dtype=x.dtype, count=x.numel(), offset=1).view(x.shape)


def _without_memory(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "reversed": _reversed,
    "every second": _every_second,
    "expanded": _expanded,
    "windows": _windows,
    "unaligned": _unaligned,
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "lazy clone": lambda x: torch._lazy_clone(x),
    "negative": lambda x: torch._neg_view(x) if x.dtype is not torch.bool else x,
    "conjugate": lambda x: x.conj(),
    "no memory": _without_memory,
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
}
USUAL = ("dense", "reversed", "every second", "expanded", "windows", "unaligned", "offset", "lazy clone")


class Plan:
    """What the arguments of one call have in common: a shape, a dtype, and what attention and LoRA are made of."""

    def __init__(self, rng: random.Random, op: str) -> None:
        self.rng = rng
        dims = rng.choice((0, 1, 2, 2, 3, 4))
        if op in ("keep_blocks", "draw_blocks"):
            dims = max(dims, 2)
        limit = 6 if dims > 2 else 70
        self.shape = tuple(rng.choice((1, 2, 3, rng.randint(1, limit), rng.randint(1, limit))) for _ in range(dims))
        if rng.random() < 0.05 and dims:
            self.shape = (rng.randint(1000, 3000), *self.shape[1:])
        self.dtype = rng.choice(FLOATS)
        self.wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        self.bits = rng.random() < 0.6
        if "attention" in op:
            groups, heads, queries, keys, width, of_value = (rng.randint(1, 5) for _ in range(6))
            outer = tuple(rng.randint(1, 3) for _ in range(rng.choice((0, 1, 1))))
            heads_axis = rng.random() < 0.8
            before = (*outer, heads * groups) if heads_axis else ()
            served = (*outer, heads) if heads_axis else ()
            self.query, self.key = (*before, queries, width), (*served, keys, width)
            self.value, self.shape = (*served, keys, of_value), (*before, queries, keys)
            self.y = (*before, queries, of_value)
        if "lora" in op:
            width, out, rank = (rng.randint(1, 40) for _ in range(3))
            self.shape, self.y = (*self.shape[:-1], width), (*self.shape[:-1], out)
            self.lora = {"weight": (out, width), "bias": (out,), "lora_A": (rank, width), "lora_B": (out, rank)}
        self.stream = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) and rng.random() < 0.5 else None
        self.noise = tuple(rng.choice((extent, 1)) for extent in self.shape) if rng.random() < 0.4 else self.shape
        if "attention" in op:
            self.noise = (*self.noise[:-1], keys)
        self.op = op

    def words(self) -> Spec:
        cells = math.prod(self.shape if "mask_shape" not in self.takes else self.noise)
        return Spec(((cells + 31) // 32,), torch.int32)

    takes: frozenset[str] = frozenset()

    def columns(self) -> Spec:
        return Spec(self.shape[-1:], self.rng.choice((self.dtype, self.wide)))

    def data(self) -> Spec:
        return Spec(self.shape, self.dtype)

    def residual(self) -> Spec:
        return Spec(self.shape, self.stream or self.dtype)

    def saved_mask(self) -> Spec:
        """Words, or the seed in backward ops that are told of it by ``store_bits``."""
        return self.words() if self.bits or "store_bits" not in self.takes else Spec((), torch.int64)

    def mask(self) -> Spec:
        drop = self.rng.randint(0, len(self.shape))
        shape = tuple(self.rng.choice((extent, extent, 1)) for extent in self.shape[drop:])
        return Spec(shape, self.rng.choice((torch.bool, torch.float32, self.dtype)))


def _of(method: str) -> Callable[[Plan], Any]:
    return lambda plan: getattr(plan, method)()


RECIPES: dict[str, Callable[[Plan], Any]] = {
    **dict.fromkeys(("x", "like", "scores", "multiplier"), _of("data")),
    "dy": lambda plan: Spec(plan.y, plan.dtype) if hasattr(plan, "y") else plan.dy(),
    **dict.fromkeys(("residual", "residual_out", "dresidual_out"), _of("residual")),
    **dict.fromkeys(("input_bias", "norm_bias"), _of("columns")),
    "weight": lambda plan: Spec(plan.lora["weight"], plan.dtype) if "lora" in plan.op else plan.columns(),
    **{name: lambda plan, name=name: Spec(plan.lora[name], plan.dtype) for name in ("bias", "lora_A", "lora_B")},
    "saved_mask": _of("saved_mask"),
    "kept_count": lambda plan: Spec((), torch.int64),
    "attn_mask": _of("mask"),
    "seed": lambda plan: Spec((), torch.int64),
    "statistics": lambda plan: Spec(
        (*plan.y[:-1], 2) if "attention" in plan.op else (math.prod(plan.shape[:-1]), 2), plan.wide
    ),
    "probabilities": _of("data"),
    "y": lambda plan: Spec(plan.y, plan.dtype),
    **{name: lambda plan, name=name: Spec(getattr(plan, name), plan.dtype) for name in ("query", "key", "value")},
    "mask_shape": lambda plan: list(plan.noise),
    "size": lambda plan: list(plan.shape[:1]),
    "block_size": lambda plan: [
        plan.rng.randint(1, 4) for _ in range(plan.rng.randint(1, max(1, len(plan.shape) - 1)))
    ],
    "activation": lambda plan: plan.rng.choice((None, "relu", "gelu", "gelu_tanh", "silu")),
    "scaling": lambda plan: (
        0.5 if "lora" in plan.op else plan.rng.choice(("inverted", "standard", "alpha", "alpha_slope"))
    ),
    "dtype": lambda plan: plan.dtype,
    "store_bits": lambda plan: plan.bits,
    "softmax_scale": lambda plan: plan.rng.choice((1.0, 0.3)),
    "eps": lambda plan: 1e-5,
}
Plan.dy = lambda plan: plan.residual() if plan.op == "pointwise_backward" else plan.data()  # type: ignore[attr-defined]


WITHOUT_KERNELS = ("fastdrop::draw_named", "fastdrop::layout_cells")  # they read no tensor


@functools.cache
def _schemas() -> list[Any]:
    found = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastdrop::")]
    found = [schema for schema in found if schema.name not in WITHOUT_KERNELS]
    return sorted(found, key=lambda schema: (schema.name, schema.overload_name))


def _type_of(argument: Any) -> tuple[str, bool]:
    """Its type as the schema has it, and whether None may stand for it."""
    text = str(argument.real_type)
    optional = text.startswith("Optional[")
    return text.removeprefix("Optional[").removesuffix("]") if optional else text, optional


def _argument(rng: random.Random, plan: Plan, argument: Any) -> Any:
    kind, optional = _type_of(argument)
    if optional and rng.random() < 0.3:
        return None
    if argument.name == "p":
        number = rng.choice((0.5, 0.1, 0.9, 0.0, 1.0))
        return Spec((), torch.float64) if kind == "Tensor" else number
    if argument.name in RECIPES and (kind != "int" or argument.name == "dtype"):
        return RECIPES[argument.name](plan)
    return _of_type(rng, plan, kind, argument.N)


def _of_type(rng: random.Random, plan: Plan, kind: str, count: int | None) -> Any:
    """Something of a type: for arguments whose names say nothing, and in the place of what they say."""
    if kind == "Tensor":
        some = (plan.data, plan.words, plan.columns, lambda: Spec((), torch.int64), lambda: _wild_tensor(rng))
        return rng.choice(some)()
    if kind.startswith("List["):
        length = (
            rng.choice((count, count, rng.randint(0, 6))) if count else rng.choice((len(plan.shape), rng.randint(0, 5)))
        )
        return [_of_type(rng, plan, kind[5:-1], None) for _ in range(length)]
    if kind == "ScalarType":
        return rng.choice(DTYPES)
    if kind == "bool":
        return rng.random() < 0.5
    if kind in ("int", "SymInt"):
        return rng.choice((*plan.shape, *WILD_INTS))
    if kind in ("float", "number"):
        return rng.choice((*WILD_FLOATS, rng.random()))
    return rng.choice(("", "relu", "inverted", "nothing", "\x00"))


def _wild_tensor(rng: random.Random) -> Spec:
    shape = tuple(rng.choice((0, 1, 2, 5, 33)) for _ in range(rng.randint(0, 4)))
    return Spec(shape, rng.choice(DTYPES), rng.choice(list(LAYOUTS)))


def _changed(rng: random.Random, plan: Plan, value: Any, kind: str, optional: bool, count: int | None) -> Any:
    """An argument that likely fits no more."""
    if optional and rng.random() < 0.2:
        return None
    if not isinstance(value, Spec) or rng.random() < 0.15:
        return _of_type(rng, plan, kind, count)
    shape = list(value.shape)
    change = rng.choice(("extent", "extent", "fewer", "more", "dtype", "dtype", "layout", "empty", "one", "all"))
    if change == "all":
        return _wild_tensor(rng)
    if change in ("extent", "empty", "one") and shape:
        axis = rng.randrange(len(shape))
        shape[axis] = {"empty": 0, "one": 1}.get(change, max(0, shape[axis] + rng.choice((-2, -1, 1, 7, 64))))
    elif change == "fewer" and shape:
        del shape[rng.randrange(len(shape))]
    elif change == "more":
        shape.insert(rng.randint(0, len(shape)), rng.choice((1, 2)))
    elif change == "dtype":
        return replace(value, dtype=rng.choice(DTYPES))
    elif change == "layout":
        return replace(value, layout=rng.choice(list(LAYOUTS)))
    return replace(value, shape=tuple(shape))


# ---- calls ----


@dataclass(frozen=True)
class Call:
    name: str
    arguments: tuple[Any, ...]
    backend: str
    threads: int
    unpack: tuple[int, str] | None  # the saved tensor that a hook changes, and how

    def __repr__(self) -> str:
        hook = "" if self.unpack is None else ", saved tensor {} {}".format(*self.unpack)
        given = ", ".join(map(repr, self.arguments))
        return f"{self.name}({given})  [{self.backend}, {self.threads} threads{hook}]"


def a_call(seed: int, number: int, using: tuple[str, ...]) -> Call:
    rng = random.Random(f"{seed}:{number}")
    backend, threads = rng.choice(using), rng.choice((1, 2))
    unpack = (rng.randint(0, 7), rng.choice(list(UNPACKED))) if rng.random() < 0.4 else None
    if rng.random() < 0.15:
        name = rng.choice(list(FUNCTIONS))
        plan = Plan(rng, "attention" if "attention" in name else name)
        tensors = FUNCTIONS[name][0](plan)
        return Call(name, tuple(replace(spec, grad=True) for spec in tensors), backend, threads, unpack)
    schema = rng.choice(_schemas())
    op = schema.name.removeprefix("fastdrop::")
    plan = Plan(rng, op)
    plan.takes = frozenset(argument.name for argument in schema.arguments)
    arguments = [_argument(rng, plan, argument) for argument in schema.arguments]
    differentiated = rng.random() < 0.4
    for i, value in enumerate(arguments):
        if isinstance(value, Spec):
            layout = rng.choice(USUAL) if rng.random() < 0.3 else "dense"
            arguments[i] = replace(value, layout=layout, grad=differentiated and rng.random() < 0.7)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        i = rng.randrange(len(arguments))
        argument = schema.arguments[i]
        arguments[i] = _changed(rng, plan, arguments[i], *_type_of(argument), argument.N)
    return Call(
        f"torch.ops.fastdrop.{op}.{schema.overload_name or 'default'}", tuple(arguments), backend, threads, unpack
    )


FUNCTIONS: dict[str, tuple[Callable[[Plan], tuple[Spec, ...]], Callable[..., Any]]] = {
    "dropout": (lambda plan: (plan.data(),), lambda x: fdt.dropout(x, 0.5)),
    "dropout by seed": (lambda plan: (plan.data(),), lambda x: fdt.dropout(x, 0.5, store="seed")),
    "gaussian_dropout": (lambda plan: (plan.data(),), lambda x: fdt.gaussian_dropout(x, 0.5)),
    "drop_block2d": (lambda plan: (Spec((2, 3, 7, 5), plan.dtype),), lambda x: fdt.drop_block2d(x, 0.3, 3)),
    "bias_act_dropout": (
        lambda plan: (Spec((4, *plan.shape), plan.dtype), Spec((plan.shape or (4,))[-1:], plan.dtype)),
        lambda x, bias: fdt.bias_act_dropout(x, bias, 0.5, "silu"),
    ),
    "swiglu_dropout": (lambda plan: (plan.data(), plan.data()), lambda x, up: fdt.swiglu_dropout(x, up, 0.5)),
    "dropout_add_layer_norm": (
        lambda plan: (Spec((4, *plan.shape), plan.dtype),) * 2 + (Spec((plan.shape or (4,))[-1:], plan.dtype),) * 2,
        lambda x, residual, weight, bias: fdt.dropout_add_layer_norm(x, residual, weight, bias, 0.5)[0],
    ),
    "softmax_dropout": (
        lambda plan: (Spec((4, *plan.shape), plan.dtype), Spec((plan.shape or (4,))[-1:], plan.wide)),
        lambda x, mask: fdt.softmax_dropout(x, 0.5, 1.0, mask),
    ),
    "lora_linear": (
        lambda plan: tuple(Spec(shape, plan.dtype) for shape in (plan.shape, *plan.lora.values())),
        lambda x, weight, bias, lora_A, lora_B: fdt.lora_linear(x, weight, bias, lora_A, lora_B, 0.5, 0.5),
    ),
    "scaled_dot_product_attention": (
        lambda plan: tuple(Spec(shape, plan.dtype) for shape in (plan.query, plan.key, plan.value)),
        lambda q, k, v: fdt.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=q.dim() > 2),
    ),
    "scaled_dot_product_attention, one mask for all heads": (
        lambda plan: tuple(Spec(shape, plan.dtype) for shape in (plan.query, plan.key, plan.value)),
        lambda q, k, v: fdt.scaled_dot_product_attention(
            *(q, k, v, None, 0.5), enable_gqa=q.dim() > 2, noise_shape=(*(1,) * (q.dim() - 2), None, None), store="bits"
        ),
    ),
    "scaled_dot_product_attention, masked": (
        lambda plan: tuple(
            Spec(shape, plan.dtype) for shape in (plan.query, plan.key, plan.value, (*plan.query[:-1], plan.key[-2]))
        ),
        lambda q, k, v, mask: fdt.scaled_dot_product_attention(q, k, v, mask, 0.5, enable_gqa=q.dim() > 2),
    ),
}
UNPACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "shorter": lambda x: x[: len(x) // 2] if x.dim() else x.new_empty(0),
    "longer": lambda x: torch.cat([x, x]) if x.dim() else x.expand(2),
    "flattened": lambda x: x.flatten(),
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() else x,
    "without axes": lambda x: x.new_zeros(()),
    "as float64": lambda x: x.to(torch.float64),
    "as bfloat16": lambda x: x.to(torch.bfloat16),
    "as int64": lambda x: x.to(torch.int64),
    "as bytes": lambda x: x.contiguous().view(torch.uint8) if x.dim() else x.to(torch.uint8),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse() if x.dim() else x,
    "negative": lambda x: torch._neg_view(x),
}


@contextmanager
def _hooked(unpack: tuple[int, str] | None) -> Iterator[None]:
    if unpack is None:
        yield
        return
    which, how = unpack
    count = iter(range(1000))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (next(count), x), lambda at: UNPACKED[how](at[1].detach()) if at[0] == which else at[1]
    ):
        yield


def run(call: Call, seed: int, number: int) -> str | None:
    """What is wrong with a call that came back; None if nothing is."""
    torch.set_num_threads(call.threads)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    try:
        given = [value.make(generator) if isinstance(value, Spec) else value for value in call.arguments]
    except ALLOWED:
        return None  # torch has no such tensor
    op = None
    if call.name in FUNCTIONS:
        function = FUNCTIONS[call.name][1]
    else:
        *_, packet, overload = call.name.split(".")
        op = function = getattr(getattr(torch.ops.fastdrop, packet), overload)
    try:
        with fd.use_backend(call.backend), _hooked(call.unpack):
            results = function(*given)
    except ALLOWED as error:
        return _wrong_words(error)
    except Exception as error:
        return f"raised {type(error).__name__}: {error}"
    results = (results,) if isinstance(results, Tensor) else results
    wrong = _wrong_results(op, given, results)
    if wrong is None and any(result.requires_grad for result in results):
        wanted = [result for result in results if result.requires_grad]
        inputs = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        try:
            with fd.use_backend(call.backend):
                gradients = torch.autograd.grad(wanted, inputs, [torch.ones_like(y) for y in wanted], allow_unused=True)
        except ALLOWED as error:
            return _wrong_words(error)
        except Exception as error:
            return f"backward raised {type(error).__name__}: {error}"
        wrong = _unwritten([gradient for gradient in gradients if gradient is not None])
    return wrong


def _wrong_words(error: Exception) -> str | None:
    """A kernel's own refusal is the last resort: who calls it should have said what was wrong."""
    text = str(error)
    return f"raised {type(error).__name__}: {text!r}" if "refused" in text or not text else None


def _wrong_results(op: Any, given: list[Any], results: tuple[Tensor, ...]) -> str | None:
    if any(isinstance(x, Tensor) and (x.is_meta or x.layout is not torch.strided) for x in given):
        return None
    if op is not None:
        try:
            fakes = op(*(_fake(x) for x in given))
        except Exception as error:
            if "can't allocate memory" in str(error):
                return None
            return f"went well, but its fake kernel raised {type(error).__name__}: {error}"
        fakes = (fakes,) if isinstance(fakes, Tensor) else fakes
        for result, fake in zip(results, fakes, strict=True):
            real, told = ((list(x.shape), x.dtype, _strides(x)) for x in (result, fake))
            if real != told:
                return f"gave {real}, but its fake kernel {told}"
    return _unwritten(results)


def _strides(x: Tensor) -> list[int]:
    """Those that say where elements lie."""
    return [stride for extent, stride in zip(x.shape, x.stride(), strict=True) if extent > 1 and x.numel()]


def _fake(x: Any) -> Any:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x


def _unwritten(results: Any) -> str | None:
    for i, result in enumerate(results):
        x = result.detach()
        if x.layout is torch.strided and not x.is_meta and 0 < x.numel() < SEARCHED:
            x = x.resolve_neg().resolve_conj()
            if FILL in (x.view(torch.int16) if x.dtype is torch.bfloat16 else x).numpy().tobytes():
                return f"left a part of result {i} unwritten"
    return None


# ---- processes ----


def work(seed: int, first: int, seconds: float, using: tuple[str, ...], at: str) -> int:
    """The child: calls from a number on, each written down before it begins. Gives the number of the first bad one."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.manual_seed(seed)
    end, number = math.inf, first
    file = os.open(at, os.O_WRONLY)
    while time.monotonic() < end:
        os.pwrite(file, struct.pack("=qq", number, 0), 0)
        wrong = run(a_call(seed, number, using), seed, number)
        if wrong is not None:
            print(wrong, file=sys.stderr, flush=True)
            return 1
        if number == first:  # which has imported what fake kernels need, for seconds
            end = time.monotonic() + seconds
        number += 1
    os.pwrite(file, struct.pack("=qq", number, 1), 0)
    return 0


def guard(folder: Path) -> Path | None:
    """The allocator, built; None where it can't be."""
    source, library = Path(__file__).parent / "c" / "guard_alloc.c", folder / "guard_alloc.so"
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    built = subprocess.run([compiler, "-O1", "-g", "-shared", "-fPIC", source, "-o", library], capture_output=True)
    return library if built.returncode == 0 else None


def watch(seed: int, seconds: float, using: tuple[str, ...], first: int) -> int:
    """The parent: starts the child, and describes the call that was the last one if that was bad."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library, at = guard(folder), folder / "at"
        if library is None:
            print("without guard pages: they need a C compiler and glibc")
        environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        at.write_bytes(struct.pack("=qq", first, 0))
        arguments = ["--child", at, "--seed", seed, "--seconds", seconds, "--call", first]
        command = [sys.executable, "-m", "tests.fuzz_ops", *map(str, arguments), "--backends", ",".join(using)]
        limits: dict[str, Any] = {"cwd": ROOT, "env": environment, "timeout": seconds + 120}
        try:
            child = subprocess.run(command, capture_output=True, text=True, **limits)
            what, said = _ending(child.returncode), child.stderr.strip()[-2000:]
        except subprocess.TimeoutExpired:
            what, said = "went on for minutes", ""
        number, done = struct.unpack("=qq", at.read_bytes())
    print(f"{number - first} calls went well")
    if not done:
        print(f"call {number} of seed {seed}: {a_call(seed, number, using)}\n  {what}: {said}")
    return int(not done)


def _ending(status: int) -> str:
    return f"ended by signal {-status}" if status < 0 else f"exit status {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="by default the time")
    parser.add_argument("--call", type=int, help="this call alone")
    parser.add_argument("--backends", default=",".join(n for n in backends.MODULES if backends.reason(n) is None))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    using = tuple(options.backends.split(","))
    if options.child is not None:
        return work(options.seed, options.call, options.seconds, using, options.child)
    print(f"seed {options.seed}, backends {options.backends}", flush=True)
    return watch(options.seed, options.seconds if options.call is None else 0.0, using, options.call or 0)


if __name__ == "__main__":
    sys.exit(main())
