# All of this needs nothing but Python 3.11 or 3.12 and make. The first call makes .venv.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= out/gpu

PARALLEL := -n auto --maxprocesses 4 --dist worksteal

REAL ?= out/smollm2
MINUTES ?= 10
SEED ?= 0

.PHONY: demo check test fuzz lint compile bench real tune gpu clean

demo: .venv/demo
	$(BIN)/homer demo

# Whether a change broke something, in two minutes.
check: lint
	$(BIN)/python -m pytest -q $(PARALLEL) --hypothesis-profile quick \
		-m "not (slow or process or interpreter or gpu)"

test: .venv/ready
	$(BIN)/python -m pytest -q $(PARALLEL)
	$(BIN)/python bench/compile.py

# FUZZ="--trees 10000 --kills 200" bounds what is tried; a failing seed is tried again by
# FUZZ="--kinds trees --seed N --trees 1".
fuzz: .venv/ready
	PYTHONPATH=tests $(BIN)/python -m fuzz --minutes $(MINUTES) --seed $(SEED) $(FUZZ)

compile: .venv/ready
	$(BIN)/python bench/compile.py

bench: .venv/ready
	$(BIN)/python bench/kernels.py
	$(BIN)/python -m pytest bench/micro.py --benchmark-only
	$(BIN)/python bench/encode.py

# TEXTS="novel.txt another.txt"; what is done already is not done again.
real: .venv/ready
	$(INSTALL) gguf accelerate
	$(BIN)/python bench/smollm2.py $(REAL)
	$(BIN)/python bench/real.py --model $(REAL) $(foreach text,$(TEXTS),--text $(text))
	$(BIN)/python bench/tables.py

# Measures the kernels' sizes on this GPU and writes the winners to kernels/tiles.json.
tune: .venv/ready
	$(BIN)/python bench/tune.py

gpu: .venv/ready
	$(BIN)/python bench/gpu.py --out $(OUT)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only what the package needs.
.venv/demo: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "homer_triton needs Python 3.11 or 3.12 on the PATH (or PYTHON=/path/to/python)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e .
	touch $@

.venv/ready: .venv/demo
	$(INSTALL) -e '.[dev,plots]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info out
