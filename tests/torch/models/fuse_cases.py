"""What `fuse` calls, and stand-ins of the names and attributes of transformers' blocks, which need not be installed."""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import lookup_backend

import fastdrop.torch as fdt
from fastdrop.torch.functional import fused
from fastdrop.torch.models.fuse import transformers_layers
from fastdrop.torch.models.fuse.fuse import fuse

from ..cases import under

WIDTH, HEADS, HIDDEN = 16, 4, 24
BATCH, LENGTH, MEMORY = 2, 5, 7
ENCODER, DECODER = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


@contextlib.contextmanager
def fused_calls() -> Iterator[Counter]:
    """How often each fused function is called."""
    calls: Counter = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    places = [(fused, name) for name in ("bias_act_dropout", "bias_dropout_add", "dropout_add", "softmax_dropout")]
    places += [(fused, "dropout_add_layer_norm"), (transformers_layers, "scaled_dot_product_attention")]
    places += [(sys.modules["fastdrop.torch.models.fuse.torch_layers"], "scaled_dot_product_attention")]
    with contextlib.ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, counted(name, getattr(place, name))))
        yield calls


class Backend:
    """aot_eager, which remembers how many fused ops it was given last."""

    def __call__(self, graph, inputs):
        targets = [str(node.target) for node in graph.graph.nodes]
        names = ("pointwise", "norm", "attention")
        self.ops = tuple(sum(target.startswith(f"fastdrop.{name}") for target in targets) for name in names)
        return lookup_backend("aot_eager")(graph, inputs)


# How often the layers of a model call each fused function.
BERT_CALLS = {"bias_act_dropout": 1, "dropout_add_layer_norm": 2, "scaled_dot_product_attention": 1}
GPT2_CALLS = {
    "bias_act_dropout": 1,
    "bias_dropout_add": 1,
    "dropout_add_layer_norm": 1,
    "scaled_dot_product_attention": 1,
}


def step(model, *inputs, **options):
    """Output and gradients of the inputs and of all parameters, under one seed."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    model.zero_grad()
    y = under(3, model, *inputs, **options)
    y.sin().sum().backward()
    return y.detach(), *(x.grad for x in inputs), *(parameter.grad for parameter in model.parameters())


def pair(make):
    """A fused model, and one with the same parameters that is only converted."""
    model, plain = make(), make()
    plain.load_state_dict(model.state_dict())
    fdt.convert(plain)
    assert fuse(model).changed
    return model, plain


def shaken(model):
    """Biases are not 0, nor are weights of norms 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=parameter.dtype), alpha=0.1)
    return model


def assert_same(model, plain, *inputs, **options):
    """Outputs, gradients and the generator's state after them. Returns what fused functions were called, how often."""
    with fused_calls() as calls:
        actual = step(model, *inputs, **options)
    after = torch.get_rng_state()
    with fdt.enabled():
        expected = step(plain, *inputs, **options)
    assert torch.equal(torch.get_rng_state(), after)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(under(4, model, *inputs, **options), actual[0], strict=True):
        assert not torch.equal(a, e)  # something is dropped
    return calls


NO_SOURCE = "its forward can't be read, it has no source; fdt.enable() reaches it if it calls torch's dropout"
IN_ATTEND = "a function, called in attend; "


def left_reasons(report, *read):
    """Of what was left: (path, reason), but for functions that drop, which the source names and which must be these."""
    rows = [(row.path, row.reason) for row in report.left]
    named = [row for row in rows if row[1].startswith(("a function, called in ", "its forward can't be read, "))]
    assert named == list(read)
    return [row for row in rows if row not in named]


def assert_left(model, *expected, read=()):
    """Nothing is changed, and the report says why: (path, reason)."""
    before = [type(module) for module in model.modules()]
    report = fuse(model)
    assert not report.changed
    assert left_reasons(report, *read) == list(expected)
    assert [type(module) for module in model.modules()] == before


class Named(nn.Linear):
    """A subclass, whose forward may be its own."""


# ---- stand-ins ----

BERT, GPT2 = "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2"


class AttentionInterface(dict):
    functions: ClassVar[dict] = {}

    @classmethod
    def register(cls, name, function):
        cls.functions[name] = function

    def get(self, name, default=None):
        return self.functions.get(name, default)


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 8), nn.Parameter(torch.randn(nf) / 8)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class GELUActivation(nn.Module):
    def forward(self, x):
        return F.gelu(x)


class NewGELUActivation(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


def sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    causal = module.is_causal and attention_mask is None
    y = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, causal, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


def eager(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    scores = query @ key.mT * scaling
    weights = F.dropout(F.softmax(scores if attention_mask is None else scores + attention_mask, -1), dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attend(module, x, parts, mask, p, options):
    """As theirs: by name."""
    query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
    function = ALL_ATTENTION_FUNCTIONS.get(module.config._attn_implementation, eager)
    p = p if module.training else 0.0
    y, weights = function(module, query, key, value, mask, dropout=p, scaling=module.scaling, **options)
    return y.reshape(x.shape), weights


class BertSelfAttention(nn.Module):
    scaling, is_causal = 0.6, False

    def __init__(self, implementation):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation=implementation)
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.2)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        parts = [part(hidden_states) for part in (self.query, self.key, self.value)]
        return attend(self, hidden_states, parts, attention_mask, self.dropout.p, kwargs)


class BertIntermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.intermediate_act_fn = nn.Linear(WIDTH, HIDDEN), GELUActivation()

    def forward(self, hidden_states):
        return self.intermediate_act_fn(self.dense(hidden_states))


class _Output(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(width, WIDTH), nn.LayerNorm(WIDTH, 1e-12), nn.Dropout(0.3)


class BertSelfOutput(_Output):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertOutput(_Output):
    def forward(self, hidden_states, input_tensor):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class BertLayer(nn.Module):
    """Calls blocks as theirs does."""

    def __init__(self, implementation="sdpa"):
        super().__init__()
        self.attention, self.attention_output = BertSelfAttention(implementation), BertSelfOutput(WIDTH)
        self.intermediate, self.output = BertIntermediate(), BertOutput(HIDDEN)

    def forward(self, x):
        x = self.attention_output(self.attention(x, None, encoder_hidden_states=None)[0], x)
        return self.output(self.intermediate(x), x)


class GPT2Attention(nn.Module):
    scaling, is_causal = 0.6, True

    def __init__(self, implementation):
        super().__init__()
        self.config = types.SimpleNamespace(_attn_implementation=implementation)
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.2), nn.Dropout(0.4)

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        output_attentions=False,
        **kwargs,
    ):
        assert (past_key_values, kwargs) == (None, {"use_cache": True, "position_ids": 1})
        parts = self.c_attn(hidden_states).split(WIDTH, 2)
        y, weights = attend(self, hidden_states, parts, attention_mask, self.attn_dropout.p, kwargs)
        return self.resid_dropout(self.c_proj(y)), weights


class GPT2MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(HIDDEN, WIDTH), Conv1D(WIDTH, HIDDEN)
        self.act, self.dropout = NewGELUActivation(), nn.Dropout(0.3)

    def forward(self, hidden_states):
        return self.dropout(self.c_proj(self.act(self.c_fc(hidden_states))))


class GPT2Block(nn.Module):
    def __init__(self, implementation):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, 0.01)
        self.attn, self.mlp = GPT2Attention(implementation), GPT2MLP()

    def forward(
        self,
        hidden_states,
        past_key_values=None,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=False,
        **kwargs,
    ):
        options = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        x = self.attn(self.ln_1(hidden_states), **options, **kwargs)[0] + hidden_states
        if encoder_hidden_states is not None:
            x = x + encoder_hidden_states
        return x + self.mlp(self.ln_2(x))


class GPT2Model(nn.Module):
    """Calls blocks as theirs does."""

    def __init__(self, implementation="sdpa", masked=True, **options):
        super().__init__()
        self.h, self.masked, self.options = GPT2Block(implementation), masked, options

    def forward(self, x):
        causal = torch.full((x.shape[1], x.shape[1]), -9.0, dtype=x.dtype).triu(1) if self.masked else None
        return self.h(x, None, causal, use_cache=True, position_ids=1, **self.options)


ALL_ATTENTION_FUNCTIONS = AttentionInterface()
PLACES = {
    "transformers.pytorch_utils": (Conv1D,),
    "transformers.activations": (GELUActivation, NewGELUActivation),
    BERT: (BertSelfAttention, BertIntermediate, BertOutput, BertSelfOutput),
    GPT2: (GPT2Attention, GPT2MLP, GPT2Block),
}


def place(monkeypatch):
    """Puts the stand-ins where the package would have its own."""
    interface = "transformers.modeling_utils"
    for name in (*PLACES, interface):
        parts = name.split(".")
        for i in range(len(parts)):
            package = ".".join(parts[: i + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules[interface].AttentionInterface = AttentionInterface
    sys.modules[interface].ALL_ATTENTION_FUNCTIONS = ALL_ATTENTION_FUNCTIONS
    AttentionInterface.register("sdpa", sdpa)
    monkeypatch.setattr(sdpa, "__module__", "transformers.integrations.sdpa_attention")
    for name, classes in PLACES.items():
        for cls in classes:
            monkeypatch.setattr(cls, "__module__", name)
            monkeypatch.setattr(cls.forward, "__module__", name)
            setattr(sys.modules[name], cls.__name__, cls)
