"""Dropout of tokens as a module."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from ...core import checks
from ..functional.tokens import token_dropout
from .base import Seeded, SourceOptions

__all__ = ["TokenDropout"]


class TokenDropout(Seeded):
    """Takes a share p of the tokens of each sample out of the sequence, so that later layers have less to compute.

    Parameters
    ----------
    p : float
        Share of tokens to drop, 0 to 1.
    keep_first : int
        How many tokens at the beginning are always kept, such as that of the class.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p outside [0, 1] and keep_first below 0.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    A layout is that of the tokens that may be dropped, ``(N, n)``.

    Its forward takes ``(N, L, *)`` and returns ``(N, keep_first + k, *)`` in training, its input itself in evaluation.
    Details as in `fastdrop.torch.token_dropout`. Code that torch compiled is compiled again if p changes.
    Kept for backward: 8 bytes per kept token. Sources: Liu, Matsoukas et al., "PatchDropout", WACV 2023; Yao et al.,
    "Random-LTD", 2022.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> drop = fdt.TokenDropout(0.5)
    >>> drop(torch.ones(8, 197, 64)).shape, drop.eval()(torch.ones(8, 197, 64)).shape
    (torch.Size([8, 99, 64]), torch.Size([8, 197, 64]))
    """

    def __init__(self, p: float = 0.5, keep_first: int = 1, **source: Unpack[SourceOptions]) -> None:
        super().__init__()
        self.draw_from(**source)
        self.p = checks.dropout_probability(p, what="drop probability")
        self.keep_first = checks.integer("keep_first", keep_first)
        checks.number_from("keep_first", self.keep_first, 0)

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        y: Tensor = token_dropout(input, self.p, self.keep_first, training=self.training, **source)
        return y

    def extra_repr(self) -> str:
        return f"p={self.p}, keep_first={self.keep_first}{self.source_repr()}"
