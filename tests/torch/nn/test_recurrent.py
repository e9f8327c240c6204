"""Recurrent layers with masks held over the sequence, against torch's formulas run one sequence and step at a time."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence

import fastdrop.torch as fdt
from fastdrop.torch.nn.recurrent import VariationalGRU, VariationalLSTM

from ..cases import assert_equal, under
from ..module_cases import COPIES

seeded = partial(under, 5)

INPUT, HIDDEN, PROJECTED = 3, 5, 2
LENGTHS = [4, 6, 1, 4]
PAIRS = {"LSTM": (VariationalLSTM, nn.LSTM), "GRU": (VariationalGRU, nn.GRU)}
RATES = {
    "all": {"dropout_input": 0.3, "dropout_recurrent": 0.4, "dropout_output": 0.2},
    "recurrent": {"dropout_recurrent": 0.4},
    "around": {"dropout_input": 0.3, "dropout_output": 0.2},
}
LAYOUTS = ["padded", "batch first", "packed", "packed, sorted", "unbatched"]


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def factors(rate, width, batch):
    """One mask, as multipliers: the next of torch's generator, if it drops at all."""
    return fdt.dropout(torch.ones(1, batch, width, dtype=torch.float64), rate.p)[0]


def lstm_step(x, h, dropped_h, c, w_ih, w_hh, b_ih, b_hh, w_hr):
    i, f, g, o = (w_ih @ x + b_ih + w_hh @ dropped_h + b_hh).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if w_hr is None else w_hr @ h, c


def gru_step(x, h, dropped_h, _, w_ih, w_hh, b_ih, b_hh, w_hr):
    x_r, x_z, x_n = (w_ih @ x + b_ih).chunk(3)
    h_r, h_z, h_n = (w_hh @ dropped_h + b_hh).chunk(3)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    return (1 - z) * (x_n + r * h_n).tanh() + z * h, None


def reference(module, sequences, h0, c0):
    """Outputs of each sequence, last hidden and cell states of shape (layers * directions, batch, size)."""
    is_lstm, batch = module.mode == "LSTM", len(sequences)
    step = lstm_step if is_lstm else gru_step
    ends_h, ends_c = [], []
    for layer in range(module.num_layers):
        given = factors(module.dropout_input, sequences[0].shape[1], batch)
        outputs = [[] for _ in sequences]
        for direction in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * direction
            names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
            weights = [getattr(module, name + suffix, 0.0 if name[0] == "b" else None) for name in names]
            at = len(ends_h)
            carried = factors(module.dropout_recurrent, h0.shape[2], batch)
            last_h, last_c = [], []
            for b, sequence in enumerate(sequences):
                h, c = h0[at, b], None if c0 is None else c0[at, b]
                steps = []
                for x in reversed(sequence) if direction else sequence:
                    h, c = step(x * given[b], h, h * carried[b], c, *weights)
                    steps.append(h)
                outputs[b].append(torch.stack(steps[::-1] if direction else steps))
                last_h.append(h)
                last_c.append(c)
            ends_h.append(torch.stack(last_h))
            ends_c.append(torch.stack(last_c) if is_lstm else None)
        sequences = [torch.cat(parts, 1) for parts in outputs]
    shown = factors(module.dropout_output, sequences[0].shape[1], batch)
    sequences = [sequence * shown[b] for b, sequence in enumerate(sequences)]
    return sequences, torch.stack(ends_h), torch.stack(ends_c) if is_lstm else None


def laid_out(sequences, layout):
    """Sequences as a layer takes them, and what takes its output apart again."""
    if layout == "unbatched":
        return sequences[0], lambda y: [y]
    if layout == "batch first":
        return torch.stack(sequences), lambda y: list(y.unbind(0))
    if layout == "padded":
        return torch.stack(sequences, 1), lambda y: list(y.unbind(1))

    def unpacked(y):
        padded, lengths = pad_packed_sequence(y)
        return [padded[:length, b] for b, length in enumerate(lengths)]

    return pack_sequence(sequences, enforce_sorted=layout == "packed, sorted"), unpacked


def lengths_of(layout):
    if layout == "unbatched":
        return [4]
    if layout == "packed, sorted":
        return sorted(LENGTHS, reverse=True)
    return LENGTHS if layout == "packed" else [4, 4, 4]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


VARIETIES = ["plain", "no bias, states given", "projected"]  # the last for LSTMs alone, as in torch
CASES = dict.fromkeys(
    [
        *itertools.product(PAIRS, VARIETIES[:2], RATES, ["packed"]),
        *itertools.product(PAIRS, VARIETIES[1:2], ["all"], LAYOUTS),
        ("LSTM", "projected", "recurrent", "padded"),
        ("LSTM", "projected", "all", "packed, sorted"),
    ]
)


@pytest.mark.parametrize(("kind", "variety", "rates", "layout"), CASES, ids=map(", ".join, CASES))
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)], ids=["one way", "two layers, two ways"])
def test_values_and_gradients_are_the_formulas(kind, variety, rates, layout, layers, bidirectional):
    options = {"bidirectional": bidirectional, "bias": variety == "plain", "dtype": torch.float64, **RATES[rates]}
    if variety == "projected":
        options["proj_size"] = PROJECTED
    module = PAIRS[kind][0](INPUT, HIDDEN, layers, batch_first=layout == "batch first", **options)
    sequences = [randn(length, INPUT) for length in lengths_of(layout)]
    count = layers * (1 + bidirectional)
    width = PROJECTED if variety == "projected" else HIDDEN
    h0, c0 = (randn(count, len(sequences), size) for size in (width, HIDDEN))
    if variety == "plain":
        h0, c0 = torch.zeros_like(h0), torch.zeros_like(c0)
    c0 = c0 if kind == "LSTM" else None
    expected_y, expected_h, expected_c = seeded(reference, module, sequences, h0, c0)

    given = h0 if layout != "unbatched" else h0[:, 0], c0 if c0 is None or layout != "unbatched" else c0[:, 0]
    hx = None if variety == "plain" else given if kind == "LSTM" else given[0]
    x, split = laid_out(sequences, layout)
    output, end = seeded(module, x, hx)
    h, c = end if kind == "LSTM" else (end, None)
    if layout == "unbatched":
        assert h.dim() == 2
        h, c = h.unsqueeze(1), None if c is None else c.unsqueeze(1)
    results, expected = [*split(output), h], [*expected_y, expected_h]
    if c is not None:
        results.append(c)
        expected.append(expected_c)
    for a, e in zip(results, expected, strict=True):
        torch.testing.assert_close(a, e)

    weights = [torch.randn_like(e) for e in expected]
    leaves = [*module.parameters(), *sequences, *(state for state in (h0, c0) if state is not None and hx is not None)]
    gradients = [
        torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, found, strict=True)), leaves)
        for found in (results, expected)
    ]
    for a, e in zip(*gradients, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("rates", ["all", "around"])
def test_packed_and_padded_sequences_meet_the_same_masks(pair, rates):
    """Where padding can't be felt: forward direction, steps that are there."""
    module = pair[0](INPUT, HIDDEN, 2, **RATES[rates])
    sequences = [torch.randn(length, INPUT) for length in LENGTHS]
    packed, _ = pad_packed_sequence(seeded(module, pack_sequence(sequences, enforce_sorted=False))[0])
    padded, _ = seeded(module, pad_sequence(sequences))
    for b, length in enumerate(LENGTHS):
        torch.testing.assert_close(packed[:length, b], padded[:length, b])


# ---- torch's own ----


@pytest.mark.parametrize("mode", ["evaluation", "rates of 0"])
@pytest.mark.parametrize("layout", ["batch first", "packed", "unbatched"])
def test_without_dropout_it_is_torchs_bit_for_bit(pair, layout, mode):
    options = {"batch_first": layout == "batch first", "bidirectional": True}
    rates = RATES["all"] if mode == "evaluation" else {}
    ours, torchs = pair[0](INPUT, HIDDEN, 2, **options, **rates), pair[1](INPUT, HIDDEN, 2, **options)
    ours.load_state_dict(torchs.state_dict())
    ours.train(mode != "evaluation")
    x, _ = laid_out([torch.randn(length, INPUT) for length in lengths_of(layout)], layout)
    before = torch.get_rng_state()
    for a, e in zip(ours(x), torchs(x), strict=True):
        assert_equal(tuple(part for part in a if part is not None) if isinstance(a, tuple) else a, tuple_of(e))
    assert torch.equal(torch.get_rng_state(), before)


def tuple_of(value):
    return tuple(part for part in value if part is not None) if isinstance(value, tuple) else value


def test_parameters_and_state_dict_are_torchs(pair):
    options = {"num_layers": 2, "bidirectional": True, "bias": True}
    ours, torchs = pair[0](INPUT, HIDDEN, **options, **RATES["all"]), pair[1](INPUT, HIDDEN, **options)
    assert isinstance(ours, pair[1])
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in torchs.named_parameters()]
    for source, target in ((ours, torchs), (torchs, ours)):
        nn.init.normal_(source.weight_hh_l1)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_equal(tuple(source.parameters()), tuple(target.parameters()))


@pytest.mark.parametrize(
    ("x", "hx"),
    [
        ((0, 2, INPUT), None),
        ((INPUT,), None),
        ((4, 2, INPUT + 1), None),
        ((4, 2, INPUT), (1, 3, HIDDEN)),
        ((4, INPUT), (1, 1, HIDDEN)),
        ((4, 2, INPUT), (1, HIDDEN)),
    ],
    ids=["no steps", "1-D", "width", "batch of states", "batched states", "unbatched states"],
)
def test_refuses_what_torch_refuses(pair, x, hx):
    x, state = torch.ones(x), None if hx is None else torch.zeros(hx)
    hx = state if state is None or pair[1] is nn.GRU else (state, state)
    with pytest.raises((RuntimeError, ValueError)) as torchs:
        pair[1](INPUT, HIDDEN)(x, hx)
    with pytest.raises(type(torchs.value)):
        pair[0](INPUT, HIDDEN, **RATES["all"])(x, hx)
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1\.5$"):
        pair[0](INPUT, HIDDEN, dropout_output=1.5)
    with pytest.raises(TypeError, match="dropout"):
        pair[0](INPUT, HIDDEN, 2, dropout=0.5)


# ---- the masks ----


@pytest.mark.parametrize("recurrent", [0.0, 0.2], ids=["fused", "stepped"])
def test_masks_are_held_over_time_and_differ_between_sequences(pair, recurrent):
    module = pair[0](40, 50, dropout_input=0.5, dropout_recurrent=recurrent, dropout_output=0.5)
    x = torch.randn(7, 6, 40, requires_grad=True)
    y, _ = module(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for masks in (y == 0, dx == 0):
        assert (masks == masks[0]).all()
        assert len({tuple(row) for row in masks[0].tolist()}) == 6
        assert 0.3 < masks.float().mean() < 0.7


def test_last_states_are_not_dropped(pair):
    module = pair[0](INPUT, HIDDEN, dropout_output=1.0)
    y, end = module(torch.randn(4, 2, INPUT))
    assert not y.any()
    assert all(state.all() for state in (end if isinstance(end, tuple) else (end,)))


def test_p_of_1_drops_all(pair):
    module = pair[0](INPUT, HIDDEN, dropout_recurrent=1.0)
    x, state = torch.randn(3, 2, INPUT), torch.randn(1, 2, HIDDEN)
    if pair[1] is nn.LSTM:
        cut = (torch.full_like(state, math.inf), state)
        y, _ = module(x[:1], cut)
        expected, _ = module.eval()(x[:1], (torch.zeros_like(state), state))
    else:  # the update gate carries the state over all the same
        y, _ = module(x[:1], state)
        with torch.no_grad():
            module.weight_hh_l0.zero_()
        expected, _ = module.eval()(x[:1], state)
    torch.testing.assert_close(y, expected)
    assert not pair[0](INPUT, HIDDEN, dropout_output=1.0)(x)[0].any()
    blind = pair[0](INPUT, HIDDEN, dropout_input=1.0)
    assert_equal(blind(x * math.inf)[0], blind.eval()(x * 0.0)[0])


def test_dropped_infinities_leave_no_trace():
    module = VariationalLSTM(INPUT, HIDDEN, dropout_recurrent=0.5)
    dropped = seeded(lambda: fdt.dropout(torch.ones(1, 1, HIDDEN), 0.5)) == 0
    h0, c0 = torch.where(dropped, math.inf, 0.25), torch.zeros(1, 1, HIDDEN)
    y, _ = seeded(module, torch.ones(3, 1, INPUT), (h0, c0))
    assert dropped.any()
    assert_equal(y, seeded(module, torch.ones(3, 1, INPUT), (torch.full_like(h0, 0.25), c0))[0])


def test_each_rate_is_a_module_that_can_be_driven(pair):
    module = pair[0](INPUT, HIDDEN, **RATES["all"])
    x = torch.randn(4, 2, INPUT)
    names = [name for name, child in module.named_children() if isinstance(child, fdt.VariationalDropout)]
    assert names == ["dropout_input", "dropout_recurrent", "dropout_output"]
    plain = module.eval()(x)[0]
    module.dropout_output.train()  # dropout alone, as for Monte Carlo samples
    module.dropout_output.p = 1.0
    assert not module(x)[0].any()
    module.train()
    for child in module.children():
        child.p = 0.0
    assert_equal(module(x)[0], plain)


# ---- memory ----


@pytest.mark.parametrize("steps", [3, 30])
def test_kept_masks_do_not_grow_with_time(pair, steps):
    batch, kept = 4, []
    module = pair[0](64, 32, **RATES["all"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(steps, batch, 64, requires_grad=True))
    words = [t for t in kept if t.dtype == torch.int32]
    flags = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.dtype == torch.bool}
    assert sorted(t.nbytes for t in words) == [batch * 32 // 8, batch * 64 // 8]
    assert list(flags.values()) == [batch * 32]


# ---- as a module among others ----


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies(pair, duplicate):
    module = pair[0](INPUT, HIDDEN, 2, bidirectional=True, **RATES["all"])
    x = torch.randn(4, 2, INPUT)
    module(x)[0].sum().backward()
    twin = duplicate(module)
    assert repr(twin) == repr(module)
    assert all(f"({name}): VariationalDropout(p={p}" in repr(twin) for name, p in RATES["all"].items())
    assert_equal(seeded(twin, x)[0], seeded(module, x)[0])


class Block(nn.Module):
    def __init__(self, *widths):
        super().__init__()
        self.linear = nn.Linear(*widths)

    def forward(self, x):
        return self.linear(x).relu()


class Tagger(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.before, self.layer, self.after = Block(INPUT, INPUT), layer, Block(HIDDEN, 2)

    def forward(self, x):
        y, _ = self.layer(self.before(x))
        return self.after(y)


@pytest.mark.parametrize(("rates", "allow_rnn"), [("all", False), ("around", True)])
def test_compiled_model_draws_the_same_and_compiles_what_it_would_around_torchs(pair, rates, allow_rnn):
    model, torchs = Tagger(pair[0](INPUT, HIDDEN, **RATES[rates])), Tagger(pair[1](INPUT, HIDDEN))
    graphs = {model: [], torchs: []}
    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        for network, found in graphs.items():
            torch.compiler.reset()
            compiled = torch.compile(network, backend=lambda graph, _, found=found: found.append(graph) or graph)
            for steps in (3, 4):
                x = torch.randn(steps, 2, INPUT)
                y = seeded(compiled, x)
                y.sum().backward()
                assert_equal(y, seeded(network, x))
    assert graphs[model]
    assert len(graphs[model]) == len(graphs[torchs])
    torch.compiler.reset()


def test_traced_by_fx_it_stays_a_module(pair):
    model = Tagger(pair[0](INPUT, HIDDEN, **RATES["all"]))
    traced, x = torch.fx.symbolic_trace(model), torch.randn(4, 2, INPUT)
    assert_equal(seeded(traced, x), seeded(model, x))
    traced.eval()
    assert_equal(traced(x), model.eval()(x))


def test_transforms_of_torch_func(pair):
    module = pair[0](INPUT, HIDDEN, **RATES["all"])
    x, parameters = torch.randn(4, 2, INPUT), dict(module.named_parameters())

    def loss(values):
        return torch.func.functional_call(module, values, x)[0].square().sum()

    found = seeded(torch.func.grad(loss), parameters)
    seeded(loss, parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


@pytest.mark.parametrize("rates", ["all", "around"])
def test_autocast(pair, rates):
    module = pair[0](INPUT, HIDDEN, 2, **RATES[rates])
    x = torch.randn(4, 2, INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            theirs, _ = pair[1](INPUT, HIDDEN)(x)
        except RuntimeError as error:
            pytest.skip(f"torch has no such layer in bfloat16 on this CPU: {error}")
        y, end = seeded(module, x)
    assert {y.dtype, *(state.dtype for state in (end if isinstance(end, tuple) else (end,)))} == {theirs.dtype}
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), seeded(module, x)[0], rtol=0.05, atol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
