"""``part=`` and seeds with an offset: what a process holds of a whole has the whole's mask, in forward and backward."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest

import fastdrop as fd

torch = pytest.importorskip("torch")

import fastdrop.torch as fdt

from ...cases import activated
from ..cases import assert_equal, numbers_drawn

P, SEED = 0.4, 7

# A whole's shape, and a function of x and the arguments that say what to draw.
CALLS = {
    "dropout": ((5, 6, 7), lambda x, **draw: fdt.dropout(x, P, **draw)),
    "dropout, complex": ((5, 6), lambda x, **draw: fdt.dropout(torch.complex(x, x), P, **draw).real),
    "dropout, five axes": ((3, 4, 2, 3, 4), lambda x, **draw: fdt.dropout(x, P, **draw)),
    "noise_shape": ((5, 6, 7), lambda x, **draw: fdt.dropout(x, P, noise_shape=(None, 1, None), **draw)),
    "alpha": ((5, 6, 7), lambda x, **draw: fdt.alpha_dropout(x, P, True, **draw)),
    "drop_connect": ((5, 6), lambda x, **draw: fdt.drop_connect(x, P, **draw)),
    "gaussian": ((5, 6, 7), lambda x, **draw: fdt.gaussian_dropout(x, P, **draw)),
    "dropout1d": ((5, 6, 7), lambda x, **draw: fdt.dropout1d(x, P, **draw)),
    "dropout2d": ((4, 6, 3, 2), lambda x, **draw: fdt.dropout2d(x, P, **draw)),
    "feature_alpha": ((5, 6, 7), lambda x, **draw: fdt.feature_alpha_dropout(x, P, True, **draw)),
    "variational": ((5, 6, 7), lambda x, **draw: fdt.variational_dropout(x, P, 1, **draw)),
    "stochastic_depth": ((5, 6, 7), lambda x, **draw: fdt.stochastic_depth(x, P, "row", **draw)),
    "one for the batch": ((5, 6, 7), lambda x, **draw: fdt.stochastic_depth(x, P, "batch", **draw)),
    "dropout_add": ((5, 6, 7), lambda x, **draw: fdt.dropout_add(x, x, P, **draw)),
    "relu": ((5, 6, 7), lambda x, **draw: fdt.bias_act_dropout(x, None, P, activation="relu", **draw)),
    "norm": ((5, 6, 7), lambda x, **draw: fdt.dropout_add_layer_norm(x, x, p=P, **draw)[0]),
    "softmax": ((2, 3, 5, 7), lambda x, **draw: fdt.softmax_dropout(x, P, **draw)),
}
WHOLE_LAST_AXIS = ("norm", "softmax")
GAUSSIAN = "gaussian"


def box(part: fd.Part) -> tuple[slice, ...]:
    return tuple(slice(start, start + local) for start, local in zip(part.start, part.local, strict=True))


def random_parts(shape, count, whole_last_axis=False):
    """Parts of every kind: cut along some axes, of extent 1, empty, the whole."""
    rng = np.random.default_rng(sum(shape))
    for _ in range(count):
        ends = [sorted(rng.integers(0, extent, 2, endpoint=True)) for extent in shape]
        for axis, extent in enumerate(shape):
            choice = rng.random()
            if choice < 0.4 or (whole_last_axis and axis == len(shape) - 1):
                ends[axis] = (0, extent)
            elif choice < 0.6:
                ends[axis] = (ends[axis][0] % extent, ends[axis][0] % extent + 1)
        yield fd.Part(shape, tuple(int(a) for a, _ in ends), tuple(int(b - a) for a, b in ends))


def results(call, x, **draw):
    """The result and the gradient of a sum that tells elements apart."""
    x = x.detach().clone().requires_grad_()
    y = call(x, **draw)
    y.sin().sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("backend", ["c", "numpy"])
@pytest.mark.parametrize("name", CALLS)
def test_parts_have_the_mask_of_the_whole(name, backend):
    shape, call = CALLS[name]
    whole = torch.randn(shape, dtype=torch.float64)
    for i, part in enumerate(random_parts(shape, 12, name in WHOLE_LAST_AXIS)):
        seed = SEED if i % 2 else torch.tensor([SEED, -3])  # an offset has 64 bits too
        store = {} if name == GAUSSIAN else {"store": ("bits", "seed")[i // 2 % 2]}
        with activated(backend):
            of_whole = results(call, whole, seed=seed, **store)
            of_part = results(call, whole[box(part)], seed=seed, part=part, **store)
        assert_equal(of_part, tuple(result[box(part)] for result in of_whole))


def test_several_parts_along_an_axis():
    """Such as shuffled samples. Along an axis whose decisions are shared they share them."""
    shape, order = (6, 5, 7), [4, 0, 3]
    whole = torch.randn(shape)
    for axis in range(3):
        local = tuple(1 if i == axis else extent for i, extent in enumerate(shape))
        parts = [fd.Part(shape, tuple(at if i == axis else 0 for i in range(3)), local) for at in order]
        mine = whole.index_select(axis, torch.tensor(order))
        for name in ("dropout", "gaussian", "noise_shape", "dropout1d"):
            call = CALLS[name][1]
            wanted = call(whole, seed=SEED).index_select(axis, torch.tensor(order))
            assert_equal(call(mine, seed=SEED, part=parts), wanted)


ATTENTION = (2, 6, 20, 33)  # batch, heads, queries, keys


@pytest.mark.parametrize("noise_shape", [None, (1, None, None, None), (None, None, 1, None), (None, None, None, 1)])
def test_attention_of_some_heads_and_queries(noise_shape):
    """The kernel finds one run of cells by strides, and is given the words of several."""
    batch, heads, queries, keys = ATTENTION
    q, k, v = (torch.randn(batch, heads, length, 16) for length in (queries, keys, keys))
    options = {"dropout_p": P, "seed": SEED, "noise_shape": noise_shape}
    whole = fdt.scaled_dot_product_attention(q, k, v, **options)
    cuts = [((0, 2, 0, 0), (2, 3, 20, 33)), ((1, 5, 3, 0), (1, 1, 9, 33)), ((0, 1, 4, 0), (2, 2, 16, 33))]
    for start, local in cuts:
        part = fd.Part(ATTENTION, start, local)
        samples, of_heads, of_queries, _ = box(part)
        own = q[samples, of_heads, of_queries], k[samples, of_heads], v[samples, of_heads]
        for store in ("seed", "bits"):
            y = fdt.scaled_dot_product_attention(*own, part=part, store=store, **options)
            torch.testing.assert_close(y, whole[samples, of_heads, of_queries], rtol=0, atol=2e-6)
        drops = partial(fdt.scaled_dot_product_attention, part=part, **options)
        composed = torch.func.vmap(drops, randomness="same")(*(x[None] for x in own))
        torch.testing.assert_close(composed[0], y, rtol=0, atol=2e-6)


def test_shuffled_samples_and_heads_of_attention():
    """Cells that strides can't say."""
    batch, heads, queries, keys = ATTENTION
    q, k, v = (torch.randn(batch, heads, length, 16, requires_grad=True) for length in (queries, keys, keys))
    order = [4, 0, 3]
    parts = [fd.Part(ATTENTION, (0, at, 0, 0), (2, 1, 20, 33)) for at in order]
    whole = fdt.scaled_dot_product_attention(q, k, v, dropout_p=P, seed=SEED)
    mine = fdt.scaled_dot_product_attention(*(x[:, order] for x in (q, k, v)), dropout_p=P, seed=SEED, part=parts)
    torch.testing.assert_close(mine, whole[:, order], rtol=0, atol=2e-6)
    for wanted, got in zip(
        torch.autograd.grad(whole[:, order].sin().sum(), (q, k, v)),
        torch.autograd.grad(mine.sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)


def test_modules_and_the_generator_go_on_alike_whatever_the_part():
    """A call takes one number, also for an empty part, so ranks stay in step."""
    for part in (fd.Part((4, 3), (0, 0), (0, 3)), fd.Part((4, 3), (1, 0), (2, 3))):
        x = torch.ones(part.local)
        assert numbers_drawn(lambda: fdt.dropout(x, P, part=part)) == 1  # noqa: B023
        assert numbers_drawn(lambda: fdt.gaussian_dropout(x, P, part=part)) == 1  # noqa: B023


def test_one_graph_serves_all_parts():
    shape, graphs = (6, 8, 10), []

    def compiler(graph, inputs):
        graphs.append(graph.code)
        return graph

    @torch.compile(backend=compiler, fullgraph=True)
    def dropped(x, seed, part):
        return fdt.dropout_add(fdt.dropout(x, P, seed=seed, part=part), x, P, seed=seed, part=part)

    def eager(x, seed):
        return fdt.dropout_add(fdt.dropout(x, P, seed=seed), x, P, seed=seed)

    whole = torch.randn(shape)
    for at in range(3):
        part, seed = fd.Part(shape, (at, 2, 0), (3, 4, 10)), torch.tensor([SEED, at])
        y = dropped(whole[box(part)].contiguous(), seed, fdt.cells_of(part))
        assert_equal(y, eager(whole, seed)[box(part)])
    assert len(graphs) == 1
    part = fd.Part(shape, (3, 2, 0), (3, 4, 10))  # a constant of a graph of its own
    assert_equal(dropped(whole[box(part)].contiguous(), seed, part), eager(whole, seed)[box(part)])
    assert len(graphs) == 2


BAD = {
    "no part": (3, TypeError, "part must be"),
    "another shape": (fd.Part((4, 3), (0, 0), (2, 3)), ValueError, "part must have x's shape"),
    "cells of a float dtype": (torch.ones(1, 6), TypeError, "int64"),
    "cells of no runs": (torch.ones(5, dtype=torch.int64), ValueError, "6 numbers"),
    "too few cells": (torch.tensor([[0, 1, 0, 1, 0, 8]]), ValueError, "a cell for each of the mask's 9"),
    "cells past the last": (torch.tensor([[-1, 1, 0, 3, 3, 3]]), ValueError, "below 2\\*\\*64"),
    "cells without number": (torch.tensor([[0, 1, 0, 1, 0, -9]]), ValueError, "0 cells or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parts_are_refused_before_anything_is_drawn(name):
    part, error, message = BAD[name]
    x = torch.ones(3, 3)
    for call in (fdt.dropout, fdt.gaussian_dropout, lambda x, p, **draw: fdt.dropout_add(x, x, p, **draw)):
        before = torch.get_rng_state()
        with pytest.raises(error, match=message):
            call(x, P, part=part)
        assert_equal(torch.get_rng_state(), before)
        with pytest.raises(error, match=message):  # the op, for whoever looks at calls
            torch.func.vmap(lambda x: call(x, P, seed=1, part=part))(x[None])  # noqa: B023


def test_seed_tensors_are_one_number_or_two():
    x = torch.ones(64)
    y = fdt.dropout(x, P, seed=torch.tensor([5, 0]))
    assert_equal(y, fdt.dropout(x, P, seed=5))
    assert not torch.equal(y, fdt.dropout(x, P, seed=torch.tensor([5, 1])))
    mask = fd.draw_mask((64,), P, rng=fd.Stream(5, 1)).to_bool()
    np.testing.assert_array_equal(fdt.dropout(x, P, seed=torch.tensor([5, 1])).numpy() != 0, mask)
    for seed in (torch.tensor([1, 2, 3]), torch.tensor([1, 0, 0, 1, 0, 1, 0, 64])):  # ops have the latter
        for part in (None, fd.Part((65,), (1,), (64,))):
            drop = partial(fdt.dropout, p=P, seed=seed, part=part)
            for call in (lambda: drop(x), lambda: torch.func.vmap(drop)(x[None])):  # noqa: B023
                with pytest.raises(ValueError, match="one number, or two"):
                    call()


def test_nested_tensors_have_no_parts():
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    for name in ("dropout", GAUSSIAN, "relu", "norm", "softmax"):
        with pytest.raises(RuntimeError, match="dense tensors"):
            CALLS[name][1](x, part=fd.Part((4, 3), (0, 0), (3, 3)))


def test_axes_that_a_function_needs_whole():
    x = torch.randn(3, 4, 4)
    columns, rows, tokens = (fd.Part(whole, (0, 0, 0), (3, 4, 4)) for whole in ((3, 4, 8), (3, 8, 4), (3, 8, 8)))
    for call, words in (
        (lambda: fdt.dropout_add_layer_norm(x, None, part=columns), "cut the last axis"),
        (lambda: fdt.dropout_add_rms_norm(x, None, part=[columns]), "cut the last axis"),
        (lambda: fdt.softmax_dropout(x, part=columns), "cut the last axis"),
        (lambda: fdt.softmax_dropout(x, causal=True, part=rows), "cut the axis of queries"),
        (lambda: fdt.token_dropout(x[0], part=fd.Part((4, 8), (0, 0), (4, 3)), p=0.5), "cut the tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    fdt.softmax_dropout(x, part=rows)
    weights = torch.softmax(x @ x.mT / 2, -1)
    attend = partial(fdt.scaled_dot_product_attention, dropout_p=P, seed=SEED, part=tokens)  # a block of a ring
    wanted = fdt.dropout(weights, P, seed=SEED, part=tokens) @ x
    for y in (attend(x, x, x), torch.func.vmap(lambda x: attend(x, x, x), randomness="same")(x[None])[0]):
        torch.testing.assert_close(y, wanted)


def test_noise_far_away():
    """Noise has no numbers for the last cells, and a run without cells costs nothing."""
    x = torch.ones(9)
    with pytest.raises(ValueError, match="2\\*\\*61"):
        fdt.gaussian_dropout(x, P, part=fd.Part((1 << 62,), (1 << 61,), (9,)))
    last = fd.Part((1 << 61,), ((1 << 61) - 9,), (9,))
    noise, _ = fd.gaussian_dropout(x.numpy(), P, rng=SEED, part=last)
    assert_equal(fdt.gaussian_dropout(x, P, seed=SEED, part=last), torch.from_numpy(noise))
    cells = torch.tensor([[0, 1 << 31, 0, 1 << 31, 0, 0], [0, 1, 0, 1, 0, 9]])
    assert_equal(fdt.gaussian_dropout(x, P, seed=SEED, part=cells), fdt.gaussian_dropout(x, P, seed=SEED))


def test_attention_of_parts_in_traced_and_compiled_code():
    """Extents are tensors in a trace. A compiler can't ask whether tensors are eager."""
    order, shape = [4, 0, 3], (2, 3, 5, 6)
    parts = [fd.Part((2, 6, 5, 6), (0, at, 0, 0), (2, 1, 5, 6)) for at in order]
    arguments = tuple(torch.randn(*shape[:2], length, 8) for length in (5, 6, 6))
    for noise_shape in (None, (None, None, None, 1)):
        attend = partial(fdt.scaled_dot_product_attention, dropout_p=P, seed=SEED, part=parts, noise_shape=noise_shape)
        wanted = attend(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(lambda *given: attend(*given), arguments, check_trace=False)  # noqa: B023
        torch.testing.assert_close(traced(*arguments), wanted)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), wanted)
