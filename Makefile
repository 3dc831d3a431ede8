# Each verb makes .venv if it is missing; nothing else is installed on the machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)
CXX_TESTS := $(wildcard tests/cpp/*.cpp tests/cpp/*.h tests/cpp/*/*/*.h)

.PHONY: help demo test lint format bench clean
help:
	@echo "make demo | test | lint | format | bench | clean"

$(VENV)/installed: pyproject.toml setup.py $(CXX_FILES)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("bagformer needs Python 3.10 or newer; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[data]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[data,test,lint]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/bagformer demo

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) $(CXX_TESTS)
	PATH="$(abspath $(BIN)):$$PATH" sh .ci/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES) $(CXX_TESTS)

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/run.py --quick
	$(BIN)/python -m pytest benchmarks/bench_cpu.py --benchmark-max-time=0.2 --benchmark-columns=median,iqr,rounds
	$(BIN)/python benchmarks/segmentation.py --vocabulary bagformer/assets/vocab.txt \
		--dictionary bagformer/assets/iconpark_sample/entities.txt

clean:
	rm -rf build dist *.egg-info bagformer/*.so .pytest_cache .mypy_cache .ruff_cache demo.html demo.json
