"""torch's own dropout on fastdrop: reached from everywhere while enabled, and torch as it was when not."""

from __future__ import annotations

import ast
import threading

import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.models import enable

from ...cases import output_of
from ..cases import assert_equal, under

NAMES = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
DROPOUTS = tuple(f"aten::{name}{inplace}" for name in NAMES for inplace in ("", "_"))
ATTENTION = "aten::scaled_dot_product_attention"
OPERATORS = (*DROPOUTS, ATTENTION)
BATCH, LENGTH, WIDTH, HEADS, HIDDEN, MEMORY = 2, 5, 16, 2, 32, 7


@pytest.fixture(autouse=True)
def torch_as_it_was():
    assert not is_ours()
    yield
    fdt.disable()
    assert not is_ours()


@pytest.fixture
def on():
    with fdt.enabled():
        yield


@pytest.fixture
def x():
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def is_ours():
    """Whether torch's dropout is ours: it leaves no trace of a NaN."""
    with torch.random.fork_rng():
        return not F.dropout(torch.tensor([float("nan")]), 1.0).isnan().any()


def run(function, seed, x):
    """Output and gradient under a seed."""
    x = x.detach().clone().requires_grad_()
    y = under(seed, function, x)
    y.sin().sum().backward()
    return y.detach(), x.grad


def saved(function, *arguments):
    """Tensors kept for backward, in order."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        function(*arguments)
    return kept


def torchs(x):
    """Torch's dropout, which is ours while enabled."""
    return F.dropout(x, 0.4)


def ours(x):
    return fdt.dropout(x, 0.4)


# ---- every way to torch's dropouts ----

CALLS = {
    "F.dropout": lambda x: F.dropout(x, 0.4),
    "F.dropout inplace": lambda x: F.dropout(x * 1, 0.4, inplace=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.4, True),
    "torch.dropout_": lambda x: torch.dropout_(x * 1, 0.4, True),
    "torch.ops": lambda x: torch.ops.aten.dropout(x, 0.4, True),
    "torch.ops inplace": lambda x: torch.ops.aten.dropout_(x * 1, 0.4, True),
    "nn.Dropout": nn.Dropout(0.4),
    "nn.Dropout inplace": lambda x: nn.Dropout(0.4, inplace=True)(x * 1),
}


# Torch's other dropouts: every way to them, and what it is while enabled.
OTHERS = {
    "F.dropout1d": (lambda x: F.dropout1d(x, 0.4), lambda x: fdt.dropout1d(x, 0.4)),
    "F.dropout1d inplace": (lambda x: F.dropout1d(x * 1, 0.4, inplace=True), lambda x: fdt.dropout1d(x, 0.4)),
    "F.dropout1d batched": (lambda x: F.dropout1d(x[..., None], 0.4), lambda x: fdt.dropout1d(x[..., None], 0.4)),
    "F.dropout2d": (lambda x: F.dropout2d(x[..., None, None], 0.4), lambda x: fdt.dropout2d(x[..., None, None], 0.4)),
    "F.dropout3d": (
        lambda x: F.dropout3d(x.view(2, 4, 4, 2, 2), 0.4),
        lambda x: fdt.dropout3d(x.view(2, 4, 4, 2, 2), 0.4),
    ),
    "F.dropout3d unbatched": (
        lambda x: F.dropout3d(x.view(8, 4, 2, 2), 0.4),
        lambda x: fdt.dropout3d(x.view(8, 4, 2, 2), 0.4),
    ),
    "nn.Dropout1d": (nn.Dropout1d(0.4), lambda x: fdt.dropout1d(x, 0.4)),
    "torch.feature_dropout": (
        lambda x: torch.feature_dropout(x.view(8, 4, 4), 0.4, True),
        lambda x: fdt.dropout1d(x.view(8, 4, 4), 0.4),
    ),
    "torch.feature_dropout_": (
        lambda x: torch.feature_dropout_(x.view(8, 4, 4) * 1, 0.4, True),
        lambda x: fdt.dropout1d(x.view(8, 4, 4), 0.4),
    ),
    "F.alpha_dropout": (lambda x: F.alpha_dropout(x, 0.4, True), lambda x: fdt.alpha_dropout(x, 0.4, True)),
    "F.alpha_dropout inplace": (
        lambda x: F.alpha_dropout(x * 1, 0.4, True, inplace=True),
        lambda x: fdt.alpha_dropout(x, 0.4, True),
    ),
    "nn.AlphaDropout": (nn.AlphaDropout(0.4), lambda x: fdt.alpha_dropout(x, 0.4, True)),
    "torch.ops alpha": (
        lambda x: torch.ops.aten.alpha_dropout(x, 0.4, True),
        lambda x: fdt.alpha_dropout(x, 0.4, True),
    ),
    "F.feature_alpha_dropout": (
        lambda x: F.feature_alpha_dropout(x.view(8, 4, 4), 0.4, True),
        lambda x: fdt.feature_alpha_dropout(x.view(8, 4, 4), 0.4, True),
    ),
    "nn.FeatureAlphaDropout": (
        lambda x: nn.FeatureAlphaDropout(0.4)(x.view(8, 4, 4)),
        lambda x: fdt.feature_alpha_dropout(x.view(8, 4, 4), 0.4, True),
    ),
    "torch.feature_alpha_dropout_": (
        lambda x: torch.feature_alpha_dropout_(x.view(8, 4, 4) * 1, 0.4, True),
        lambda x: fdt.feature_alpha_dropout(x.view(8, 4, 4), 0.4, True),
    ),
}


@pytest.mark.parametrize("call", OTHERS)
def test_other_dropouts_are_fastdrops(on, x, call):
    theirs, ours = OTHERS[call]
    for seed in range(3):
        assert_equal(run(theirs, seed, x), run(ours, seed, x))
    words = [t.nbytes for t in saved(theirs, x.clone().requires_grad_()) if t.dtype == torch.int32]
    assert words == [t.nbytes for t in saved(ours, x.clone().requires_grad_())]
    assert not any(t.dtype == torch.bool for t in saved(theirs, x.clone().requires_grad_()))


@pytest.mark.parametrize("call", OTHERS)
def test_other_dropouts_under_transforms_are_fastdrops(on, x, call):
    theirs, ours = OTHERS[call]
    for transform in ("grad", "jvp", "vmap of grad"):
        if transform == "vmap of grad":
            samples, wrap = torch.stack([x, x.cos()]), lambda f: lambda x: f(x).sum()
            both = [under(3, vmap(grad(wrap(f)), randomness="different"), samples) for f in (theirs, ours)]
        else:
            both = [under(3, TRANSFORMS[transform], f, x) for f in (theirs, ours)]
        assert_equal(*both)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d])
def test_other_dropouts_in_evaluation_and_at_p_0_return_the_input(on, function):
    x = torch.randn(2, 3, 4)
    state = torch.get_rng_state()
    for p, training in ((0.4, False), (0.0, True)):
        assert_equal(function(x, p, training), x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", [name + inplace for name in NAMES[1:] for inplace in ("", "_")])
def test_what_other_dropouts_do_not_take_is_torchs(name, training):
    """Dtypes, too few axes, complex numbers, a bad p: torch's result or torch's error."""
    function, makes = getattr(torch, name), list(FOREIGN.values())
    if "feature" in name:
        makes += [lambda: torch.ones(4), lambda: torch.ones(())]
    if "alpha" in name:
        makes += [lambda: torch.ones(4, 4, dtype=torch.complex64)]
    cases = [(make, p) for make in makes for p in (0.0, 0.5, 2.0)] + [(lambda: torch.ones(4, 4), -0.1)]
    expected = [outcome(make, function, p, training) for make, p in cases]
    with fdt.enabled():
        assert [outcome(make, function, p, training) for make, p in cases] == expected


@pytest.mark.parametrize("call", CALLS)
def test_call_is_fastdrops(on, x, call):
    for seed in range(3):
        assert_equal(run(CALLS[call], seed, x), run(ours, seed, x))
    kept = saved(CALLS[call], x.clone().requires_grad_())
    words = [t for t in kept if t.dtype == torch.int32]
    assert [t.nbytes for t in words] == [x.numel() // 8]
    assert all(t is x or t.dtype == torch.int32 or t.numel() == 1 for t in kept)


@pytest.mark.parametrize("call", CALLS)
def test_call_drops_infinities_and_nans(on, call):
    x = torch.tensor([float("nan"), float("inf"), -1.0]).repeat(50)
    y = CALLS[call](x)
    dropped = under(3, lambda: CALLS[call](torch.ones(150))) == 0
    assert dropped.any()
    assert (under(3, CALLS[call], x)[dropped] == 0).all()
    assert y.shape == x.shape


@pytest.mark.parametrize("inplace", [False, True])
def test_dropping_everything_is_zero(on, inplace):
    x = torch.tensor([float("nan"), float("inf"), -1.0], requires_grad=True)
    y = F.dropout(x * 1, 1.0, inplace=inplace)
    y.sum().backward()
    assert_equal((y.detach(), x.grad), (torch.zeros(3), torch.zeros(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_dtypes_are_fastdrops(on, dtype):
    x = torch.randn(70, dtype=dtype)
    assert_equal(under(3, torchs, x), under(3, ours, x))


def test_script_is_fastdrops(on, x):
    @torch.jit.script
    def scripted(x):
        return F.dropout(x, 0.4)

    for seed in range(4):
        assert_equal(under(seed, scripted, x), under(seed, ours, x))


def multihead(need_weights):
    def call(x):
        module = nn.MultiheadAttention(WIDTH, HEADS, 0.4, batch_first=True)
        return lambda: module(x, x, x, need_weights=need_weights)

    return call


def attention(x):
    x = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4)


def recurrent(kind):
    def call(x):
        module = kind(WIDTH, WIDTH, 3, batch_first=True, dropout=0.4)
        return lambda: module(x)

    return call


def encoder(norm_first):
    def call(x):
        module = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.4, batch_first=True, norm_first=norm_first)
        return lambda: module(x)

    return call


def decoder(x):
    module, memory = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, 0.4, batch_first=True), torch.randn(2, MEMORY, 16)
    return lambda: module(x, memory)


WEIGHTS, STREAM = BATCH * HEADS * LENGTH**2, BATCH * LENGTH * WIDTH
ENCODER = [WEIGHTS, STREAM, BATCH * LENGTH * HIDDEN, STREAM]

# What draws dropout inside of torch, and how many elements each of its dropouts has, in order.
MODULES = {
    "attention": (attention, [WEIGHTS]),
    "MultiheadAttention with weights": (multihead(True), [WEIGHTS]),
    "MultiheadAttention without weights": (multihead(False), [WEIGHTS]),
    "LSTM": (recurrent(nn.LSTM), [STREAM, STREAM]),
    "GRU": (recurrent(nn.GRU), [STREAM, STREAM]),
    "RNN": (recurrent(nn.RNN), [STREAM, STREAM]),
    "TransformerEncoderLayer": (encoder(False), ENCODER),
    "TransformerEncoderLayer norm_first": (encoder(True), ENCODER),
    "TransformerDecoderLayer": (decoder, [WEIGHTS, STREAM, BATCH * HEADS * LENGTH * MEMORY, STREAM, *ENCODER[2:]]),
}


@pytest.mark.parametrize("name", MODULES)
def test_module_keeps_fastdrops_bits(on, name):
    """One seed from torch's generator for each dropout, and nothing of it kept but its packed mask."""
    make, sizes = MODULES[name]
    call = make(torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True))
    kept = under(5, saved, call)
    state = torch.get_rng_state()
    seeds = under(5, lambda: [int(torch.empty((), dtype=torch.int64).random_()) for _ in sizes])
    assert torch.equal(torch.get_rng_state(), state)
    words = [t for t in kept if t.dtype == torch.int32]
    expected = [fd.draw_mask(n, 0.4, rng=seed).words for n, seed in zip(sizes, seeds, strict=True)]
    assert [t.numel() for t in words] == [w.size for w in expected]
    for t, w in zip(words, expected, strict=True):
        assert (t.numpy().view("uint32") == w).all()
    assert not any(t.dtype == torch.bool for t in kept)


@pytest.mark.parametrize("name", MODULES)
def test_module_without_it_keeps_torchs_masks(name):
    make, _ = MODULES[name]
    assert not [t for t in saved(make(torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True))) if t.dtype == torch.int32]


def test_attention_equals_that_by_hand(on):
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(3))

    def by_hand(q):
        return fdt.dropout((q @ k.transpose(-2, -1) / 8**0.5).softmax(-1), 0.4) @ v

    def torchs(q):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)

    torch.testing.assert_close(run(torchs, 3, q), run(by_hand, 3, q))


def test_attention_keeps_its_weights_once(on):
    """Packed bits, and the weights before dropout; torch's keeps those after it too."""
    q, k, v = (torch.randn(2, 4, 64, 8, requires_grad=True) for _ in range(3))
    kept = saved(lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.4))
    new = [t.nbytes for t in kept if not any(t is x for x in (q, k, v))]
    assert sorted(new) == [2 * 4 * 64 * 64 // 8, 2 * 4 * 64 * 64 * 4]


def test_attention_without_dropout_is_torchs(on):
    q, k, v = (torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3))
    y = F.scaled_dot_product_attention(q, k, v)
    assert "Flash" in y.grad_fn.name()
    fdt.disable()
    assert_equal(y, F.scaled_dot_product_attention(q, k, v))


def test_attention_of_other_tensors_is_torchs():
    """Nested tensors, whose mask may be ours, and what torch refuses."""
    nested = torch.nested.nested_tensor([torch.ones(3, 2, 4), torch.ones(5, 2, 4)], layout=torch.jagged)

    def attend(x, p, training):
        return F.scaled_dot_product_attention(x, x, x, dropout_p=p)

    def outcomes():
        y = attend(nested.transpose(1, 2), 0.4, True)
        refused, _ = outcome(lambda: torch.ones(2, 4, 8, dtype=torch.int64), attend, 0.4, True)
        return type(y), [part.shape for part in y.unbind()], refused

    expected = outcomes()
    assert expected[1] == [(2, 3, 4), (2, 5, 4)]
    with fdt.enabled():
        assert outcomes() == expected


ATTENTION_ROUTES = {  # what has it in one piece; elsewhere torch composes it
    "autocast": {"attend"},
    "vmap": set(),
    "grad": set(),
    "compile": {"trace"},
    "mask with a gradient": {"attend"},
    "few scores": set(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ATTENTION_ROUTES)
def test_attention_among_torchs_other_features(on, monkeypatch, case):
    """Under the mask of `fdt.dropout`, in one piece or as torch composes it."""
    routes = set()

    def noted(name, function):
        def call(*args):
            routes.add(name)
            return function(*args)

        return call

    for name in ("attend", "trace"):
        monkeypatch.setattr(enable, name, noted(name, getattr(enable, name)))
    scores = 2 * 3 * 5 * 5
    monkeypatch.setattr(enable, "FEWEST_SCORES", scores + (case == "few scores"))
    x, mask = torch.randn(2, 3, 5, 8), torch.randn(5, 5, requires_grad=case == "mask with a gradient")

    def attend(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            return F.scaled_dot_product_attention(x, x * 2, x, mask, dropout_p=0.4)

    def by_hand(x):
        y = x.bfloat16().float() if case == "autocast" else x
        return fdt.dropout((y @ y.mT * 2 / 8**0.5 + mask).softmax(-1), 0.4) @ y

    def both_gradients(function):
        mask.grad = None
        y, dx = run(function, 3, x)
        return y.float(), dx, mask.grad

    if case == "vmap":
        theirs, ours = (under(3, vmap(f, randomness="same"), torch.stack([x, -x])) for f in (attend, by_hand))
    elif case == "grad":
        theirs, ours = (under(3, grad(lambda x, f=f: f(x).sin().sum()), x) for f in (attend, by_hand))
    else:
        function = torch.compile(attend, backend="aot_eager", fullgraph=True) if case == "compile" else attend
        theirs, ours = both_gradients(function), both_gradients(by_hand)
        torch.compiler.reset()
    assert routes == ATTENTION_ROUTES[case]
    tolerance = {"rtol": 0.02, "atol": 0.06} if case == "autocast" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(theirs, ours, **tolerance)


@pytest.mark.parametrize("masks", ["none", "padding", "attention", "both", "causal"])
def test_multihead_attention_is_the_same_with_weights_and_without(on, monkeypatch, masks):
    """In one piece, or composed by torch's module around dropout."""
    monkeypatch.setattr(enable, "FEWEST_SCORES", 0)
    module = nn.MultiheadAttention(WIDTH, HEADS, 0.4, batch_first=True)
    options = {}
    if masks in ("padding", "both"):
        options["key_padding_mask"] = torch.arange(LENGTH).expand(BATCH, LENGTH) > torch.tensor([[3], [4]])
    if masks in ("attention", "both"):
        options["attn_mask"] = torch.randn(LENGTH, LENGTH) > 1
    if masks == "causal":
        options |= {"attn_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH), "is_causal": True}
    x = torch.randn(BATCH, LENGTH, WIDTH)
    results = [
        run(lambda x, need=need: module(x, x, x, need_weights=need, **options)[0], 3, x) for need in (False, True)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["LSTM", "GRU"])
def test_recurrent_layers_equal_those_by_hand(on, kind):
    stack = kind(6, 7, 2, dropout=0.4).double()
    first, second = kind(6, 7).double(), kind(7, 7).double()
    first.load_state_dict({name: p for name, p in stack.state_dict().items() if name.endswith("l0")})
    second.load_state_dict({name.replace("l1", "l0"): p for name, p in stack.state_dict().items() if "l1" in name})
    x = torch.randn(5, 3, 6).double()
    expected = run(lambda x: second(fdt.dropout(first(x)[0], 0.4))[0], 3, x)
    torch.testing.assert_close(run(lambda x: stack(x)[0], 3, x), expected)
    stack.dropout = 1.0
    torch.testing.assert_close(stack(x)[0], second(torch.zeros(5, 3, 7).double())[0])


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_dropping_everything_is_its_bias(on, need_weights):
    module = nn.MultiheadAttention(WIDTH, HEADS, 1.0, batch_first=True)
    nn.init.normal_(module.out_proj.bias)
    x = torch.full((BATCH, LENGTH, WIDTH), 3.0)
    y, _ = module(x, x, x, need_weights=need_weights)
    assert_equal(y, module.out_proj.bias.detach().expand_as(y) + 0 * y.detach())


def test_transformer_layer_equals_the_converted_one(on):
    """Two ways to the same masks."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.4, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    expected = run(layer, 3, x)
    fdt.convert(layer)
    assert_equal(run(layer, 3, x), expected)


@pytest.mark.parametrize("call", CALLS)
def test_evaluation_and_p_0_return_the_input(on, x, call):
    state = torch.get_rng_state()
    for p, training in ((0.4, False), (0.0, True)):
        assert_equal(F.dropout(x, p, training), x)
        assert F.dropout(x, p, training) is x
        assert F.dropout(x, p, training, inplace=True) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_no_grad_and_inference_mode_are_fastdrops(on, x):
    expected = under(3, ours, x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_equal(under(3, torchs, x).clone(), expected)
            assert_equal(under(3, torchs, x * 1).clone(), expected)
            own = x * 1
            assert under(3, lambda own=own: F.dropout(own, 0.4, inplace=True)) is own
            assert_equal(own.clone(), expected)


def test_in_place_on_a_leaf_is_refused(on, x):
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        F.dropout(leaf, 0.4, inplace=True)
    assert_equal(leaf.detach(), x)


def test_autocast_is_fastdrops(on, x):
    linear = nn.Linear(16, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = linear(x)
        y = under(3, torchs, hidden)
    assert y.dtype == torch.bfloat16
    assert_equal(y, under(3, ours, hidden))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpoint_changes_nothing(on, x, use_reentrant):
    def function(x):
        return torchs(torchs(x.sin()) * x)

    expected = run(lambda x: ours(ours(x.sin()) * x), 3, x)
    assert_equal(run(function, 3, x), expected)
    assert_equal(run(lambda x: checkpoint(function, x, use_reentrant=use_reentrant), 3, x), expected)


def test_threads_have_the_gradients_of_their_masks(on):
    x, wrong = torch.ones(300, 300), []

    def work():
        for _ in range(20):
            z = x.clone().requires_grad_()
            y = F.dropout(z, 0.5)
            y.sum().backward()
            if not torch.equal(z.grad, y.detach()) or not 40_000 < int((y == 0).sum()) < 50_000:
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- on, off ----


def test_import_changes_nothing():
    printed = output_of(
        "import torch\n"
        "def registrations(): return set(torch._C._dispatch_get_registrations_for_dispatch_key(''))\n"
        "before = registrations()\n"
        "torch.manual_seed(0)\n"
        "y = torch.nn.functional.dropout(torch.ones(99))\n"
        "import fastdrop.torch\n"
        "torch.manual_seed(0)\n"
        "assert torch.equal(y, torch.nn.functional.dropout(torch.ones(99)))\n"
        "print(sorted(n for n in registrations() - before if not n.startswith('fastdrop::')))"
    )
    assert printed == "[]"


def signature(x):
    """All that a caller can see of torch's dropouts: values, gradients, generator, bytes kept."""
    results = []
    for call in (*CALLS.values(), *(theirs for theirs, _ in OTHERS.values())):
        results += [*run(call, 7, x), torch.get_rng_state()]
        results.append(torch.tensor([t.nbytes for t in saved(call, x.clone().requires_grad_())]))
    results.append(under(7, vmap(torchs, randomness="different"), x))
    results.append(under(7, grad(lambda x: torchs(x).sin().sum()), x))
    results.append(under(7, TRANSFORMS["vmap unbatched"], torchs, x))
    return tuple(results)


SIGNATURES = """
import torch, fastdrop.torch as fdt
from tests.torch.models.test_enable import signature
x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
before = signature(x)
fdt.enable()
during = signature(x)
fdt.disable()
print([all(map(torch.equal, before, other)) for other in (during, signature(x))])
"""


def test_disable_leaves_torch_as_it_was():
    """As it was before fastdrop's kernels were registered."""
    assert output_of(SIGNATURES) == "[False, True]"


def test_enable_twice_and_disable_twice(x):
    fdt.enable()
    fdt.enable()
    assert_equal(under(1, torchs, x), under(1, ours, x))
    fdt.disable()
    assert not is_ours()
    fdt.disable()
    fdt.enable()
    assert_equal(under(1, torchs, x), under(1, ours, x))


def test_enabled_nests_and_restores(x):
    with fdt.enabled():
        with fdt.enabled():
            assert is_ours()
        assert is_ours()
        assert_equal(under(1, torchs, x), under(1, ours, x))
    assert not is_ours()
    fdt.enable()
    with fdt.enabled():
        pass
    assert is_ours()


def test_enabled_ends_with_an_exception():
    with pytest.raises(KeyError), fdt.enabled():
        raise KeyError
    assert not is_ours()


def test_enabled_decorates(x):
    @fdt.enabled()
    def function(x):
        assert is_ours()
        return torchs(x)

    for seed in range(2):
        assert_equal(under(seed, function, x), under(seed, ours, x))
        assert not is_ours()


def test_graph_recorded_while_enabled_has_its_gradient_afterwards(x):
    with fdt.enabled():
        z = x.clone().requires_grad_()
        y = under(1, torchs, z)
    y.sin().sum().backward()
    assert_equal((y.detach(), z.grad), run(ours, 1, x))


TOUCHED = """
import torch, fastdrop.torch as fdt
ours = ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA")
keys = (*ours, "FuncTorchDynamicLayerFrontMode", "XPU", "Meta", "CompositeImplicitAutograd")
dump = torch._C._dispatch_get_registrations_for_dispatch_key
before = {key: set(dump(key)) for key in keys}
fdt.enable()
added = {key: sorted(set(dump(key)) - before[key]) for key in keys}
fdt.disable()
with fdt.enabled():
    assert {key: sorted(set(dump(key)) - before[key]) for key in keys} == added
print(added)
"""


def test_only_dropout_is_touched_and_once():
    added = ast.literal_eval(output_of(TOUCHED))
    for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
        assert added.pop(key) == sorted(OPERATORS if "CPU" in key else DROPOUTS)
    assert not any(added.values())


@pytest.mark.parametrize(
    "other",
    [
        lambda x: torch.native_dropout(x, 0.4, True)[0],
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: F.rrelu(x, training=True),
    ],
    ids=["native_dropout", "bernoulli", "rrelu"],
)
def test_other_random_operators_stay_torchs(x, other):
    expected = under(3, other, x)
    with fdt.enabled():
        assert_equal(under(3, other, x), expected)


# ---- tensors that are not ours ----

FOREIGN = {
    "int64": lambda: torch.ones(4, dtype=torch.int64),
    "bool": lambda: torch.ones(4, dtype=torch.bool),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(30), torch.ones(20)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(30), torch.ones(20)], layout=torch.jagged),
    "mkldnn": lambda: torch.ones(4).to_mkldnn(),
    "float8": lambda: torch.ones(4).to(torch.float8_e5m2),
    "complex32": lambda: torch.ones(4).to(torch.complex32),
}


def plain(x):
    """As something that compares."""
    if x.is_nested:
        return [part.tolist() for part in x.unbind()]
    if x.is_quantized:
        return x.int_repr().tolist(), x.q_scale()
    x = x.detach()
    x = x.to_dense() if x.layout is not torch.strided else x
    return str(x.dtype), x.float().tolist() if not x.is_complex() else x.to(torch.complex64).tolist()


def outcome(make, function, p, training):
    """What is returned or raised, the state of the generator after it, and whether the input was written."""
    torch.manual_seed(3)
    x = make()
    try:
        y = function(x, p, training)
        result = plain(y), y is x, plain(x)
    except Exception as error:
        result = type(error), str(error)
    return result, torch.get_rng_state().tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("p", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("function", [torch.dropout, torch.dropout_], ids=["out of place", "in place"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_tensors_get_what_torch_gives(kind, function, p, training):
    expected = outcome(FOREIGN[kind], function, p, training)
    with fdt.enabled():
        assert outcome(FOREIGN[kind], function, p, training) == expected


@pytest.mark.filterwarnings("ignore")
def test_nested_tensors_have_torchs_gradient():
    def gradient():
        x = FOREIGN["nested"]().requires_grad_()
        torch.manual_seed(3)
        y = F.dropout(x, 0.5)
        y.backward(y.detach().clone())
        return plain(x.grad)

    expected = gradient()
    with fdt.enabled():
        assert gradient() == expected


@pytest.mark.parametrize("function", [torch.dropout, torch.dropout_, F.dropout], ids=["out of place", "in place", "F"])
def test_bad_p_is_refused_as_torch_refuses_it(function):
    def outcomes():
        return [
            outcome(lambda: torch.ones(4), function, p, training)
            for p in (-0.1, 1.5, float("nan"))
            for training in (True, False)
        ]

    expected = outcomes()
    assert all(result[0] in (RuntimeError, ValueError) for result, _ in expected)
    with fdt.enabled():
        assert outcomes() == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["int64", "float8"])
def test_other_tensors_under_vmap_get_what_torch_gives(kind):
    def mapped(x, p, training):
        return vmap(lambda x: torch.dropout(x, p, training), randomness="different")(x)

    expected = [outcome(FOREIGN[kind], mapped, 0.5, training) for training in (True, False)]
    with fdt.enabled():
        assert [outcome(FOREIGN[kind], mapped, 0.5, training) for training in (True, False)] == expected


def test_meta_and_fake_tensors_work_as_with_torch():
    x = torch.ones(3, 5)
    with fdt.enabled():
        for y in (torchs(x.to("meta")), vmap(torchs, randomness="different")(x.to("meta"))):
            assert (y.device.type, y.shape) == ("meta", x.shape)
        with FakeTensorMode():
            assert torchs(torch.ones(3, 5)).shape == x.shape


def test_fake_tensors_outside_of_their_mode_work_as_with_torch():
    fake = FakeTensorMode().from_tensor(torch.ones(3, 5))
    assert torchs(fake).shape == (3, 5)
    with fdt.enabled():
        assert torchs(fake).shape == (3, 5)


# ---- transforms ----

TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f, randomness="same")(x),
    "hessian": lambda f, x: jacfwd(jacrev(lambda x: f(x).pow(3).sum()), randomness="same")(x[0]),
    "vmap same": lambda f, x: vmap(f, randomness="same")(x),
    "vmap different": lambda f, x: vmap(f, randomness="different")(x),
    "vmap unbatched": lambda f, x: vmap(lambda s: f(x) * s, randomness="different")(x[0]),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sin().sum()), randomness="different")(x),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f, randomness="different")(x).sin().sum())(x),
}


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_equals_that_of_fastdrop(on, x, transform, inplace):
    if inplace and transform == "vmap unbatched":
        pytest.skip("torch refuses to write several masks into one input")

    def torchs(x):
        return F.dropout(x * 1, 0.4, inplace=inplace)

    for seed in range(2):
        expected = under(seed, TRANSFORMS[transform], ours, x)
        assert_equal(under(seed, TRANSFORMS[transform], torchs, x), expected)
        assert (expected[0] == 0).any()


def test_dual_numbers_have_the_tangent_of_the_mask(on, x):
    with fwAD.dual_level():
        primal, tangent = fwAD.unpack_dual(under(3, torchs, fwAD.make_dual(x, x.cos())))
    assert_equal(primal, under(3, ours, x))
    assert_equal(tangent, under(3, ours, x.cos()))


def test_vmap_error_has_torchs_text(x):
    def text():
        with pytest.raises(RuntimeError) as raised:
            vmap(torchs)(x)
        return str(raised.value)

    expected = text()
    with fdt.enabled():
        assert text() == expected


def test_hessian_with_default_randomness_is_refused_as_torch_refuses_it(x):
    with pytest.raises(RuntimeError, match="randomness error mode"):
        hessian(lambda x: torchs(x).pow(3).sum())(x)
    with fdt.enabled(), pytest.raises(RuntimeError, match="randomness error mode"):
        hessian(lambda x: torchs(x).pow(3).sum())(x)


def test_functionalize_works_as_with_torch(x):
    assert functionalize(torchs)(x).shape == x.shape
    with fdt.enabled():
        y = functionalize(torchs)(x)
    assert ((y == 0) | torch.isclose(y, x / 0.6)).all()


# ---- compilers ----


def forget_all():
    """Of earlier tests: what they compiled, and which kernels torch's dispatcher for tracing found for dropout."""
    torch.compiler.reset()
    for operator in OPERATORS:
        getattr(torch.ops.aten, operator.removeprefix("aten::")).default._dispatch_cache.clear()


@pytest.fixture
def compiler():
    """Without torch's cache on disk of what other versions compiled."""
    forget_all()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch.compiler.reset()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    forget_all()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler, on, x, backend):
    def function(x):
        return F.dropout(F.dropout(x, 0.4), 0.2, inplace=True)

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for seed in range(3):
        expected = run(lambda x: fdt.dropout(fdt.dropout(x, 0.4), 0.2), seed, x)
        assert_equal(run(function, seed, x), expected)
        torch.testing.assert_close(run(compiled, seed, x), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", OTHERS)
def test_other_dropouts_compiled_equal_eager(compiler, on, x, call):
    theirs, ours = OTHERS[call]
    compiled = torch.compile(theirs, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        torch.testing.assert_close(run(compiled, seed, x), run(ours, seed, x))


@pytest.mark.filterwarnings("ignore")
def test_compiled_layer_equals_eager(compiler, on):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.4, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, 3, x), run(layer, 3, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_before_and_after_follows_the_state(cache, x, backend):
    """With torch's caches, in memory and on disk, as they are."""
    compiled = torch.compile(torchs, backend=backend)
    before = under(3, compiled, x)
    for _ in range(2):
        with fdt.enabled():
            assert_equal(under(3, compiled, x), under(3, ours, x))
        assert_equal(under(3, compiled, x), before)
    assert not torch.equal(before == 0, under(3, ours, x) == 0)


COMPILE = """
import torch
torch.manual_seed(0)
y = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5), backend="inductor")(torch.ones(64, 64))
print((y == 0).int().flatten().tolist())
"""
ENABLE = "import fastdrop.torch; fastdrop.torch.enable()\n"
FORGET = "torch.compiler.reset()\n"


def test_caches_on_disk_are_not_shared_between_the_states(tmp_path):
    """One process after the other; the second hears of fastdrop only once it has compiled without.

    For the plainest of instruction sets, which the compiler need not try out first.
    """
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    fastdrops = str((under(0, fdt.dropout, torch.ones(64, 64)) == 0).int().flatten().tolist())
    assert output_of(ENABLE + COMPILE, **cache) == fastdrops
    without, enabled = output_of(COMPILE + ENABLE + FORGET + COMPILE, **cache).splitlines()
    assert without != fastdrops
    assert enabled == fastdrops


COMPILED_TRANSFORMS = {
    "vmap same": TRANSFORMS["vmap same"],
    "vmap different": TRANSFORMS["vmap different"],
    "vmap unbatched": TRANSFORMS["vmap unbatched"],
    "grad": TRANSFORMS["grad"],
    "jvp": TRANSFORMS["jvp"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", COMPILED_TRANSFORMS)
def test_compiled_transform_works_as_with_torch(compiler, x, transform):
    """Enabled, what could be compiled can be compiled, and is right."""

    def function(x):
        return COMPILED_TRANSFORMS[transform](torchs, x)

    torch.compile(function, backend="aot_eager")(x)
    with fdt.enabled():
        expected = under(3, function, x)
        assert_equal(under(3, torch.compile(function, backend="aot_eager"), x), expected)


@pytest.mark.filterwarnings("ignore")
def test_export_follows_the_state(compiler, x):
    module = nn.Sequential(nn.Linear(16, 20), nn.Dropout(0.4))

    def programs():
        exported = torch.export.export(module, (x,))
        return exported, exported.run_decompositions()

    for _ in range(2):
        for program in programs():
            assert not any("fastdrop" in str(node.target) for node in program.graph.nodes)
            assert_equal(run(program.module(), 3, x), run(module, 3, x))
        with fdt.enabled():
            exported, decomposed = programs()
            assert any("fastdrop" in str(node.target) for node in decomposed.graph.nodes)
            for program in (exported, decomposed):
                assert_equal(run(program.module(), 3, x), run(module, 3, x))


DTENSOR = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
import fastdrop.torch as fdt
dist.init_process_group("gloo", init_method="file://" + {path!r}, rank=0, world_size=1)
x = DTensor.from_local(torch.ones(100), init_device_mesh("cpu", (1,)), [Shard(0)])
torch.manual_seed(0)
before = torch.nn.functional.dropout(x, 0.5).to_local()
with fdt.enabled():
    torch.manual_seed(0)
    print(torch.equal(torch.nn.functional.dropout(x, 0.5).to_local(), before))
dist.destroy_process_group()
"""


def test_dtensor_keeps_torchs_dropout(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    assert output_of(DTENSOR.format(path=str(tmp_path / "store"))) == "True"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Bert", "GPT2"])
def test_model_of_another_library(kind):
    """Its dropout is fastdrop's: under the same seed it draws other masks than torch's, and keeps packed bits alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "Bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        model = transformers.BertModel(config)
    else:
        model = transformers.GPT2Model(transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    tokens = torch.randint(50, (2, 16))

    def run():
        words = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (words.append(t.dtype is torch.int32), t)[1], lambda t: t
        ):
            out = model.train()(input_ids=tokens).last_hidden_state
        out.sum().backward()
        return out.detach(), sum(words)

    torchs, none = run()
    with fdt.enabled():
        ours, masks = run()
        again, _ = run()
        evaluated = model.eval()(input_ids=tokens).last_hidden_state
    assert torch.equal(ours, again)
    assert not torch.equal(ours, torchs)
    assert (none, masks) == (0, 1 + 2 * 3)  # of the embedding, and three of each layer
    assert torch.equal(evaluated, model.eval()(input_ids=tokens).last_hidden_state)
