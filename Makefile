# All commands share one virtual environment (.venv) and one cargo target folder (./target). Stamp
# files record what is done, so a second run only repeats what changed.

VENV    := .venv
BIN     := $(VENV)/bin
RELEASE := .venv-release
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { echo $$p; break; }; done)

# torch-sys builds against the torch of `python` if VIRTUAL_ENV is set, else of `python3`.
ACTIVE := VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(BIN):$$PATH" \
	CARGO_TARGET_DIR="$(CURDIR)/target"
# The variables that maturin sets for pyo3's build scripts. With other values cargo would build pyo3
# and everything above it again.
LIKE_MATURIN = PYO3_PYTHON="$(CURDIR)/$(BIN)/python" \
	PYTHON_SYS_EXECUTABLE="$(CURDIR)/$(BIN)/python" PYO3_ENVIRONMENT_SIGNATURE="$$($(BIN)/python -c \
	'import struct, sys; print("cpython-%d.%d-%dbit" % (*sys.version_info[:2], \
	8 * struct.calcsize("P")), end="")')"
# $(call needs_of,requires): a list of packages in pyproject.toml.
needs_of = $(shell sed -n "s/^$(1) = \[\(.*\)\]/\1/p" pyproject.toml \
	| sed "s/\", \"/' '/g; s/\"/'/g")
RUST_FILES := Cargo.toml Cargo.lock .cargo/config.toml \
	$(shell find src -name '*.rs' -o -name '*.cu' -o -name '*.cuh')
TCH_FILES  := $(wildcard tch/*.* tch/.cargo/* tch/src/*)
PY_PATHS   := python tests benches examples tch/backend.py
# The release that sokd_tch builds against and that the tests' torchvision requires.
DEV_TORCH := 'torch==2.13.*'
PLATFORM ?= $(shell uname -m)
TARGET    = $(PLATFORM)-unknown-linux-gnu
# The Rust tests of another platform run under qemu: apt-get install qemu-user gcc-aarch64-linux-gnu
CARGO_OF  = CARGO_TARGET_$(shell echo $(TARGET) | tr a-z- A-Z_)
EMULATED  = $(if $(filter-out $(shell uname -m),$(PLATFORM)), \
	$(CARGO_OF)_LINKER=$(PLATFORM)-linux-gnu-gcc \
	$(CARGO_OF)_RUNNER="qemu-$(PLATFORM) -L /usr/$(PLATFORM)-linux-gnu" CARGO_BUILD_TARGET=$(TARGET))
# pyo3-tch supports CPython up to 3.13; the other readers are tested everywhere.
TCH := $(shell $(PYTHON) -c 'import sys; print("tch" if sys.version_info < (3, 14) else "")' \
	2>/dev/null)
IN_RELEASE = VIRTUAL_ENV="$(CURDIR)/$(RELEASE)" PATH="$(CURDIR)/$(RELEASE)/bin:$$PATH" \
	CARGO_TARGET_DIR="$(CURDIR)/target"
DEMO ?=
BENCH ?=
SOAK ?=
PYTEST ?=
MATRIX ?= all

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test bench bench-gpu build tch docs soak venv cargo-test pytest format lint \
	types wheel sdist matrix clean needs needs-python needs-rust needs-cxx

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: build $(VENV)/.stamp-data  ## run the demo (options: make demo DEMO="--seeds 5")
	$(BIN)/python -m sokd.demo $(DEMO)

test: build $(TCH) lint types cargo-test pytest  ## before a commit: format, lint, types, all tests

bench: build  ## compare with eager PyTorch; writes benches/results/*.csv (BENCH="--quick")
	KINETO_LOG_LEVEL=99 $(BIN)/python -m benches $(BENCH)

# Uses PYTHON without a build if it can import sokd (from a wheel, for example), else .venv.
bench-gpu:  ## measure on a CUDA device; writes gpu-*.csv there (PYTHON=python3, BENCH="--quick")
	@if "$(PYTHON)" -c 'import sokd' 2>/dev/null; \
	then set -x; "$(PYTHON)" -m benches.bench_gpu $(BENCH); \
	else $(MAKE) --no-print-directory build && set -x \
		&& $(BIN)/python -m benches.bench_gpu $(BENCH); fi

build: $(VENV)/.stamp-build  ## compile the extension and install it into .venv

tch: $(VENV)/.stamp-tch  ## compile sokd_tch, the reader through libtorch, for the torch of .venv

wheel: $(RELEASE)/.stamp needs-rust  ## build and check dist/*.whl (PLATFORM=aarch64)
	@if command -v rustup >/dev/null; then rustup target add $(TARGET); fi
	$(IN_RELEASE) maturin build --release --locked --zig --target $(TARGET) \
		--compatibility manylinux2014 --auditwheel check --out dist
	@for wheel in dist/sokd-*$(PLATFORM).whl; do set -ex; $(IN_RELEASE) auditwheel show "$$wheel"; \
		$(IN_RELEASE) abi3audit --strict --report "$$wheel"; \
		$(IN_RELEASE) twine check --strict "$$wheel"; \
		test "$$(wc -c < "$$wheel")" -lt 2000000; done

matrix: wheel  ## test the wheel in fresh environments; writes docs/compatibility.md (MATRIX=ci, =2.9)
	$(RELEASE)/bin/python tests/matrix dist/sokd-*$$(uname -m).whl --rows "$(MATRIX)"

sdist: $(RELEASE)/.stamp needs-rust  ## build dist/*.tar.gz, which compiles without torch
	$(IN_RELEASE) maturin sdist --out dist
	$(IN_RELEASE) twine check --strict dist/sokd-*.tar.gz

docs: build $(VENV)/.stamp-docs  ## build the documentation site in out/docs and test it
	$(BIN)/python -m sphinx -n -W --keep-going -q -b html docs out/docs
	$(BIN)/python -m pytest -q tests/package/test_docs.py

soak: build  ## long random tests; writes docs/reliability.md (SOAK="--scale 100": hours)
	PYTHONPATH=tests $(BIN)/python -W ignore -m soak $(SOAK)

venv: $(VENV)/.stamp-needs  ## make .venv with the maturin for the build

cargo-test: | needs-rust  ## run the Rust tests only (PLATFORM=aarch64: under qemu, slow)
	$(ACTIVE) $(EMULATED) cargo test --locked --features cuda

pytest: build $(VENV)/.stamp-data  ## run the Python tests only (PYTEST="-k masked_mse")
	$(BIN)/python -m pytest $(PYTEST)

format: build  ## format the sources
	$(ACTIVE) cargo fmt
	cd tch && cargo fmt
	$(BIN)/ruff check --fix $(PY_PATHS)
	$(BIN)/ruff format $(PY_PATHS)

lint: build  ## run cargo fmt, clippy and ruff; warnings are errors
	$(ACTIVE) cargo fmt --check
	$(ACTIVE) cargo clippy --locked --all-targets -- -D warnings
	$(ACTIVE) $(LIKE_MATURIN) cargo clippy --locked --release --lib --features python,cuda -- \
		-D warnings
	cd tch && cargo fmt --check
	$(BIN)/ruff check $(PY_PATHS)
	$(BIN)/ruff format --check $(PY_PATHS)

types: build  ## run mypy --strict, and stubtest on the compiled module
	$(BIN)/mypy python/sokd benches tests/package/user_script.py
	$(BIN)/stubtest sokd._core --mypy-config-file pyproject.toml

clean:  ## remove all build outputs (.venv too)
	rm -rf $(VENV) $(RELEASE) target tch/target out dist build
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find python tests benches -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f python/sokd/_core*.so

# --- the prerequisites of the commands ---

$(VENV)/pyvenv.cfg: | needs
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-needs: pyproject.toml $(VENV)/pyvenv.cfg | needs
	@# an interrupted run leaves it incomplete
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(call needs_of,requires) $(DEV_TORCH)
	@touch $@

$(VENV)/.stamp-build: $(VENV)/.stamp-needs $(RUST_FILES) | needs
	$(ACTIVE) $(BIN)/maturin develop --release --locked --extras demo,test,check
	@touch $@

# torch-sys takes minutes to compile, once per torch release.
$(VENV)/.stamp-tch: $(VENV)/.stamp-build $(TCH_FILES) | needs needs-cxx
	cd tch && $(ACTIVE) $(CURDIR)/$(BIN)/maturin develop --release --locked
	@touch $@

$(RELEASE)/.stamp: pyproject.toml | needs-python
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet $(call needs_of,release)
	@touch $@

$(VENV)/.stamp-docs: pyproject.toml $(VENV)/.stamp-build
	$(BIN)/python -m pip install --quiet $(call needs_of,docs)
	@touch $@

# --no-deps: animal-mnist requires tensorflow, which is not used.
$(VENV)/.stamp-data: $(VENV)/.stamp-needs
	$(BIN)/python -m pip install --quiet --no-deps 'animal-mnist==0.4.*'
	@touch $@

needs: needs-python needs-rust

needs-python:
	@test -n "$(PYTHON)" || { echo "sokd needs Python 3.10 or newer with venv:" \
		"sudo apt-get install python3-venv (or brew install python, dnf install python3)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
		|| { echo "sokd needs Python 3.10 or newer, got PYTHON=$(PYTHON)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; header = os.path.join(sysconfig.get_path("include"), \
		"Python.h"); sys.exit(not os.path.exists(header))' || { echo "sokd needs the headers of" \
		"$(PYTHON): sudo apt-get install python3-dev (or dnf install python3-devel)" >&2; exit 1; }

needs-rust:
	@command -v cargo >/dev/null && command -v rustc >/dev/null \
		|| { echo "sokd needs Rust 1.89 or newer:" \
		"curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" >&2; exit 1; }
	@rustc --version | awk '{split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 89)}' \
		|| { echo "sokd needs Rust 1.89 or newer, found $$(rustc --version):" \
		"rustup update stable" >&2; exit 1; }

needs-cxx:
	@set -- $${CXX:-c++}; command -v "$$1" >/dev/null || { echo "sokd-tch needs a C++ compiler:" \
		"sudo apt-get install g++ (or dnf install gcc-c++, xcode-select --install)" >&2; exit 1; }
