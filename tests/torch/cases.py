"""Tables and helpers of the tests of torch's face; import it after `pytest.importorskip("torch")`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastdrop as fd
import fastdrop.torch as fdt

from ..cases import DTYPES


def assert_equal(actual, expected):
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal(a, e)
        return
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def tensor_of(array):
    """A new tensor of the same bits."""
    array = np.array(array, order="C")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor):
    """The same bits in C order; a complex number as two."""
    tensor = tensor.detach().contiguous()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES[3].public)
    return tensor.numpy()


def under(seed, function, *arguments, **options):
    """The function's result when torch's generator starts at seed."""
    torch.manual_seed(seed)
    return function(*arguments, **options)


def gradient(function, x):
    """The output, and the gradient of its sine's sum."""
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.sin().sum().backward()
    return y.detach(), x.grad


@contextlib.contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """What is kept for backward."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        yield kept


def numbers_drawn(call, generator=None):
    """How many 63-bit numbers a call takes from a generator; None if what it leaves is not the state after so many."""
    generator = generator or torch.default_generator
    before = generator.get_state()
    call()
    after = generator.get_state()
    try:
        generator.set_state(before)
        for count in range(4):
            if torch.equal(generator.get_state(), after):
                return count
            torch.empty((), dtype=torch.int64).random_(generator=generator)
        return None
    finally:
        generator.set_state(after)


def untouched(x, call, error, match):
    """The call is refused, and nothing tells that it was made: no element, version or random number has changed."""
    before, version = x.detach().clone(), x._version

    def refused():
        with pytest.raises(error, match=match):
            call()

    assert numbers_drawn(refused) == 0
    assert torch.equal(x, before)
    assert x._version == version


class Log(TorchDispatchMode):
    """Remembers the ops that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class LogFunctions(TorchFunctionMode):
    """Remembers the functions that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Named(torch.Tensor):
    """A subclass by ``__torch_function__``, which remembers what was called."""

    seen: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class Wrapped(torch.Tensor):
    """A wrapper by ``__torch_dispatch__``: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapped, function(*args, **kwargs))


# ---- the family ----

FLOOR = -1.7580993408473766  # SELU's value far to the left, to which alpha dropout drops


def alpha(p):
    """(a, b, c) of alpha dropout: kept x becomes a x + b, a dropped one c."""
    a = ((1 - p) * (1 + p * FLOOR**2)) ** -0.5
    return a, -a * p * FLOOR, a * (1 - p) * FLOOR


@dataclass(frozen=True)
class Kind:
    """One kind of dropout: the function of torch's face, the same in NumPy with its mask, the module.

    ``torch`` and ``numpy`` are called with data and p, ``module`` with p. A decision is drawn for each of ``cells``.
    """

    shape: tuple[int, ...]
    cells: tuple[int, ...]
    torch: Callable[..., Tensor]
    numpy: Callable[..., tuple[Any, Any]]
    module: Callable[..., torch.nn.Module] | None = None
    scaling: str = "inverted"
    stores: tuple[str, ...] = ("bits", "seed")
    in_place: bool = True

    @property
    def p(self) -> tuple[float, ...]:
        """One that drops a part and, where there is such a thing, the one that drops all."""
        return (0.3,) if self.scaling == "gaussian" else (0.3, 1.0)

    @property
    def in_places(self) -> list[dict[str, bool]]:
        """Options: out of place and, where it can be, in place."""
        return [{}, {"inplace": True}] if self.in_place else [{}]

    @property
    def probability(self) -> str:
        """What an error calls p: torch's word, or torchvision's."""
        return (
            "drop probability" if self.scaling == "blocks" or "mode" in arguments(self.torch) else "dropout probability"
        )

    def affine(self, p: float) -> tuple[float, float, float]:
        return {"inverted": (1 / (1 - p), 0.0, 0.0), "standard": (1.0, 0.0, 0.0), "alpha": alpha(p)}[self.scaling]

    def stored_as(self, store: str) -> Kind:
        """This kind, keeping one of its stores for backward."""
        if len(self.stores) == 1:
            return self
        module = None if self.module is None else partial(self.module, store=store)
        return replace(self, torch=partial(self.torch, store=store), module=module, stores=(store,))


def arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Those bound by `functools.partial`."""
    return function.keywords if isinstance(function, partial) else {}


def _with(functions, **options):
    """The torch function, the NumPy one and the module, with options bound."""
    return tuple(partial(function, **options) for function in functions)


def _coupled(x, p, block_size, couple_channels, **options):
    """NumPy's face for one mask of all channels."""
    assert couple_channels
    _, mask = fd.drop_block(x[:, :1], p, block_size, **options)
    return fd.apply_mask(x, mask), mask


_DROPOUT = fdt.dropout, fd.dropout, fdt.Dropout
_VARIATIONAL = fdt.variational_dropout, fd.variational_dropout, fdt.VariationalDropout
_BLOCKS2D = fdt.drop_block2d, fd.drop_block, fdt.DropBlock2d
_COUPLED = fdt.drop_block2d, _coupled, fdt.DropBlock2d
_BLOCKS3D = fdt.drop_block3d, fd.drop_block, fdt.DropBlock3d
_DEPTH = fdt.stochastic_depth, fd.stochastic_depth, fdt.StochasticDepth
_ALPHA = partial(fdt.alpha_dropout, training=True), fd.alpha_dropout, fdt.AlphaDropout
_FEATURES = partial(fdt.feature_alpha_dropout, training=True), fd.feature_alpha_dropout, fdt.FeatureAlphaDropout
_unbatched = partial(fd.feature_dropout, channel_axis=0)
_IMAGES, _BITS = (3, 2, 7, 8), ("bits",)

KINDS = {
    "dropout standard": Kind((7, 33), (7, 33), *_with(_DROPOUT, scaling="standard"), "standard"),
    "dropout1d": Kind((4, 15, 6), (4, 15, 1), fdt.dropout1d, fd.feature_dropout, fdt.Dropout1d),
    "dropout1d unbatched": Kind((60, 6), (60, 1), fdt.dropout1d, _unbatched, fdt.Dropout1d),
    "dropout2d": Kind((4, 15, 3, 2), (4, 15, 1, 1), fdt.dropout2d, fd.feature_dropout, fdt.Dropout2d),
    "dropout3d": Kind((4, 15, 3, 2, 2), (4, 15, 1, 1, 1), fdt.dropout3d, fd.feature_dropout, fdt.Dropout3d),
    "dropout3d unbatched": Kind((60, 3, 2, 2), (60, 1, 1, 1), fdt.dropout3d, _unbatched, fdt.Dropout3d),
    "alpha_dropout": Kind((7, 33), (7, 33), *_ALPHA, "alpha"),
    "feature_alpha_dropout": Kind((4, 15, 3, 2), (4, 15, 1, 1), *_FEATURES, "alpha"),
    "variational_dropout": Kind((9, 5, 13), (1, 5, 13), *_with(_VARIATIONAL, time_axis=0)),
    "variational_dropout batch first": Kind((5, 9, 13), (5, 1, 13), *_with(_VARIATIONAL, time_axis=-2)),
    "drop_connect": Kind((7, 33), (7, 33), fdt.drop_connect, fd.drop_connect, in_place=False),
    "drop_block2d": Kind(_IMAGES, _IMAGES, *_with(_BLOCKS2D, block_size=3), "blocks", _BITS),
    "drop_block2d uneven": Kind(_IMAGES, _IMAGES, *_with(_BLOCKS2D, block_size=(2, 9)), "blocks", _BITS),
    "drop_block2d coupled": Kind(
        _IMAGES, (3, 1, 7, 8), *_with(_COUPLED, block_size=3, couple_channels=True), "blocks", _BITS
    ),
    "drop_block3d": Kind((2, 2, 4, 5, 6), (2, 2, 4, 5, 6), *_with(_BLOCKS3D, block_size=2), "blocks", _BITS),
    "stochastic_depth row": Kind((60, 3, 2), (60, 1, 1), *_with(_DEPTH, mode="row")),
    "stochastic_depth batch": Kind((6, 3, 2), (1, 1, 1), *_with(_DEPTH, mode="batch")),
    "gaussian_dropout": Kind(
        (7, 33), (7, 33), fdt.gaussian_dropout, fd.gaussian_dropout, fdt.GaussianDropout, "gaussian", ("seed",)
    ),
}

# Plain dropout as rows of the same table; its own tests are elsewhere in most folders.
PLAIN = {
    "dropout": Kind((7, 33), (7, 33), *_DROPOUT),
    "dropout shared": Kind(
        (7, 5, 6), (1, 5, 1), partial(fdt.dropout, noise_shape=(1, None, 1)), partial(fd.dropout, noise_shape=(1, 5, 1))
    ),
}


def by_store(kinds: dict[str, Kind]) -> dict[str, Kind]:
    """The same once for each of its stores."""
    return {
        name if len(kind.stores) == 1 else f"{name}, {store}": kind.stored_as(store)
        for name, kind in kinds.items()
        for store in kind.stores
    }


WAYS = by_store(KINDS)
ALL_WAYS = by_store(PLAIN | KINDS)
# Kinds differ in how they find their cells, which NumPy's values test for `ALL_WAYS`. What comes after is the same for
# many: one way stands for each that differs from all others once the cells are known.
DISTINCT = {
    name: ALL_WAYS[name]
    for name in (
        "dropout, bits",
        "dropout, seed",
        "dropout shared, bits",
        "dropout standard, bits",
        "dropout2d, seed",
        "alpha_dropout, bits",
        "feature_alpha_dropout, seed",
        "variational_dropout batch first, bits",
        "drop_connect, bits",
        "drop_block2d",
        "drop_block2d coupled",
        "stochastic_depth batch, bits",
        "gaussian_dropout",
    )
}
