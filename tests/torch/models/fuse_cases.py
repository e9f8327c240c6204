"""How the tests of `fuse` compare a fused model with the plain one, and blocks of transformers' models."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
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


# ---- blocks of transformers ----


def bert(implementation="sdpa"):
    """A layer of BERT, with another rate at each kind of place."""
    from transformers.models.bert.modeling_bert import BertConfig, BertLayer

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": HIDDEN}
    rates = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}
    return BertLayer(BertConfig(**sizes, **rates, attn_implementation=implementation))


def gpt2(implementation="sdpa", **options):
    """A block of GPT-2, with another rate at each kind of place."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Config

    sizes = {"n_embd": WIDTH, "n_head": HEADS, "n_inner": HIDDEN}
    rates = {"resid_pdrop": 0.4, "attn_pdrop": 0.2}
    block = GPT2Block(GPT2Config(**sizes, **rates, attn_implementation=implementation, **options), layer_idx=0)
    block.mlp.dropout.p = 0.3
    return block
