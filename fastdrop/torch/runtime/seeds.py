"""Seeds: one number per dropout, from torch's own generator of the device.

Functions, modules and ops ask here for each mask's seed. fastdrop keeps no counter of its own, because checkpointing,
`torch.random.fork_rng`, DataLoader workers and forked processes save, restore and split only torch's state.

On the CPU, the seed is a number of 63 bits that torch's generator draws. A CUDA generator draws on the device, and the
host would have to wait for the number. But its state is two numbers that the host has, so the seed is a function of
them. While a CUDA graph is captured the host does not have them, so the seed is drawn into a tensor on the device: the
kernel reads it there, and each replay draws another.

Monte Carlo sampling has seeds of its own, `SampleSeeds`, in place of the thread's generators.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core import checks
from . import located
from .dispatch import hide_from_dynamo, is_transformed
from .dispatch.compilers import is_recomputed
from .dispatch.modes import without_dispatch_modes
from .dispatch.ops import count_drawing_maps
from .located import LOW_64_BITS, Drawn, Located, as_int64

SEED_BITS = 63


class _Buffer(threading.local):
    """Memory into which this thread's generators draw. It is made once and read by NumPy, at a third of the cost.

    If ``seeds`` is set, seeds come from there instead.
    """

    seeds: SampleSeeds | None = None

    def __init__(self) -> None:
        self.number = np.empty((), np.int64)
        with torch.inference_mode(False), without_dispatch_modes():
            self.fill = torch.from_numpy(self.number).random_


_buffer = _Buffer()


def next_seed(generator: torch.Generator | None) -> int:
    """The next seed, for eager code with no transform and no mode around it."""
    buffer = _buffer
    if generator is not None:
        refuse_recomputation()
        buffer.fill(generator=generator)
    elif buffer.seeds is not None:
        return buffer.seeds.next()
    else:
        buffer.fill()
    number: int = buffer.number.item()
    return number


def refuse_recomputation() -> None:
    """Raises where a checkpoint computes a forward again, because it restores the state of torch's default generators
    only. Any other source of seeds would give another mask than in forward, and so a wrong gradient."""
    if is_recomputed(sys._getframe(1)):
        raise RuntimeError(
            "a checkpoint computes a dropout again that draws from a generator, or from a module's own seed: it would "
            "draw another mask. Leave both out, because checkpoints restore torch's default generators, or give a "
            "function of fastdrop.torch seed="
        )


class SampleSeeds:
    """Seeds of Monte Carlo samples: the k-th dropout of sample s has ``mix(mix(seed, s + 1), k + 1)``.

    They depend on nothing else, so samples may run one by one or, under `vmap`, many at once. A map around the sampling
    gives the same seeds to all that it maps.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.maps_around = seed, count_drawing_maps()
        self.begin(0)

    def begin(self, sample: int, count: int | None = None) -> None:
        """Starts a pass: of one sample or, under `vmap`, of ``count`` samples from this one on."""
        self.calls = 0
        first = sample + 1
        last = first if count is None else np.arange(first, first + count, dtype=np.uint64)
        self.keys = mix(self.seed, last)

    def next(self) -> int:
        """The seed of the next dropout, of one sample."""
        if not isinstance(self.keys, int):
            raise RuntimeError("vmap: dropout inside of an op that vmap doesn't look into would be the same for all")
        self.calls += 1
        number: int = mix(self.keys, self.calls)
        return number

    def draw(self, size: list[int], device: torch.device | str) -> Tensor:
        """Seeds as the op ``draw`` returns them. The axes are those of maps around, of samples, of maps inside."""
        keys = np.asarray(self.keys, np.uint64)
        own = size[self.maps_around :]
        count = math.prod(own[keys.ndim :])
        calls = np.arange(self.calls + 1, self.calls + 1 + count, dtype=np.uint64)
        self.calls += count
        numbers = mix(keys[..., None], calls).view(np.int64)
        return torch.from_numpy(numbers).reshape(own).expand(size).contiguous().to(device)


@contextlib.contextmanager
def draw_from(seeds: SampleSeeds) -> Iterator[None]:
    """A block in which this thread's dropouts take their seeds from here."""
    before = _buffer.seeds
    try:
        _buffer.seeds = seeds
        yield
    finally:
        _buffer.seeds = before


def sample_seeds() -> SampleSeeds | None:
    return _buffer.seeds


GENERATOR_STEP = 4  # torch's own kernels take offsets in fours
_generators = threading.Lock()  # between reading an offset and moving it on


def next_cuda_seed(device: torch.device, generator: torch.Generator | None) -> int | Tensor:
    """The next seed of a CUDA device, without waiting for it."""
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if generator is not None:
        refuse_recomputation()
    if generator is None and _buffer.seeds is not None:
        return _buffer.seeds.next()
    if _is_capturing(device):
        return torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)
    if generator is None:
        generator = torch.cuda.default_generators[device.index]
    with _generators:
        # A second handle on the same state. `set_offset` marks the handle it is called on: after it on the generator
        # itself, cuDNN's next RNN would draw its dropout's state anew, and wait for the device.
        state = generator.graphsafe_get_state()
        seed, offset = state.initial_seed(), state.get_offset()
        state.set_offset(offset + GENERATOR_STEP)
    number: int = mix(seed, offset)
    return number


def refuse_capture(device: torch.device) -> None:
    """Raises while a CUDA graph is captured, for seeds that are numbers of the host: each replay would use them."""
    if _is_capturing(device):
        raise RuntimeError(
            "a CUDA graph would replay the masks of one step: capture the model without named masks, or not in training"
        )


def _is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured. torch tells this of the current device alone."""
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def mix(seed: Any, offset: Any) -> Any:
    """A number of 64 bits, another for each offset: the output of SplitMix64 at a state apart from the seed by offsets.

    Either may be an array of uint64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
    OOPSLA 2014.
    """
    z = (seed + (offset * 0x9E3779B97F4A7C15 & LOW_64_BITS)) & LOW_64_BITS
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & LOW_64_BITS
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & LOW_64_BITS
    return z ^ z >> 31


def for_kernel(seed: Tensor, x: Tensor) -> Any:
    """A seed as the kernels for x take it: 64 bits, or the tensor itself if it is on x's GPU, where they read it, or a
    `Located`."""
    if seed.numel() > 1:
        return located.from_numbers(_checked(seed).tolist())
    if x.is_cuda and seed.is_cuda:
        if seed.device != x.device:
            raise ValueError(f"seed must be on the CPU or on {x.device}, as the input is, but got one on {seed.device}")
        return _checked(seed)
    return int(_checked(seed).item()) & LOW_64_BITS


def for_kernels(seeds: Tensor, x: Tensor) -> list[Any]:
    """`for_kernel` of each of a row of seeds."""
    if seeds.is_cpu and seeds.dtype == torch.int64 and seeds.dim() == 1:
        return [number & LOW_64_BITS for number in seeds.tolist()]
    return [for_kernel(seed, x) for seed in seeds.unbind()]


def device_for(x: Tensor) -> torch.device | str:
    """Where seeds for x are drawn."""
    return x.device if x.is_cuda else "cpu"


def draw_tensor(generator: torch.Generator, x: Tensor) -> Tensor:
    """The generator's next number as a tensor, by an op that transforms know. On the CPU it is `next_seed`'s number."""
    refuse_recomputation()
    low, high = -(1 << SEED_BITS), (1 << SEED_BITS) - 1
    return torch.randint(low, high, (), dtype=torch.int64, device=device_for(x), generator=generator) & high


def check(seed: Any, generator: torch.Generator | None) -> None:
    """Raises the errors of drawing from this seed, without reading it, because it may be on a GPU."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        _of_caller(seed)
    else:
        checks.uint64("seed", seed)


def from_caller(seed: Any, generator: torch.Generator | None, x: Tensor) -> Any:
    """The caller's seed, an int or an int64 tensor, or what another function took, as the kernels for x take it."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        return for_kernel(_of_caller(seed), x)
    if isinstance(seed, Drawn):
        return for_kernel(seed.seed, x)
    return seed if isinstance(seed, Located) else checks.uint64("seed", seed)


def as_tensor(seed: Any, generator: torch.Generator | None = None, *, like: Tensor | None = None) -> Tensor:
    """A seed as ops take it: an int64 tensor, without axes if it is one number, of the kind of ``like``."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        return _of_caller(seed)
    if isinstance(seed, Drawn):
        return seed.seed
    if isinstance(seed, Located):
        return torch.tensor(located.as_numbers(seed), dtype=torch.int64, device="cpu")
    number = as_int64(checks.uint64("seed", seed))
    if like is None or is_transformed():
        return torch.tensor(number, dtype=torch.int64, device="cpu")
    return like.new_full((), number, dtype=torch.int64, device="cpu")


def with_cells(seed: Tensor, cells: Tensor) -> Tensor:
    """A seed of one number or two, as ops take it, with the cells of a part."""
    numbers = seed.reshape(-1)
    return torch.cat([numbers, numbers.new_zeros(2 - numbers.numel()), cells.to(numbers.device)])


def _of_caller(seed: Tensor) -> Tensor:
    """A caller's tensor, which has no cells."""
    return _checked(seed, 2)


def _checked(seed: Tensor, most: float = math.inf) -> Tensor:
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or a tensor of int64, but got a tensor of {seed.dtype}")
    count = seed.numel()
    if count == 1:
        return seed.reshape(())
    if count < 2 or count > most or (count - 2) % located.NUMBERS:
        raise ValueError(
            f"seed must be one number, or two, a seed and its offset, but got a tensor of shape {tuple(seed.shape)}"
        )
    if seed.is_cuda:
        raise ValueError("seed must be one number on a GPU, because the host reads offsets: give the tensor on the CPU")
    return seed.reshape(-1)


def _only_one(generator: torch.Generator | None) -> None:
    if generator is not None:
        raise ValueError("seed and generator must not both be given")


hide_from_dynamo(refuse_recomputation)
hide_from_dynamo(next_seed, next_cuda_seed, sample_seeds, for_kernel, for_kernels)
hide_from_dynamo(SampleSeeds.begin, SampleSeeds.next, SampleSeeds.draw, vars(draw_from)["__wrapped__"])
