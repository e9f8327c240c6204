"""Models that exist: what stands around their dropout done in one pass with it, and back.

A module changes its class where it stands, as in `convert`, to a subclass whose forward takes the parameters of the
modules inside and calls the functions of `fused` in place of them. Which calls may be left out is asked again at each
forward pass, so that a hook that comes later, or a module that is replaced, is not passed over: the original forward
runs then, and in evaluation.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...functional import fused
from ...functional.attention import scaled_dot_product_attention
from ...nn.dropout import Rated, is_traced, traced
from ...runtime.dispatch.modules import DECODER_BLOCKS, ENCODER_BLOCKS, TorchDropout, additive_mask, children_of
from ..convert import functional_rows, reach, why_left, why_lent
from ..rates import rate_name
from ..report import Report, Row
from ..source import Owners
from . import transformers_layers
from .rules import (
    DROPOUTS,
    Fused,
    activation_name,
    activation_obstacle,
    add,
    add_then_norm,
    become,
    call_obstacle,
    change,
    is_taken,
    norm_obstacle,
    norm_of_sum,
    obstacle,
    options_of,
    original_class,
    replaced_method,
    scripted_as,
)

__all__ = ["fuse", "unfuse"]

UNKNOWN = "not in a part that is known"


def fuse(model: nn.Module) -> Report:
    """Makes one pass over memory of dropout and of what stands around it, wherever a model is known to have it, in
    place, and reports what it did.

    * `torch.nn.Sequential`: a Linear, perhaps ReLU, GELU or SiLU, and Dropout, one after the other, at any position;
    * `torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``: bias, activation and dropout; bias, dropout,
      residual and norm; attention by `fastdrop.torch.scaled_dot_product_attention`;
    * BERT and GPT-2 of transformers, from 5.4 on: their layers likewise, and attention of the implementations "sdpa"
      and "eager". Dropout of the embeddings stays what it is.

    A module remains the same object with the same parameters, ``state_dict``, hooks, training state and p; dropout
    inside may be torch's `Dropout` or ours, before and after, and is fastdrop's as long as the module is fused. Masks
    are those of the unfused module under `convert` and, for attention, `enable`: each dropout takes its number from
    torch's generator in the same order. In evaluation the original forward runs; so it does where, later on, a module
    inside gets hooks or another class, which that forward then calls, and in GPT-2's blocks once attentions or hidden
    states were asked for, for good: transformers puts hooks into them.

    Subclasses of torch's classes that inherit what is replaced are fused too, those of transformers' are not. Those
    with a forward of their own, modules with a method replaced on the object or on its class, and those around modules
    with hooks, quantised or parametrised ones stay as they are and are listed with the reason, like all other modules
    that drop. Calling it again fuses what came in between, and lists what no longer is. ``torch.jit.script`` takes
    fused modules of torch as they were before; for those of transformers call `unfuse` first. Wrappers that find layers
    by the name of their class come before, ``fully_shard`` after.

    Parameters
    ----------
    model : Module

    Returns
    -------
    Report
        Prints as a table: module path, before, after or why left.

    >>> import torch, fastdrop.torch as fdt
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 8), nn.Dropout(0.1))
    >>> print(fdt.fuse(model))
    module       before      after
    (the model)  Sequential  FusedSequential: 0 + 1 + 2, 3 + 4
    >>> model(torch.randn(4, 8)).shape
    torch.Size([4, 8])
    """
    rows: list[Row] = []
    owners = Owners(model)
    told: set[int] = set()  # modules that drop, of which another line tells
    for path, module in model.named_modules():
        known = _known(module)
        if known is FusedSequential:
            rows += _fuse_sequence(path, module)
            told.update(map(id, module.children()))
        elif known is not None:
            name = type(module).__name__
            reason = change(module, known) or known.refusal(module)
            told.update(map(id, module.children()))
            if reason:
                rows.append(Row(path, name, None, reason))
            elif not isinstance(module, Fused):
                become(module, known)
                rows.append(Row(path, name, type(module).__name__))
        elif rate_name(module) is not None and id(module) not in told:
            rows.append(_left(path, module, why_lent(owners, module) or f"{UNKNOWN}; {reach(module)}"))
        if not isinstance(module, Fused):
            rows += functional_rows(path, module, owners)
    return Report(rows)


def _known(module: nn.Module) -> Any:
    """What is put before a module's class, if that is one that is known or derives from one of torch's."""
    theirs = original_class(module)
    for known in (FusedSequential, FusedTransformerEncoderLayer, FusedTransformerDecoderLayer):
        if issubclass(theirs, known.original):
            return known
    return transformers_layers.known_class(theirs)


def _fuse_sequence(path: str, sequence: Any) -> list[Row]:
    """Its own line, if it changes, and one for each of its modules that drops and is left, by position."""
    name, reason = type(sequence).__name__, change(sequence, FusedSequential)
    runs = [_run_to(sequence, i) for i in range(len(children_of(sequence)))]
    parts = [" + ".join(run.names) for run in runs if isinstance(run, _Run)]
    rows = []
    if parts and not reason and not isinstance(sequence, Fused):
        become(sequence, FusedSequential)
        rows.append(Row(path, name, f"{type(sequence).__name__}: {', '.join(parts)}"))
    for (inner, module), run in zip(children_of(sequence).items(), runs, strict=True):
        why = f"in a {name}: {reason}" if reason else run
        if rate_name(module) is not None and isinstance(why, str):
            rows.append(_left(f"{path}.{inner}" if path else inner, module, why))
    return rows


def _left(path: str, module: nn.Module, reason: str) -> Row:
    before = repr(module) if isinstance(module, TorchDropout | Rated) else type(module).__name__
    by_itself = isinstance(module, nn.MultiheadAttention | nn.RNNBase)
    return Row(path, before, None, why_left(module) if by_itself else reason)


def unfuse(model: nn.Module) -> Report:
    """Undoes `fuse`: every module it changed has its old class again.

    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.1))
    >>> _ = fdt.fuse(model)
    >>> print(fdt.unfuse(model))
    module       before           after
    (the model)  FusedSequential  Sequential
    """
    rows = []
    for path, module in model.named_modules():
        before = type(module)
        if isinstance(module, Fused):
            if "original" in vars(before):
                module.__class__ = before.original
                rows.append(Row(path, before.__name__, before.original.__name__))
            else:
                rows.append(Row(path, before.__name__, None, "its class was changed since"))
    return Report(rows)


def _methods(of: type[nn.Module], *names: str) -> dict[str, Any]:
    """As they are when this is imported, so that a patch that comes later is seen, however it is named."""
    return {name: getattr(of, name) for name in names}


# ---- nn.Sequential ----


class _Run(NamedTuple):
    """A Linear, an activation if there is one, and a dropout, one after the other in a sequence."""

    start: int
    names: list[str]
    linear: nn.Linear
    activation: str | None
    drop: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.linear.weight)
        return fused.bias_act_dropout(h, self.linear.bias, activation=self.activation, **options_of(self.drop))


def _run_to(sequence: nn.Sequential, last: int) -> _Run | str:
    """The run that ends with a sequence's module, or why there is none."""
    names, modules = list(children_of(sequence)), list(children_of(sequence).values())
    drop: Any = modules[last]
    activation = activation_name(modules[last - 1]) if last else None
    start = last - (1 if activation is None else 2)
    linear: Any = modules[start] if start >= 0 else None
    if not isinstance(linear, nn.Linear) and type(linear).__name__ != "Linear":  # another's of that name is told of
        return "no Linear, or Linear and activation, right before it"
    reason = obstacle(names[start], linear, nn.Linear) or obstacle(names[last], drop, *DROPOUTS)
    if activation is not None:
        reason = reason or call_obstacle(names[last - 1], modules[last - 1])
    if not reason and not linear.weight.is_floating_point():
        reason = f"{names[start]} is not of real numbers"
    return reason or _Run(start, names[start : last + 1], linear, activation, drop)


class FusedSequential(Fused, nn.Sequential):
    original = nn.Sequential
    METHODS = _methods(nn.Sequential, "forward", "__iter__")

    @scripted_as(nn.Sequential.forward)
    def forward(self, input: Any) -> Any:
        modules: list[Any] = list(children_of(self).values())
        runs: dict[int, _Run] = {}
        for i, module in enumerate(modules):
            if type(module) in DROPOUTS and module.training and not isinstance(input, fx.Proxy):
                run = _run_to(self, i)
                if isinstance(run, _Run):
                    runs[run.start] = run
        i = 0
        while i < len(modules):
            if i in runs and is_taken(input):
                input, i = runs[i](input), i + len(runs[i].names)
            else:
                input, i = modules[i](input), i + 1
        return input


# ---- torch's transformer layers ----


class _Layer(Fused):
    """An encoder's or a decoder's layer, by the names of its modules."""

    ATTENTIONS: ClassVar[tuple[str, ...]]
    DROPS: ClassVar[tuple[str, ...]]
    NORMS: ClassVar[tuple[str, ...]]

    @classmethod
    def refusal(cls, module: Any) -> str:
        if reason := replaced_method(module, cls):
            return reason
        for name in cls.ATTENTIONS:
            attention = getattr(module, name)
            if reason := obstacle(name, attention, nn.MultiheadAttention):
                return reason
            if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
                return f"{name} has keys and values of its own"
        for name in ("linear1", "linear2"):
            if reason := obstacle(name, getattr(module, name), nn.Linear):
                return reason
        for name in cls.DROPS:
            if reason := obstacle(name, getattr(module, name), *DROPOUTS):
                return reason
        for name in cls.NORMS[1:] if module.norm_first else cls.NORMS:  # pre-norm layers call the first
            if reason := norm_obstacle(name, getattr(module, name)):
                return reason
        return activation_obstacle("activation", module.activation)

    def _is_fused(self, x: Any) -> bool:
        drops = any(getattr(self, name).training for name in self.ATTENTIONS + self.DROPS)
        return drops and is_taken(x) and not self.refusal(self)

    def _begin_feed_forward(self, x: Tensor) -> Tensor:
        """The second matrix product, without its bias."""
        layer: Any = self
        h = F.linear(x, layer.linear1.weight)
        activation = activation_name(layer.activation)
        h = fused.bias_act_dropout(h, layer.linear1.bias, activation=activation, **options_of(layer.dropout))
        return F.linear(h, layer.linear2.weight)


class FusedTransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    original = nn.TransformerEncoderLayer
    METHODS = _methods(nn.TransformerEncoderLayer, "forward", *ENCODER_BLOCKS)
    ATTENTIONS = ("self_attn",)
    DROPS = ("dropout", "dropout1", "dropout2")
    NORMS = ("norm1", "norm2")

    def _is_fused(self, x: Any) -> bool:
        return self.training and super()._is_fused(x)  # else torch's may not call what is inside

    @scripted_as(nn.TransformerEncoderLayer.forward)
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x, attention = src, self.self_attn
        if is_traced(self, x):
            return traced(self, x, src_mask, src_key_padding_mask, is_causal)  # type: ignore[no-any-return]
        masks = src_mask, src_key_padding_mask, is_causal
        if not self._is_fused(x) or not _fits(attention, x, x, *masks):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        bias = attention.out_proj.bias
        if self.norm_first:
            h = _attend(attention, self.norm1(x), None, *masks)
            normed, x = add_then_norm(h, bias, x, self.dropout1, self.norm2)
            return add(self._begin_feed_forward(normed), self.linear2.bias, x, self.dropout2)
        x = norm_of_sum(_attend(attention, x, None, *masks), bias, x, self.dropout1, self.norm1)
        return norm_of_sum(self._begin_feed_forward(x), self.linear2.bias, x, self.dropout2, self.norm2)


class FusedTransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    original = nn.TransformerDecoderLayer
    METHODS = _methods(nn.TransformerDecoderLayer, "forward", *DECODER_BLOCKS)
    ATTENTIONS = ("self_attn", "multihead_attn")
    DROPS = ("dropout", "dropout1", "dropout2", "dropout3")
    NORMS = ("norm1", "norm2", "norm3")

    @scripted_as(nn.TransformerDecoderLayer.forward)
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        x, attention, cross = tgt, self.self_attn, self.multihead_attn
        given = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
        if is_traced(self, x):
            return traced(self, x, memory, *given)  # type: ignore[no-any-return]
        masks = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        memory_masks = memory_mask, memory_key_padding_mask, memory_is_causal
        if not (
            self._is_fused(x)
            and is_taken(memory)
            and _fits(attention, x, x, *masks)
            and _fits(cross, x, memory, *memory_masks)
        ):
            return super().forward(tgt, memory, *given)
        bias, cross_bias = attention.out_proj.bias, cross.out_proj.bias
        if self.norm_first:
            h = _attend(attention, self.norm1(x), None, *masks)
            normed, x = add_then_norm(h, bias, x, self.dropout1, self.norm2)
            normed, x = add_then_norm(
                _attend(cross, normed, memory, *memory_masks), cross_bias, x, self.dropout2, self.norm3
            )
            return add(self._begin_feed_forward(normed), self.linear2.bias, x, self.dropout3)
        x = norm_of_sum(_attend(attention, x, None, *masks), bias, x, self.dropout1, self.norm1)
        x = norm_of_sum(_attend(cross, x, memory, *memory_masks), cross_bias, x, self.dropout2, self.norm2)
        return norm_of_sum(self._begin_feed_forward(x), self.linear2.bias, x, self.dropout3, self.norm3)


def _extents(attention: Any, x: Tensor) -> tuple[int, int]:
    """Batch and length of what attention is given."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if attention.batch_first else (x.shape[1], x.shape[0])


def _fits(
    attention: Any, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> bool:
    """Whether shapes and masks are as torch's attention wants them; if not, it is torch's to say so."""
    if x.shape[-1] != attention.embed_dim or memory.shape[-1] != attention.embed_dim:
        return False
    if x.dim() not in (2, 3) or memory.dim() != x.dim() or (is_causal and mask is None):
        return False
    batch, queries = _extents(attention, x)
    others, keys = _extents(attention, memory)
    for given in (mask, padding):
        if given is not None and not (given.dtype == torch.bool or given.is_floating_point()):
            return False
    if padding is not None and padding.shape != ((keys,) if x.dim() == 2 else (batch, keys)):
        return False
    shapes = (queries, keys), (batch * attention.num_heads, queries, keys)
    return others == batch and (mask is None or mask.shape in shapes)


def _merged(
    heads: int, batch: int, mask: Tensor | None, padding: Tensor | None, is_causal: bool, dtype: torch.dtype
) -> tuple[Tensor | None, bool]:
    """An additive mask, and whether causality is left to attention: as torch takes its hint, without padding alone."""
    padding = additive_mask(padding, "key_padding_mask", None if mask is None else mask.dtype, "attn_mask", dtype)
    if padding is None and is_causal:
        return None, True
    mask = additive_mask(mask, "attn_mask", None, "", dtype, False)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (batch, heads))
    if padding is None:
        return mask, False
    padding = padding.view(batch, 1, 1, padding.shape[-1])
    return padding if mask is None else mask + padding, False


def _attend(
    attention: Any, x: Tensor, memory: Tensor | None, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> Tensor:
    """What `torch.nn.MultiheadAttention` returns, before the bias of its output projection; memory None is x."""
    heads, width, batched = attention.num_heads, attention.embed_dim, x.dim() == 3
    batch, _ = _extents(attention, x)
    mask, is_causal = _merged(heads, batch, mask, padding, is_causal, x.dtype)
    if not batched:
        x, memory = x.unsqueeze(0), None if memory is None else memory.unsqueeze(0)
    batch_first = attention.batch_first or not batched
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    # Taken apart by unbind, whose gradient is one stack; that of indexing is zeros, filled in part and added up.
    if memory is None:
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, heads, -1)).unbind(-3)
    else:
        q_weight, kv_weight = weight.split([width, 2 * width])
        q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
        q = F.linear(x, q_weight, q_bias).unflatten(-1, (heads, -1))
        k, v = F.linear(memory, kv_weight, kv_bias).unflatten(-1, (2, heads, -1)).unbind(-3)
    q, k, v = (part.permute((0, 2, 1, 3) if batch_first else (1, 2, 0, 3)).contiguous() for part in (q, k, v))
    y = scaled_dot_product_attention(q, k, v, mask, attention.dropout if attention.training else 0.0, is_causal)
    y = y.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(-2)
    y = F.linear(y, attention.out_proj.weight)
    return y if batched else y.squeeze(0)
