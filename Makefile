# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-oldest lint clean
export OMP_WAIT_POLICY ?= PASSIVE

demo: $(VENV)/installed
	$(BIN)/voroq demo --out demo-output

test: $(VENV)/installed
	$(BIN)/ruff check voroq tests benchmarks examples
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The other end of the supported transformers window.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile voroq/integrations voroq/pipeline tests

lint: $(VENV)/installed
	$(BIN)/ruff check voroq tests benchmarks examples

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -c constraints.txt 'transformers==5.18.0' -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest demo-output
