"""What the benchmarks say of the machine: a name for its kind, its CPU, caches, free memory.

`kind` names the folder of its reports in bench/results. The system's files are read; one that lacks a field, or does
not exist, makes an answer shorter and never an error.
"""

from __future__ import annotations

import platform
import re
from pathlib import Path

ROOT = Path("/")
# Words of a model name that say nothing about the model.
NOISE = r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\b[0-9]+-Core\b"


def kind(root: Path = ROOT) -> str:
    """Letters, digits and dashes: the model name, then the numbers of the family and the model.

    On a virtual machine the name may say no more than "AMD EPYC"; the numbers tell its generations apart. Arm's CPUs
    have numbers of an implementer and a part instead.
    """
    fields = cpu_fields(root)
    name = re.sub(NOISE, " ", fields.get("model name", ""), flags=re.IGNORECASE) or platform.machine()
    return _slug(" ".join([name, *_numbers(fields).values()])) or "unknown"


def cpu_name(root: Path = ROOT) -> str:
    """The CPU's name, with what else tells it from others of that name."""
    fields = cpu_fields(root)
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    numbers = ", ".join(f"{what} {number}" for what, number in _numbers(fields).items())
    return f"{name} ({numbers})" if numbers else name


def caches(root: Path = ROOT) -> dict[str, str]:
    """The sizes of the caches that hold data, by level: {"L1d": "32 KiB", "L2": "512 KiB", "L3": "32 MiB"}."""
    found = {}
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, what, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if what != "Instruction":
            found[f"L{level}{'d' if what == 'Data' else ''}"] = _size(size)
    return dict(sorted(found.items()))


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that programs can still have without swapping; None if the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*([0-9]+) kB", (root / "proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) << 10 if found else None


def cpu_fields(root: Path = ROOT) -> dict[str, str]:
    """/proc/cpuinfo of the first CPU."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def _numbers(fields: dict[str, str]) -> dict[str, str]:
    names = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
    return {short: fields[name] for name, short in names.items() if fields.get(name)}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _size(text: str) -> str:
    """The system's 32768K as 32 MiB."""
    if not (match := re.fullmatch(r"([0-9]+)K", text)):
        return text
    kib = int(match[1])
    return f"{kib >> 10} MiB" if kib and kib % 1024 == 0 else f"{kib} KiB"
