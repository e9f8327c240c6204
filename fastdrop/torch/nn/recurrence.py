"""The steps of a recurrent layer whose hidden state drops by a mask of its own for each sequence.

`nn.recurrent` calls `run_steps` for one direction of one layer. There are two ways of the same numbers, up to rounding:

* `compose_steps` is the formula in torch's ops, which autograd, transforms and tracers follow step by step. Autocast
  uses it too, because it casts single ops.
* `_Recurrence` is one autograd function for eager dense tensors. It computes gates in place, in memory for all steps,
  and its backward has one product in each step. Everything else is a product over all steps at once.

Rows are those of a packed sequence: ``sizes[t]`` of them belong to step t, which are the first sequences of the batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.plan import autocast_dtype
from ..runtime.dispatch import can_call_kernel, is_eager_dense

__all__ = ["Inputs", "Steps", "run_steps"]

States = tuple[Tensor, ...]  # the hidden state and, for an LSTM, the cell state
Gradients = tuple[Tensor | None, ...]  # in the order of `Inputs`

_sigmoid_backward, _tanh_backward = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input


class Steps(NamedTuple):
    """How the steps run."""

    is_lstm: bool
    sizes: list[int]
    reverse: bool
    scale: float  # of kept elements. It goes into the product, so that dropped elements are set to 0

    def order(self) -> list[int]:
        steps = range(len(self.sizes))
        return list(reversed(steps) if self.reverse else steps)


class Inputs(NamedTuple):
    """What may have a gradient."""

    x: Tensor  # the rows of all steps
    hidden: Tensor
    cell: Tensor | None
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None  # an LSTM's is the sum of both
    b_hh: Tensor | None
    w_hr: Tensor | None  # an LSTM's projection


def run_steps(steps: Steps, dropped: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """The rows of all steps, and the last states in the order of the batch. ``dropped`` has a bool for each sequence
    and hidden feature."""
    if torch.compiler.is_compiling() or autocast_dtype(inputs.x) is not None:
        return compose_steps(steps, dropped, inputs)
    if not all(given is None or (is_eager_dense(given) and given.dtype is inputs.x.dtype) for given in inputs):
        return compose_steps(steps, dropped, inputs)
    results: tuple[Tensor, ...] = _Recurrence.apply(steps, dropped, *inputs)
    return results


# ---- the formula ----


def compose_steps(steps: Steps, dropped: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """`run_steps` in torch's ops."""
    x, hidden, cell, w_ih, w_hh, b_ih, b_hh, w_hr = inputs
    given = F.linear(x, w_ih, b_ih).split(steps.sizes)
    begin = (hidden,) if cell is None else (hidden, cell)
    if b_hh is None:
        b_hh = w_hh.new_zeros(1)
    state = tuple(initial[:0] for initial in begin)
    found, ended = [], []
    for t in steps.order():
        rows, running = steps.sizes[t], len(state[0])
        if rows > running:
            state = tuple(torch.cat([s, initial[running:rows]]) for s, initial in zip(state, begin, strict=True))
        elif rows < running:
            ended.append(tuple(s[rows:] for s in state))
            state = tuple(s[:rows] for s in state)
        kept = state[0].masked_fill(dropped[:rows], 0.0)
        product = torch.addmm(given[t] if steps.is_lstm else b_hh, kept, w_hh.t(), alpha=steps.scale)
        state = _lstm_step(product, state[1], w_hr) if steps.is_lstm else _gru_step(given[t], product, state[0])
        found.append(state[0])
    y = torch.cat(found[::-1] if steps.reverse else found)
    last = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
    if steps.is_lstm:  # under autocast torch's LSTM returns the dtype of its products, torch's GRU that of its states
        return tuple(result.to(given[0].dtype) for result in (y, *last))
    return y, *last


def _lstm_step(gates: Tensor, cell: Tensor, projection: Tensor | None) -> States:
    i, f, g, o = gates.chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return (hidden if projection is None else F.linear(hidden, projection)), cell


def _gru_step(given: Tensor, product: Tensor, hidden: Tensor) -> States:
    given_r, given_z, given_n = given.chunk(3, 1)
    r, z, n = product.chunk(3, 1)
    new = (given_n + (given_r + r).sigmoid() * n).tanh()
    return (new + (given_z + z).sigmoid() * (hidden - new),)


# ---- one function for all steps ----


class Kept(NamedTuple):
    """What backward needs of all steps, a row for each sequence and step."""

    gates: Tensor  # after their activations
    dropped_hidden: Tensor  # what was multiplied by w_hh, but for the scale
    before: Tensor  # the cell before the step; a GRU's hidden state before it
    inner: Tensor  # tanh of the cell after the step; a GRU's product of the hidden state for the new state


class _Recurrence(torch.autograd.Function):
    """``apply(steps, dropped, *inputs)``"""

    @staticmethod
    def forward(ctx: Any, steps: Steps, dropped: Tensor, *given: Any) -> tuple[Tensor, ...]:
        inputs = Inputs(*given)
        y, last, kept = (_lstm_forward if steps.is_lstm else _gru_forward)(steps, dropped, inputs)
        ctx.steps = steps
        ctx.save_for_backward(dropped, *inputs, *kept)
        return y, *last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        steps, (dropped, *saved) = ctx.steps, ctx.saved_tensors
        inputs, kept = Inputs(*saved[: len(Inputs._fields)]), Kept(*saved[len(Inputs._fields) :])
        needs = Inputs(*ctx.needs_input_grad[2:])
        with torch.autocast(dropped.device.type, enabled=False):  # as in forward
            if not all(map(can_call_kernel, grads)):
                return None, None, *_composed_gradients(steps, dropped, inputs, needs, grads)
            backward = _lstm_backward if steps.is_lstm else _gru_backward
            return None, None, *backward(steps, dropped, inputs, kept, needs, grads)


def _composed_gradients(
    steps: Steps, dropped: Tensor, inputs: Inputs, needs: Inputs, grads: tuple[Tensor, ...]
) -> Gradients:
    """The gradients by the formula, which runs again, because they are differentiated or transformed themselves."""
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one input may have been computed from another. What has no gradient must not get one here.
        views: Any = [
            None if given is None else given.view_as(given) if wants else given.detach()
            for given, wants in zip(inputs, needs, strict=True)
        ]
        results = compose_steps(steps, dropped, Inputs(*views))
        wanted = [view for view, wants in zip(views, needs, strict=True) if wants]
        found = iter(torch.autograd.grad(results, wanted, grads, create_graph=create))
    return tuple(next(found) if wants else None for wants in needs)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())


def _lstm_forward(steps: Steps, dropped: Tensor, inputs: Inputs) -> tuple[Tensor, States, Kept]:
    x, hidden, cell, w_ih, w_hh, b_ih, _, w_hr = inputs
    assert cell is not None
    hidden, cell, width, zero = hidden.clone(), cell.clone(), cell.shape[1], x.new_zeros(())
    y, kept = _buffers(steps, _linear(x, w_ih, b_ih), hidden.shape[1], width)
    w_hh, h, c, drop = w_hh.t(), hidden, cell, dropped
    views = _views(steps, *kept, kept.gates[:, : 2 * width], *kept.gates.split(width, 1), y)
    for t in steps.order():
        gates, dropped_hidden, before, inner, i_and_f, i, f, g, o, out = views[t]
        if steps.sizes[t] != len(h):
            h, c, drop = (state[: steps.sizes[t]] for state in (hidden, cell, dropped))
        torch.where(drop, zero, h, out=dropped_hidden)
        gates.addmm_(dropped_hidden, w_hh, alpha=steps.scale)
        i_and_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        before.copy_(c)
        c.mul_(f).addcmul_(i, g)
        torch.tanh(c, out=inner)
        if w_hr is None:
            torch.mul(o, inner, out=out)
        else:
            torch.mm(o * inner, w_hr.t(), out=out)
        h.copy_(out)
    return y, (hidden, cell), kept


def _views(steps: Steps, *buffers: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each step in each of the buffers. Views are made at once: between products they take much longer,
    because a product leaves little of other code in the caches."""
    return list(zip(*(buffer.split(steps.sizes) for buffer in buffers), strict=True))


def _buffers(steps: Steps, gates: Tensor, out: int, width: int) -> tuple[Tensor, Kept]:
    """Memory for the output and for what is kept."""
    rows = len(gates)
    y, dropped_hidden = gates.new_empty((rows, out)), gates.new_empty((rows, out))
    return y, Kept(gates, dropped_hidden, gates.new_empty((rows, width)), gates.new_empty((rows, width)))


def _lstm_backward(
    steps: Steps, dropped: Tensor, inputs: Inputs, kept: Kept, needs: Inputs, grads: tuple[Tensor, ...]
) -> Gradients:
    w_hh, w_hr, width = inputs.w_hh, inputs.w_hr, kept.inner.shape[1]
    dy, hidden, cell = grads[0], grads[1].clone(), grads[2].clone()
    dgates = torch.empty_like(kept.gates)
    dprojected = None if w_hr is None else torch.empty_like(kept.dropped_hidden)
    dprojected_steps = () if dprojected is None else dprojected.split(steps.sizes)
    dh, dc, drop = hidden, cell, dropped
    views = _views(steps, dy, *kept[2:], *kept.gates.split(width, 1), dgates, *dgates.split(width, 1))
    for t in reversed(steps.order()):
        dy_step, before, inner, i, f, g, o, dgates_step, di, df, dg, do = views[t]
        if steps.sizes[t] != len(dh):
            dh, dc, drop = (state[: steps.sizes[t]] for state in (hidden, cell, dropped))
        dh.add_(dy_step)
        dout = dh if w_hr is None else dh @ w_hr
        if dprojected is not None:
            dprojected_steps[t].copy_(dh)
        _sigmoid_backward(dout * inner, o, grad_input=do)
        dc.add_(torch.ops.aten.tanh_backward(dout * o, inner))
        _sigmoid_backward(dc * g, i, grad_input=di)
        _sigmoid_backward(dc * before, f, grad_input=df)
        _tanh_backward(dc * i, g, grad_input=dg)
        dc.mul_(f)
        dh.addmm_(dgates_step, w_hh, beta=0.0, alpha=steps.scale).masked_fill_(drop, 0.0)
    dw_hr = None
    if dprojected is not None and needs.w_hr:
        dw_hr = dprojected.t() @ (kept.gates[:, 3 * width :] * kept.inner)
    dx, dw_ih, db_ih = _of_linear(inputs, needs, dgates)
    return dx, hidden, cell, dw_ih, _of_w_hh(steps, needs, dgates, kept), db_ih, None, dw_hr


def _gru_forward(steps: Steps, dropped: Tensor, inputs: Inputs) -> tuple[Tensor, States, Kept]:
    x, hidden, _, w_ih, w_hh, b_ih, b_hh, _ = inputs
    hidden, width, zero = hidden.clone(), hidden.shape[1], x.new_zeros(())
    y, kept = _buffers(steps, _linear(x, w_ih, b_ih), width, width)
    w_hh, h, drop = w_hh.t(), hidden, dropped
    views = _views(steps, *kept, kept.gates[:, : 2 * width], *kept.gates.split(width, 1), y)
    for t in steps.order():
        _, dropped_hidden, before, inner, r_and_z, r, z, n, out = views[t]
        if steps.sizes[t] != len(h):
            h, drop = hidden[: steps.sizes[t]], dropped[: steps.sizes[t]]
        torch.where(drop, zero, h, out=dropped_hidden)
        product = torch.addmm(zero if b_hh is None else b_hh, dropped_hidden, w_hh, alpha=steps.scale)
        r_and_z.add_(product[:, : 2 * width]).sigmoid_()
        inner.copy_(product[:, 2 * width :])
        n.addcmul_(r, inner).tanh_()
        before.copy_(h)
        h.sub_(n).mul_(z).add_(n)
        out.copy_(h)
    return y, (hidden,), kept


def _gru_backward(
    steps: Steps, dropped: Tensor, inputs: Inputs, kept: Kept, needs: Inputs, grads: tuple[Tensor, ...]
) -> Gradients:
    w_hh, width = inputs.w_hh, kept.inner.shape[1]
    dy, hidden = grads[0], grads[1].clone()
    dgates, dproducts = torch.empty_like(kept.gates), torch.empty_like(kept.gates)
    dh, drop = hidden, dropped
    of_gates = *kept.gates.split(width, 1), dgates, *dgates.split(width, 1)
    views = _views(steps, dy, *kept[2:], *of_gates, dproducts, dproducts[:, 2 * width :])
    for t in reversed(steps.order()):
        dy_step, before, inner, r, z, n, dgates_step, dr, dz, dn, dproduct, dproduct_n = views[t]
        if steps.sizes[t] != len(dh):
            dh, drop = hidden[: steps.sizes[t]], dropped[: steps.sizes[t]]
        dh.add_(dy_step)
        carried = dh * z
        _sigmoid_backward(dh * (before - n), z, grad_input=dz)
        _tanh_backward(dh - carried, n, grad_input=dn)
        _sigmoid_backward(dn * inner, r, grad_input=dr)
        dproduct.copy_(dgates_step)
        dproduct_n.mul_(r)
        dh.addmm_(dproduct, w_hh, beta=0.0, alpha=steps.scale).masked_fill_(drop, 0.0).add_(carried)
    dx, dw_ih, db_ih = _of_linear(inputs, needs, dgates)
    db_hh = dproducts.sum(0) if needs.b_hh else None
    return dx, hidden, None, dw_ih, _of_w_hh(steps, needs, dproducts, kept), db_ih, db_hh, None


def _of_linear(inputs: Inputs, needs: Inputs, dgates: Tensor) -> Gradients:
    """The gradients of x, w_ih and b_ih."""
    return (
        dgates @ inputs.w_ih if needs.x else None,
        dgates.t() @ inputs.x if needs.w_ih else None,
        dgates.sum(0) if needs.b_ih else None,
    )


def _of_w_hh(steps: Steps, needs: Inputs, dproducts: Tensor, kept: Kept) -> Tensor | None:
    return (dproducts.t() @ kept.dropped_hidden).mul_(steps.scale) if needs.w_hh else None
