"""`FastDropout`, a callback for the Trainer of Lightning.

from fastdrop.integrations.lightning import FastDropout

trainer = lightning.Trainer(callbacks=[FastDropout(fuse=True)])
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .session import LOGGED, Session

__all__ = ["FastDropout"]

NAMES = "lightning.pytorch", "pytorch_lightning"  # the same library: a Trainer of one takes callbacks of the other


def _import_library() -> Any:
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = error
    raise ImportError("fastdrop.integrations.lightning needs Lightning: pip install lightning") from missing


_library = _import_library()
_Callback: Any = _library.Callback


class FastDropout(Session, _Callback):  # type: ignore[misc]
    """Makes a Trainer's module drop by fastdrop while it is fitted, and drives its rates.

    The end of the fit, also by an exception, puts back what its beginning changed: modules have their classes again,
    and torch's dropout is torch's, unless `fastdrop.torch.enable` was on before or another training still needs it.
    Checkpoints hold the same keys in any case.

    Parameters
    ----------
    enable : bool
        Whether torch's own dropout runs on fastdrop, as by `fastdrop.torch.enable`.
    fuse : bool
        Whether `fastdrop.torch.fuse` changes the module. Under FSDP call it yourself, in ``configure_model``.
    convert : bool or {"bits", "seed"}
        Whether `fastdrop.torch.convert` changes the module, and what its modules keep for backward.
    schedule : callable of the step that returns p, optional
        One of `fastdrop.schedules` or any function of the Trainer's ``global_step``. The rate is a function of the step
        alone, so a fit that resumes from a checkpoint goes on with the right rate. It is logged as ``dropout_p``. The
        module keeps the last rates at the end.
    filter, mode
        As in `fastdrop.torch.DropoutScheduler`.

    Attributes
    ----------
    reports : dict of str to Report
        What "convert" and "fuse" did, and what the "schedule" drives. They are logged once, at level info.
    scheduler : DropoutScheduler or None

    Raises
    ------
    TypeError, ValueError
        For a schedule, filter or mode that `fastdrop.torch.DropoutScheduler` refuses, and for another ``convert``.

    Examples
    --------
    >>> from fastdrop import schedules
    >>> from fastdrop.integrations.lightning import FastDropout
    >>> callback = FastDropout(convert=True, schedule=schedules.cosine(0.3, 0.0, 1000))
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.begin(pl_module, _library.utilities.rank_zero_info)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        p = self.set_step(trainer.global_step)
        if p is not None:
            pl_module.log(LOGGED, p)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.end()
