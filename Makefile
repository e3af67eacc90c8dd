# On a fresh machine start with `make quickstart` or `make test`; each creates the virtual environment
# on first use. Only Python 3.11 or later and make are needed.

PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUNS ?= runs

PROCESSES ?= 2
PARALLEL = -n $(PROCESSES) --dist loadscope --no-loadscope-reorder
# Twice --quiet: pip warns about every configured index folder that is missing. Errors still show.
PIP = $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install --constraint constraints.txt

.PHONY: quickstart test drills test-bench test-all fuzz lint map flags ui bench hashes sbom audit clean help

help:
	@echo "make quickstart   pretrain SimCLR and MAE on embedded digits, probe them, show the result"
	@echo "make ui           serve the MLflow UI of the runs"
	@echo "make test         the tests, about three minutes on 2 cores"
	@echo "make drills       faults and clusters: killed workers, lost nodes, full disks, dead servers"
	@echo "make test-bench   the tests of the benchmarks"
	@echo "make test-all     all three"
	@echo "make fuzz         100,000 damaged files, configs, flags and names of each kind, hours"
	@echo "make flags        rewrite the table of flags that detects typos, after a change of a config"
	@echo "make map          print the package's files by floors, from their imports, and update docs"
	@echo "make lint         ruff and pyright"
	@echo "make bench        compare the augmentation's speed on one core with peers (installs them)"
	@echo "make hashes       write constraints-hashes.txt, for pip install --require-hashes"
	@echo "make sbom         write build/sbom.json, the installed packages in CycloneDX"
	@echo "make audit        look the installed packages up in the database of known vulnerabilities"
	@echo "make clean        remove the environment (runs/ stays)"

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "selfray needs Python 3.11 or later; give one with make PYTHON=/path/to/python3"; exit 2; }
	@echo "installing into $(VENV) (once; torch's packages are about 5 GB) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[dev]'
	@$(BIN)/python -c "from selfray.pixels.augment import compile_kernels; compile_kernels()"
	@touch $@

quickstart: $(READY)
	@$(BIN)/python experiments/quickstart.py --output $(RUNS)

test: $(READY)
	@$(BIN)/python -m pytest $(PARALLEL) -m "not long and not bench"

drills: $(READY)
	@$(BIN)/python -m pytest $(PARALLEL) -m long

test-bench: $(READY)
	@$(BIN)/python -m pytest -m bench

test-all: test drills test-bench

fuzz: $(READY)
	@FUZZ_MUTATIONS=100000 $(BIN)/python -m pytest $(PARALLEL) tests/fuzz

flags: $(READY)
	@$(BIN)/python -m selfray.commands.early > $(VENV)/flags.json
	@mv $(VENV)/flags.json platform/selfray/commands/flags.json

# Tools of a release, apart from the environment that they look at.
TOOLS := build/tools
$(TOOLS)/.ready: constraints.txt
	@test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	@$(TOOLS)/bin/python -m pip --quiet --quiet --disable-pip-version-check install uv cyclonedx-bom pip-audit
	@touch $@

hashes: $(TOOLS)/.ready
	@echo "# Every package with the hashes of its files, for Linux on x86-64 and Python 3.11: \`make hashes\` writes it." > build/hashes.txt
	@$(TOOLS)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url \
		--python-platform x86_64-manylinux_2_28 --python-version 3.11 --extra dev \
		--constraint constraints.txt pyproject.toml >> build/hashes.txt
	@mv build/hashes.txt constraints-hashes.txt

sbom: $(READY) $(TOOLS)/.ready
	@$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --of JSON -o build/sbom.json $(BIN)/python
	@echo "build/sbom.json"

# Strict: a package that could not be looked up is a failure, not a clean result.
audit: $(READY) $(TOOLS)/.ready
	@$(TOOLS)/bin/pip-audit --strict --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

map: $(READY)
	@$(BIN)/python tests/house.py

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: $(READY)
	@$(PIP) --editable '.[bench]'
	@# Without dependencies: the extra has all that lightly's transforms need, and its hydra-core
	@# requires an antlr4 of 2021 that conflicts with the tests' S3 server.
	@$(PIP) --no-deps lightly
	@$(BIN)/python benchmarks/augmentation.py --output $(RUNS)/bench/augment.json

ui: $(READY)
	@test -f $(RUNS)/mlflow.db || { echo "there is no $(RUNS)/mlflow.db yet: run make quickstart first"; exit 2; }
	@echo "MLflow will show the runs and their curves here in a few seconds (Ctrl-C stops it):"
	@echo "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART"
	@MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true $(BIN)/mlflow ui \
		--backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db \
		--host 127.0.0.1 --allowed-hosts localhost:5000,127.0.0.1:5000

clean:
	rm -rf $(VENV)
