"""Serve predictions with their uncertainty from several threads.

You want this if a server answers with Monte Carlo predictions. One model may serve all threads at once, because
`fdt.mc_predict` writes no module's mode and no global random state. With a seed for each request the answer is the same
whichever thread gives it, beside whatever other requests. So it can be computed again, from the request and its seed.

    python examples/recipes/served_uncertainty.py --quick
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import fastdrop.torch as fdt


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer requests")
    requests = 8 if parser.parse_args().quick else 200

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.2, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = nn.Sequential(body, nn.Flatten(), nn.BatchNorm1d(8 * 32), nn.Linear(8 * 32, 3)).eval()
    inputs = [torch.randn(1, 8, 32) for _ in range(requests)]

    def answer(number):
        prediction = fdt.mc_predict(model, inputs[number], samples=20, seed=number, task="classification")
        assert not any(module.training for module in model.modules())  # as seen by this thread while others sample
        return torch.cat([prediction.mean[0], prediction.mutual_information])

    # The first prediction registers fastdrop's kernels with torch. Make one before threads start.
    state = torch.get_rng_state()
    alone = [answer(number) for number in range(requests)]
    with ThreadPoolExecutor(4) as threads:
        served = list(threads.map(answer, reversed(range(requests))))[::-1]

    worst = max((one - other).abs().max().item() for one, other in zip(alone, served, strict=True))
    print(f"{requests} requests, one after the other and by four threads: answers differ by at most {worst:.0e}")
    assert worst < 1e-6
    assert torch.equal(torch.get_rng_state(), state)
    unsure = max(range(requests), key=lambda number: alone[number][-1])
    print(f"the least certain is request {unsure}: mutual information {alone[unsure][-1]:.3f} nats")
    assert all(information > 0 for *_, information in alone)


if __name__ == "__main__":
    main()
