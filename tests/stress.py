"""Threads that drop, enable, predict, compile and fork at the same time; each result is compared with one thread's.

Run it by itself (``python -m tests.stress --seconds 60``), or as `test_threads` does. A fault that it finds may
end the process: its exit code says so.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastdrop as fd
import fastdrop.torch as fdt

SEEDS = range(4)
LARGE = np.ones(1 << 18, np.float32)  # worked on by several threads


class Net(nn.Module):
    """A model with dropouts of three kinds, and a layer that must stay in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), fdt.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.layers(x), 0.2, self.training)


with torch.random.fork_rng():
    torch.manual_seed(0)
    shared, x = Net().eval(), torch.randn(8, 16)
compiled_net = torch.compile(Net().eval(), backend="aot_eager")
training = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.3, batch_first=True)
compiled = torch.compile(lambda x, seed: fdt.dropout(fdt.dropout(x, 0.5, seed=seed).sin(), 0.3, seed=seed + 1),
                         backend="aot_eager")  # fmt: skip


def functions(seed: int) -> list[torch.Tensor]:
    tensor = x.clone().requires_grad_()
    y = fdt.dropout(tensor, 0.5, seed=seed)
    y = fdt.bias_act_dropout(y, y.detach()[0], 0.3, seed=seed + 1)
    y.sum().backward()
    return [y.detach(), tensor.grad]


def prediction(seed: int) -> list[torch.Tensor]:
    result = fdt.mc_predict(shared, x, samples=6, seed=seed)
    return [result.mean, result.std]


def compiled_prediction(seed: int) -> list[torch.Tensor]:
    """Compiled code that draws from the sample's own seeds."""
    return [fdt.mc_predict(compiled_net, x, samples=4, seed=seed, batch=1).mean]


def compiled_functions(seed: int) -> list[torch.Tensor]:
    tensor = x.clone().requires_grad_()
    y = compiled(tensor, torch.tensor(seed))
    y.sum().backward()
    return [y.detach(), tensor.grad]


def switched(seed: int) -> list[torch.Tensor]:
    """Ours within, torch's around: a dropped infinity is 0 here and NaN there."""
    infinite = torch.full((4,), torch.inf)
    with fdt.enabled():
        training(x[None])
        inside = F.dropout(infinite, 1.0)
    return [inside, F.dropout(infinite, 1.0)]


def torchs_own(seed: int) -> list[torch.Tensor]:
    """A model of somebody else's, who has not enabled anything."""
    training(x[None])
    return [F.dropout(torch.full((4,), torch.inf), 1.0)]


def forked(seed: int) -> list[torch.Tensor]:
    """A child of a process whose other threads are at work; of torch it takes nothing, whose threads it lacks."""
    child = os.fork()
    if not child:
        code = 1
        try:
            y, mask = fd.dropout(LARGE, 0.3, rng=seed)
            code = int(mask.popcount() != np.count_nonzero(y))
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return [torch.tensor(status)]
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise RuntimeError("a forked child did not end")


WORK = (functions, prediction, compiled_prediction, compiled_functions, switched, torchs_own, forked)


def same(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0)) for a, e in zip(actual, expected, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    faulthandler.enable()
    fd.set_num_threads(2)
    expected = {(work, seed): work(seed) for work in WORK for seed in SEEDS}
    done: Counter[str] = Counter()
    faults: list[str] = []
    end = time.monotonic() + options.seconds

    def work_on(number: int) -> None:
        chosen = random.Random(number)
        while time.monotonic() < end and not faults:
            work, seed = chosen.choice(WORK), chosen.choice(SEEDS)
            try:
                if not same(work(seed), expected[work, seed]):
                    faults.append(f"{work.__name__}({seed}) differs from what one thread gets")
            except BaseException:
                faults.append(f"{work.__name__}({seed}): {traceback.format_exc()}")
            done[work.__name__] += 1

    threads = [threading.Thread(target=work_on, args=(number,)) for number in range(options.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if any(module.training for module in shared.modules()):
        faults.append("the shared model was left in training mode")
    if not all(same(work(seed), expected[work, seed]) for work in WORK for seed in SEEDS):
        faults.append("results differ after the threads have ended")
    print("calls:", dict(done))
    print("\n".join(faults) or "each result is that of one thread")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
