"""Drop inputs in the workers of a DataLoader, with the same masks for any number of workers.

You want this if you augment data with NumPy dropout (words, pixels, features) in `Dataset.__getitem__`. A `fd.Stream`
that was made before the workers start is copied into each of them, so all workers draw the same masks. Here the seed
comes from the epoch and the number of the sample instead. So samples differ, epochs differ, and neither the number of
workers nor the order of samples matters.

With `persistent_workers=True` each worker keeps the copy of the data set that it began with, and so its `epoch`. Take
the seed from an epoch that the sampler hands on with the number of the sample then, or leave the option off.

    python examples/recipes/dataloader_workers.py --quick
"""

import argparse

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

import fastdrop as fd


class Dropped(Dataset):
    """Samples with inputs dropped: another mask for each sample and epoch."""

    def __init__(self, samples, p, seed=0):
        self.samples, self.p, self.seed, self.epoch = samples, p, seed, 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        # Any int is a seed, and neighbouring seeds give independent masks.
        seed = (self.seed * 1_000_000 + self.epoch) * len(self) + index
        x, _ = fd.dropout(self.samples[index], self.p, rng=seed)
        return x


class DroppedByStream(Dropped):
    """The same without numbers of samples: each worker makes a stream of its own seed, which torch decides."""

    stream = None

    def __getitem__(self, index):
        if self.stream is None:
            info = get_worker_info()
            self.stream = fd.Stream(self.seed if info is None else info.seed)
        x, _ = fd.dropout(self.samples[index], self.p, rng=self.stream)
        return x


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    count = 32 if parser.parse_args().quick else 4096

    samples = np.ones((count, 64), np.float32)
    data = Dropped(samples, 0.5)

    def epoch_with(workers, data=data):
        generator = torch.Generator().manual_seed(0)  # of the workers' seeds
        return torch.cat(list(DataLoader(data, batch_size=8, num_workers=workers, generator=generator)))

    drawn = {workers: epoch_with(workers) for workers in (0, 1, 2)}
    data.epoch = 1
    later = epoch_with(2)
    distinct = len(drawn[2].unique(dim=0))
    print(f"{distinct} distinct masks for {count} samples with 2 workers, the same as with 0 and 1")
    assert distinct == count
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not (later == drawn[2]).all(1).any()

    streams = epoch_with(2, DroppedByStream(samples, 0.5))
    distinct = len(streams.unique(dim=0))
    print(f"{distinct} distinct masks with a stream for each worker; others if the number of workers is another")
    assert distinct == count
    assert not torch.equal(streams, epoch_with(1, DroppedByStream(samples, 0.5)))


if __name__ == "__main__":
    main()
