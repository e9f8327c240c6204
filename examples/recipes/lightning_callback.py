"""Train with Lightning: one callback makes a module drop by fastdrop, and drives its rate.

You want this if you train with `lightning.Trainer`. The callback does the same as that for transformers: it enables,
converts or fuses when a fit begins, sets the rate of each step, logs it, and puts everything back at the end, also if
the fit raises. Here the rate follows early dropout: it falls to 0 in the first half of the training.

    python examples/recipes/lightning_callback.py --quick
"""

import argparse
import logging
import tempfile

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastdrop.torch as fdt
from fastdrop import schedules
from fastdrop.integrations.lightning import FastDropout


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 2))
        self.seen = []  # at each step: the class of the body, and its rate

    def forward(self, x):
        return self.body(x)

    def training_step(self, batch, index):
        x, label = batch
        self.seen.append((type(self.body).__name__, self.body[2].p))
        return nn.functional.cross_entropy(self(x), label)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps")
    steps = 8 if parser.parse_args().quick else 200
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    x = torch.randn(16 * steps, 16)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    schedule = schedules.early(0.2, steps // 2)
    module, callback = Classifier(), FastDropout(fuse=True, schedule=schedule)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            callbacks=[callback],
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)

    print(callback.reports["fuse"])
    print("rate of each step:", ", ".join(f"{p:.3f}" for _, p in module.seen[: steps // 2 + 1]), "...")
    assert module.seen == [("FusedSequential", schedule(step)) for step in range(steps)]
    assert trainer.logged_metrics["dropout_p"] == 0.0
    assert type(module.body) is nn.Sequential  # after the fit
    with fdt.mc_dropout(module.eval()):
        print("the rate stays at that of the last step:", module.body[2].p)


if __name__ == "__main__":
    main()
