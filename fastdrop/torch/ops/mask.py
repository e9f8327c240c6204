"""The ops ``torch.ops.fastdrop.*``: what compilers, transforms and tracers see of dropout.

``draw`` takes a seed from torch's generator; the others are functions of their arguments alone: ``forward`` and its
gradient ``backward`` for all that keeps or drops, ``gaussian``, and DropBlock in two halves, ``draw_blocks`` and
``keep_blocks``. Every op has a fake kernel, ``vmap`` rules and derivatives of any order, reverse and forward; all but
forward are linear and their own adjoints. p may be a float or, in the overloads named ``tensor``, a tensor without
axes: one that changes from step to step then costs no recompilation.

The derivatives are kernels of our own and not `torch.library.register_autograd`'s, which drop tangents without a word
and refuse to be transformed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...core import checks, variants
from ...core.mask import word_count
from ...core.random import threshold
from ..runtime import mask_kernels, tracing
from ..runtime import seeds as seed_source
from ..runtime.dispatch import hide_from_dynamo
from ..runtime.dispatch.compilers import let_inductor_call
from ..runtime.dispatch.ops import below_autograd, innermost_map, register_batching, register_derivative

DRAW = "draw(Tensor like, SymInt[] size, Tensor? after=None) -> Tensor"
FORWARD = (
    '(Tensor x, Tensor seed, {p} p, SymInt[]? noise_shape, bool bits, str law="inverted") -> (Tensor y, Tensor words)'
)
BACKWARD = '(Tensor dy, Tensor words, {p} p, SymInt[]? noise_shape, str law="inverted") -> Tensor'
GAUSSIAN = "(Tensor x, Tensor seed, {p} p) -> Tensor"
DRAW_BLOCKS = (
    "(Tensor like, Tensor seed, {p} p, SymInt[] noise_shape, SymInt[] block_size) -> (Tensor words, Tensor kept)"
)
KEEP_BLOCKS = "(Tensor x, Tensor words, Tensor kept, SymInt[] noise_shape) -> Tensor"
P_TYPES = {"": "float", ".tensor": "Tensor"}  # by overload

library = torch.library.Library("fastdrop", "DEF")


def probability(p: float | Tensor) -> float:
    number = value_of(p) if isinstance(p, Tensor) else float(p)
    return checks.dropout_probability(number)


def gaussian_probability(p: float | Tensor) -> float:
    return checks.gaussian_probability(probability(p))


def value_of(p: Tensor) -> float:
    """The number in a tensor, unless a GPU would have to be waited for."""
    if p.is_cuda:
        raise ValueError("p, the drop probability, must be a number or a tensor on the CPU, but got one on the GPU")
    return float(p.item())


def cells_shape(noise_shape: Any, x: Tensor) -> tuple[int, ...] | None:
    """Extents of x's mask, None where they are those of x."""
    if noise_shape is None:
        return None
    full = tuple(x.shape)
    cells = checks.noise_shape(noise_shape, full)
    return None if cells == full else cells


# ---- CPU and CUDA ----


def _draw(like: Tensor, size: list[int], after: Tensor | None = None) -> Tensor:
    """``like`` is for the dispatcher: a fake or wrapped tensor gets a fake or wrapped seed. ``after`` is for compilers:
    see `tracing`."""
    size = size or []  # AOTInductor hands on an empty list as None
    if (seeds := seed_source.sample_seeds()) is not None:
        return seeds.draw(size, seed_source.device_for(like))
    if size or not like.is_cuda:
        return torch.empty(size, dtype=torch.int64, device=seed_source.device_for(like)).random_()
    seed = seed_source.draw_cuda(like.device, None)  # what eager code takes
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), seed_source.signed(seed), dtype=torch.int64, device=like.device)


def _forward(
    x: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int] | None, bits: bool, law: str = "inverted"
) -> tuple[Tensor, Tensor]:
    cut = threshold(probability(p))
    number = seed_source.for_kernel(seed, x)
    y, words = mask_kernels.forward(x, number, cut, variants.affine(law, cut), cells_shape(noise_shape, x), bits)
    return y, x.new_empty(0, dtype=torch.int32) if words is None else words


def _backward(
    dy: Tensor, words: Tensor, p: float | Tensor, noise_shape: list[int] | None, law: str = "inverted"
) -> Tensor:
    affine = variants.affine(law, threshold(probability(p)))
    return mask_kernels.apply(dy, mask_kernels.read_words(words), affine, cells_shape(noise_shape, dy))


def _gaussian(x: Tensor, seed: Tensor, p: float | Tensor) -> Tensor:
    return mask_kernels.gaussian(x, seed_source.for_kernel(seed, x), variants.spread(gaussian_probability(p)))


def _draw_blocks(
    like: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int], block_size: list[int]
) -> tuple[Tensor, Tensor]:
    cells = checks.shape("noise_shape", noise_shape)
    sizes = checks.block_size(block_size, max(1, min(len(block_size), len(cells))))
    plan = variants.blocks(cells, probability(p), sizes)
    return mask_kernels.draw_blocks(like, seed_source.for_kernel(seed, like), threshold(plan.gamma), plan)


def _keep_blocks(x: Tensor, words: Tensor, kept: Tensor, noise_shape: list[int]) -> Tensor:
    return mask_kernels.keep_blocks(x, mask_kernels.read_words(words), kept, cells_shape(noise_shape, x))


# ---- shapes alone ----


def _draw_fake(like: Tensor, size: list[int], after: Tensor | None = None) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device=seed_source.device_for(like))


def _forward_fake(
    x: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int] | None, bits: bool, law: str = "inverted"
) -> tuple[Tensor, Tensor]:
    mask_kernels.check_dtype(x)
    cells = x.numel() if noise_shape is None else math.prod(noise_shape)
    return torch.empty_like(x), x.new_empty(word_count(cells) if bits else 0, dtype=torch.int32)


def _like_fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _draw_blocks_fake(
    like: Tensor, seed: Tensor, p: float | Tensor, noise_shape: list[int], block_size: list[int]
) -> tuple[Tensor, Tensor]:
    words = like.new_empty(word_count(math.prod(noise_shape)), dtype=torch.int32)
    return words, like.new_empty((), dtype=torch.int64)


# ---- gradients ----


def overload(op: Any, p: float | Tensor) -> Any:
    """By hand: an op called with a tensor for p may read the number in it, and a compiler then keeps that number."""
    return op.tensor if isinstance(p, Tensor) else op.default


def masked(x: Tensor, kept: Tensor, p: float | Tensor, noise_shape: Any, bits: bool, law: str = "inverted") -> Tensor:
    """The derivative: x under the mask that was kept, as words or as a seed."""
    law = variants.slope(law)
    if bits:
        dx: Tensor = overload(torch.ops.fastdrop.backward, p)(x, kept, p, noise_shape, law)
        return dx
    again: Tensor = overload(torch.ops.fastdrop.forward, p)(x, kept, p, noise_shape, False, law)[0]
    return again


def _keep(ctx: Any, *values: Any) -> None:
    """Keeps tensors as autograd wants it, others as they are; `_kept` has them again."""
    tensors = [value if isinstance(value, Tensor) else None for value in values]
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _kept(ctx: Any) -> list[Any]:
    return [o if t is None else t for t, o in zip(ctx.saved_tensors, ctx.others, strict=True)]


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> Any:
        return below_autograd(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, _, seed, p, noise_shape, bits, *law = inputs  # the dispatcher leaves out what has its default
        _keep(ctx, output[1] if bits else seed, p, noise_shape, bits, *law)
        ctx.none = (None,) * (len(inputs) - 3)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Any, ...]:
        return None, None, None if dy is None else masked(dy, *_kept(ctx)), *ctx.none

    @staticmethod
    def jvp(ctx: Any, _op: Any, _keyset: Any, dx: Tensor | None, *_: Any) -> tuple[Any, None]:
        return None if dx is None else masked(dx, *_kept(ctx)), None


class _Linear(torch.autograd.Function):
    """Of an op that is linear in its first argument and its own adjoint."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return below_autograd(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, _, _, *rest = inputs
        _keep(ctx, *rest)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        rest = _kept(ctx)
        return None, None, ctx.op(dy, *rest), *(None for _ in rest)

    @staticmethod
    def jvp(ctx: Any, _op: Any, _keyset: Any, dx: Tensor, *_: Any) -> Tensor:
        y: Tensor = ctx.op(dx, *_kept(ctx))
        return y


class _Gaussian(_Linear):
    """Linear in x, with a gradient for p too where p is a tensor: ``y = x (1 + sigma n)`` with sigma a function of p.

    ``dy/dp = x n dsigma/dp`` is ``(y - x) / (2 p (1 - p))``, because ``sigma**2 = p / (1 - p)``. y is computed again,
    at least in float32.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.op, _, x, seed, p = inputs
        ctx.of_p = isinstance(p, Tensor) and p.requires_grad
        ctx.save_for_backward(*([seed, p] if isinstance(p, Tensor) else [seed]), *([x] if ctx.of_p else []))
        ctx.save_for_forward(*([seed, p] if isinstance(p, Tensor) else [seed]), x)
        ctx.p = None if isinstance(p, Tensor) else p

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        seed, *rest = ctx.saved_tensors
        p = rest[0] if ctx.p is None else ctx.p
        dx = ctx.op(dy, seed, p) if ctx.needs_input_grad[2] else None
        dp = None
        if ctx.of_p and ctx.needs_input_grad[4]:
            slope = _slope_in_p(ctx.op, rest[1], seed, p)
            dp = (dy.to(slope.dtype) * slope).sum().to(p.dtype).reshape(p.shape)
        return None, None, dx, None, dp

    @staticmethod
    def jvp(  # type: ignore[override]
        ctx: Any, _op: Any, _keyset: Any, dx: Tensor | None, _seed: Any, dp: Tensor | None
    ) -> Tensor | None:
        seed, *rest, x = ctx.saved_tensors
        p = rest[0] if ctx.p is None else ctx.p
        dy: Tensor | None = None if dx is None else ctx.op(dx, seed, p)
        if dp is not None:
            of_p = (_slope_in_p(ctx.op, x, seed, p) * dp).to(x.dtype)
            dy = of_p if dy is None else dy + of_p
        return dy


def _slope_in_p(op: Any, x: Tensor, seed: Tensor, p: Tensor) -> Tensor:
    """The derivative of Gaussian dropout with respect to p; 0 at p = 0, where it has no bounds."""
    wide = x if x.dtype == torch.float64 else x.float()
    at = p.to(wide.dtype)
    inside = at > 0.0
    safe = torch.where(inside, at, 0.5)
    return torch.where(inside, (op(wide, seed, p) - wide) / (2.0 * safe * (1.0 - safe)), 0.0)


# ---- vmap ----


def _draw_vmap(like: Tensor, size: list[int], after: Tensor | None = None) -> Tensor:
    """On the key of the mode and not of batched tensors: under "different" each sample draws, batched or not."""
    around = innermost_map()
    if around.randomness == "error":
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode. Please either use the 'same' or 'different' "
            "randomness flags on vmap or perform the randomness operation out of vmap"
        )
    like, _ = around.unwrap(like)
    after, _ = around.unwrap(after)
    with around.below("FuncTorchVmapMode"):
        if around.randomness == "same":
            seed: Tensor = torch.ops.fastdrop.draw(like, size, after)
            return seed
        return around.wrap(torch.ops.fastdrop.draw(like, [around.batch_size, *size], after), 0)


def _forward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    x: Tensor,
    seed: Tensor,
    p: float | Tensor,
    noise_shape: list[int] | None,
    bits: bool,
    law: str = "inverted",
) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    op = overload(torch.ops.fastdrop.forward, p)
    _no_batch(in_dims[2], p)
    if in_dims[1] is None:  # one seed: all samples under the same mask
        x = x.movedim(in_dims[0], 0)
        return op(x, seed, p, [1, *(x.shape[1:] if noise_shape is None else noise_shape)], bits, law), (0, None)
    seeds = seed.movedim(in_dims[1], 0)
    if info.batch_size and info.is_eager_dense_within(x, seed):
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        cut, cells = threshold(probability(p)), cells_shape(noise_shape, x[0])
        y, kept = mask_kernels.forward_each(
            x, seed_source.for_kernels(seeds, x), cut, variants.affine(law, cut), cells, bits
        )
        return (y, y.new_empty((info.batch_size, 0), dtype=torch.int32) if kept is None else kept), (0, 0)
    samples = _samples(x, in_dims[0], info.batch_size)
    results = [op(x_, seed_, p, noise_shape, bits, law) for x_, seed_ in zip(samples, seeds.unbind(), strict=True)]
    if not results:
        y, words = op(_sample_like(x, in_dims[0]), torch.zeros((), dtype=torch.int64), p, noise_shape, bits, law)
        return (y.new_empty((0, *y.shape)), words.new_empty((0, *words.shape))), (0, 0)
    return (torch.stack([y for y, _ in results]), torch.stack([words for _, words in results])), (0, 0)


def _backward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    dy: Tensor,
    words: Tensor,
    p: float | Tensor,
    noise_shape: list[int] | None,
    law: str = "inverted",
) -> tuple[Tensor, int]:
    op = overload(torch.ops.fastdrop.backward, p)
    _no_batch(in_dims[2], p)
    if in_dims[1] is None:
        dy = dy.movedim(in_dims[0], 0)
        return op(dy, words, p, [1, *(dy.shape[1:] if noise_shape is None else noise_shape)], law), 0
    return _by_sample(info, in_dims, op, dy, words, p, noise_shape, law)


def _gaussian_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, seed: Tensor, p: float | Tensor
) -> tuple[Tensor, int]:
    _no_batch(in_dims[2], p)
    return _by_sample(info, in_dims, overload(torch.ops.fastdrop.gaussian, p), x, seed, p)


def _keep_blocks_vmap(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, words: Tensor, kept: Tensor, noise_shape: list[int]
) -> tuple[Tensor, int]:
    op = torch.ops.fastdrop.keep_blocks.default
    if in_dims[1] is None and in_dims[2] is None:
        return op(x.movedim(in_dims[0], 0), words, kept, [1, *noise_shape]), 0
    return _by_sample(info, in_dims, op, x, words, kept, noise_shape)


def _draw_blocks_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    like: Tensor,
    seed: Tensor,
    p: float | Tensor,
    noise_shape: list[int],
    block_size: list[int],
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    op = overload(torch.ops.fastdrop.draw_blocks, p)
    _no_batch(in_dims[2], p)
    like = _sample_like(like, in_dims[0])
    if in_dims[1] is None:
        return op(like, seed, p, noise_shape, block_size), (None, None)
    drawn = [op(like, one, p, noise_shape, block_size) for one in seed.movedim(in_dims[1], 0).unbind()]
    if not drawn:
        words, kept = _draw_blocks_fake(like, seed, p, noise_shape, block_size)
        return (words.new_empty((0, *words.shape)), kept.new_empty(0)), (0, 0)
    return (torch.stack([words for words, _ in drawn]), torch.stack([kept for _, kept in drawn])), (0, 0)


def _by_sample(info: Any, in_dims: tuple[Any, ...], op: Any, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """An op whose result is like x, a sample at a time; what isn't batched of the rest is the same for all."""
    samples = _samples(x, in_dims[0], info.batch_size)
    if not samples:
        return x.new_empty((0, *_sample_like(x, in_dims[0]).shape)), 0
    others = [
        _samples(value, in_dims[1 + i], info.batch_size) if isinstance(value, Tensor) else [value] * len(samples)
        for i, value in enumerate(rest)
    ]
    return torch.stack([op(*arguments) for arguments in zip(samples, *others, strict=True)]), 0


def _samples(x: Tensor, batch_axis: int | None, count: int) -> list[Tensor]:
    return [x] * count if batch_axis is None else list(x.movedim(batch_axis, 0).unbind())


def _sample_like(x: Tensor, batch_axis: int | None) -> Tensor:
    """A sample's shape, where there is none."""
    return x if batch_axis is None else x.new_empty(x.movedim(batch_axis, 0).shape[1:])


def _no_batch(batch_axis: int | None, p: float | Tensor) -> None:
    if isinstance(p, Tensor) and batch_axis is not None:
        raise ValueError("vmap over p, the dropout probability, is not supported: p must be one number for all samples")


# ---- registration ----


def _called_by_inductor(name: str, fake: Any) -> Any:
    """A fake kernel, which any compiler runs first."""
    own = f"fastdrop::{name.partition('.')[0]}"

    @functools.wraps(fake)
    def called(*arguments: Any) -> Any:
        let_inductor_call(own)
        return fake(*arguments)

    return called


library.define(DRAW, tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag))
library.impl("draw", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("fastdrop::draw", _called_by_inductor("draw", _draw_fake), lib=library)
torch.library.register_torch_dispatch("fastdrop::draw", tracing.ProxyTorchDispatchMode, tracing.in_order, lib=library)
library.impl("draw", _draw_vmap, "FuncTorchVmapMode")
hide_from_dynamo(_draw, _draw_vmap)


ELSEWHERE = ("seed", "p")  # tensors that may lie on another device than the data


def _guarded(op: Any, kernel: Any, fake: bool = False) -> Any:
    """A kernel behind what is asked of every op's arguments, whatever they mean: the public functions have made sure of
    it, but ops are called by hand, from saved graphs and with what hooks gave back. What an argument must be beside
    others is asked where kernels are called, as that is what they rely on."""
    arguments = op._schema.arguments
    tensors = [(i, x.name, x.name in ELSEWHERE) for i, x in enumerate(arguments) if i and "Tensor" in str(x.type)]
    lists = [(i, x.name, x.N) for i, x in enumerate(arguments) if x.N]
    of = arguments[0].name

    def called(data: Tensor, *rest: Any) -> Any:
        device = data.device
        if not fake:
            _check_memory(of, data)
        for i, name, elsewhere in tensors:
            x = rest[i - 1]
            if x is None:
                continue
            # Beside a tensor without memory the fake kernel is called, whose results nobody writes.
            if x.device != device and (x.is_meta or not elsewhere):
                raise ValueError(f"{name} must be on {device}, as {of} is, but got one on {x.device}")
            if not fake:
                _check_memory(name, x)
        for i, name, count in lists:
            if len(rest[i - 1]) != count:
                raise ValueError(f"{name} must have {count} entries, but got {len(rest[i - 1])}")
        return kernel(data, *rest)

    return called


def _check_memory(name: str, x: Tensor) -> None:
    """Raises if x's storage was cut below what its shape and strides reach: its address is given out all the same."""
    size = x.element_size()
    bytes = x.untyped_storage().nbytes()
    if bytes >= (x.storage_offset() + x.numel()) * size and x.is_contiguous():
        return
    last = sum((extent - 1) * stride for extent, stride in zip(x.shape, x.stride(), strict=True))
    if x.numel() and bytes < (x.storage_offset() + last + 1) * size:
        raise ValueError(f"{name} must have memory for its shape, {tuple(x.shape)}, but its storage has {bytes} bytes")


def _register(name: str, schema: str, kernel: Any, fake: Any, vmap: Any, function: Any = None) -> None:
    """One overload of an op; ``function`` makes its derivatives."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    hide_from_dynamo(kernel)
    packet, _, suffix = name.partition(".")
    own = getattr(getattr(torch.ops.fastdrop, packet), suffix or "default")
    guarded = _guarded(own, kernel)
    hide_from_dynamo(guarded)
    for device in ("CPU", "CUDA"):
        library.impl(name, guarded, device)
    fake = _called_by_inductor(name, _guarded(own, fake, fake=True))
    torch.library.register_fake(f"fastdrop::{name}", fake, lib=library)
    if function is None:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        register_derivative(library, name, own, function)
    register_batching(library, name, own, vmap)


for _suffix, _type in P_TYPES.items():
    _register(f"forward{_suffix}", FORWARD.format(p=_type), _forward, _forward_fake, _forward_vmap, _Forward)
    _register(f"backward{_suffix}", BACKWARD.format(p=_type), _backward, _like_fake, _backward_vmap, _Linear)
    _register(f"gaussian{_suffix}", GAUSSIAN.format(p=_type), _gaussian, _like_fake, _gaussian_vmap, _Gaussian)
    _register(f"draw_blocks{_suffix}", DRAW_BLOCKS.format(p=_type), _draw_blocks, _draw_blocks_fake, _draw_blocks_vmap)
_register("keep_blocks", KEEP_BLOCKS, _keep_blocks, _like_fake, _keep_blocks_vmap, _Linear)
