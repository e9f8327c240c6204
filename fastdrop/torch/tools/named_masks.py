"""`name_masks`: masks by name, step and sample, the same in one process and in any number of them."""

from __future__ import annotations

import contextlib
import fnmatch
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...core import checks
from ..nn.base import Rated
from ..nn.recurrent import VariationalGRU, VariationalLSTM
from ..runtime import names as runtime
from ..runtime import traced_names
from ..runtime.dispatch.compilers import is_dynamo_imported
from ..runtime.dispatch.modules import WRAPPED, TorchDropout
from ..runtime.layouts import as_layout
from ..runtime.names import Draw, NamedModule, Names

__all__ = ["NamedMasks", "name_masks"]

# What other wrappers call the module that they wrap. DropConnect has one too, so it counts at the beginning only.
OUTER_WRAPPER = "module"
VARIATIONAL = (VariationalLSTM, VariationalGRU)
TORCHS = (TorchDropout, nn.RNNBase, nn.MultiheadAttention)  # torch's own modules that drop
# Files of torch whose modules drop nothing, and call nothing.
PLAIN = tuple(
    f"torch.nn.modules.{name}" for name in ("batchnorm", "conv", "linear", "normalization", "pooling", "sparse")
)


def name_masks(
    model: nn.Module,
    seed: int = 0,
    *,
    layouts: Mapping[str, Any] | None = None,
    sample_axis: int | Mapping[str, int] = 0,
    names: Mapping[str, str] | None = None,
) -> NamedMasks:
    """Makes the masks of a model's dropouts functions of a seed, their names, the step and the samples.

    A dropout's name is that of the module which calls it, as in ``model.named_modules()`` but without what wrappers add
    (``module.``, ``_orig_mod.`` and FSDP's). So a sample's masks are the same whichever process has it, beside which
    other samples, in however many micro-batches, in whichever stage of a pipeline, and after a restart on another
    number of processes. This holds for all dropouts that come to fastdrop: its functions and modules in the model, and
    torch's own under `enable`.

    Parameters
    ----------
    model : Module
        Its modules get hooks. Copies and pickles of the model have no names.
    seed : int from 0 to 2**64 - 1
        Another seed gives other masks everywhere.
    layouts : dict of str to layout, optional
        How plain tensors are sharded inside of modules, as in plans of tensor parallelism. A pattern (`fnmatch`) of
        names stands for all dropouts in the modules of these names; of several patterns the one of the innermost
        module counts. A layout is ``(mesh, placements)``, as in ``(mesh["tp"], [Shard(1)])`` for data of each dropout
        that is sharded along axis 1 (the heads, if attention drops its weights), or a function that takes the shape of
        the data and returns that or the `Part` of the whole that it is. DTensors need none.
    sample_axis : int, or dict of str to int
        The axis of the data along which samples lie: of all modules, or by patterns of names. Recurrent layers of
        torch and of fastdrop, attention, and functions that say in their description where samples are need none.
    names : dict of str to str, optional
        Names in the whole model of modules in this one, which is a stage of it: ``{"0": "layers.4"}`` for the fifth of
        the model's ``layers`` that is the first module of this stage. They stand for the modules inside too.

    Returns
    -------
    NamedMasks
        `NamedMasks.at` opens a block for a pass. Outside of such blocks the model can't drop.

    Raises
    ------
    TypeError, ValueError
        For arguments that are not as above, and for patterns and names that no module has.

    Notes
    -----
    * Along axis 0 or ``sample_axis`` the data must have as many entries as ``at`` is given samples, or a multiple, such
      as tokens or heads: then the entries of a sample must be neighbours.
    * A mask that samples share (stochastic depth by batch, a noise_shape with 1 there, `LayerDrop`, weights) is the
      same for all samples of a step.
    * DropBlock scales by the share that is kept of the samples of a call. A fixed number of kept samples is chosen
      among those of a call. Both depend on the batch.
    * On a GPU torch's own attention and cuDNN's recurrent layers drop inside of kernels that know no names.
      `fastdrop.torch.scaled_dot_product_attention` does.
    * A call that is given ``seed`` or ``generator`` draws from these. Modules with a seed or a generator of their own
      draw by name. `mc_predict` draws from its own seeds. `vmap` gives the same mask to all that it maps.
    * Checkpoints of both kinds draw again what they drew in forward, with any ``preserve_rng_state``, and also after
      the block.
    * `torch.compile` makes one graph for all steps and samples, with eager code's masks. A module that is compiled by
      itself has a graph of its own, so a model of many such layers needs a higher ``recompile_limit`` of Dynamo.
    * A module that `fuse` has changed has one name for all dropouts in it. Give all processes a model that is fused, or
      none.

    Kept for backward: as without names, and about 100 bytes for each dropout in a checkpoint.

    Examples
    --------
    >>> import torch, fastdrop.torch as fdt
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 64), fdt.Dropout(0.5))
    >>> masks, x = fdt.name_masks(model, seed=1), torch.randn(8, 4)
    >>> with masks.at(step=0):  # a batch of samples 0 to 7
    ...     whole = model(x)
    >>> with masks.at(step=0, samples=[5, 2]):
    ...     print(torch.equal(model(x[[5, 2]]) == 0, whole[[5, 2]] == 0))
    True
    >>> masks.state_dict()
    {'seed': 1, 'step': 0}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    own = Names(checks.uint64("seed", seed))
    renamed = _Renamed({} if names is None else names)
    modules = [(_unwrapped(name), module) for name, module in model.named_modules()]
    called = [(renamed(name), module) for name, module in modules]
    renamed.check()
    by_name = _by_pattern("layouts", {} if layouts is None else layouts, [name for name, _ in called])
    for pattern, layout in (layouts or {}).items():
        if as_layout(layout) is None:
            checks.function(f"layouts[{pattern!r}]", layout)
    by_name = {name: as_layout(layout) or layout for name, layout in by_name.items()}
    if isinstance(sample_axis, Mapping):
        for axis in sample_axis.values():
            checks.number_from("sample_axis", checks.integer("sample_axis", axis), 0)
        axes = _by_pattern("sample_axis", sample_axis, [name for name, _ in called])
    else:
        axes = dict.fromkeys((name for name, _ in called), checks.integer("sample_axis", sample_axis))
        checks.number_from("sample_axis", sample_axis, 0)
    fixed = _fixed_axes(model)
    masks = NamedMasks(own)
    for name, module in called:
        if isinstance(module, torch.jit.ScriptModule) or _is_plain(module):
            continue
        axis = fixed.get(module, axes.get(name, 0))
        named = NamedModule(own, name, axis, by_name.get(name), _is_torchs(module))
        masks.add(module, named)
    if is_dynamo_imported():
        torch.compiler.reset()  # what was compiled before has no names
    return masks


class NamedMasks:
    """What `name_masks` returns: the masks of one model.

    ``with name_masks(model) as masks:`` takes the names away at the end, as `remove` does.

    Attributes
    ----------
    seed : int
    step : int
        That of the last block.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._handles: list[Any] = []
        self.step = 0
        runtime.note_users(1)
        self._end = weakref.finalize(names, runtime.note_users, -1)
        self._end.atexit = False

    @property
    def seed(self) -> int:
        """The seed of all masks."""
        return self._names.seed

    def add(self, module: nn.Module, named: NamedModule) -> None:
        """Gives a module of the model a name; `name_masks` does it for all.

        Parameters
        ----------
        module : Module
        named : NamedModule
            Its name and layout.
        """
        traced_names.register(named.key, named, module)
        runtime.note_axis(named.axis)
        self._handles.append(module.register_forward_pre_hook(named.enter))
        self._handles.append(module.register_forward_hook(named.leave, prepend=True, always_call=True))

    @contextlib.contextmanager
    def at(self, step: int, samples: Sequence[int] | torch.Tensor | None = None) -> Iterator[None]:
        """A block for one pass: the forward of a batch or a micro-batch in this thread. Backward may be in it.

        Parameters
        ----------
        step : int from 0 to 2**64 - 1
            Another step has other masks.
        samples : sequence of int or Tensor of int, optional
            The numbers, among all samples of the step, of those in the batch, in their order. None: 0, 1, 2, ..., the
            batch is all there is.

        Returns
        -------
        context manager

        Raises
        ------
        TypeError, ValueError
            For arguments that are not as above, and for a sample that is given twice.
        RuntimeError
            After `remove`.

        Notes
        -----
        Calls of a module are counted anew in each block: a second call in a block has other masks than the first, and
        micro-batches that have a block each have the masks of one batch. Blocks may be nested; the inner one counts.
        """
        if not self._end.alive:
            raise RuntimeError("these masks were removed: call name_masks again, or leave out at()")
        self.step = checks.uint64("step", step)
        scope = self._names.open(self.step, _numbers(samples))
        try:
            yield
        finally:
            self._names.close(scope)

    def state_dict(self) -> dict[str, int]:
        """The seed and the step, two ints. They say nothing of processes.

        Returns
        -------
        dict of str to int
        """
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes the seed and the step of a `state_dict`.

        Parameters
        ----------
        state : dict of str to int

        Raises
        ------
        TypeError, ValueError
            For anything else than such a dict.
        """
        if not isinstance(state, Mapping) or set(state) != {"seed", "step"}:
            raise ValueError(f"state must be a dict of seed and step, but got {state!r}")
        seed, step = (checks.uint64(name, state[name]) for name in ("seed", "step"))
        self._names.seed, self.step = seed, step

    def remove(self) -> None:
        """Takes the names away: the model draws from torch's generator again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        traced_names.forget(self._names.number)
        self._end()
        if is_dynamo_imported():
            torch.compiler.reset()

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Draw]]:
        """A block, for `check_masks`, that lists what each dropout draws from.

        Returns
        -------
        context manager of a list
        """
        draws: list[Draw] = []
        before, self._names.watch = self._names.watch, draws.append
        try:
            yield draws
        finally:
            self._names.watch = before

    def __enter__(self) -> NamedMasks:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"NamedMasks(seed={self.seed}, step={self.step})"


def _numbers(samples: Any) -> Sequence[int] | None:
    """Samples as a range, if they are evenly spaced, or as a tuple: equal ones of the same samples."""
    if samples is None:
        return None
    if isinstance(samples, torch.Tensor):
        if samples.dim() != 1 or samples.is_floating_point() or samples.dtype is torch.bool:
            raise TypeError(f"samples must be ints along one axis, but got {samples.dtype} {tuple(samples.shape)}")
        samples = samples.tolist()
    if not hasattr(samples, "__getitem__"):  # such as a set, which has no order
        raise TypeError(f"samples must be a sequence of ints, but got {type(samples).__name__}")
    if not isinstance(samples, range):
        samples = tuple(checks.integer("samples", number) for number in samples)
    least = min(samples, default=0)
    if least < 0:
        raise ValueError(f"samples must be numbers from 0 on, but got {least}")
    if isinstance(samples, tuple) and len(set(samples)) < len(samples):
        twice = next(number for i, number in enumerate(samples) if number in samples[:i])
        raise ValueError(f"samples must be given once each, but got {twice} twice")
    apart = samples[1] - samples[0] if len(samples) > 1 else 1
    if apart > 0 and len(samples) and samples[-1] - samples[0] == apart * (len(samples) - 1):
        even = range(samples[0], samples[-1] + 1, apart)
        if all(map(operator.eq, samples, even)):
            return even
    return tuple(samples)


# ---- names ----


def _unwrapped(name: str) -> str:
    """A name without what wrappers add."""
    path = [part for part in name.split(".") if part not in WRAPPED]
    while path and path[0] == OUTER_WRAPPER:
        del path[0]
    return ".".join(path)


class _Renamed:
    """Names in the whole model of modules in a stage of it."""

    def __init__(self, names: Any) -> None:
        if not isinstance(names, Mapping) or not all(isinstance(name, str) for pair in names.items() for name in pair):
            raise TypeError(f"names must be a dict of str to str, but got {names!r}")
        self.names, self.unused = names, set(names)

    def __call__(self, name: str) -> str:
        path = name.split(".") if name else []
        for end in range(len(path), -1, -1):
            own = ".".join(path[:end])
            if own in self.names:
                self.unused.discard(own)
                return ".".join(filter(None, (self.names[own], *path[end:])))
        return name

    def check(self) -> None:
        if self.unused:
            raise ValueError(f"names must be of the model's modules, but got {min(self.unused)!r}")


def _by_pattern(what: str, patterns: Any, names: Sequence[str]) -> dict[str, Any]:
    """The value of each name: that of the pattern for the innermost module around it, the longest one if several."""
    if not isinstance(patterns, Mapping) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{what} must be a dict of str, but got {patterns!r}")
    found: dict[str, Any] = {}
    used = set()
    for name in names:  # outer modules come before those in them
        own = [pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)]
        used.update(own)
        if own:
            found[name] = patterns[max(own, key=len)]
        elif name and (outer := name.rpartition(".")[0]) in found:
            found[name] = found[outer]
    if unused := [pattern for pattern in patterns if pattern not in used]:
        raise ValueError(f"{what} must be for modules of the model, but it has none of the name {unused[0]!r}")
    return found


def _fixed_axes(model: nn.Module) -> dict[nn.Module, int]:
    """The axis of samples where the module's class decides it."""
    axes: dict[nn.Module, int] = {}
    for module in model.modules():
        if isinstance(module, VARIATIONAL):
            axes.update(dict.fromkeys(module.children(), 1))
        elif isinstance(module, nn.RNNBase):
            axes[module] = 1
        elif isinstance(module, nn.MultiheadAttention):
            axes[module] = 0
    return axes


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module drops by torch's functions."""
    return isinstance(module, TORCHS) and not isinstance(module, Rated)


def _is_plain(module: nn.Module) -> bool:
    return type(module).__module__ in PLAIN and not any(module.children())
