# Everything starts from Python 3.11 and pip; each target makes the environment that it needs, of what the lock names.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto
PYTEST := -m pytest --numprocesses $(WORKERS) --dist loadgroup
# Whole groups of contract tests run on every supported series; `make test` has the newest.
COMPAT := 4.57.6 5.19.0

.SECONDARY: # environments are kept
.PHONY: demo test test-all test-compat lint format lock canary lab results benchmark clean

demo: $(VENV)/.installed-eval
	$(BIN)/foveate demo demo

test: $(VENV)/.installed-test
	$(BIN)/python $(PYTEST) -m 'not slow'

test-all: $(VENV)/.installed-test
	$(BIN)/python $(PYTEST)

test-compat: $(COMPAT:%=test-compat-%)

test-compat-%: .venv-%/.installed-test
	.venv-$*/bin/python -c "import transformers; assert transformers.__version__ == '$*', transformers.__version__"
	.venv-$*/bin/python $(PYTEST) -m contract_core tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml # from there, so that it sees the package as it is installed

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Versions that stand in constraints.txt stay; UPGRADE="transformers peft" raises these to the newest that setup.cfg allows.
lock:
	test -x .venv-lock/bin/uv || { $(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet uv; }
	printf 'pip\nsetuptools\n' | .venv-lock/bin/uv pip compile - setup.cfg --quiet --all-extras --universal \
	    --python-version 3.10 --no-annotate --custom-compile-command 'make lock' --output-file constraints.txt \
	    $(UPGRADE:%=--upgrade-package %)

# The newest release of everything, whatever setup.cfg and the lock allow; CANARY_TRANSFORMERS names another Transformers.
CANARY_TRANSFORMERS ?= transformers
canary:
	test -x .venv-canary/bin/python || $(PYTHON) -m venv .venv-canary
	.venv-canary/bin/python -m pip install --quiet --upgrade pip packaging
	.venv-canary/bin/python -m pip install --quiet --no-deps $(STRICT) --editable .
	.venv-canary/bin/python tests/canary.py --requirements '$(CANARY_TRANSFORMERS)' > .venv-canary/requirements.txt
	.venv-canary/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -r .venv-canary/requirements.txt
	.venv-canary/bin/python tests/canary.py

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
	$(BIN)/python -m benchmarks.compression
	$(BIN)/python -m benchmarks.encoder
	$(BIN)/python -m benchmarks.prefill
	$(BIN)/python -m benchmarks.eviction
	$(BIN)/python -m benchmarks.fusion

# A strict development install is a folder of links, one a file, which every tool can follow. A new file needs a new one.
PACKAGE := configuration conversion evaluation foveate hub_cards lab modeling processing training
STRICT := --config-settings editable_mode=strict
INSTALL := -m pip install --quiet $(STRICT) --constraint constraints.txt --build-constraint constraints.txt

.PHONY: list-files
build/files.txt: list-files
	@mkdir -p build
	@find $(PACKAGE) -name __pycache__ -prune -o -path lab/work -prune -o -path lab/results -prune -o -type f -print | LC_ALL=C sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt build/files.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python $(INSTALL) --editable '.[$*]'
	touch $@

# Older versions of Transformers go with the lock but for their own line; the oldest goes with the oldest of everything
# else. `make test` is without torchao: on the newest torch it warns on import, of torch, into every command's output.
.venv-%/.installed-test: setup.cfg pyproject.toml constraints.txt tests/lower-bounds.txt build/files.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	grep -vE '^(transformers|huggingface-hub|tokenizers)==' constraints.txt > .venv-$*/constraints.txt
	echo 'transformers==$*' >> .venv-$*/constraints.txt
	test '$*' != 4.57.6 || cp tests/lower-bounds.txt .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet $(STRICT) --constraint .venv-$*/constraints.txt \
	    --build-constraint constraints.txt 'transformers==$*' --editable '.[test,int8]'
	touch $@

clean:
	rm -rf .venv* demo build dist *.egg-info
