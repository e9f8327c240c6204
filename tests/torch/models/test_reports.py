"""What `convert`, `fuse` and `audit` say of dropout that is no module, or a module that nobody calls, is true."""

from __future__ import annotations

import ast
import functools
import linecache
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import fastdrop.torch as fdt
from fastdrop.torch.models.rates import rate_name
from fastdrop.torch.models.reasons import UNREACHED

from ..cases import assert_equal, gradient, under

UNSEEN = "it can't be told whether anything calls it"


def functional(report):
    return [(row.path, row.before, row.reason) for row in report if row.after is None]


def written(name, body, decorator=""):
    """A function of self and x, with source. The body is an expression, or statements."""
    lines = body.strip().splitlines() if "return" in body else [f"return {body}"]
    parameters = "x" if decorator == "@staticmethod" else "self, x"
    source = "\n".join(
        [decorator or "# no decorator", f"def {name}({parameters}):", *(f"    {line}" for line in lines)]
    )
    file, names = f"<{name}: {body}>", {}
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # inspect.getsource looks here
    exec(compile(source, file, "exec"), globals(), names)
    return names[name]


def with_forward(body, base=None, decorator=""):
    return type("Block", (base or Block,), {"forward": written("forward", body, decorator)})


def helper(x, rate, training):
    return F.dropout(x, rate, training)


class Block(nn.Module):
    """Has what the forwards below use."""

    def __init__(self, p=0.25, **modules):
        super().__init__()
        self.p, self.rate, self.fused = p, p, True
        self.held, self.held_partial = F.dropout, functools.partial(F.dropout, p=0.3)
        self.functions, self.table = [F.relu, F.dropout], {"drop": self.held_partial}
        for name, module in modules.items():
            setattr(self, name, module)

    def part(self, x):
        return F.dropout2d(x, self.p, self.training)


class Owner(Block):
    def __init__(self, **modules):
        super().__init__(drop=nn.Dropout(0.25), **modules)


# ---- functions that drop ----

global_partial = functools.partial(F.dropout, p=0.3)

FORWARDS = {  # and what they call
    "nn.functional.dropout(x, p=self.p, training=self.training)": "nn.functional.dropout(p=0.25)",
    "F.dropout(x, self.p if self.training else 0.0)": "F.dropout(p=0.25)",
    "F.dropout(x, self.p * 0.5)": "F.dropout(p=self.p * 0.5)",
    "torch.dropout(x, 0.5, self.training)": "torch.dropout(p=0.5)",
    "p = float(self.rate)\nreturn helper(x, p, training=self.training)": "F.dropout(p=0.25)",
    "next(map(self.part, [x]))": "F.dropout2d(p=0.25)",
    "from torch.nn.functional import alpha_dropout as drop\nreturn drop(x, self.p, True)": "drop(p=0.25)",
    "self.held(x, self.p, self.training)": "self.held(p=0.25)",
    "self.held_partial(x)": "self.held_partial(p=0.3)",
    "self.functions[1](x, 0.3, self.training)": "self.functions[1](p=0.3)",
    "for function in self.table.values():\n    x = function(x)\nreturn self.table['drop'](x)": (
        "self.table['drop'](p=0.3)"
    ),
    "drop = functools.partial(F.dropout, p=self.p)\nreturn drop(x)": "F.dropout(p=0.25)",
    "global_partial(x)": "global_partial(p=0.3)",
    "next(map(F.dropout, [x]))": "F.dropout(p=?)",
    "nn.Dropout(self.p)(x)": "nn.Dropout(p=0.25)",
    "F.scaled_dot_product_attention(x, x, x, None, self.p)": "F.scaled_dot_product_attention(dropout_p=0.25)",
    "torch.native_dropout(x, self.p, self.training)[0]": "torch.native_dropout(p=0.25)",
}


class BySuper(with_forward("F.dropout(x, self.p)")):
    def forward(self, x):
        return super().forward(x) + 1


def with_closure():
    drop = F.dropout

    class Closure(Block):
        def forward(self, x):
            return drop(x, self.p)

    return Closure


namespace: dict = {"Block": Block, "F": F}
exec("class WithoutSource(Block):\n    def forward(self, x): return F.dropout(x, self.p, self.training)", namespace)

KINDS = {body: (with_forward(body), call) for body, call in FORWARDS.items()} | {
    "closure": (with_closure(), "drop(p=0.25)"),
    "super": (BySuper, "F.dropout(p=0.25)"),
    "class method": (with_forward("F.dropout(x, 0.3)", decorator="@classmethod"), "F.dropout(p=0.3)"),
    "static method": (with_forward("F.dropout(x, 0.3)", decorator="@staticmethod"), "F.dropout(p=0.3)"),
    "no source": (namespace["WithoutSource"], "F.dropout(p=?)"),
}


@pytest.mark.parametrize(("kind", "call"), KINDS.values(), ids=KINDS)
def test_a_function_that_drops_is_listed_with_what_reaches_it(kind, call):
    model = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 4))
    reach = "fdt.enable() reaches it" + " on the CPU" * ("attention" in call)
    if "native" in call:
        reach = "it stays torch's"
    for report in (fdt.convert(model), fdt.fuse(model)):
        ((path, before, reason),) = functional(report)
        assert (path, before) == ("1", call)
        assert reason.endswith(reach)
    audited = fdt.audit(model)
    assert [(row.path, row.before) for row in audited.functional] == [("1", call)]
    assert call in str(audited)


@pytest.mark.parametrize(
    "body",
    [
        "F.scaled_dot_product_attention(x, x, x, dropout_p=0.0)",
        "F.dropout(F.dropout(x, 0.0), self.p, training=False)",
        "fdt.dropout(x, self.p, self.training)",
    ],
)
def test_a_function_that_never_drops_or_is_ours_is_not_listed(body):
    model = with_forward(body)()
    assert str(fdt.convert(model)) == "no module with dropout"
    assert not fdt.audit(model).functional


class Compiled:
    """As a forward that is no Python function."""

    def __call__(self, x):
        return F.dropout(x, 0.3)


def test_a_forward_that_cannot_be_read_is_listed():
    namespace = {"nn": nn, "f": Compiled()}
    exec("class Hidden(nn.Module):\n    def forward(self, x): return f(x)", namespace)
    held = Block()
    held.forward = Compiled()
    model = nn.Sequential(namespace["Hidden"](), held, nn.Linear(2, 2), torch.compile(nn.Linear(2, 2), backend="eager"))
    left = [(row.path, row.before, row.reason.partition(";")[0]) for row in fdt.convert(model)]
    reason = "its forward can't be read, it has no source"
    assert left == [("0", "Hidden", reason), ("1", "Block", reason)]


def test_attention_in_a_kernel_of_its_own_is_out_of_reach():
    model = with_forward(
        "attend = self.config.functions[self.config._attn_implementation]\n"
        "return attend(self, x, x, x, dropout=self.p if self.training else 0.0)"
    )()
    for name, reason in (
        ("eager", "; fdt.enable() reaches it"),
        ("sdpa", "; fdt.enable() reaches it on the CPU"),
        ("flash_attention_2", "nothing reaches it: 'flash_attention_2' attention drops in kernels of its own"),
    ):
        model.config = type("Config", (), {"_attn_implementation": name})
        ((_, before, told),) = functional(fdt.convert(model))
        assert before == "attend(dropout=0.25)"
        assert told.endswith(reason)


class Layer(nn.TransformerEncoderLayer):
    """Its forward is torch's, one of its parts is not."""

    def _ff_block(self, x):
        return F.dropout(self.linear2(self.linear1(x).relu()), 0.125, self.training)


def test_a_method_that_replaces_one_of_torchs_is_read():
    report = fdt.convert(Layer(4, 2, 4))
    assert ("", "F.dropout(p=0.125)") in [(row.path, row.before) for row in report.left]
    assert not [row for row in fdt.convert(nn.TransformerEncoderLayer(4, 2, 4)).left if row.path != "self_attn"]


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.25)

    def forward(self, x):
        return F.dropout(self.drop(x), 0.5, self.training)


@pytest.mark.filterwarnings("ignore")
def test_scripted_traced_and_exported_dropout_is_listed():
    scripted, traced = torch.jit.script(Scripted()), torch.jit.trace(Scripted().eval(), torch.ones(3))
    for module in (scripted, traced):
        report = fdt.convert(nn.Sequential(module))
        assert [(row.path, row.after) for row in report] == [("0", None), ("0.drop", None)]
        assert all("fdt.enable() reaches it" in row.reason for row in report)
    report = fdt.convert(torch.export.export(Scripted(), (torch.ones(3),)).module())
    assert [row.before for row in report.left] == [f"torch.ops.aten.dropout.default(p={p})" for p in (0.25, 0.5)]


# ---- modules of which only p is read ----


class Lends(Owner):
    """As timm's attention."""

    def forward(self, x):
        if self.fused:
            return F.scaled_dot_product_attention(x, x, x, dropout_p=self.drop.p if self.training else 0.0)
        return self.drop((x @ x.mT).softmax(-1)) @ x


BY_NAME = with_forward("p = self.drop.p if self.training else 0.0\nreturn helper(x, p, True)", Owner)


@pytest.mark.parametrize("kind", [Lends, BY_NAME])
def test_a_module_that_only_lends_its_p_is_left(kind):
    model = nn.Sequential(kind())
    for report in (fdt.convert(model), fdt.fuse(model)):
        ((path, before, reason),) = functional(report)
        assert (path, before) == ("0.drop", "Dropout(p=0.25, inplace=False)")
        assert reason.startswith("only its p is read, for F.")
        assert "; fdt.enable() reaches it" in reason
    assert type(model[0].drop) is nn.Dropout


def test_a_module_whose_p_goes_where_nobody_sees_is_left():
    model = nn.Sequential(with_forward("torch.mul(x, self.drop.p)", Owner)())
    (row,) = fdt.convert(model).left
    assert (row.path, row.reason.partition(";")[0]) == ("0.drop", "only its p is read")


def test_the_branch_that_is_taken_decides():
    model = nn.Sequential(Lends())
    model[0].fused = False
    (row,) = fdt.convert(model)
    assert (row.path, row.reason) == ("0.drop", "")
    assert type(model[0].drop) is fdt.Dropout


def two_inside():
    return {"inner": nn.ModuleList([Lends(), Lends()])}


CALLED = {  # a forward, the modules that it uses, and which dropout it calls
    "self.drop.forward(x)": (dict, ["drop"]),
    "for i, inner in enumerate(self.inner):\n    x = inner.drop(x) * i * inner.drop.p\nreturn x": (
        two_inside,
        ["inner.0.drop", "inner.1.drop"],
    ),
    "for layer, drop in zip(self.layers, [*self.inner, self.drop], strict=False):\n"
    "    x = drop(layer(x))\n"
    "return self.drop(x)": (
        lambda: {"layers": nn.ModuleList([nn.Identity()]), "inner": nn.ModuleList([nn.Dropout()])},
        ["drop", "inner.0"],
    ),
}
UNCERTAIN = {
    "torch.utils.checkpoint.checkpoint(self.drop, x, use_reentrant=False)": (dict, "drop"),
    "getattr(self, 'dr' + 'op')(x) * self.drop.p": (dict, "drop"),
    "helper(x, self.inner[0].p, self.training) + unknown(self.inner, x)": (
        lambda: {"inner": nn.ModuleList([nn.Dropout(0.1)])},
        "inner.0",
    ),
}
unknown = functools.partial(lambda modules, x: modules[0](x))


@pytest.mark.parametrize("body", CALLED)
def test_a_module_that_is_called_is_changed(body):
    make, paths = CALLED[body]
    report = fdt.convert(with_forward(body, Owner)(**make()))
    assert {row.path for row in report.changed} >= {*paths}
    assert all(row.after and not row.reason for row in report if row.path in paths and row.path != "inner.0")


@pytest.mark.parametrize("body", UNCERTAIN)
def test_where_it_cannot_be_told_the_report_says_so(body):
    make, path = UNCERTAIN[body]
    model = with_forward(body, Owner)(**make())
    report = fdt.convert(model)
    assert {row.path: row.reason for row in report.changed}[path] == UNSEEN
    assert UNSEEN in str(report)
    assert type(model.get_submodule(path)) is fdt.Dropout


class Owned(Owner):
    """Its dropout's p goes to attention; the functions below do something else with the dropout too."""

    def __init__(self, hold=None):
        super().__init__()
        self.d = self.drop  # whose name tells nothing
        self.held_thing = hold and hold(self)

    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=self.drop.p if self.training else 0.0)
        return self.more(y)

    def more(self, x):
        return x


def calls_the_drop_of(x, owner):
    return owner.d(x)


def assigns(x, owner):
    owner = owner or None
    return owner.drop(x)


def by_keywords(x, **owners):
    return owners["owner"].drop(x)


def owned(body, hold=None, name="more"):
    return type("Owned", (Owned,), {name: written(name, body)})(hold)


def hooked(register):
    module = Owned()
    getattr(module, register)(lambda m, *_: None)
    return module


class Odd:
    """What a model may hold: a large, cyclic object whose attributes raise."""

    def __init__(self):
        self.me, self.much = self, [[object() for _ in range(100)] for _ in range(100)]

    def __call__(self, x):
        return x

    def __getattr__(self, name):
        raise RuntimeError(name)


class ByProperty(Owned):
    @property
    def twice(self):
        return lambda x: self.drop(self.drop(x))


PASSED = (
    "calls_the_drop_of(x, owner=self)",
    "assigns(x, self)",
    "by_keywords(x, owner=self)",
    "functools.reduce(calls_the_drop_of, [self], x)",
    "functools.partial(calls_the_drop_of, owner=self)(x)",
    "getattr(self, 'drop')(x)",
)
HELD = "self.held_thing(x)"
HELD_ITEMS = "for function in self.held_thing:\n    x = function(x)\nreturn x"
HELD_VALUES = "for function in self.held_thing.values():\n    x = function(x)\nreturn x"
MAY_BE_CALLED = {body: functools.partial(owned, body) for body in PASSED} | {
    "bound": lambda: owned(HELD, lambda s: s.drop.forward),
    "partial": lambda: owned(HELD, lambda s: functools.partial(calls_the_drop_of, owner=s)),
    "closure": lambda: owned(HELD, lambda s: lambda x: s.drop(x)),
    "list of modules": lambda: owned(HELD_ITEMS, lambda s: [s.drop]),
    "list of functions": lambda: owned(HELD_ITEMS, lambda s: (torch.relu, s.drop.forward)),
    "table of functions": lambda: owned(HELD_VALUES, lambda s: {"more": s.drop.forward}),
    "public method": lambda: owned("self.drop(x)", name="embed"),
    "property": ByProperty,
    "hook": lambda: hooked("register_forward_hook"),
    "pre hook": lambda: hooked("register_forward_pre_hook"),
}


@pytest.mark.parametrize("make", MAY_BE_CALLED.values(), ids=MAY_BE_CALLED)
def test_a_lent_module_that_may_be_called_is_changed(make):
    model = nn.Sequential(make())
    report = fdt.convert(model)
    assert [row.path for row in report.changed] == ["0.drop"]
    assert type(model[0].drop) is fdt.Dropout
    assert "F.scaled_dot_product_attention(dropout_p=0.25)" in [row.before for row in report.left]


def test_a_parent_outside_of_the_model_may_call_what_the_model_holds():
    (row,) = fdt.convert(Owned()).changed
    assert (row.path, row.reason) == ("drop", UNSEEN)


class LendsWithMore(Owned):
    """Nothing here calls the dropout."""

    def __init__(self):
        super().__init__()
        self.act, self.functions, self.twice = F.relu, [torch.relu, len], functools.partial(torch.mul, 2)
        self.attend, self.odd = {"sdpa": helper}, Odd()

    def forward(self, x):
        me = self
        x = super().forward(self.functions[0](self.odd(self.twice(self.act(x)))))
        assert isinstance(self, Owned)
        assert hasattr(me, "drop")
        attend = self.attend.get("sdpa", helper)
        return attend(self, x, x, x, dropout=self.drop.p if self.training else 0.0)

    def extra_repr(self):
        return f"{self.drop}"

    def set_rate(self, p):
        self.drop.p = p


def test_a_module_of_which_all_is_read_is_left():
    model = nn.Sequential(LendsWithMore())
    model[0].linear = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    report = fdt.convert(model)
    assert [(row.path, row.after) for row in report] == [("0.drop", None)]
    assert report.left[0].reason.startswith("only its p is read")


# ---- stochastic depth by other names ----


def drop_path(input: torch.Tensor, drop_prob: float = 0.0, training: bool = False) -> torch.Tensor:
    """As timm's, and transformers' for long."""
    if drop_prob == 0.0 or not training:
        return input
    keep_prob = 1 - drop_prob
    shape = (input.shape[0],) + (1,) * (input.ndim - 1)
    random_tensor = keep_prob + torch.rand(shape, dtype=input.dtype, device=input.device)
    random_tensor.floor_()  # binarize
    output = input.div(keep_prob) * random_tensor
    return output


class Depth(nn.Module):
    def __init__(self, drop_prob=0.5):
        super().__init__()
        self.drop_prob = drop_prob


class CallsDropPath(Depth):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """With a docstring."""
        return drop_path(hidden_states, self.drop_prob, self.training)


INLINED = """
if self.drop_prob == 0.0 or not self.training:
    return x
keep = 1 - self.drop_prob
shape = (x.shape[0],) + (1,) * (x.ndim - 1)
mask = torch.rand(shape, dtype=x.dtype, device=x.device)
mask = torch.floor(mask + keep)
return x.div(keep) * mask
"""
Inlined = with_forward(INLINED, Depth)
Unscaled = with_forward(INLINED.replace("x.div(keep)", "x"), Depth)
CallsWithoutTraining = with_forward("drop_path(x, self.drop_prob, True)", Depth)


@pytest.mark.parametrize("kind", [CallsDropPath, Inlined])
def test_stochastic_depth_is_recognised_by_its_forward(kind):
    model, x = nn.Sequential(kind()), torch.randn(6, 3, 4, dtype=torch.float64)
    assert rate_name(model[0]) == "drop_prob"
    (row,) = fdt.convert(model)
    assert row.after == "DropPath(drop_prob=0.5, scale_by_keep=True, store='bits')"
    expected = under(3, gradient, lambda x: fdt.stochastic_depth(x, 0.5, "row"), x)
    assert_equal(under(3, gradient, model, x), expected)
    assert model.eval()(x) is x
    fdt.revert(model)
    assert type(model[0]) is kind
    assert vars(model[0]).keys() == vars(kind()).keys()


@pytest.mark.parametrize("kind", [Unscaled, CallsWithoutTraining])
def test_what_is_nearly_stochastic_depth_is_left_and_listed(kind):
    model = nn.Sequential(kind())
    ((path, _, reason),) = functional(fdt.convert(model))
    assert (path, reason) == ("0", f"its forward drops by torch.rand; {UNREACHED}")
    assert type(model[0]) is kind


def test_every_drop_path_of_transformers_is_known():
    """Their sources alone: importing all of these takes long."""
    from fastdrop.torch.models import drop_path as drop_path_rules

    transformers = pytest.importorskip("transformers")
    known, found = drop_path_rules._known_functions(drop_path_rules.DROP_PATHS), 0
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text()
        if "DropPath(nn.Module)" not in text:
            continue
        for match in re.finditer(r"^class \w*DropPath\(nn\.Module\):\n", text, re.MULTILINE):
            body = re.match(r"(?:(?:    .*)?\n)+", text[match.end() :])
            (kind,) = ast.parse(match[0] + body[0]).body
            (forward,) = [node for node in kind.body if getattr(node, "name", "") == "forward"]
            assert drop_path_rules._normalise(forward) in known, path
            found += 1
    assert found > 20


# ---- other people's models ----

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS, IMAGE = {"input_ids": torch.tensor([[5, 6, 7, 8]])}, {"pixel_values": torch.zeros(1, 3, 16, 16)}
TRANSFORMERS = {
    "Bert": ({**SIZES, "vocab_size": 50}, IDS),
    "OPT": ({**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16, "vocab_size": 50, "max_position_embeddings": 20}, IDS),
    "Flaubert": ({"emb_dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 50}, IDS),
    "Swin": ({"image_size": 16, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 2}, IMAGE),
}


class Dropping(TorchFunctionMode):
    """Writes down which modules of a model call torch's dropout with a rate above 0, by path."""

    def __init__(self, model):
        super().__init__()
        self.paths, self.stack = set(), []
        for path, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: self.stack.append(path))
            module.register_forward_hook(lambda *_: self.stack.pop() and None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout and kwargs.get("p", 0.5) > 0 and kwargs.get("training", True):
            self.paths.add(self.stack[-1])
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p", 0) > 0:
            self.paths.add(self.stack[-1])
        return function(*args, **kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in TRANSFORMERS), ("Bert", "eager")])
def test_what_torch_still_drops_in_a_converted_model_is_in_the_report(name, attention):
    transformers = pytest.importorskip("transformers")
    sizes, inputs = TRANSFORMERS[name]
    config = getattr(transformers, f"{name}Config")(**sizes)
    if name != "Flaubert":
        config._attn_implementation = attention
    model = getattr(transformers, f"{name}Model")(config).train()
    report = fdt.convert(model)
    lent = [row.path for row in report.left if row.reason.startswith("only its p")]
    told = {row.path for row in report.left} - {*lent} | {path.rpartition(".")[0] for path in lent}
    on = {row.path for row in report.left if not re.search(r"p(out)?=0\)|dropout=0\)", row.before)} - {*lent}
    with Dropping(model) as dropping:
        model(**inputs)
    drops = {path for path in dropping.paths if not isinstance(model.get_submodule(path), fdt.Dropout)}
    assert drops <= told
    assert drops == on | {path.rpartition(".")[0] for path in lent}
    assert bool(drops) == (name != "Swin")
    if name == "Bert":
        assert all("; fdt.fuse() reaches it; fdt.enable() reaches it" in row.reason for row in report.left)
        assert len(lent) == 2
    if name == "Swin":
        assert [row.path for row in report.changed if "DropPath" in row.before]
    assert len(str(report).splitlines()) < len(report) + 1


# ---- names and equal lines ----


def test_a_class_of_a_known_name_is_named_with_its_module():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.base_layer(x)

    def gelu(x):
        return x

    Linear.__module__, Linear.__qualname__, gelu.__module__ = "peft.tuners.oft.layer", "Linear", "theirs"
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    layer.linear1 = Linear()
    assert fdt.fuse(layer).left[0].reason == "linear1 is a peft.tuners.oft.layer.Linear, not nn.Linear"
    layer = nn.TransformerEncoderLayer(4, 2, 4, activation=gelu)
    assert fdt.fuse(layer).left[0].reason == "activation is theirs.gelu, not a known one"
    ((_, _, reason),) = functional(fdt.fuse(nn.Sequential(Linear(), nn.Dropout())))
    assert reason == "0 is a peft.tuners.oft.layer.Linear, not nn.Linear"
    dropout = type("Dropout", (nn.Dropout,), {"__module__": "theirs"})
    ((_, _, reason),) = functional(fdt.convert(nn.Sequential(dropout())))
    assert reason == "theirs.Dropout, a subclass of nn.Dropout; its forward may be its own"


def test_equal_lines_of_every_report_are_one_with_a_count():
    kind = with_forward("F.dropout(x, self.p)")

    def model():
        return nn.ModuleList([nn.ModuleDict({"drop": nn.Dropout(0.1), "f": kind()}) for _ in range(12)])

    folded = "0-11.drop (12x)"
    plain = model()
    scheduler = fdt.DropoutScheduler(plain, lambda step: 0.5)
    for report in (fdt.fuse(plain), scheduler.report, fdt.convert(plain), fdt.revert(plain)):
        lines = str(report).splitlines()
        assert lines[1].startswith(folded), report
        assert len(lines) <= 4
        assert len(report) >= 12
    plain = model()
    for block in plain:
        block["drop"].p = 0.9
    lines = str(fdt.audit(plain)).splitlines()
    assert sum(folded in line for line in lines) == 1
    assert sum("0-11.f (12x)" in line for line in lines) == 1
