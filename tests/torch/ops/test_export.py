"""Export of models by TorchScript, ONNX, `make_fx` and `torch.export`."""

from __future__ import annotations

import importlib.util

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastdrop.torch as fdt
from fastdrop.torch.models.fuse.rules import Fused

from ..cases import assert_equal, under

# ---- TorchScript ----


class Sequence(nn.Sequential):
    """A subclass, as models have them."""


def sequence(kind=nn.Sequential):
    return kind(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.AlphaDropout(0.1))


def encoder():
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)


def decoder():
    return nn.TransformerDecoderLayer(6, 2, 8, batch_first=True, norm_first=True)


C, F, CF = (fdt.convert,), (fdt.fuse,), (fdt.convert, fdt.fuse)
MODELS = {
    "Sequential": (sequence, C, 1),
    "fused Sequential": (sequence, F, 1),
    "subclass": (lambda: sequence(Sequence), CF, 1),
    "encoder": (encoder, F, 1),
    "decoder": (decoder, CF, 2),
}
scripts = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::UserWarning")


@scripts
@pytest.mark.parametrize("name", MODELS)
def test_script(name):
    """A changed model scripts, again too, and in evaluation does what it did; its modules stay as they are."""
    build, changes, count = MODELS[name]
    model = build()
    for change in changes:
        change(model)
    kinds = [type(module) for module in model.modules()]
    inputs = [torch.randn(2, 3, 6) for _ in range(count)]
    expected = model.eval()(*inputs)
    torch.testing.assert_close(torch.jit.script(model)(*inputs), expected)
    scripted = torch.jit.script(model.train())
    torch.testing.assert_close(scripted.eval()(*inputs), expected)
    assert [type(module) for module in model.modules()] == kinds
    if fdt.convert in changes:
        with pytest.raises(torch.jit.Error, match=r"can't be scripted for training: call eval\(\), or fdt.revert"):
            scripted.train()(*inputs)


@scripts
def test_script_of_each_module():
    x = torch.randn(2, 3, 6, 6)
    modules = [
        fdt.Dropout(0.5, scaling="standard"),
        fdt.Dropout2d(),
        fdt.FeatureAlphaDropout(),
        fdt.GaussianDropout(),
        fdt.DropPath(0.5),
        fdt.StochasticDepth(0.5, "row"),
        fdt.DropBlock2d(0.5, 3),
        fdt.VariationalDropout(),
    ]
    fdt.DropoutScheduler(nn.Sequential(*modules), lambda step: 0.25)  # which gives them a rate as a tensor
    for module in modules:
        assert_equal(torch.jit.script(module.eval())(x), module(x))
    words = fdt.EmbeddingDropout(nn.Embedding(5, 4), 0.5).eval()
    assert_equal(torch.jit.script(words)(torch.arange(5)), words(torch.arange(5)))
    for module, says in (
        (fdt.DropConnect(nn.Linear(6, 6), "weight"), "script its submodule `module` instead"),
        (fdt.VariationalLSTM(6, 6), "use torch.jit.trace"),
    ):
        with pytest.raises(RuntimeError, match=f"{type(module).__name__} can't be scripted: .*{says}"):
            torch.jit.script(nn.Sequential(module))


def test_script_of_other_fused_modules():
    """As transformers' are: their forward is none that TorchScript reads."""

    class FusedLayer(Fused, nn.Linear):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(RuntimeError, match=r"a FusedLayer can't be scripted: call fdt\.unfuse before"):
        torch.jit.script(nn.Sequential(FusedLayer(2, 2)))


# ---- ONNX ----

onnx = pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="onnxscript isn't there")


class Everything(nn.Module):
    """Dropout by function, by module, fused and, where enabled, torch's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = fdt.dropout_add(self.inner(self.drop(x)), x, 0.5)
        y, _ = fdt.dropout_add_layer_norm(nn.functional.dropout(y, 0.5, self.training), y, p=0.5)
        return fdt.bias_act_dropout(fdt.dropout(y, 0.5), None, 0.5, "silu") + fdt.dropout(y, 0.0)


@onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_of_training():
    """Each dropout is ONNX's Dropout in training mode, of the same p."""
    model, x = Everything(), torch.ones(64, 6)
    fdt.fuse(model)
    fdt.convert(model)
    with fdt.enabled():
        program = torch.onnx.export(model.train(), (x,), dynamo=True, verbose=False)
    drops = [node for node in program.model.graph if node.op_type == "Dropout"]
    assert len(drops) == 7
    for node in drops:
        _, ratio, training = node.inputs
        assert float(ratio.const_value.numpy()) == 0.5
        assert bool(training.const_value.numpy())


@onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_onnx_refusals():
    """What ONNX has no operator for says so, and names evaluation, in which it exports."""

    class Seeded(nn.Module):
        def forward(self, x):
            return fdt.dropout(x, 0.5, self.training, seed=1)

    x = torch.ones(2, 3, 4, 4)
    for model in (Seeded(), fdt.AlphaDropout(), fdt.DropPath(0.5), fdt.GaussianDropout(), fdt.DropBlock2d(0.5, 2)):
        assert torch.onnx.is_in_onnx_export() is False  # imports what knows of an export
        with pytest.raises(RuntimeError, match=r"ONNX's Dropout has no .*: call model.eval\(\) before"), Exporting():
            model.train()(x)
        assert model.eval()(x) is x
    for shape in ((1, 1, None, None), (None, None, 1, 1)):
        with pytest.raises(RuntimeError, match="has no decisions that elements share"), Exporting():
            fdt.scaled_dot_product_attention(x, x, x, dropout_p=0.5, noise_shape=shape)


class Exporting:
    """As if `torch.onnx.export` traced what is called: it takes seconds, and puts pages around an error."""

    def __enter__(self):
        from torch.onnx._internal.exporter import _flags

        self.flags, self.mode = _flags, torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
        self.flags._is_onnx_exporting = True
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.flags._is_onnx_exporting = False


# ---- make_fx and torch.export, with p as a tensor ----

OF_P = {
    "dropout": lambda x, p: fdt.dropout(x, p),
    "noise_shape": lambda x, p: fdt.dropout(x, p, noise_shape=(None, 1, None)),
    "standard": lambda x, p: fdt.dropout(x, p, False, scaling="standard"),
    "in place": lambda x, p: fdt.dropout(x * 1.0, p, inplace=True),
    "dropout1d": lambda x, p: fdt.dropout1d(x, p),
    "alpha_dropout": lambda x, p: fdt.alpha_dropout(x, p, True),
    "stochastic_depth": lambda x, p: fdt.stochastic_depth(x, p, "row"),
    "variational_dropout": lambda x, p: fdt.variational_dropout(x, p, 1),
    "gaussian_dropout": lambda x, p: fdt.gaussian_dropout(x, p),
    "drop_block2d": lambda x, p: fdt.drop_block2d(x[None], p, 2),
    "dropout_add": lambda x, p: fdt.dropout_add(x, x, p),
    "bias_act_dropout": lambda x, p: fdt.bias_act_dropout(x, None, p),
    "layer_norm": lambda x, p: fdt.dropout_add_layer_norm(x, x, p=p)[0],
    "softmax_dropout": lambda x, p: fdt.softmax_dropout(x, p),
    "attention": lambda x, p: fdt.scaled_dot_product_attention(x, x, x, dropout_p=p),
    "one mask of attention": lambda x, p: fdt.scaled_dot_product_attention(
        x, x, x, dropout_p=p, noise_shape=(1, None, None)
    ),
}


@pytest.mark.parametrize("name", OF_P)
def test_make_fx(name):
    """The graph reads p when it runs."""
    function, x = OF_P[name], torch.randn(4, 5, 6)
    graph = make_fx(function, tracing_mode="symbolic")(x, torch.tensor(0.3))
    for p in (torch.tensor(0.3), torch.tensor(0.6)):
        torch.testing.assert_close(under(1, graph, x, p), under(1, function, x, p))


NAMES = ("dropout", "gaussian_dropout", "softmax_dropout", "attention", "one mask of attention")


def test_torch_export():
    class Model(nn.Module):
        def forward(self, x, p):
            return [OF_P[name](x, p) for name in NAMES]

    model, x = Model(), torch.randn(4, 5, 6)
    module = torch.export.export(model, (x, torch.tensor(0.3))).module()
    for p in (torch.tensor(0.3), torch.tensor(0.6)):
        torch.testing.assert_close(under(1, module, x, p), under(1, model, x, p))
