"""Dropout of parameters: connections, and whole rows of embedding tables.

This module owns how a dropped weight stays out of what autograd keeps: nodes keep a recipe, the weight and its bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F

from ...core import checks
from ..functional.dropout import dropout
from ..functional.routing import for_onnx, is_exported_to_onnx, refuse_onnx
from ..ops import mask as mask_ops
from ..runtime import tracing
from ..runtime.dispatch import hide_from_dynamo, is_transformed
from ..runtime.dispatch.modules import (
    can_have_twins,
    flat_weights_of,
    make_twin,
    outer_saved_tensor_hooks,
    run_on_flat_weights,
)
from ..runtime.dispatch.tensors import storage_id, version_of
from .dropout import Rated, is_traced, traced

__all__ = ["DropConnect", "EmbeddingDropout"]


class EmbeddingDropout(Rated):
    """A `torch.nn.Embedding` whose rows are dropped whole: in each call a word is there everywhere, or nowhere.

    In training ``y = embedding(input)`` is 0 for the words dropped, each with probability p, and multiplied by
    ``1 / (1 - p)`` for the others; their gradient likewise, so that a dropped row's is exactly 0. One cell per row of
    the table: the same as ``embedding`` of a table dropped with ``noise_shape=(None, 1)``, which is never made. In
    evaluation it is ``embedding(input)``.

    Parameters
    ----------
    embedding : torch.nn.Embedding
        Kept as the submodule ``embedding``; its ``padding_idx``, ``max_norm``, ``scale_grad_by_freq`` and ``sparse``
        mean what they do there.
    p : float
        Drop probability, 0 to 1.

    Raises TypeError for an embedding of another type, ValueError for p out of range.

    Shape: ``(*)`` of ints to ``(*, embedding_dim)``. Kept for backward: 1/8 byte per word of the input. Sources: Gal,
    Ghahramani 2016, section 4.2; Merity, Keskar, Socher 2017.

    >>> import torch, fastdrop.torch as fdt
    >>> words = fdt.EmbeddingDropout(torch.nn.Embedding.from_pretrained(torch.ones(5, 2)), 0.5)
    >>> _ = torch.manual_seed(0)
    >>> words(torch.tensor([0, 1, 2, 1, 0]))[:, 0]
    tensor([2., 0., 2., 0., 2.])
    """

    def __init__(self, embedding: nn.Embedding, p: float = 0.5) -> None:
        super().__init__()
        self.p = checks.dropout_probability(p)
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, but got {type(embedding).__name__}")
        self.embedding = embedding

    def _drop(self, input: Tensor) -> Tensor:
        y: Tensor = self.embedding(input)
        p = self.rate
        if not self.training or (not isinstance(p, Tensor) and p == 0.0):
            return y
        if is_exported_to_onnx():
            refuse_onnx("words that are dropped")
        rows = dropout(y.new_ones(self.embedding.num_embeddings), p)
        return mask_ops.masked(y, _packed(rows[input] != 0.0), p, [*input.shape, 1], True)

    def _evaluated(self, input: Tensor) -> Tensor:
        y: Tensor = self.embedding(input)
        return y

    def extra_repr(self) -> str:
        return f"p={self.p}"


def _packed(keep: Tensor) -> Tensor:
    """Booleans as words of 32 bits."""
    bits = F.pad(keep.reshape(-1), (0, -keep.numel() % 32)).view(-1, 32).int()
    return (bits << torch.arange(32, dtype=torch.int32, device=keep.device)).sum(1, dtype=torch.int32)


class DropConnect(Rated):
    """A module whose weights are dropped, element by element, anew in each call; AWD-LSTM's weight drop.

    In training the module runs with ``weight * mask / (1 - p)`` in the place of each weight named, in evaluation as it
    is. All steps of a recurrent layer in one call have the same dropped weights.

    Parameters
    ----------
    module : Module
        Linear, convolutional, recurrent or any other; kept as the submodule ``module``, which optimizers and
        ``state_dict`` know as ever.
    names : str or sequence of str, optional
        Its parameters to be dropped, ``"weight"`` or, of a recurrent layer, all ``"weight_hh_*"`` if not given. A
        parameter with several names is dropped once, under all of them.
    p : float
        Drop probability, 0 to 1.

    Raises ValueError for p out of range, and for names that are no parameters of module, or of a recurrent layer that
    is only a part of it.

    Kept for backward: 1/8 byte per element of the weights named. What the module's own nodes would keep of a dropped
    weight is made again from the weight and its bits when backward comes by, and changing the weight in place then
    raises RuntimeError, as ever. Transforms of `torch.func` allow no hooks on what is kept and keep the dropped weight;
    what compiled code keeps its compiler decides. Copies in low precision that autocast makes, and the buffer that
    cuDNN puts a recurrent layer's weights into, are kept as they are without DropConnect.

    Sources: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013, here with one mask for the
    batch; Merity, Keskar, Socher 2017.

    >>> import torch, fastdrop.torch as fdt
    >>> layer = fdt.DropConnect(torch.nn.Linear(1000, 1, bias=False), p=0.25)
    >>> _ = torch.nn.init.ones_(layer.module.weight)
    >>> layer(torch.eye(1000)).unique()
    tensor([0.0000, 1.3333], grad_fn=<Unique2Backward0>)
    >>> fdt.DropConnect(torch.nn.GRU(4, 8, num_layers=2)).names
    ('weight_hh_l0', 'weight_hh_l1')
    """

    names: tuple[str, ...]

    def __init__(self, module: nn.Module, names: str | Sequence[str] | None = None, p: float = 0.5) -> None:
        super().__init__()
        self.p = checks.dropout_probability(p)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        if names is None:
            recurrent = [name for name in parameters if name.startswith("weight_hh_")]
            names = recurrent if isinstance(module, nn.RNNBase) else "weight"
        self.names = (names,) if isinstance(names, str) else tuple(names)
        for name in self.names:
            if name not in parameters:
                raise ValueError(f"names must be of module's parameters, {', '.join(parameters)}, but got {name!r}")
            path = name.rpartition(".")[0]
            if path and isinstance(module.get_submodule(path), nn.RNNBase):
                raise ValueError(
                    f"names must not be inside of a recurrent layer, but got {name!r}: wrap {path!r} itself"
                )
        self.module = module

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError("DropConnect can't be scripted: for evaluation put its submodule `module` in its place")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and is_traced(self, args[0]):
            return traced(self, *args, **kwargs)
        p = self.rate
        if not self.training or (not isinstance(p, Tensor) and p == 0.0):
            return self.module(*args, **kwargs)
        if isinstance(self.module, nn.RNNBase) and (flat_weights := flat_weights_of(self.module)) is not None:
            return self._run_recurrent(flat_weights, args, kwargs)
        dropped, hooks = self._dropped_weights()
        values = {name: value for name, _, value in dropped}
        with hooks:
            if torch.compiler.is_compiling() or not _can_have_twin(self.module):
                return functional_call(self.module, values, args, kwargs)
            return _run_twin(self.module, {id(weight): value for _, weight, value in dropped}, args, kwargs)

    def _run_recurrent(self, flat_weights: list[Tensor], args: Any, kwargs: Any) -> Any:
        """The weights that run are in a list beside the parameters, which `functional_call` doesn't know."""
        dropped, hooks = self._dropped_weights()
        instead = {id(weight): value for _, weight, value in dropped}
        flat = [instead.get(id(weight), weight) for weight in flat_weights]
        with hooks:
            return run_on_flat_weights(self.module, flat, *args, **kwargs)

    def _dropped_weights(self) -> tuple[list[tuple[str, Tensor, Tensor]], contextlib.AbstractContextManager[Any]]:
        """Names, weights and their dropped values for one call, and what to make it in."""
        p = self.rate
        hooked = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()
        dropped: list[tuple[str, Tensor, Tensor]] = []
        recipes: dict[int, _Recipe] = {}
        for name in self.names:
            path, _, own = name.rpartition(".")
            weight = getattr(self.module.get_submodule(path), own)
            if any(weight is other for _, other, _ in dropped):
                continue
            if is_exported_to_onnx():
                dropped.append((name, weight, for_onnx(weight, p, None, "inverted", None, None)))
                continue
            seed = tracing.draw(weight)
            value, words = mask_ops.overload(torch.ops.fastdrop.forward, p)(weight, seed, p, None, True)
            dropped.append((name, weight, value))
            if hooked and not weight.is_inference():
                recipes[storage_id(value)] = _Recipe(value, weight, words, p)
        return dropped, _kept_as(recipes) if recipes else contextlib.nullcontext()

    def extra_repr(self) -> str:
        return f"names={self.names}, p={self.p}"


# Compilers leave recurrent layers alone, and should not look for work in what drops their weights.
hide_from_dynamo(DropConnect._run_recurrent)


# What runs with dropped weights is a twin of the module: another thread that runs the module itself must not find them
# there.


def _can_have_twin(module: nn.Module) -> bool:
    """Not what is scripted, nor what has a forward of its own on the object, which may hold the object."""
    return can_have_twins and not any(
        isinstance(m, torch.jit.ScriptModule) or "forward" in vars(m) for m in module.modules()
    )


def _twin(module: nn.Module, values: dict[int, Tensor], twins: dict[int, nn.Module]) -> Any:
    """A module with the attributes and buffers of another, but for values in place of its parameters, by their id."""
    twin = twins.get(id(module))
    if twin is None:
        twin = make_twin(
            module,
            lambda weight: values.get(id(weight), weight),
            lambda child: _twin(child, values, twins),
        )
        twins[id(module)] = twin
    return twin


def _run_twin(module: nn.Module, values: dict[int, Tensor], args: Any, kwargs: Any) -> Any:
    """What the twin's forward leaves in attributes is the module's too."""
    twins: dict[int, nn.Module] = {}
    twin = _twin(module, values, twins)
    before = {own: dict(vars(copied)) for own, copied in twins.items()}
    try:
        return twin(*args, **kwargs)
    finally:
        for original in module.modules():
            copied, had = twins[id(original)], before[id(original)]
            changed = {name: value for name, value in vars(copied).items() if had.get(name, twins) is not value}
            vars(original).update(changed)


class _Kept:
    """A tensor that a node of the graph keeps. Where there are hooks torch leaves watching its version to them."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor.detach(), version_of(tensor)

    def __call__(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {version_of(self.tensor)}; expected "
                f"version {self.version} instead"
            )
        return self.tensor


class _Recipe:
    """A dropped weight, of which nodes keep views, as what it is made of: the weight and its bits."""

    def __init__(self, value: Tensor, weight: Tensor, words: Tensor, p: float | Tensor) -> None:
        self.weight, self.words, self.p = _Kept(weight), words, p
        self.version, self.dtype = version_of(value), value.dtype
        self.views = self.used = 0
        self.value: Tensor | None = None

    def makes(self, view: Tensor) -> bool:
        """Whether it makes a tensor in its value's storage: not if that was written to or is seen as something else."""
        return (
            version_of(view) == self.version and view.dtype == self.dtype and not view.is_conj() and not view.is_neg()
        )

    def view(self, shape: Any, stride: Any, offset: Any) -> Tensor:
        weight, value = self.weight(), self.value
        if value is None:
            value = self.value = mask_ops.masked(weight, self.words, self.p, None, True)
        self.used = (self.used + 1) % self.views
        if not self.used:  # a recurrent layer has a view for each step: made at the first, let go after the last
            self.value = None
        return value.as_strided(shape, stride, offset)


def _kept_as(recipes: dict[int, _Recipe]) -> saved_tensors_hooks:
    """Has nodes made inside keep dropped weights, known by their storage, as recipes, and all else as outside."""
    outside = outer_saved_tensor_hooks(False)  # torch asks the innermost hooks alone

    def pack(x: Tensor) -> Callable[[], Tensor]:
        recipe = recipes.get(storage_id(x))
        if recipe is not None and recipe.makes(x):
            recipe.views += 1
            return partial(recipe.view, x.shape, x.stride(), x.storage_offset())
        return _Kept(x) if outside is None else partial(outside[1], outside[0](x))

    return saved_tensors_hooks(pack, lambda kept: kept())
