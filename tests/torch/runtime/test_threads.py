"""Switching and sampling while other threads work, and exceptions that arrive at any moment."""

from __future__ import annotations

import contextlib
import contextvars
import dis
import itertools
import subprocess
import sys
import threading
import types

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdrop.torch as fdt
from fastdrop.torch.runtime import context, seeds

from ...cases import ROOT, output_of
from ..cases import Wrapped, assert_equal, under


@pytest.fixture(autouse=True)
def torchs_dropout():
    yield
    fdt.disable()


def is_ours():
    with torch.random.fork_rng():
        return not F.dropout(torch.tensor([float("nan")]), 1.0).isnan().any()


def in_threads(*calls):
    """What calls return, made at once, each in a thread of its own."""
    results, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def work(i):
        barrier.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# ---- what ended the process ----

CRASHES = """
import sys, threading, torch
import torch.nn.functional as F
import fastdrop.torch as fdt
sys.setswitchinterval(1e-5)
wrong, x, drop = [], torch.ones(50), torch.nn.Dropout(0.5)
def while_another_drops(work, times, switch):
    stop = threading.Event()
    def attempt():
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            wrong.append(repr(error))
    thread = threading.Thread(target=attempt)
    thread.start()
    for _ in range(times):
        switch()
    stop.set()
    thread.join()
while_another_drops(lambda: F.dropout(x, 0.5), 1500, lambda: (fdt.enable(), fdt.disable()))
while_another_drops(lambda: drop(x), 30, lambda: fdt.mc_predict(torch.nn.Sequential(torch.nn.Dropout(0.5)), x, 1))
print(wrong)
"""


def test_switching_beside_a_thread_that_drops():
    assert output_of(CRASHES) == "[]"


@pytest.mark.slow("test_switching_beside_a_thread_that_drops")
def test_stress():
    """Switching, Monte Carlo, compiled calls and forks at once: see `stress`."""
    command = [sys.executable, "-m", "tests.stress", "--seconds", "8"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr


# ---- whose state it is ----


def test_enabled_is_for_its_thread():
    with fdt.enabled():
        assert is_ours()
        assert in_threads(is_ours, is_ours) == [False, False]
        assert not contextvars.Context().run(is_ours)
    fdt.enable()
    assert all(in_threads(is_ours, is_ours))


def test_recomputation_in_a_thread_of_autograds_sees_the_callers_state():
    """Checkpoints nested so deep that the engine goes on in another thread."""
    threads = set()

    def nested(x, depth):
        threads.add(threading.get_ident())
        if depth == 0:
            return F.dropout(x, 0.5)
        return checkpoint(nested, x, depth - 1, use_reentrant=True)

    with fdt.enabled():
        x = torch.ones(100, requires_grad=True)
        y = nested(x, 80)
        y.sum().backward()
    assert len(threads) > 1
    assert_equal(x.grad, y.detach())


@pytest.mark.filterwarnings("ignore")
def test_compiled_code_runs_in_the_state_it_was_compiled_in():
    """In one thread and in another, without compiling again for what was there before."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: F.dropout(x, 0.5), backend=backend, fullgraph=True)
    everything = torch.compile(lambda x: F.dropout(x, 1.0), backend="aot_eager", fullgraph=True)
    x = torch.full((9,), torch.nan)

    def drops(on):
        """Whether compiled dropout is fastdrop's where it is on or off."""
        with fdt.enabled() if on else contextlib.nullcontext():
            compiled(x)
            return not everything(x).isnan().any()

    for _ in range(2):
        assert drops(True)
        assert not drops(False)
        assert in_threads(lambda: drops(True), lambda: drops(False)) == [True, False]
    assert len(graphs) == 2
    torch.compiler.reset()


def test_state_lasts_in_a_copied_context():
    with fdt.enabled():
        copied = contextvars.copy_context()
    assert not is_ours()
    assert copied.run(is_ours)


@pytest.mark.parametrize("last_first", [False, True])
def test_blocks_end_in_any_order(last_first):
    """As those in generators do: one that ends leaves the others as they are."""
    models = [nn.Dropout().eval(), nn.Dropout().eval()]

    def block(model):
        with fdt.mc_dropout(model), fdt.enabled():
            yield

    blocks = {model: block(model) for model in models}
    for each in blocks.values():
        next(each)
    ended, other = reversed(models) if last_first else models
    blocks[ended].close()
    assert (ended.training, other.training, is_ours()) == (False, True, True)
    blocks[other].close()
    assert (ended.training, other.training, is_ours()) == (False, False, False)


class Property(nn.Module):
    deleted = False

    @property
    def training(self):
        return False

    @training.setter
    def training(self, mode):
        pass

    @training.deleter
    def training(self):
        self.deleted = True


def test_attributes_are_deleted_as_before():
    """On classes that `mc_dropout` has met."""
    model, own = nn.Dropout(), Property()
    with fdt.mc_dropout(nn.ModuleList([model, own]), filter=lambda path, module: True):
        pass
    del model.training
    with pytest.raises(AttributeError, match="'Dropout' object has no attribute 'training'"):
        del model.training
    del own.training
    assert own.deleted


# ---- Monte Carlo ----


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.drop(x))


def test_code_compiled_after_sampling_is_for_all_instances():
    fdt.mc_predict(nn.Dropout(0.5), torch.ones(4), 2)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    models, x = [Holder().eval() for _ in range(4)], torch.ones(99)
    for model in models:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    compiled = torch.compile(models[0], backend="eager", fullgraph=True)
    for _ in range(2):
        with fdt.mc_dropout(models[0]):
            assert not compiled(x).equal(x)
        assert_equal(compiled(x), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch.compiler.reset()


def test_training_is_read_the_short_way_after_sampling(monkeypatch):
    model, before = nn.Dropout(0.5), set(context._appearing_somewhere)  # garbage of other tests may be in it
    fdt.mc_predict(model, torch.ones(4), 2)
    assert context._appearing_somewhere <= before
    monkeypatch.setattr(context, "_appearing_somewhere", set())
    for name in "_value", "_guard":
        monkeypatch.setattr(context, name, None)
    assert model.training


class Gated(nn.Module):
    """Everything in one: dropout as a module and as a function, of attention, and normalisation that must not train."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3, inplace=True)
        self.branch = Branch()

    def forward(self, x):
        return self.branch(self.drop(self.norm(self.inner(x))))


class Branch(nn.Module):
    p = 0.4

    def forward(self, x):
        y = x[None, None]
        y = F.scaled_dot_product_attention(y, y, y, dropout_p=self.p if self.training else 0.0)[0, 0]
        return F.dropout(y, 0.2, training=self.training)


class Noisy(Gated):
    def forward(self, x):
        return super().forward(x) + torch.randn(8) + torch.rand_like(x)


def make(cls):
    torch.manual_seed(0)
    return cls().train()


def test_threads_sample_what_one_thread_does():
    """One model and one each, while another thread draws from torch's generator and trains that very model's twin."""
    model, x = make(Noisy), torch.randn(6, 8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = fdt.mc_predict(model, x, 8, seed=1, batch=3)
    assert expected.std.min() > 0
    stop, other, third = threading.Event(), make(Gated), make(Noisy)

    def disturb():
        while not stop.is_set():
            assert F.dropout(torch.ones(100), 0.5).max() == 2.0
            assert other(x).isfinite().all()
            assert other.drop.training
            assert model.drop.training
            assert model.drop.inplace

    def predict(model):
        return [fdt.mc_predict(model, x, 8, seed=1, batch=3) for _ in range(3)]

    noise = threading.Thread(target=disturb)
    noise.start()
    try:
        found = in_threads(*(lambda m=m: predict(m) for m in (model, model, third)))
    finally:
        stop.set()
        noise.join()
    for prediction in itertools.chain(*found):
        assert_equal((prediction.mean, prediction.std), (expected.mean, expected.std))
    assert_equal(tuple(model.state_dict().values()), tuple(state.values()))
    assert model.training
    assert vars(model.drop) == vars(make(Noisy).drop)


@pytest.mark.parametrize("kind", ["linear", "recurrent"])
def test_threads_that_drop_weights_of_one_module(kind):
    """None finds another's dropped weights in it, in evaluation neither."""
    torch.manual_seed(0)
    inner, x = (nn.Linear(50, 50), torch.randn(2, 50)) if kind == "linear" else (nn.GRU(5, 30), torch.randn(3, 2, 5))
    model = First(fdt.DropConnect(inner)).eval()
    expected, evaluated = fdt.mc_predict(model, x, 5, seed=1, batch=1).mean, model(x)
    sys.setswitchinterval(1e-5)
    try:
        found = in_threads(
            *[lambda: [fdt.mc_predict(model, x, 5, seed=1, batch=1).mean for _ in range(10)]] * 2,
            lambda: [model(x) for _ in range(100)],
        )
    finally:
        sys.setswitchinterval(0.005)
    for mean in found[0] + found[1]:
        assert_equal(mean, expected)
    for y in found[2]:
        assert_equal(y, evaluated)


class First(nn.Module):
    """The first of what a layer returns."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def bert(implementation):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.3, "attn_implementation": implementation}
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes, **options)).eval()


@pytest.mark.filterwarnings("ignore:.*scripted")
@pytest.mark.parametrize(("implementation", "how"), [("eager", "plain"), ("sdpa", "enable"), ("sdpa", "fuse")])
def test_attention_of_bert_drops(implementation, how):
    """With no other dropout in the model, whose inputs have names and whose output has logits."""
    model, inputs = bert(implementation), {"input_ids": torch.arange(12).reshape(2, 6)}
    if how == "fuse":
        fdt.fuse(model)
    if how == "enable":
        fdt.enable()
    prediction = fdt.mc_predict(model, inputs, 6, seed=1)
    assert prediction.std.min() > 0
    mask = torch.ones(2, 6, dtype=torch.int64)
    again = fdt.mc_predict(model, inputs["input_ids"], 6, seed=1, kwargs={"attention_mask": mask}, output="logits")
    torch.testing.assert_close(again.mean, prediction.mean)
    assert_equal(model(**inputs).logits.detach(), model(**inputs).logits.detach())


def test_outputs_are_chosen():
    class Several(nn.Module):
        def forward(self, x):
            y = fdt.dropout(x, 0.5)
            return types.SimpleNamespace(logits=y, other={"a": (y * 2,)})

    x = torch.ones(5)
    expected = fdt.mc_predict(Several(), x, 5, seed=1).mean
    chosen = fdt.mc_predict(Several(), x, 5, seed=1, output=lambda y: y.other["a"][0])
    assert_equal(chosen.mean, expected * 2)
    with pytest.raises(ValueError, match="output must be of what the model returns, a SimpleNamespace, but got 'last'"):
        fdt.mc_predict(Several(), x, output="last")
    with pytest.raises(TypeError, match="output must be a str, an int or callable, but got float"):
        fdt.mc_predict(Several(), x, output=0.5)


class Attends(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


class Slopes(nn.Module):
    def forward(self, x):
        return F.rrelu(x, training=False)


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Native(nn.Module):
    def forward(self, x):
        return torch.native_dropout(x, 0.5, False)[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("cls", [Attends, Slopes, MultiHead, Native])
def test_operators_that_might_draw_and_do_not(cls):
    """They are no dropout, and keep no model from having its samples in one pass."""
    x, runs = torch.randn(1, 4, 8), []
    with pytest.raises(RuntimeError, match="nothing was dropped"):
        fdt.mc_predict(cls(), x, 3, strict=True)
    model = nn.Sequential(fdt.Dropout(0.5), cls()).eval()
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    samples = fdt.mc_predict(model, x, 20, seed=1, keep_samples=True).samples
    assert len(runs) == 3 or cls is Slopes  # which torch doesn't map
    torch.testing.assert_close(samples, fdt.mc_predict(model, x, 20, seed=1, batch=1, keep_samples=True).samples)


# ---- exceptions from signals ----


class Interrupt(BaseException):
    pass


MAY_INTERRUPT = ("CALL", "CALL_FUNCTION_EX", "CALL_KW", "PRECALL", "RESUME", "JUMP_BACKWARD", "YIELD_VALUE")


class Interrupting:
    """Raises where CPython would handle the n-th signal: after a call, at a function's start, at a loop's end.

    ``places`` are those it came by, in their order.
    """

    def __init__(self, n):
        self.n, self.last, self.places = n, {}, []

    def __call__(self, frame, event, arg):
        name = frame.f_code.co_filename
        if "fastdrop" not in name and "contextlib" not in name:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.last.pop(id(frame), None)  # of a frame that was there before
        return self.local

    def local(self, frame, event, arg):
        if event == "opcode":
            before, self.last[id(frame)] = self.last.get(id(frame)), operation(frame)
            if before in MAY_INTERRUPT and before != "PRECALL":
                self.places.append((frame.f_code, frame.f_lasti))
                if len(self.places) == self.n:
                    raise Interrupt
        return self.local


_operations = {}


def operation(frame):
    code = frame.f_code
    if code not in _operations:
        _operations[code] = {i.offset: i.opname for i in dis.get_instructions(code)}
    return _operations[code].get(frame.f_lasti)


def state_of_torch():
    model = MODELS[0]
    return (
        torch.is_grad_enabled(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._len_torch_function_stack(),
        torch._C._functorch.peek_interpreter_stack() is None,
        is_ours(),
        seeds.sample_seeds(),
        context._appearances.get(),
        [(m.training, getattr(m, "inplace", None)) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


MODELS = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5, inplace=True), nn.BatchNorm1d(4))]
CALLS = {
    "enabled": lambda model, x: torch.manual_seed(0) and enabled_call(x),
    # One to a pass: inside of torch.func.vmap an exception at the wrong moment can abort the process, in torch.
    "mc_predict": lambda model, x: fdt.mc_predict(model, x, 2, seed=1, batch=1),
    "mc_dropout": lambda model, x: mc_dropout_call(model),
    "audit": lambda model, x: fdt.audit(model, x),
    "fuse": lambda model, x: fdt.unfuse(model) and fdt.fuse(model),
}


def enabled_call(x):
    with fdt.enabled(), fdt.enabled():
        return x


def mc_dropout_call(model):
    with fdt.mc_dropout(model):
        return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_an_exception_at_any_moment_leaves_nothing_behind(name):
    model, x, tracer = MODELS[0], torch.ones(3, 4), sys.gettrace()
    fdt.enable()
    fdt.disable()
    CALLS[name](model, x)

    def interrupted(n):
        torch.manual_seed(0)
        interrupting = Interrupting(n)
        with contextlib.suppress(Interrupt):
            sys.settrace(interrupting)
            try:
                CALLS[name](model, x)
            finally:
                sys.settrace(tracer)
        return interrupting.places

    places = interrupted(0)
    torch.manual_seed(0)
    before = state_of_torch()
    first = {place: n for n, place in reversed(list(enumerate(places, 1)))}
    assert len(first) > 5
    for n in first.values():
        interrupted(n)
        assert state_of_torch() == before, n


# ---- wrapper subclasses ----


class KnowsTorchAlone(Wrapped):
    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if "fastdrop" in str(function):
            return NotImplemented
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.mark.parametrize("function", [F.dropout, F.feature_alpha_dropout])
def test_wrappers_have_the_mask_of_plain_tensors(function):
    x = torch.randn(2, 3, 4, 4)

    def of_wrapped(cls):
        return under(3, lambda: function(cls(x), 0.5, True).inner)

    alone = of_wrapped(KnowsTorchAlone)
    with fdt.enabled():
        assert_equal(of_wrapped(Wrapped), under(3, function, x, 0.5, True))
        assert_equal(of_wrapped(KnowsTorchAlone), alone)
