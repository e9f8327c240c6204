"""`nn.Sequential` and torch's transformer layers, with their dropout fused. `fuse` changes modules to these classes.

Each forward asks again which calls it may leave out, so that a hook that comes later or a module that is replaced is
not passed over. If it may not, and in evaluation, the original forward runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ...functional import fused
from ...functional.attention import scaled_dot_product_attention
from ...nn.base import is_traced, trace_call
from ...nn.structured import BatchwiseDropout
from ...runtime.dispatch.modules import DECODER_BLOCKS, ENCODER_BLOCKS, additive_mask, children_of
from . import rules
from .batchwise_runs import BatchwiseRun, find_batchwise_runs
from .rules import DROPOUTS, Fused

__all__ = ["FusedSequential", "FusedTransformerDecoderLayer", "FusedTransformerEncoderLayer", "Run", "find_runs"]


DROPPING = (*DROPOUTS, BatchwiseDropout)


def _methods(of: type[nn.Module], *names: str) -> dict[str, Any]:
    """The methods as they are at import, so that a later patch is seen, whatever its name."""
    return {name: getattr(of, name) for name in names}


# ---- nn.Sequential ----


class Run(NamedTuple):
    """A Linear, perhaps an activation, and a dropout, one after the other in a sequence."""

    start: int
    names: list[str]
    linear: nn.Linear
    activation: str | None
    drop: nn.Module

    def can_run(self, x: Any) -> bool:
        return rules.can_fuse_input(x)

    def __call__(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.linear.weight)
        return fused.bias_act_dropout(h, self.linear.bias, activation=self.activation, **rules.options_of(self.drop))


def find_run(sequence: nn.Sequential, last: int) -> Run | str:
    """The run that ends with the module at a position of a sequence, or why there is none."""
    names, modules = list(children_of(sequence)), list(children_of(sequence).values())
    drop: Any = modules[last]
    activation = rules.activation_name(modules[last - 1]) if last else None
    start = last - (1 if activation is None else 2)
    linear: Any = modules[start] if start >= 0 else None
    # A class named Linear that isn't torch's gets a reason of its own.
    if not isinstance(linear, nn.Linear) and type(linear).__name__ != "Linear":
        return "no Linear, or Linear and activation, right before it"
    reason = rules.linear_obstacle(names[start], linear) or rules.module_obstacle(names[last], drop, *DROPOUTS)
    if activation is not None:
        reason = reason or rules.call_obstacle(names[last - 1], modules[last - 1])
    return reason or Run(start, names[start : last + 1], linear, activation, drop)


def find_runs(sequence: nn.Sequential, positions: Iterable[int]) -> list[Run | BatchwiseRun | str]:
    """For modules at positions of a sequence, the run that drops there or why there is none. A batchwise run drops at
    several places."""
    batchwise = find_batchwise_runs(sequence)
    ends = [run.start + len(run.names) - 1 for run in batchwise.values() if isinstance(run, BatchwiseRun)]
    found: list[Run | BatchwiseRun | str] = []
    for i in positions:
        run = batchwise[i] if i in batchwise else find_run(sequence, i)
        if isinstance(run, Run) and run.start in ends:
            run = f"its Linear, {run.names[0]}, ends a run of batchwise dropout"
        found.append(run)
    return found


class FusedSequential(Fused, nn.Sequential):
    original = nn.Sequential
    METHODS = _methods(nn.Sequential, "forward", "__iter__")

    @rules.scripted_as(nn.Sequential.forward)
    def forward(self, input: Any) -> Any:
        modules: list[Any] = list(children_of(self).values())
        runs: dict[int, Run | BatchwiseRun] = {}
        drops = [i for i, module in enumerate(modules) if type(module) in DROPPING and module.training]
        if drops and not isinstance(input, fx.Proxy):
            runs = {run.start: run for run in find_runs(self, drops) if not isinstance(run, str)}
        i = 0
        while i < len(modules):
            if i in runs and runs[i].can_run(input):
                input, i = runs[i](input), i + len(runs[i].names)
            else:
                input, i = modules[i](input), i + 1
        return input


# ---- torch's transformer layers ----

Masks = tuple[Tensor | None, Tensor | None, bool]  # the attention mask, the padding mask, whether it is causal
Input = tuple[Tensor | None, Masks]  # what one attention attends to, None for the layer's own input, and its masks


class _Layer(Fused):
    """What the layers of an encoder and of a decoder share; subclasses give the names of their modules."""

    ATTENTIONS: ClassVar[tuple[str, ...]]
    DROPS: ClassVar[tuple[str, ...]]
    NORMS: ClassVar[tuple[str, ...]]

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if reason := rules.replaced_method(module, cls):
            return reason
        for name in cls.ATTENTIONS:
            attention = getattr(module, name)
            if reason := rules.module_obstacle(name, attention, nn.MultiheadAttention):
                return reason
            if attention.bias_k is not None or attention.add_zero_attn or attention.in_proj_weight is None:
                return f"{name} has keys and values of its own"
        for names, classes in ((("linear1", "linear2"), (nn.Linear,)), (cls.DROPS, DROPOUTS)):
            for name in names:
                if reason := rules.module_obstacle(name, getattr(module, name), *classes):
                    return reason
        for name in cls.NORMS[1:] if module.norm_first else cls.NORMS:  # pre-norm layers still call the first norm
            if reason := rules.norm_obstacle(name, getattr(module, name)):
                return reason
        return rules.activation_obstacle("activation", module.activation)

    def _is_fused(self, x: Any, *inputs: Input) -> bool:
        drops = any(getattr(self, name).training for name in self.ATTENTIONS + self.DROPS)
        return (
            drops
            and rules.can_fuse_input(x)
            and not self.obstacle(self)
            and all(memory is None or rules.can_fuse_input(memory) for memory, _ in inputs)
            and all(_fits(attention, x, given) for attention, given in zip(self._attentions(), inputs, strict=True))
        )

    def _attentions(self) -> list[Any]:
        return [getattr(self, name) for name in self.ATTENTIONS]

    def _run(self, x: Tensor, *inputs: Input) -> Tensor:
        """The layer. ``inputs`` are what each attention takes besides x."""
        layer: Any = self
        _, *drops = (getattr(self, name) for name in self.DROPS)
        norms = [getattr(self, name) for name in self.NORMS]
        parts = list(zip(self._attentions(), inputs, drops, norms[layer.norm_first :], strict=False))
        if layer.norm_first:
            normed = norms[0](x)
            for attention, given, drop, norm in parts:
                h = _attend_unbiased(attention, normed, given)
                normed, x = rules.add_then_norm(h, attention.out_proj.bias, x, drop, norm)
            return rules.add(self._begin_feed_forward(normed), layer.linear2.bias, x, drops[-1])
        for attention, given, drop, norm in parts:
            x = rules.norm_of_sum(_attend_unbiased(attention, x, given), attention.out_proj.bias, x, drop, norm)
        return rules.norm_of_sum(self._begin_feed_forward(x), layer.linear2.bias, x, drops[-1], norms[-1])

    def _begin_feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward part up to the second matrix product, without its bias: the pass that follows adds that."""
        layer: Any = self
        h = F.linear(x, layer.linear1.weight)
        activation = rules.activation_name(layer.activation)
        h = fused.bias_act_dropout(h, layer.linear1.bias, activation=activation, **rules.options_of(layer.dropout))
        return F.linear(h, layer.linear2.weight)


class FusedTransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    original = nn.TransformerEncoderLayer
    METHODS = _methods(nn.TransformerEncoderLayer, "forward", *ENCODER_BLOCKS)
    ATTENTIONS = ("self_attn",)
    DROPS = ("dropout", "dropout1", "dropout2")
    NORMS = ("norm1", "norm2")

    def _is_fused(self, x: Any, *inputs: Input) -> bool:
        # torch's forward may leave out the modules inside in evaluation
        return self.training and super()._is_fused(x, *inputs)

    @rules.scripted_as(nn.TransformerEncoderLayer.forward)
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        given = src_mask, src_key_padding_mask, is_causal
        if is_traced(self, src):
            return trace_call(self, src, *given)  # type: ignore[no-any-return]
        if not self._is_fused(src, (None, given)):
            return super().forward(src, *given)
        return self._run(src, (None, given))


class FusedTransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    original = nn.TransformerDecoderLayer
    METHODS = _methods(nn.TransformerDecoderLayer, "forward", *DECODER_BLOCKS)
    ATTENTIONS = ("self_attn", "multihead_attn")
    DROPS = ("dropout", "dropout1", "dropout2", "dropout3")
    NORMS = ("norm1", "norm2", "norm3")

    @rules.scripted_as(nn.TransformerDecoderLayer.forward)
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
        given = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal
        if is_traced(self, tgt):
            return trace_call(self, tgt, memory, *given)  # type: ignore[no-any-return]
        inputs = (None, given[::2]), (memory, given[1::2])
        if memory is None or not self._is_fused(tgt, *inputs):  # without memory torch's forward raises
            return super().forward(tgt, memory, *given)
        return self._run(tgt, *inputs)


def _extents(attention: Any, x: Tensor) -> tuple[int, int]:
    """Batch size and length of an input of attention."""
    if x.dim() == 2:
        return 1, x.shape[0]
    return (x.shape[0], x.shape[1]) if attention.batch_first else (x.shape[1], x.shape[0])


def _fits(attention: Any, x: Tensor, given: Input) -> bool:
    """Whether shapes and masks are as torch's attention wants them. If not, torch's forward runs and raises."""
    memory, (mask, padding, is_causal) = given
    memory = x if memory is None else memory
    if x.shape[-1] != attention.embed_dim or memory.shape[-1] != attention.embed_dim:
        return False
    if x.dim() not in (2, 3) or memory.dim() != x.dim() or (is_causal and mask is None):
        return False
    batch, queries = _extents(attention, x)
    others, keys = _extents(attention, memory)
    if not all(part is None or part.dtype == torch.bool or part.is_floating_point() for part in (mask, padding)):
        return False
    if padding is not None and padding.shape != ((keys,) if x.dim() == 2 else (batch, keys)):
        return False
    shapes = (queries, keys), (batch * attention.num_heads, queries, keys)
    return others == batch and (mask is None or mask.shape in shapes)


def _merge_masks(heads: int, batch: int, masks: Masks, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
    """Both masks as one that is added, and whether attention is causal, which torch takes without padding only."""
    mask, padding, is_causal = masks
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


def _attend_unbiased(attention: Any, x: Tensor, given: Input) -> Tensor:
    """What `torch.nn.MultiheadAttention` returns, without the bias of its output projection."""
    memory, masks = given
    heads, width, batched = attention.num_heads, attention.embed_dim, x.dim() == 3
    batch, _ = _extents(attention, x)
    mask, is_causal = _merge_masks(heads, batch, masks, x.dtype)
    if not batched:
        x, memory = x.unsqueeze(0), None if memory is None else memory.unsqueeze(0)
    batch_first = attention.batch_first or not batched
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    # unbind, because its gradient is one stack; indexing would fill zeros for each part and add them up.
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
