"""audit: for each rule models that break it and models that don't; the table; the command's exit codes; odd models."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections import OrderedDict

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn import functional as F

import fastdrop.torch as fdt
from fastdrop.__main__ import main
from fastdrop.schedules import constant
from fastdrop.torch.tools.audit import AuditReport, audit
from fastdrop.torch.tools.pitfalls import PITFALLS
from fastdrop.torch.tools.scheduler import DropoutScheduler

from ..module_cases import Calls, DropPath, StochasticDepth, one_layer

IMAGE = torch.zeros(2, 3, 16, 16)
ROW = torch.zeros(2, 128)
SEQUENCE = torch.zeros(5, 2, 64)
TOKENS = torch.zeros(5, 2, dtype=torch.int64)


def wide():
    return nn.Linear(128, 128)


def in_evaluation(model, *left_on):
    model.eval()
    for path in left_on:
        model.get_submodule(path).train()
    return model


def between(*layers):
    return nn.Sequential(wide(), *layers, wide())


def head(*layers):
    """Layers, then what makes of them a network with nothing else to find."""
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


def conv():
    return nn.Conv2d(3, 64, 3)


def net(forward, **modules):
    """A forward of one's own over a layer, a dropout and others."""
    return Calls(forward, **{"a": wide(), "drop": nn.Dropout(0.3), **modules})


def image_net(forward):
    return net(forward, c=conv(), a=nn.LazyLinear(10))


def recurrent(forward, **modules):
    return net(forward, **{"rnn": nn.LSTM(64, 64), "out": nn.Linear(64, 64), **modules})


def unrolled(self, x):
    state = x.new_zeros(2, 64)
    for step in range(4):
        state = self.drop(self.cell(x[step], state))
    return self.out(state)


def unrolled_lstm(self, x):
    hidden, cell = self.cell(x[0])
    return self.cell(x[1], (self.drop(hidden), cell))[0]


def given_out(self, x):
    """Dropout of what a cell gives out, and not of what it is given."""
    state = self.cell(x[0])
    return self.out(self.drop(state) + self.drop(self.cell(x[1], state)))


def concatenated(self, x):
    return self.out(torch.cat([self.norm(torch.cat([x, self.drop(x)], 1)), x], 1))


def returned_and_used(self, x):
    y = self.drop(x)
    return y, self.a(y)


def attends(self, x, p=0.1):
    return self.a(F.scaled_dot_product_attention(x, x, x, dropout_p=p))


def our_attention(self, x, **options):
    return self.a(fdt.scaled_dot_product_attention(x, x, x, dropout_p=0.1, **options))


NORM = nn.BatchNorm1d(128)
# Of each rule: name -> model, paths of the findings (none for a model that doesn't break it), and an example input if
# it isn't the rule's.
CASES = {
    "left on": {
        "module": (in_evaluation(between(nn.Dropout(0.5)), "1"), ["1"]),
        "attention": (
            in_evaluation(between(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, 0.1)})), "1.a"),
            ["1.a"],
            None,
        ),
        "builtin": (net(lambda s, x: s.a(torch.dropout(x, 0.2, True))), [""]),
        "function in a module": (
            nn.Sequential(wide(), net(lambda s, x: s.a(F.dropout2d(x, 0.5)))),
            ["1"],
            torch.zeros(2, 4, 5, 128),
        ),
        "fused attention": (net(attends), [""]),
        "all of it training": (between(nn.Dropout(0.5)), []),
        "norm left on": (in_evaluation(between(NORM, wide(), nn.Dropout()), "1"), []),
        "p of 0": (in_evaluation(between(nn.Dropout(0.0)), "1"), []),
        "function with p of 0": (net(lambda s, x: s.a(F.dropout(x, 0.0))), []),
        "our attention": (net(lambda s, x: our_attention(s, x)), [""]),
        "our attention that follows": (net(lambda s, x: our_attention(s, x, training=s.training)), []),
        "attention that follows": (net(lambda s, x: attends(s, x, 0.1 if s.training else 0.0)), []),
    },
    "drops everything": {
        "function": (net(lambda s, x: s.a(F.alpha_dropout(x, 1.0, s.training))), [""]),
        "p below 1": (between(nn.Dropout(0.9)), []),
    },
    "on the output": {
        "before softmax": (nn.Sequential(wide(), fdt.Dropout(0.5), nn.Softmax(-1)), ["1"]),
        "function": (net(lambda s, x: F.log_softmax(F.dropout(s.a(x), 0.5, s.training).flatten(1), -1)), [""]),
        "one of two": (
            net(lambda s, x: {"a": s.a(x), "b": s.drop(x)}, drop=type("MyDropout", (nn.Dropout,), {})()),
            ["drop"],
        ),
        "residual": (net(lambda s, x: x + s.drop(s.a(x))), []),
        "returned and used": (net(returned_and_used), []),
        "depth": (nn.Sequential(wide(), StochasticDepth(0.1)), []),
    },
    "high rate": {
        "module": (between(nn.Dropout(0.8)), ["1"]),
        "attention": (nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, dropout=0.9)}), ["a"], None),
        "0.7": (between(nn.Dropout(0.7)), []),
        "1": (between(nn.Dropout(1.0)), []),
    },
    "after a convolution": {
        "through all": (head(conv(), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), fdt.Dropout(0.3)), ["4"]),
        "subclass": (head(type("MyConv", (nn.Conv2d,), {})(3, 64, 3), nn.GELU(), nn.AlphaDropout(0.3)), ["2"]),
        "nested": (head(nn.Sequential(conv(), nn.ReLU()), nn.Sequential(nn.Dropout(0.3))), ["1.0"]),
        "functions": (
            image_net(lambda s, x: s.a(F.dropout(F.max_pool2d(s.c(x).relu(), 2), 0.3, s.training).flatten(1))),
            [""],
        ),
        "concatenation": (image_net(lambda s, x: s.a(s.drop(torch.cat([s.c(x), s.c(x)], 1)).flatten(1))), ["drop"]),
        "channels": (head(conv(), nn.ReLU(), nn.Dropout2d(0.3)), []),
        "flattened": (head(conv(), nn.Flatten(), nn.Dropout(0.3)), []),
        "pooled": (head(conv(), nn.AdaptiveAvgPool2d(1), nn.Dropout(0.3)), []),
        "p of 0": (head(conv(), nn.Dropout(0.0)), []),
        "whole channels by noise_shape": (
            image_net(lambda s, x: s.a(fdt.dropout(s.c(x), 0.3, noise_shape=(None, None, 1, 1)).flatten(1))),
            [],
        ),
    },
    "before batch normalisation": {
        "through activation and pool": (
            head(conv(), fdt.Dropout2d(0.3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(64)),
            ["1"],
            IMAGE,
        ),
        "concatenation": (net(concatenated, norm=nn.BatchNorm1d(256), out=nn.LazyLinear(10)), ["drop"]),
        "function": (
            net(lambda s, x: s.a(F.batch_norm(F.dropout(x, 0.3, s.training), torch.zeros(128), torch.ones(128)))),
            [""],
        ),
        "behind": (head(wide(), NORM, nn.Dropout(0.3)), []),
        "alpha": (head(wide(), nn.AlphaDropout(0.3), NORM), []),
        "layer norm between": (head(nn.Dropout(0.3), nn.LayerNorm(128), NORM), []),
        "no running statistics": (head(wide(), nn.Dropout(0.3), nn.BatchNorm1d(128, track_running_stats=False)), []),
        "another branch": (net(lambda s, x: s.a(s.drop(x)) + s.norm(x), norm=NORM), []),
    },
    "before the next layer's batch normalisation": {
        "perceptron": (head(wide(), NORM, nn.ReLU(), nn.Dropout(0.3), wide(), nn.BatchNorm1d(128)), ["3"]),
        "straight": (between(nn.Dropout(0.3), NORM), []),
    },
    "on a recurrent connection": {
        "GRUCell": (recurrent(unrolled, cell=nn.GRUCell(64, 64)), ["drop"]),
        "LSTMCell": (recurrent(unrolled_lstm, cell=nn.LSTMCell(64, 64)), ["drop"]),
        "off it": (recurrent(given_out, cell=nn.GRUCell(64, 64)), []),
    },
    "between recurrent layers": {
        "LSTM": (nn.LSTM(64, 64, 2, dropout=0.3), [""]),
        "no dropout": (nn.LSTM(64, 64, 2), []),
        "one layer": (one_layer(nn.LSTM), []),
    },
    "beside a recurrent layer": {
        "after activation": (recurrent(lambda s, x: s.out(s.drop(s.rnn(x)[0].tanh()))), ["drop"]),
        "embedding": (recurrent(lambda s, x: s.rnn(s.drop(s.e(x)))[0], e=nn.Embedding(100, 64)), ["drop"], TOKENS),
        "the last state": (recurrent(lambda s, x: s.out(s.drop(s.rnn(x)[1][0]))), []),
        "held over time": (recurrent(lambda s, x: s.out(s.drop(s.rnn(x)[0])), drop=fdt.VariationalDropout(0.3, 0)), []),
    },
    "one layer": {
        "LSTM": (one_layer(nn.LSTM), [""]),
        "two": (nn.LSTM(64, 64, 2, dropout=0.3), []),
        "no dropout": (nn.LSTM(64, 64), []),
    },
    "small network": {
        "2-4-1": (nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)), [""], torch.zeros(3, 2)),
        "function": (net(lambda s, x: s.a(F.dropout(x, 0.1, s.training)), a=nn.Linear(4, 4)), [""], None),
        "large": (between(nn.Dropout(0.5)), []),
        "no dropout": (nn.Sequential(nn.Linear(2, 4), nn.ReLU()), [], torch.zeros(3, 2)),
        "not known yet": (nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5), nn.LazyLinear(1)), [], None),
    },
    "narrow layer": {
        "linear": (nn.Sequential(nn.Linear(128, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 128)), ["2"]),
        "channels": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout2d(0.5), nn.Conv2d(8, 128, 3)), ["1"], IMAGE),
        "recurrent": (recurrent(lambda s, x: s.out(s.drop(s.rnn(x)[1])), rnn=nn.GRU(64, 8)), ["drop"], None),
        "wide": (nn.Sequential(nn.Linear(128, 32), nn.Dropout(0.5), nn.Linear(32, 128)), []),
        "pixels": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 128, 3)), [], IMAGE),
    },
    "drops nothing": {
        "module": (between(nn.Dropout(0.0)), ["1"]),
        "depth": (between(StochasticDepth(0.0), DropPath(0.0)), []),
        "attention and recurrent": (nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(64, 64, 2)]), [], None),
        "above 0": (between(nn.Dropout(0.1)), []),
    },
}
EXAMPLES = dict.fromkeys(CASES, ROW) | dict.fromkeys([rule for rule in CASES if "recurrent" in rule], SEQUENCE)
EXAMPLES |= {"after a convolution": IMAGE, "one layer": SEQUENCE}
EACH = [
    pytest.param(rule, model, paths, *(example or [EXAMPLES[rule]]), id=f"{rule}: {name}")
    for rule, cases in CASES.items()
    for name, (model, paths, *example) in cases.items()
]


def found(report, rule):
    return [finding.path for finding in report if finding.rule == rule]


# ---- rules ----


@pytest.mark.parametrize(("rule", "model", "paths", "example"), EACH)
def test_rule(rule, model, paths, example):
    """Traced and, where there is an example, run: the same findings."""
    traced = audit(model)
    assert not traced.limit or example is None or len(list(model.children())) == 0
    if not traced.limit:
        assert found(traced, rule) == paths
    if example is not None:
        seen = audit(model, example)
        assert not seen.limit
        assert found(seen, rule) == paths
    for finding in traced:
        assert finding.severity == PITFALLS[finding.rule].severity
        assert finding.what
        assert finding.why
        assert finding.remedy


def test_every_rule_has_models_that_break_it_and_models_that_do_not():
    assert set(CASES) | {"few samples"} == set(PITFALLS)
    for cases in CASES.values():
        assert {bool(paths) for _, paths, *_ in cases.values()} == {True, False}


def test_few_samples():
    model = between(nn.Dropout(0.3))
    assert found(audit(model, samples=999), "few samples") == [""]
    assert not audit(model, samples=1000)
    assert not audit(model)
    assert not audit(wide(), samples=10)
    with pytest.raises(ValueError, match=r"^samples must be at least 0, but got -1$"):
        audit(model, samples=-1)
    with pytest.raises(TypeError, match="samples must be a number"):
        audit(model, samples="many")


def test_a_scheduler_may_be_at_0_for_now():
    model = between(fdt.Dropout(0.0))
    assert found(audit(model), "drops nothing") == ["1"]
    DropoutScheduler(model, constant(0.0), lambda path, module: path == "1")
    assert not audit(model)


def test_a_sound_model_has_no_findings():
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.1, batch_first=True)
    model = nn.Sequential(nn.Embedding(100, 64), nn.Dropout(0.1), nn.TransformerEncoder(layer, 2), nn.Linear(64, 100))
    report = audit(model, TOKENS)
    assert not report.findings
    assert not report.limit


# ---- the report ----


def test_report_shows_some_of_many_of_a_kind():
    """Findings that differ in more than the numbers in their paths; those that don't are one line."""
    names = ["abcdefghij"[i // 2] + str(i % 2) for i in range(20)]
    report = audit(nn.Sequential(OrderedDict((name, nn.Dropout(0.0)) for name in names)))
    assert len(report) == 20
    lines = str(report).splitlines()
    assert len(lines) == 1 + 8 + 3
    assert lines[1].split() == ["a0-1", "(2x)", "note", "Dropout(p=0)", "drops", "nothing"]
    assert lines[9].strip() == "... and 4 more of the kind"


def test_report_is_a_sequence_that_is_true_if_anything_was_found():
    model = in_evaluation(nn.Sequential(wide(), nn.Dropout(0.8), nn.Dropout(0.0), wide()), "1")
    report = audit(model)
    assert [finding.severity for finding in report] == ["error", "warning", "note"]
    assert (len(report), report[0].rule, bool(report)) == (3, "left on", True)
    assert [len(report.at_least(severity)) for severity in ("error", "warning", "note")] == [1, 2, 3]
    assert repr(report) == str(report)
    with pytest.raises(ValueError, match="severity must be one of 'error', 'warning', 'note', but got 'hint'"):
        report.at_least("hint")
    none = audit(wide())
    assert (len(none), bool(none), str(none)) == (0, False, "no findings")
    assert str(AuditReport([], "it is late")) == "no findings\nnot all rules applied: it is late"


# ---- the model stays as it is ----


class Remembers(nn.Module):
    """Changes all that a forward pass can change."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros(()))
        self.calls, self.last, self.fails = 0, None, False

    def forward(self, x):
        self.calls += 1
        self.seen += torch.rand(())
        self.train()
        with torch.no_grad():
            self.linear.weight += 1
        self.last = self.norm(self.linear(self.drop(x)))
        if self.fails:
            raise RuntimeError("as it must")
        return self.last


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_audit_leaves_model_and_generators_alone(fails):
    model = Remembers()
    model.fails = fails
    model.drop.eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    generators = torch.get_rng_state(), random.getstate()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    if fails:
        with pytest.raises(RuntimeError, match="as it must"):
            audit(model, x)
    else:
        audit(model, x)
    audit(model)
    assert (model.calls, model.last) == (0, None)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert torch.equal(x, before)
    assert torch.is_grad_enabled()


# ---- models that can't be traced, and other odd ones ----


def branches(self, x):
    y = self.body(x)
    return self.out(y) if y.sum() > 0 else self.out(-y)


def test_a_model_that_cannot_be_traced_is_read_by_its_sequences():
    body = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Sequential(nn.ReLU(), nn.Dropout(0.3)), nn.Flatten())
    model = Calls(branches, body=body, out=nn.LazyLinear(10))
    report = audit(model)
    assert [(finding.path, finding.rule) for finding in report] == [("body.1.1", "after a convolution")]
    assert report.limit.startswith("the model can't be traced (TraceError: ")
    assert report.limit.endswith("); give an example_input")
    assert report.limit in str(report)
    seen = audit(model, IMAGE)
    assert list(seen) == list(report)
    assert not seen.limit


def test_a_function_that_cannot_be_traced_needs_an_example():
    model = Calls(lambda self, x: branches(self, F.dropout(x, 0.5)), body=wide(), out=wide())
    assert not audit(model)
    assert found(audit(model, ROW), "left on") == [""]


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.9)

    def __deepcopy__(self, memo):
        raise TypeError("there is one of me")


class StrangeRates(nn.Module):
    """Named as what drops, with rates that are none."""

    def __init__(self):
        super().__init__()
        self.a = type("DropPath", (nn.Module,), {"drop_prob": None})()
        self.b = type("StochasticDepth", (nn.Module,), {"p": "0.5"})()
        self.c = type("Dropout", (nn.Module,), {})()
        self.d = nn.Dropout()
        self.d.p = torch.tensor(0.5)
        self.e = nn.Dropout()
        self.e.p = None


def packs(self, x):
    packed, _ = self.rnn(nn.utils.rnn.pack_padded_sequence(x, [5, 3]))
    return self.out(self.drop(nn.utils.rnn.pad_packed_sequence(packed)[0]))


ODD = {
    "no forward": (lambda: nn.Module(), None),
    "returns None": (lambda: Calls(lambda self, x: None, d=nn.Dropout()), ROW),
    "strange rates": (StrangeRates, None),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(64, 3), nn.LazyBatchNorm2d(), nn.Dropout2d(), nn.Flatten()), IMAGE),
    "scripted": (lambda: torch.jit.script(between(nn.Dropout())), ROW),
    "compiled": (lambda: torch.compile(between(nn.Dropout(0.9)), backend="eager"), ROW),
    "parametrized": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(wide()), nn.Dropout(), wide()), ROW),
    "meta": (lambda: between(nn.Dropout()).to("meta"), ROW.to("meta")),
    "packed": (lambda: recurrent(packs), SEQUENCE),
    "in place": (lambda: nn.Sequential(wide(), nn.ReLU(True), nn.Dropout(0.5, inplace=True), wide()), ROW),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "example"), ODD.values(), ids=ODD)
def test_odd_models_are_audited(make, example):
    model = make()
    assert isinstance(str(audit(model)), str)
    if example is not None:
        assert isinstance(str(audit(model, example)), str)


def test_rates_are_judged_even_if_nothing_else_can_be():
    for example in (None, ROW):
        report = audit(Uncopyable(), example)
        assert found(report, "high rate") == ["drop"]
        assert report.limit == "the model can't be copied (TypeError: there is one of me)"


# ---- the command ----

MODELS = """
import torch
from torch import nn

sound = nn.Sequential(nn.Linear(128, 128), nn.Dropout(0.3), nn.Linear(128, 128))

def noted():
    return nn.Sequential(nn.Linear(128, 128), nn.Dropout(0.0), nn.Linear(128, 128))

class Warned(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Embedding(100, 128), nn.Dropout(0.8), nn.Linear(128, 128))

class Holder:
    make = Warned

def wrong():
    raise OSError("no such weights")

def number():
    return 3

print_me = "no model"
"""

COMMANDS = {
    "sound": ("models:sound", 0, "no findings"),
    "sound with input": ("models:sound --input 4,128 --strict", 0, "no findings"),
    "samples": ("models:sound --samples 100", 1, "dropout for 100 samples"),
    "note": ("models:noted", 0, "Dropout(p=0) drops nothing"),
    "strict": ("models:noted --strict", 1, "Dropout(p=0) drops nothing"),
    "class": ("models:Warned --input 3,5:int64", 1, "Dropout(p=0.8) drops more than 0.7"),
    "attribute": ("models:Holder.make", 1, "Dropout(p=0.8) drops more than 0.7"),
    "no colon": ("models", 2, "fastdrop: can't audit models: ValueError: the model must be given as module:factory"),
    "no module": ("nomodels:sound", 2, "ModuleNotFoundError: No module named 'nomodels'"),
    "no factory": ("models:nothing", 2, "module 'models' has no attribute 'nothing'"),
    "no model": ("models:number", 2, "number must return a torch.nn.Module, but got int"),
    "not callable": ("models:print_me", 2, "'str' object is not callable"),
    "fails": ("models:wrong", 2, "OSError: no such weights"),
    "two inputs": ("models:sound --input 4,128 --input 3", 2, "takes 2 positional arguments but 3 were given"),
    "fails on input": ("models:sound --input 4,7", 2, "mat1 and mat2 shapes cannot be multiplied"),
    "shape": ("models:sound --input 4x7", 2, "must be a shape such as 8,3,32,32, but got '4x7'"),
    "dtype": ("models:sound --input 4:float8", 2, "the dtype must be one of float32,"),
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """In the working directory; afterwards nobody knows of it."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("models", None)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(("arguments", "code", "text"), COMMANDS.values(), ids=COMMANDS)
def test_command_exits_by_what_it_found(arguments, code, text, capsys):
    assert main(["audit", *arguments.split()]) == code
    printed = capsys.readouterr()
    assert text in (printed.err if code == 2 else printed.out)


@pytest.mark.usefixtures("models")
def test_command_without_torch_says_what_is_missing():
    code = (
        "import sys; sys.modules['torch'] = None; from fastdrop.__main__ import main; sys.exit(main(['audit', 'm:f']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert "ImportError: fastdrop.torch needs torch" in result.stderr
    assert "Traceback" not in result.stderr
