"""The layers of BERT and GPT-2 of transformers, with their dropout fused. `fuse` finds them by `fused_class`.

The original forward of an attention still runs, because it handles caches. It runs on a `View` of the module whose
configuration names one of the functions `eager` and `sdpa` below, which transformers' interface for attention functions
then calls. The view also replaces the projection and the dropout at the end, which are one pass here or are left to the
block.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ...functional import fused
from ...functional.attention import scaled_dot_product_attention
from ..report import class_name
from . import rules
from .rules import DROPOUTS, Fused

__all__ = ["fused_class"]

BERT, GPT2 = "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2"
CONV1D = ("transformers.pytorch_utils", "Conv1D")


# ---- attention ----


class View:
    """An object with some of its attributes replaced."""

    def __init__(self, of: Any, **others: Any) -> None:
        self._of = of
        for name, value in others.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def eager(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with softmax and dropout in one pass. The weights are returned too, because models return them.

    The weights have the dtype of the scores. BERT's own are float32 under CUDA's autocast, because softmax is there.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = fused.softmax_dropout(query @ key.transpose(-2, -1), dropout, scale, attention_mask)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in one call. As in transformers, it is causal if there is no mask and more than one query."""
    if any(kwargs.get(name) is not None for name in SDPA_OPTIONS):
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        function = _interface().ALL_ATTENTION_FUNCTIONS.get("sdpa")
        return function(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    if causal and key.shape[2] > query.shape[2]:  # a cache of fixed length: no query sees its empty end
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    y = scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scaling)
    return y.transpose(1, 2).contiguous(), None


SDPA_OPTIONS = ("position_bias", "cache", "softcap")  # that fastdrop's attention lacks
# By the name of the function that each replaces: its own name and the function.
FUNCTIONS = {"eager": ("fastdrop_eager", eager), "sdpa": ("fastdrop_sdpa", sdpa)}
# The modules in which transformers' functions are; None is the model's own.
ORIGINAL_MODULES = (None, "transformers.integrations.sdpa_attention")


class _Attention(Fused):
    """Attention with softmax and dropout in one pass; if the model uses "sdpa", all of attention in one call."""

    DROP: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original" in vars(cls):
            for name, function in FUNCTIONS.values():
                _interface().AttentionInterface.register(name, function)

    @classmethod
    def obstacle(cls, module: Any) -> str:
        name = module.config._attn_implementation
        if name not in FUNCTIONS:
            return f"its attention is {name!r}, neither 'sdpa' nor 'eager'"
        if getattr(module, "reorder_and_upcast_attn", False):
            return "its attention is reordered and upcast"
        function = _interface().ALL_ATTENTION_FUNCTIONS.get(name)
        is_original = getattr(function, "__module__", None) in ORIGINAL_MODULES
        return "" if is_original else f"its {name!r} attention was replaced"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _run_attention(self, {}, hidden_states, *args, **kwargs)


def _interface() -> Any:
    return sys.modules["transformers.modeling_utils"]


def _run_attention(attention: Any, parts: dict[str, Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the original forward of an attention with some parts of the module replaced."""
    drops = attention.training and isinstance(attention, _Attention) and getattr(attention, attention.DROP).p > 0.0
    if drops and rules.can_fuse_input(x) and not _Attention.obstacle(attention):
        name, _ = FUNCTIONS[attention.config._attn_implementation]
        parts = {"config": View(attention.config, _attn_implementation=name), **parts}
    return rules.original_class(attention).forward(View(attention, **parts) if parts else attention, x, *args, **kwargs)


class _BertSelfAttention(_Attention):
    ARGUMENTS = "self hidden_states attention_mask past_key_values kwargs"
    DROP = "dropout"


class _BertCrossAttention(_Attention):
    ARGUMENTS = "self hidden_states encoder_hidden_states attention_mask past_key_values kwargs"
    DROP = "dropout"


class _GPT2Attention(_Attention):
    ARGUMENTS = (
        "self hidden_states past_key_values attention_mask encoder_hidden_states encoder_attention_mask "
        "output_attentions kwargs"
    )
    DROP = "attn_dropout"

    @classmethod
    def obstacle(cls, module: Any) -> str:
        return cls.end_obstacle(module) or super().obstacle(module)

    @staticmethod
    def end_obstacle(module: Any) -> str:
        """Why the projection and the dropout at the end can't be left out."""
        return _conv1d_obstacle("c_proj", module.c_proj) or rules.module_obstacle(
            "resid_dropout", module.resid_dropout, *DROPOUTS
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention: Any = self
        drop, parts = attention.resid_dropout, {}
        if drop.training and rules.can_fuse_input(hidden_states) and not self.end_obstacle(self):
            parts = _without_end(
                attention,
                lambda h: fused.bias_act_dropout(h, attention.c_proj.bias, activation=None, **rules.options_of(drop)),
            )
        return _run_attention(self, parts, hidden_states, *args, **kwargs)


def _without_end(attention: Any, end: Any) -> dict[str, Any]:
    """The parts that make an attention call `end` in place of its last bias and dropout."""
    return {"c_proj": lambda h: h @ attention.c_proj.weight, "resid_dropout": end}


# ---- blocks ----


def _can_fuse(block: Fused, drop: Any, x: Any) -> bool:
    return drop.training and rules.can_fuse_input(x) and not block.obstacle(block)


class _BertIntermediate(Fused):
    """Bias and activation in one pass."""

    @classmethod
    def obstacle(cls, module: Any) -> str:
        return rules.module_obstacle("dense", module.dense, nn.Linear) or rules.activation_obstacle(
            "intermediate_act_fn", module.intermediate_act_fn
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        if not _can_fuse(self, layer, hidden_states):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        h = F.linear(hidden_states, layer.dense.weight)
        return fused.bias_act_dropout(h, layer.dense.bias, 0.0, rules.activation_name(layer.intermediate_act_fn))


class _BertOutput(Fused):
    """Bias, dropout, residual and norm in one pass: after attention, and after the intermediate layer."""

    @classmethod
    def obstacle(cls, module: Any) -> str:
        return (
            rules.module_obstacle("dense", module.dense, nn.Linear)
            or rules.module_obstacle("dropout", module.dropout, *DROPOUTS)
            or rules.norm_obstacle("LayerNorm", module.LayerNorm)
        )

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        layer: Any = self
        if not _can_fuse(self, layer.dropout, hidden_states) or input_tensor.shape != (
            *hidden_states.shape[:-1],
            layer.dense.out_features,
        ):
            return super().forward(hidden_states, input_tensor)  # type: ignore[no-any-return]
        h = F.linear(hidden_states, layer.dense.weight)
        return rules.norm_of_sum(h, layer.dense.bias, input_tensor, layer.dropout, layer.LayerNorm)


class _GPT2MLP(Fused):
    """Bias and activation in one pass, bias and dropout in another."""

    @classmethod
    def obstacle(cls, module: Any) -> str:
        return (
            _conv1d_obstacle("c_fc", module.c_fc)
            or rules.activation_obstacle("act", module.act)
            or _conv1d_obstacle("c_proj", module.c_proj)
            or rules.module_obstacle("dropout", module.dropout, *DROPOUTS)
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        layer: Any = self
        if not _can_fuse(self, layer.dropout, hidden_states):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        h = _gpt2_projected(layer, hidden_states)
        return fused.bias_act_dropout(h, layer.c_proj.bias, activation=None, **rules.options_of(layer.dropout))


def _gpt2_projected(mlp: Any, x: Tensor) -> Tensor:
    """The result of both projections, without the second bias: the dropout at the end adds that."""
    h = fused.bias_act_dropout(x @ mlp.c_fc.weight, mlp.c_fc.bias, 0.0, rules.activation_name(mlp.act))
    y: Tensor = h @ mlp.c_proj.weight
    return y


def _conv1d_obstacle(name: str, module: Any) -> str:
    if (type(module).__module__, type(module).__name__) != CONV1D:
        return f"{name} is a {class_name(type(module), CONV1D[1])}, not transformers' Conv1D"
    return rules.call_obstacle(name, module)


class _GPT2Block(Fused):
    """The end of attention in one pass with the residual and the norm after it; the end of the block in another."""

    ARGUMENTS = (
        "self hidden_states past_key_values attention_mask encoder_hidden_states encoder_attention_mask use_cache "
        "kwargs"
    )
    PARTS: ClassVar[tuple[tuple[str, type[Fused]], ...]] = (("attn", _GPT2Attention), ("mlp", _GPT2MLP))

    @classmethod
    def obstacle(cls, module: Any) -> str:
        if reason := cls._part_obstacle(module):
            return reason
        for name, known in cls.PARTS:
            if reason := rules.changed_code(getattr(module, name), known):
                return f"{name}: {reason}"
        return cls._obstacle(module)

    @classmethod
    def _part_obstacle(cls, module: Any) -> str:
        for name, known in cls.PARTS:
            part = getattr(module, name)
            if fused_class(rules.original_class(part)) is not known:
                theirs = known.__name__[1:]
                return f"{name} is a {class_name(type(part), theirs)}, not transformers' {theirs}"
        return ""

    @classmethod
    def _obstacle(cls, module: Any) -> str:
        return (
            cls._part_obstacle(module)
            or rules.call_obstacle("attn", module.attn)
            or _GPT2Attention.end_obstacle(module.attn)
            or rules.norm_obstacle("ln_2", module.ln_2)
            or rules.call_obstacle("mlp", module.mlp)
            or _GPT2MLP.obstacle(module.mlp)
        )

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
        attention, x = layer.attn, hidden_states
        options = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        options |= kwargs
        if (
            encoder_hidden_states is not None
            or not rules.can_fuse_input(x)
            or self._obstacle(self)
            or not (attention.resid_dropout.training or layer.mlp.dropout.training)
        ):
            options |= {"encoder_hidden_states": encoder_hidden_states}
            options |= {"encoder_attention_mask": encoder_attention_mask}
            return super().forward(x, **options)  # type: ignore[no-any-return]
        parts = _without_end(attention, lambda h: h)
        h = _run_attention(attention, parts, layer.ln_1(x), **options)[0]
        normed, x = rules.add_then_norm(h, attention.c_proj.bias, x, attention.resid_dropout, layer.ln_2)
        return rules.add(_gpt2_projected(layer.mlp, normed), layer.mlp.c_proj.bias, x, layer.mlp.dropout)


# By module and name, because transformers need not be installed.
FUSED_CLASSES: dict[tuple[str, str], type[Fused]] = {
    (BERT, "BertSelfAttention"): _BertSelfAttention,
    (BERT, "BertCrossAttention"): _BertCrossAttention,
    (BERT, "BertIntermediate"): _BertIntermediate,
    (BERT, "BertSelfOutput"): _BertOutput,
    (BERT, "BertOutput"): _BertOutput,
    (GPT2, "GPT2Attention"): _GPT2Attention,
    (GPT2, "GPT2MLP"): _GPT2MLP,
    (GPT2, "GPT2Block"): _GPT2Block,
}


def fused_class(original: type[nn.Module]) -> type[Fused] | None:
    """The fused class for a class of transformers; None if there is none."""
    return FUSED_CLASSES.get((original.__module__, original.__qualname__))
