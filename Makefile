PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-slow test-all triton lint sanitize soak clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 18

setup:  ## create .venv with everything in it
	@$(PYTHON) tools/bootstrap.py

demo: setup  ## serve a small model with a KIVI cache and ask it something
	@$(BIN)/kivi-vllm demo

# Two workers; tests/conftest.py says what goes where. The second line: Triton's kernels interpreted.
PYTEST = $(BIN)/python -m pytest -n 2
define tests
	$(PYTEST) $(1)
	TRITON_INTERPRET=1 $(PYTEST) $(1) tests/triton
endef

test: lint  ## lint, types and something of every part (at most 10 minutes)
	$(call tests,-m "not slow")

test-slow: setup  ## the tests that make test leaves out
	$(call tests,-m slow)

test-all: setup  ## all tests (about half an hour)
	$(call tests,)

TRITON ?= 3.8.0
OTHER = $(CURDIR)/build/triton-$(TRITON)

triton: setup  ## the compiled GPU kernels with another Triton: make triton TRITON=3.6.0
	test -d $(OTHER) || $(BIN)/python -m pip install -q --no-deps --target $(OTHER) "triton==$(TRITON)"
	PYTHONPATH=$(OTHER) TRITON_CACHE_DIR=$(OTHER)/cache \
	    $(PYTEST) -rA tests/ptx tests/unit/test_compile.py

lint: setup  ## ruff, mypy, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

SANITIZED = build/$(1)/kivi_vllm/ops/cpu/libkivi_cpu.so
define sanitize
	CXXFLAGS="-fsanitize=$(1) -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1" \
	    $(BIN)/python setup.py -q build_ext --build-lib build/$(1)
	KIVI_VLLM_CPU_LIBRARY=$(call SANITIZED,$(1)) LD_PRELOAD="$$($${CXX:-g++} -print-file-name=$(2))" \
	    ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -q -n 2 tests/unit/test_native.py tests/unit/test_native_codes.py tests/unit/test_native_input.py \
	    tests/unit/test_select.py
endef

sanitize: setup  ## the CPU kernels under address and undefined behaviour sanitizers
	$(call sanitize,address,libasan.so)
	$(call sanitize,undefined,libubsan.so)

soak: setup  ## thousands of requests, cancels, kills and restarts (about 20 minutes)
	KIVI_SOAK_REQUESTS=$${KIVI_SOAK_REQUESTS:-3000} KIVI_SOAK_SECONDS=$${KIVI_SOAK_SECONDS:-300} \
	    $(BIN)/python -m pytest -n 2 --timeout 2400 tests/soak

clean:  ## remove .venv and everything built (the model cache stays)
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find kivi_vllm tests tools -name __pycache__ -prune -exec rm -rf {} +
	find kivi_vllm -name '*.so' -delete
