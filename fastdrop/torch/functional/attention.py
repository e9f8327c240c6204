"""Attention with dropout: two matrix products around a softmax and its dropout.

There are three ways. `attend` calls the kernel of `ops.attention` for eager dense tensors on the CPU, and `trace` calls
its op for compilers. `compose` takes everything else, composed of torch's matrix products and `softmax_dropout`:
transforms, modes and subclasses, other devices, and shapes that broadcast. If the keys of a query share one decision,
attention without dropout goes one of these ways, and its result is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import checks
from ..ops.attention import ATTENTION, Attention, has_known_dtypes, has_strides, is_regular, repeat_heads
from ..runtime import dtypes, names, nested
from ..runtime.dispatch import hide_from_dynamo, is_eager_dense
from ..runtime.dispatch.ops import composed_attention
from ..runtime.located import Drawn
from . import onnx, sharded
from .fused_calls import Options, softmax
from .plan import (
    FUSED_OP,
    KEEPS_ALL,
    KERNEL,
    NO_SOURCE,
    Cells,
    Source,
    Whole,
    autocast_dtype,
    check_unused_seed,
    for_subclasses,
    plan_call,
    seed_for_kernel,
    seed_for_ops,
    wants_gradient,
)
from .routing import drop

__all__ = ["scaled_dot_product_attention"]

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]  # query, key, value and mask
TorchOptions = tuple[bool, float | None, bool]  # causal, scale, and whether heads of key and value are shared


def _attend_to_shards(function: Callable[..., Any], arguments: sharded.Arguments) -> Any:
    """Each process has some batches, heads or queries. It needs all keys of these, and the values."""
    p = arguments.get("dropout_p", 0.0)
    if not arguments.get("training", True) or not (isinstance(p, Tensor) or p > KEEPS_ALL):
        return function(**arguments)  # torch's own knows more placements
    query, gqa = sharded.data_of(arguments, "query"), arguments.get("enable_gqa", False)
    for name, axis in (("query", -1), ("key", -2), ("value", -2), *[("query", -2)] * arguments.get("is_causal", False)):
        sharded.check_whole(arguments[name], axis, name, function)
    key, value = arguments["key"], arguments["value"]
    weights = weights_shape(query, key, gqa)
    if weights[:-1] != query.shape[:-1]:
        raise ValueError(
            f"query must have the result's batches and heads where it is a DTensor, {weights[:-2]}, but got shape "
            f"{tuple(query.shape)}"
        )
    given: sharded.Arguments = {"part": sharded.layout_of(query, weights)}
    for name, x in (("key", key), ("value", value)):
        _check_heads(name, x, query)
        given[name] = sharded.operand(name, x, query, tuple(query.shape), query.dim() - 2)
    if (mask := arguments.get("attn_mask")) is not None:
        given["attn_mask"] = sharded.operand("attn_mask", mask, query, weights)
    if (noise_shape := arguments.get("noise_shape")) is not None:
        checks.noise_shape(noise_shape, weights, "the weights")
        given["noise_shape"] = tuple(1 if extent == 1 else None for extent in noise_shape)
    local = sharded.local_tensor(query)
    y = function(**{**arguments, **given, "query": local})
    return sharded.to_dtensor(y, query, local, (*query.shape[:-1], value.shape[-1]))


def takes_shards(query: Any, key: Any, value: Any, causal: bool) -> bool:
    """Whether DTensors are sharded in a way that `scaled_dot_product_attention` takes."""
    whole = (query, -1), (key, -2), (value, -2), *[(query, -2)] * causal
    return sharded.is_dtensor(query) and all(sharded.is_whole(x, axis) for x, axis in whole)


def _check_heads(name: str, x: Any, query: Any) -> None:
    """Raises if heads of a key or a value serve queries of several processes."""
    heads = query.dim() - 3
    if heads < 0 or x.shape[-3] in (1, query.shape[-3]):
        return
    pieces = math.prod(
        query.device_mesh.size(i) for i, each in enumerate(query.placements) if sharded.axis_of(each) == heads
    )
    if x.shape[-3] % pieces or query.shape[-3] % pieces:
        raise ValueError(
            f"{name} must have heads for each of the {pieces} shards of query's, but has {x.shape[-3]}: call "
            f"query.redistribute with another placement first"
        )


@for_subclasses(_attend_to_shards)
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
    training: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    part: Whole = None,
    noise_shape: Sequence[int | None] | None = None,
    store: str = "seed",
) -> Tensor:
    """Returns ``dropout(softmax(scale * query @ key.T + attn_mask)) @ value``:
    `torch.nn.functional.scaled_dot_product_attention`, faster where it drops on the CPU.

    Parameters
    ----------
    query : Tensor of float32, float64, float16 or bfloat16, ``(*, H, L, E)``
        ``(L, E)`` and ``(H, L, E)`` too.
    key, value : Tensor of the same dtype, ``(*, H, S, E)`` and ``(*, H, S, Ev)``
    attn_mask : Tensor of bool, float32 or query's dtype, broadcastable to ``(*, H, L, S)``, optional
        Added to the scores. In a mask of bool, False excludes a key. A query that sees no key gets 0.
    dropout_p : float
        Drop probability of each of the ``(*, H, L, S)`` weights, 0 to 1.
    is_causal : bool
        A query sees the keys up to its own number. Not together with attn_mask.
    scale : float, optional
        None is ``1 / sqrt(E)``.
    enable_gqa : bool
        Lets key and value have fewer heads, each of which serves as many neighbouring ones of query.
    training : bool
        False drops nothing. torch's function has no such argument, and always drops.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    noise_shape : sequence of (int or None), optional
        An entry for each axis of the weights: 1 if it shares one decision, None or the full extent if it doesn't.
        ``(1, 1, None, None)`` is Flax's default, one mask for all batches and heads; ``(None, None, 1, 1)`` drops
        whole heads, which is DropHead.
    store : {"seed", "bits"}
        What backward has the mask from: the seed, or a bit for each weight, fewer under a noise_shape. Drawing it again
        costs little beside the matrix products, so "bits" is seldom worth its memory.

    Returns
    -------
    Tensor with query's dtype, ``(*, H, L, Ev)``

    Raises
    ------
    RuntimeError
        What torch refuses, in its words: other dtypes, shapes that don't fit, attn_mask together with is_causal.
    ValueError, TypeError
        A bad dropout_p, seed, generator, noise_shape or store, as in `dropout`.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    The mask is that of `dropout` of the weights, and of those a part. The softmax is of the keys that are given, and
    ``is_causal`` counts the queries and keys that are given.

    Kept for backward: the arguments, the result, two numbers of float32 (float64 for float64) for each query, 8 bytes.
    The mask and the weights are computed again. Under a noise_shape that ends in 1, the result before dropout and 8
    more bytes are kept beside it. attn_mask must not be written to before that, and neither must the result. If nothing
    is dropped, and on a GPU without a seed, generator or noise_shape, torch's own function is called. It has a gradient
    of any order and a forward-mode derivative, and works under ``torch.compile``, ``torch.func``, autocast and
    checkpointing. Gradients of higher order are composed of torch's ops around `dropout`, under the same mask. So is
    all of it under a transform, on a GPU, where heads or batches broadcast, and where noise_shape is 1 on some, but not
    all, of several axes before the heads; it then keeps 8 bytes for a weight (16 for float64), 1/8 more with "bits",
    and query, key and value in float32. In 16 bits, gradients have the rounding of the result, from which backward
    takes the sum of dy times the dropped weights. Sources: Vaswani et al., NeurIPS 2017; Srivastava et al., JMLR 15,
    2014; Milakov and Gimelshein, 2018; Dao et al., NeurIPS 2022. Of shared masks: ``broadcast_dropout`` of Flax's
    ``MultiHeadDotProductAttention``; Zhou et al., EMNLP Findings 2020 (DropHead).

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> query = torch.ones(1, 2, 3)
    >>> value = torch.eye(4)[None]
    >>> fdt.scaled_dot_product_attention(query, torch.ones(1, 4, 3), value, dropout_p=0.5, seed=4)
    tensor([[[0.0000, 0.0000, 0.5000, 0.5000],
             [0.0000, 0.5000, 0.0000, 0.0000]]])
    """
    options = is_causal, scale, enable_gqa
    checks.choice("store", store, checks.STORES)
    if not _are_parsed(query, key, value, attn_mask, *options):
        _torchs(query, key, value, attn_mask, 0.0, *options)  # says what is wrong
    way, p, drops = plan_call(query, dropout_p, training, (key, value, attn_mask))
    source = generator, seed, part
    if not drops:
        check_unused_seed(source)
        y = _torchs(query, key, value, attn_mask, 0.0, *options)  # says what is wrong with shapes
        if noise_shape is not None and not query.is_nested:
            mask_shape(noise_shape, query, key, enable_gqa)
        return y
    if query.is_cuda and not names.are_used and all(given is None for given in (*source, noise_shape)):
        return _torchs(query, key, value, attn_mask, p, *options)
    if (dtype := autocast_dtype(query)) is not None:
        query, key, value, attn_mask = (_autocast(x, dtype) for x in (query, key, value, attn_mask))
        with torch.autocast(query.device.type, enabled=False):
            others: dict[str, Any] = {"generator": generator, "seed": seed, "part": part, "store": store}
            return scaled_dot_product_attention(
                query, key, value, attn_mask, p, *options, noise_shape=noise_shape, **others
            )
    arguments = query, key, value, attn_mask
    nested.check_dense(*arguments)
    nested.refuse(query, "attention")
    call: Callable[..., Tensor] = compose
    if not is_regular(*arguments, *options):
        refuse(*arguments, *options)
    elif way == FUSED_OP and query.is_cpu:
        call = trace
    elif way == KERNEL and all(x is None or x.is_cpu for x in arguments):
        call = attend
    if noise_shape is None:
        return call(arguments, p, options, source, store)
    return _under_shared_mask(call, arguments, p, options, source, store, noise_shape)


def _under_shared_mask(
    call: Callable[..., Tensor],
    arguments: Arguments,
    p: Any,
    options: TorchOptions,
    source: Source,
    store: str,
    noise_shape: Any,
) -> Tensor:
    """Attention that drops by a mask of ``noise_shape``; ``call`` is the way that it goes without one."""
    query, key, *_ = arguments
    cells = mask_shape(noise_shape, query, key, options[2])
    shared = tuple(noise_shape)
    if not _drops_rows(shared):
        if call is not compose and not has_strides(cells, query):
            call = compose
        return call(arguments, p, options, source, store, shared)
    # A row of weights is dropped as a whole, and so is the result's.
    y = call(arguments, 0.0, options, (None, 0, None))
    of_value = y.dim() - len(shared)  # leading axes that value alone has
    if source[2] is not None:  # which is a part of weights
        seed = seed_for_ops(query, source, weights_shape(query, key, options[2]), shared)
        source = None, Drawn(seed), None
    return drop(y, p, True, False, source, (1,) * of_value + shared, store, "inverted")


def mask_shape(noise_shape: Any, query: Tensor, key: Tensor, gqa: bool) -> Any:
    """The extents of the mask of the weights. None: each weight has its own cell."""
    if noise_shape is None:
        return None
    weights = weights_shape(query, key, gqa)
    if not torch.compiler.is_compiling():
        cells = checks.noise_shape(noise_shape, weights, "the weights")
    elif len(noise_shape) != len(weights):
        raise ValueError("noise_shape must have one entry per axis of the weights")
    else:  # ops check the extents
        cells = tuple(extent if own is None else own for own, extent in zip(noise_shape, weights, strict=True))
    return None if cells == weights else cells


def weights_shape(query: Tensor, key: Tensor, gqa: bool) -> tuple[int, ...]:
    heads = (*key.shape[:-3], query.shape[-3]) if gqa else key.shape[:-2]
    return (*torch.broadcast_shapes(query.shape[:-2], heads), query.shape[-2], key.shape[-2])


def _are_parsed(query: Any, key: Any, value: Any, mask: Any, causal: Any, scale: Any, gqa: Any) -> bool:
    """Whether arguments are of the types that torch's would be called with."""
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    masked = mask is None or isinstance(mask, Tensor)
    scaled = scale is None or isinstance(scale, (float, int))
    return tensors and masked and scaled and isinstance(causal, bool) and isinstance(gqa, bool)


def refuse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, gqa: bool
) -> None:
    """Raises torch's words for what torch refuses. It is asked of tensors without memory where those can tell, and of
    the others if it refuses these: what it takes is not computed twice."""
    tensors, options = (query, key, value, mask), (causal, scale, gqa)
    known = has_known_dtypes(*tensors)
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
    arguments: Arguments,
    p: Any,
    options: TorchOptions,
    source: Source = NO_SOURCE,
    store: str = "seed",
    shared: Cells = None,
) -> Tensor:
    """Attention composed of torch's ops, for transforms and modes, and for what `attend` and `trace` do not take."""
    query, key, value, mask = arguments
    causal, scale, gqa = options
    dtypes.check_real(query, "attention")
    if mask is not None and causal:
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    dtype, wide = query.dtype, dtypes.computed(query.dtype)
    query, key, value = query.to(wide), repeat_heads(key, query, gqa).to(wide), repeat_heads(value, query, gqa).to(wide)
    scale = 1.0 / math.sqrt(query.shape[-1] or 1) if scale is None else scale
    scores = query @ key.transpose(-2, -1)
    if shared is None:
        # A part may have some of the keys, of which the public function wants all.
        weights = softmax(scores, Options(p, True, source, store), mask, scale, causal)
    else:
        weights = softmax(scores, Options(0.0, True, NO_SOURCE, store), mask, scale, causal)
        weights = drop(weights, p, True, False, source, shared, store, "inverted")
    y: Tensor = (weights @ value).to(dtype)
    return y


def why_composed(arguments: Arguments, options: TorchOptions, noise_shape: Any = None) -> str | None:
    """Why attention that drops is composed of torch's ops. None if the kernel computes it."""
    if not all(x is None or x.is_cpu for x in arguments):
        return "a tensor is not on the CPU"
    if not is_regular(*arguments, *options):
        return "heads or batches broadcast, or a tensor is empty"
    if not all(x is None or is_eager_dense(x) for x in arguments):
        return "a compiler, a transform, a mode or a subclass has to see the ops"
    cells = mask_shape(noise_shape, *arguments[:2], options[2])
    if not _drops_rows(cells) and not has_strides(cells, arguments[0]):
        return "noise_shape is 1 on some, but not all, of the axes before the heads"
    return None


def drops_result(arguments: Arguments, options: TorchOptions, noise_shape: Any) -> bool:
    """Whether keys share a decision under ``noise_shape``, so that the result is dropped in place of the weights."""
    return _drops_rows(mask_shape(noise_shape, *arguments[:2], options[2]))


def _drops_rows(cells: Any) -> bool:
    return cells is not None and cells[-1] == 1


def is_direct(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether kernels may read all of it now, because no mode, transform or subclass has to see the ops."""
    return all(x is None or (x.is_cpu and is_eager_dense(x)) for x in (query, key, value, mask))


def attend(
    arguments: Arguments,
    p: float,
    options: TorchOptions,
    source: Source = NO_SOURCE,
    store: str = "seed",
    shared: Cells = None,
) -> Tensor:
    """Attention by the kernel. Arguments are regular, and eager dense tensors on the CPU."""
    call = _call(arguments, seed_for_kernel, source, p, options, store, shared)
    y: Tensor = ATTENTION.call_kernel(call, call.keep)[0]
    return y


def trace(
    arguments: Arguments,
    p: Any,
    options: TorchOptions,
    source: Source = NO_SOURCE,
    store: str = "seed",
    shared: Cells = None,
) -> Tensor:
    """Attention as one op, for compilers. Arguments are regular, and will be eager dense tensors on the CPU."""
    if onnx.is_exported():
        return compose(arguments, p, options, source, store, shared)
    y: Tensor = ATTENTION(_call(arguments, seed_for_ops, source, p, options, store, shared))[0]
    return y


def _call(
    arguments: Arguments,
    take_seed: Callable[..., Any],
    source: Source,
    p: Any,
    options: TorchOptions,
    store: str,
    shared: Cells,
) -> Attention:
    (causal, scale, _), wanted = options, wants_gradient(arguments)
    query, key, *_ = arguments
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale + 0.0
    weights = *query.shape[:-1], key.shape[-2]  # arguments are regular
    seed = take_seed(query, source, shape=weights, shared=shared)
    cells = None
    if shared is not None:
        cells = tuple(n if own is None else own for own, n in zip(shared, weights, strict=True))
    return Attention(*arguments, seed, p, causal, scale, wanted and store == "bits", wanted, cells)


hide_from_dynamo(attend)
