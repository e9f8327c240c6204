"""Dropout of parameters: `DropConnect` drops elements of weights, `EmbeddingDropout` rows of an embedding table.

Autograd does not store a dropped weight. A node of the graph stores a `_Recipe` instead, the weight and its mask, from
which backward computes the dropped weight again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F

from ...core import checks
from ..functional import onnx, sharded
from ..functional.dropout import dropout
from ..functional.plan import NO_SOURCE, seed_for_ops
from ..functional.routing import drop
from ..ops import mask as mask_ops
from ..runtime.dispatch import hide_from_dynamo, is_transformed
from ..runtime.dispatch.modules import (
    can_have_twins,
    flat_weights_of,
    make_twin,
    outer_saved_tensor_hooks,
    run_on_flat_weights,
)
from ..runtime.dispatch.tensors import storage_id, version_of
from ..runtime.located import Weights
from .base import Seeded, SourceOptions, is_traced, trace_call

__all__ = ["DropConnect", "EmbeddingDropout"]


class EmbeddingDropout(Seeded):
    """A `torch.nn.Embedding` that drops whole rows: in each call a word is either kept or dropped everywhere.

    In training ``y = embedding(input)`` is 0 for dropped words, each with probability p, and multiplied by
    ``1 / (1 - p)`` for the others. Gradients are treated the same, so that of a dropped row is exactly 0. The result is
    that of a table dropped with ``noise_shape=(None, 1)``, but that table is never computed. In evaluation it is
    ``embedding(input)``.

    Parameters
    ----------
    embedding : torch.nn.Embedding
        It becomes the submodule ``embedding``. Its ``padding_idx``, ``max_norm``, ``scale_grad_by_freq`` and ``sparse``
        keep their meaning.
    p : float
        Drop probability, 0 to 1.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    TypeError
        For an embedding of another type.
    ValueError
        For p out of range.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    A layout is that of the words in the table, ``(num_embeddings,)``.

    The input has shape ``(*)`` and integers, the output ``(*, embedding_dim)``. Stored for backward: 1/8 byte per word
    of the input. Sources: Gal, Ghahramani 2016, section 4.2; Merity, Keskar, Socher 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> words = fdt.EmbeddingDropout(torch.nn.Embedding.from_pretrained(torch.ones(5, 2)), 0.5)
    >>> _ = torch.manual_seed(0)
    >>> words(torch.tensor([0, 1, 2, 1, 0]))[:, 0]
    tensor([2., 0., 2., 0., 2.])
    """

    def __init__(self, embedding: nn.Embedding, p: float = 0.5, **source: Unpack[SourceOptions]) -> None:
        super().__init__()
        self.draw_from(**source)
        self.p = checks.dropout_probability(p)
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, but got {type(embedding).__name__}")
        self.embedding = embedding

    def drop_input(self, input: Tensor, **source: Any) -> Tensor:
        y: Tensor = self.embedding(input)
        p = self.rate
        if not self.training or (not isinstance(p, Tensor) and p == 0.0):
            return y
        if onnx.is_exported():
            onnx.refuse("words that are dropped")
        if sharded.is_dtensor(y):
            return self._drop_shard(y, input, p, source)
        rows = dropout(y.new_ones(self.embedding.num_embeddings), p, **{**source, "part": Weights(source.get("part"))})
        return _dropped_words(y, input, rows, p)

    def _drop_shard(self, y: Any, input: Tensor, p: Any, source: dict[str, Any]) -> Tensor:
        """Each process draws the whole mask of the words, which is small, and drops those of its shard."""
        y = sharded.data_of({"y": y, **source}, "y")
        local = sharded.local_tensor(y)
        words = sharded.operand("input", input.unsqueeze(-1), y, tuple(y.shape)).squeeze(-1)
        ones = local.new_ones(self.embedding.num_embeddings)
        rows = dropout(ones, p, **{**source, "part": Weights(sharded.whole_layout(y, tuple(ones.shape)))})
        dropped: Tensor = sharded.to_dtensor(_dropped_words(local, words, rows, p), y, local)
        return dropped

    def evaluate_input(self, input: Tensor) -> Tensor:
        y: Tensor = self.embedding(input)
        return y

    def extra_repr(self) -> str:
        return f"p={self.p}{self.source_repr()}"


def _dropped_words(y: Tensor, words: Tensor, rows: Tensor, p: Any) -> Tensor:
    return mask_ops.masked(y, _pack_bits(rows[words] != 0.0), p, [*words.shape, 1], True)


def _pack_bits(keep: Tensor) -> Tensor:
    """Booleans as bits in words of 32 bits."""
    bits = F.pad(keep.reshape(-1), (0, -keep.numel() % 32)).view(-1, 32).int()
    return (bits << torch.arange(32, dtype=torch.int32, device=keep.device)).sum(1, dtype=torch.int32)


class DropConnect(Seeded):
    """Drops elements of a module's weights, with a new mask in each call; AWD-LSTM's weight drop.

    In training the module runs with ``weight * mask / (1 - p)`` in place of each weight in ``names``. In evaluation it
    runs as it is. All steps of a recurrent layer in one call have the same dropped weights.

    Parameters
    ----------
    module : Module
        Linear, convolutional, recurrent or any other. It becomes the submodule ``module``, so optimizers and
        ``state_dict`` have its parameters.
    names : str or sequence of str, optional
        The parameters to drop. The default is ``"weight"``, and all ``"weight_hh_*"`` for a recurrent layer. A
        parameter with several names has one mask under all of them.
    p : float
        Drop probability, 0 to 1.
    seed : int, optional
        Starts a stream of the module's own, from which each call in training takes its mask.
    generator : torch.Generator, optional
        Each call in training draws from it; by default from torch's own.
    layout : (DeviceMesh, placements), fastdrop.Part or callable, optional
        Of which whole plain inputs are parts.

    Raises
    ------
    ValueError
        For p out of range, for names that are not parameters of the module, and for names inside a recurrent layer that
        is only a part of it.

    See Also
    --------
    Dropout : says more about these parameters.

    Notes
    -----
    A seed's stream has a number for each parameter of each call. A layout is that of the weights, if they are plain
    shards.

    Stored for backward: 1/8 byte per element of the weights in ``names``. Backward computes a dropped weight again from
    the weight and its mask, and raises RuntimeError if the weight was changed in place, as it does without DropConnect.
    There are exceptions: transforms of `torch.func` allow no hooks on saved tensors, so they store the dropped weight;
    a weight that is a DTensor is stored as dropped too; the compiler decides what compiled code stores; copies in low
    precision that autocast makes, and the buffer for a recurrent layer's weights in cuDNN, are stored as they are
    without DropConnect.

    Sources: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013, here with one mask for the
    batch; Merity, Keskar, Socher 2017.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> layer = fdt.DropConnect(torch.nn.Linear(1000, 1, bias=False), p=0.25)
    >>> _ = torch.nn.init.ones_(layer.module.weight)
    >>> layer(torch.eye(1000)).unique()
    tensor([0.0000, 1.3333], grad_fn=<Unique2Backward0>)
    >>> fdt.DropConnect(torch.nn.GRU(4, 8, num_layers=2)).names
    ('weight_hh_l0', 'weight_hh_l1')
    """

    names: tuple[str, ...]

    def __init__(
        self,
        module: nn.Module,
        names: str | Sequence[str] | None = None,
        p: float = 0.5,
        **source: Unpack[SourceOptions],
    ) -> None:
        super().__init__()
        self.draw_from(**source)
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
        raise RuntimeError("DropConnect can't be scripted: for evaluation script its submodule `module` instead")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args and is_traced(self, args[0]):
            return trace_call(self, *args, **kwargs)
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
        """Recurrent layers read their weights from a list, which `functional_call` doesn't replace."""
        dropped, hooks = self._dropped_weights()
        instead = {id(weight): value for _, weight, value in dropped}
        flat = [instead.get(id(weight), weight) for weight in flat_weights]
        with hooks:
            return run_on_flat_weights(self.module, flat, *args, **kwargs)

    def _dropped_weights(self) -> tuple[list[tuple[str, Tensor, Tensor]], contextlib.AbstractContextManager[Any]]:
        """Names, weights and their dropped values for one call, and the context to make the call in."""
        p = self.rate
        hooked = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()
        dropped: list[tuple[str, Tensor, Tensor]] = []
        recipes: dict[int, _Recipe] = {}
        for name in self.names:
            path, _, own = name.rpartition(".")
            weight = getattr(self.module.get_submodule(path), own)
            if any(weight is other for _, other, _ in dropped):
                continue
            if onnx.is_exported():
                dropped.append((name, weight, onnx.drop(weight, p, NO_SOURCE)))
                continue
            options = self.source_options()
            source = options.get("generator"), options.get("seed"), Weights(options.get("part"))
            if sharded.is_dtensor(weight):  # torch's ops keep what they need of its shards
                dropped.append((name, weight, drop(weight, p, True, False, source, None, "bits", "inverted")))
                continue
            seed = seed_for_ops(weight, source)
            value, saved_mask = mask_ops.FORWARD(mask_ops.Forward(weight, seed, p, None, True))
            dropped.append((name, weight, value))
            if hooked and not weight.is_inference():
                recipes[storage_id(value)] = _Recipe(value, weight, saved_mask, p)
        return dropped, _save_as(recipes) if recipes else contextlib.nullcontext()

    def extra_repr(self) -> str:
        return f"names={self.names}, p={self.p}{self.source_repr()}"


# Compilers leave recurrent layers alone, and should leave the code that drops their weights alone too.
hide_from_dynamo(DropConnect._run_recurrent)


# A twin of the module runs with the dropped weights, because another thread may run the module itself meanwhile.


def _can_have_twin(module: nn.Module) -> bool:
    """Whether a twin would work: not for scripted modules, nor if a forward on the object may refer to that object."""
    return can_have_twins and not any(
        isinstance(m, torch.jit.ScriptModule) or "forward" in vars(m) for m in module.modules()
    )


def _twin(module: nn.Module, values: dict[int, Tensor], twins: dict[int, nn.Module]) -> Any:
    """A module with the attributes and buffers of another, and with ``values``, by id, in place of its parameters."""
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
    """Runs a twin, and copies attributes that its forward sets to the module."""
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


class _SavedTensor:
    """A tensor that a node of the graph stores. torch leaves it to hooks to check that it was not changed in place."""

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
    """Stands for a dropped weight of which nodes store views. Backward computes it from the weight and its mask."""

    def __init__(self, value: Tensor, weight: Tensor, saved_mask: Tensor, p: float | Tensor) -> None:
        self.weight, self.saved_mask, self.p = _SavedTensor(weight), saved_mask, p
        self.version, self.dtype = version_of(value), value.dtype
        self.views = self.used = 0
        self.value: Tensor | None = None

    def makes(self, view: Tensor) -> bool:
        """Whether a view can be computed again: not if it was written to, or if its dtype or conjugation differs."""
        return (
            version_of(view) == self.version and view.dtype == self.dtype and not view.is_conj() and not view.is_neg()
        )

    def view(self, shape: Any, stride: Any, offset: Any) -> Tensor:
        weight, value = self.weight(), self.value
        if value is None:
            value = self.value = mask_ops.masked(weight, self.saved_mask, self.p, None, True)
        self.used = (self.used + 1) % self.views
        if not self.used:  # a recurrent layer has a view for each step: computed for the first, freed after the last
            self.value = None
        return value.as_strided(shape, stride, offset)


def _save_as(recipes: dict[int, _Recipe]) -> saved_tensors_hooks:
    """Hooks by which nodes store dropped weights, known by their storage, as recipes, and other tensors as before."""
    outside = outer_saved_tensor_hooks(False)  # torch asks the innermost hooks alone

    def pack(x: Tensor) -> Callable[[], Tensor]:
        recipe = recipes.get(storage_id(x))
        if recipe is not None and recipe.makes(x):
            recipe.views += 1
            return partial(recipe.view, x.shape, x.stride(), x.storage_offset())
        return _SavedTensor(x) if outside is None else partial(outside[1], outside[0](x))

    return saved_tensors_hooks(pack, lambda saved: saved())
