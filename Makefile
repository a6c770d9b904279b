PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test lint clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup:  ## create .venv with everything in it
	@$(PYTHON) tools/bootstrap.py

demo: setup  ## serve a small model with the 2-bit cache and ask it something
	@$(BIN)/kivi-vllm demo

test: lint  ## lint, types and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove .venv and everything built (the model cache stays)
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find kivi_vllm tests tools -name __pycache__ -prune -exec rm -rf {} +
	find kivi_vllm -name '*.so' -delete
