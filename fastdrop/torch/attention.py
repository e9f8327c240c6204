"""Attention with dropout on the CPU: two matrix products around `softmax_dropout`, a few heads at a time.

Scores are by far the largest tensors of attention. Those of the heads at hand are made, used and overwritten while they
lie in the cache; of all of them only the probabilities are ever in memory, once, and none where no gradient is wanted.
Arithmetic on 16-bit data is float32's, as in torch, except that the probabilities kept for backward are 16-bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..mask import word_count
from ..stream import keep_scale, threshold
from . import _fused_ops, _kernels, _ops, _route, _rows
from ._plain import hide_from_dynamo, is_plain
from .fused import softmax_dropout

__all__ = ["scaled_dot_product_attention"]

# How many scores a thread has at once, one head's at least: two arrays of them stay in the cache, and the calls that it
# takes, at each of which threads wait for one another, cost little beside them.
BLOCK = 1 << 20


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
    derivative; in those of higher order, and for an attn_mask that wants a gradient, it is composed of torch's ops
    around `dropout`, under the same mask. Sources: Vaswani et al., NeurIPS 2017; Srivastava et al., JMLR 15, 2014.

    >>> import torch, fastdrop.torch as fdt
    >>> query = torch.ones(1, 2, 3)
    >>> value = torch.eye(4)[None]
    >>> fdt.scaled_dot_product_attention(query, torch.ones(1, 4, 3), value, dropout_p=0.5, seed=4)
    tensor([[[0.0000, 0.0000, 0.5000, 0.5000],
             [0.0000, 0.5000, 0.0000, 0.0000]]])
    """
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors):
        return handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            generator=generator,
            seed=seed,
        )
    options = is_causal, scale, enable_gqa
    if not all(isinstance(x, Tensor) for x in (query, key, value)):
        return _torchs(query, key, value, attn_mask, 0.0, *options)
    tracing = torch.compiler.is_compiling()
    p = _route.traced_probability(dropout_p) if tracing else _route.eager_probability(dropout_p)
    if p <= _route.KEEPS_ALL:
        _route._check_unused(seed, generator)
        return _torchs(query, key, value, attn_mask, 0.0, *options)
    if query.is_cuda and seed is None and generator is None:
        return _torchs(query, key, value, attn_mask, p, *options)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value, attn_mask = (_autocast(x, dtype) for x in (query, key, value, attn_mask))
        with torch.autocast(device, enabled=False):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, p, *options, generator=generator, seed=seed
            )
    arguments = query, key, value, attn_mask
    if not tracing and not is_regular(*arguments, *options):  # torch refuses it, or takes it
        _torchs(*arguments, 0.0, *options)
        math_path = torch.ops.aten._scaled_dot_product_attention_math
        math_path(*arguments, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    elif not tracing and is_direct(*arguments):
        return attend(*arguments, p, *options, generator, seed)
    return compose(*arguments, p, *options, generator, seed)


def _torchs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, causal: bool, scale: Any, gqa: bool
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask, p, causal, scale=scale, enable_gqa=gqa)


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
    """What compilers, transforms and modes see, and all that `attend` does not take."""
    if mask is not None and causal:
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    dtype, wide = query.dtype, _rows.computed(query.dtype)
    query, key, value = query.to(wide), _repeated(key, query, gqa).to(wide), _repeated(value, query, gqa).to(wide)
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else scale
    weights = softmax_dropout(query @ key.mT, p, scale, mask, causal, generator=generator, seed=seed)
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
    if not query.dim() == key.dim() == value.dim() >= 2 + gqa or query.dtype not in _rows.TAGS:
        return False
    if not query.dtype is key.dtype is value.dtype or not query.device == key.device == value.device:
        return False
    *outer, _, width = query.shape
    if outer and gqa and key.shape[-3] and outer[-1] % key.shape[-3] == 0:
        outer = [*outer[:-1], key.shape[-3]]
    keys = value.shape[-2]
    if list(key.shape) != [*outer, keys, width] or list(value.shape[:-2]) != outer:
        return False
    if mask is not None:
        scores = (*query.shape[:-1], keys)
        extents = zip(reversed(mask.shape), reversed(scores), strict=False)
        if causal or mask.dim() > len(scores) or any(extent not in (1, full) for extent, full in extents):
            return False
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return False
    return math.prod(query.shape) > 0 and math.prod(value.shape) > 0


def is_direct(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether kernels may read all of it, here and now, and nothing else wants to see what they do."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    of_mask = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    return not of_mask and all(x.is_cpu and is_plain(x) for x in tensors)


class _Call(NamedTuple):
    """A call's options, and its extents: scores are ``[outer, heads, rows, keys]``, of as many heads as key has."""

    p: float
    a: float
    scale: float
    causal: bool
    gqa: bool
    outer: int
    heads: int
    rows: int  # queries of all the heads that a key serves
    queries: int
    keys: int

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
    cut = threshold(p)
    number = _route._number_of_seed(query, generator, seed, False)
    *outer, queries, width = query.shape
    keys = key.shape[-2]
    heads = key.shape[-3] if outer else 1
    words = _kernels.draw(query, math.prod(outer) * queries * keys, number, cut)
    scale = 1.0 / math.sqrt(width) if scale is None else float(scale)
    extents = math.prod(outer[:-1]), heads, math.prod(outer[-1:]) // heads * queries, queries, keys
    call = _Call(p, keep_scale(cut), scale, causal, gqa, *extents)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        result: Tensor = _Attention.apply(query, key, value, mask, words, call)
        return result
    return _forward(query, key, value, mask, words, call, False)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, words: Tensor, call: _Call
    ) -> Tensor:
        y, probabilities = _forward(query, key, value, mask, words, call, True)
        ctx.save_for_backward(query, key, value, words, probabilities)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        query, key, value, words, probabilities = ctx.saved_tensors
        if _route._straight(dy):
            gradients = _backward(dy, query, key, value, words, probabilities, ctx.call, ctx.needs_input_grad)
        else:
            gradients = _composed_backward(dy, query, key, value, words, probabilities, ctx.call)
        return *gradients, None, None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, words: Tensor, call: _Call, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The result and, if they are to be kept, the probabilities before dropout, a matrix for each of key's heads."""
    dtype, wide, blocks = query.dtype, _rows.computed(query.dtype), call.blocks()
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
        _rows._run(
            "softmax_forward",
            _rows.TAGS[wide],
            scores,
            None if flat is None else flat[start:],
            block.words(words),
            None if kept is None else scores,
            to,
            block.matrices * call.rows,
            call.keys,
            block.heads * group,
            call.queries,
            *strides,
            call.scale,
            call.a,
            int(call.causal),
        )
        if kept is not None and apart is not None:
            kept.copy_(scores)
        torch.bmm(to, block.of(v), out=block.of(y))
    return y.view(*query.shape[:-1], v.shape[-1]).to(dtype), probabilities


def _backward(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    words: Tensor,
    probabilities: Tensor,
    call: _Call,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value."""
    wide, blocks = _rows.computed(query.dtype), call.blocks()
    q, k, v, g = (_by_heads(x, wide, blocks) for x in (query, key, value, dy))
    scores = call.outer * call.heads, call.rows, call.keys
    probabilities = _rows._kept(probabilities, scores, query.dtype, query)
    words = _kernels._checked(words, math.prod(scores), query.device)
    dq, dk, dv = (
        q.new_empty((scores[0], *x.shape[-2:])) if want else None for x, want in zip((q, k, v), wanted, strict=False)
    )
    dscores = _scratch(q, blocks)
    dropped = None if dv is None else _scratch(q, blocks)
    for block in blocks:
        d, again, of_y = dscores[: block.matrices], None if dropped is None else dropped[: block.matrices], block.of(g)
        torch.bmm(of_y, block.of(v).mT, out=d)
        kept = block.of(probabilities).to(wide)
        sizes = block.matrices * call.rows, call.keys
        _rows._run(
            "softmax_backward", _rows.TAGS[wide], d, kept, block.words(words), d, again, *sizes, call.scale, call.a
        )
        if dq is not None:
            torch.bmm(d, block.of(k), out=block.of(dq))
        if dk is not None:
            torch.bmm(d.mT, block.of(q), out=block.of(dk))
        if dv is not None and again is not None:
            torch.bmm(again.mT, of_y, out=block.of(dv))
    return tuple(
        None if d is None else d.view(x.shape).to(x.dtype)
        for d, x in zip((dq, dk, dv), (query, key, value), strict=True)
    )


def _composed_backward(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, words: Tensor, probabilities: Tensor, call: _Call
) -> tuple[Tensor, ...]:
    """The same in ops that have derivatives themselves."""
    wide = _rows.computed(query.dtype)
    q, k, v, g = (x.to(wide) for x in (query, key, value, dy))
    # A softmax of their logarithms, which hold what was masked: what the scores add is 0, but has derivatives.
    scores = q @ _repeated(k, q, call.gqa).mT * call.scale
    scores = scores - scores.detach() + probabilities.to(wide).log().view(scores.shape)
    probabilities = _fused_ops.softmax_of(scores, None, 1.0, False)
    dropped = _ops.masked(probabilities, words, call.p, None, True)
    d = _ops.masked(g @ _repeated(v, q, call.gqa).mT, words, call.p, None, True)
    d = probabilities * (d - (d * probabilities).sum(-1, keepdim=True)) * call.scale
    dq, dk, dv = d @ _repeated(k, q, call.gqa), _gathered(d.mT @ q, key), _gathered(dropped.mT @ g, value)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _gathered(x: Tensor, like: Tensor) -> Tensor:
    """Sums over the heads that each of fewer serves."""
    return x if x.shape == like.shape else x.unflatten(-3, (like.shape[-3], -1)).sum(-3)


def _by_heads(x: Tensor, dtype: torch.dtype, blocks: list[_Block]) -> Tensor:
    """Matrices, one for each of key's heads: of one axis, or of two where one would take a copy of them all."""
    x, call = x.to(dtype), blocks[0].call
    if len(blocks) == 1 or x.is_contiguous():
        return x.reshape(call.outer * call.heads, -1, x.shape[-1])
    return x.reshape(call.outer, call.heads, -1, x.shape[-1])


def _new_probabilities(query: Tensor, call: _Call) -> Tensor:
    scores = call.outer * call.heads, call.rows, call.keys
    return _kernels._new_like(query.new_empty(()).expand(scores), math.prod(scores))


def _scratch(x: Tensor, blocks: list[_Block]) -> Tensor:
    call = blocks[0].call
    return x.new_empty((blocks[0].matrices, call.rows, call.keys))


def _additive(mask: Tensor | None, query: Tensor, call: _Call) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The mask as kernels take it, and its strides."""
    if mask is None:
        return None, (0, 0, 0)
    wide = _rows.computed(query.dtype)
    mask = mask.detach()[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]  # expanded: once
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=wide).masked_fill_(~mask, -math.inf)
    scores = query.new_empty((), dtype=wide).expand(*query.shape[:-1], call.keys)
    flat, _, _, strides = _rows._mask(mask, scores)
    return flat, strides


hide_from_dynamo(attend, _forward, _backward)
