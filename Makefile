# make demo    train, evaluate and export Inception v3 on a generated data set, in minutes on a laptop
# make test    everything that needs no accelerator
# make check   style, types and shell scripts: ruff, mypy, shellcheck
# make bench   speed comparisons; writes docs/benchmarks.json and the tables
# make tables  the tables of the READMEs and of docs/, from results.json and docs/benchmarks.json
# make check-npu-api   the names used of torch_npu against its real wheel, which is downloaded (40 MB)
# make chaos   kills, torn files and full disks: 280 faults on a tiny network, 20 kills on each model
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv demo test check bench tables chaos check-npu-api

# Runs pip only when a requirement file changed since.
venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt
	bash tools/make_venv.sh $(PYTHON) $(VENV)

demo: venv
	$(BIN)/python tools/quickstart.py

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # more threads than cores wait for each other

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(git ls-files '*.sh' .ci/run)

bench: venv
	for name in training pipeline deploy index checkpoint; do \
	  $(BIN)/python tests/bench/bench_$$name.py --record docs/benchmarks.json || exit 1; done
	$(BIN)/python tools/make_tables.py

tables: venv
	$(BIN)/python tools/make_tables.py

check-npu-api: venv
	$(BIN)/python tests/check_npu_api.py

chaos: venv
	$(BIN)/python tests/chaos/chaos.py --faults 280
	for model in $$($(BIN)/python tools/models.py); do $(BIN)/python tests/chaos/chaos.py --model $$model --faults 20 || exit 1; done
