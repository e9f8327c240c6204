"""The NumPy API of the elementwise fused ops: dropout together with the layers before and after it, in one pass.

The functions here are public: each checks its own arguments and calls `FusedCall`, which does the work, and returns a
`Saved`, whose ``backward`` computes the gradients. The mask of a fused op is the mask of plain `dropout` with the same
random state. Ops that need a whole row, norms and softmax, are in `fused_rows.py`.

Data is ``(*, columns)``: any axes before the last, any strides. Results are C-contiguous. Gradients are too, unless a
gradient is dy itself.
"""

from __future__ import annotations

from ..core import checks
from ..core.activations import ACTIVATIONS, GELU, GELU_TANH, SILU, keeps_input
from .fused_call import NO_VECTOR, FusedCall
from .saved import BiasActGradients, BiasDropoutAddGradients, DropoutAddGradients, GatedGradients, SavedPointwise
from .signatures import AnyArray, Array, ArrayArgument, PartOfWhole, RandomState


def dropout_add(
    x: ArrayArgument,
    residual: ArrayArgument,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Array, SavedPointwise[DropoutAddGradients]]:
    """Returns ``residual + dropout(x, p)``, and what backward needs: the end of a residual branch.

    The mask is that of ``dropout(x, p, rng=rng)``. A dropped element adds nothing, even if it is inf or NaN.

    Parameters
    ----------
    x : array_like of float32, float64, float16 or bfloat16, any shape ``(*)``, any strides
        An array on a GPU must be a C-contiguous one of CuPy or Numba, and so must all other arrays then.
    residual : array_like of x's shape
        It has x's dtype, or float32 if x has 16 bits. The result has its dtype; the sum is rounded once.
    p : float
        Drop probability, 0 to 1; p = 1 returns the residual.
    training : bool
        False adds x without dropout or scale.
    store : {"bits", "seed"}
        "bits" keeps 1/8 byte per element for backward. "seed" keeps the random state only, and backward draws the same
        bits again.
    rng : None, int, Stream or numpy.random.Generator
        As in `dropout`.
    out : ndarray, optional
        Receives the result. It has the shape and dtype of residual; residual itself, or x if it has that dtype, works
        in place.
    part : Part or sequence of them, optional
        As in `dropout`. Other arrays are the part's own; gradients of biases and weights are sums over its rows.

    Returns
    -------
    y : ndarray like residual
    saved : Saved
        ``saved.backward(dy)`` is ``(x, residual)``. The gradient of the residual is dy itself; that of x is too if
        nothing was dropped and the dtypes are the same. x and residual are not kept.

    Raises
    ------
    TypeError
        If a dtype is not in the list above or does not go with x's; p is not a number; rng has another type; out is
        not an array of the result's dtype; or some arrays are on a GPU and others are not.
    ValueError
        If residual has another shape than x; p, store or part does not fit; or out has another shape, is read-only, or
        overlaps an argument in part. Nothing is written to out then, and no random number is taken.

    Notes
    -----
    Kept for backward: a bit per element, or nothing. Source: Vaswani et al., NeurIPS 2017, section 5.4.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> x, residual = np.ones(6, np.float32), np.arange(6, dtype=np.float32)
    >>> y, saved = fd.dropout_add(x, residual, 0.5, rng=4)
    >>> y
    array([0., 1., 4., 5., 4., 7.], dtype=float32)
    >>> saved.backward(np.ones_like(y)).x
    array([0., 0., 2., 2., 0., 2.], dtype=float32)
    """
    call = FusedCall("dropout_add", x, "x", p, (training, store, rng, part))
    return call.pointwise(DropoutAddGradients, out, residual=call.residual(residual))


def bias_dropout_add(
    x: ArrayArgument,
    bias: ArrayArgument,
    residual: ArrayArgument,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Array, SavedPointwise[BiasDropoutAddGradients]]:
    """Returns ``residual + dropout(x + bias, p)``, and what backward needs: `dropout_add` with a linear layer's bias.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    bias : array_like of any float dtype, ``(columns,)``
        A Numba array on a GPU must be float32 (float64 if x is), here and in the ops below.
    residual : array_like of x's shape
        It has x's dtype, or float32 if x has 16 bits. The result has its dtype.
    p : float
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray like residual
    saved : Saved
        ``saved.backward(dy)`` is ``(x, bias, residual)``. The gradient of the bias has the bias's dtype; it is summed
        in float32 (float64 for float64), in an order that depends on x's shape only.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add`. ValueError if bias has another shape or x has no axes.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: a bit per element, or nothing. Source: Vaswani et al., NeurIPS 2017, section 5.4.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> x, bias, residual = np.ones((2, 3)), np.array([0.0, 1.0, 2.0]), np.zeros((2, 3))
    >>> y, saved = fd.bias_dropout_add(x, bias, residual, 0.5, rng=4)
    >>> y
    array([[0., 0., 6.],
           [2., 0., 6.]])
    >>> saved
    Saved(op='bias_dropout_add', shape=(2, 3), keeps=('mask',), nbytes=4)
    >>> saved.backward(np.ones_like(y)).bias
    array([2., 0., 4.])
    """
    call = FusedCall("bias_dropout_add", x, "x", p, (training, store, rng, part))
    vector = call.vector("bias", bias)
    return call.pointwise(BiasDropoutAddGradients, out, bias=vector, residual=call.residual(residual))


def bias_act_dropout(
    x: ArrayArgument,
    bias: ArrayArgument | None,
    p: float = 0.5,
    activation: str | None = "gelu",
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Array, SavedPointwise[BiasActGradients]]:
    """Returns ``dropout(act(x + bias), p)``, and what backward needs: the middle of a feed-forward block.

    The activations: "relu", ``max(h, 0)``; "gelu", ``h Phi(h)`` with Phi the normal distribution function; "gelu_tanh",
    ``h / 2 (1 + tanh((2 / pi) ** 1/2 (h + 0.044715 h**3)))``; "silu", ``h / (1 + exp(-h))``; None, h.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    bias : array_like of any float dtype, ``(columns,)``, or None
    p : float
        Drop probability, 0 to 1.
    activation : {"relu", "gelu", "gelu_tanh", "silu", None}
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result. It is like x and may be x itself.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray of x's shape and dtype
    saved : Saved
        ``saved.backward(dy)`` is ``(x, bias)``.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add`. ValueError for another activation, a bias of another shape, or a bias and x without axes.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: with "relu" **only bits**, 1/8 byte per element, with either store and also when not training;
    ``saved.mask`` has a 1 for each element that was kept and is positive or NaN. With None the mask, as in
    `dropout_add`. With the others the mask, a copy of bias, and x: x itself if it is C-contiguous and the result is not
    written over it, otherwise a copy. Sources: Hendrycks and Gimpel, arXiv 1606.08415, 2016 (GELU, and SiLU); Vaswani
    et al., NeurIPS 2017.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> x = np.array([[-2.0, 1.0, 2.0], [3.0, -1.0, -3.0]], np.float32)
    >>> y, saved = fd.bias_act_dropout(x, None, 0.5, "relu", rng=4)
    >>> y
    array([[0., 0., 4.],
           [6., 0., 0.]], dtype=float32)
    >>> saved.backward(np.ones_like(y)).x, saved.nbytes
    (array([[0., 0., 2.],
           [2., 0., 0.]], dtype=float32), 4)
    """
    call = FusedCall("bias_act_dropout", x, "x", p, (training, store, rng, part))
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    code = ACTIVATIONS[activation]
    vector = NO_VECTOR if bias is None else call.vector("bias", bias, is_saved=keeps_input(code))
    return call.pointwise(BiasActGradients, out, bias=vector, activation=code)


def swiglu_dropout(
    gate: ArrayArgument,
    up: ArrayArgument,
    p: float = 0.5,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Array, SavedPointwise[GatedGradients]]:
    """Returns ``dropout(silu(gate) * up, p)``, and what backward needs: the middle of a gated feed-forward block.

    ``silu(h) = h / (1 + exp(-h))``.

    Parameters
    ----------
    gate : array_like of a float dtype, any shape ``(*)``
    up : array_like of gate's shape and dtype
    p : float
        Drop probability, 0 to 1.
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result. It is like gate and may be gate or up itself.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray of gate's shape and dtype
    saved : Saved
        ``saved.backward(dy)`` is ``(gate, up)``.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add`.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: gate and up, each itself if it is C-contiguous and the result is not written over it, otherwise a
    copy; and a bit per element, or no bits. Source: Shazeer, arXiv 2002.05202, 2020.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> gate, up = np.array([1.0, -1.0, 2.0, 0.0]), np.ones(4)
    >>> y, saved = fd.swiglu_dropout(gate, up, 0.5, rng=4)
    >>> y.round(3)
    array([0.   , 0.   , 3.523, 0.   ])
    >>> saved.backward(np.ones(4)).gate.round(3)
    array([0.   , 0.   , 2.182, 1.   ])
    """
    call = FusedCall("swiglu_dropout", gate, "gate", p, (training, store, rng, part))
    return call.pointwise(GatedGradients, out, multiplier=call.like_x("up", up), activation=SILU)


def geglu_dropout(
    gate: ArrayArgument,
    up: ArrayArgument,
    p: float = 0.5,
    *,
    approximate: str = "none",
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Array, SavedPointwise[GatedGradients]]:
    """Returns ``dropout(gelu(gate) * up, p)``, and what backward needs: the gated feed-forward block of T5 v1.1.

    Parameters
    ----------
    gate : array_like of a float dtype, any shape ``(*)``
    up : array_like of gate's shape and dtype
    p : float
        Drop probability, 0 to 1.
    approximate : {"none", "tanh"}
        The exact gelu, or its approximation by tanh, which T5 v1.1 and Gemma use ("gelu_new").
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result. It is like gate and may be gate or up itself.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray of gate's shape and dtype
    saved : Saved
        ``saved.backward(dy)`` is ``(gate, up)``.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add`. ValueError for another approximate.

    See Also
    --------
    swiglu_dropout : the same with silu; keeps the same for backward.
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: gate and up, as in `swiglu_dropout`, and a bit per element, or no bits. Source: Shazeer, arXiv
    2002.05202, 2020.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> gate, up = np.array([1.0, -1.0, 2.0, 0.0]), np.ones(4)
    >>> y, saved = fd.geglu_dropout(gate, up, 0.5, rng=4)
    >>> y.round(3)
    array([0.   , 0.   , 3.909, 0.   ])
    >>> saved.backward(np.ones(4)).gate.round(3)
    array([0.  , 0.  , 2.17, 1.  ])
    """
    call = FusedCall("geglu_dropout", gate, "gate", p, (training, store, rng, part))
    checks.choice("approximate", approximate, ("none", "tanh"))
    activation = GELU if approximate == "none" else GELU_TANH
    return call.pointwise(GatedGradients, out, multiplier=call.like_x("up", up), activation=activation)
