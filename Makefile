# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.py csrc/cpu/*)

.PHONY: demo test test-oldest conformance lint clean
test test-oldest conformance: export OMP_WAIT_POLICY ?= PASSIVE

demo: $(VENV)/installed
	$(BIN)/voroq demo --out demo-output

test: $(VENV)/installed
	$(BIN)/ruff check voroq tests benchmarks examples csrc
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The other end of the supported transformers window: the tests that meet transformers.
MEETING := voroq/integrations voroq/streaming_test.py tests/end_to_end_test.py tests/hostile_test.py tests/refusals_test.py $(patsubst %,voroq/pipeline/%_test.py,\
	calibration capture gradients guide interleave model observe prune roles rotate run source text tiny_models tiny_runs tune)
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(MEETING)

# What the official vptq package makes of our files and we of its; it lives in an environment of its own, on the CPU.
conformance: $(VENV)/installed .venv-conformance/installed
	VOROQ_RESULTS=conformance/results.txt $(BIN)/python -m pytest -c conformance/pytest.ini --rootdir conformance conformance

lint: $(VENV)/installed
	$(BIN)/ruff check voroq tests benchmarks examples csrc

$(VENV)/installed: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -c constraints.txt 'transformers==5.18.0' -e '.[dev]'
	touch $@

# The official package pins much that it does not need to load and run a model: --no-deps, and what it imports.
.venv-conformance/installed: conformance/requirements.txt
	$(PYTHON) -m venv .venv-conformance
	.venv-conformance/bin/python -m pip install --quiet --upgrade pip
	.venv-conformance/bin/python -m pip install --quiet -r conformance/requirements.txt
	.venv-conformance/bin/python -m pip install --quiet --no-deps 'vptq==0.0.5.post1'
	touch $@

# What benchmarks/decode_cpu.py compares with. Packages that pin an older torch come without their dependencies; llama.cpp is compiled
# here, and left out where that fails.
.venv-peers/installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --upgrade pip
	.venv-peers/bin/python -m pip install --quiet -r benchmarks/peers.txt
	.venv-peers/bin/python -m pip install --quiet --no-deps 'vptq==0.0.5.post1' 'aqlm==1.1.7' 'gptqmodel==7.7.0'
	-.venv-peers/bin/python -m pip install --quiet llama-cpp-python
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-conformance .venv-peers demo-output
