"""torch's own dropout on fastdrop: reached from everywhere while enabled, and torch as it was when not."""

from __future__ import annotations

import ast
import contextlib

import pytest

import fastdrop as fd
from fastdrop import backends

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.functional import attention
from fastdrop.torch.models import enable
from fastdrop.torch.runtime import context

from ...cases import output_of, primitive_modules
from ..cases import assert_equal, gradient, saved_tensors, under

NAMES = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
DROPOUTS = tuple(f"{name}{inplace}" for name in NAMES for inplace in ("", "_"))
ATTENTION = "scaled_dot_product_attention"
BATCH, LENGTH, WIDTH, HEADS, HIDDEN, MEMORY = 2, 5, 16, 2, 32, 7


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


def torchs(x):
    """Torch's dropout, which is ours while enabled."""
    return F.dropout(x, 0.4)


def ours(x):
    return fdt.dropout(x, 0.4)


# ---- every way to torch's dropouts ----

FUNCTIONS = {
    "dropout": (16,),
    "dropout1d": (16,),  # without a batch
    "dropout2d": (4, 2, 2),
    "dropout3d": (2, 2, 2, 2),
    "alpha_dropout": (16,),
    "feature_alpha_dropout": (4, 4),
}


def functions_of(name, shape, inplace):
    """A dropout of torch's and the same of ours."""

    def theirs(x):
        return getattr(F, name)(x.unflatten(-1, shape) * 1, 0.4, True, inplace)

    return theirs, lambda x: getattr(fdt, name)(x.unflatten(-1, shape), 0.4, True)


# Each way to one of aten's ops: torch's, and what it is while enabled.
WAYS = {
    name + "_" * inplace: functions_of(name, shape, inplace)
    for name, shape in FUNCTIONS.items()
    for inplace in (False, True)
} | {
    "torch.ops": (lambda x: torch.ops.aten.dropout(x, 0.4, True), ours),
    "nn.Dropout": (nn.Dropout(0.4), ours),
    "script": (torch.jit.script(torchs), ours),
}


@pytest.mark.parametrize("way", WAYS)
def test_call_is_fastdrops(on, x, way):
    """Values, gradients and the packed bits that are kept, and nothing else of that size."""
    theirs, ours = WAYS[way]
    for seed in range(3):  # a script is compiled again after the first calls
        with saved_tensors() as kept:
            actual = under(seed, gradient, theirs, x)
        with saved_tensors() as expected_kept:
            assert_equal(actual, under(seed, gradient, ours, x))
    words = [t.nbytes for t in kept if t.dtype == torch.int32]
    assert words == [t.nbytes for t in expected_kept if t.dtype == torch.int32] != []
    assert not any(t.dtype == torch.bool for t in kept)


SURROUNDINGS = {
    "autocast": lambda x: torch.autocast("cpu")(torchs)(x),
    "checkpoint": lambda x: checkpoint(torchs, x, use_reentrant=False),
    "reentrant checkpoint": lambda x: checkpoint(torchs, x * 1, use_reentrant=True),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_nothing(on, x, name):
    assert_equal(under(1, gradient, SURROUNDINGS[name], x), under(1, gradient, ours, x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_evaluation_and_p_0_return_the_input(on, name):
    x, function = torch.randn(4, *FUNCTIONS[name]), getattr(F, name)
    state = torch.get_rng_state()
    for p, training in ((0.4, False), (0.0, True)):
        for inplace in (False, True):
            y = function(x, p, training, inplace)
            assert y is x or name == "dropout1d"  # torch adds a batch to it
            assert_equal(y, x)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_graph_and_for_each_dtype(on, x):
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                own = x.to(dtype).clone()
                expected = under(3, ours, own)
                assert_equal(under(3, torchs, own).clone(), expected.clone())
                assert under(3, lambda own=own: F.dropout(own, 0.4, inplace=True)) is own
                assert_equal(own.clone(), expected.clone())


# ---- inside of torch's modules ----


def test_module_keeps_fastdrops_bits(on):
    """One seed from torch's generator for each dropout, and nothing of it kept but its packed mask."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, 0.4, batch_first=True)
    x, memory = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True), torch.randn(BATCH, MEMORY, WIDTH)
    with saved_tensors() as kept:
        under(5, layer, x, memory)
    state = torch.get_rng_state()
    scores, stream = BATCH * HEADS * LENGTH, BATCH * LENGTH * WIDTH
    sizes = [scores * LENGTH, stream, scores * MEMORY, stream, BATCH * LENGTH * HIDDEN, stream]
    seeds = under(5, lambda: [int(torch.empty((), dtype=torch.int64).random_()) for _ in sizes])
    assert torch.equal(torch.get_rng_state(), state)
    words = [t.numpy().view("uint32").tolist() for t in kept if t.dtype == torch.int32]
    assert words == [fd.draw_mask(n, 0.4, rng=seed).words.tolist() for n, seed in zip(sizes, seeds, strict=True)]
    assert not any(t.dtype == torch.bool for t in kept)


def test_recurrent_layers_equal_those_by_hand(on):
    stack = nn.LSTM(6, 7, 2, dropout=0.4).double()
    first, second = nn.LSTM(6, 7).double(), nn.LSTM(7, 7).double()
    first.load_state_dict({name: p for name, p in stack.state_dict().items() if name.endswith("l0")})
    second.load_state_dict({name.replace("l1", "l0"): p for name, p in stack.state_dict().items() if "l1" in name})
    x = torch.randn(5, 3, 6).double()
    expected = under(3, gradient, lambda x: second(fdt.dropout(first(x)[0], 0.4))[0], x)
    torch.testing.assert_close(under(3, gradient, lambda x: stack(x)[0], x), expected)


# ---- attention ----


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
    "slow backend": set(),
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
    monkeypatch.setattr(enable, "FEWEST_SCORES", 5 * 5 + (case == "few scores"))
    if case == "slow backend":
        monkeypatch.setattr(backends, "is_vectorized", lambda: False)
    x, mask = torch.randn(2, 3, 5, 8), torch.randn(5, 5, requires_grad=case == "mask with a gradient")

    def attend(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            return F.scaled_dot_product_attention(x, x * 2, x, mask, dropout_p=0.4)

    def by_hand(x):
        y = x.bfloat16().float() if case == "autocast" else x
        return fdt.dropout((y @ y.mT * 2 / 8**0.5 + mask).softmax(-1), 0.4) @ y

    def both_gradients(function):
        mask.grad = None
        y, dx = under(3, gradient, function, x)
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


EXPLAINED = {  # enabled, shapes of query and key, p; what the answer says of fastdrop.torch's and of torch's
    "nothing dropped": (True, (4, 4, 32, 8), (4, 4, 32, 8), 0.0, "nothing is dropped", "nothing is dropped"),
    "off": (False, (4, 4, 32, 8), (4, 4, 32, 8), 0.1, "the kernel of backend", "enable() is off"),
    "on": (True, (4, 4, 32, 8), (4, 4, 32, 8), 0.1, "the kernel of backend", "the kernel of backend"),
    "small": (True, (2, 4, 15, 8), (2, 4, 17, 8), 0.1, "the kernel of backend", "fewer than 256 scores"),
    "broadcast": (True, (4, 4, 32, 8), (1, 4, 32, 8), 0.1, "heads or batches broadcast", "heads or batches broadcast"),
}


@pytest.mark.parametrize("case", EXPLAINED)
def test_explained_attention_is_what_runs(monkeypatch, case):
    on, of_query, of_key, p, ours, theirs = EXPLAINED[case]
    monkeypatch.setattr(backends, "is_vectorized", lambda: True)
    query, key = torch.randn(of_query), torch.randn(of_key)
    routes = []
    monkeypatch.setattr(enable, "attend", lambda *args: routes.append("attend") or args[0][2])
    with fdt.enabled() if on else contextlib.nullcontext():
        said = fdt.explain_attention(query, key, key, dropout_p=p).splitlines()
        F.scaled_dot_product_attention(query, key, key, dropout_p=p)
    assert said[0].startswith("fastdrop.torch's: ")
    assert said[1].startswith("torch's: ")
    assert ours in said[0]
    assert theirs in said[1]
    assert bool(routes) == said[1].endswith(f"the kernel of backend {backends.active_name()}")


SHARED = {  # by noise_shape for weights of five axes: what the answer says, and whether the kernel runs
    (1, 1, 1, None, None): ("the kernel of backend", True),
    (None, None, None, 1, None): ("the kernel of backend", True),
    (1, None, 1, None, None): ("composed of products of matrices and softmax_dropout, because noise_shape is 1", False),
    (1, None, 1, 1, 1): ("; it drops the result, because keys share a decision", True),
}


@pytest.mark.parametrize("noise_shape", SHARED)
def test_explained_attention_under_shared_masks_is_what_runs(monkeypatch, noise_shape):
    said, by_kernel = SHARED[noise_shape]
    x, routes = torch.randn(2, 2, 2, 16, 16), []
    for name in ("attend", "compose"):
        original = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *a, f=original, n=name: routes.append(n) or f(*a))
    for training in (False, True):
        options = {"dropout_p": 0.1, "noise_shape": noise_shape, "training": training}
        with fdt.enabled():
            ours, theirs = fdt.explain_attention(x, x, x, **options).splitlines()
            assert theirs == fdt.explain_attention(x, x, x, dropout_p=0.1).splitlines()[1]
        fdt.scaled_dot_product_attention(x, x, x, **options)
        assert (said if training else "nothing is dropped") in ours
        assert routes == ["attend" if by_kernel else "compose"] * training
    with pytest.raises(ValueError, match="noise_shape must"):
        fdt.explain_attention(x, x, x, dropout_p=0.1, noise_shape=(1, 1))


# ---- on, off ----


def test_enable_declines_where_numpy_runs_and_nobody_has_chosen_it(monkeypatch):
    for name in ("c", "numba"):
        monkeypatch.setattr(primitive_modules()[name], "unavailable", lambda: "there is no compiler")
    try:
        with fd.use_backend("auto"):
            with pytest.warns(RuntimeWarning, match=r"there is no compiler\n.*even_if_slower=True") as seen:
                fdt.enable()
            assert seen[0].filename == __file__
            assert not context.is_enabled_everywhere()
            fdt.enable(even_if_slower=True)
            assert context.is_enabled_everywhere()
        fdt.disable()
        with fd.use_backend("numpy"):
            fdt.enable()  # a warning would be an error
            assert context.is_enabled_everywhere()
    finally:
        fdt.disable()


LIFE = """
import sys
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

keys = ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA", "FuncTorchDynamicLayerFrontMode", "XPU", "Meta", "")
dump = torch._C._dispatch_get_registrations_for_dispatch_key
def registered():
    return {key: {name for name in dump(key) if name.startswith("aten::")} for key in keys}
def dropped(x):
    torch.manual_seed(0)
    return F.dropout(x)

before, y = registered(), dropped(torch.ones(99))
import fastdrop.torch as fdt
assert registered() == before, "import registers kernels"
assert torch.equal(y, dropped(torch.ones(99))), "import changes dropout"
from tests.torch.models.test_enable import signature
torchs = signature()
fdt.enable()
after = registered()
print({key: sorted(after[key] - before[key]) for key in keys if key})
assert not all(map(torch.equal, torchs, signature()))
fdt.disable()
with fdt.enabled():
    assert registered() == after, "kernels are registered twice"
assert all(map(torch.equal, torchs, signature())), "disabled, torch is another"

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[-1], rank=0, world_size=1)
x = DTensor.from_local(torch.ones(100), init_device_mesh("cpu", (1,)), [Shard(0)])
y = dropped(x).to_local()
with fdt.enabled():
    assert torch.equal(dropped(x).to_local(), dropped(torch.ones(100))), "DTensors are torch's"
assert torch.equal(dropped(x).to_local(), y), "DTensors are not torch's any more"
torch.distributed.destroy_process_group()
"""


def signature():
    """All that a caller can see of torch's dropouts: values, gradients, generator, bytes kept."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for call, _ in WAYS.values():
        with saved_tensors() as kept:
            results += [*under(7, gradient, call, x), torch.get_rng_state()]
        results.append(torch.tensor([t.nbytes for t in kept]))
    results.append(under(7, vmap(torchs, randomness="different"), x))
    results.append(under(7, TRANSFORMS["grad"], torchs, x))
    results.append(under(7, TRANSFORMS["vmap unbatched"], torchs, x))
    return tuple(results)


def test_state_of_a_process(tmp_path):
    """Import changes nothing, `enable` only dropout and once, and `disable` makes torch what it was before."""
    added = ast.literal_eval(output_of(LIFE.replace("sys.argv[-1]", repr(str(tmp_path / "store")))))
    dropouts = [f"aten::{name}" for name in DROPOUTS]
    for key in ("CPU", "AutogradCPU", "CUDA", "AutogradCUDA"):
        assert added.pop(key) == sorted([*dropouts, f"aten::{ATTENTION}"] if "CPU" in key else dropouts)
    assert not any(added.values())


def test_switches(x):
    """Twice, nested, left by an exception, as a decorator."""
    for switch, state in ((fdt.enable, True), (fdt.disable, False), (fdt.enable, True)):
        switch()
        switch()
        assert is_ours() is state
    with fdt.enabled():
        pass
    assert is_ours()
    fdt.disable()
    with fdt.enabled():
        with fdt.enabled():
            assert is_ours()
        assert is_ours()
    assert not is_ours()
    with pytest.raises(KeyError), fdt.enabled():
        raise KeyError
    assert not is_ours()
    for _ in range(2):
        assert_equal(under(1, fdt.enabled()(torchs), x), under(1, ours, x))
        assert not is_ours()


def test_graph_recorded_while_enabled_has_its_gradient_afterwards(x):
    with fdt.enabled():
        z = x.clone().requires_grad_()
        y = under(1, torchs, z)
    y.sin().sum().backward()
    assert_equal((y.detach(), z.grad), under(1, gradient, ours, x))


# ---- tensors that are not ours ----

FOREIGN = {
    "int64": lambda: torch.ones(4, dtype=torch.int64),
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


def mapped(x, p, training):
    return vmap(lambda x: torch.dropout(x, p, training), randomness="different")(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DROPOUTS, "under vmap"])
def test_what_is_not_ours_gets_what_torch_gives(name):
    """Dtypes, layouts, too few axes, complex numbers, a bad p: torch's result or torch's error."""
    kinds = ("int64", "float8") if name == "under vmap" else FOREIGN
    makes = [FOREIGN[kind] for kind in kinds]
    if "feature" in name:
        makes += [lambda: torch.ones(4), lambda: torch.ones(())]
    if "alpha" in name:
        makes.append(lambda: torch.ones(4, 4, dtype=torch.complex64))
    cases = [(make, p, training) for make in makes for p in (0.0, 0.5, 2.0) for training in (True, False)]
    cases += [(lambda: torch.ones(4, 4), p, training) for p in (-0.1, 1.5, float("nan")) for training in (True, False)]
    function = mapped if name == "under vmap" else getattr(torch, name)
    expected = [outcome(make, function, p, training) for make, p, training in cases]
    assert all(result[0] in (RuntimeError, ValueError) for result, _ in expected[-6:])
    with fdt.enabled():
        assert [outcome(make, function, p, training) for make, p, training in cases] == expected


def test_meta_and_fake_tensors_work_as_with_torch():
    x, fake = torch.ones(3, 5), FakeTensorMode().from_tensor(torch.ones(3, 5))
    with fdt.enabled():
        for y in (torchs(x.to("meta")), vmap(torchs, randomness="different")(x.to("meta"))):
            assert (y.device.type, y.shape) == ("meta", x.shape)
        assert torchs(fake).shape == (3, 5)  # outside of its mode
        with FakeTensorMode():
            assert torchs(torch.ones(3, 5)).shape == x.shape


# ---- transforms ----

TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sin().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "hessian": lambda f, x: jacfwd(jacrev(lambda x: f(x).pow(3).sum()), randomness="same")(x[0]),
    "vmap same": lambda f, x: vmap(f, randomness="same")(x),
    "vmap different": lambda f, x: vmap(f, randomness="different")(x),
    "vmap unbatched": lambda f, x: vmap(lambda s: f(x) * s, randomness="different")(x[0]),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sin().sum()), randomness="different")(x),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f, randomness="different")(x).sin().sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_equals_that_of_fastdrop(on, x, transform):
    def inplace(x):
        return F.dropout(x * 1, 0.4, inplace=True)

    expected = under(3, TRANSFORMS[transform], ours, x)
    assert (expected[0] == 0).any()
    assert_equal(under(3, TRANSFORMS[transform], torchs, x), expected)
    if transform != "vmap unbatched":  # torch refuses to write several masks into one input
        assert_equal(under(3, TRANSFORMS[transform], inplace, x), expected)


@pytest.mark.parametrize("way", WAYS)
def test_other_dropouts_under_transforms_are_fastdrops(on, x, way):
    for transform, given in (("jvp", x), ("vmap of grad", torch.stack([x, x.cos()]))):
        theirs, ours = (under(3, TRANSFORMS[transform], function, given) for function in WAYS[way])
        assert_equal(theirs, ours)


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


def test_functionalize_works_as_with_torch(x):
    with fdt.enabled():
        y = functionalize(torchs)(x)
    assert ((y == 0) | torch.isclose(y, x / 0.6)).all()


# ---- compilers ----


@pytest.fixture
def compiler():
    """Forgets what earlier tests compiled and the kernels that torch's dispatcher for tracing found for dropout."""
    torch.compiler.reset()
    for name in (*DROPOUTS, ATTENTION):
        getattr(torch.ops.aten, name).default._dispatch_cache.clear()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager(compiler, on, x):
    """All of them in one graph."""

    ways = [WAYS[name] for name in WAYS if name.endswith("_") or name == "nn.Dropout"]
    expected = under(3, gradient, lambda x: torch.cat([ours(x).flatten() for _, ours in ways]), x)
    compiled = torch.compile(
        lambda x: torch.cat([theirs(x).flatten() for theirs, _ in ways]), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(under(3, gradient, compiled, x), expected)


@pytest.mark.filterwarnings("ignore")
def test_compiled_before_and_after_follows_the_state(compiler, x):
    compiled = torch.compile(torchs, backend="aot_eager")
    before = under(3, compiled, x)
    for _ in range(2):
        with fdt.enabled():
            assert_equal(under(3, compiled, x), under(3, ours, x))
        assert_equal(under(3, compiled, x), before)
    assert not torch.equal(before == 0, under(3, ours, x) == 0)


COMPILE = """
import torch
torch.compiler.reset()
torch.manual_seed(0)
y = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5), backend="inductor")(torch.ones(64, 64))
print((y == 0).int().flatten().tolist())
"""
ENABLE, DISABLE = "import fastdrop.torch; fastdrop.torch.enable()\n", "fastdrop.torch.disable()\n"


def test_caches_on_disk_are_not_shared_between_the_states(tmp_path):
    """A process that hears of fastdrop only once it has compiled without it.

    The simplest of instruction sets is given, which the compiler need not try out first.
    """
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    before, enabled, after = output_of(COMPILE + ENABLE + COMPILE + DISABLE + COMPILE, **cache).splitlines()
    assert enabled == str((under(0, fdt.dropout, torch.ones(64, 64)) == 0).int().flatten().tolist())
    assert before == after != enabled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", ["vmap different", "jvp"])
def test_compiled_transform_works_as_with_torch(compiler, x, transform):
    """Enabled, what could be compiled can be compiled, and is right."""

    def function(x):
        return TRANSFORMS[transform](torchs, x)

    torch.compile(function, backend="aot_eager")(x)
    with fdt.enabled():
        expected = under(3, function, x)
        assert_equal(under(3, torch.compile(function, backend="aot_eager"), x), expected)


@pytest.mark.filterwarnings("ignore")
def test_export_follows_the_state(compiler, x):
    module = nn.Sequential(nn.Linear(16, 20), nn.Dropout(0.4))

    for state in (contextlib.nullcontext, fdt.enabled):
        with state():
            exported = torch.export.export(module, (x,))
            decomposed = exported.run_decompositions()
            ours = ["fastdrop" in str(node.target) for node in decomposed.graph.nodes]
            assert any(ours) == (state is fdt.enabled)
            for program in (exported, decomposed):
                assert_equal(under(3, gradient, program.module(), x), under(3, gradient, module, x))
