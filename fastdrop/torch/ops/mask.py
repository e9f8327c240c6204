"""The ops of dropout itself: ``torch.ops.fastdrop.draw``, ``forward``, ``backward``, ``gaussian``, ``draw_blocks`` and
``keep_blocks``.

`functional.dropout` calls them if a compiler, a transform, a tracer, a mode or a subclass looks at the call. Eager
dense tensors go to the kernels without them. ``draw`` takes a seed from torch's generator, and the others are functions
of their arguments alone. ``forward`` and its gradient ``backward`` serve every kind of dropout that keeps or drops.
DropBlock comes in two halves, ``draw_blocks`` and ``keep_blocks``. All ops but ``forward`` are linear in their data and
their own adjoints, and all have derivatives of any order, reverse and forward.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

from ...core import checks, variants
from ...core.mask import word_count
from ...core.random import threshold as threshold_of
from ..runtime import dtypes, mask_kernels, tracing
from ..runtime import seeds as seed_source
from ..runtime.dispatch import hide_from_dynamo
from ..runtime.dispatch.ops import innermost_map
from ..runtime.located import as_int64
from . import batching
from .record import Maybe, MaybeSizes, Op, P, Seed, Sizes, called_by_inductor, library, saved_mask, schema

# ---- arguments ----


def probability(p: float | Tensor) -> float:
    number = value_of(p) if isinstance(p, Tensor) else float(p)
    return checks.dropout_probability(number)


def value_of(p: Tensor) -> float:
    """The number in a tensor. One on a GPU is refused, because reading it would wait for the GPU."""
    if p.is_cuda:
        raise ValueError("p, the drop probability, must be a number or a tensor on the CPU, but got one on the GPU")
    return float(p.item())


def mask_shape(given: Any, x: Tensor) -> tuple[int, ...] | None:
    """The extents of x's mask, or None if they are those of x.

    A tuple comes from a public function, which has checked it. Ops called by hand have lists.
    """
    if given is None:
        return None
    cells: tuple[int, ...] = given if type(given) is tuple else checks.noise_shape(given, tuple(x.shape))
    return None if cells == x.shape else cells


def kernel_seed(seed: Any, x: Tensor) -> Any:
    """A seed as the kernels for x take it. Eager calls have it already, and ops have a tensor."""
    return seed_source.for_kernel(seed, x) if isinstance(seed, Tensor) else seed


# ---- forward and backward ----


class Forward(NamedTuple):
    x: Tensor
    seed: Seed
    p: P
    mask_shape: MaybeSizes
    store_bits: bool
    scaling: str = "inverted"


class Dropped(NamedTuple):
    y: Tensor
    saved_mask: Tensor  # empty unless ``store_bits``


class Backward(NamedTuple):
    dy: Tensor
    saved_mask: Tensor
    p: P
    mask_shape: MaybeSizes
    scaling: str = "inverted"


class Saved(NamedTuple):
    """What the gradient needs. `masked` takes these after the data."""

    saved_mask: Tensor
    p: float | Tensor
    mask_shape: Any
    store_bits: bool
    scaling: str


def masked(
    x: Tensor,
    saved_mask: Tensor,
    p: float | Tensor,
    mask_shape: Any,
    store_bits: bool,
    scaling: str = "inverted",
) -> Tensor:
    """The derivative of dropout: x under the mask that was saved, as words or as a seed."""
    scaling = variants.slope(scaling)
    dx: Tensor
    if store_bits:
        dx = BACKWARD(Backward(x, saved_mask, p, mask_shape, scaling))
    else:
        dx, _ = FORWARD(Forward(x, saved_mask, p, mask_shape, False, scaling))
    return dx


def _forward(call: Forward) -> Dropped:
    x = call.x
    threshold = threshold_of(probability(call.p))
    affine, cells = variants.affine(call.scaling, threshold), mask_shape(call.mask_shape, x)
    y, words = mask_kernels.forward(x, kernel_seed(call.seed, x), threshold, affine, cells, call.store_bits)
    return Dropped(y, x.new_empty(0, dtype=torch.int32) if words is None else words)


def _forward_outputs(call: Forward) -> Dropped:
    dtypes.check_dtype(call.x)
    cells = call.x.numel() if call.mask_shape is None else math.prod(call.mask_shape)
    words = call.x.new_empty(word_count(cells) if call.store_bits else 0, dtype=torch.int32)
    return Dropped(torch.empty_like(call.x), words)


def _forward_saved(call: Forward, results: Dropped, needs: Any) -> Saved:
    mask = results.saved_mask if call.store_bits else call.seed
    return Saved(mask, call.p, call.mask_shape, call.store_bits, call.scaling)


def _forward_gradients(needs: Any, saved: Saved, dy: Maybe, _: Any) -> tuple[Maybe, ...]:
    return () if dy is None else (masked(dy, *saved),)


def _forward_tangents(saved: Saved, dx: Maybe, *_: Any) -> tuple[Maybe, None]:
    return None if dx is None else masked(dx, *saved), None


def _one_p(axes: Any) -> None:
    if axes.p is not None:
        raise ValueError("vmap over p, the dropout probability, is not supported: p must be one number for all samples")


def _for_all(x: Tensor, cells: Any) -> list[Any]:
    """The mask's shape if all samples of x have one mask."""
    return [1, *(x.shape[1:] if cells is None else cells)]


def _forward_batched(around: Any, op: Any, axes: Any, call: Forward) -> Any:
    _one_p(axes)
    x, cells = call.x, call.mask_shape
    if axes.seed is None:
        x = x.movedim(axes.x, 0)
        return op(*call._replace(x=x, mask_shape=_for_all(x, cells))), (0, None)
    if not around.batch_size or not around.is_eager_dense_within(x, call.seed):
        return batching.by_sample(around, op, axes, call)
    x = x.expand(around.batch_size, *x.shape) if axes.x is None else x.movedim(axes.x, 0)
    threshold, seeds = threshold_of(probability(call.p)), seed_source.for_kernels(call.seed.movedim(axes.seed, 0), x)
    affine, cells = variants.affine(call.scaling, threshold), mask_shape(cells, x[0])
    y, words = mask_kernels.forward_each(x, seeds, threshold, affine, cells, call.store_bits)
    return (y, y.new_empty((around.batch_size, 0), dtype=torch.int32) if words is None else words), (0, 0)


FORWARD = Op(
    "forward",
    Forward,
    _forward_outputs,
    _forward,
    _forward_saved,
    _forward_gradients,
    tangents=_forward_tangents,
    vmap=_forward_batched,
)


def _backward(call: Backward) -> Tensor:
    affine = variants.affine(call.scaling, threshold_of(probability(call.p)))
    words = mask_kernels.read_words(call.saved_mask)
    return mask_kernels.apply(call.dy, words, affine, mask_shape(call.mask_shape, call.dy))


def _backward_batched(around: Any, op: Any, axes: Any, call: Backward) -> Any:
    _one_p(axes)
    if axes.saved_mask is not None:
        return batching.by_sample(around, op, axes, call)
    dy = call.dy.movedim(axes.dy, 0)
    return op(*call._replace(dy=dy, mask_shape=_for_all(dy, call.mask_shape))), 0


BACKWARD = Op(
    "backward", Backward, lambda call: torch.empty_like(call.dy), _backward, linear=True, vmap=_backward_batched
)


# ---- Gaussian dropout ----


class Gaussian(NamedTuple):
    x: Tensor
    seed: Seed
    p: P


def _gaussian(call: Gaussian, inplace: bool = False) -> Tensor:
    p = call.p if type(call.p) is float else probability(call.p)
    return mask_kernels.gaussian(call.x, kernel_seed(call.seed, call.x), _sigma(p), inplace)


@functools.lru_cache(maxsize=1024)
def _sigma(p: float) -> float:
    return variants.spread(checks.gaussian_probability(probability(p)))


# The op is linear in x. It also has a gradient for p if p is a tensor: y = x (1 + sigma n) with sigma a function of p.


def _gaussian_saved(call: Gaussian, result: Tensor, needs: Any) -> Any:
    of_p = isinstance(call.p, Tensor) and call.p.requires_grad
    saved: Any = call._replace(seed=saved_mask(None, call.seed))
    return saved if of_p else saved._replace(x=None)


def _gaussian_gradients(needs: Any, saved: Any, dy: Maybe) -> tuple[Maybe, ...]:
    if dy is None:
        return ()
    dx = GAUSSIAN.run(saved._replace(x=dy)) if needs[0] else None
    dp = None
    if saved.x is not None and needs[2]:
        slope = _slope_in_p(saved)
        dp = (dy.to(slope.dtype) * slope).sum().to(saved.p.dtype).reshape(saved.p.shape)
    return dx, None, dp


def _gaussian_tangents(saved: Any, dx: Maybe, _: Any, dp: Maybe) -> Maybe:
    dy: Maybe = None if dx is None else GAUSSIAN(saved._replace(x=dx))
    if dp is not None:
        of_p = (_slope_in_p(saved) * dp).to(saved.x.dtype)
        dy = of_p if dy is None else dy + of_p
    return dy


def _slope_in_p(saved: Any) -> Tensor:
    """The derivative with respect to p, or 0 at p = 0, where it has no bounds.

    ``dy/dp = x n dsigma/dp`` is ``(y - x) / (2 p (1 - p))``, because ``sigma**2 = p / (1 - p)``. y is computed again,
    at least in float32.
    """
    x = saved.x if saved.x.dtype == torch.float64 else saved.x.float()
    at = saved.p.to(x.dtype)
    inside = at > 0.0
    safe = torch.where(inside, at, 0.5)
    return torch.where(inside, (GAUSSIAN(saved._replace(x=x)) - x) / (2.0 * safe * (1.0 - safe)), 0.0)


def _gaussian_batched(around: Any, op: Any, axes: Any, call: Gaussian) -> Any:
    _one_p(axes)
    return batching.by_sample(around, op, axes, call)


GAUSSIAN = Op(
    "gaussian",
    Gaussian,
    lambda call: torch.empty_like(call.x),
    _gaussian,
    _gaussian_saved,
    _gaussian_gradients,
    tangents=_gaussian_tangents,
    saved_for_tangents=lambda call: call,
    vmap=_gaussian_batched,
)


# ---- DropBlock ----


class DrawBlocks(NamedTuple):
    like: Tensor
    seed: Seed
    p: P
    mask_shape: Sizes
    block_size: Sizes


class Blocks(NamedTuple):
    saved_mask: Tensor
    kept_count: Tensor


class KeepBlocks(NamedTuple):
    x: Tensor
    saved_mask: Tensor
    kept_count: Tensor
    mask_shape: Sizes
    whole_cells: float = 0.0  # of the mask of which this is a part; 0: it is none


def _draw_blocks(call: DrawBlocks) -> Blocks:
    cells, sizes = call.mask_shape, call.block_size
    if type(cells) is not tuple:  # see `mask_shape`
        cells = checks.shape("mask_shape", cells)
        sizes = checks.block_size(sizes, max(1, min(len(sizes), len(cells))))
    plan = variants.blocks(cells, probability(call.p), sizes)
    return Blocks(
        *mask_kernels.draw_blocks(call.like, kernel_seed(call.seed, call.like), threshold_of(plan.gamma), plan)
    )


def _draw_blocks_outputs(call: DrawBlocks) -> Blocks:
    words = call.like.new_empty(word_count(math.prod(call.mask_shape)), dtype=torch.int32)
    return Blocks(words, call.like.new_empty((), dtype=torch.int64))


def _draw_blocks_batched(around: Any, op: Any, axes: Any, call: DrawBlocks) -> Any:
    _one_p(axes)
    call = call._replace(like=batching.sample_like(call.like, axes.like))
    if axes.seed is None:
        return op(*call), (None, None)
    return batching.by_sample(around, op, axes._replace(like=None), call)


def _keep_blocks(call: KeepBlocks, inplace: bool = False) -> Tensor:
    words, cells = mask_kernels.read_words(call.saved_mask), mask_shape(call.mask_shape, call.x)
    return mask_kernels.keep_blocks(call.x, words, call.kept_count, cells, call.whole_cells, inplace)


def _keep_blocks_batched(around: Any, op: Any, axes: Any, call: KeepBlocks) -> Any:
    if axes.saved_mask is not None or axes.kept_count is not None:
        return batching.by_sample(around, op, axes, call)
    return op(*call._replace(x=call.x.movedim(axes.x, 0), mask_shape=[1, *call.mask_shape])), 0


DRAW_BLOCKS = Op(
    "draw_blocks", DrawBlocks, _draw_blocks_outputs, _draw_blocks, differentiable=None, vmap=_draw_blocks_batched
)
KEEP_BLOCKS = Op(
    "keep_blocks",
    KeepBlocks,
    lambda call: torch.empty_like(call.x),
    _keep_blocks,
    linear=True,
    vmap=_keep_blocks_batched,
)


# ---- draw ----


class Draw(NamedTuple):
    like: Tensor
    size: Sizes
    after: Maybe = None


def _draw(like: Tensor, size: list[int], after: Tensor | None = None) -> Tensor:
    """Takes seeds from torch's generator. ``like`` tells the dispatcher where, and a fake or wrapped tensor gets a fake
    or wrapped seed. ``after`` is for compilers: see `tracing`."""
    size = size or []  # AOTInductor hands on an empty list as None
    if (seeds := seed_source.sample_seeds()) is not None:
        return seeds.draw(size, seed_source.device_for(like))
    if size or not like.is_cuda:
        return torch.empty(size, dtype=torch.int64, device=seed_source.device_for(like)).random_()
    seed = seed_source.next_cuda_seed(like.device, None)  # the one that eager code takes
    if isinstance(seed, Tensor):
        return seed
    return torch.full((), as_int64(seed), dtype=torch.int64, device=like.device)


def _draw_outputs(like: Tensor, size: list[int], after: Tensor | None = None) -> Tensor:
    return torch.empty(size, dtype=torch.int64, device=seed_source.device_for(like))


def _draw_batched(like: Tensor, size: list[int], after: Tensor | None = None) -> Tensor:
    """The kernel for the key of vmap's mode, and not that of batched tensors: with randomness="different" each sample
    draws, whether its data is batched or not."""
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


library.define(
    "draw" + schema(get_type_hints(Draw, include_extras=True), Draw, Tensor),
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
library.impl("draw", _draw, "CompositeExplicitAutograd")
torch.library.register_fake("fastdrop::draw", called_by_inductor("draw", _draw_outputs), lib=library)
torch.library.register_torch_dispatch("fastdrop::draw", ProxyTorchDispatchMode, tracing.in_order, lib=library)
library.impl("draw", _draw_batched, "FuncTorchVmapMode")
hide_from_dynamo(_draw, _draw_batched)
