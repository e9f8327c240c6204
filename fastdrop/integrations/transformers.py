"""`FastDropout`, a callback for the Trainer of transformers.

from fastdrop.integrations.transformers import FastDropout

trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[FastDropout(fuse=True)])
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

try:
    from transformers.trainer_callback import TrainerCallback
    from transformers.utils import logging
except ImportError as error:
    raise ImportError("fastdrop.integrations.transformers needs transformers: pip install transformers") from error

from .session import LOGGED, Session

__all__ = ["FastDropout"]

logger = logging.get_logger("transformers.fastdrop")  # so that transformers' verbosity counts


class FastDropout(Session, TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer's model drop by fastdrop while it trains, and drives its rates.

    The Trainer's end puts back what the beginning changed: modules have their classes again, and torch's dropout is
    torch's, unless `fastdrop.torch.enable` was on before or another training still needs it. Checkpoints hold the
    same keys in any case.

    A Trainer tells callbacks nothing of an exception. ``with FastDropout() as callback:`` around the training puts
    everything back after one, too. Without it that happens when the callback is thrown away or trains again.

    Parameters
    ----------
    enable : bool
        Whether torch's own dropout runs on fastdrop, as by `fastdrop.torch.enable`.
    fuse : bool
        Whether `fastdrop.torch.fuse` changes the model. Under FSDP call it yourself, before you make the Trainer.
    convert : bool or {"bits", "seed"}
        Whether `fastdrop.torch.convert` changes the model, and what its modules keep for backward.
    schedule : callable of the step that returns p, optional
        One of `fastdrop.schedules` or any function of the Trainer's ``global_step``. The rate is a function of the step
        alone, so training that resumes from a checkpoint goes on with the right rate. Logs have the rate as
        ``dropout_p``. At the end the model keeps the last rates.
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
    >>> from fastdrop.integrations.transformers import FastDropout
    >>> callback = FastDropout(fuse=True, schedule=schedules.early(0.1, 1000))
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.begin(model, logger.info)
        self.set_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.set_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self.scheduler is not None:
            # The Trainer has copied logs to its history already; callbacks after this one read logs.
            for entry in (logs, state.log_history[-1] if state.log_history else None):
                if entry is not None:
                    entry[LOGGED] = self.scheduler.last_p

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.end()

    def __enter__(self) -> FastDropout:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end()
