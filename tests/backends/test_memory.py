"""The memory policy: what it is on which machine, how it is forced, and that results don't depend on it."""

from __future__ import annotations

import pytest

from fastdrop.backends import c, memory
from fastdrop.backends.memory import KIB, MIB, NEVER, Machine, Policy

from ..cases import run_python

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
    said = memory.machine.__wrapped__(tmp_path)
    assert said == {"vendor": Machine("", 8 * MIB), "caches": Machine("AuthenticAMD", 0)}.get(missing, Machine())


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
     "lines=2", "lines=8K", "ahead=65K", "ahead=always", "lanes=4", "stream=8M;pages=4", "8M"],
)  # fmt: skip
def test_impossible_choices(text):
    with pytest.raises(
        ValueError, match=r"FASTDROP_MEMORY must be choices such as stream=8M.*, pages=1, 2, 4 or 8.*got"
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
    assert "ValueError: FASTDROP_MEMORY must be choices such as" in refused.stderr
    assert run_python("import fastdrop", FASTDROP_MEMORY="stream=big").returncode == 0  # nothing reads it on import


def test_backends_follow():
    followed: list[Policy] = []
    before = memory.policy()
    memory.follow(followed.append)
    try:
        with memory.use_policy(Policy(pages=2)):
            assert memory.policy() == Policy(pages=2)
        assert followed == [before, Policy(pages=2), before]
    finally:
        memory._followers.remove(followed.append)


@pytest.mark.skipif(c.unavailable() is not None, reason="the C extension is not built")
@pytest.mark.parametrize(
    "policy", [Policy(pages=3), Policy(pages=0), Policy(pages=16), Policy(lines=2), Policy(lines=32)]
)
def test_c_refuses_what_its_kernels_cannot_do(policy):
    with pytest.raises(ValueError, match="refused"):
        c.set_memory(policy)
