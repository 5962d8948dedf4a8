.PHONY: demo test test-slow docs style quality clean

PYTHON ?= python3
export PROMPT ?= a red apple
BIN := .venv/bin
SOURCES := src pipelines spaces tests benchmarks docs

# One environment for everything; made again when what it holds changes.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs,test,quality]"
	touch $@

demo: .venv/installed  ## draw PROMPT with the checkpoint that ships with the package
	$(BIN)/llamagen generate "$$PROMPT" --output demo.png

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

docs: .venv/installed  ## write docs/api from the docstrings
	$(BIN)/python docs/make_api.py

style: .venv/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

clean:
	rm -rf .venv demo.png
