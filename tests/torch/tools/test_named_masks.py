"""`name_masks`: masks are functions of name, step and sample, however the samples are split."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle

import pytest

torch = pytest.importorskip("torch")
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastdrop as fd
import fastdrop.torch as fdt
from fastdrop.torch.runtime import seeds

B = 8
SPLITS = {
    "contiguous": [range(3), range(3, 8)],
    "interleaved": [range(0, 8, 2), range(1, 8, 2)],
    "shuffled": [[7, 2, 5], torch.tensor([0, 6]), [3, 1, 4]],
    "uneven and empty": [[4], [], [0, 1, 2, 3, 5, 6], (7,)],
}


class Calls(nn.Module):
    """A function of x as a model."""

    def __init__(self, function, *children):
        super().__init__()
        self.function, self.inside = function, nn.ModuleList(children)

    def forward(self, x):
        return self.function(x, *self.inside)


def attention(x, **options):
    heads = x.reshape(len(x), 3, 5, 4)
    return fdt.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4, **options)


def of_heads(x, layer):
    """MultiheadAttention, whose weights have the shape (B * heads, L, S) or (B, heads, L, S)."""
    rows = x.reshape(len(x), 5, 12)
    return layer(rows, rows, rows, need_weights=True)[0] + layer(rows, rows, rows, need_weights=False)[0]


def skip(x, *children):
    return fdt.skip_residual(x, lambda kept: kept * 2, 0.5)


def two_calls(x, layer):
    return layer(x) + 2 * layer(x)


CASES = {
    "dropout": (lambda x: fdt.dropout(x, 0.4), 0),
    "store seed": (lambda x: fdt.dropout(x, 0.4, store="seed"), 0),
    "two functions": (lambda x: fdt.dropout(x, 0.4) + fdt.dropout(x, 0.4), 0),
    "two calls": (functools.partial(two_calls), 0, lambda: fdt.Dropout(0.4)),
    "own seed": (lambda x, layer: layer(x), 0, lambda: fdt.Dropout(0.4, seed=3)),
    "noise_shape": (lambda x: fdt.dropout(x, 0.4, noise_shape=(None, 1, None)), 0),
    "noise_shape of all": (lambda x: fdt.dropout(x, 0.4, noise_shape=(1, None, None)), 0),
    "features": (lambda x: fdt.dropout1d(x, 0.4), 0),
    "alpha": (lambda x: fdt.alpha_dropout(x, 0.4, True), 0),
    "gaussian": (lambda x: fdt.gaussian_dropout(x, 0.4), 0),
    "strided": (lambda x: fdt.dropout(x.transpose(1, 2), 0.4), 0),
    "tokens as samples": (lambda x: fdt.dropout(x.reshape(-1, 12), 0.4).view_as(x), 0),
    "bias_act": (lambda x: fdt.bias_act_dropout(x, torch.arange(12.0).double(), p=0.4, activation="gelu"), 0),
    "norm": (lambda x: fdt.dropout_add_layer_norm(x, 2 * x, p=0.4)[0], 0),
    "softmax": (lambda x: fdt.softmax_dropout(x, 0.4), 0),
    "attention": (attention, 0),
    "attention of shared heads": (functools.partial(attention, noise_shape=(None, 1, None, None)), 0),
    "dropped heads": (functools.partial(attention, noise_shape=(None, None, 1, 1)), 0),
    "multi-head": (of_heads, 0, lambda: nn.MultiheadAttention(12, 3, dropout=0.4, batch_first=True)),
    "depth": (lambda x: fdt.stochastic_depth(x, 0.4, "row"), 0),
    "depth of batch": (lambda x: fdt.stochastic_depth(x, 0.4, "batch"), 0),
    "skip": (skip, 0),
    "tokens": (lambda x: fdt.token_dropout(x, 0.4), 0),
    "LayerDrop": (
        lambda x, layers: layers(x),
        0,
        lambda: fdt.LayerDrop([nn.Linear(12, 12), nn.Linear(12, 12), fdt.Dropout(0.4)], 0.4),
    ),
    "weights": (lambda x, layer: layer(x), 0, lambda: fdt.DropConnect(nn.Linear(12, 3), p=0.4)),
    "words": (
        lambda x, layer: layer((x[..., 0].abs() * 4).long().clamp(max=9)),
        0,
        lambda: fdt.EmbeddingDropout(nn.Embedding(10, 4), 0.4),
    ),
    "time first": (lambda x: fdt.dropout(x.transpose(0, 1), 0.4).transpose(0, 1), 1),
    "encoder": (
        lambda x, layer: layer(x.transpose(0, 1)).transpose(0, 1),
        1,
        lambda: nn.TransformerEncoderLayer(12, 3, 16, 0.4),
    ),
    "variational": (
        lambda x, layer: layer(x)[0],
        0,
        lambda: fdt.VariationalLSTM(
            12, 4, 2, batch_first=True, dropout_input=0.3, dropout_recurrent=0.4, dropout_output=0.3
        ),
    ),
    "lstm": (lambda x, layer: layer(x)[0], 0, lambda: nn.LSTM(12, 4, 2, batch_first=True, dropout=0.4)),
}


def model_of(name):
    function, axis, *makers = CASES[name]
    torch.manual_seed(0)
    model = Calls(function, *(make() for make in makers)).double()
    return model, fdt.name_masks(model, seed=5, sample_axis=axis)


def data():
    return torch.randn(B, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(model, masks, x, samples=None, step=3):
    """Output and gradient."""
    x = x.clone().requires_grad_()
    with masks.at(step, samples):
        y = model(x)
    floating = y.is_floating_point() and y.requires_grad
    if floating:
        (y * torch.arange(1, y.shape[1:].numel() + 1).reshape(y.shape[1:])).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("name", CASES)
def test_split_batch_has_the_whole_ones_masks(name):
    model, masks = model_of(name)
    x = data()
    with fdt.enabled():
        y, grad = run(model, masks, x)
        again, _ = run(model, masks, x)
        assert torch.equal(y, again)
        assert not all(torch.equal(y, run(model, masks, x, step=step)[0]) for step in range(4, 24))
        for split in SPLITS.values():
            for samples in split:
                index = torch.as_tensor(list(samples), dtype=torch.int64)
                if not len(index) and name in ("lstm", "variational", "encoder", "multi-head"):
                    continue  # torch refuses empty batches there
                own_y, own_grad = run(model, masks, x[index], samples)
                torch.testing.assert_close(own_y, y[index], rtol=0, atol=1e-12)
                if grad is not None and own_grad is not None:
                    torch.testing.assert_close(own_grad, grad[index], rtol=0, atol=1e-12)


def small():
    """A model in which dropout is called by modules, functions and torch's own module, and one module twice."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.drop, self.theirs = nn.Linear(12, 12), fdt.Dropout(0.3), nn.Dropout(0.3)

        def forward(self, x):
            x = self.drop(torch.tanh(self.linear(x)))
            return self.drop(self.theirs(x) + F.dropout(x, 0.3, self.training))

    return nn.Sequential(Block(), Block()).double()


def gradients(model, passes):
    """Of parameters, after passes that return losses."""
    model.zero_grad()
    for one in passes:
        one().backward()
    return torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])


@fdt.enabled()
def test_accumulation_restarts_wrappers_and_stages():
    model, x = small(), data().flatten(1)[:, :12]
    masks = fdt.name_masks(model, seed=2)

    def loss(samples, step=1, masks=masks, model=model, **at):
        with masks.at(step, samples=samples):
            return model(x[list(samples)]).square().sum()

    whole = gradients(model, [lambda: loss(range(8))])
    four = [functools.partial(loss, samples) for samples in (range(2), [2, 5], [4, 3], range(6, 8))]
    torch.testing.assert_close(gradients(model, four), whole, rtol=0, atol=1e-12)
    assert not torch.allclose(gradients(model, [lambda: loss(range(8), step=2)]), whole)
    assert masks.state_dict() == {"seed": 2, "step": 2}
    for other in copy.deepcopy(model), pickle.loads(pickle.dumps(nn.Sequential(fdt.Dropout(0.5)))):
        assert other.train()(x) is not None  # copies have no names, and need no block
    wrapped = nn.Module()
    wrapped.module = wrapped._orig_mod = copy.deepcopy(model)  # as DDP and torch.compile name it
    wrapped.forward = wrapped.module.forward
    loaded = fdt.name_masks(wrapped)
    loaded.load_state_dict(masks.state_dict())
    again = gradients(wrapped, [lambda: loss(range(8), loaded.step - 1, loaded, wrapped.module)])
    assert torch.equal(again, whole)
    stage = nn.Sequential(copy.deepcopy(model[1]))
    with masks.at(1), fdt.name_masks(stage, 2, names={"0": "1"}) as of_stage, of_stage.at(1, range(4, 8)):
        hidden = model[0](x)
        assert torch.equal(model[1](hidden)[4:], stage(hidden[4:]))
    masks.remove()
    with pytest.raises(RuntimeError, match="were removed"), masks.at(1):
        pass
    torch.manual_seed(3)
    before = model(x)
    torch.manual_seed(3)
    assert torch.equal(before, model(x))  # by torch's generator again


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("preserve", [False, True])
@fdt.enabled()
def test_checkpoints_draw_again_what_they_drew(reentrant, preserve):
    model, x = small(), data().flatten(1)[:, :12]
    masks = fdt.name_masks(model, seed=2)
    again = {"use_reentrant": reentrant, "preserve_rng_state": preserve}

    def plain(x):
        return F.dropout(model[0](x), 0.3)

    class Whole(nn.Module):
        def __init__(self, outer):
            super().__init__()
            self.inside, self.outer = model, outer

        def forward(self, x):
            function = functools.partial(checkpoint, plain, **again) if self.outer else plain
            y = checkpoint(lambda x: model[1](function(x)), x, **again) if self.outer else model[1](function(x))
            return y.square().sum()

    results = []
    for outer in False, True:
        whole = Whole(outer)
        with fdt.name_masks(whole, seed=2) as own:
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            losses = []
            for samples in range(4), range(4, 8):  # two passes before the first backward
                with own.at(7, samples):
                    losses.append(whole(leaf[list(samples)]))
            for loss in reversed(losses):
                loss.backward(retain_graph=not reentrant)
            if not reentrant:
                losses[0].backward()
            results.append((leaf.grad, *(parameter.grad for parameter in model.parameters())))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    masks.remove()


def halves(shape, axis, rank):
    """The part of a whole that one of two processes has which share an axis."""
    whole, start = list(shape), [0] * len(shape)
    whole[axis], start[axis] = 2 * shape[axis], rank * shape[axis]
    return fd.Part(whole, start, shape)


@fdt.enabled()
def test_layouts_place_tensors_within_modules():
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.attend, self.wide = nn.Dropout(0.4), nn.Identity(), nn.Sequential(nn.Dropout(0.4))

        def forward(self, x, heads):
            y = F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4)
            y = y + F.dropout(heads.flatten(0, 1), 0.4).view_as(heads)
            return self.drop(x), self.wide(x), y

    def features(shape, rank):
        return halves(shape, -1, rank)

    def of_heads(shape, rank):
        return halves(shape if len(shape) == 4 else (shape[0] // 2, 2, *shape[1:]), 1, rank)

    x, heads = data()[:, 0], torch.randn(B, 4, 20, 12, dtype=torch.float64)
    whole = Feed().double()
    with fdt.name_masks(whole, 4) as masks, masks.at(2):
        expected = whole(x, heads)
    samples = [3, 1, 6]
    for rank in range(2):
        layouts = {
            "": functools.partial(of_heads, rank=rank),
            "w*": functools.partial(features, rank=rank),
            "wide": lambda shape: fd.Part(shape, (0,) * len(shape), shape),
            "wide.*": functools.partial(features, rank=rank),
            "drop": functools.partial(features, rank=rank),
        }
        part = Feed().double()
        with fdt.name_masks(part, 4, layouts=layouts) as masks, masks.at(2, samples):
            actual = part(x[samples][:, rank * 6 :][:, :6], heads[samples][:, rank * 2 :][:, :2])
        own = [y[samples] for y in expected]
        for ours, theirs in zip(
            actual,
            (own[0][:, rank * 6 :][:, :6], own[1][:, rank * 6 :][:, :6], own[2][:, rank * 2 :][:, :2]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_layouts_of_modules_are_refused_where_an_axis_must_be_whole():
    whole = (4, 24)
    for function in (lambda x: fdt.dropout_add_layer_norm(x, x, p=0.5), lambda x: fdt.softmax_dropout(x, 0.5)):
        model = nn.Sequential(Calls(function))
        layout = {"0": lambda shape: fd.Part(whole, (0, 0), shape)}
        with fdt.name_masks(model, layouts=layout) as masks, masks.at(0):
            with pytest.raises(ValueError, match="must not cut the last axis"):
                model(torch.zeros(4, 12))
            model(torch.zeros(whole))


def test_errors_name_what_is_wrong():
    model, x = small(), torch.zeros(8, 12, dtype=torch.float64)
    for options in ({"layouts": {"2*": len}}, {"sample_axis": {"x": 1}}, {"names": {"5": "1"}}):
        with pytest.raises(ValueError, match="of the model"):
            fdt.name_masks(model, **options)
    for options in (
        {"layouts": [len]},
        {"layouts": {"0": 3}},
        {"names": {0: "1"}},
        {"sample_axis": 0.5},
        {"seed": "a"},
    ):
        with pytest.raises(TypeError):
            fdt.name_masks(model, **options)
    with pytest.raises(TypeError, match="model must be"):
        fdt.name_masks(len)
    model.append(
        Calls(lambda x: x if len(x) > 2 else fdt.dropout(x, 0.5, part=fdt.cells_of(fd.Part((9, 4), (1, 0), (2, 4)))))
    )
    masks = fdt.name_masks(model)
    with pytest.warns(UserWarning, match=r"0\.theirs \(Dropout\) drops by torch's generator"), masks.at(0):
        model(x)
    with fdt.enabled():
        with pytest.raises(RuntimeError, match=r"0\.drop drops in a model with named masks, but outside"):
            model(x)
        with (
            pytest.raises(ValueError, match=r"0\.drop drops data of shape \(8, 12\), whose axis 0 .* 3 samples"),
            masks.at(0, range(3)),
        ):
            model(x)
        for samples, error in (
            ([1, 1], ValueError),
            ([-1], ValueError),
            ([0.5], TypeError),
            (torch.zeros(2), TypeError),
            ({1, 2}, TypeError),
            (8, TypeError),
        ):
            with pytest.raises(error), masks.at(0, samples):
                model(x)
        with pytest.raises(RuntimeError, match="whose cells are a tensor"), masks.at(0, [2, 3]):
            model[2](x[:2, :4])
        with pytest.raises(TypeError), masks.at("0"):
            model(x)
        with pytest.raises(ValueError, match="seed and step"):
            masks.load_state_dict({"step": 0})
        with pytest.raises(RuntimeError, match="can't be traced"), masks.at(0):
            torch.jit.trace(model, x)
        calls = 1

        def more(x):
            for _ in range(calls):
                x = model[0](x)
            return x

        with masks.at(0):  # torch itself notices it in checkpoints that are not reentrant
            y = checkpoint(more, x.requires_grad_(), use_reentrant=True)
        calls = 2
        with pytest.raises(RuntimeError, match=r"computes 0\.drop again, and it drops more often than in forward"):
            y.sum().backward()
        model.eval()(x)  # needs no block


def test_what_wins_over_names(monkeypatch):
    x, layer = torch.ones(8, 64), fdt.Dropout(0.5)
    model = nn.Sequential(layer, Calls(lambda x: fdt.dropout(x, 0.5, seed=7)))
    plain = fdt.mc_predict(model, x, samples=3, seed=1).mean
    masks = fdt.name_masks(model)
    with masks.at(1):
        assert torch.equal(model[1](x), fdt.dropout(x, 0.5, seed=7))
        assert torch.equal(fdt.mc_predict(model, x, samples=3, seed=1).mean, plain)
        torch.manual_seed(0)
        outside = fdt.dropout(x, 0.5)  # not in the model
        first = model(x)
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(outside, fdt.dropout(x, 0.5, generator=generator))
        assert not torch.equal(model(x), first)  # another call of the layer
    twice = Calls(lambda x: torch.equal(fdt.dropout(x, 0.5), fdt.dropout(x, 0.5)))
    with fdt.name_masks(twice) as own, own.at(1):
        assert not twice(x)
    layer.seed = 5  # of a module does not
    with masks.at(1):
        assert torch.equal(model(x), first)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capturing in False, True:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023
        with pytest.raises(RuntimeError, match="would replay") if capturing else contextlib.nullcontext():
            seeds.refuse_capture(torch.device("cuda", 0))


@fdt.enabled()
def test_check_masks_names_what_is_wrong(monkeypatch):
    model, x = nn.ModuleList([fdt.Dropout(0.5), fdt.StochasticDepth(0.5, "batch"), nn.Dropout(0.5)]), torch.ones(6, 4)

    def process(rank, batches, seed=1, steps=(0,), layout=True, layers=3):
        """What a process with half of the columns in the last layer runs, and its masks."""
        layouts = {"2": functools.partial(halves, axis=1, rank=rank)} if layout and rank is not None else {}
        masks = fdt.name_masks(model, seed, layouts=layouts)

        def run():
            for step, samples in zip(steps * len(batches), batches, strict=False):
                with masks.at(step, samples):
                    y = x[list(samples)]
                    for layer in model[:layers]:
                        y = layer(y[:, :2] if layer is model[2] and rank is not None else y)

        return masks, run

    def together(*processes, expected=None):
        """Runs processes one after the other: the last has what all of them sent."""
        sent = []

        def gather(everywhere, own, group):
            sent.append(own)
            everywhere[:] = [*sent, *[{}] * (len(everywhere) - len(sent))] if len(sent) < len(everywhere) else sent

        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: len(processes))
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        for masks, run in processes:
            found = error = None
            try:
                found = fdt.check_masks(masks, run, expected)
            except RuntimeError as raised:
                error = str(raised)
            masks.remove()
        return error or found

    expected = together(process(None, [range(6)]))
    assert list(expected) == ["0", "1", "2"]
    batches = [range(3)], [[5], [4, 3]]
    good = [process(rank, batch) for batch in batches for rank in range(2)]
    assert together(*good, expected=expected) == expected
    wrong = {
        "0 differs from one process's": [process(0, [range(3)]), process(1, [[4, 5]])],
        "0 has cells twice": [process(None, [range(4)]), process(None, [range(3, 6)])],
        "0 has other seeds": [process(0, [range(6)]), process(1, [range(6)], seed=2)],
        "0 has other steps": [process(0, [range(6)]), process(1, [range(6)], steps=(1,))],
        "2 differs from one process's": [process(rank, [range(6)], layout=False) for rank in range(2)],
        "2 lacks cells": [process(1, [range(6)]), process(1, [range(6)])],
        "0 draws from several": [process(None, [range(6), range(6)], steps=(0, 1))],
        "2 drops in one process, but not here": [process(None, [range(6)], layers=2)],
        "0 has cells twice: processes have 28": [process(None, [range(3), range(2, 6)])],
    }
    for message, processes in wrong.items():
        found = together(*processes, expected=expected)
        assert message in found, found
    assert "2 lacks cells" in together(*[process(1, [range(6)]), process(1, [range(6)])])  # also without expected
