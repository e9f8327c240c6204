"""Models that exist: what stands around their dropout done in one pass with it, and back.

A module changes its class where it stands, as in `convert`, to a subclass whose forward takes the parameters of the
modules inside and calls the functions of `fused` in place of them. This module owns which calls may be left out. It is
asked again at each forward pass, so that a hook that comes later, or a module that is replaced, is not passed over:
the original forward runs then, and in evaluation.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

from . import _cuda, fused
from . import modules as ours
from ._rates import rate_name
from .attention import scaled_dot_product_attention
from .convert import Report, Row
from .modules import Rated, is_traced, traced
from .override import _ours

__all__ = ["fuse", "unfuse"]

DROPOUTS = (nn.Dropout, ours.Dropout)
REPLACED = "forward was replaced on the object itself"
FUNCTIONS = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))

BERT, GPT2 = "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2"
CONV1D = ("transformers.pytorch_utils", "Conv1D")
TRANSFORMERS_ACTIVATIONS = {
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
    ("transformers.activations", "SiLUActivation"): "silu",
}


def fuse(model: nn.Module) -> Report:
    """Makes one pass over memory of dropout and of what stands around it, wherever a model is known to have it, in
    place, and reports what it did.

    * `torch.nn.Sequential`: a Linear, perhaps ReLU, GELU or SiLU, and Dropout, one after the other, at any position;
    * `torch.nn.TransformerEncoderLayer` and ``TransformerDecoderLayer``: bias, activation and dropout; bias, dropout,
      residual and norm; attention by `fastdrop.torch.scaled_dot_product_attention`;
    * transformers' ``BertIntermediate``, ``BertSelfOutput``, ``BertOutput``, ``GPT2MLP`` and ``GPT2Block``.

    A module remains the same object with the same parameters, ``state_dict``, hooks, training state and p; dropout
    inside may be torch's `Dropout` or ours, before and after, and is fastdrop's as long as the module is fused. Masks
    are those of the unfused module under `convert` and, for attention, `enable`: each dropout takes its number from
    torch's generator in the same order. In evaluation the original forward runs; so it does where, later on, a module
    inside gets hooks or another class, which that forward then calls.

    Subclasses, modules whose forward was replaced on the object, and those around modules with hooks, quantised or
    parametrised ones stay as they are and are listed with the reason, like all other modules that drop. Calling it
    again fuses what came in between. For ``torch.jit.script`` call `unfuse` first.

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
    reasons: dict[int, str] = {}  # why modules that drop are left; nothing for those of which another line tells
    for path, module in model.named_modules():
        become: Any = _class_for(module)
        name, reason = type(module).__name__, f"its {REPLACED}" if "forward" in vars(module) else ""
        if isinstance(module, nn.Sequential):
            if become is None and not isinstance(module, Fused):
                reason = reason or "its forward may be its own"
            runs = [_run_to(module, i) for i in range(len(module))]
            for inner, run in zip(module, runs, strict=True):
                reasons[id(inner)] = f"in a {name}: {reason}" if reason else run if isinstance(run, str) else ""
            parts = [" + ".join(run.names) for run in runs if isinstance(run, _Run)]
            if parts and become and not reason:
                module.__class__ = become
                rows.append(Row(path, name, f"{become.__name__}: {', '.join(parts)}"))
        elif isinstance(module, Fused):
            reasons.update(dict.fromkeys(map(id, module.children()), ""))
        elif become is not None:
            reason = reason or become.refusal(module)
            reasons.update(dict.fromkeys(map(id, module.children()), ""))
            if not reason:
                module.__class__ = become
            rows.append(Row(path, name, None if reason else become.__name__, reason))
        elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            reasons.update(dict.fromkeys(map(id, module.children()), ""))
            rows.append(Row(path, name, None, "a subclass of torch's layer; its forward may be its own"))
        elif rate_name(module) is not None and (reason := reasons.get(id(module), "not in a part that is known")):
            before = repr(module) if isinstance(module, _DropoutNd | Rated) else name
            rows.append(Row(path, before, None, reason))
    return Report(rows)


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


# ---- what may be left out ----


class Fused(nn.Module):
    """A module that `fuse` changed: a subclass of what it was, without attributes of its own."""

    original: ClassVar[type[nn.Module]]

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why a module of the original class can't be fused; nothing if it can."""
        raise NotImplementedError


def _obstacle(name: str, module: Any, *classes: type[nn.Module]) -> str:
    """Why the call of a module can't be left out, nothing if it can. A subclass may have a forward of its own."""
    if type(module) not in classes:
        return f"{name} is a {type(module).__name__}, not nn.{classes[0].__name__}"
    return _call_obstacle(name, module)


def _call_obstacle(name: str, module: Any) -> str:
    """As `_obstacle`, for a module whose class is known to be right."""
    if "forward" in module.__dict__:
        return f"{name}'s {REPLACED}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    ):
        return f"{name} has hooks"
    if getattr(module, "scaling", "inverted") != "inverted":
        return f"{name} doesn't scale what it keeps"
    return ""


def _norm_obstacle(name: str, norm: Any) -> str:
    if reason := _obstacle(name, norm, nn.LayerNorm):
        return reason
    return "" if len(norm.normalized_shape) == 1 else f"{name} is of more than one axis"


def _conv1d_obstacle(name: str, module: Any) -> str:
    if (type(module).__module__, type(module).__name__) != CONV1D:
        return f"{name} is a {type(module).__name__}, not transformers' Conv1D"
    return _call_obstacle(name, module)


def _activation(function: Any) -> str | None:
    """What the fused functions call an activation, a function or a module; None if they don't have it."""
    if isinstance(function, nn.Module):
        kind = type(function)
        if kind is nn.GELU:
            return "gelu" if function.approximate == "none" else "gelu_tanh"
        if kind is nn.ReLU or kind is nn.SiLU:
            return "relu" if kind is nn.ReLU else "silu"
        return TRANSFORMERS_ACTIVATIONS.get((kind.__module__, kind.__name__))
    for known, name in FUNCTIONS:
        if function is known:
            return name
    return None


def _activation_obstacle(name: str, function: Any) -> str:
    if _activation(function) is None:
        given = type(function) if isinstance(function, nn.Module) else function
        return f"{name} is {getattr(given, '__name__', repr(given))}, not a known one"
    return _call_obstacle(name, function) if isinstance(function, nn.Module) else ""


def _takes(x: Any) -> bool:
    """Whether the fused functions are for what layers make of x."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if not torch.compiler.is_compiling():
        return _ours(x, 0.0)
    return not x.is_nested and (x.is_cpu or (x.is_cuda and _is_usable(x.get_device())))


def _is_usable(device: int) -> bool:
    return _cuda.is_usable(device)


# A compiler asks once and does not look inside. `torch.compiler.assume_constant_result` does this, and imports dynamo.
_is_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _options(drop: Any) -> dict[str, Any]:
    """A dropout module's state, as the fused functions take it."""
    p = drop.rate if isinstance(drop, Rated) else drop.p
    return {"p": p, "training": drop.training, "store": getattr(drop, "store", "bits")}


# ---- the pieces ----


def _alike(h: Tensor, x: Tensor, keep_half: bool) -> tuple[Tensor, Tensor]:
    """h and the residual x as ``h + x`` would have them; with ``keep_half``, 16-bit h may stay beside a float32 x."""
    if h.dtype == x.dtype:
        return h, x
    dtype = torch.promote_types(h.dtype, x.dtype)
    return h if keep_half and dtype == torch.float32 else h.to(dtype), x.to(dtype)


def _add(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any) -> Tensor:
    """``x + drop(h + bias)``"""
    h, x = _alike(h, x, True)
    if bias is None:
        return fused.dropout_add(h, x, **_options(drop))
    return fused.bias_dropout_add(h, bias, x, **_options(drop))


def _add_then_norm(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """``x + drop(h + bias)``, after its norm: pre-norm layers go on from the sum."""
    h, x = _alike(h, x, True)
    return fused.dropout_add_layer_norm(h, x, norm.weight, norm.bias, eps=norm.eps, input_bias=bias, **_options(drop))


def _norm_of_sum(h: Tensor, bias: Tensor | None, x: Tensor, drop: Any, norm: Any) -> Tensor:
    """``norm(x + drop(h + bias))``: the residual stream of post-norm layers, and so of the sum's dtype."""
    h, x = _alike(h, x, False)
    return _add_then_norm(h, bias, x, drop, norm)[0]


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
        return fused.bias_act_dropout(h, self.linear.bias, activation=self.activation, **_options(self.drop))


def _run_to(sequence: nn.Sequential, last: int) -> _Run | str:
    """The run that ends with a sequence's module, or why there is none."""
    names, modules = list(sequence._modules), list(sequence._modules.values())
    drop: Any = modules[last]
    activation = _activation(modules[last - 1]) if last else None
    start = last - (1 if activation is None else 2)
    linear: Any = modules[start] if start >= 0 else None
    if not isinstance(linear, nn.Linear):
        return "no Linear, or Linear and activation, right before it"
    reason = _obstacle(names[start], linear, nn.Linear) or _obstacle(names[last], drop, *DROPOUTS)
    if activation is not None:
        reason = reason or _call_obstacle(names[last - 1], modules[last - 1])
    if not reason and not linear.weight.is_floating_point():
        reason = f"{names[start]} is not of real numbers"
    return reason or _Run(start, names[start : last + 1], linear, activation, drop)


class FusedSequential(Fused, nn.Sequential):
    original = nn.Sequential

    def forward(self, input: Any) -> Any:
        modules: list[Any] = list(self._modules.values())
        runs: dict[int, _Run] = {}
        for i, module in enumerate(modules):
            if type(module) in DROPOUTS and module.training and not isinstance(input, fx.Proxy):
                run = _run_to(self, i)
                if isinstance(run, _Run):
                    runs[run.start] = run
        i = 0
        while i < len(modules):
            if i in runs and _takes(input):
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
        for name in cls.ATTENTIONS:
            attention = getattr(module, name)
            if reason := _obstacle(name, attention, nn.MultiheadAttention):
                return reason
            if attention.bias_k is not None or attention.add_zero_attn or not attention._qkv_same_embed_dim:
                return f"{name} has keys and values of its own"
        for name in ("linear1", "linear2"):
            if reason := _obstacle(name, getattr(module, name), nn.Linear):
                return reason
        for name in cls.DROPS:
            if reason := _obstacle(name, getattr(module, name), *DROPOUTS):
                return reason
        for name in cls.NORMS[1:] if module.norm_first else cls.NORMS:  # pre-norm layers call the first
            if reason := _norm_obstacle(name, getattr(module, name)):
                return reason
        return _activation_obstacle("activation", module.activation)

    def _is_fused(self, x: Any) -> bool:
        drops = any(getattr(self, name).training for name in self.ATTENTIONS + self.DROPS)
        return drops and _takes(x) and not self.refusal(self)

    def _begin_feed_forward(self, x: Tensor) -> Tensor:
        """The second matrix product, without its bias."""
        layer: Any = self
        h = F.linear(x, layer.linear1.weight)
        activation = _activation(layer.activation)
        h = fused.bias_act_dropout(h, layer.linear1.bias, activation=activation, **_options(layer.dropout))
        return F.linear(h, layer.linear2.weight)


class FusedTransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    original = nn.TransformerEncoderLayer
    ATTENTIONS = ("self_attn",)
    DROPS = ("dropout", "dropout1", "dropout2")
    NORMS = ("norm1", "norm2")

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
            normed, x = _add_then_norm(h, bias, x, self.dropout1, self.norm2)
            return _add(self._begin_feed_forward(normed), self.linear2.bias, x, self.dropout2)
        x = _norm_of_sum(_attend(attention, x, None, *masks), bias, x, self.dropout1, self.norm1)
        return _norm_of_sum(self._begin_feed_forward(x), self.linear2.bias, x, self.dropout2, self.norm2)


class FusedTransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    original = nn.TransformerDecoderLayer
    ATTENTIONS = ("self_attn", "multihead_attn")
    DROPS = ("dropout", "dropout1", "dropout2", "dropout3")
    NORMS = ("norm1", "norm2", "norm3")

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
            and _takes(memory)
            and _fits(attention, x, x, *masks)
            and _fits(cross, x, memory, *memory_masks)
        ):
            return super().forward(tgt, memory, *given)
        bias, cross_bias = attention.out_proj.bias, cross.out_proj.bias
        if self.norm_first:
            h = _attend(attention, self.norm1(x), None, *masks)
            normed, x = _add_then_norm(h, bias, x, self.dropout1, self.norm2)
            normed, x = _add_then_norm(
                _attend(cross, normed, memory, *memory_masks), cross_bias, x, self.dropout2, self.norm3
            )
            return _add(self._begin_feed_forward(normed), self.linear2.bias, x, self.dropout3)
        x = _norm_of_sum(_attend(attention, x, None, *masks), bias, x, self.dropout1, self.norm1)
        x = _norm_of_sum(_attend(cross, x, memory, *memory_masks), cross_bias, x, self.dropout2, self.norm2)
        return _norm_of_sum(self._begin_feed_forward(x), self.linear2.bias, x, self.dropout3, self.norm3)


def _extents(attention: Any, x: Tensor) -> tuple[int, int]:
    """Batch and length of what attention is given."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if attention.batch_first else (x.shape[1], x.shape[0])


def _fits(
    attention: Any, x: Tensor, memory: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
) -> bool:
    """Whether shapes and masks are as torch's attention wants them; if not, it is torch's to say so."""
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
    padding = F._canonical_mask(padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", dtype)
    if padding is None and is_causal:
        return None, True
    mask = F._canonical_mask(mask, "attn_mask", None, "", dtype, False)
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


# ---- transformers ----


class _BertIntermediate(Fused):
    """Bias and activation in one pass."""

    @classmethod
    def refusal(cls, module: Any) -> str:
        return _obstacle("dense", module.dense, nn.Linear) or _activation_obstacle(
            "intermediate_act_fn", module.intermediate_act_fn
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        if not self.training or not _takes(hidden_states) or self.refusal(self):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        h = F.linear(hidden_states, layer.dense.weight)
        return fused.bias_act_dropout(h, layer.dense.bias, 0.0, _activation(layer.intermediate_act_fn))


class _BertOutput(Fused):
    """Bias, dropout, residual and norm in one pass: what follows attention, and what follows the intermediate layer."""

    @classmethod
    def refusal(cls, module: Any) -> str:
        return (
            _obstacle("dense", module.dense, nn.Linear)
            or _obstacle("dropout", module.dropout, *DROPOUTS)
            or _norm_obstacle("LayerNorm", module.LayerNorm)
        )

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        layer: Any = self
        if not layer.dropout.training or not _takes(hidden_states) or self.refusal(self):
            return super().forward(hidden_states, input_tensor)  # type: ignore[no-any-return]
        h = F.linear(hidden_states, layer.dense.weight)
        return _norm_of_sum(h, layer.dense.bias, input_tensor, layer.dropout, layer.LayerNorm)


class _GPT2MLP(Fused):
    """Bias and activation in one pass, bias and dropout in another."""

    @classmethod
    def refusal(cls, module: Any) -> str:
        return (
            _conv1d_obstacle("c_fc", module.c_fc)
            or _activation_obstacle("act", module.act)
            or _conv1d_obstacle("c_proj", module.c_proj)
            or _obstacle("dropout", module.dropout, *DROPOUTS)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        if not layer.dropout.training or not _takes(hidden_states) or self.refusal(self):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        h = _gpt2_projected(layer, hidden_states)
        return fused.bias_act_dropout(h, layer.c_proj.bias, activation=None, **_options(layer.dropout))


def _gpt2_projected(mlp: Any, x: Tensor) -> Tensor:
    """What goes into the dropout at the end, without its bias."""
    h = fused.bias_act_dropout(x @ mlp.c_fc.weight, mlp.c_fc.bias, 0.0, _activation(mlp.act))
    y: Tensor = h @ mlp.c_proj.weight
    return y


class _GPT2Block(Fused):
    """Attention's residual in one pass with the norm after it; the last bias, dropout and residual in another."""

    ARGUMENTS: ClassVar[tuple[str, ...]] = (
        "self",
        "hidden_states",
        "past_key_values",
        "attention_mask",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "use_cache",
        "kwargs",
    )

    @classmethod
    def refusal(cls, module: Any) -> str:
        if tuple(inspect.signature(_original(module).forward).parameters) != cls.ARGUMENTS:
            return "its forward is that of an unknown version of transformers"
        return cls._obstacle(module)

    @classmethod
    def _obstacle(cls, module: Any) -> str:
        theirs = _original(module.mlp)
        if FOREIGN.get((theirs.__module__, theirs.__qualname__)) is not _GPT2MLP:
            return f"mlp is a {type(module.mlp).__name__}, not transformers' GPT2MLP"
        return _norm_obstacle("ln_2", module.ln_2) or _call_obstacle("mlp", module.mlp) or _GPT2MLP.refusal(module.mlp)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        layer: Any = self
        drop, x = layer.mlp.dropout, hidden_states
        if encoder_hidden_states is not None or not drop.training or not _takes(x) or self._obstacle(self):
            return super().forward(  # type: ignore[no-any-return]
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                use_cache,
                **kwargs,
            )
        h = layer.attn(
            layer.ln_1(x),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )[0]
        h, x = _alike(h, x, True)
        norm = layer.ln_2
        normed, x = fused.dropout_add_layer_norm(h, x, norm.weight, norm.bias, 0.0, norm.eps)
        return _add(_gpt2_projected(layer.mlp, normed), layer.mlp.c_proj.bias, x, drop)


def _original(module: nn.Module) -> type[nn.Module]:
    """A module's class, but for `fuse`."""
    kind = type(module)
    return kind.original if issubclass(kind, Fused) else kind


# Of a package that need not be there, by module and name, as in `convert`; here what is put before their class.
FOREIGN: dict[tuple[str, str], type[Fused]] = {
    (BERT, "BertIntermediate"): _BertIntermediate,
    (BERT, "BertSelfOutput"): _BertOutput,
    (BERT, "BertOutput"): _BertOutput,
    (GPT2, "GPT2MLP"): _GPT2MLP,
    (GPT2, "GPT2Block"): _GPT2Block,
}
CLASSES: dict[type[nn.Module], type[Fused]] = {
    cls.original: cls for cls in (FusedSequential, FusedTransformerEncoderLayer, FusedTransformerDecoderLayer)
}


def _class_for(module: nn.Module) -> type[Fused] | None:
    """What a module of this very class may become."""
    theirs: Any = type(module)
    if (theirs.__module__, theirs.__qualname__) in FOREIGN:
        return _subclass(theirs)
    return CLASSES.get(theirs)


@functools.cache
def _subclass(theirs: Any) -> type[Fused]:
    before = FOREIGN[theirs.__module__, theirs.__qualname__]
    return type(f"Fused{theirs.__name__}", (before, theirs), {"original": theirs, "__module__": __name__})


def __getattr__(name: str) -> Any:
    """Classes of transformers' modules, where `pickle` looks for them."""
    for module, theirs in FOREIGN:
        if name == f"Fused{theirs}":
            return _subclass(getattr(importlib.import_module(module), theirs))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
