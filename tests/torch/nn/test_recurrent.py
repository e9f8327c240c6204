"""Recurrent layers with masks held over the sequence, against torch's formulas run one sequence and step at a time."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastdrop.torch as fdt
from fastdrop.torch.nn import recurrence, recurrent
from fastdrop.torch.nn.recurrent import VariationalGRU, VariationalLSTM

from ..cases import assert_equal, saved_tensors, under
from ..module_cases import COPIES, Calls

seeded = partial(under, 5)

INPUT, HIDDEN, PROJECTED = 3, 5, 2
LENGTHS = [4, 6, 1, 4]
PAIRS = {"LSTM": (VariationalLSTM, nn.LSTM), "GRU": (VariationalGRU, nn.GRU)}
RATES = {
    "all": {"dropout_input": 0.3, "dropout_recurrent": 0.4, "dropout_output": 0.2},
    "recurrent": {"dropout_recurrent": 0.4},
    "around": {"dropout_input": 0.3, "dropout_output": 0.2},
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def factors(module, rate, width, batch):
    """One mask, as multipliers for each sequence: the next of torch's generator, if it drops at all."""
    masks = 1 if module.shared else batch
    return fdt.dropout(torch.ones(1, masks, width, dtype=torch.float64), rate.p)[0].expand(batch, width)


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


def reference(module, sequences, h0, c0=None):
    """Outputs of each sequence, last hidden and cell states of shape (layers * directions, batch, size)."""
    is_lstm, batch = module.mode == "LSTM", len(sequences)
    step = lstm_step if is_lstm else gru_step
    ends_h, ends_c = [], []
    for layer in range(module.num_layers):
        given = factors(module, module.dropout_input, sequences[0].shape[1], batch)
        outputs = [[] for _ in sequences]
        for direction in range(1 + module.bidirectional):
            suffix = f"_l{layer}" + "_reverse" * direction
            names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
            weights = [getattr(module, name + suffix, 0.0 if name[0] == "b" else None) for name in names]
            at = len(ends_h)
            carried = factors(module, module.dropout_recurrent, h0.shape[2], batch)
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
    shown = factors(module, module.dropout_output, sequences[0].shape[1], batch)
    sequences = [sequence * shown[b] for b, sequence in enumerate(sequences)]
    return sequences, torch.stack(ends_h), torch.stack(ends_c) if is_lstm else []


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


ONE_WAY, TWO_WAYS = (1, False), (2, True)  # layers, and whether there are two directions
CASES = [
    ("LSTM", "plain", "all", "packed", TWO_WAYS),
    ("LSTM", "plain", "all", "batch first", TWO_WAYS),
    ("LSTM", "no bias, states given", "all", "padded", TWO_WAYS),
    ("LSTM", "no bias, states given", "all", "unbatched", TWO_WAYS),
    ("LSTM", "no bias, states given", "all", "packed", ONE_WAY),
    ("LSTM", "no bias, states given", "around", "packed", TWO_WAYS),
    ("LSTM", "no bias, states given", "recurrent", "packed, sorted", TWO_WAYS),
    ("LSTM", "projected", "all", "packed, sorted", TWO_WAYS),
    ("LSTM", "projected", "recurrent", "padded", ONE_WAY),
    ("GRU", "plain", "all", "packed", TWO_WAYS),
    ("GRU", "no bias, states given", "around", "packed", TWO_WAYS),
    ("GRU", "no bias, states given", "all", "unbatched", ONE_WAY),
]


@pytest.mark.parametrize("shared", [False, True], ids=["a mask for each sequence", "shared"])
@pytest.mark.parametrize(("kind", "variety", "rates", "layout", "size"), CASES)
def test_values_and_gradients_are_the_formulas(kind, variety, rates, layout, size, shared):
    layers, bidirectional = size
    options = {"bidirectional": bidirectional, "bias": variety == "plain", "dtype": torch.float64, **RATES[rates]}
    options["shared"] = shared
    if variety == "projected":
        options["proj_size"] = PROJECTED
    module = PAIRS[kind][0](INPUT, HIDDEN, layers, batch_first=layout == "batch first", **options)
    sequences = [randn(length, INPUT) for length in lengths_of(layout)]
    widths = [PROJECTED if variety == "projected" else HIDDEN, HIDDEN][: 1 + (kind == "LSTM")]
    begin = [randn(layers * (1 + bidirectional), len(sequences), width) for width in widths]
    if variety == "plain":
        begin = [torch.zeros_like(state) for state in begin]
    expected = tree_leaves(seeded(reference, module, sequences, *begin))

    hx = tuple(state[:, 0] for state in begin) if layout == "unbatched" else tuple(begin)
    hx = None if variety == "plain" else hx if kind == "LSTM" else hx[0]
    x, split = laid_out(sequences, layout)
    output, end = seeded(module, x, hx)
    end = [state.unsqueeze(1) if layout == "unbatched" else state for state in tree_leaves(end)]
    results = [*split(output), *end]
    torch.testing.assert_close(results, expected)

    weights = [torch.randn_like(e) for e in expected]
    leaves = [*module.parameters(), *sequences, *(begin if variety != "plain" else ())]
    of_results, of_expected = (
        torch.autograd.grad(sum((w * r).sum() for w, r in zip(weights, found, strict=True)), leaves)
        for found in (results, expected)
    )
    torch.testing.assert_close(of_results, of_expected)


# ---- the two ways of the steps ----


def test_one_function_for_all_steps_computes_the_formula(pair, monkeypatch):
    """The same values and gradients up to rounding, from the same draws."""
    varieties = [{}, {"bias": False}, {"proj_size": PROJECTED}][: 2 + (pair[1] is nn.LSTM)]
    for options, layout, dtype in itertools.product(
        varieties, ("packed", "batch first"), (torch.float32, torch.float64)
    ):
        options = {**options, "batch_first": layout == "batch first", "bidirectional": True, "dtype": dtype}
        module = pair[0](INPUT, HIDDEN, 2, **options, **RATES["all"])
        x, _ = laid_out([torch.randn(length, INPUT, dtype=dtype) for length in lengths_of(layout)], layout)

        def step(module=module, x=x):
            results = [y for y in tree_leaves(seeded(module, x)) if y.is_floating_point()]
            loss = sum(y.sin().sum() for y in results)
            return results, torch.autograd.grad(loss, list(module.parameters()))

        actual = step()
        with monkeypatch.context() as patch:
            patch.setattr(recurrent, "run_steps", recurrence.compose_steps)
            torch.testing.assert_close(actual, step())


@pytest.mark.parametrize("kind", ["LSTM", "LSTM projected", "GRU"])
def test_gradients_of_any_order(kind):
    options = {"proj_size": 1} if kind == "LSTM projected" else {}
    module = PAIRS[kind[:4].strip()][0](2, 2, bidirectional=True, dtype=torch.float64, dropout_recurrent=0.4, **options)
    widths = [options.get("proj_size", 2), 2][: 1 + (kind != "GRU")]
    names = [name for name, _ in module.named_parameters()]
    given = [randn(4, 2, 2), *(randn(2, 2, width) for width in widths), *module.parameters()]

    def function(x, *rest):
        states, values = rest[: len(widths)], dict(zip(names, rest[len(widths) :], strict=True))
        x = x * values["weight_hh_l0"].sum()  # one input is computed from another
        arguments = pack_padded_sequence(x, [4, 2]), states if len(states) > 1 else states[0]
        y, end = seeded(torch.func.functional_call, module, values, arguments)
        return (y.data, *tree_leaves(end))

    assert torch.autograd.gradcheck(function, given, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)
    for one in (1, len(given) - 1):  # alone
        wanted = [x.detach().requires_grad_(i == one) for i, x in enumerate(given)]
        assert torch.autograd.gradcheck(function, wanted, fast_mode=True)


def test_steps_keep_what_their_gradients_need(pair):
    """The gates, the state before, what was multiplied and one number more; x and parameters, which others keep."""
    steps, batch, width = 30, 4, 32
    module, x = pair[0](64, width, dropout_recurrent=0.4), torch.randn(30, 4, 64)
    with saved_tensors() as kept:
        y = module(x)
    others = {tensor.data_ptr() for tensor in (x, *module.parameters())}
    sizes = {t.data_ptr(): t.nbytes for t in kept if t.data_ptr() not in others and t.numel() > 4 * batch * width}
    assert sum(sizes.values()) == (4 + 3 if pair[1] is nn.LSTM else 3 + 3) * steps * batch * width * 4
    del y


# ---- torch's own ----


@pytest.mark.parametrize("layout", ["batch first", "packed", "unbatched"])
def test_without_dropout_it_is_torchs_bit_for_bit(pair, layout):
    options = {"batch_first": layout == "batch first", "bidirectional": True}
    ours, torchs = pair[0](INPUT, HIDDEN, 2, **options, **RATES["all"]), pair[1](INPUT, HIDDEN, 2, **options)
    assert isinstance(ours, pair[1])
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in torchs.named_parameters()]
    torchs.load_state_dict(ours.state_dict())
    x, _ = laid_out([torch.randn(length, INPUT) for length in lengths_of(layout)], layout)
    expected, before = tree_leaves(torchs(x)), torch.get_rng_state()
    assert_equal(tuple(tree_leaves(ours.eval()(x))), tuple(expected))
    for rate in ours.train().children():
        rate.p = 0.0
    assert_equal(tuple(tree_leaves(ours(x))), tuple(expected))
    assert torch.equal(torch.get_rng_state(), before)


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


def test_refuses_bad_rates(pair):
    with pytest.raises(ValueError, match=r"^dropout probability has to be between 0 and 1, but got 1\.5$"):
        pair[0](INPUT, HIDDEN, dropout_output=1.5)
    with pytest.raises(TypeError, match="dropout"):
        pair[0](INPUT, HIDDEN, 2, dropout=0.5)
    with pytest.raises(TypeError, match="proj_size"):
        VariationalGRU(INPUT, HIDDEN, proj_size=2)


# ---- the masks ----


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
    y, end = pair[0](INPUT, HIDDEN, dropout_output=1.0)(x)
    assert not y.any()
    assert all(last.all() for last in (end if isinstance(end, tuple) else (end,)))
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


def test_kept_masks_do_not_grow_with_time(pair):
    steps, batch, kept = 30, 4, []
    module = pair[0](64, 32, **RATES["all"])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(steps, batch, 64, requires_grad=True))
    words = [t for t in kept if t.dtype == torch.int32]
    flags = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.dtype == torch.bool}
    assert sorted(t.nbytes for t in words) == [batch * 32 // 8, batch * 64 // 8]
    assert list(flags.values()) == [batch * 32]


def test_shared_masks_run_torchs_fused_layers(pair, monkeypatch):
    """And keep a bit for each feature."""
    steps, batch, kept = 30, 4, []
    module = pair[0](64, 32, **RATES["all"], shared=True)
    monkeypatch.delattr(recurrent._Variational, "_recurrence")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(torch.randn(steps, batch, 64, requires_grad=True))
    assert sorted(t.nbytes for t in kept if t.dtype == torch.int32) == [4, 4, 8]  # states, output, input


def test_layers_from_before_masks_could_be_shared_load(pair):
    module = pair[0](INPUT, HIDDEN, **RATES["all"])
    del module.__dict__["shared"]
    assert seeded(module, torch.ones(2, 3, INPUT))[0].shape == (2, 3, HIDDEN)


# ---- as a module among others ----


@pytest.mark.parametrize("duplicate", ["deepcopy", "torch.save"])
def test_copies(duplicate):
    module, x = VariationalLSTM(INPUT, HIDDEN, 2, bidirectional=True, **RATES["all"]), torch.randn(4, 2, INPUT)
    module(x)[0].sum().backward()
    twin = COPIES[duplicate](module)
    assert repr(twin) == repr(module)
    assert all(f"({name}): VariationalDropout(p={p}" in repr(twin) for name, p in RATES["all"].items())
    assert_equal(seeded(twin, x)[0], seeded(module, x)[0])


def tagger(layer):
    """A network whose blocks call, between and after which a compiler may cut."""
    block = lambda *widths: Calls(lambda self, x: self.linear(x).relu(), linear=nn.Linear(*widths))  # noqa: E731
    return Calls(
        lambda self, x: self.after(self.layer(self.before(x))[0]),
        before=block(INPUT, INPUT),
        layer=layer,
        after=block(HIDDEN, 2),
    )


@pytest.mark.parametrize(("kind", "rates", "allow_rnn"), [("LSTM", "all", False), ("GRU", "around", True)])
def test_compiled_model_draws_the_same_and_compiles_what_it_would_around_torchs(kind, rates, allow_rnn):
    pair = PAIRS[kind]
    model, torchs = tagger(pair[0](INPUT, HIDDEN, **RATES[rates])), tagger(pair[1](INPUT, HIDDEN))
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


def test_traced_by_fx_it_stays_a_module():
    model = tagger(VariationalLSTM(INPUT, HIDDEN, **RATES["all"]))
    traced, x = torch.fx.symbolic_trace(model), torch.randn(4, 2, INPUT)
    assert_equal(seeded(traced, x), seeded(model, x))
    traced.eval()
    assert_equal(traced(x), model.eval()(x))


def test_transforms_of_torch_func():
    module = VariationalGRU(INPUT, HIDDEN, **RATES["all"])
    x, parameters = torch.randn(4, 2, INPUT), dict(module.named_parameters())

    def loss(values):
        return torch.func.functional_call(module, values, x)[0].square().sum()

    found = seeded(torch.func.grad(loss), parameters)
    seeded(loss, parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_autocast(pair):
    module = pair[0](INPUT, HIDDEN, 2, **RATES["all"])
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


def test_backward_inside_autocast(pair):
    module, x = pair[0](INPUT, HIDDEN, dropout_recurrent=0.4), torch.randn(4, 2, INPUT)
    y, again = (seeded(module, x)[0].sin().sum() for _ in range(2))
    expected = torch.autograd.grad(y, list(module.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(torch.autograd.grad(again, list(module.parameters())), expected)
