"""The ops ``torch.ops.fastdrop.lora`` and ``lora_backward``: a linear layer, and a low-rank adapter of dropped input,
``x @ weight.T + bias + dropout(x, p) @ lora_A.T @ lora_B.T * scaling``.

`functional.lora` calls them. x is cast to the dtype of the parameters, which is another one under autocast. Forward
keeps its arguments and the seed. Backward casts x again, draws the mask again, and computes the dropped x and its
product with ``lora_A`` again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core import variants
from ...core.random import threshold as threshold_of
from ..runtime import dtypes, mask_kernels
from ..runtime.dispatch import hide_from_dynamo
from . import formulas
from . import mask as mask_ops
from .record import Flags5, Maybe, Op, P, Seed, saved_mask


class Lora(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Maybe
    lora_A: Tensor
    lora_B: Tensor
    seed: Seed
    p: P
    scaling: float


class LoraBackward(NamedTuple):
    """Tensors that no wanted gradient needs are None."""

    dy: Tensor
    x: Maybe
    weight: Maybe
    lora_A: Maybe
    lora_B: Maybe
    seed: Seed
    p: P
    scaling: float
    dtype: torch.dtype  # x's
    wanted: Flags5  # of the gradients of x, weight, bias, lora_A and lora_B


class Gradients(NamedTuple):
    dx: Maybe
    dweight: Maybe
    dbias: Maybe
    dlora_A: Maybe
    dlora_B: Maybe


class Saved(NamedTuple):
    x: Maybe
    weight: Maybe
    lora_A: Maybe
    lora_B: Maybe
    seed: Tensor
    p: float | Tensor
    scaling: float
    dtype: torch.dtype


# ---- arguments ----


def check_arguments(x: Tensor, weight: Tensor, bias: Maybe, lora_A: Tensor, lora_B: Tensor, dtype: torch.dtype) -> None:
    """Raises unless the tensors fit one another, and parameters are of the dtype. `functional.lora` asks first, and ops
    are also called by hand."""
    if x.dim() < 1:
        raise ValueError("x must be (*, in), but got a tensor without axes")
    _check("weight", weight, "(out, in)", (None, x.shape[-1]), x.device, dtype)
    if bias is not None:
        _check("bias", bias, "(out,)", (weight.shape[0],), x.device, dtype)
    _check("lora_A", lora_A, "(r, in)", (None, x.shape[-1]), x.device, dtype)
    _check("lora_B", lora_B, "(out, r)", (weight.shape[0], lora_A.shape[0]), x.device, dtype)


def _check(
    name: str,
    given: Tensor,
    described: str,
    shape: tuple[int | None, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    if given.dtype is not dtype:
        raise TypeError(f"{name} must be of {dtype}, but got {given.dtype}")
    if given.device != device:
        raise ValueError(f"{name} must be on {device}, as the data is, but got one on {given.device}")
    fits = given.dim() == len(shape)
    if not fits or any(full is not None and got != full for got, full in zip(given.shape, shape, strict=True)):
        sizes = ", ".join("any" if extent is None else str(extent) for extent in shape)
        raise ValueError(f"{name} must be {described}, here ({sizes}), but got shape {tuple(given.shape)}")


def _check_call(call: Lora) -> None:
    formulas.check_real(call)
    dtypes.check_real(call.weight, "a fused function")
    check_arguments(*call[:5], call.weight.dtype)


def _check_gradient(call: LoraBackward) -> None:
    """Raises unless backward has tensors that forward may have had: hooks may change saved tensors."""
    formulas.check_real(call)
    dy, x, weight, lora_A, lora_B, *_ = call
    of_x, of_weight, _, of_A, of_B = call.wanted
    needs = {
        "x": (x, of_weight or of_A or of_B),
        "weight": (weight, of_x),
        "lora_A": (lora_A, of_x or of_B),
        "lora_B": (lora_B, of_x or of_A),
    }
    for name, (given, needed) in needs.items():
        if needed and given is None:
            raise ValueError(f"{name} must be a tensor for the gradients that are wanted, but got None")
    if x is not None:
        dtypes.check_real(x, "a fused function")
    if dy.dim() < 1:
        raise ValueError("dy must be (*, out), but got a tensor without axes")
    out, width = dy.shape[-1], _first(x, -1, weight, 1, lora_A, 1)
    rank = _first(lora_A, 0, lora_B, 1)
    for name, given, described, shape in (
        ("x", x, "(*, in)", (*dy.shape[:-1], width)),
        ("weight", weight, "(out, in)", (out, width)),
        ("lora_A", lora_A, "(r, in)", (rank, width)),
        ("lora_B", lora_B, "(out, r)", (out, rank)),
    ):
        if given is not None:
            _check(name, given, described, shape, dy.device, call.dtype if given is x else dy.dtype)


def _first(*given: Any) -> Any:
    """The extent of the first tensor that has the axis, of tensors and axes in turn. None if there is none."""
    for x, axis in zip(given[::2], given[1::2], strict=True):
        if x is not None and -x.dim() <= axis < x.dim():
            return x.shape[axis]
    return None


# ---- forward ----


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a matrix of rows, in logical order."""
    return x.to(dtype).contiguous().view(math.prod(x.shape[:-1]), x.shape[-1])


def _drop(x: Tensor, call: Any, inplace: bool = False) -> Tensor:
    """x under the mask of a `Lora` or a `LoraBackward`."""
    threshold = threshold_of(mask_ops.probability(call.p))
    seed, affine = mask_ops.kernel_seed(call.seed, x), variants.affine("inverted", threshold)
    return mask_kernels.forward(x, seed, threshold, affine, None, False, inplace)[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, by an overload that autocast leaves as it is."""
    return torch.mm(a, b, out=a.new_empty((a.shape[0], b.shape[1])))


def _lora(call: Lora) -> Tensor:
    x, weight, bias, lora_A, lora_B = _rows(call.x, call.weight.dtype), *call[1:5]
    y = _lora_outputs(call)
    flat = y.view(x.shape[0], weight.shape[0])
    if bias is None:
        torch.mm(x, weight.t(), out=flat)
    else:
        torch.addmm(bias, x, weight.t(), out=flat)
    flat.addmm_(_product(_drop(x, call), lora_A.t()), lora_B.t(), alpha=call.scaling)
    return y


def _lora_outputs(call: Lora) -> Tensor:
    return call.weight.new_empty((*call.x.shape[:-1], call.weight.shape[0]))


def _lora_saved(call: Lora, result: Tensor, needs: Any) -> Saved:
    of_x, of_weight, _, of_A, of_B = needs[:5]
    return Saved(
        call.x if of_weight or of_A or of_B else None,
        call.weight if of_x else None,
        call.lora_A if of_x or of_B else None,
        call.lora_B if of_x or of_A else None,
        saved_mask(None, call.seed),  # type: ignore[arg-type]
        call.p,
        call.scaling,
        call.x.dtype,
    )


def _lora_gradients(needs: Any, saved: Saved, dy: Maybe) -> tuple[Maybe, ...]:
    if dy is None:
        return ()
    wanted = list(needs[:5])
    call = LoraBackward(dy, *saved, wanted)
    if formulas.is_differentiated():
        _check_gradient(call)
        return _composed_gradients(call)
    gradients = LORA_BACKWARD.run(call)
    return tuple(x if wants else None for x, wants in zip(gradients, wanted, strict=True))


LORA = Op("lora", Lora, _lora_outputs, _lora, _lora_saved, _lora_gradients, check=_check_call)


# ---- its gradient ----


def _backward(call: LoraBackward) -> Gradients:
    _check_gradient(call)
    given: Any = call
    _, x, weight, lora_A, lora_B, _, _, scaling, dtype, (of_x, of_weight, of_bias, of_A, of_B) = given
    dy = _rows(call.dy, call.dy.dtype)
    dx: Any = None
    dh: Any = None
    dweight = dbias = dlora_A = dlora_B = None
    if of_x or of_A:
        dh = _product(dy, lora_B).mul_(scaling)
    if of_x:
        dx = _drop(_product(dh, lora_A), call, inplace=True)
        dx = dx.addmm_(dy, weight).view(*call.dy.shape[:-1], dx.shape[-1]).to(dtype)
    if of_weight:
        dweight = _product(dy.t(), _rows(x, dy.dtype))
    if of_bias:
        dbias = torch.sum(dy, 0, out=dy.new_empty(dy.shape[1:]))
    if of_A or of_B:
        dropped = _drop(_rows(x, dy.dtype), call)
        if of_A:
            dlora_A = _product(dh.t(), dropped)
        if of_B:
            h = _product(dropped, lora_A.t())
            dlora_B = _product(dy.t(), h).mul_(scaling)
    return Gradients(dx, dweight, dbias, dlora_A, dlora_B)


def _backward_outputs(call: LoraBackward) -> Gradients:
    _check_gradient(call)
    given: Any = call
    dy, x, weight, lora_A, lora_B, _, _, _, dtype, (of_x, of_weight, of_bias, of_A, of_B) = given
    out = dy.shape[-1]
    return Gradients(
        dy.new_empty((*dy.shape[:-1], weight.shape[1]), dtype=dtype) if of_x else None,
        dy.new_empty((out, x.shape[-1])) if of_weight else None,
        dy.new_empty((out,)) if of_bias else None,
        dy.new_empty((lora_B.shape[1], x.shape[-1])) if of_A else None,
        dy.new_empty((out, lora_A.shape[0])) if of_B else None,
    )


LORA_BACKWARD = Op("lora_backward", LoraBackward, _backward_outputs, _backward)


def _composed_gradients(call: LoraBackward) -> tuple[Maybe, ...]:
    """The gradients, composed of ops that have derivatives themselves."""
    given: Any = call
    dy, data, weight, lora_A, lora_B, seed, p, scaling, dtype, (of_x, of_weight, of_bias, of_A, of_B) = given
    rows = dy.reshape(math.prod(dy.shape[:-1]), dy.shape[-1])
    x: Any = None if data is None else data.to(dy.dtype)
    dh: Any = None
    dx = dweight = dlora_A = dlora_B = None
    if of_x or of_A:
        dh = dy @ lora_B * scaling
    if of_x:
        dx = (dy @ weight + formulas.masked(dh @ lora_A, seed, p, False)).to(dtype)
    if of_weight:
        dweight = rows.t() @ x.reshape(rows.shape[0], x.shape[-1])
    if of_A or of_B:
        dropped = formulas.masked(x, seed, p, False).reshape(rows.shape[0], x.shape[-1])
        if of_A:
            dlora_A = dh.reshape(rows.shape[0], dh.shape[-1]).t() @ dropped
        if of_B:
            dlora_B = rows.t() @ (dropped @ lora_A.t()) * scaling
    return dx, dweight, rows.sum(0) if of_bias else None, dlora_A, dlora_B


hide_from_dynamo(_lora, _backward)
