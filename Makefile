# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Set TORCH to the build for your machine, e.g. TORCH="torch==2.13.0" (CPU or CUDA, whatever your package index gives).
TORCH ?= torch==2.13.0
EXTRAS ?= triton,quantize,test,bench,dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.fastedit-$(EXTRAS)
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: run tradeoff test check bench clean install

install: $(STAMP)

$(STAMP): $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" wheel "cmake>=3.26" ninja
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $(STAMP)

# The main job on the embedded model: a table on the terminal, a JSON file and a picture under runs/; then a small
# measurement of speed, with a page of its own.
run: install
	$(BIN)/fastedit compare --model pocket-llava --data pocket-vqa --limit 100 --set layers=2 --out runs/first
	$(BIN)/python benchmarks/throughput.py --quick --html runs/first/throughput.html

# The same on 200 edits: narrower intervals, some minutes on two cores.
tradeoff: install
	$(BIN)/fastedit compare --model pocket-llava --data pocket-vqa --limit 200 --set layers=2 --out runs/tradeoff

test: install
	FASTEDIT_REQUIRE_NATIVE=1 FASTEDIT_EXPECT=cpu:csrc,triton:interpreted OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" | xargs $(BIN)/clang-format --dry-run --Werror

bench: install
	$(BIN)/python benchmarks/throughput.py

clean:
	rm -rf build dist *.egg-info
