# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
# Set TORCH to the build for your machine, e.g. TORCH="torch==2.13.0" (CPU or CUDA, whatever your package index gives).
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
# What is installed: the package with what it needs to run; what the tests and the checks need besides, when they are
# asked for. EXTRAS adds to the first: EXTRAS=quantize.
RUN := $(VENV)/.fastedit-run$(if $(EXTRAS),-$(EXTRAS))
TEST := $(VENV)/.fastedit-test
CHECK := $(VENV)/.fastedit-check
DOCS := $(VENV)/.fastedit-docs

.PHONY: run tradeoff test sanitize check bench docs clean install

install: $(RUN)

$(RUN): $(NATIVE_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77" wheel "cmake>=3.26" ninja
	$(PIP) install --no-build-isolation --editable ".$(if $(EXTRAS),[$(EXTRAS)])"
	touch $@

# Requirements alone: the package is there, and is not built again for them.
requirements = $(BIN)/python -c "from setup import EXTRAS; print(*{p for e in '$(1)'.split() for p in EXTRAS[e]}, sep='\n')"

$(TEST): setup.py | $(RUN)
	$(call requirements,triton quantize test bench) > $@.txt
	$(PIP) install --requirement $@.txt
	mv $@.txt $@

$(CHECK): setup.py | $(RUN)
	$(call requirements,dev) > $@.txt
	$(PIP) install --requirement $@.txt
	mv $@.txt $@

$(DOCS): setup.py | $(RUN)
	$(call requirements,docs) > $@.txt
	$(PIP) install --requirement $@.txt
	mv $@.txt $@

# The main job on the embedded model: a table on the terminal, a JSON file and a picture under runs/; then a small
# measurement of speed. Both end in one page, runs/first/report.html.
run: install
	$(BIN)/fastedit compare --model pocket-llava --data pocket-vqa --limit 100 --set layers=2 --out runs/first --overwrite
	$(BIN)/python benchmarks/throughput.py --quick --runs runs/first --data pocket-vqa --html runs/first/report.html

# The same on 200 edits: narrower intervals, some minutes on two cores.
tradeoff: install
	$(BIN)/fastedit compare --model pocket-llava --data pocket-vqa --limit 200 --set layers=2 --out runs/tradeoff --overwrite

test: $(RUN) $(TEST)
	FASTEDIT_REQUIRE_NATIVE=1 FASTEDIT_EXPECT=cpu:csrc,triton:interpreted OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake tests docs/notebooks

# What the ops make of right and wrong arguments and of threads, on a library built with AddressSanitizer: it ends the
# process at the first access beyond a buffer. It and libstdc++ are loaded before Python, which has neither.
sanitize: $(RUN) $(TEST)
	FASTEDIT_BUILD=cpu FASTEDIT_SANITIZE=address $(BIN)/python setup.py --quiet build_ext
	FASTEDIT_LIBRARY=build/address FASTEDIT_REQUIRE_NATIVE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	$(BIN)/python -m pytest -n 2 -p no:cacheprovider -p no:faulthandler tests/ops \
	-k "not triton and (test_arguments or test_threads or (csrc and equals_reference))"

check: $(RUN) $(CHECK)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(RUN) $(TEST)
	$(BIN)/python benchmarks/throughput.py

# The documentation, into site/: open site/index.html, no server and no network needed.
docs: $(RUN) $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info
