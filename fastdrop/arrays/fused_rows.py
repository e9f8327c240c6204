"""The NumPy API of the fused ops that need a whole row: norms and softmax together with dropout, in one pass.

The functions here are public and work as those of `fused.py` do. A row is the last axis.
"""

from __future__ import annotations

import numpy as np

from .array_ops import compute_dtype
from .fused_call import FusedCall
from .saved import LayerNormGradients, RmsNormGradients, SavedNorm, SavedSoftmax
from .signatures import AnyArray, Array, ArrayArgument, PartOfWhole, RandomState


def dropout_add_layer_norm(
    x: ArrayArgument,
    residual: ArrayArgument | None,
    weight: ArrayArgument | None = None,
    bias: ArrayArgument | None = None,
    p: float = 0.5,
    eps: float = 1e-5,
    *,
    x_bias: ArrayArgument | None = None,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    part: PartOfWhole = None,
) -> tuple[Array, Array, SavedNorm[LayerNormGradients]]:
    """Returns the layer norm of a residual sum after dropout, that sum, and what backward needs.

    ``residual_out = residual + dropout(x + x_bias, p)`` and, over the last axis, ``y = (residual_out - mean) /
    sqrt(variance + eps) * weight + bias``. A post-norm block uses y, a pre-norm block uses both.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    residual : array_like of x's shape, or None
        It has x's dtype, or float32 if x has 16 bits. None adds nothing.
    weight, bias : array_like of any float dtype, ``(columns,)``, or None
        The weight and the bias of the norm.
    p : float
        Drop probability, 0 to 1.
    eps : float
        At least 0.
    x_bias : array_like of any float dtype, ``(columns,)``, or None
        Added to x before dropout.
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray of x's shape and dtype
    residual_out : ndarray of x's shape, and of the residual's dtype
        The norm is computed from its rounded values, with statistics in float32 (float64 for float64). Backward reads
        it, so do not pass it to a later op as out.
    saved : Saved
        ``saved.backward(dy, dresidual=None)`` accepts the gradients of y and of residual_out and is ``(x, residual,
        weight, bias, x_bias)``; the gradient of an argument that was not given is None.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add`. ValueError if weight or a bias has another shape, eps is below 0, or x has no axes or a
        part cuts the last one.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: residual_out itself, two numbers per row, a copy of weight, and a bit per element, or nothing.
    Sources: Ba et al., arXiv 1607.06450, 2016; Vaswani et al., NeurIPS 2017.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> x, residual = np.ones((2, 4)), np.arange(8.0).reshape(2, 4)
    >>> y, residual_out, saved = fd.dropout_add_layer_norm(x, residual, p=0.5, rng=4)
    >>> residual_out
    array([[0., 1., 4., 5.],
           [4., 7., 6., 7.]])
    >>> y.round(3)
    array([[-1.213, -0.728,  0.728,  1.213],
           [-1.633,  0.816,  0.   ,  0.816]])
    >>> gradients = saved.backward(np.eye(2, 4), dresidual=np.ones((2, 4)))
    >>> gradients.x.round(3), gradients.weight is None
    (array([[0.   , 0.   , 1.971, 2.114],
           [0.   , 2.953, 0.   , 0.   ]]), True)
    """
    call = FusedCall("dropout_add_layer_norm", x, "x", p, (training, store, rng, part))
    vectors = {"weight": weight, "bias": bias, "x_bias": x_bias}
    return call.norm(LayerNormGradients, residual, vectors, eps, centred=True)


def dropout_add_rms_norm(
    x: ArrayArgument,
    residual: ArrayArgument | None,
    weight: ArrayArgument | None = None,
    p: float = 0.5,
    eps: float | None = None,
    *,
    x_bias: ArrayArgument | None = None,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    part: PartOfWhole = None,
) -> tuple[Array, Array, SavedNorm[RmsNormGradients]]:
    """Returns the RMS norm of a residual sum after dropout, that sum, and what backward needs.

    ``residual_out = residual + dropout(x + x_bias, p)`` and, over the last axis, ``y = residual_out /
    sqrt(mean(residual_out**2) + eps) * weight``.

    Parameters
    ----------
    x : array_like of a float dtype, ``(*, columns)``
    residual : array_like of x's shape, or None
        It has x's dtype, or float32 if x has 16 bits. None adds nothing.
    weight : array_like of any float dtype, ``(columns,)``, or None
        The weight of the norm.
    p : float
        Drop probability, 0 to 1.
    eps : float, optional
        At least 0. None means ``numpy.finfo(numpy.float32).eps``, or float64's for float64 data, as in torch.
    x_bias : array_like of any float dtype, ``(columns,)``, or None
        Added to x before dropout.
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray of x's shape and dtype
    residual_out : ndarray of x's shape, and of the residual's dtype
        Backward reads it, so do not pass it to a later op as out.
    saved : Saved
        ``saved.backward(dy, dresidual=None)`` is ``(x, residual, weight, x_bias)``.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add_layer_norm`.

    See Also
    --------
    dropout_add_layer_norm, dropout_add : say more about these parameters.

    Notes
    -----
    Kept for backward: what `dropout_add_layer_norm` keeps. Source: Zhang and Sennrich, NeurIPS 2019.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> y, residual_out, saved = fd.dropout_add_rms_norm(np.ones((1, 4)), np.ones((1, 4)), p=0.5, rng=4)
    >>> residual_out, y.round(3)
    (array([[1., 1., 3., 3.]]), array([[0.447, 0.447, 1.342, 1.342]]))
    """
    call = FusedCall("dropout_add_rms_norm", x, "x", p, (training, store, rng, part))
    vectors = {"weight": weight, "x_bias": x_bias}
    eps = np.finfo(compute_dtype(call.dtype)).eps if eps is None else eps
    return call.norm(RmsNormGradients, residual, vectors, eps, centred=False)


def softmax_dropout(
    scores: ArrayArgument,
    p: float = 0.5,
    scale: float = 1.0,
    attn_mask: ArrayArgument | None = None,
    causal: bool = False,
    *,
    training: bool = True,
    store: str = "bits",
    rng: RandomState = None,
    out: AnyArray | None = None,
    part: PartOfWhole = None,
) -> tuple[Array, SavedSoftmax]:
    """Returns ``dropout(softmax(scale * scores + attn_mask), p)`` over the last axis, and what backward needs.

    Parameters
    ----------
    scores : array_like of a float dtype, ``(*, queries, keys)``, or ``(keys,)`` unless causal
    p : float
        Drop probability, 0 to 1.
    scale : float
        Finite; ``1 / sqrt(width)`` in attention.
    attn_mask : array_like that broadcasts to scores' shape, or None
        Booleans, where True means that the key takes part, or floats of any dtype, which are added to the scores. It
        gets no gradient. An axis of queries or heads along which it is broadcast takes no memory. A Numba array on a
        GPU must be float32 (float64 for float64 scores) and have an element for each key.
    causal : bool
        True lets key j take part for query i if ``j <= i``: aligned at the upper left, as torch's ``is_causal``.
    training : bool
        False drops nothing.
    store : {"bits", "seed"}
        What is kept for backward: bits, or the random state, from which they are drawn again.
    rng : None, int, Stream or numpy.random.Generator
        What the mask is drawn from: the process-wide stream, a seed, or the given source.
    out : ndarray, optional
        Receives the result. It is like scores and may be scores itself.
    part : Part or sequence of them, optional
        Of which whole array the data is a part.

    Returns
    -------
    y : ndarray of scores' shape and dtype
        A row in which no key takes part is 0.
    saved : Saved
        ``saved.backward(dy)`` is ``(scores,)``.

    Raises
    ------
    TypeError, ValueError
        As in `dropout_add`. ValueError if scale is not finite, attn_mask does not broadcast, scores has no axes, or a
        part cuts the keys or, if causal, the queries.

    See Also
    --------
    dropout_add : says more about these parameters.

    Notes
    -----
    Kept for backward: the probabilities in scores' dtype and a bit per element, or no bits. If nothing was dropped, y
    itself is kept: do not change it then. Source: Vaswani et al., NeurIPS 2017, sections 3.2.1 and 5.4.

    Examples
    --------
    >>> import fastdrop as fd, numpy as np
    >>> scores = np.log([[1.0, 1.0, 2.0], [1.0, 3.0, 4.0]])
    >>> y, saved = fd.softmax_dropout(scores, 0.5, rng=1)
    >>> y.round(3)
    array([[0.5 , 0.  , 1.  ],
           [0.  , 0.75, 0.  ]])
    >>> saved.backward(np.eye(2, 3)).scores.round(3)
    array([[ 0.375, -0.125, -0.25 ],
           [-0.094,  0.469, -0.375]])
    """
    call = FusedCall("softmax_dropout", scores, "scores", p, (training, store, rng, part))
    return call.softmax(scale, attn_mask, causal, out)
