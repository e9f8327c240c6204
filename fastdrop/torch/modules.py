"""Dropout as a module."""

from __future__ import annotations

from torch import Tensor, fx, nn

from .. import _checks
from .functional import dropout

__all__ = ["Dropout"]


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` on fastdrop: the same arguments, the same (empty) ``state_dict``, the same behaviour.

    Parameters
    ----------
    p : float
        Drop probability, 0 to 1.
    inplace : bool
        Writes the result to the input.
    store : {"bits", "seed"}
        What is kept for backward: 1/8 byte per element, or 8 bytes in all, from which backward draws the mask again.

    Raises ValueError for p outside [0, 1] and for an unknown store.

    Shape: any; the output's is the input's. Errors and details as in `fastdrop.torch.dropout`.

    >>> import torch, fastdrop.torch as fdt
    >>> drop = fdt.Dropout(0.1, store="seed")
    >>> drop, isinstance(drop, torch.nn.Dropout)
    (Dropout(p=0.1, inplace=False, store='seed'), True)
    >>> x = torch.ones(8)
    >>> drop.eval()(x) is x
    True
    """

    store: str

    def __init__(self, p: float = 0.5, inplace: bool = False, *, store: str = "bits") -> None:
        super().__init__(p, inplace)
        _checks.choice("store", store, _checks.STORES)
        self.store = store

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, fx.Proxy):  # a module of torch's own would stay one in the graph, and so follow eval()
            tracer = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), {})
        return dropout(input, self.p, self.training, self.inplace, store=self.store)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, store={self.store!r}"
