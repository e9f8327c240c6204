"""Seeds: one number per dropout, from torch's own generator of the device.

There is no counter of our own: checkpointing, `torch.random.fork_rng`, DataLoader workers and forked processes save,
restore and split torch's state alone, and a mask that hangs on it follows.

On the CPU the number is drawn: 63 bits. A CUDA generator draws on the device, and asking it for a number would wait;
but its state is two numbers that the host has, and each dropout's seed is a function of them. While a graph is captured
they are not to be had, and the seed is drawn into a tensor on the device that the kernel reads, anew at each replay.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ._plain import is_transformed

SEED_BITS = 63
LOW_64_BITS = (1 << 64) - 1


class _Buffer(threading.local):
    """Where this thread's generator calls leave their number: made once and read through NumPy, a third of the cost."""

    def __init__(self) -> None:
        self.number = np.empty((), np.int64)
        with torch.inference_mode(False), torch._C._DisableTorchDispatch():
            self.fill = torch.from_numpy(self.number).random_


_buffer = _Buffer()


def draw(generator: torch.Generator | None) -> int:
    """The next seed, for eager code with no transform and no mode around it."""
    buffer = _buffer
    if generator is None:
        buffer.fill()
    else:
        buffer.fill(generator=generator)
    number: int = buffer.number.item()
    return number


GENERATOR_STEP = 4  # torch's own kernels take offsets in fours
_generators = threading.Lock()  # between reading an offset and moving it on


def draw_cuda(device: torch.device, generator: torch.Generator | None) -> int | Tensor:
    """The next seed of a CUDA device, without waiting for it."""
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
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
    return mixed(seed, offset)


def _is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is; torch tells for the current device's."""
    if torch.cuda.current_device() == device.index:
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def mixed(seed: int, offset: int) -> int:
    """A number of 64 bits, another for each offset: the output of SplitMix64 at a state apart from the seed by offsets.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = (seed + offset * 0x9E3779B97F4A7C15) & LOW_64_BITS
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & LOW_64_BITS
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & LOW_64_BITS
    return z ^ z >> 31


def signed(number: int) -> int:
    """64 bits as int64 has them: the highest comes out as the sign."""
    return number - (1 << 64) if number >> SEED_BITS else number


def for_kernel(seed: Tensor, x: Tensor) -> int | Tensor:
    """A seed as the kernels for x take it: 64 bits, or the tensor where they run where it lies, and read it there."""
    if x.is_cuda and seed.is_cuda:
        if seed.device != x.device:
            raise ValueError(f"seed must be on the CPU or on {x.device}, as the input is, but got one on {seed.device}")
        return _one(seed)
    return int(_one(seed).item()) & LOW_64_BITS


def device_for(x: Tensor) -> torch.device | str:
    """Where seeds for x are drawn."""
    return x.device if x.is_cuda else "cpu"


def draw_tensor(generator: torch.Generator, x: Tensor) -> Tensor:
    """A number of the generator as a tensor, by an op that transforms know: on the CPU the one that `draw` gives."""
    low, high = -(1 << SEED_BITS), (1 << SEED_BITS) - 1
    return torch.randint(low, high, (), dtype=torch.int64, device=device_for(x), generator=generator) & high


def check(seed: Any, generator: torch.Generator | None) -> None:
    """Raises what drawing from this seed would, without reading it: it may lie on a GPU."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        _one(seed)
    else:
        _checks.uint64("seed", seed)


def given(seed: Any, generator: torch.Generator | None, x: Tensor) -> int | Tensor:
    """A seed given by the caller, an int or an int64 tensor of one element, as the kernels for x take it."""
    _only_one(generator)
    return for_kernel(seed, x) if isinstance(seed, Tensor) else _checks.uint64("seed", seed)


def as_tensor(seed: Any, generator: torch.Generator | None = None, *, like: Tensor | None = None) -> Tensor:
    """The same as an int64 tensor without axes, of the kind of ``like``."""
    _only_one(generator)
    if isinstance(seed, Tensor):
        return _one(seed)
    number = signed(_checks.uint64("seed", seed))
    if like is None or is_transformed():
        return torch.tensor(number, dtype=torch.int64, device="cpu")
    return like.new_full((), number, dtype=torch.int64, device="cpu")


def _one(seed: Tensor) -> Tensor:
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or a tensor of int64, but got a tensor of {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"seed must be one number, but got a tensor of shape {tuple(seed.shape)}")
    return seed.reshape(())


def _only_one(generator: torch.Generator | None) -> None:
    if generator is not None:
        raise ValueError("seed and generator must not both be given")
