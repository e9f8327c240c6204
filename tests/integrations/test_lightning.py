"""The callback in Lightning's Trainer."""

from __future__ import annotations

import doctest
import logging
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from fastdrop import schedules
from fastdrop.torch.runtime.context import is_enabled_everywhere

STEPS = 6


@pytest.fixture(scope="module")
def library():
    """Either of its names. It is imported by a test, because that takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("lightning.pytorch")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return library


def module_of(library, raises_at=None):
    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5))
            self.seen = []

        def training_step(self, batch, index):
            step = self.trainer.global_step
            self.seen.append((step, is_enabled_everywhere(), type(self.body).__name__, self.body[2].p))
            if step == raises_at:
                raise KeyError("a mistake")
            return self.body(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def fit(library, module, callback, folder, **options):
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(4 * STEPS, 4)), batch_size=2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    logger = library.loggers.CSVLogger(folder)
    saving = library.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = library.Trainer(
        max_steps=STEPS,
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        callbacks=[callback, saving],
        **quiet,
    )
    trainer.fit(module, data, **options)
    logger.save()
    (written,) = (folder / "lightning_logs").glob("*/metrics.csv")
    return [line.split(",") for line in written.read_text().split()]


@pytest.mark.filterwarnings("ignore")
def test_trainer(library, tmp_path):
    """Counts steps and not batches, raises, resumes in another Trainer, and leaves the module as it was."""
    from fastdrop.integrations.lightning import FastDropout

    schedule = schedules.linear(0.4, 0.1, STEPS)
    module = module_of(library, raises_at=5)
    with pytest.raises(KeyError, match="a mistake"):
        fit(library, module, FastDropout(fuse=True, schedule=schedule), tmp_path / "first")
    steps = [step for step in range(STEPS) for _ in range(2)][:-1]
    assert module.seen == [(step, True, "FusedSequential", schedule(step)) for step in steps]
    assert not is_enabled_everywhere()
    assert type(module.body) is nn.Sequential

    fresh = module_of(library)
    callback = FastDropout(fuse=True, schedule=schedule)
    checkpoint = tmp_path / "first" / "step=4.ckpt"
    names, *rows = fit(library, fresh, callback, tmp_path / "second", ckpt_path=str(checkpoint))
    assert fresh.seen == [(step, True, "FusedSequential", schedule(step)) for step in (4, 4, 5, 5)]
    logged = {round(float(row[names.index("dropout_p")]), 6) for row in rows}
    assert logged == {round(schedule(step), 6) for step in (4, 5)}
    assert set(callback.reports) == {"fuse", "schedule"}
    assert not is_enabled_everywhere()
    assert type(fresh.body) is nn.Sequential


def test_doctests(library):
    from fastdrop.integrations import lightning

    assert doctest.testmod(lightning).failed == 0
