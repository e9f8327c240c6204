"""Deploy a model: dropout vanishes from an exported graph, or stays in it for Monte Carlo predictions.

You want this if a model that was trained with fastdrop runs elsewhere, without fastdrop and perhaps without torch. A
model in evaluation exports as if it had no dropout, whether it was converted, fused, both or neither, by `torch.export`
and to ONNX. A model whose dropout is on, as in `fdt.mc_dropout`, exports to ONNX with ONNX's own Dropout in training
mode: each run of the file is then a sample of a Monte Carlo prediction, in any runtime that has this operator.

    python examples/recipes/export_model.py --quick
"""

import argparse

import numpy as np
import onnx.reference
import torch
from torch import nn

import fastdrop.torch as fdt


def to_onnx(model, x):
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    return program.model_proto


def operators(proto):
    return [node.op_type for node in proto.graph.node]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples")
    samples = 20 if parser.parse_args().quick else 1000

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2),
        nn.Linear(32, 1),
    )  # fmt: skip
    x = torch.randn(16, 8)
    fdt.convert(model), fdt.fuse(model)
    model(x).sum().backward()  # train it
    model.eval()
    expected = model(x).detach()

    graph = torch.export.export(model, (x,)).module()
    called = {str(node.target) for node in graph.graph.nodes}
    print("torch.export of evaluation calls:", ", ".join(sorted(name for name in called if "aten" in name)))
    assert not any("fastdrop" in name or "dropout" in name for name in called)
    torch.testing.assert_close(graph(x), expected)

    proto = to_onnx(model, x)
    (y,) = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: x.numpy()})
    print("ONNX of evaluation:", ", ".join(operators(proto)))
    assert "Dropout" not in operators(proto)
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-5)

    with fdt.mc_dropout(model):  # dropout on, batch norm as in evaluation
        proto = to_onnx(model, x)
    assert operators(proto).count("Dropout") == 2
    run, feed = onnx.reference.ReferenceEvaluator(proto), {proto.graph.input[0].name: x.numpy()}
    drawn = np.stack([run.run(None, feed)[0] for _ in range(samples)])
    ours = fdt.mc_predict(model, x, samples=samples, seed=0)
    theirs, own = drawn.std(0).mean().item(), ours.std.mean().item()
    print(f"ONNX with dropout on: {samples} runs deviate by {theirs:.3f}, those of mc_predict by {own:.3f}")
    assert 0.5 < theirs / own < 2


if __name__ == "__main__":
    main()
