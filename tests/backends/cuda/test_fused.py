"""Runs the PTX of the fused CUDA kernels in an interpreter behind a stub driver, and compares it with the reference.

Results agree to a tolerance because each backend adds in an order of its own. A kernel gives the same bits each time.
"""

from __future__ import annotations

import pytest

from fastdrop.backends.cuda import driver
from fastdrop.backends.cuda import launch as numba_cuda
from fastdrop.backends.cuda.tile import SHORT_ROW
from fastdrop.core import variants
from fastdrop.core.activations import ACTIVATIONS

from ...cases import assert_same_bits
from .cases import STREAM, accesses_vectors
from .fused_cases import (
    F32,
    F64,
    PAIR,
    ROWS_CASES,
    assert_activations_as_reference,
    assert_case_as_reference,
    assert_fused_as_reference,
    assert_special_numbers_as_reference,
)

pytest_plugins = ["tests.backends.cuda.gpu_stub"]

# ---- results ----


@pytest.mark.parametrize("name", ROWS_CASES)
def test_fused_float32(gpu, name):
    assert_case_as_reference(gpu, name, "float32")


IN_FLOAT64 = ("bias_dropout_add", "bias's sums, odd", "layer norm", "norm's gradients", "softmax, mask")


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        *((name, "float64") for name in (*IN_FLOAT64, "softmax's gradient")),  # 8 bytes are exchanged in halves
        ("bias_dropout_add, odd", "bfloat16"),
        ("layer norm", "bfloat16"),
        ("norm's gradients, odd", "float16"),
        ("softmax's gradient", "float16"),
    ],
)
def test_fused_in_other_types(gpu, name, pair):
    """Each kernel in float64 with all that it may have; loads, stores and roundings of each type of 16 bits."""
    assert_case_as_reference(gpu, name, pair)


@pytest.mark.parametrize(
    "name", ["bias_dropout_add", "bias's sums", "norm's gradients", "layer norm, long", "softmax, causal"]
)
def test_fused_bfloat16_on_float32(gpu, name):
    assert_case_as_reference(gpu, name, "bfloat16 on float32")
    assert all(accesses_vectors(launch) for launch in gpu.launches if launch.variant.body != "add_panels")


@pytest.mark.parametrize(
    ("activation", "pair", "columns"),
    [
        ("relu", "float32", 40),
        ("gelu", "float32", 9),
        ("gelu_tanh", "float32", 40),
        ("silu", "float32", 9),
        ("gelu", "float64", 9),
        ("gelu_tanh", "float64", 40),
    ],
)
def test_fused_activations(gpu, activation, pair, columns):
    assert_activations_as_reference(gpu, activation, pair, columns)


def test_fused_special_numbers(gpu):
    assert_special_numbers_as_reference(gpu, "float32", ACTIVATIONS)
    assert_special_numbers_as_reference(gpu, "float64", ("gelu", "gelu_tanh"))


def test_pointwise_forward_over_many_tiles(gpu):
    """Vectors, then what is left of the last word; the column of each found again and again."""
    for rows, columns, bias in ((501, 28, "input_bias"), (1, 9001, ""), (301, 27, "input_bias")):
        numbers = {"activation": ACTIVATIONS["relu"], "given": f"{bias} residual signs"}
        assert_fused_as_reference(gpu, "pointwise_forward", PAIR["float32"], rows, columns, **numbers)


@pytest.mark.parametrize("columns", [SHORT_ROW, 5000])
def test_rows_of_any_length(gpu, columns):
    for primitive, options in {
        "norm_forward": {"given": "residual weight norm_bias"},
        "norm_backward": {"given": "weight dx sums"},
        "softmax_forward": {"given": "probabilities", "softmax_scale": 3.0},
        "softmax_backward": {"softmax_scale": 3.0},
    }.items():
        assert_fused_as_reference(gpu, primitive, PAIR["float32"], 2, columns, **options)


@pytest.mark.parametrize("name", ["bias's sums", "norm's gradients", "layer norm, long", "softmax, long"])
def test_bits_do_not_hang_on_the_number_of_blocks(gpu, name, monkeypatch):
    results = []
    for blocks in (1, 3):
        monkeypatch.setattr(driver, "BLOCKS_PER_SM", blocks)
        gpu.install((9, 0), sms=1)
        results.append(assert_case_as_reference(gpu, name, "float32"))
        assert max(launch.grid[0] for launch in gpu.launches) <= blocks
    primitive, _, columns, _ = ROWS_CASES[name]
    for output, (_, expected, _) in results[0].items():
        first_line = columns * (3 if primitive == "norm_backward" else 1)  # of sums, which is the result
        of_interest = slice(first_line if output == "sums" else None)
        assert_same_bits(results[1][output][1][of_interest], expected[of_interest], output)


# ---- launches ----


@pytest.mark.parametrize(
    "name", ["bias_dropout_add", "layer norm", "norm's gradients", "softmax", "softmax's gradient"]
)
def test_vectors_where_all_memory_allows_them(gpu, name):
    primitive, rows, columns, options = ROWS_CASES[name]
    for shift, form in ((0, "wide"), (1, "narrow")):
        gpu.launches.clear()
        assert_fused_as_reference(gpu, primitive, PAIR["float32"], rows, columns, **options, shift=shift)
        launches = [launch for launch in gpu.launches if launch.variant.body != "add_panels"]
        assert {launch.variant.form for launch in launches} == {"" if name == "bias_dropout_add" else form}
        assert {accesses_vectors(launch) for launch in launches} == {shift == 0}


X, Y, WEIGHT, SUM, STATISTICS, WORDS, TOTALS = (0x10000 * i for i in range(1, 8))


def test_one_address_off_16_bytes_is_enough_for_single_elements(recorded):
    def forward(x=X, residual=Y, weight=WEIGHT, y=X, sum=SUM, columns=64):
        recorded.launches.clear()
        arrays = x, 0, residual, WORDS, weight, 0, y, sum, STATISTICS
        numba_cuda.norm_forward_at(0, STREAM, F32.tag, F32.tag, *arrays, 8, columns, 1.0, 1e-5, 1)
        (launch,) = recorded.launches
        return launch.variant.form

    assert forward() == "wide"
    assert forward(residual=0) == "wide"
    for name in ("x", "residual", "weight", "y", "sum"):
        assert forward(**{name: Y + 4}) == "narrow"
    assert forward(columns=65) == forward(columns=66) == "narrow"


def test_grids(recorded):
    """A warp of a block of four for a short row, a block for a long one; in turns where there are many."""
    for rows, columns, blocks in ((4, 512, 1), (5, 512, 2), (5, 516, 5), (1_000_000, 1024, 4224)):
        numba_cuda.softmax_backward_at(0, STREAM, F32.tag, X, Y, WORDS, X, 0, rows, columns, 1.0, 1.0)
        launch = recorded.launches[-1]
        assert (launch.grid, launch.block) == ((blocks, 1, 1), (128, 1, 1))
        assert (launch.stream, launch.shared) == (STREAM, 0)
    # Four elements a thread, but for the last of them and where the bias's columns don't come in fours.
    for rows, columns, bias, blocks in ((1, 513, 0, 1), (2, 256, 1, 1), (2, 320, 1, 2), (3, 43, 1, 2), (9, 43, 0, 1)):
        arrays = X, bias * WEIGHT, 0, Y, WORDS, X, 0
        numba_cuda.pointwise_forward_at(0, STREAM, F32.tag, F32.tag, *arrays, rows, columns, 1.0, 0)
        assert recorded.launches[-1].grid == (blocks, 1, 1)


def test_sums_take_a_block_for_a_panel_of_128_columns(recorded):
    rows, columns = 1000, 1024
    panels = variants.panels(rows)
    arrays = X, Y, 0, 0, WORDS, X, 0, TOTALS
    numba_cuda.pointwise_backward_at(0, STREAM, F32.tag, F32.tag, *arrays, rows, columns, panels, 1.0, 0)
    walk, add = recorded.launches
    assert (walk.variant.body, walk.grid[0]) == ("pointwise_columns", panels * columns // 128)
    assert (add.variant.body, add.grid[0]) == ("add_panels", columns // 128)
    recorded.launches.clear()
    numba_cuda.pointwise_backward_at(0, STREAM, F32.tag, F32.tag, *arrays, 8, columns, 1, 1.0, 0)
    assert [launch.variant.body for launch in recorded.launches] == ["pointwise_columns"]


def test_norm_backward_reads_before_it_writes(recorded):
    """Gradients of weight and shift come from dy, which dx may lie over, and the bias's from what was written."""
    arrays = X, 0, SUM, STATISTICS, WEIGHT, WORDS, X, Y, TOTALS
    numba_cuda.norm_backward_at(0, STREAM, F32.tag, F32.tag, *arrays, 64, 128, 4, 1.25, 1)
    assert [launch.variant.body for launch in recorded.launches] == [
        "norm_columns",
        "norm_backward",
        "pointwise_columns",
        "add_panels",
    ]


def test_no_rows_launch_nothing(recorded):
    tags = F64.tag, F64.tag
    numba_cuda.pointwise_forward_at(0, STREAM, *tags, X, 0, 0, 0, 0, Y, 0, 0, 8, 1.0, 0)
    numba_cuda.pointwise_backward_at(0, STREAM, *tags, X, 0, 0, 0, 0, Y, 0, 0, 0, 8, 1, 1.0, 0)
    numba_cuda.norm_forward_at(0, STREAM, *tags, X, 0, 0, 0, 0, 0, Y, SUM, STATISTICS, 0, 8, 1.0, 1e-5, 1)
    numba_cuda.norm_backward_at(0, STREAM, *tags, X, 0, SUM, STATISTICS, 0, 0, Y, 0, 0, 0, 8, 1, 1.0, 1)
    numba_cuda.softmax_forward_at(0, STREAM, F64.tag, X, 0, 0, 0, Y, 0, 8, 1, 1, 0, 0, 0, 1.0, 1.0, 0)
    numba_cuda.softmax_backward_at(0, STREAM, F64.tag, X, Y, 0, X, 0, 0, 8, 1.0, 1.0)
    assert recorded.launches == []


# ---- torch ----


def test_torch_hands_over_what_it_is_given(gpu, monkeypatch):
    """Tensors by address on the current stream, None as 0, numbers as they are."""
    torch = pytest.importorskip("torch", reason="fastdrop.torch needs torch")
    from fastdrop.torch.runtime import cuda

    monkeypatch.setattr(cuda, "place", lambda x: (0, STREAM))
    rows, columns, generator = 20, 8, torch.Generator().manual_seed(0)
    x, dy, bias = (torch.randn(shape, generator=generator) for shape in ((rows, columns), (rows, columns), columns))
    words = torch.full((5,), -1, dtype=torch.int32)
    y, sums, sum, statistics = x.new_empty(rows, columns), x.new_empty(1, 3, columns), x.clone(), x.new_empty(rows, 2)
    dx, dresidual, probabilities = (torch.empty_like(x) for _ in range(3))
    gpu.allow(*[t.numpy() for t in (x, dy, bias, words, y, sums, sum, statistics, dx, dresidual, probabilities)])
    tags, shape = (F32.tag, F32.tag), (rows, columns)

    cuda.run("pointwise_forward", *tags, x, bias, None, dy, words, y, None, *shape, 2.0, 0)
    torch.testing.assert_close(y, 2 * (x + bias) + dy)
    cuda.run("pointwise_backward", *tags, dy, None, None, None, words, dx, None, sums, *shape, 1, 2.0, 0)
    torch.testing.assert_close(dx, 2 * dy)
    torch.testing.assert_close(sums[0, 0], 2 * dy.sum(0))
    cuda.run("norm_forward", *tags, x, None, dy, words, None, bias, y, sum, statistics, *shape, 1.0, 1e-5, 1)
    torch.testing.assert_close(sum, x + dy)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(sum, (columns,), None, bias))
    arrays = dy, None, sum, statistics, None, words, dx, dresidual, sums
    cuda.run("norm_backward", *tags, *arrays, *shape, 1, 1.0, 1)
    leaf = sum.clone().requires_grad_()
    torch.nn.functional.layer_norm(leaf, (columns,)).backward(dy)
    torch.testing.assert_close(dresidual, leaf.grad)
    torch.testing.assert_close(sums[0], torch.stack([(dy * (y - bias)).sum(0), dy.sum(0), dx.sum(0)]))
    cuda.run("softmax_forward", F32.tag, x, None, None, probabilities, y, *shape, 1, 1, 0, 0, 0, 0.5, 1.0, 0)
    torch.testing.assert_close(y, torch.softmax(0.5 * x, 1))
    cuda.run("softmax_backward", F32.tag, dy, probabilities, None, dx, None, *shape, 0.5, 1.0)
    leaf = x.clone().requires_grad_()
    torch.softmax(0.5 * leaf, 1).backward(dy)
    torch.testing.assert_close(dx, leaf.grad)
    assert {launch.stream for launch in gpu.launches} == {STREAM}
