"""`fuse` of BERT and GPT-2: single blocks, and whole models."""

from __future__ import annotations

import copy
import operator
import pickle
from functools import partial

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse import transformers_layers
from fastdrop.torch.models.fuse.fuse import fuse, unfuse

from ..cases import assert_equal, under
from .fuse_cases import (
    BATCH,
    BERT_CALLS,
    GPT2_CALLS,
    HIDDEN,
    LENGTH,
    NO_SOURCE,
    WIDTH,
    Named,
    assert_same,
    bert,
    fused_calls,
    gpt2,
    left_reasons,
    pair,
    shaken,
    step,
)

BERT_PARTS = {
    "attention.self": "BertSelfAttention",
    "attention.output": "BertSelfOutput",
    "intermediate": "BertIntermediate",
    "output": "BertOutput",
}
GPT2_PARTS = {"": "GPT2Block", "attn": "GPT2Attention", "mlp": "GPT2MLP"}
CAUSAL = {"attention_mask": torch.full((LENGTH, LENGTH), -9.0, dtype=torch.float64).triu(1)}
STATES = {"encoder_hidden_states": torch.ones(BATCH, LENGTH, WIDTH, dtype=torch.float64)}
CROSS_PARTS = GPT2_PARTS | {"crossattention": "GPT2Attention"}
BLOCKS = {  # how to make it, what is called with, its parts, and the fused functions that it calls
    "BERT": (bert, {}, BERT_PARTS, BERT_CALLS),
    "BERT, eager": (
        partial(bert, "eager"),
        {},
        BERT_PARTS,
        {"softmax_dropout": 1, "bias_act_dropout": 1, "dropout_add_layer_norm": 2},
    ),
    "GPT-2": (gpt2, CAUSAL, GPT2_PARTS, GPT2_CALLS),
    "GPT-2, eager": (
        partial(gpt2, "eager"),
        CAUSAL,
        GPT2_PARTS,
        {"bias_act_dropout": 1, "bias_dropout_add": 1, "dropout_add_layer_norm": 1, "softmax_dropout": 1},
    ),
    "GPT-2 without a mask": (gpt2, {}, GPT2_PARTS, GPT2_CALLS),
    "GPT-2 beside an encoder": (
        partial(gpt2, add_cross_attention=True),
        STATES,
        CROSS_PARTS,
        {"scaled_dot_product_attention": 2, "bias_act_dropout": 4},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformers_blocks(name):
    make, options, classes, calls = BLOCKS[name]
    model, plain = shaken(make()).double(), make().double()
    before = [type(module) for module in model.modules()]
    plain.load_state_dict(model.state_dict())
    fdt.convert(plain)
    report = fuse(model)
    assert {row.path: row.before for row in report} == classes
    assert {row.path: row.after for row in report} == {path: f"Fused{cls}" for path, cls in classes.items()}
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    assert assert_same(model, plain, x, **options) == calls
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert_equal(step(twin, x, **options), step(model, x, **options))
    model.eval(), plain.eval()
    assert_equal(step(model, x, **options), step(plain, x, **options))
    assert len(unfuse(model)) == len(classes)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["attn", "attn.resid_dropout"])
def test_hooks_inside_a_transformers_block_are_called(name):
    """With what the original module returns, as by those of ``output_attentions``."""
    model, plain = pair(lambda: gpt2().double())
    fdt.convert(model)
    seen = []
    for block in (model, plain):
        block.get_submodule(name).register_forward_hook(lambda module, given, result: seen.append(result))
    calls = assert_same(model, plain, torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64))
    assert "dropout_add_layer_norm" not in calls
    torch.testing.assert_close(seen[0], seen[1])


TANH = "act is Tanh, not a known one"
LEFT = {  # the reasons, by path, and what is changed
    "flash attention and tanh": (
        {"": TANH, "attn": "its attention is 'flash_attention_2', neither 'sdpa' nor 'eager'", "mlp": TANH},
        partial(gpt2, "flash_attention_2"),
        {"mlp.act": nn.Tanh()},
    ),
    "another projection": (
        dict.fromkeys(("", "mlp"), "c_fc is a Linear, not transformers' Conv1D"),
        gpt2,
        {"mlp.c_fc": nn.Linear(WIDTH, HIDDEN)},
    ),
    "upcast": ({"attn": "its attention is reordered and upcast"}, gpt2, {"attn.reorder_and_upcast_attn": True}),
    "subclass": ({"output": "dense is a Named, not nn.Linear"}, bert, {"output.dense": Named(HIDDEN, WIDTH)}),
}


@pytest.mark.parametrize("name", LEFT)
def test_transformers_blocks_that_are_left(name):
    expected, make, changes = LEFT[name]
    model = make()
    for path, value in changes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(operator.attrgetter(owner)(model), attribute, value)
    left = [(row.path, row.reason) for row in fuse(model).left if "a function, called in" not in row.reason]
    assert dict(left) == expected


def test_transformers_blocks_with_another_forward_are_left(monkeypatch):
    monkeypatch.setattr(BertOutput, "forward", lambda self, hidden_states, input_tensor: hidden_states)
    reasons = left_reasons(fuse(bert()), ("output", NO_SOURCE))
    assert reasons == [("output", "its forward is not BertOutput's")]

    def forward(self, hidden_states, layer_past=None):
        return hidden_states

    for name in ("__module__", "__qualname__"):
        setattr(forward, name, getattr(GPT2Block.forward, name))
    monkeypatch.setattr(GPT2Block, "forward", forward)
    report = fuse(gpt2())
    assert [row.path for row in report.changed] == ["attn", "mlp"]
    assert report.left[0].reason == "its forward is that of an unknown version of transformers"


class Replacement(nn.Module):
    """Around a module, with what it returns."""

    def __init__(self, inner, calls):
        super().__init__()
        self.inner, self.calls = inner, calls

    def forward(self, *args, **kwargs):
        self.calls.append(1)
        return self.inner(*args, **kwargs)


class Proxying(Replacement):
    """Has the attributes of what it is around too."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize(("name", "kind"), [("attn", Proxying), ("mlp", Replacement)])
def test_modules_put_into_a_transformers_block_since_are_called(name, kind):
    model, plain = pair(lambda: gpt2().double())
    fdt.convert(model)
    calls = []
    for block in (model, plain):
        setattr(block, name, kind(getattr(block, name), calls))
    fused = assert_same(model, plain, torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64))
    assert "dropout_add_layer_norm" not in fused
    assert len(calls) == 3
    reason = f"{name} is a {kind.__name__}, not transformers' {'GPT2Attention' if name == 'attn' else 'GPT2MLP'}"
    assert ("", reason) in [(row.path, row.reason) for row in fuse(model).left]


def test_transformers_attention_that_was_replaced(monkeypatch):
    """Before or since; a fused block gives it all its options."""
    theirs, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def mine(*args, **kwargs):
        seen.append(kwargs)
        return theirs(*args, **kwargs)

    fuse(model := gpt2())
    x = torch.randn(BATCH, LENGTH, WIDTH)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "fastdrop_sdpa", mine)
    model(x, position_ids=1)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", mine)
    with fused_calls() as calls:
        model(x, position_ids=2)
    assert [options["position_ids"] for options in seen] == [1, 2]
    assert "scaled_dot_product_attention" not in calls
    assert ("attn", "its 'sdpa' attention was replaced") in [(row.path, row.reason) for row in fuse(gpt2()).left]


def test_transformers_attention_sees_no_keys_beyond_causal_queries():
    """As theirs, which crops them first: the mask is of what is left."""
    attention = gpt2().attn
    q, k, v = (torch.randn(2, 3, length, 8) for length in (5, 7, 7))
    actual, _ = under(3, transformers_layers.sdpa, attention, q, k, v, None, 0.4)
    cropped = k[:, :, :5].contiguous(), v[:, :, :5].contiguous()
    expected, _ = under(3, transformers_layers.sdpa, attention, q, *cropped, None, 0.4)
    assert_equal(actual, expected)
    actual, _ = under(3, transformers_layers.sdpa, attention, q, k, v, torch.zeros(5, 7), 0.4)
    assert not torch.equal(actual, expected)


def test_transformers_attention_with_options_of_its_own_is_transformers(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", lambda module, *args, **kwargs: (args, kwargs))
    attention, tensors = gpt2().attn, [torch.randn(2, 3, 5, 8) for _ in range(3)]
    for name in ("position_bias", "cache", "softcap"):
        args, kwargs = transformers_layers.sdpa(attention, *tensors, None, 0.4, 0.5, **{name: 2.0})
        assert all(a is b for a, b in zip(args, (*tensors, None), strict=True))
        assert kwargs == {"dropout": 0.4, "scaling": 0.5, "is_causal": None, name: 2.0}


def test_bert_output_with_a_residual_that_broadcasts():
    model, plain = pair(lambda: bert().output.double())
    fdt.convert(model)
    h, x = torch.randn(2, 3, HIDDEN, dtype=torch.float64), torch.randn(1, 3, WIDTH, dtype=torch.float64)
    assert not assert_same(model, plain, h, x)


SIZES = {
    "BERT": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": HIDDEN,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
    },
    "GPT-2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.2, "attn_pdrop": 0.3},
}
CROSS = {"add_cross_attention": True, "is_decoder": True}
MODELS = {  # kind, options, and the fused functions that it calls
    "BERT, eager": (
        "BERT",
        {"attn_implementation": "eager", "hidden_act": "gelu_new"},
        {"softmax_dropout": 2, "bias_act_dropout": 2, "dropout_add_layer_norm": 4},
    ),
    "BERT, cross": (
        "BERT",
        {"attn_implementation": "sdpa", **CROSS},
        {"scaled_dot_product_attention": 4, "bias_act_dropout": 2, "dropout_add_layer_norm": 6},
    ),
    "GPT-2": (
        "GPT-2",
        {"attn_implementation": "sdpa"},
        {
            "scaled_dot_product_attention": 2,
            "bias_act_dropout": 2,
            "bias_dropout_add": 2,
            "dropout_add_layer_norm": 2,
        },
    ),
    "GPT-2, eager and cross": (
        "GPT-2",
        {"attn_implementation": "eager", "activation_function": "gelu_fast", **CROSS},
        {"softmax_dropout": 4, "bias_act_dropout": 8},
    ),
}


def result_of(model, tokens, **options):
    """First output, attentions and gradients."""
    model.zero_grad()
    result = under(3, model, **tokens, **options)
    result[0].sin().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [result[0].detach(), *(result.get("attentions") or ()), *gradients]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name):
    """Also with checkpoints, and where its attentions are asked for; queries and keys have masks of their own."""
    kind, options, expected_calls = MODELS[name]

    def make():
        torch.manual_seed(0)
        if kind == "BERT":
            config = transformers.BertConfig(**SIZES[kind], vocab_size=50, **options)
            return shaken(transformers.BertModel(config, add_pooling_layer=False)).double().train()
        config = transformers.GPT2Config(**SIZES[kind], vocab_size=50, **options)
        return shaken(transformers.GPT2LMHeadModel(config)).double().train()

    model, plain = pair(make)
    assert len(fuse(model).left) == 1  # the embeddings'
    fdt.convert(model)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    tokens = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": mask}
    if "cross" in name:
        tokens["encoder_hidden_states"] = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        tokens["encoder_attention_mask"] = mask[:, 2:]
    with fused_calls() as calls:
        actual = result_of(model, tokens)
    assert calls == expected_calls
    with fdt.enabled():
        expected = result_of(plain, tokens)
    torch.testing.assert_close(actual, expected)
    model.gradient_checkpointing_enable()
    with fused_calls() as calls:
        torch.testing.assert_close(result_of(model, tokens), expected)
    assert calls == {name: 2 * count for name, count in expected_calls.items()}
    model.gradient_checkpointing_disable()
    if "eager" in name:
        with fdt.enabled():
            expected = result_of(plain, tokens, output_attentions=True)
        torch.testing.assert_close(result_of(model, tokens, output_attentions=True), expected)
    model.eval(), plain.eval()
    torch.testing.assert_close(result_of(model, tokens), result_of(plain, tokens))
