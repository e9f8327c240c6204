"""Attention with dropout: two matrix products around `softmax_dropout`.

`attend` takes plain tensors on the CPU, a few heads at a time. Scores are by far the largest tensors of attention;
those of the heads at hand are made, used and overwritten while they lie in the cache. Of all of them only the
probabilities are ever in memory, once, and none where no gradient is wanted. Arithmetic on 16-bit data is float32's, as
in torch, except that the probabilities kept for backward are 16-bit. Compilers see it as one op, by `trace`. `compose`
takes the rest, whole: what is transformed, modes and subclasses, other devices, and shapes that broadcast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.mask import word_count
from ...core.random import keep_scale, threshold
from ..ops import fused as fused_ops
from ..ops import mask as mask_ops
from ..runtime import fused_kernels, mask_kernels, nested, seeds
from ..runtime.dispatch import can_call_kernel, hide_from_dynamo, is_eager_dense
from ..runtime.dispatch.ops import composed_attention
from . import routing
from .fused import softmax_dropout
from .routing import for_subclasses

__all__ = ["scaled_dot_product_attention"]

# How many scores a thread has at once, one head's at least: two arrays of them stay in the cache, and the calls that it
# takes, at each of which threads wait for one another, cost little beside them.
BLOCK = 1 << 20

ATTENTION = (
    "(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor seed, {p} p, bool causal, float scale, bool keep)"
    " -> (Tensor y, Tensor words, Tensor probabilities)"
)
ATTENTION_BACKWARD = (
    "(Tensor dy, Tensor words, Tensor probabilities, Tensor? query, Tensor? key, Tensor? value, {p} p, bool causal, "
    "float scale, SymInt[] query_shape, SymInt[] key_shape, SymInt[] value_shape, bool[3] wanted)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue)"
)


@for_subclasses
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Returns ``dropout(softmax(scale * query @ key.T + attn_mask)) @ value``:
    `torch.nn.functional.scaled_dot_product_attention`, faster where it drops on the CPU.

    Parameters
    ----------
    query : Tensor of float32, float64, float16 or bfloat16, ``(*, H, L, E)``
        ``(L, E)`` and ``(H, L, E)`` too.
    key, value : Tensor of the same dtype, ``(*, H, S, E)`` and ``(*, H, S, Ev)``
    attn_mask : Tensor of bool, float32 or query's dtype, broadcastable to ``(*, H, L, S)``, optional
        Added to the scores; of bool, False excludes a key. A query that sees no key gets 0.
    dropout_p : float
        Drop probability of each of the ``(*, H, L, S)`` weights, 0 to 1; as in torch it drops outside of training too.
    is_causal : bool
        A query sees the keys up to its own number; not together with attn_mask.
    scale : float, optional
        None is ``1 / sqrt(E)``.
    enable_gqa : bool
        Lets key and value have fewer heads, each of which serves as many neighbouring ones of query.
    generator, seed
        As in `dropout`: the mask is that of `dropout` of the weights.

    Returns
    -------
    Tensor with query's dtype, ``(*, H, L, Ev)``

    Raises
    ------
    RuntimeError
        What torch refuses, in its words: other dtypes, shapes that don't fit, attn_mask together with is_causal.
    ValueError, TypeError
        A bad dropout_p, seed or generator, as in `dropout`.

    Kept for backward: the weights before dropout, in query's dtype, and a bit for each. Where nothing is dropped, and
    on a GPU without a seed or generator, it is torch's own. It has a gradient of any order and a forward-mode
    derivative, and works under ``torch.compile``, ``torch.func``, autocast and checkpointing. Gradients of an attn_mask
    and of higher order are composed of torch's ops around `dropout`, under the same mask. So is all of it under a
    transform, on a GPU, and where heads or batches broadcast; it then keeps 8 1/8 bytes for a weight (16 1/8 for
    float64), and query, key and value in float32. Sources: Vaswani et al., NeurIPS 2017; Srivastava et al., JMLR 15,
    2014.

    >>> import torch, fastdrop.torch as fdt
    >>> query = torch.ones(1, 2, 3)
    >>> value = torch.eye(4)[None]
    >>> fdt.scaled_dot_product_attention(query, torch.ones(1, 4, 3), value, dropout_p=0.5, seed=4)
    tensor([[[0.0000, 0.0000, 0.5000, 0.5000],
             [0.0000, 0.5000, 0.0000, 0.0000]]])
    """
    options = is_causal, scale, enable_gqa
    if not _are_parsed(query, key, value, attn_mask, *options):
        _torchs(query, key, value, attn_mask, 0.0, *options)  # says what is wrong
    tracing = torch.compiler.is_compiling()
    p = routing.traced_probability(dropout_p) if tracing else routing.eager_probability(dropout_p)
    if not isinstance(p, Tensor) and p <= routing.KEEPS_ALL:
        routing._check_unused(seed, generator)
        return _torchs(query, key, value, attn_mask, 0.0, *options)
    if query.is_cuda and seed is None and generator is None:
        return _torchs(query, key, value, attn_mask, p, *options)
    if (dtype := routing.autocast_dtype(query)) is not None:
        query, key, value, attn_mask = (_autocast(x, dtype) for x in (query, key, value, attn_mask))
        with torch.autocast(query.device.type, enabled=False):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, p, *options, generator=generator, seed=seed
            )
    arguments = query, key, value, attn_mask
    nested.check_dense(*arguments)
    nested.refuse(query, "attention")
    if not is_regular(*arguments, *options):
        _refuse(*arguments, *options)
    elif tracing and query.is_cpu and not routing.is_transformed_there():
        return trace(*arguments, p, *options, generator, seed)
    elif not tracing and is_direct(*arguments):
        return attend(*arguments, p, *options, generator, seed)
    return compose(*arguments, p, *options, generator, seed)


def _are_parsed(query: Any, key: Any, value: Any, mask: Any, causal: Any, scale: Any, gqa: Any) -> bool:
    """Whether arguments are of the types that torch's would be called with."""
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    masked = mask is None or isinstance(mask, Tensor)
    scaled = scale is None or isinstance(scale, (float, int))
    return tensors and masked and scaled and isinstance(causal, bool) and isinstance(gqa, bool)


def _refuse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> None:
    """Raises torch's words for what torch refuses. It is asked of tensors without memory where those can tell, and of
    the others if it refuses these: what it takes is not computed twice."""
    tensors, options = (query, key, value, mask), (causal, scale, gqa)
    known = _has_known_dtypes(*tensors)
    if torch.compiler.is_compiling():
        if not known:
            _torchs(*tensors, 0.0, *options)
        return  # the ops that it is composed of refuse other shapes
    if known:
        q, k, v, m = (None if x is None else x.to("meta") for x in tensors)
        try:
            with torch.no_grad():
                _torchs(q, k, v, m, 0.0, *options)
            if mask is None or mask.dim() <= max(query.dim(), key.dim()):
                return
        except Exception:  # whatever it is: in other words
            pass
    with torch.no_grad():
        _torchs(*tensors, 0.0, *options)
        composed_attention(*tensors, 0.0, causal, scale=scale, enable_gqa=gqa)


def _torchs(query: Any, key: Any, value: Any, mask: Any, p: float, causal: bool, scale: Any, gqa: bool) -> Tensor:
    options: dict[str, Any] = {"dropout_p": p, "is_causal": causal, "scale": scale, "enable_gqa": gqa}
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    """What autocast does to an argument of torch's."""
    return x if x is None or not x.is_floating_point() or x.dtype is torch.float64 else x.to(dtype)


def compose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """What transforms and modes see, and all that `attend` and `trace` do not take."""
    mask_kernels.check_real(query, "attention")
    if mask is not None and causal:
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    dtype, wide = query.dtype, fused_kernels.computed(query.dtype)
    query, key, value = query.to(wide), _repeated(key, query, gqa).to(wide), _repeated(value, query, gqa).to(wide)
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else scale
    weights = softmax_dropout(query @ key.transpose(-2, -1), p, scale, mask, causal, generator=generator, seed=seed)
    y: Tensor = (weights @ value).to(dtype)
    return y


def _repeated(x: Tensor, query: Tensor, gqa: bool) -> Tensor:
    """Keys or values, each for all heads that it serves."""
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) if gqa and x.shape[-3] != query.shape[-3] else x


# ---- on plain tensors ----


def is_regular(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> bool:
    """Whether shapes and dtypes are those of the docstring above, with something in them. Torch's own broadcasts more,
    and knows what to say of others."""
    if not _are_regular_shapes(query.shape, key.shape, value.shape, gqa):
        return False
    if not _has_known_dtypes(query, key, value, mask) or (scale is not None and not abs(scale) < math.inf):
        return False
    if mask is not None:
        scores = (*query.shape[:-1], value.shape[-2])
        extents = zip(reversed(mask.shape), reversed(scores), strict=False)
        if causal or mask.dim() > len(scores) or any(extent not in (1, full) for extent, full in extents):
            return False
    return True


def _are_regular_shapes(query: Any, key: Any, value: Any, gqa: bool) -> bool:
    """The same of shapes alone."""
    if not len(query) == len(key) == len(value) >= 2 + gqa:
        return False
    *outer, _, width = query
    if outer and gqa and key[-3] and outer[-1] % key[-3] == 0:
        outer = [*outer[:-1], key[-3]]
    keys = value[-2]
    if list(key) != [*outer, keys, width] or list(value[:-2]) != outer:
        return False
    return bool(math.prod(query) > 0 and math.prod(value) > 0)


def _has_known_dtypes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether dtypes are those of the docstring above, on one device."""
    known = query.dtype in fused_kernels.TAGS and query.dtype is key.dtype is value.dtype
    if mask is not None:
        known = known and mask.dtype in (torch.bool, torch.float32, query.dtype) and mask.device == query.device
    return known and query.device == key.device == value.device


def is_direct(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether kernels may read all of it, here and now, and nothing else wants to see what they do."""
    return all(x is None or (x.is_cpu and is_eager_dense(x)) for x in (query, key, value, mask))


class _Call(NamedTuple):
    """A call's options, and its extents: scores are ``[outer, heads, rows, keys]``, of as many heads as key has."""

    a: float
    causal: bool
    scale: float
    outer: int
    heads: int
    rows: int  # queries of all the heads that a key serves
    queries: int
    keys: int

    @classmethod
    def of(cls, query_shape: Any, key_shape: Any, a: float, causal: bool, scale: float) -> _Call:
        *outer, queries, _ = query_shape
        heads = key_shape[-3] if outer else 1
        rows = math.prod(outer[-1:]) // heads * queries
        return cls(a, causal, scale, math.prod(outer[:-1]), heads, rows, queries, key_shape[-2])

    @property
    def scores(self) -> int:
        return self.outer * self.heads * self.rows * self.keys

    def blocks(self) -> list[_Block]:
        """The largest first."""
        count = max(1, BLOCK * torch.get_num_threads() // (self.rows * self.keys))
        heads, outer = min(count, self.heads), min(max(1, count // self.heads), self.outer)
        return [
            _Block(self, o, h, min(outer, self.outer - o), min(heads, self.heads - h))
            for o in range(0, self.outer, outer)
            for h in range(0, self.heads, heads)
        ]


class _Block(NamedTuple):
    """Heads whose scores are worked on at once: all of so many outer indices, or some of one."""

    call: _Call
    first_outer: int
    first_head: int
    outer: int
    heads: int

    @property
    def matrices(self) -> int:
        return self.outer * self.heads

    @property
    def first(self) -> int:
        return self.first_outer * self.call.heads + self.first_head

    def of(self, x: Tensor) -> Tensor:
        """The part of what `_by_heads` gives, as a batch of matrices."""
        if x.dim() == 3:
            return x if self.matrices == len(x) else x[self.first : self.first + self.matrices]
        part = x[self.first_outer : self.first_outer + self.outer, self.first_head : self.first_head + self.heads]
        return part.flatten(0, 1)

    def words(self, words: Tensor) -> Tensor:
        """The mask's, of its own."""
        matrix = self.call.rows * self.call.keys
        begin, shift = divmod(self.first * matrix, 32)
        count = word_count(self.matrices * matrix)
        low = words[begin : begin + count]
        if not shift:
            return low
        low = (low >> shift) & ((1 << (32 - shift)) - 1)
        high = words[begin + 1 : begin + 1 + count]
        low[: high.numel()] |= high << (32 - shift)
        return low


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Attention of arguments that are regular and direct."""
    number = routing._number_of_seed(query, generator, seed, False)
    tensors, call = (query, key, value, mask), (number, p, causal, _scale(query, scale))
    if _is_wanted(*tensors):
        result: Tensor = _Attention.apply(*tensors, call)
        return result
    return _attention(*tensors, *call, False)[0]


def trace(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """The same as an op, for compilers; arguments are regular, and will be direct."""
    if routing.is_exported_to_onnx():
        return compose(query, key, value, mask, p, causal, scale, gqa, generator, seed)
    number = routing._tensor_of_seed(query, generator, seed)
    op, tensors = mask_ops.overload(torch.ops.fastdrop.attention, p), (query, key, value, mask)
    y: Tensor = op(*tensors, number, p, causal, _scale(query, scale), _is_wanted(*tensors))[0]
    return y


def _scale(query: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale + 0.0


def _is_wanted(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, call: tuple[Any, Any, bool, float]
    ) -> Tensor:
        y, words, probabilities = _attention(query, key, value, mask, *call, True)
        _keep(ctx, ctx.needs_input_grad[:4], words, probabilities, query, key, value, mask, *call[1:])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        return *_gradients(ctx.needs_input_grad[:4], dy, *mask_ops._kept(ctx)), None


class _Op(fused_ops._Op):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, query, key, value, mask, _, p, causal, scale, _ = inputs
        _, words, probabilities = output
        ctx.mark_non_differentiable(words, probabilities)
        _keep(ctx, ctx.needs_input_grad[2:6], words, probabilities, query, key, value, mask, p, causal, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradients = _gradients(ctx.needs_input_grad[2:6], dy, *mask_ops._kept(ctx))
        return None, None, *gradients, None, None, None, None, None


def _keep(
    ctx: Any,
    needs: Any,
    words: Tensor | None,
    probabilities: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: Any,
    causal: bool,
    scale: float,
) -> None:
    """Value's own gradient wants none of the arguments; mask is kept for derivatives of its gradient."""
    of_scores = needs[0] or needs[1] or needs[3]
    data = (query, key, value, mask if needs[3] else None) if of_scores else (None, None, None, None)
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    fused_ops._keep(ctx, words, probabilities, *data, p, causal, scale, shapes)


def _gradients(
    needs: Any,
    dy: Tensor | None,
    words: Tensor,
    probabilities: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    mask: Tensor | None,
    p: Any,
    causal: bool,
    scale: float,
    shapes: tuple[Any, Any, Any],
) -> tuple[Tensor | None, ...]:
    """Of query, key, value and mask, of those that are needed."""
    if dy is None:
        return None, None, None, None
    *wanted, needs_mask = needs
    data = dy, words, probabilities, query, key, value
    gradients: Sequence[Tensor | None]
    dmask = None
    if needs_mask or fused_ops._composes():
        _check_gradients(dy, query, key, value, shapes, wanted)
        *gradients, dmask = _composed_backward(*data, mask, p, scale, *shapes)
    else:
        op = mask_ops.overload(torch.ops.fastdrop.attention_backward, p)
        backward = _attention_backward if can_call_kernel(dy) else op
        gradients = backward(*data, p, causal, scale, *shapes, wanted)
    return *(x if want else None for x, want in zip(gradients, wanted, strict=True)), dmask


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Any,
    p: Any,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The result and, if they are to be kept, the mask's words and the probabilities before dropout."""
    cut = threshold(mask_ops.probability(p))
    number = seeds.for_kernel(seed, query) if isinstance(seed, Tensor) else seed
    call = _Call.of(query.shape, key.shape, keep_scale(cut), causal, scale)
    words = mask_kernels.draw(query, call.scores, number, cut)
    y, probabilities = _forward(query, key, value, mask, words, call, keep)
    return y, words if keep else None, probabilities


def _check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> None:
    """Raises unless the op's arguments are what `attend` and `trace` have made sure of."""
    if not is_regular(query, key, value, mask, causal, scale, query.dim() > 2):
        tensors = {"query": query, "key": key, "value": value, "mask": mask}
        given = ", ".join(f"{name} {tuple(x.shape)} of {x.dtype}" for name, x in tensors.items() if x is not None)
        raise ValueError(
            "query, key, value and mask must be (*, H, L, E), (*, H, S, E), (*, H, S, Ev) and broadcastable to (*, H, "
            "L, S), of one float dtype and not empty, without a mask where causal, and scale must be finite, but got "
            f"{given}, causal {causal}, scale {scale}"
        )


def _attention_op(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, seed: Any, p: Any, *options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    causal, scale, _ = options
    _check_attention(query, key, value, mask, causal, scale)
    return _attention(query, key, value, mask, seed, p, *options)


def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seed: Any,
    p: Any,
    causal: bool,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _check_attention(query, key, value, mask, causal, scale)
    y = query.new_empty((*query.shape[:-1], value.shape[-1]))
    if not keep:
        return y, None, None
    call = _Call.of(query.shape, key.shape, 1.0, causal, scale)
    words = query.new_empty(word_count(call.scores), dtype=torch.int32)
    return y, words, query.new_empty((call.outer * call.heads, call.rows, call.keys))


def _attention_backward(
    dy: Tensor,
    words: Tensor,
    probabilities: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    p: Any,
    causal: bool,
    scale: float,
    query_shape: Any,
    key_shape: Any,
    value_shape: Any,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    a = keep_scale(threshold(mask_ops.probability(p)))
    shapes = query_shape, key_shape, value_shape
    _check_gradients(dy, query, key, value, shapes, wanted)
    call = _Call.of(query_shape, key_shape, a, causal, scale)
    return _backward(dy, words, probabilities, query, key, value, call, shapes, wanted)


def _check_gradients(
    dy: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor | None, shapes: Any, wanted: Sequence[bool]
) -> None:
    """Raises unless what backward has is what forward had: hooks on saved tensors may change it."""
    query_shape, key_shape, value_shape = shapes
    if not _are_regular_shapes(query_shape, key_shape, value_shape, len(query_shape) > 2):
        raise ValueError(
            "query_shape, key_shape and value_shape must be (*, H, L, E), (*, H, S, E) and (*, H, S, Ev), and not "
            f"empty, but got {tuple(query_shape)}, {tuple(key_shape)} and {tuple(value_shape)}"
        )
    if tuple(dy.shape) != (*query_shape[:-1], value_shape[-1]):
        raise ValueError(f"dy must have shape {(*query_shape[:-1], value_shape[-1])}, but got {tuple(dy.shape)}")
    for name, x, shape in zip(("query", "key", "value"), (query, key, value), shapes, strict=True):
        if x is None:
            if wanted[0] or wanted[1]:
                raise ValueError(f"{name} must be a tensor for the gradients of query and key, but got None")
        elif tuple(x.shape) != tuple(shape) or x.dtype is not dy.dtype or x.device != dy.device:
            raise ValueError(
                f"{name} must be {dy.dtype} of shape {tuple(shape)} on {dy.device}, but got {x.dtype} of shape "
                f"{tuple(x.shape)} on {x.device}"
            )


def _attention_backward_fake(dy: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    _, _, query, key, value, *_ = rest
    *shapes, wanted = rest[-4:]
    _check_gradients(dy, query, key, value, shapes, wanted)
    return tuple(dy.new_empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True))


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, words: Tensor, call: _Call, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The result and, if they are to be kept, the probabilities before dropout, a matrix for each of key's heads."""
    dtype, wide, blocks = query.dtype, fused_kernels.computed(query.dtype), call.blocks()
    q, k, v = (_by_heads(x, wide, blocks) for x in (query, key, value))
    y = q.new_empty((call.outer * call.heads, call.rows, v.shape[-1]))
    probabilities = _new_probabilities(query, call) if keep else None
    flat, strides = _additive(mask, query, call)
    dropped = _scratch(q, blocks)
    apart = _scratch(q, blocks) if keep and dtype is not wide else None
    for block in blocks:
        to = dropped[: block.matrices]
        kept = None if probabilities is None else block.of(probabilities)
        scores = to if kept is None else kept if apart is None else apart[: block.matrices]
        torch.bmm(block.of(q), block.of(k).mT, out=scores)
        group = call.rows // call.queries
        if flat is not None:
            start = block.first_outer * strides[0] + block.first_head * group * strides[1]
        added = None if flat is None else flat[start:]
        extents = block.heads * group, call.queries
        probable = None if kept is None else scores
        kernel = fused_kernels.softmax_into
        kernel(to, probable, scores, added, strides, block.words(words), *extents, call.a, call.scale, call.causal)
        if kept is not None and apart is not None:
            kept.copy_(scores)
        torch.bmm(to, block.of(v), out=block.of(y))
    return y.view(*query.shape[:-1], v.shape[-1]).to(dtype), probabilities


def _backward(
    dy: Tensor,
    words: Tensor,
    probabilities: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    call: _Call,
    shapes: tuple[Any, ...],
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value."""
    dtype, wide, blocks = dy.dtype, fused_kernels.computed(dy.dtype), call.blocks()
    g = _by_heads(dy, wide, blocks)
    q, k, v = (None if x is None else _by_heads(x, wide, blocks) for x in (query, key, value))
    scores = call.outer * call.heads, call.rows, call.keys
    probabilities = fused_kernels._kept("probabilities", probabilities, scores, dtype, dy)
    words = mask_kernels._checked(words, math.prod(scores), dy.device)
    dq, dk, dv = (
        g.new_empty(shape).view(scores[0], -1, shape[-1]) if want else None
        for shape, want in zip(shapes, wanted, strict=True)
    )
    dscores, dropped = _scratch(g, blocks), None if dv is None else _scratch(g, blocks)
    for block in blocks:
        of_y, kept, bits = block.of(g), block.of(probabilities).to(wide), block.words(words)
        again = None if dropped is None else dropped[: block.matrices]
        if q is None or k is None or v is None:
            again = mask_kernels.apply(kept, bits, (call.a, 0.0, 0.0), None)
        else:
            d = dscores[: block.matrices]
            torch.bmm(of_y, block.of(v).mT, out=d)
            fused_kernels.softmax_backward_into(d, again, d, kept, bits, call.a, call.scale)
            if dq is not None:
                torch.bmm(d, block.of(k), out=block.of(dq))
            if dk is not None:
                torch.bmm(d.mT, block.of(q), out=block.of(dk))
        if dv is not None and again is not None:
            torch.bmm(again.mT, of_y, out=block.of(dv))
    return tuple(None if d is None else d.view(shape).to(dtype) for d, shape in zip((dq, dk, dv), shapes, strict=True))


def _composed_backward(
    dy: Tensor,
    words: Tensor,
    probabilities: Tensor,
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    mask: Tensor | None,
    p: Any,
    scale: float,
    query_shape: Any,
    key_shape: Any,
    value_shape: Any,
) -> tuple[Tensor | None, ...]:
    """The same in ops that have derivatives themselves, and the mask's."""
    dtype, wide, grouped = dy.dtype, fused_kernels.computed(dy.dtype), len(query_shape) > 2
    g, normal = dy.to(wide), probabilities.to(wide).view(*query_shape[:-1], key_shape[-2])
    dq = dk = dmask = None
    if query is not None and key is not None and value is not None:
        q, k, v = query.to(wide), key.to(wide), value.to(wide)
        if fused_ops._composes():
            # A softmax of their logarithms, which hold what was masked: what the scores add is 0, but has derivatives.
            scores = q @ _repeated(k, q, grouped).mT * scale
            scores = scores if mask is None else scores + mask.to(wide)
            scores = (scores - scores.detach()).masked_fill(normal == 0, 0.0)  # of infinities no NaN
            normal = fused_ops.softmax_of(scores + normal.log(), None, 1.0, False)
        d = mask_ops.masked(g @ _repeated(v, q, grouped).mT, words, p, None, True)
        d = normal * (d - (d * normal).sum(-1, keepdim=True))
        dmask = None if mask is None else d.sum_to_size(mask.shape).to(mask.dtype)
        d = d * scale
        dq, dk = (d @ _repeated(k, q, grouped)).to(dtype), _gathered(d.mT @ q, key_shape).to(dtype)
    dropped = mask_ops.masked(normal, words, p, None, True)
    return dq, dk, _gathered(dropped.mT @ g, value_shape).to(dtype), dmask


def _gathered(x: Tensor, shape: Any) -> Tensor:
    """Sums over the heads that each of fewer serves."""
    return x if tuple(x.shape) == tuple(shape) else x.unflatten(-3, (shape[-3], -1)).sum(-3)


def _by_heads(x: Tensor, dtype: torch.dtype, blocks: list[_Block]) -> Tensor:
    """Matrices, one for each of key's heads: of one axis, or of two where one would take a copy of them all."""
    x, call = x.to(dtype), blocks[0].call
    if len(blocks) == 1 or x.is_contiguous():
        return x.reshape(call.outer * call.heads, -1, x.shape[-1])
    return x.reshape(call.outer, call.heads, -1, x.shape[-1])


def _new_probabilities(query: Tensor, call: _Call) -> Tensor:
    scores = call.outer * call.heads, call.rows, call.keys
    return mask_kernels._new_like(query.new_empty(()).expand(scores), math.prod(scores))


def _scratch(x: Tensor, blocks: list[_Block]) -> Tensor:
    call = blocks[0].call
    return x.new_empty((blocks[0].matrices, call.rows, call.keys))


def _additive(mask: Tensor | None, query: Tensor, call: _Call) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The mask as kernels take it, and its strides."""
    if mask is None:
        return None, (0, 0, 0)
    wide = fused_kernels.computed(query.dtype)
    mask = fused_kernels.additive(mask, wide) if mask.dtype is torch.bool else mask.detach()
    scores = query.new_empty((), dtype=wide).expand(*query.shape[:-1], call.keys)
    flat, _, _, strides = fused_kernels._mask(mask, scores)
    return flat, strides


hide_from_dynamo(attend, _attention, _attention_backward, _forward, _backward)


for _name, _parts in {
    "attention": (_attention_op, _attention_fake, ATTENTION, _Op),
    "attention_backward": (_attention_backward, _attention_backward_fake, ATTENTION_BACKWARD, fused_ops._Op),
}.items():
    fused_ops.register(_name, *_parts)
