# make demo   the main job, end to end, at the true size of Granite-3.0-1B-A400M
# make quick  the inner loop (five minutes were the aim; not reached on two cores, see CONTRIBUTING.md)
# make test   all that CI runs
# make full   every cell of every table, and docs/zoo.md written anew
# make interpreted  device code in Triton's interpreter, on a CPU
# make peers  the experts of other libraries, which really run there (an environment of its own, 0.3 GB to download)

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
# each worker of xdist has one thread: two teams of threads on the same cores wait for each other most of the time
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# many models, many samples or a compiler: left out of the inner loop (`make interpreted` is that of device code)
BROAD := zoo properties device_code kernels/test_steady_path.py routers/test_op.py routers/test_zoo.py e2e/test_isolation.py e2e/test_fp8_models.py e2e/test_training.py

PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed

# in a process of its own: the interpreter takes the place of the compiler for all of it
INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) tests/device_code tests/kernels/test_experts.py

.PHONY: demo quick test full interpreted peers lint format clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

quick: $(STAMP)
	$(BIN)/ruff check .
	$(PYTEST) -x -m "not slow and not gpu" $(BROAD:%=--ignore=tests/%)

# the tests run even where a linter complains, so that one run shows everything
test: $(STAMP)
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	$(PYTEST) -m "not slow" || status=1; \
	$(INTERPRETED) -m "not slow" || status=1; exit $$status

full: $(STAMP)
	@status=0; $(MAKE) --no-print-directory lint || status=1; \
	$(PYTEST) || status=1; \
	$(INTERPRETED) || status=1; \
	$(BIN)/python -m tests.zoo.run --write docs/zoo.md || status=1; exit $$status

interpreted: $(STAMP)
	$(INTERPRETED)

$(PEERS_STAMP): pyproject.toml constraints.txt constraints-peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -e ".[test]"
	$(PEERS)/bin/python -m pip install --quiet --no-deps -r constraints-peers.txt
	touch $@

peers: $(PEERS_STAMP)
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -n $(JOBS) tests/kernels/test_librar*.py tests/e2e/test_libraries.py tests/e2e/test_quantised_libraries.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis moe_fx_dump
