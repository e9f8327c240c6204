"""The memory policy: whether a pass over large data writes around the cache, in which order it goes, how it prefetches.

No choice is the fastest on all CPUs, so `policy_for` chooses by what the machine says of itself: its vendor and the
size of its last-level cache. ``FASTDROP_MEMORY`` forces single choices. C is told (`follow`), the Numba backend asks.
Results never depend on the policy. docs/design.md, section 6, has what was measured on which machine.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

VARIABLE = "FASTDROP_MEMORY"
KIB, MIB = 1 << 10, 1 << 20
NEVER = 1 << 63  # more than any output has
SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Policy:
    """The choices, in bytes unless said otherwise.

    Attributes
    ----------
    stream : int
        Outputs of this size or more are written around the cache. Such a store does not read the line before, which
        saves a third of the traffic; but what would have stayed in the cache has to come from memory later.
    stream_drawing : int
        The same for kernels that draw random bits meanwhile.
    pages : {1, 2, 4, 8}
        A pass of plain dropout that streams takes pieces in turn from so many pages of 4 KiB (C, 16-bit data: 4 at
        most). Gaussian and fused kernels stream through one page.
    lines : {4, 8, 16}
        The size of a piece, in cache lines.
    ahead : int
        An ordinary pass, and a stage of a fused kernel that only reads, prefetches so far ahead; 0: it prefetches
        nothing.
    ahead_streaming : int
        The same for a loop that streams through one page.

    Raises ValueError for numbers that kernels can't follow.
    """

    stream: int = 16 * MIB
    stream_drawing: int = 16 * MIB
    pages: int = 1
    lines: int = 8
    ahead: int = 8 * KIB
    ahead_streaming: int = 8 * KIB

    def __post_init__(self) -> None:
        for name, read in CHOICES.items():
            if read(_text(getattr(self, name))) is None:
                raise ValueError(f"{name} must be one of {POSSIBLE}, but got {getattr(self, name)}")

    def __str__(self) -> str:
        return ",".join(f"{name}={_text(number)}" for name, number in dataclasses.asdict(self).items())


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the system says of the CPU: its vendor ("AuthenticAMD") and its last-level cache; empty and 0 if nothing."""

    vendor: str = ""
    cache_bytes: int = 0


def policy_for(machine: Machine) -> Policy:
    """The rule.

    An output streams if it takes five sixteenths of the last-level cache: then input and output hardly stay there
    together. A kernel that draws streams from a quarter on, because it waits longer for ordinary stores. But 16 MiB
    stream anyway, because a virtual machine may be told of a cache that it shares with many others, and less than 2 MiB
    never do, because a wrong guess would cost more there than a right one gains.

    Intel's CPUs want several pages at once and nothing prefetched. AMD's are slower that way.
    """
    share = machine.cache_bytes / 16 if machine.cache_bytes else 16 * MIB
    stream, stream_drawing = (int(min(max(shares * share, 2 * MIB), 16 * MIB)) for shares in (5, 4))
    policy = Policy(stream=stream, stream_drawing=stream_drawing)
    if machine.vendor == "GenuineIntel":
        return dataclasses.replace(policy, pages=8, lines=4, ahead_streaming=0)
    return policy


@functools.cache
def machine(root: Path = Path("/")) -> Machine:
    """This one, by /proc and /sys; what they do not say stays unknown."""
    return Machine(_vendor(root / "proc/cpuinfo"), _last_cache(root / "sys/devices/system/cpu/cpu0/cache"))


def _vendor(cpuinfo: Path) -> str:
    try:
        with open(cpuinfo, errors="replace") as file:
            found = re.search(r"^vendor_id\s*:\s*(\S+)", file.read(4096), re.M)
    except OSError:
        return ""
    return found[1] if found else ""


def _last_cache(folder: Path) -> int:
    """The size of the cache of the highest level."""
    sizes = {}
    for index in folder.glob("index*"):
        try:
            sizes[int((index / "level").read_text())] = _bytes((index / "size").read_text().strip())
        except (OSError, ValueError):  # a cache of which one of them is not said
            continue
    return sizes[max(sizes)] if sizes else 0


def parse(text: str, policy: Policy) -> Policy:
    """A policy with the choices that ``"stream=8M,pages=4"`` forces; ValueError, with what is possible, for others."""
    forced = {}
    for choice in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = choice.partition("=")
        number = CHOICES[name](value) if name in CHOICES else None
        if number is None or name in forced:
            raise ValueError(
                f"{VARIABLE} must be different choices such as {POSSIBLE}, separated by commas, but got {choice!r}"
            )
        forced[name] = number
    return dataclasses.replace(policy, **forced)


def policy() -> Policy:
    """The one in force."""
    return _policy if _policy is not None else _resolve()


def follow(set_policy: Callable[[Policy], None]) -> None:
    """Has a backend follow: calls it with the policy in force now, and whenever that changes."""
    set_policy(policy())
    _followers.append(set_policy)


class use_policy:
    """Puts a policy in force, process-wide; as a context manager, until the block ends. For tests and benchmarks."""

    def __init__(self, chosen: Policy) -> None:
        self._before = policy(), _why
        _put_in_force(chosen, "chosen by use_policy")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        _put_in_force(*self._before)


def describe() -> str:
    """The policy in force and what decided it."""
    return f"{policy()} ({_why})"


def _resolve() -> Policy:
    here, forced = machine(), os.environ.get(VARIABLE, "")
    cache = f"{here.cache_bytes // KIB} KiB of last-level cache" if here.cache_bytes else "caches unknown"
    why = f"{here.vendor or 'vendor unknown'}, {cache}" + (f"; forced by {VARIABLE}={forced}" if forced else "")
    resolved = parse(forced, policy_for(here))
    _put_in_force(resolved, why)
    return resolved


def _put_in_force(chosen: Policy, why: str) -> None:
    global _policy, _why
    for set_policy in _followers:
        set_policy(chosen)
    _policy, _why = chosen, why


def _bytes(text: str) -> int:
    """64 or 16M as a number of bytes; ValueError for anything else."""
    if not (match := re.fullmatch(r"([0-9]{1,15})([KMG]?)", text)):
        raise ValueError(text)
    return int(match[1]) * SUFFIXES[match[2]]


def _text(n: int) -> str:
    """The shortest text of a number that choices are read from."""
    if n == NEVER:
        return "never"
    suffix = next(s for s in reversed(SUFFIXES) if n % SUFFIXES[s] == 0) if n else ""
    return f"{n // SUFFIXES[suffix]}{suffix}"


def _size_of(most: int, **words: int) -> Callable[[str], int | None]:
    def read(text: str) -> int | None:
        try:
            n = words[text] if text in words else _bytes(text)
        except ValueError:
            return None
        return n if n <= most else None

    return read


def _one_of(*numbers: int) -> Callable[[str], int | None]:
    return {str(n): n for n in numbers}.get


# What a choice may be: a function from its text to the number, None where it is not possible.
CHOICES: dict[str, Callable[[str], int | None]] = {
    "stream": _size_of(NEVER, always=0, never=NEVER),
    "stream_drawing": _size_of(NEVER, always=0, never=NEVER),
    "pages": _one_of(1, 2, 4, 8),
    "lines": _one_of(4, 8, 16),
    "ahead": _size_of(64 * KIB),
    "ahead_streaming": _size_of(64 * KIB),
}
POSSIBLE = (
    "stream=8M and stream_drawing=8M (or always, never), pages=1, 2, 4 or 8, lines=4, 8 or 16, ahead=8K and "
    "ahead_streaming=0 (64K at most)"
)

_policy: Policy | None = None  # None until it is asked for
_why = ""
_followers: list[Callable[[Policy], None]] = []
