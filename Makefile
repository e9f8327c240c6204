# make demo and make test do all their set-up themselves, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CC ?= cc
CROSS ?= aarch64-linux-gnu-gcc
EMULATOR ?= qemu-aarch64

C_SOURCES := $(wildcard csrc/*.c)
C_HEADERS := $(wildcard csrc/*.h csrc/*.def)
C_TEST := $(C_SOURCES) tests/c/kernels_test.c
C_FLAGS := -std=c11 -O1 -g -Wall -Wextra -Werror -ffp-contract=off -fno-math-errno -Icsrc -pthread
C_FORMATTED := $(filter-out csrc/ops.def,$(C_TEST) $(C_HEADERS)) tests/c/cuda_stub.c
OUT := build/c

.PHONY: help demo test bench bench-quick bench-torch bench-family bench-fused cuda-report report lint format sanitize test-c test-neon package clean

help:
	@echo "make demo       train a network in NumPy and a transformer in torch, beside what is used today; two pictures"
	@echo "make test       the whole test suite"
	@echo "make bench      plain dropout, every kernel (about a quarter of an hour), then the report"
	@echo "                bench-quick: the speed table alone; bench-torch: torch's function and training steps"
	@echo "                bench-family: the other kinds of dropout; bench-fused: fused kernels"
	@echo "make cuda-report  the CUDA kernels compiled for three GPUs, none needed: registers, widths, instructions"
	@echo "make lint       ruff, mypy, clang-format; make format applies the formatters"
	@echo "make sanitize   the C kernels under the address, undefined-behaviour and thread sanitizers"
	@echo "make test-neon  the Arm kernels, cross-compiled and emulated"
	@echo "make package    wheel and sdist, installed in clean environments and self-tested"

# The stamp stands for: the pinned packages are there, and fastdrop is built and installed in place.
$(VENV)/.packages: requirements-dev.txt
	@echo "== creating $(VENV) and installing the pinned packages (a minute or two, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(C_SOURCES) $(C_HEADERS) csrc/ffi_build.py setup.py pyproject.toml
	@echo "== building the C extension"
	FASTDROP_CFLAGS="-Wall -Wextra" $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: $(VENV)/.built
	@echo "== demo"
	$(BIN)/python -m fastdrop demo
	@echo "== the same for torch: a small transformer, with torch's dropout and with fastdrop's"
	$(BIN)/python examples/transformer.py --quick --output fastdrop-transformer.png

test: $(VENV)/.built
	@echo "== test suite and doctests"
	$(BIN)/python -m pytest -q -n 2

bench: $(VENV)/.built
	@echo "== benchmarks"
	$(BIN)/python bench/run.py

bench-quick: $(VENV)/.built
	$(BIN)/python bench/run.py --quick

bench-torch: $(VENV)/.built
	$(BIN)/python bench/run.py --torch

bench-family: $(VENV)/.built
	$(BIN)/python bench/run.py --family

bench-fused: $(VENV)/.built
	$(BIN)/python bench/run.py --fused

cuda-report: $(VENV)/.built
	$(BIN)/python -m bench.cuda_report

report: $(VENV)/.built
	$(BIN)/python -m bench.report bench/results/all.json
	$(BIN)/python -m bench.report_torch bench/results/torch.json
	$(BIN)/python -m bench.report_family bench/results/family.json
	$(BIN)/python -m bench.report_fused bench/results/fused.json

lint: $(VENV)/.packages
	@echo "== ruff, mypy, clang-format"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(C_FORMATTED)

format: $(VENV)/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FORMATTED)

$(OUT)/golden.txt: tests/c/golden.py fastdrop/vectors/masks.json
	@mkdir -p $(OUT)
	$(PYTHON) tests/c/golden.py > $@

$(OUT)/kernels-%: $(C_TEST) $(C_HEADERS)
	@mkdir -p $(OUT)
	$(CC) $(C_FLAGS) $(SANITIZE_$*) $(C_TEST) -o $@

SANITIZE_plain :=
SANITIZE_address := -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZE_thread := -fsanitize=thread

test-c: $(OUT)/kernels-plain $(OUT)/golden.txt
	@echo "== C kernels"
	$< $(OUT)/golden.txt

# The thread sanitizer's shadow memory wants addresses where they were without randomisation.
sanitize: $(OUT)/kernels-address $(OUT)/kernels-thread $(OUT)/golden.txt
	@echo "== C kernels, address and undefined-behaviour sanitizers"
	$(OUT)/kernels-address $(OUT)/golden.txt
	@echo "== C kernels, thread sanitizer"
	setarch -R $(OUT)/kernels-thread $(OUT)/golden.txt

test-neon: $(OUT)/golden.txt
	@if command -v $(CROSS) > /dev/null && command -v $(EMULATOR) > /dev/null; then \
	    echo "== C kernels for AArch64, emulated" && \
	    $(CROSS) $(C_FLAGS) -static $(C_TEST) -o $(OUT)/kernels-neon && \
	    $(EMULATOR) $(OUT)/kernels-neon $(OUT)/golden.txt; \
	else \
	    echo "test-neon: skipped, needs $(CROSS) and $(EMULATOR) (Debian: apt-get install gcc-aarch64-linux-gnu" \
	         "libc6-dev-arm64-cross qemu-user)"; \
	fi

package: $(VENV)/.packages
	PYTHON="$(abspath $(BIN))/python" sh tests/package.sh

clean:
	rm -rf build dist $(VENV) fastdrop/_native*.so fastdrop.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
