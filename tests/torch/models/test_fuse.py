"""`fuse`: the unfused model's outputs and gradients under the same masks, and what it leaves, with the reason."""

from __future__ import annotations

import copy
import functools
import pickle
from functools import partial

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse.fuse import fuse, unfuse

from ..cases import assert_equal, saved_tensors, under
from .fuse_cases import (
    BATCH,
    BERT_CALLS,
    DECODER,
    ENCODER,
    GPT2_CALLS,
    HEADS,
    HIDDEN,
    LENGTH,
    MEMORY,
    NO_SOURCE,
    WIDTH,
    Backend,
    Named,
    assert_left,
    assert_same,
    bert,
    fused_calls,
    gpt2,
    left_reasons,
    pair,
    shaken,
    step,
)

# ---- nn.Sequential ----


def perceptron(activation=nn.ReLU, p=0.3, dtype=None, bias=True):
    layers = nn.Linear(WIDTH, HIDDEN, bias, dtype=dtype), activation(), nn.Dropout(p)
    return nn.Sequential(*layers, nn.Linear(HIDDEN, WIDTH, bias, dtype=dtype), nn.Dropout(p))


ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "ReLU in place": partial(nn.ReLU, inplace=True),
    "GELU": nn.GELU,
    "GELU tanh": partial(nn.GELU, "tanh"),
    "SiLU": nn.SiLU,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sequential(name):
    model, plain = pair(lambda: perceptron(ACTIVATIONS[name], dtype=torch.float64, bias=name != "GELU"))
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    assert assert_same(model, plain, x) == {"bias_act_dropout": 2}
    model.eval(), plain.eval()
    assert_equal(model(x), plain(x))


def test_sequential_among_other_modules():
    """Runs at any position, parts that aren't any, dropouts of ours and of either store, one that serves twice."""

    def make():
        torch.manual_seed(1)
        shared = fdt.Dropout(0.2, store="seed")
        return nn.Sequential(
            nn.Dropout(0.1),
            nn.Linear(WIDTH, HIDDEN),
            shared,
            nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Dropout(0.5, inplace=True), nn.Tanh()),
            nn.Linear(HIDDEN, WIDTH),
            nn.GELU(),
            shared,
            nn.Linear(WIDTH, WIDTH),
        ).double()

    model, plain = make(), make()
    fdt.convert(plain)
    assert str(fuse(model)).splitlines() == [
        "module       before                         after",
        "(the model)  Sequential                     FusedSequential: 1 + 2, 4 + 5 + 6",
        "0            Dropout(p=0.1, inplace=False)  left: no Linear, or Linear and activation, right before it",
        "3            Sequential                     FusedSequential: 0 + 1 + 2",
    ]
    fdt.convert(model)
    assert assert_same(model, plain, torch.randn(4, WIDTH, dtype=torch.float64)) == {"bias_act_dropout": 3}
    x = torch.randn(4, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(under(2, model[3:], x), under(2, plain[3:], x))
    assert type(model[3:]) is type(model)


def own_forward():
    return type("Block", (nn.Sequential,), {"forward": lambda self, x: x})(nn.Linear(2, 2), nn.Dropout())


LEFT = {  # how the reason begins, and a model whose last module is left for it
    "no Linear": lambda: nn.Sequential(nn.Tanh(), nn.Dropout()),
    "0 is a Named, not nn.Linear": lambda: nn.Sequential(Named(2, 2), nn.Dropout()),
    "1 is a Dropout1d, not nn.Dropout": lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout1d()),
    "0 is not of real": lambda: nn.Sequential(nn.Linear(2, 2, dtype=torch.complex64), nn.Dropout()),
    "1 doesn't scale what it keeps": lambda: nn.Sequential(nn.Linear(2, 2), fdt.Dropout(scaling="standard")),
    "0 has hooks": lambda: nn.Sequential(prune.random_unstructured(nn.Linear(2, 2), "weight", 1), nn.Dropout()),
    "in a Block: its forward is not Sequential's": own_forward,
    "drops attention weights": lambda: nn.ModuleList([nn.MultiheadAttention(WIDTH, HEADS, 0.1)]),
    "not in a part that is known; fdt.convert or fdt.enable reaches it": lambda: nn.ModuleList([nn.Dropout()]),
}


@pytest.mark.parametrize("reason", LEFT)
def test_fuse_leaves_what_it_may_not_skip_and_says_why(reason):
    model = LEFT[reason]()
    before, report = [*map(type, model.modules())], fuse(model)
    ((path, why),) = left_reasons(report, *([("", NO_SOURCE)] if "Block" in reason else []))
    assert path == str(len(model) - 1)
    assert why.startswith(reason)
    assert not report.changed
    assert [*map(type, model.modules())] == before


def test_fuse_leaves_what_was_replaced_on_the_object():
    model = perceptron()
    model[1].forward = model[1].forward
    model[4].forward = model[4].forward
    reason = "forward was replaced on the object itself"
    assert_left(model, ("2", f"1's {reason}"), ("4", f"4's {reason}"))
    model = perceptron()
    model.forward = model.forward
    assert_left(model, ("2", f"in a Sequential: its {reason}"), ("4", f"in a Sequential: its {reason}"))


class Perceptron(nn.Sequential):
    """A subclass that adds no code to what it is."""

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.3))


def test_subclasses_that_inherit_what_is_replaced_are_fused():
    model, plain = pair(Perceptron)
    assert isinstance(model, Perceptron)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin).__name__ == "FusedPerceptron"
        assert assert_same(twin, plain, torch.randn(4, WIDTH)) == {"bias_act_dropout": 1}
        assert [row.after for row in unfuse(twin)] == ["Perceptron"]
        assert type(twin) is Perceptron


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize(("inner", "hook"), [*enumerate(HOOKS)])
def test_hooks_inside_are_called_whenever_they_come(hook, inner):
    model, calls = perceptron(), []
    handle = getattr(model[inner], hook)(lambda *_: calls.append(1))
    (changed,), (left,) = fuse(model).changed, fuse(model).left
    assert changed.after == "FusedSequential: 3 + 4"
    assert (left.path, left.reason) == ("2", f"{inner} has hooks")
    x = torch.randn(4, WIDTH)
    step(model, x)
    assert len(calls) == 1
    handle.remove()
    step(model, x)
    assert len(calls) == 1
    handle = getattr(model[inner], hook)(lambda *_: calls.append(1))
    step(model, x)
    assert len(calls) == 2
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        step(model, x)
    finally:
        handle.remove()
    assert calls[2:] == [*model, model]


# ---- torch's transformer layers ----

LAYERS = {
    "encoder": (ENCODER, {}),
    "encoder, batch first": (ENCODER, {"activation": F.gelu, "batch_first": True}),
    "encoder, pre-norm": (ENCODER, {"norm_first": True, "activation": nn.GELU("tanh")}),
    "encoder, pre-norm without bias": (
        ENCODER,
        {"bias": False, "norm_first": True, "activation": "gelu", "batch_first": True},
    ),
    "decoder": (DECODER, {"activation": partial(F.gelu, approximate="tanh")}),
    "decoder, pre-norm": (DECODER, {"norm_first": True, "batch_first": True}),
    "decoder without bias": (DECODER, {"bias": False, "activation": nn.ReLU()}),
}


def layer(of, p=0.3, **options):
    """With rates, parameters and norms that tell its modules apart."""
    made = shaken(of(WIDTH, HEADS, HIDDEN, p, layer_norm_eps=0.01, **options))
    for i, module in enumerate(module for module in made.modules() if isinstance(module, nn.Dropout)):
        module.p = p ** (1 + i)
    return made


def inputs_of(of, dtype=torch.float64, batch_first=False, batch=BATCH):
    shapes = [(batch, length, WIDTH) for length in (LENGTH, MEMORY)[: 1 + (of is DECODER)]]
    return [torch.randn(s if batch_first else (s[1], s[0], s[2]), dtype=dtype) for s in shapes]


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    of, options = LAYERS[name]
    model, plain = pair(lambda: layer(of, dtype=torch.float64, **options))
    inputs = inputs_of(of, batch_first=options.get("batch_first", False))
    attentions, last = 1 + (of is DECODER), "dropout_add" if "bias" in options else "bias_dropout_add"
    expected = {"scaled_dot_product_attention": attentions, "bias_act_dropout": 1}
    if options.get("norm_first"):
        expected |= {"dropout_add_layer_norm": attentions, last: 1}
    else:
        expected |= {"dropout_add_layer_norm": attentions + 1}
    assert assert_same(model, plain, *inputs) == expected
    model.eval(), plain.eval()
    assert_equal(model(*inputs), plain(*inputs))
    with torch.no_grad():  # the encoder's fast path
        assert_equal(model(*inputs), plain(*inputs))


CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [3]])
FLOAT_PADDING = {"mask": CAUSAL, "key_padding_mask": PADDING.double() * -9, "is_causal": True}
OF_EACH_HEAD = torch.randn(BATCH * HEADS, LENGTH, LENGTH, dtype=torch.float64)
MASKS = {
    "causal": {"mask": CAUSAL},
    "causal by hint": {"mask": CAUSAL, "is_causal": True},
    "bool": {"mask": torch.eye(LENGTH) > 0},
    "of each head": {"mask": OF_EACH_HEAD},
    "padding": {"key_padding_mask": PADDING},
    "float padding and causal by hint": FLOAT_PADDING,
    "padding and of each head": {"mask": OF_EACH_HEAD > 0.5, "key_padding_mask": PADDING},
    "nothing to see": {"mask": torch.ones(LENGTH, LENGTH) > 0},
}


@pytest.mark.parametrize("name", MASKS)
def test_encoder_layer_masks(name):
    model, plain = pair(lambda: layer(ENCODER, dtype=torch.float64))
    options = {n if n == "is_causal" else f"src_{n}": value for n, value in MASKS[name].items()}
    inputs = inputs_of(ENCODER)
    assert_same(model, plain, *inputs, **options)
    model.eval(), plain.eval()
    assert_equal(model(*inputs, **options), plain(*inputs, **options))


def test_encoder_layer_mask_may_want_a_gradient():
    model, plain = pair(lambda: layer(ENCODER, dtype=torch.float64))
    gradients, inputs = [], inputs_of(ENCODER)
    with fdt.enabled():
        for each in (model, plain):
            mask = CAUSAL.clone().requires_grad_()
            step(each, *inputs, src_mask=mask)
            gradients.append(mask.grad)
    torch.testing.assert_close(*gradients)


def test_decoder_layer_masks():
    model, plain = pair(lambda: layer(DECODER, norm_first=True, dtype=torch.float64))
    given = {f"tgt_{name}": value for name, value in FLOAT_PADDING.items()}
    given["memory_mask"] = torch.randn(LENGTH, MEMORY, dtype=torch.float64)
    given["memory_key_padding_mask"] = torch.zeros(BATCH, MEMORY, dtype=torch.float64).index_fill_(
        1, torch.tensor(2), -4.0
    )
    assert_same(model, plain, *inputs_of(DECODER), **given)


@pytest.mark.parametrize("of", [ENCODER, DECODER], ids=["encoder", "decoder"])
def test_layer_unbatched_and_empty(of):
    model, plain = pair(lambda: layer(of, batch_first=True, norm_first=True, dtype=torch.float64))
    inputs = [x[0] for x in inputs_of(of, batch_first=True)]
    assert_same(model, plain, *inputs)
    empty = inputs_of(of, batch_first=True, batch=0)
    assert_equal(model(*empty), empty[0])


WRONG = {
    "hint without a mask": {"is_causal": True},
    "mask of another shape": {"src_mask": torch.zeros(1, LENGTH)},
    "mask of integers": {"src_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.int64)},
    "padding of another shape": {"src_key_padding_mask": torch.zeros(LENGTH, BATCH) > 0},
    "another width": {"src": torch.ones(LENGTH, BATCH, WIDTH - 1)},
}


@pytest.mark.parametrize("name", WRONG)
def test_layer_refuses_masks_as_torch_does(name):
    model, plain = layer(ENCODER), layer(ENCODER)
    fuse(model)
    (x,) = inputs_of(ENCODER, torch.float32)
    arguments = {"src": x} | WRONG[name]
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        plain(**arguments)
    with pytest.raises(type(expected.value)) as actual:
        model(**arguments)
    assert str(actual.value) == str(expected.value)


def test_decoder_layer_without_memory_raises_as_torchs():
    layer, plain = pair(lambda: nn.TransformerDecoderLayer(WIDTH, 2, 8, batch_first=True))
    for model in (plain, layer):
        with pytest.raises(AttributeError, match="NoneType"):
            model(torch.randn(2, 3, WIDTH), None)


def test_encoder_layer_in_evaluation_drops_where_torchs_would():
    """Its fast path looks at the layer alone."""
    model, plain = pair(lambda: layer(ENCODER, batch_first=True).eval())
    for module in (*model.modules(), *plain.modules()):
        module.training = isinstance(module, nn.Dropout)
    (x,) = inputs_of(ENCODER, torch.float32, batch_first=True)
    with torch.no_grad():
        assert_equal(under(3, model, x), under(3, plain, x))
        assert_equal(under(3, model, x), under(4, model, x))


def with_own(name, value):
    """A layer of which one module or method is another."""
    changed = layer(ENCODER)
    setattr(changed, name, value)
    return changed


def own_block(self, x):
    return x


REFUSED = {
    "its _ff_block is not TransformerEncoderLayer's": lambda: layer(type("Own", (ENCODER,), {"_ff_block": own_block})),
    "its _sa_block was replaced on the object itself": lambda: with_own("_sa_block", own_block),
    "activation is tanh, not a known one": lambda: layer(ENCODER, activation=torch.tanh),
    "activation is ELU, not a known one": lambda: layer(ENCODER, activation=nn.ELU()),
    "linear1 is a Named, not nn.Linear": lambda: with_own("linear1", Named(WIDTH, HIDDEN)),
    "norm2 is a RMSNorm, not nn.LayerNorm": lambda: with_own("norm2", nn.RMSNorm(WIDTH)),
    "norm2 is of more than one axis": lambda: with_own("norm2", nn.LayerNorm((5, WIDTH))),
    "dropout1 is a Identity, not nn.Dropout": lambda: with_own("dropout1", nn.Identity()),
    "self_attn is a Identity, not nn.MultiheadAttention": lambda: with_own("self_attn", nn.Identity()),
    "self_attn has keys and values of its own": lambda: with_own(
        "self_attn", nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True)
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_fuse_leaves_layers_with_modules_of_others(reason):
    assert_left(REFUSED[reason](), ("", reason))


def test_hooks_inside_a_layer_are_called_whenever_they_come():
    model, plain = pair(lambda: layer(ENCODER, dtype=torch.float64))
    calls = []
    handle = model.norm1.register_forward_hook(lambda *_: calls.append(1))
    assert [(row.path, row.reason) for row in fuse(model)] == [("", "norm1 has hooks")]
    with fdt.enabled():
        assert not assert_same(model, plain, *inputs_of(ENCODER))
    assert len(calls) == 2
    unfuse(model)
    assert_left(model, ("", "norm1 has hooks"))
    handle.remove()
    assert fuse(model).changed


def test_methods_replaced_since_are_called():
    model = layer(ENCODER)
    assert fuse(model).changed
    model._ff_block = lambda x: x * 0
    (x,) = inputs_of(ENCODER, torch.float32)
    with fused_calls() as calls:
        model(x)
    assert not calls
    with pytest.MonkeyPatch.context() as patch:
        wrapped = functools.wraps(DECODER.forward)(lambda self, *_: None)
        for method, read in ((lambda self, *_: None, [("", NO_SOURCE)]), (wrapped, [])):
            patch.setattr(DECODER, "forward", method)
            assert_left(layer(DECODER), ("", "its forward is not TransformerDecoderLayer's"), read=read)


# ---- the model stays what it was ----


def some_model():
    return nn.ModuleDict(
        {
            "sequence": perceptron(),
            "encoder": nn.TransformerEncoder(layer(ENCODER), 2, enable_nested_tensor=False),
            "decoder": layer(DECODER),
        }
    )


def test_fuse_and_unfuse_change_classes_alone():
    model = some_model().eval()
    called = []
    model["decoder"].register_forward_hook(lambda *_: called.append(1))
    modules = list(model.modules())
    before = [(type(module), {name: copy.copy(value) for name, value in vars(module).items()}) for module in modules]
    state = model.state_dict()
    report = fuse(model)
    assert [row.path for row in report.changed] == ["sequence", "encoder.layers.0", "encoder.layers.1", "decoder"]
    assert not report.left
    assert not fdt.convert(copy.deepcopy(model)).left  # attention inside is fastdrop's already
    assert len(fuse(model)) == 0
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert [vars(module) for module in modules] == [own for _, own in before]
    assert list(model.state_dict()) == list(state)
    assert all(isinstance(module, cls) for module, (cls, _) in zip(modules, before, strict=True))
    model["decoder"](*inputs_of(DECODER, torch.float32))
    assert called
    report = unfuse(model)
    assert (report.rows[0].before, report.rows[0].after) == ("FusedSequential", "Sequential")
    assert len(report) == 4
    assert [type(module) for module in modules] == [cls for cls, _ in before]
    assert len(unfuse(model)) == 0
    fuse(model)
    model["decoder"].__class__ = type("Sharded", (type(model["decoder"]),), {})  # as fully_shard does
    row = unfuse(model).rows[-1]
    assert (row.before, row.after, row.reason) == ("Sharded", None, "its class was changed since")


def test_convert_before_and_after_is_the_same():
    first, second = perceptron(), perceptron()
    second.load_state_dict(first.state_dict())
    fdt.convert(first, store="seed")
    fuse(first), fuse(second)
    fdt.convert(second, store="seed")
    x = torch.randn(4, WIDTH)
    with fused_calls() as calls:
        assert_equal(step(first, x), step(second, x))
    assert calls == {"bias_act_dropout": 4}
    with saved_tensors() as kept:
        first[3:](torch.randn(4, HIDDEN))
    assert torch.int32 not in [tensor.dtype for tensor in kept]  # a seed, and no bits
    unfuse(first), fdt.revert(second)
    assert type(first[2]) is fdt.Dropout
    assert type(second[2]) is nn.Dropout


def test_fused_modules_follow_a_scheduler():
    model, plain = pair(lambda: layer(ENCODER, dtype=torch.float64))
    (x,) = inputs_of(ENCODER)
    for m in (model, plain):
        fdt.DropoutScheduler(m, lambda step: 0.6)
    assert_same(model, plain, x)
    for m in (model, plain):
        fdt.DropoutScheduler(m, lambda step: 0.0)
    torch.testing.assert_close(step(model, x), step(plain, x))


def test_fused_models_are_sampled_and_audited_as_before():
    """Monte Carlo turns on dropout alone, and maps; the audit looks inside."""
    encoder = nn.TransformerEncoder(layer(ENCODER, batch_first=True), 2, enable_nested_tensor=False)
    model = nn.Sequential(perceptron(), encoder).eval()
    plain = copy.deepcopy(model)
    fdt.convert(plain)
    fuse(model)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    expected = fdt.mc_predict(plain, x, samples=6, seed=1, keep_samples=True)
    with fused_calls() as calls:
        actual = fdt.mc_predict(model, x, samples=6, seed=1, keep_samples=True)
    assert set(calls) == {"bias_act_dropout", "dropout_add_layer_norm", "scaled_dot_product_attention"}
    assert expected.std.min() > 0
    torch.testing.assert_close(actual.samples, expected.samples)
    audited = str(fdt.audit(model, x))
    unfuse(model)
    assert audited == str(fdt.audit(model, x))


def test_fx_sees_the_modules_inside():
    model = perceptron()
    fuse(model)
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    model = nn.Sequential(layer(ENCODER))
    fuse(model)
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0"]
    pytest.importorskip("transformers")
    fuse(model := bert().output)
    graph = torch.fx.symbolic_trace(model).graph
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["dense", "dropout", "LayerNorm"]


# ---- around a fused model ----

SHAPE = (BATCH, LENGTH, WIDTH)
MODELS = {  # how to make it, shapes of inputs, calls, ops; with smooth activations: a relu's steps show in 16 bits
    "sequence": (partial(perceptron, nn.SiLU), [SHAPE], {"bias_act_dropout": 2}, (2, 0, 0)),
    "encoder": (
        partial(layer, ENCODER, activation="gelu", batch_first=True, norm_first=True),
        [SHAPE],
        GPT2_CALLS,
        (2, 1, 1),
    ),
    "decoder": (
        partial(layer, DECODER, activation="gelu", batch_first=True),
        [SHAPE, (BATCH, MEMORY, WIDTH)],
        {"bias_act_dropout": 1, "dropout_add_layer_norm": 3, "scaled_dot_product_attention": 2},
        (1, 3, 2),
    ),
    "BERT": (bert, [SHAPE], BERT_CALLS, (1, 2, 1)),
    "GPT-2": (gpt2, [SHAPE], GPT2_CALLS, (2, 1, 1)),
}


@pytest.fixture(params=MODELS)
def case(request):
    """(how to make the model, inputs, calls of fused functions, fused ops in a graph)"""
    make, shapes, calls, ops = MODELS[request.param]
    if request.param in ("BERT", "GPT-2"):
        pytest.importorskip("transformers")
    return make, [torch.randn(shape) for shape in shapes], calls, ops


@pytest.mark.parametrize("case", ["decoder", "GPT-2"], indirect=True)
def test_checkpoint(case):
    make, inputs, expected_calls, _ = case
    reentrant = len(expected_calls) > 3
    fuse(model := make())
    expected = step(model, *inputs)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, *inputs):
            return checkpoint(self.inner, *inputs, use_reentrant=reentrant)

    with fused_calls() as calls:
        assert_equal(step(Checkpointed(), *inputs), expected)
    assert calls == {name: 2 * count for name, count in expected_calls.items()}


def test_autocast(case):
    """The residual stream keeps its dtype, and 16-bit products lie beside it."""
    make, inputs, expected_calls, _ = case
    model, plain = pair(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with fused_calls() as calls:
            actual = step(model, *inputs)
        assert calls == expected_calls
        with fdt.enabled():
            expected = step(plain, *inputs)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_autocast_on_a_gpu(norm_first):
    """Where norms are float32, and so is what follows them, of 16-bit inputs too."""
    model, plain = pair(lambda: layer(ENCODER, activation="gelu", norm_first=norm_first).cuda().eval())
    for module in (*model.modules(), *plain.modules()):
        module.train(not isinstance(module, nn.MultiheadAttention))
    (x,) = (x.cuda().bfloat16() for x in inputs_of(ENCODER, torch.float32))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual, expected = step(model, x), step(plain, x)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=0.1, atol=0.05)


QUICK = ("decoder", "GPT-2")
SLOW = pytest.mark.slow("test_compile of the decoder and GPT-2")


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else SLOW) for name in MODELS], indirect=True
)
def test_compile(case):
    """In one graph, which takes p as a scheduler sets it and isn't made again."""
    make, inputs, _, ops = case
    model = make()
    fdt.convert(model)
    fuse(model)
    scheduler = fdt.DropoutScheduler(model, lambda step: 0.1 + 0.2 * step, is_driven)
    torch.compiler.reset()
    counters.clear()
    backend = Backend()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for _ in range(2):
            torch.testing.assert_close(step(compiled, *inputs), step(model, *inputs))
            scheduler.step()
    assert counters["stats"]["unique_graphs"] == 1
    assert backend.ops == ops
    torch.compiler.reset()


def is_driven(path, module):
    """Attention has its p as a number, for which another graph is made."""
    return isinstance(module, fdt.Dropout) and path not in ("attention.self.dropout", "attn.attn_dropout")


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo to connect processes with",
)
def test_data_parallel(tmp_path):
    """In a group of one process."""
    model = nn.Sequential(perceptron(), layer(ENCODER))
    fuse(model)
    (x,) = inputs_of(ENCODER, torch.float32)
    expected = step(model, x)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert_equal(step(nn.parallel.DistributedDataParallel(model), x), expected)
    finally:
        torch.distributed.destroy_process_group()
