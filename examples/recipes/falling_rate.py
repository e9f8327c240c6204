"""Lower the rate during training without compiling again.

You want this if a compiled model should drop much at first and little at the end, or the other way round. torch's own
modules have p as a constant of the compiled code, so each new rate compiles the model again. fastdrop's modules read it
from a tensor once a `fdt.DropoutScheduler` drives them. So `fdt.convert` the model, and it is compiled once.

    python examples/recipes/falling_rate.py --quick
"""

import argparse

import torch
from torch import nn

import fastdrop.torch as fdt
from fastdrop import schedules


def train(convert, steps, backend):
    """Trains a compiled model while its rate falls, and returns how often it was compiled."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.5), nn.Linear(64, 1))
    if convert:
        fdt.convert(model)
    scheduler = fdt.DropoutScheduler(model, schedules.cosine(0.5, 0.0, steps))
    compilations = 0

    def counted(graph, inputs):
        nonlocal compilations
        compilations += 1
        return backend(graph, inputs)

    compiled = torch.compile(model, backend=counted)
    optimizer, x = torch.optim.AdamW(model.parameters(), 1e-3), torch.randn(32, 16)
    for _ in range(steps):
        nn.functional.mse_loss(compiled(x), x[:, :1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    assert scheduler.last_p == model[2].p == 0.0
    return compilations


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="few steps, and graphs that run without code of Inductor's"
    )
    quick = parser.parse_args().quick
    if quick:
        steps, backend = 5, lambda graph, inputs: graph
    else:
        from torch._inductor.compile_fx import compile_fx as backend

        steps = 8
    torchs, ours = train(False, steps, backend), train(True, steps, backend)
    print(f"{steps} rates: compiled {torchs} times with torch's modules, {ours} time with fastdrop's")
    assert torchs == steps
    assert ours == 1


if __name__ == "__main__":
    main()
