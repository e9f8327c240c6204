"""`fuse` of BERT and GPT-2: stand-ins of their blocks, and the models of transformers where it is installed."""

from __future__ import annotations

import copy
import operator
import pickle
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse import transformers_layers
from fastdrop.torch.models.fuse.fuse import fuse, unfuse

from ..cases import assert_equal, under
from .fuse_cases import (
    BATCH,
    BERT_CALLS,
    GPT2_CALLS,
    HIDDEN,
    IN_ATTEND,
    LENGTH,
    NO_SOURCE,
    WIDTH,
    AttentionInterface,
    Backend,
    BertLayer,
    BertOutput,
    GPT2Model,
    Named,
    assert_same,
    fused_calls,
    left_reasons,
    pair,
    sdpa,
    shaken,
    step,
)

BERT_PARTS = {
    "attention": "BertSelfAttention",
    "attention_output": "BertSelfOutput",
    "intermediate": "BertIntermediate",
    "output": "BertOutput",
}
GPT2_PARTS = {"h": "GPT2Block", "h.attn": "GPT2Attention", "h.mlp": "GPT2MLP"}
GPT2_EAGER_CALLS = {"bias_act_dropout": 1, "bias_dropout_add": 1, "dropout_add_layer_norm": 1, "softmax_dropout": 1}
BLOCKS = {
    "BERT": (BertLayer, BERT_PARTS, BERT_CALLS),
    "BERT, eager": (
        partial(BertLayer, "eager"),
        BERT_PARTS,
        {"softmax_dropout": 1, "bias_act_dropout": 1, "dropout_add_layer_norm": 2},
    ),
    "GPT-2": (GPT2Model, GPT2_PARTS, GPT2_CALLS),
    "GPT-2, eager": (partial(GPT2Model, "eager"), GPT2_PARTS, GPT2_EAGER_CALLS),
    "GPT-2 without a mask": (partial(GPT2Model, masked=False), GPT2_PARTS, GPT2_CALLS),
    "GPT-2 beside an encoder": (
        partial(GPT2Model, encoder_hidden_states=torch.ones(WIDTH)),
        GPT2_PARTS,
        {"scaled_dot_product_attention": 1, "bias_act_dropout": 3},
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformers_blocks(stand_ins, name):
    make, classes, calls = BLOCKS[name]
    model, plain = shaken(make()).double(), make().double()
    plain.load_state_dict(model.state_dict())
    fdt.convert(plain)
    report = fuse(model)
    assert {row.path: row.before for row in report} == classes
    assert {row.path: row.after for row in report} == {path: f"Fused{cls}" for path, cls in classes.items()}
    x = torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    assert assert_same(model, plain, x) == calls
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert_equal(step(twin, x), step(model, x))
    model.eval(), plain.eval()
    assert_equal(step(model, x), step(plain, x))
    assert len(unfuse(model)) == len(classes)
    assert [cls.__name__ for cls in map(type, model.modules())] == [cls.__name__ for cls in map(type, make().modules())]


@pytest.mark.parametrize("name", ["attn", "attn.resid_dropout"])
def test_hooks_inside_a_transformers_block_are_called(stand_ins, name):
    """With what the original module returns, as by those of ``output_attentions``."""
    model, plain = pair(lambda: GPT2Model().double())
    fdt.convert(model)
    seen = []
    for block in (model.h, plain.h):
        block.get_submodule(name).register_forward_hook(lambda module, given, result: seen.append(result))
    calls = assert_same(model, plain, torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64))
    assert "dropout_add_layer_norm" not in calls
    torch.testing.assert_close(seen[0], seen[1])


LEFT = {  # what is changed, by path, and the reasons
    "flash attention and tanh": (
        GPT2Model,
        {"h.attn.config._attn_implementation": "flash_attention_2", "h.mlp.act": nn.Tanh()},
        {
            "h": "act is Tanh, not a known one",
            "h.attn": "its attention is 'flash_attention_2', neither 'sdpa' nor 'eager'",
            "h.mlp": "act is Tanh, not a known one",
        },
    ),
    "upcast": (
        partial(GPT2Model, "eager"),
        {"h.attn.reorder_and_upcast_attn": True},
        {"h.attn": "its attention is reordered and upcast"},
    ),
    "subclass": (BertLayer, {"output.dense": Named(HIDDEN, WIDTH)}, {"output": "dense is a Named, not nn.Linear"}),
}


@pytest.mark.parametrize("name", LEFT)
def test_transformers_blocks_that_are_left(stand_ins, name):
    make, changes, expected = LEFT[name]
    model = make()
    for path, value in changes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(operator.attrgetter(owner)(model), attribute, value)
    left = [(row.path, row.reason) for row in fuse(model).left if not row.reason.startswith(IN_ATTEND)]
    assert dict(left) == expected


def test_transformers_blocks_with_another_forward_are_left(stand_ins, monkeypatch):
    monkeypatch.setattr(BertOutput, "forward", lambda self, hidden_states, input_tensor: hidden_states)
    reasons = left_reasons(fuse(BertLayer()), ("output", NO_SOURCE))
    assert reasons == [("output", "its forward is not BertOutput's")]
    model = GPT2Model()

    def forward(self, hidden_states, layer_past=None):
        return hidden_states

    block = type(model.h)
    for name, of in (("__module__", block.forward.__module__), ("__qualname__", block.forward.__qualname__)):
        setattr(forward, name, of)
    monkeypatch.setattr(block, "forward", forward)
    report = fuse(model)
    assert [row.path for row in report.changed] == ["h.attn", "h.mlp"]
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
def test_modules_put_into_a_transformers_block_since_are_called(stand_ins, name, kind):
    model, plain = pair(lambda: GPT2Model().double())
    fdt.convert(model)
    calls = []
    for block in (model.h, plain.h):
        setattr(block, name, kind(getattr(block, name), calls))
    fused = assert_same(model, plain, torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64))
    assert "dropout_add_layer_norm" not in fused
    assert len(calls) == 3
    reason = f"{name} is a {kind.__name__}, not transformers' {'GPT2Attention' if name == 'attn' else 'GPT2MLP'}"
    assert ("h", reason) in [(row.path, row.reason) for row in fuse(model).left]


def test_transformers_attention_that_was_replaced(stand_ins, monkeypatch):
    """Before or since."""
    used = []

    def mine(*args, **kwargs):
        used.append(1)
        return sdpa(*args, **kwargs)

    fuse(model := GPT2Model())
    monkeypatch.setitem(AttentionInterface.functions, "sdpa", mine)
    with fused_calls() as calls:
        model(torch.randn(BATCH, LENGTH, WIDTH))
    assert len(used) == 1
    assert "scaled_dot_product_attention" not in calls
    reached = ("h.attn", f"{IN_ATTEND}fdt.enable() reaches it on the CPU")
    assert left_reasons(fuse(GPT2Model()), reached) == [("h.attn", "its 'sdpa' attention was replaced")]


def test_transformers_attention_sees_no_keys_beyond_causal_queries(stand_ins):
    """As theirs, which crops them first: the mask is of what is left."""
    attention = GPT2Model().h.attn
    q, k, v = (torch.randn(2, 3, length, 8) for length in (5, 7, 7))
    actual, _ = under(3, transformers_layers.sdpa, attention, q, k, v, None, 0.4)
    cropped = k[:, :, :5].contiguous(), v[:, :, :5].contiguous()
    expected, _ = under(3, transformers_layers.sdpa, attention, q, *cropped, None, 0.4)
    assert_equal(actual, expected)
    actual, _ = under(3, transformers_layers.sdpa, attention, q, k, v, torch.zeros(5, 7), 0.4)
    assert not torch.equal(actual, expected)


def test_transformers_attention_with_options_of_its_own_is_transformers(stand_ins, monkeypatch):
    def given(module, *args, **kwargs):
        return args, kwargs

    monkeypatch.setitem(AttentionInterface.functions, "sdpa", given)
    attention, tensors = GPT2Model().h.attn, [torch.randn(2, 3, 5, 8) for _ in range(3)]
    for name in ("position_bias", "cache", "softcap"):
        args, kwargs = transformers_layers.sdpa(attention, *tensors, None, 0.4, 0.5, **{name: 2.0})
        assert all(a is b for a, b in zip(args, (*tensors, None), strict=True))
        assert kwargs == {"dropout": 0.4, "scaling": 0.5, "is_causal": None, name: 2.0}


def test_bert_output_with_a_residual_that_broadcasts(stand_ins):
    model, plain = pair(lambda: BertOutput(HIDDEN).double())
    fdt.convert(model)
    h, x = torch.randn(2, 3, HIDDEN, dtype=torch.float64), torch.randn(1, 3, WIDTH, dtype=torch.float64)
    assert not assert_same(model, plain, h, x)


def real_model(transformers, kind, implementation, **options):
    """A tiny model of two layers, of another rate at each kind of place."""
    torch.manual_seed(0)
    options |= {"vocab_size": 50, "attn_implementation": implementation}
    if kind == "BERT":
        config = transformers.BertConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            hidden_dropout_prob=0.2,
            attention_probs_dropout_prob=0.3,
            hidden_act="gelu_new" if implementation == "eager" else "gelu",
            **options,
        )
        return shaken(transformers.BertModel(config, add_pooling_layer=False)).train()
    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.2,
        embd_pdrop=0.1,
        attn_pdrop=0.3,
        activation_function="gelu_fast" if implementation == "eager" else "gelu_new",
        **options,
    )
    return shaken(transformers.GPT2LMHeadModel(config)).train()


REAL_CALLS = {
    "BERT": {"bias_act_dropout": 2, "dropout_add_layer_norm": 4},
    "GPT-2": {"bias_act_dropout": 2, "bias_dropout_add": 2, "dropout_add_layer_norm": 2},
}


@pytest.fixture
def tokens():
    """Of two sequences, one of which is shorter."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(50, (2, 7)), "attention_mask": mask}


def result_of(model, tokens, **options):
    """First output, attentions and gradients."""
    model.zero_grad()
    result = under(3, model, **tokens, **options)
    result[0].sin().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [result[0].detach(), *(result.get("attentions") or ()), *gradients]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "implementation"), [("BERT", "eager"), ("GPT-2", "sdpa")])
def test_models_of_transformers(kind, implementation, tokens):
    transformers = pytest.importorskip("transformers")
    model, plain = pair(lambda: real_model(transformers, kind, implementation).double())
    assert len(fuse(model).left) == 1  # the embeddings'
    fdt.convert(model)
    attention = "scaled_dot_product_attention" if implementation == "sdpa" else "softmax_dropout"
    expected_calls = {attention: 2, **REAL_CALLS[kind]}
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
    if implementation == "eager":
        with fdt.enabled():
            expected = result_of(plain, tokens, output_attentions=True)
        torch.testing.assert_close(result_of(model, tokens, output_attentions=True), expected)
    model.eval(), plain.eval()
    torch.testing.assert_close(result_of(model, tokens), result_of(plain, tokens))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "implementation"), [("BERT", "sdpa"), ("GPT-2", "eager")])
def test_cross_attention_of_transformers(kind, implementation, tokens):
    """Queries and keys of different lengths, each with a mask of its own."""
    transformers = pytest.importorskip("transformers")
    options = {"add_cross_attention": True, "is_decoder": True}
    model, plain = pair(lambda: real_model(transformers, kind, implementation, **options).double())
    fuse(model)
    fdt.convert(model)
    seen = torch.ones(2, 5, dtype=torch.int64)
    seen[0, 3:] = 0
    tokens |= {"encoder_hidden_states": torch.randn(2, 5, WIDTH, dtype=torch.float64), "encoder_attention_mask": seen}
    with fused_calls() as calls:
        actual = result_of(model, tokens)
    assert calls["scaled_dot_product_attention" if implementation == "sdpa" else "softmax_dropout"] == 4
    with fdt.enabled():
        torch.testing.assert_close(actual, result_of(plain, tokens))


@pytest.mark.slow("test_compile")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BERT", "GPT-2"])
def test_compiled_model_of_transformers(kind, tokens):
    transformers = pytest.importorskip("transformers")
    model = real_model(transformers, kind, "sdpa")
    fdt.convert(model)
    fuse(model)
    torch.compiler.reset()
    backend = Backend()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        torch.testing.assert_close(result_of(compiled, tokens), result_of(model, tokens))
    assert backend.ops == ((2, 4, 2) if kind == "BERT" else (4, 2, 2))
    torch.compiler.reset()
