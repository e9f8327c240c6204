"""The memory policy: what it is on which machine, how it is forced, and that results don't depend on it."""

from __future__ import annotations

import numpy as np
import pytest

from fastdrop.backends import c, memory
from fastdrop.backends.memory import KIB, MIB, NEVER, Machine, Policy

from ..cases import Guarded, primitive_modules, run_python

CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: 25\nmodel name\t: a CPU\n"

# ---- the rule ----


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (Machine("AuthenticAMD", 32 * MIB), Policy(10 * MIB, 8 * MIB)),
        (Machine("AuthenticAMD", 16 * MIB), Policy(5 * MIB, 4 * MIB)),
        (Machine("AuthenticAMD", 2 * MIB), Policy(2 * MIB, 2 * MIB)),
        (Machine("GenuineIntel", 260 * MIB), Policy(16 * MIB, 16 * MIB, pages=8, lines=4, ahead_streaming=0)),
        (Machine("", 0), Policy()),
        (Machine("ARM", 1 << 40), Policy()),
    ],
    ids=str,
)
def test_rule(machine, expected):
    assert memory.policy_for(machine) == expected


def system(root, vendor="AuthenticAMD", sizes=("32K", "32K", "512K", "16384K"), levels=(1, 1, 2, 3)):
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(CPUINFO.format(vendor) * 3)
    for index, (size, level) in enumerate(zip(sizes, levels, strict=True)):
        folder = root / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(f"{size}\n")
        (folder / "level").write_text(f"{level}\n")
    return root


def test_what_the_system_says(tmp_path):
    said = memory.machine.__wrapped__(system(tmp_path, "GenuineIntel", ("48K", "2M", "266240K"), (1, 2, 3)))
    assert said == Machine("GenuineIntel", 260 * MIB)


@pytest.mark.parametrize("missing", ["cpuinfo", "vendor", "caches", "sizes", "all"])
def test_a_system_that_says_less(missing, tmp_path):
    if missing != "all":
        system(tmp_path, sizes=("unknown",) if missing == "sizes" else ("8M",), levels=(3,))
    if missing == "cpuinfo":
        (tmp_path / "proc/cpuinfo").unlink()
    if missing == "vendor":
        (tmp_path / "proc/cpuinfo").write_text("CPU implementer\t: 0x41\n")
    if missing == "caches":
        (tmp_path / "sys").rename(tmp_path / "elsewhere")
    vendor = "" if missing in ("cpuinfo", "vendor", "all") else "AuthenticAMD"
    cache = 0 if missing in ("caches", "sizes", "all") else 8 * MIB
    assert memory.machine.__wrapped__(tmp_path) == Machine(vendor, cache)


def test_a_system_that_says_odd_things(tmp_path):
    system(tmp_path)
    with open(tmp_path / "proc/cpuinfo", "ab") as file:
        file.write(b"\xff\xfe")
    cache = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    (cache / "index_list").write_text("")
    (cache / "index9").mkdir()
    assert memory.machine.__wrapped__(tmp_path) == Machine("AuthenticAMD", 16 * MIB)


# ---- forcing it ----


@pytest.mark.parametrize(
    ("text", "forced"),
    [
        ("", {}),
        ("stream=always", {"stream": 0}),
        ("stream=never, stream_drawing=3M", {"stream": NEVER, "stream_drawing": 3 * MIB}),
        ("pages=8,lines=4,", {"pages": 8, "lines": 4}),
        ("ahead=512,ahead_streaming=64K", {"ahead": 512, "ahead_streaming": 64 * KIB}),
        (str(Policy(0, NEVER, 2, 16, 0, 5 * KIB)), vars(Policy(0, NEVER, 2, 16, 0, 5 * KIB))),
    ],
)  # fmt: skip
def test_forced_choices(text, forced):
    assert memory.parse(text, Policy()) == Policy(**forced)


@pytest.mark.parametrize(
    "text",
    ["stream", "stream=", "stream=-1", "stream=8T", "stream=1.5M", "stream=9999999999G", "pages=3", "pages=16",
     "lines=2", "pages=2", "lines=8K", "ahead=65K", "ahead=always", "lanes=4", "stream=8M;pages=4", "8M"],
)  # fmt: skip
def test_impossible_choices(text):
    with pytest.raises(
        ValueError, match=r"FASTDROP_MEMORY must be different choices such as stream=8M.*, pages=1, 2, 4 or 8.*got"
    ):
        memory.parse(f"pages=4,{text}", Policy())


def test_the_environment_forces_it():
    code = "import fastdrop as fd; fd.show_config(); print(fd.dropout([1.0, 2.0], 0.5, rng=0)[0].size)"
    shown = run_python(code, FASTDROP_MEMORY="stream=3M,pages=2").stdout
    assert "stream=3M," in shown
    assert "pages=2," in shown
    assert "forced by FASTDROP_MEMORY=stream=3M,pages=2" in shown
    assert shown.splitlines()[-1] == "2"
    refused = run_python(code, FASTDROP_MEMORY="stream=big")
    assert refused.returncode
    assert "ValueError: FASTDROP_MEMORY must be different choices such as" in refused.stderr
    assert run_python("import fastdrop", FASTDROP_MEMORY="stream=big").returncode == 0  # nothing reads it on import


def test_a_wrong_variable_stops_what_needs_it():
    bad = {"FASTDROP_MEMORY": "stream=big"}
    for backend in ("c", "numba"):
        refused = run_python("import fastdrop as fd; fd.dropout([1.0], 0.5)", FASTDROP_BACKEND=backend, **bad)
        assert "FASTDROP_MEMORY must be different choices" in refused.stderr
    report = run_python("import sys; from fastdrop.__main__ import main; sys.exit(main(['info']))", **bad)
    assert report.returncode == 1
    assert "FASTDROP_MEMORY must be different choices" in report.stdout


def test_the_reason_stays_with_the_policy(monkeypatch):
    before = memory.describe()
    monkeypatch.setenv("FASTDROP_MEMORY", "pages=8")  # too late
    with memory.use_policy(Policy(pages=2)):
        assert memory.describe() == f"{Policy(pages=2)} (chosen by use_policy)"
    assert memory.describe() == before


@pytest.mark.parametrize("wrong", [{"pages": 3}, {"pages": 0}, {"lines": 32}, {"stream": -1}, {"ahead": 1 << 20}])
def test_a_policy_that_no_kernel_can_follow(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be one of stream=8M"):
        Policy(**wrong)


@pytest.mark.skipif(c.unavailable() is not None, reason="the C extension is not built")
def test_c_follows():
    other = Policy(1 * MIB, 2 * MIB, 2, 16, 512, 1024)
    with memory.use_policy(other):
        assert c.get_memory() == other
    assert c.get_memory() == memory.policy()
    forced = run_python("from fastdrop.backends import c; print(c.get_memory())", FASTDROP_MEMORY="pages=2,lines=16")
    assert "pages=2,lines=16" in forced.stdout
    start = "from fastdrop._native import ffi, lib; a = ffi.new('uint64_t[6]'); lib.fd_get_memory(a); print(list(a))"
    assert run_python(start).stdout.strip() == str([*vars(Policy()).values()])  # until it is told


@pytest.mark.skipif(primitive_modules()["numba"].unavailable() is not None, reason="Numba is not installed")
def test_numba_follows():
    """The way through an output: streams, element at a line, cells of a piece, bits of pages and pieces, prefetch."""
    numba = primitive_modules()["numba"]
    at_line = Guarded(4096, np.float32, 0).array
    for policy, array, expected in (
        (Policy(), at_line, (0, 0, 512, 0, 0, 8192)),
        (Policy(16 * KIB, 0), at_line, (1, 0, 512, 0, 0, 8192)),
        (Policy(16 * KIB + 1, 0, ahead=64), at_line, (0, 0, 512, 0, 0, 64)),
        (Policy(0, 0, 4, 8), Guarded(4096, np.float32, 24).array, (1, 10, 128, 2, 3, 0)),
        (Policy(0, 0, 8, 4), Guarded(64, np.float64, 0).array, (1, 0, 32, 3, 4, 0)),
        (Policy(0, 0), Guarded(4096, np.float32, 2).array, (0, 0, 512, 0, 0, 8192)),
        (Policy(0, 0), Guarded(4096, np.float16, 0).array, (0, 0, 512, 0, 0, 8192)),
        (Policy(0, 0), Guarded(4096, np.uint16, 0).array, (0, 0, 512, 0, 0, 8192)),
    ):
        with memory.use_policy(policy):
            assert tuple(numba._way(array, policy.stream)) == expected
