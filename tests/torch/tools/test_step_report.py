"""`report`: which code dropped in a training step, how long it took, and what it kept."""

from __future__ import annotations

import copy
import json
import pathlib
import random
import re
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn

import fastdrop.torch as fdt
from fastdrop import backends

SHAPE = BATCH, TOKENS, WIDTH = 4, 16, 32
ELEMENTS = BATCH * TOKENS * WIDTH


class Block(nn.Module):
    """Each way to drop: by a module, by a function, by attention that reads a module's p, and not at all."""

    def __init__(self):
        super().__init__()
        self.attention_dropout, self.dropout, self.off = nn.Dropout(0.25), nn.Dropout(0.5), nn.Dropout(0.0)
        self.norm = nn.BatchNorm1d(TOKENS)

    def forward(self, x):
        heads = x.view(BATCH, TOKENS, 2, WIDTH // 2).transpose(1, 2)
        p = self.attention_dropout.p if self.training else 0.0
        x = x + F.scaled_dot_product_attention(heads, heads, heads, dropout_p=p).transpose(1, 2).reshape(SHAPE)
        return F.dropout(self.norm(self.dropout(self.off(x))), 0.125, self.training)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), fdt.Dropout(0.5, store="seed", seed=3))


def by_place(report):
    return {(row.path, row.call): row for row in report.rows}


def test_each_dropout_has_the_code_that_dropped(model):
    x = torch.randn(SHAPE)
    plain = fdt.report(model, x)
    assert [(row.path, row.by, row.p, row.runs) for row in plain.rows] == [
        ("1", "torch", 0.25, 1),
        ("1.dropout", "torch", 0.5, 1),
        ("1", "torch", 0.125, 1),
        ("2", "fastdrop", 0.5, 1),
    ]
    attention, module, function, ours = plain.rows
    assert [row.shape for row in (module, function, ours)] == [SHAPE] * 3
    assert (attention.reached_by, function.reached_by) == (("enable",), ("enable",))
    assert module.reached_by == ("enable", "convert")
    assert re.fullmatch(r"test_step_report\.py:\d+", function.line)
    assert "aten::dropout" in module.code
    assert module.kept_bytes == 4 * ELEMENTS  # torch keeps the mask as floats
    assert ours.kept_bytes < 100  # a seed
    assert dict(plain.silent) == {"1.attention_dropout": "only their p is read", "1.off": "p is 0"}
    assert all(row.forward_ms > 0 and 0 < row.share < 1 for row in plain.rows)

    fdt.convert(model)
    converted = fdt.report(model, x)
    assert [row.by for row in converted.rows] == ["torch", "fastdrop", "torch", "fastdrop"]
    assert converted.rows[1].kept_bytes == ELEMENTS // 8
    with fdt.enabled():
        enabled = fdt.report(model, x)
    assert [row.by for row in enabled.rows] == ["fastdrop"] * 4
    assert [row.why for row in enabled.rows] == [""] * 4
    assert enabled.rows[0].fused  # attention is one kernel


def test_report_prints_a_table_in_markdown_and_is_json(model):
    model.append(Block()).append(Block())
    report = fdt.report(model, torch.randn(SHAPE), runs=1)
    text = str(report)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert "fdt.enable() would reach 9 of 9 calls, fdt.convert() would reach 3 of 9 calls" in text
    assert "Dropped nothing, because p is 0: 1,3-4.off (3x)" in text
    found = json.loads(json.dumps(report.to_dict()))
    assert len(found["rows"]) == len(report.rows) == 10
    assert found["header"]["torch"] == torch.__version__


def state(model):
    sources = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    modes = [module.training for module in model.modules()]
    gradients = [
        parameter.grad if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()
    ]
    return sources, modes, {name: x.clone() for name, x in model.state_dict().items()}, gradients


@pytest.mark.parametrize("raises", [None, "forward", "backward"])
def test_report_leaves_everything_as_it_was(model, raises):
    x = torch.randn(SHAPE, requires_grad=True)
    model(x).sum().backward()
    kept, waiting = x.grad.clone(), model(x).sum()
    model.eval()
    model[1].dropout.train()
    before, twin = state(model), copy.deepcopy(model[2]).train()

    def loss(y):
        np.random.rand()  # noqa: NPY002
        random.random()
        if raises == "forward":
            raise ZeroDivisionError
        if raises == "backward":
            y.register_hook(lambda gradient: 1 / 0)
        return y.square().sum()

    if raises:
        with pytest.raises(ZeroDivisionError):
            fdt.report(model, x, loss=loss)
    else:
        assert len(fdt.report(model, x, loss=loss, runs=1).rows) == 4
    after = state(model)
    assert after[:2] == before[:2]
    torch.testing.assert_close(after[2:], before[2:], rtol=0, atol=0)
    torch.testing.assert_close(x.grad, kept, rtol=0, atol=0)
    waiting.backward()  # which reads the buffers of BatchNorm
    assert torch.equal(model[2].train()(torch.ones(8)), twin(torch.ones(8)))


class Caches(nn.Module):
    """Its forward fills a buffer and adds another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filled", None)

    def forward(self, x):
        self.filled = x.detach()
        self.register_buffer("added", self.filled)
        return x


def test_report_takes_away_the_buffers_of_its_steps():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), Caches())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            (row,) = fdt.report(model, torch.randn(SHAPE), runs=1).rows
        assert row.backward_ms > 0
        assert row.kept_bytes == 4 * ELEMENTS
        assert model[2]._buffers == {"filled": None}


def test_report_does_not_count_in_a_pass_of_named_masks():
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), fdt.Dropout(0.5)), torch.randn(SHAPE)
    for seed in range(4):  # half of the seeds that masks have are above 2**63
        masks, results = fdt.name_masks(model, seed), []
        for reports in (False, True):
            with masks.at(step=0):
                first = model(x)
                if reports:
                    assert fdt.report(model, x, runs=1).rows[0].by == "fastdrop"
                results.append((first, model(x)))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        assert not torch.equal(*results[0])
        masks.remove()


def test_threads_report_one_after_the_other():
    kernel, start, reports = backends.active().draw_bits, threading.Barrier(2), []

    def run():
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), fdt.Dropout(0.5))
        start.wait()
        reports.append(fdt.report(model, torch.randn(SHAPE)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[row.by for row in report.rows] for report in reports] == [["fastdrop"]] * 2
    assert backends.active().draw_bits is kernel


def test_scripted_models_and_processors_without_a_name(monkeypatch):
    model = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)))
    monkeypatch.setattr(pathlib.Path, "read_text", lambda path: "processor\t: 0\nBogoMIPS\t: 50.00\n")  # as on Arm
    report = fdt.report(model, torch.randn(SHAPE), runs=1)
    assert [(row.path, row.by) for row in report.rows] == [("", "torch")]
    assert report.header["device"].startswith("cpu (")


def test_ops_that_compute_more_are_called_fused():
    class Adapter(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = nn.Linear(8, 8), nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))

        def forward(self, x):
            y = fdt.lora_linear(x, self.base.weight, self.base.bias, self.a, self.b, scaling=1.0, p=0.5)
            return fdt.dropout(fdt.dropout_add(y, x, 0.5), 0.5)

    assert [row.fused for row in fdt.report(Adapter(), torch.ones(4, 8)).rows] == [True, True, False]


def test_compiled_code_is_named_as_what_hides_dropout(model):
    report = fdt.report(torch.compile(model, backend="aot_eager"), torch.randn(SHAPE), runs=1)
    assert "Compiled: " in str(report)
    assert all(row.kept_bytes is None for row in report.rows)


def test_bad_arguments(model):
    x = torch.randn(SHAPE)
    with pytest.raises(TypeError, match="model must be a "):
        fdt.report("model", x)
    with pytest.raises(ValueError, match="runs"):
        fdt.report(model, x, runs=0)
    with pytest.raises(TypeError, match="loss must return a Tensor"):
        fdt.report(model, x, loss=lambda y: 1.0)
    with pytest.raises(TypeError, match="must return a floating Tensor"):
        fdt.report(nn.Flatten(), torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="is lazy"):
        fdt.report(nn.LazyLinear(4), x)
