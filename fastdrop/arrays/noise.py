"""The NumPy API of Gaussian dropout, which multiplies by noise and drops nothing."""

from __future__ import annotations

from typing import Any, Unpack, overload

from numpy.typing import ArrayLike

from ..core import checks, variants
from ..core.mask import GaussianNoise, gaussian_noise, parts_of_noise
from ..core.part import runs
from ..core.random import check_random_state, random_state
from .masking import array_ops, copy_to_output, masked
from .signatures import AnyArray, Array, CommonOptions, MaybeNone, PartOfWhole, RandomState, SameArray


@overload
def gaussian_dropout(
    x: SameArray, p: float = ..., **options: Unpack[CommonOptions]
) -> tuple[SameArray, GaussianNoise | MaybeNone]: ...
@overload
def gaussian_dropout(
    x: ArrayLike, p: float = ..., **options: Unpack[CommonOptions]
) -> tuple[Array, GaussianNoise | MaybeNone]: ...
def gaussian_dropout(
    x: Any,
    p: float = 0.5,
    *,
    training: bool = True,
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Any, GaussianNoise | None]:
    """Returns x times Gaussian noise of mean 1 and variance ``p / (1 - p)``, and the noise.

    Nothing is dropped: each element is multiplied by ``1 + sigma z``, which has the mean and the variance of dropout's
    multiplier. The noise is float32 for every dtype and the same bit for bit on every backend. `dropout_backward` is
    the gradient.

    Parameters
    ----------
    x : array_like of a float dtype, any shape ``(*)``
    p : float
        From 0 to below 1.
    training : bool
        False drops nothing.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray like x
        out if it is given.
    noise : GaussianNoise or None
        What `dropout_backward` needs; None if x was not changed.

    Raises
    ------
    TypeError, ValueError
        As in `dropout`. ValueError for p = 1, whose variance is infinite.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    Kept for backward: nothing, because the noise is drawn again. Source: Srivastava et al., JMLR 15, 2014, section 10.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, noise = fd.gaussian_dropout(np.ones(3, np.float32), 0.5, rng=4)
    >>> y.round(4)
    array([-0.4915,  1.1203,  1.2279], dtype=float32)
    """
    ops = array_ops(x)
    source, tag = ops.as_array("x", x)
    p = checks.gaussian_probability(p)
    shape = tuple(source.shape)
    parts = None if part is None else parts_of_noise(part, shape)
    if not training or p == 0.0:
        check_random_state(rng)
        return masked("x", x, None, out), None
    y = ops.output_array(out, source, "x")
    kernel_x, kernel_y = ops.kernel_arrays(source, y, shape)
    state = random_state(rng)
    ops.gaussian_multiply(
        tag, kernel_x, kernel_y, state, variants.spread(p), None if parts is None else runs(parts, shape)
    )
    return copy_to_output(ops, kernel_y, y, out), gaussian_noise(state, shape, p, parts)
