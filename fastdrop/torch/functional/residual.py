"""Residual branches that run on kept samples only: `skip_residual`, which `nn.residual` has as a module.

Which samples are kept is decided before the branch runs, on the CPU from a seed that the CPU has. So nothing waits for
a GPU. Where the CPU does not know the seed (compilers, transforms, a seed on a GPU), or where so few samples are
dropped that gathering the others costs more, all samples go through the branch, and the same ones are dropped after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core import checks
from ...core.mask import unpack_words
from ...core.random import keep_scale
from ...core.random import threshold as threshold_of
from ..runtime import dtypes, mask_kernels, nested
from ..runtime.dispatch import is_eager_dense
from ..runtime.dispatch.tensors import jit_trace
from ..runtime.located import Drawn
from ..runtime.memory import mask_words
from . import onnx, sharded
from .plan import (
    KERNEL,
    ONNX,
    Plan,
    Seed,
    Source,
    Whole,
    check_tensor,
    check_unused_seed,
    for_subclasses,
    plan_call,
    seed_for_kernel,
    seed_for_ops,
)
from .selection import select_fixed
from .structured import stochastic_depth

__all__ = ["COUNTS", "MIN_P", "draw_kept", "move_index", "skip_residual"]

COUNTS = ("random", "fixed")
MIN_P = 0.05  # below it, gathering the kept samples costs more than the branch saves

Along = Sequence[Tensor | None]
Branch = Callable[..., Tensor]


@for_subclasses(sharded.refuse("call it on x.to_local() with part=(x.device_mesh, x.placements)"))
def skip_residual(
    x: Tensor,
    branch: Branch,
    p: float | Tensor,
    *,
    training: bool = True,
    scale_by_keep: bool = True,
    generator: torch.Generator | None = None,
    seed: Seed = None,
    part: Whole = None,
    min_p: float = MIN_P,
    along: Along = (),
    count: str = "random",
) -> Tensor:
    """Returns ``x + stochastic_depth(branch(x), p, "row")`` without running the branch on samples that are dropped.

    Parameters
    ----------
    x : Tensor, ``(N, *)``
        A sample is an entry of the first axis.
    branch : callable
        Called once, as ``branch(x_kept, *along_kept)`` with the kept samples in their order. Returns a Tensor of
        x_kept's shape. It must not write to its input. Samples must not influence each other in it: batch normalisation
        would see the kept ones only.
    p : float or Tensor of one number
        Drop probability of a sample, 0 to 1.
    training : bool
        False returns ``x + branch(x)``.
    scale_by_keep : bool
        Whether the branch's result is multiplied by ``1 / (1 - p)``.
    generator : torch.Generator, optional
        Draws the seed; None is torch's default generator.
    seed : int or Tensor of int, optional
        Decides the mask, in place of a generator.
    part : fastdrop.Part, sequence of them, (DeviceMesh, placements), callable or Tensor, optional
        Of which whole the data is a part.
    min_p : float
        For p below it all samples go through the branch, and the same ones are dropped: the same result up to rounding.
    along : sequence of Tensor or None, ``(N, *)`` each
        Further arguments of the branch, of which it gets the kept samples too: masks, lengths, positions.
    count : {"random", "fixed"}
        "random" keeps each sample with probability ``1 - p``, under the mask of `stochastic_depth`. "fixed" keeps
        exactly ``k = round(N * (1 - p))`` samples (ties to even), so that shapes are static, and scales by ``N / k``.
        They are the k samples with the smallest values of ``gaussian_dropout(torch.ones(N, dtype=torch.float64), 0.5,
        seed=seed)``, the first of equal ones. All sets of k samples are equally likely.

    Returns
    -------
    Tensor ``(N, *)``, of the dtype of ``x + branch(x)``

    Raises
    ------
    ValueError
        p or min_p outside [0, 1], an unknown count, x without axes, a tensor in along with another number of samples,
        or a branch that returns another shape.
    TypeError
        A branch that can't be called or returns no Tensor, an entry of along that is no Tensor; with "fixed", a p that
        a compiler can't read.
    RuntimeError
        A branch that writes to its input where samples may be dropped, nested tensors, "fixed" under
        `torch.jit.trace`, and what `dropout` refuses.

    See Also
    --------
    dropout : says more about these parameters.

    Notes
    -----
    The seed is drawn before the branch runs.

    If no sample is kept, the branch runs on an empty batch, so its parameters get gradients of 0. If all are kept,
    nothing is gathered.

    Kept for backward: what the branch keeps for its kept samples, and 8 bytes for each of them. It has every gradient
    that the branch has. Compiled code, and code under a transform of `torch.func`, keeps the same samples, but with
    "random" it runs the branch on all of them, because the number of kept ones is not known to a compiler. (With batch
    normalisation or dropout in the branch the result differs then.) Sources: Huang et al., ECCV 2016; Oquab et al.,
    "DINOv2", 2023, section 5, for "fixed".

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> def branch(x):
    ...     print(len(x), "samples")
    ...     return x
    >>> fdt.skip_residual(torch.ones(4, 2), branch, 0.5, seed=4)[:, 0]
    2 samples
    tensor([1., 1., 3., 3.])
    """
    check_tensor(x, "x")
    _check_arguments(x, branch, min_p, along, count)
    source: Source = generator, seed, part
    plan = way, p, drops = plan_call(x, p, training, what="drop probability")
    if not drops:
        check_unused_seed(source)
        return x + _run(branch, x, along, may_write=True)
    nested.check_dense(x)
    known = not isinstance(p, Tensor)
    all_run = bool(known and p < min_p)
    if count == "fixed":
        if part is not None:
            raise ValueError("part must not be given with count='fixed', which chooses among all samples of the whole")
        if not known:
            raise TypeError("count='fixed' must have p as a number in compiled code, but got a Tensor")
        return _keep_fixed(x, branch, along, plan, source, (scale_by_keep, all_run))
    take_seed = seed_for_kernel if way == KERNEL else seed_for_ops
    chosen: Any = None if way == ONNX else take_seed(x, source, shared=(None,) + (1,) * (x.dim() - 1))
    if way != KERNEL or all_run or isinstance(chosen, Tensor):
        y = _run(branch, x, along)
        scaling = "inverted" if scale_by_keep else "standard"
        source = source if way == ONNX else (None, Drawn(chosen) if isinstance(chosen, Tensor) else chosen, None)
        given: dict[str, Any] = {"generator": source[0], "seed": source[1], "part": source[2]}
        return x + stochastic_depth(y, p, "row", scaling=scaling, **given)
    threshold = threshold_of(p)  # type: ignore[arg-type]
    index = torch.from_numpy(draw_kept(len(x), chosen, threshold))
    return _run_kept(x, branch, along, index, keep_scale(threshold) if scale_by_keep else 1.0)


def draw_kept(cells: int, seed: Any, threshold: int) -> NDArray[np.intp]:
    """The numbers of the cells that a mask keeps, drawn on the CPU."""
    words = mask_kernels.draw_mask(_ON_CPU, cells, seed, threshold)
    return np.flatnonzero(unpack_words(mask_words(words), cells))


_ON_CPU = torch.empty(0, device="cpu")


def _keep_fixed(
    x: Tensor, branch: Branch, along: Along, plan: Plan, source: Source, options: tuple[bool, bool]
) -> Tensor:
    """``count="fixed"``. ``options`` are ``scale_by_keep`` and whether all samples go through the branch."""
    way, p, _ = plan
    if jit_trace() is not None:
        raise RuntimeError(
            "torch.jit.trace can't trace count='fixed' in training, because it would write the number of kept samples "
            "into the graph: call eval(), give count='random', or use torch.compile"
        )
    n = x.shape[0]
    kept = round(n * (1.0 - p))
    scale_by_keep, all_run = options
    scale = n / kept if scale_by_keep and kept else 1.0
    if way == ONNX:
        onnx.refuse("a fixed number of kept samples")
    index = select_fixed(x, (n,), kept, way, source, "cpu")
    if all_run:
        y = _run(branch, x, along)
        index = move_index(index, x.device)
        return _add(x, _rows(y, index), index, scale)
    return _run_kept(x, branch, along, index, scale)


def _run_kept(x: Tensor, branch: Branch, along: Along, index: Tensor, scale: float) -> Tensor:
    """Runs the branch on the samples of an index, which is on the CPU or on x's device."""
    if index.shape[0] == x.shape[0]:
        return _add(x, _run(branch, x, along), None, scale)
    there = move_index(index, x.device)
    on = {index.device: index, x.device: there}
    rows = [None if a is None else _rows(a, on.get(a.device, index)) for a in along]
    return _add(x, _run(branch, _rows(x, there), rows), there, scale)


def _add(x: Tensor, y: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """x plus the kept samples y, scaled. Each element is rounded once. The index is None if all are kept."""
    compiling = torch.compiler.is_compiling()
    if not compiling:
        dtypes.check_dtype(y)
    if index is None:
        return torch.add(x, y, alpha=scale)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if not compiling and is_eager_dense(x) and is_eager_dense(y):
        added: Tensor = _AddRows.apply(x, y, index, scale)
        return added
    return _add_rows(x, y, index, scale)


class _AddRows(torch.autograd.Function):
    """`_add_rows`, of which autograd keeps the index alone. torch's own `index_add` would keep y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, index: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index)
        ctx.scale = scale
        return _add_rows(x, y, index, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return dy, _rows(dy, index) * ctx.scale, None, None


def _add_rows(x: Tensor, y: Tensor, index: Tensor, scale: float) -> Tensor:
    if not _is_channels_last(x):
        return x.index_add(0, index, y, alpha=scale)
    return x.movedim(1, -1).index_add(0, index, y.movedim(1, -1), alpha=scale).movedim(-1, 1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The samples of an index."""
    index = move_index(index, x.device)
    if not _is_channels_last(x):
        return x.index_select(0, index)
    return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)


def _is_channels_last(x: Tensor) -> bool:
    """Whether x's order in memory is channels-last, which torch's ops on samples would not keep."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return channels_last is not None and not x.is_contiguous() and bool(x.is_contiguous(memory_format=channels_last))


def move_index(index: Tensor, device: torch.device) -> Tensor:
    """The index on a device. The copy to a GPU comes from pinned memory, so the CPU does not wait for it."""
    if index.device == device:
        return index
    if device.type == "cuda" and index.is_cpu:
        index = index.pin_memory()
    return index.to(device, non_blocking=device.type == "cuda")


def _run(branch: Branch, x: Tensor, along: Along, may_write: bool = False) -> Tensor:
    version = _version(x)
    y: Any = branch(x, *along)
    if _version(x) != version and not may_write:  # x itself would change, but only if all samples are kept
        raise RuntimeError(
            "branch must not write to its input, because skip_residual adds its result to x: use activations without "
            "inplace=True on the branch's input, or copy it"
        )
    if not isinstance(y, Tensor):
        raise TypeError(f"branch must return a Tensor, but got {type(y).__name__}")
    if y.shape != x.shape:
        raise ValueError(f"branch must return the shape of its input, {tuple(x.shape)}, but got {tuple(y.shape)}")
    return y


def _version(x: Tensor) -> int:
    """The number of writes to x; 0 where it can't be asked."""
    if torch.compiler.is_compiling() or x.is_inference() or not is_eager_dense(x):
        return 0
    return x._version


def _check_arguments(x: Tensor, branch: Any, min_p: Any, along: Any, count: Any) -> None:
    if x.is_nested:
        raise RuntimeError(
            "skip_residual takes dense tensors, but got a nested one: give x + stochastic_depth(branch(x), p, 'row')"
        )
    checks.at_least("x", x.dim(), 1, "an axis of samples")
    checks.function("branch", branch)
    checks.between("min_p", min_p, 0, 1)
    checks.choice("count", count, COUNTS)
    if isinstance(along, Tensor) or not isinstance(along, Sequence):
        raise TypeError(f"along must be a sequence of tensors, but got {type(along).__name__}")
    for i, a in enumerate(along):
        if a is None:
            continue
        check_tensor(a, f"along[{i}]")
        if not a.dim() or a.shape[0] != x.shape[0]:
            raise ValueError(
                f"along[{i}] must have x's number of samples, {x.shape[0]}, on axis 0, but got shape {tuple(a.shape)}"
            )
