"""The registry, and the layering that lets `import fastdrop` need NumPy alone."""

from __future__ import annotations

import ast
import importlib
import threading
from pathlib import Path

import pytest

import fastdrop as fd
from fastdrop import backends

from ..cases import VARIANTS, activated, output_of, primitive_modules, run_python

PACKAGE = Path(fd.__file__).resolve().parent
USABLE = [name for name, module in primitive_modules().items() if module.unavailable() is None]

# ---- registry ----


def test_use_backend_as_a_context_manager_restores_what_was_active():
    before, outer, inner = backends.active_name(), USABLE[0], USABLE[-1]
    with fd.use_backend(outer):
        with pytest.raises(KeyError), fd.use_backend(inner):
            raise KeyError
        assert backends.active_name() == outer
    assert backends.active_name() == before


def test_use_backend_as_a_call_is_process_wide():
    seen = []
    with fd.use_backend("numpy"):  # restores whatever the calls leave
        for name in [*USABLE, "auto"]:
            fd.use_backend(name)
            thread = threading.Thread(target=lambda: seen.append(backends.active_name()))
            thread.start()
            thread.join()
    assert seen == [*USABLE, USABLE[0]]


@pytest.mark.parametrize("name", ["gpu", "C", "", "reference", None, 3])
def test_use_backend_refuses_unknown_names(name):
    before = backends.active_name()
    with pytest.raises(ValueError, match=r"name must be one of auto, c, numba, numpy, but got"):
        fd.use_backend(name)
    assert backends.active_name() == before


@pytest.mark.parametrize("name", primitive_modules())
def test_a_backend_asked_for_by_name_never_falls_back(name, monkeypatch):
    before = backends.active_name()
    monkeypatch.setattr(primitive_modules()[name], "unavailable", lambda: "it is the test's wish")
    with pytest.raises(RuntimeError, match=rf"backend '{name}' can't run here: it is the test's wish"):
        fd.use_backend(name)
    assert backends.active_name() == before


def test_auto_takes_the_best_that_can_run(monkeypatch):
    """In the order C, Numba, NumPy."""
    assert list(primitive_modules()) == ["c", "numba", "numpy"]
    for name in USABLE:
        with fd.use_backend("auto"):
            assert backends.active_name() == name
        monkeypatch.setattr(primitive_modules()[name], "unavailable", lambda: "not now")
        if name == "numba" or (name == "c" and "numba" not in USABLE):
            break


def test_explain_gives_a_reason_for_each_backend(backend, monkeypatch):
    lines = dict(line.split(": ", 1) for line in fd.explain().splitlines())
    assert list(lines) == [*primitive_modules(), "cuda"]
    assert lines[backend].startswith("taken, asked for by name")
    assert ("instruction set " + fd.backends.load("c").isa() in lines[backend]) == (backend == "c")
    assert all("asked for by name" in lines[name] for name in USABLE)
    if backend != "c":
        monkeypatch.setattr(primitive_modules()["c"], "unavailable", lambda: "no compiler; get one so and so")
        assert "c: can't run: no compiler; get one so and so" in fd.explain().splitlines()


def test_cuda_is_not_chosen_but_found(monkeypatch):
    before = backends.active_name()
    module = importlib.import_module("fastdrop.backends.cuda.launch")
    monkeypatch.setattr(module, "unavailable", lambda: "no GPU; look for one")
    assert "cuda: can't run: no GPU; look for one" in fd.explain().splitlines()
    with pytest.raises(RuntimeError, match="backend 'cuda' can't run here: no GPU; look for one"):
        fd.use_backend("cuda")
    monkeypatch.setattr(module, "unavailable", lambda: None)
    assert "cuda: takes arrays on a GPU" in fd.explain().splitlines()
    with pytest.raises(ValueError, match="cuda takes arrays on a GPU without being asked"):
        fd.use_backend("cuda")
    assert backends.active_name() == before


def test_missing_extension_says_how_to_get_it(monkeypatch):
    native = primitive_modules()["c"]
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_import_error", "No module named fastdrop._native", raising=False)
    assert "pip install" in native.unavailable()
    assert "compiler" in native.unavailable()


def test_missing_extension_that_is_installed_elsewhere(monkeypatch, tmp_path):
    """As in the source folder after an install that isn't editable."""
    native, folders = primitive_modules()["c"], [tmp_path / name / "fastdrop" for name in ("source", "site-packages")]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[1] / "_native.abi3.so").touch()
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_import_error", "undefined symbol", raising=False)
    monkeypatch.setattr(native.sys, "path", [str(folder.parent) for folder in folders])
    monkeypatch.setattr(native, "FOLDER", str(folders[0]))
    assert f"is in {folders[1]}, but fastdrop is imported from {folders[0].parent}; leave that" in native.unavailable()
    (folders[0] / "_native.abi3.so").touch()
    assert "undefined symbol" in native.unavailable()


@pytest.mark.parametrize("name", VARIANTS)
def test_show_config_names_what_runs(name, capsys):
    with activated(name):
        fd.show_config()
    text = capsys.readouterr().out
    assert f"fastdrop {fd.__version__}" in text
    assert f"{fd.get_num_threads()} threads" in text
    backend, _, isa = name.partition("-")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("*")] == [backend]
    assert all(f" {name} " in text for name in primitive_modules())
    assert not isa or f"C, {isa} in use" in text


def test_isas_are_listed_best_last():
    native = primitive_modules()["c"]
    if native.unavailable():
        pytest.skip(native.unavailable())
    order = ["scalar", "neon", "avx2", "avx512"]
    assert native.usable_isas()[0] == "scalar"
    assert native.usable_isas() == sorted(native.usable_isas(), key=order.index)
    assert output_of("from fastdrop.backends import c as native; print(native.isa())") == native.usable_isas()[-1]


def test_environment_forces_an_isa():
    with activated("c-scalar"):
        code = "from fastdrop.backends import c as native; print(native.isa())"
        assert output_of(code, FASTDROP_ISA="scalar") == "scalar"


def test_environment_never_falls_back_from_a_backend_that_cannot_run():
    code = "import sys; sys.modules['numba'] = None\nimport fastdrop as fd\nfd.draw_mask(5, 0.5)"  # as if not installed
    result = run_python(code, FASTDROP_BACKEND="numba")
    assert result.returncode != 0
    assert "backend 'numba' can't run here" in result.stderr
    assert "pip install numba" in result.stderr


def test_backends_without_numba_and_c():
    """NumPy alone is enough, and explain says what would help."""
    code = (
        "import sys\nsys.modules['numba'] = sys.modules['fastdrop._native'] = None\n"
        "import fastdrop as fd\nprint(fd.draw_mask(5, 0.5, rng=0).kept)\nprint(fd.explain())"
    )
    kept, *lines = output_of(code).splitlines()
    assert int(kept) == fd.draw_mask(5, 0.5, rng=0).kept
    assert lines[0].startswith("c: can't run: ")
    assert lines[1].startswith("numba: can't run: ")
    assert lines[2] == "numpy: taken, the best that can run here"


FALLS_BACK = """
import sys, warnings
sys.modules["numba"] = sys.modules["fastdrop._native"] = None  # as if there was neither
import fastdrop as fd
from fastdrop.cli import info
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    fd.explain(), fd.show_config(), info.collect()
    if CHOICE:
        fd.use_backend(CHOICE)
    asked = len(seen)
    fd.draw_mask(5, 0.5)  # the user's line
    fd.draw_mask(5, 0.5)
texts = [" ".join(str(w.message).split()) for w in seen]
print(asked, *[f"{w.category.__name__}{w.lineno}{w.filename} {text}" for w, text in zip(seen, texts)], sep="|")
"""


def test_auto_says_once_that_it_falls_back_and_why():
    """At the first use, at the user's line, and only if nobody has chosen."""
    ending = output_of(f"CHOICE = None{FALLS_BACK}").splitlines()[-1]
    asked, warning = ending.split("|")
    assert asked == "0"
    assert warning.startswith("RuntimeWarning12<string> fastdrop computes with the backend 'numpy', which is slower")
    assert "the C extension is not built (" in warning
    assert "install a C compiler" in warning
    assert output_of(f"CHOICE = 'numpy'{FALLS_BACK}").splitlines()[-1] == "0"
    assert output_of(f"CHOICE = None{FALLS_BACK}", FASTDROP_BACKEND="numpy").splitlines()[-1] == "0"


def test_threads_may_resolve_the_backend_at_once():
    code = """
import threading
import fastdrop as fd
start, masks = threading.Barrier(8), []
def first_call():
    start.wait()
    masks.append(fd.draw_mask(1000, 0.3, rng=1))
threads = [threading.Thread(target=first_call) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(len(masks), all(mask == masks[0] for mask in masks))
"""
    assert output_of(code) == "8 True"


def test_a_backend_chosen_while_another_thread_loads_the_default_stays():
    code = """
import fastdrop as fd
load = fd.backends._loaded
def slowly(name):
    fd.backends._loaded = load
    module = load(name)
    fd.use_backend("numpy")  # as another thread might
    return module
fd.backends._loaded = slowly
fd.draw_mask(9, 0.5)
print(fd.backends.active_name())
"""
    assert output_of(code) == "numpy"


# ---- what an import loads ----

LOADED = "import sys; {code}; print(*sorted({{name.split('.')[0] for name in sys.modules}} & {names!r}))"
HEAVY = {"numba", "llvmlite", "torch", "cffi", "_cffi_backend", "ml_dtypes", "scipy", "sklearn", "matplotlib"}


def test_import_needs_numpy_alone():
    assert output_of(LOADED.format(code="import fastdrop", names=HEAVY)) == ""
    loaded = "print([name for name in ('fastdrop._native', 'numpy.random', 'fractions') if name in sys.modules])"
    found = output_of(f"import numpy, sys; sys.modules.pop('numpy.random', None); import fastdrop; {loaded}")
    assert found == "[]"


@pytest.mark.parametrize("name", USABLE)
def test_environment_forces_a_backend_and_only_that_is_loaded(name):
    code = "import numpy as np, fastdrop as fd; fd.dropout(np.ones(5), 0.5); print(fd.backends.active_name())"
    ran, *loaded = output_of(LOADED.format(code=code, names=HEAVY), FASTDROP_BACKEND=name).split()
    assert ran == name
    assert set(loaded) <= {"c": {"_cffi_backend"}, "numba": HEAVY - {"torch"}, "numpy": set()}[name]


# ---- layers ----

# Imports point downward only: from a room to one before it.
ROOMS = [
    "core",
    "backends",
    "arrays",
    "schedules",
    "",  # fastdrop itself: the public names
    "torch/runtime",
    "torch/ops",
    "torch/functional",
    "torch/nn",
    "torch/models",
    "torch/tools",
    "torch",  # itself: the public names
    "integrations",
    "cli",
    "__main__",
]
NUMBA = ("backends/numba/", "backends/cuda/")
MAY_IMPORT = {  # top-level package: where in fastdrop it may be imported
    "torch": ("torch/", "cli/", "integrations/"),
    "transformers": ("integrations/transformers.py",),
    "lightning": (),  # by name
    "numba": NUMBA,
    "llvmlite": NUMBA,
    "cuda": ("backends/cuda/",),
    "cffi": (),
    "ml_dtypes": ("cli/", "torch/"),
    "sklearn": (),
    "matplotlib": ("cli/",),
    "rich": (),
}
SOURCES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]


def imports(source):
    """Dotted names of everything a source of fastdrop imports, at its top or within functions."""
    package = ["fastdrop", *source.parent.parts]
    for node in ast.walk(ast.parse((PACKAGE / source).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_of(dotted):
    """The source that a dotted import reaches, without its ending: of a name its module."""
    path = Path(*dotted.split(".")[1:])
    while path.parts and path.with_suffix(".py") not in SOURCES and path / "__init__.py" not in SOURCES:
        path = path.parent
    return path


def room(module):
    """Where the room of a source is in ROOMS."""
    named = module.as_posix().removesuffix(".py").removesuffix("__init__").strip("/")
    found = [i for i, name in enumerate(ROOMS) if named == name or (name and named.startswith(name + "/"))]
    assert found, f"fastdrop/{module} has no room in ROOMS yet"
    return found[0]


def test_imports_point_downward_and_heavy_packages_stay_in_their_places():
    for source in SOURCES:
        for name in imports(source):
            if name.split(".")[0] == "fastdrop" and name not in ("fastdrop.__version__", "fastdrop._native"):
                assert room(module_of(name)) <= room(source), f"{source} imports {name}"
            places = MAY_IMPORT.get(name.split(".")[0])
            assert places is None or source.as_posix().startswith(places), f"{source} imports {name}"
            assert name != "fastdrop._native" or source.as_posix() == "backends/c.py"


def test_a_name_with_an_underscore_is_used_in_its_own_file_only():
    for source in SOURCES:
        nodes = list(ast.walk(ast.parse((PACKAGE / source).read_text())))
        ours = [n for n in nodes if isinstance(n, ast.ImportFrom) and (n.level or n.module == "fastdrop")]
        imported = {alias.asname or alias.name for node in ours for alias in node.names}
        used = {
            node.attr
            for node in nodes
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported
        }
        private = {name for name in imported | used if name.startswith("_") and not name.endswith("__")}
        assert not private, source


def test_backends_do_not_import_each_other():
    """But for CUDA, whose kernels are made of the scalars that Numba's are made of. All use the table and policy."""
    places = {"c.py": "c", "reference/": "reference", "numba/": "numba", "cuda/": "cuda"}
    for source in SOURCES:
        own = next((name for place, name in places.items() if source.as_posix().startswith("backends/" + place)), None)
        for name in imports(source) if own else ():
            reached = module_of(name).parts[1:2] if module_of(name).parts[:1] == ("backends",) else ()
            shared = own == "cuda" and name.startswith(
                ("fastdrop.backends.numba.scalars", "fastdrop.backends.numba.math")
            )
            allowed = own, "primitives", "generate", "memory"
            assert shared or not reached or reached[0] in allowed, f"{source} imports {name}"


def test_public_names():
    assert sorted(fd.__all__) == fd.__all__
    for name in fd.__all__:
        assert getattr(fd, name).__doc__, name
