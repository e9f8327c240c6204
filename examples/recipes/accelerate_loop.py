"""A loop with Accelerate: the losses of a big batch, whatever the size of its micro-batches.

You want this if you write your own loop with `accelerate.Accelerator`. Two lines are fastdrop's: `fdt.enabled` around
the loop, in which torch's dropout runs on fastdrop, and `fdt.name_masks`, which makes the mask of a sample depend on
the step and the sample alone. So a batch may be cut into micro-batches, or shared among processes, and still have the
losses of one process with the whole batch. With torch's dropout each way of cutting gives other masks.

    python examples/recipes/accelerate_loop.py --quick
"""

import argparse

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdrop.torch as fdt

BATCH = 16


def train(micro_batch, steps, use_names):
    """Trains a small transformer and returns the loss of each step."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.2, batch_first=True), 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(8 * 16, 1)).double()
    inputs, targets = torch.randn(BATCH * steps, 8, 16).double(), torch.randn(BATCH * steps, 1).double()
    data = TensorDataset(torch.arange(len(inputs)), inputs, targets)

    parts = BATCH // micro_batch
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), 1e-3), DataLoader(data, batch_size=micro_batch)
    )
    masks = None
    if use_names:
        masks = fdt.name_masks(model, seed=1)
    losses = torch.zeros(steps, dtype=torch.float64)
    with fdt.enabled():  # backward is in the block, too
        for i, (numbers, x, target) in enumerate(loader):
            with accelerator.accumulate(model):
                if masks is None:
                    loss = nn.functional.mse_loss(model(x), target)
                else:
                    with masks.at(step=i // parts, samples=numbers):
                        loss = nn.functional.mse_loss(model(x), target)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses[i // parts] += loss.item() / parts
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps")
    steps = 3 if parser.parse_args().quick else 50

    for use_names in (True, False):
        whole = train(BATCH, steps, use_names)
        gaps = {size: (train(size, steps, use_names) - whole).abs().max().item() for size in (8, 4)}
        print("masks by name:       " if use_names else "masks by call order: ", end="")
        print(", ".join(f"micro-batches of {size} differ by {gap:.0e} in the loss" for size, gap in gaps.items()))
        assert all((gap < 1e-10) == use_names for gap in gaps.values())


if __name__ == "__main__":
    main()
