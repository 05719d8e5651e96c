# Everything starts from Python 3.11 and pip; each target makes the environment that it needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Whole groups of contract tests run on every supported series; `make test` has the newest.
COMPAT := 4.57.6 5.17.0

.SECONDARY: # environments are kept
.PHONY: demo test test-compat lint format lab results benchmark clean

demo: $(VENV)/.installed-eval
	$(BIN)/foveate demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-compat: $(COMPAT:%=test-compat-%)

test-compat-%: .venv-%/.installed-test
	.venv-$*/bin/python -c "import transformers; assert transformers.__version__ == '$*', transformers.__version__"
	.venv-$*/bin/python -m pytest -m contract_core tests/contract

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(VENV)/.installed-test
	$(BIN)/python -m foveate.lab.train
	$(BIN)/python -m foveate.lab.next
	$(BIN)/python -m foveate.lab.qwen3vl
	$(MAKE) results

results: $(VENV)/.installed-test
	$(BIN)/python -m foveate.lab.experiments
	test -e lab/results/kept.json || $(BIN)/python -m foveate.lab.kept $(KEPT:%=lab/work/trained/qg-vtc-18%) --json lab/results/kept.json
	test -e lab/results/matrices.json || $(BIN)/python -m foveate.lab.matrices $(MATRICES) --limit 200 --json lab/results/matrices.json --show lab/results/matrices.png
	$(BIN)/python -m foveate.evaluation.results

MATRICES := lab/work/converted/metacompress lab:tiny-llava-metacompress-90 \
    $(patsubst %,lab/work/trained/metacompress-90-%-seed0,pred pred-clipped collapse clip) lab:tiny-llava-metacompress-50
KEPT := -seed0-stage0 -seed0 -fast-seed0 -fast-seed1 -question-seed0 -question-fast-seed0 -recycle-seed0 -neither-seed0

benchmark: $(VENV)/.installed-eval
	$(BIN)/python -m foveate.evaluation.benchmark_compression
	$(BIN)/python -m foveate.evaluation.benchmark_encoder
	$(BIN)/python -m foveate.evaluation.benchmark_prefill
	$(BIN)/python -m foveate.evaluation.benchmark_eviction
	$(BIN)/python -m foveate.evaluation.benchmark_fusion

$(VENV)/.installed-%: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

# The oldest supported Transformers is tested with the oldest of everything else. `make test` is without torchao: on the
# newest torch it warns on import, of torch, into the output of every command.
.venv-4.57.6/.installed-test: OLDEST := --constraint tests/lower-bounds.txt

.venv-%/.installed-test: setup.cfg pyproject.toml tests/lower-bounds.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet $(OLDEST) 'transformers==$*' --editable '.[test,int8]'
	touch $@

clean:
	rm -rf .venv* demo build *.egg-info
