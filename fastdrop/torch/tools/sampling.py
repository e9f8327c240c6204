"""Runs a model many times under dropout, several samples to a pass. `monte_carlo` calls `passes`.

The seeds of fastdrop's dropout come from `seeds.SampleSeeds`, and torch's own random operators draw from generators
that belong to the sample. So torch's generators stay as they are, nothing shared is written, and any number of threads
may sample one model.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from ..models.enable import enabled
from ..runtime import seeds
from ..runtime.context import dispatching
from ..runtime.dispatch.compilers import FakeTensor
from ..runtime.dispatch.modes import DispatchMode
from ..runtime.dispatch.modules import buffers_of, is_compiled, uncompiled
from ..runtime.dispatch.ops import argument_names, is_unmarked_random, tree_leaves, tree_map_only, writes_to_arguments

__all__ = ["passes"]

PASS_BYTES = 256 << 20  # of activations, in a pass of several samples
STATISTICS_BYTES = 3 * 8  # for each element of the output: three copies in float64 while moments are added


def passes(
    model: nn.Module,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    samples: int,
    seed: int,
    batch: int | None,
    select: Callable[[Any], Any],
    without_draws: Callable[[], None],
) -> Generator[Tensor, None, None]:
    """The samples of each pass, stacked: of the first pass one, of the others ``batch`` or as many as fit.

    ``select`` takes the Tensor out of what the model returns. ``without_draws`` is called if nothing was drawn.
    """
    sampler, modules = _Sampler(model, arguments, keywords, seed, select), list(model.modules())
    with seeds.draw_from(sampler.seeds), contextlib.ExitStack() as stack:
        y, size = sampler.first()
        if sampler.draws_torchs:
            stack.enter_context(enabled())
            y, size = sampler.first()
        if not isinstance(y, Tensor) or y.is_complex():
            got = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"model must return a Tensor of real numbers, but got {got}: name one by output=")
        if not sampler.draws_torchs and not sampler.seeds.calls:
            without_draws()
        if sampler.draws_torchs or any(isinstance(module, nn.RNNBase) and module.training for module in modules):
            batch = 1  # because other random numbers may be drawn once for all samples of a pass
        elif batch is None and size is None:
            batch = 1
        elif batch is None:
            batch = max(PASS_BYTES // ((size or 0) + STATISTICS_BYTES * y.numel() + 1), 1)
        yield y[None]
        del y
        done = 1
        while done < samples:
            # The last sample runs alone, so that tensors that a model leaves anywhere are no tensors of a map.
            count = max(min(batch, samples - done - 1), 1)
            try:
                chunk = sampler.many(done, count) if count > 1 else sampler.one(done)[None]
            except Exception:
                if count == 1:
                    raise
                batch = 1  # one sample ran before, so it is the map that failed
                continue
            done += count
            yield chunk


class _Sampler:
    """Runs one sample of a model, or many in one pass."""

    def __init__(
        self,
        model: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        seed: int,
        select: Callable[[Any], Any],
    ) -> None:
        self.model, self.arguments, self.keywords, self.select = model, arguments, keywords, select
        self.seeds = seeds.SampleSeeds(seed)
        self.draws_torchs = False  # whether torch's random operators are called

    def first(self) -> tuple[Any, int | None]:
        """Sample 0, and how many bytes its operators returned; None if they can't be seen."""
        model = uncompiled(self.model)  # operators of eager code can all be seen
        y, own = self._watched_run(model)
        size = None if any(map(_is_out_of_sight, model.modules())) else own.bytes
        if model is not self.model:
            y, own = self._watched_run(self.model)
        self.draws_torchs = own.used
        return y, size

    def _watched_run(self, model: nn.Module) -> tuple[Any, _OwnGenerators]:
        self.seeds.begin(0)
        arguments, keywords = self._copies()
        own = _OwnGenerators(self.seeds.keys)
        with dispatching(own):
            return self.select(model(*arguments, **keywords)), own

    def one(self, sample: int) -> Any:
        self.seeds.begin(sample)
        arguments, keywords = self._copies()
        with dispatching(_OwnGenerators(self.seeds.keys)) if self.draws_torchs else contextlib.nullcontext():
            return self.select(self.model(*arguments, **keywords))

    def many(self, first: int, count: int) -> Tensor:
        """``count`` samples from ``first`` on, stacked."""
        self.seeds.begin(first, count)
        arguments, keywords = self._copies()

        def sample(_: Tensor) -> Any:
            return self.select(self.model(*arguments, **keywords))

        with _restore_attributes(self.model):
            y: Tensor = vmap(sample, randomness="different")(torch.empty(count))
        return y

    def _copies(self) -> Any:
        """Copies of the arguments, because a model may write to them."""
        return tree_map_only(Tensor, Tensor.clone, (self.arguments, self.keywords))


def _is_out_of_sight(module: nn.Module) -> bool:
    """Whether dispatch modes may not see all of a module's operators."""
    return isinstance(module, torch.jit.ScriptModule) or is_compiled(module)


class _OwnGenerators(DispatchMode):  # type: ignore[misc]
    """Makes torch's random operators draw from its own generators, one for each device, which have the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.used, self.bytes = seed, False, 0
        self.generators: dict[torch.device, torch.Generator] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, `torch.compile` would never compile the functions that it meets under the mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = functools.partial(func, *args, **kwargs)
        if _is_random(func) and kwargs.get("generator") is None and not _is_fake(args, kwargs):
            generator, overload = self._generator(args, kwargs), _overload_with_generator(func)
            before = None if self.used else generator.get_state()
            if overload is None:
                result = _with_default_generator(generator, call)
            else:
                result = overload(*args, **{**kwargs, "generator": generator})
            # Random operators don't always draw: attention with a rate of 0 doesn't, nor `rrelu` in evaluation.
            if before is not None:
                self.used = is_unmarked_random(func) or not torch.equal(before, generator.get_state())
        else:
            result = call()
        if not func.is_view and not writes_to_arguments(func):
            self.bytes += sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def _generator(self, args: Any, kwargs: Any) -> torch.Generator:
        device = kwargs.get("device")
        if device is None:
            found = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
            device = torch.get_default_device() if found is None else found.device
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            device = torch.device("cpu")
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self.generators[device]


def _is_fake(args: Any, kwargs: Any) -> bool:
    """Whether a compiler runs the operator to find out shapes."""
    return any(isinstance(x, FakeTensor) or x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))


def _is_random(op: Any) -> bool:
    return op.namespace == "aten" and (torch.Tag.nondeterministic_seeded in op.tags or is_unmarked_random(op))


def _overload_with_generator(op: Any) -> Any:
    """The operator, or its overload that takes a generator in addition to the same arguments; None if there is none."""
    names = argument_names(op)
    if "generator" in names:
        return op
    packet = op.overloadpacket
    for overload in packet.overloads():
        other = getattr(packet, overload)
        others = argument_names(other)
        if "generator" in others and [name for name in others if name != "generator"] == names:
            return other
    return None


_default_generators = threading.Lock()


def _with_default_generator(generator: torch.Generator, call: Callable[[], Any]) -> Any:
    """Calls an operator that takes no generator, while the default generator has the state of another.

    A thread that draws from the default generator in that moment draws from that state too.
    """
    default = torch.default_generator
    if generator.device.type == "cuda":
        default = torch.cuda.default_generators[generator.device.index or 0]
    with _default_generators:
        before = default.get_state()
        try:
            default.set_state(generator.get_state())
            result = call()
            generator.set_state(default.get_state())
        finally:
            default.set_state(before)
    return result


@contextlib.contextmanager
def _restore_attributes(model: nn.Module) -> Iterator[None]:
    """Restores the modules' attributes and buffers afterwards, because tensors of a map can't be used once it ended."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    before = [(own, own.copy()) for module in modules for own in (vars(module), buffers_of(module))]

    def restore() -> None:
        for own, had in before:
            for name in own.keys() - had.keys():
                del own[name]
            own.update({name: value for name, value in had.items() if own.get(name) is not value})

    try:
        yield
    finally:
        try:
            restore()
        except BaseException:  # from a signal
            restore()
            raise
