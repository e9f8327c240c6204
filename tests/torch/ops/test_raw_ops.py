"""Ops of ``torch.ops.fastdrop`` called with arguments that do not fit, changed saved tensors, and lazy clones.

Calls that a fault would let end the process run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastdrop as fd
import fastdrop.torch as fdt
from fastdrop import backends

from ... import fuzz_ops
from ...cases import ROOT

BACKENDS = [name for name in ("c", "numpy") if backends.reason(name) is None]  # Numba would compile for seconds

# Calls, and a part of what they must say. `t` makes a tensor of float32 or of the dtype named, `m` one on meta.
REFUSED = {
    "attention(t(64, 2), t(2, 8, 5, 2), t(8), None, seed, 0.5, False, 1.0,"
    " False, True)": "query, key, value and mask must be",
    "attention(t(2, 3), t(4, 3), t(9, 3), None, seed, 0.5, False, 1.0,"
    " False, True)": "query, key, value and mask must be",
    "attention(t(3, 2, 3), t(2, 4, 3), t(2, 4, 3), None, seed, 0.5, False, 1.0,"
    " False, True)": "query, key, value and mask",
    "attention(t(2, 3), t(0, 3), t(0, 3), None, seed, 0.5, False, 1.0, False, True)": "not empty",
    "attention(t(2, 3), t(4, 3), t(4, 3), t(2, 5), seed, 0.5, False, 1.0,"
    " False, True)": "query, key, value and mask must be",
    "attention(t(2, 3), t(4, 3), t(4, 3, dtype=f64), None, seed, 0.5, False, 1.0, False, True)": "of one float dtype",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), t(9, 3), None, t(2, 3), t(2, 2), seed, 0.5, False, 1.0, False,"
    " [True] * 4)": "query, key, value and mask must be those of forward",
    "attention_backward(t(9, 9), t(2, 3), t(4, 3), t(4, 3), None, t(2, 3), t(2, 2), seed, 0.5, False, 1.0, False,"
    " [True] * 4)": "dy must be torch.float32 of shape (2, 3)",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), None, None, t(2, 3), t(2, 2), seed, 0.5, False, 1.0, False,"
    " [True] * 4)": "value and y must be tensors",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), t(4, 3), None, t(2, 4), t(2, 2), seed, 0.5, False, 1.0, False,"
    " [True] * 4)": "y must be torch.float32 of shape (2, 3)",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), t(4, 3), None, t(2, 3), t(2), seed, 0.5, False, 1.0, False,"
    " [True] * 4)": "statistics must be torch.float32 of shape (2, 2)",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), t(4, 3), None, t(2, 3), t(2, 2), seed, 0.5, False, 1.0, False,"
    " [True] * 4)": "attn_mask must be of a float dtype for its gradient",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), None, t(5), None, t(2, 2), seed, 0.5, False, 1.0, False,"
    " [False] * 4)": "query, key, value and mask must be those of forward",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), None, None, None, t(2, 2).to('meta'), seed, 0.5, False, 1.0, False,"
    " [False, False, True, False])": "statistics must be on cpu",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), None, None, None, t(2, 2), words(64), 0.5, False, 1.0, True,"
    " [False, False, True, False])": "words must be",
    "attention(t(2, 3), t(4, 3), t(4, 3), None, seed, 0.5, False, 1.0, False, True, [2, 1])": "mask_shape must have",
    "attention(t(2, 2, 1, 2, 3), t(2, 2, 1, 4, 3), t(2, 2, 1, 4, 3), None, seed, 0.5, False, 1.0,"
    " False, True, [1, 2, 1, 2, 4])": "mask_shape must have",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), None, None, None, t(2, 2), words(12), 0.5, False, 1.0, True,"
    " [False, False, True, False], [3, 4])": "mask_shape must have",
    "attention_backward(t(2, 3), t(2, 3), t(4, 3), None, None, None, t(2, 2), words(0), 0.5, False, 1.0, True,"
    " [False, False, True, False], [1, 4])": "words must be 1 int32",
    "lora(x, t(5, 63), None, t(2, 64), t(5, 2), seed, 0.5, 2.0)": "weight must be (out, in), here (any, 64)",
    "lora(x, t(5, 64), t(4), t(2, 64), t(5, 2), seed, 0.5, 2.0)": "bias must be (out,), here (5)",
    "lora(x, t(5, 64), None, t(2, 64), t(5, 3), seed, 0.5, 2.0)": "lora_B must be (out, r), here (5, 2)",
    "lora(x, t(5, 64), None, t(2, 64, dtype=f64), t(5, 2), seed, 0.5, 2.0)": "lora_A must be of torch.float32",
    "lora(x, *(t(*s, dtype=i32) for s in ((5, 64), (5,), (2, 64), (5, 2))), seed, 0.5, 2.0)": "but got torch.int32",
    "lora(x.int(), t(5, 64), None, t(2, 64), t(5, 2), seed, 0.5, 2.0)": "but got torch.int32",
    "lora(t(9, 64, dtype=c64), t(5, 64), None, t(2, 64), t(5, 2), seed, 0.5, 2.0)": "takes real numbers",
    "lora(m(9, 64), m(5, 63), None, m(2, 64), m(5, 2), seed.to('meta'), 0.5, 2.0)": "weight must be (out, in)",
    "lora_backward(t(9, 5), x[:8], t(5, 64), t(2, 64), t(5, 2), seed, 0.5, 2.0, f32, [True] * 5)": "x must be (*, in)",
    "lora_backward(t(9, 5), x, t(5, 63), t(2, 64), t(5, 2), seed, 0.5, 2.0, f32, [True] * 5)": "weight must be (out",
    "lora_backward(t(9, 5), x, t(5, 64), t(2), t(5, 2), seed, 0.5, 2.0, f32, [True] * 5)": "lora_A must be (r, in)",
    "lora_backward(t(9, 5), x, t(5, 64), t(2, 64), t(4, 2), seed, 0.5, 2.0, f32, [True] * 5)": "lora_B must be (out",
    "lora_backward(t(9, 5), None, t(5, 64), t(2, 64), t(5, 2), seed, 0.5, 2.0, f32, [True] * 5)": "x must be a tensor",
    "lora_backward(t(9, 5), x, t(5, 64), t(2, 64), t(5, 2), seed, 1.5, 2.0, f32, [True] * 5)": "between 0 and 1",
    "norm_backward(half, None, x.double(), statistics, None, None, 0.5, True, True, [True] * 5)": "residual_out must",
    "norm_backward(x, None, x, x[:2], None, None, 0.5, True, True, [True] * 5)": "statistics must be",
    "norm_backward(x, None, x.int(), statistics, None, None, 0.5, True, True, [True] * 5)": "residual_out must be",
    "norm_backward(x, None, x, statistics, None, None, 0.5, True, True, [True] * 6)": "wanted must have 5 entries",
    "norm(x, None, x.int(), None, None, seed, 0.5, 1e-5, True, True)": "residual must be torch.float32",
    "norm(x, None, half, None, None, seed, 0.5, 1e-5, True, True)": "residual must be torch.float32",
    "pointwise(x, t(64, dtype=c64), None, None, seed, 0.5, 'gelu', True)": "input_bias must be of a float dtype",
    "pointwise_backward(x, None, None, None, words(576), 0.5, True, 'gelu', f32, True, False)": "x must be a tensor",
    "pointwise_backward(x, None, None, None, words(576), 0.5, True, 'gelu', f32, False, False)": "x must be a tensor",
    "pointwise_backward(x, x, None, None, None, 0.5, True, None, f32, True, True)": "multiplier must be a tensor",
    "pointwise_backward(x, x, None, None, None, 0.5, True, 'gelu', i32, True, False)": "dtype must be float32",
    "pointwise_backward(x, x, None, None, None, 0.5, True, 'gelu', f64, True, False)": "dy must be",
    "softmax(t(2, 5, 7), t(5, 7, dtype=c64), seed, 0.5, 1.0, False, True, True)": "mask must be of a float dtype",
    "draw_blocks(t(2, 3, 8, 8), seed, 0.5, [2, 3, 8, 8], [])": "block_size must be",
    "draw_blocks(t(2, 3, 8, 8), seed, 0.5, [2, 3, 8, 8], [-(2**31), 2**62])": "block_size must",
    "draw_blocks(t(2, 3, 8, 8), seed, 0.5, [8], [3, 3])": "block_size must be",
    "draw_blocks(t(2, 3, 8, 8), seed, 0.5, [2, -3, 8, 8], [3, 3])": "mask_shape must not have negative extents",
    "keep_blocks(t(2, 3), words(6), torch.tensor(float('inf')), [2, 3])": "kept_count must be one int64",
    "keep_blocks(t(2, 3), words(6), torch.ones(2, dtype=torch.int64), [2, 3])": "kept_count must be one int64",
    "backward(cut(t(64)), words(64), 0.5, None)": "dy must have memory for its shape",
    "backward(cut(t(64).expand(8, 64)), words(512), 0.5, None)": "dy must have memory for its shape",
    "forward(t(64), seed.to('meta'), 0.5, None, True)": "seed must be on cpu",
    **{f"forward(t(4, 6), seed, 0.3, {cells}, True)": "noise_shape must" for cells in ([2, 6], [4], [4, 6, 1], [8, 6])},
    **{
        f"backward(t(1, 100), {given}, 0.3, {cells})": "words must be 4 int32"
        for given, cells in (("words(64)", None), ("words(0)", [1, 100]), ("words(128).long()", None))
    },
    "keep_blocks(t(2, 3, 4, 5), words(64), torch.tensor(5), [2, 3, 4, 5])": "words must be 4 int32",
    "gaussian(x, seed, 1.5)": "between 0 and 1",
    "gaussian(x, seed, torch.tensor(-0.1))": "between 0 and 1",
    "gaussian(x, seed, float('nan'))": "between 0 and 1",
    "gaussian(x, seed, torch.tensor(1.0))": "below 1",
    "draw_blocks(t(2, 3, 4, 5), seed, torch.tensor(1.5), [2, 3, 4, 5], [2, 2])": "between 0 and 1",
    **{
        call.format(x=x): says
        for x in ("x", "m(9, 64)")  # by the kernel and by the fake kernel
        for call, says in (
            ("pointwise({x}.int(), None, None, None, None, 0.5, None, True)", "but got torch.int32"),
            ("softmax({x}.int(), None, None, 0.5, 1.0, False, True, True)", "but got torch.int32"),
            ("pointwise({x}, None, None, None, None, 0.5, 'swish', True)", "activation must be one of"),
            (
                "pointwise_backward({x}, {x}, None, None, None, 0.5, True, 'swish', f32, False, False)",
                "activation must be one of",
            ),
        )
    },
    "pointwise(x, None, None, x[:2], None, 0.5, None, True)": "residual must be torch.float32 of shape (9, 64) on cpu",
    "norm(x, None, None, x[0, :3], None, None, 0.5, 1e-5, True, True)": "weight must be torch.float32 of shape (64,)",
    "attention(m(64, 2), m(2, 8, 5, 2), m(8), None, seed, 0.5, False, 1.0,"
    " False, True)": "query, key, value and mask must be",
    "attention_backward(m(9, 9), m(2, 3), m(4, 3), None, None, None, m(2), seed.to('meta'), 0.5, False, 1.0, False,"
    " [False, False, True, False])": "dy must be",
}

CHILD = """
import itertools
import random
import sys
import torch
import fastdrop.torch
from tests import fuzz_ops
f16, f32, f64, i32, c64 = torch.float16, torch.float32, torch.float64, torch.int32, torch.complex64
t = lambda *shape, dtype=f32: torch.ones(shape, dtype=dtype)
m = lambda *shape: torch.ones(shape, device="meta")
words = lambda cells: torch.full(((cells + 31) // 32,), -1, dtype=i32)
seed = torch.tensor(1)
x, half, statistics = t(9, 64), t(9, 64, dtype=f16), t(9, 2)

def cut(x):
    x.untyped_storage().resize_(x.element_size())
    return x

for call in sys.stdin.read().splitlines():
    try:
        eval("torch.ops.fastdrop." + call)
        print("went well", flush=True)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "), flush=True)

# Every function, every tensor that it saves, every change of a hook: an error in words, or a gradient.
for function, (tensors, _) in fuzz_ops.FUNCTIONS.items():
    plan = fuzz_ops.Plan(random.Random(3), "attention" if "attention" in function else function)
    plan.shape, plan.dtype = (plan.shape if hasattr(plan, "y") else (6, 33)), f32
    given = tuple(fuzz_ops.replace(spec, grad=True) for spec in tensors(plan))
    for which, how in itertools.product(range(5), fuzz_ops.UNPACKED):
        call = fuzz_ops.Call(function, given, sys.argv[1], 2, (which, how))
        wrong = fuzz_ops.run(call, 0, 0)
        if wrong is not None:
            print("hook:", call, wrong, flush=True)
print("all hooks went well")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the child prints, under an allocator that ends it where a kernel leaves its tensors."""
    library = fuzz_ops.guard(tmp_path_factory.mktemp("guard"))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, BACKENDS[0]],
        input="\n".join(REFUSED),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **({"LD_PRELOAD": str(library)} if library is not None else {})},
        timeout=600,
    )
    return [*child.stdout.splitlines(), f"the process ended with {child.returncode}: {child.stderr[-1000:]}"]


@pytest.mark.parametrize("call", REFUSED)
def test_ops_refuse_what_kernels_would_read_or_write_out_of_bounds(call: str, said: list[str]) -> None:
    answers = dict(zip(REFUSED, said, strict=False))
    assert REFUSED[call] in answers.get(call, "not reached")
    assert answers[call].split()[0] in ("ValueError", "TypeError", "RuntimeError")


def test_saved_tensors_that_hooks_changed_are_refused(said: list[str]) -> None:
    after = said[len(REFUSED) :]
    assert "all hooks went well" in after, after
    assert not [line for line in after if line.startswith("hook:")]


@pytest.mark.slow("test_ops_refuse_what_kernels_would_read_or_write_out_of_bounds")
def test_random_calls_of_all_ops() -> None:
    """`make fuzz` does more of them."""
    options = ["--seconds", "6", "--seed", "7", "--backends", ",".join(BACKENDS)]
    command = [sys.executable, "-m", "tests.fuzz_ops", *options]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert child.returncode == 0, child.stdout + child.stderr


# ---- lazy clones ----

READERS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "dropout": (lambda x: fdt.dropout(x, 0.5), [(6, 33)]),
    "dropout, transposed": (lambda x: fdt.dropout(x.t(), 0.5), [(6, 33)]),
    "dropout by seed": (lambda x: fdt.dropout(x, 0.5, store="seed"), [(6, 33)]),
    "dropout1d": (lambda x: fdt.dropout1d(x, 0.5), [(2, 6, 33)]),
    "gaussian_dropout": (lambda x: fdt.gaussian_dropout(x, 0.5), [(6, 33)]),
    "drop_block2d": (lambda x: fdt.drop_block2d(x, 0.5, 2), [(2, 3, 5, 5)]),
    "swiglu_dropout": (lambda x, y: fdt.swiglu_dropout(x, y, 0.5), [(6, 33)] * 2),
    "dropout_add_layer_norm": (
        lambda x, y, w, b: fdt.dropout_add_layer_norm(x, y, w, b, 0.5)[0],
        [(6, 33), (6, 33), (33,), (33,)],
    ),
    "softmax_dropout": (lambda x, mask: fdt.softmax_dropout(x, 0.5, 1.0, mask), [(6, 33), (33,)]),
    "attention": (
        lambda q, k, v, mask: fdt.scaled_dot_product_attention(q, k, v, mask, 0.5),
        [(2, 5, 4), (2, 6, 4), (2, 6, 3), (5, 6)],
    ),
    "op norm": (
        lambda x, y: torch.ops.fastdrop.norm(x, None, y, None, None, torch.tensor(3), 0.5, 1e-5, True, True)[0],
        [(6, 33)] * 2,
    ),
}


def test_ops_read_lazy_clones_of_words_and_seeds() -> None:
    ops, x, words = torch.ops.fastdrop, torch.randn(4, 40), torch.randint(-(2**31), 2**31 - 1, (5,), dtype=torch.int32)
    lazy, seed, kept = torch._lazy_clone(words), torch._lazy_clone(torch.tensor(3)), torch._lazy_clone(torch.tensor(80))
    assert torch.equal(ops.backward(x, lazy, 0.5, None), ops.backward(x, words, 0.5, None))
    blocks = ops.keep_blocks(x, words, kept, x.shape)
    assert torch.equal(ops.keep_blocks(x, lazy, kept, x.shape), blocks)
    gradient = x, None, None, None, words, 0.5, True, None, torch.float32, True, False
    assert torch.equal(
        ops.pointwise_backward(*gradient[:4], lazy, *gradient[5:])[1], ops.pointwise_backward(*gradient)[1]
    )
    ops.forward(x, seed, 0.5, None, True)
    assert all(map(_is_lazy, (lazy, seed, kept)))


def _is_lazy(x: Tensor) -> bool:
    return torch._C._is_cow_tensor(x)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_a_lazy_clone_makes_no_copy(name: str, backend: str) -> None:
    """`torch._lazy_clone` shares memory until it is written to; so do gradients that come as such."""
    function, shapes = READERS[name]
    with fd.use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            given = [torch.randn(3, *shape, dtype=dtype)[1].requires_grad_() for shape in shapes]
            lazy = [torch._lazy_clone(x.detach()).requires_grad_() for x in given]
            torch.manual_seed(0)
            want = function(*given)
            dy = torch.randn_like(want)
            want.backward(dy)
            torch.manual_seed(0)
            got, lazy_dy = function(*lazy), torch._lazy_clone(dy)
            got.backward(lazy_dy)
            assert torch.equal(got, want)
            assert all(torch.equal(x.grad, y.grad) for x, y in zip(lazy, given, strict=True))  # type: ignore[arg-type]
            assert all(_is_lazy(x) for x in (*lazy, lazy_dy))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(6, 33), (33, 6)])
def test_writing_to_a_lazy_clone_leaves_what_it_was_cloned_from(shape: tuple[int, int], backend: str) -> None:
    functions = {
        "dropout": lambda x, inplace: fdt.dropout(x, 0.5, inplace=inplace, seed=3),
        "dropout1d": lambda x, inplace: fdt.dropout1d(x, 0.5, inplace=inplace, seed=3),
        "gaussian": lambda x, inplace: fdt.gaussian_dropout(x, 0.5, inplace=inplace, seed=3),
        "transposed": lambda x, inplace: fdt.dropout(x.t(), 0.5, inplace=inplace, seed=3),
    }
    with fd.use_backend(backend):
        for function in functions.values():
            x = torch.randn(2, *shape)[1]
            before = x.clone()
            lazy = torch._lazy_clone(x)
            assert torch.equal(function(lazy, True), function(before, False))
            assert torch.equal(x, before)
            assert not _is_lazy(lazy)
