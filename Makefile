# make help lists the targets. Variables: PYTHON, VENV, TORCH, PARITY_VENV, INTEROP_VENV, EXAMPLES_VENV, FUZZ,
# LLAMA_CPP_PYTHON, LLAMA_CPP_SOURCE, LLAMA_CPP_NATIVE, SYNTHETIC.

PYTHON ?= python3
VENV ?= .venv
CACHE ?= $(HOME)/.cache/phiquant
TORCH ?= torch
PARITY_VENV ?= $(CACHE)/parity
LLAMA_CPP_PYTHON ?= llama-cpp-python==0.3.36
INTEROP_VENV ?= $(CACHE)/interop
EXAMPLES_VENV ?= $(CACHE)/examples
FUZZ ?= 1000
LLAMA_CPP_SOURCE ?= $(CACHE)/llama.cpp
LLAMA_CPP_NATIVE ?= $(CACHE)/llama.cpp-native
SYNTHETIC ?= $(CACHE)/synthetic

BIN := $(VENV)/bin
# The environments outside the clone are shared by clones, so their stamps name what was installed.
DEPENDENCIES := $(shell cksum < pyproject.toml | cut -d' ' -f1)
PARITY_STAMP := $(PARITY_VENV)/.ready-$(DEPENDENCIES)-$(subst =,_,$(TORCH))
EXAMPLES_STAMP := $(EXAMPLES_VENV)/.ready-$(DEPENDENCIES)
INTEROP_STAMP := $(INTEROP_VENV)/.ready-$(subst =,_,$(LLAMA_CPP_PYTHON))
# Two builds of llama.cpp that contract multiplications and additions differently disagree on quantized bytes.
EXACT := CMAKE_ARGS="-DCMAKE_C_FLAGS=-ffp-contract=off -DCMAKE_CXX_FLAGS=-ffp-contract=off"
PIP := -m pip --disable-pip-version-check install --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test slow check docs arm browser examples fuzz parity interop bench bench-speed bench-types bench-load soak table \
	parity-table clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(VENV)/.ready ## convert, quantize and run the bundled model; a table of sizes, times and quality
	$(BIN)/python scripts/demo.py

test: $(VENV)/.ready-tests ## the tests that need neither torch nor llama.cpp
	$(BIN)/python -m pytest -n auto --dist loadscope

slow: $(VENV)/.ready-tests ## the tests that make test leaves out because they take long
	$(BIN)/python -m pytest -n auto --dist loadscope -m 'slow and not parity and not interop and not browser'

arm: $(VENV)/.ready-tests ## the AArch64 kernels, cross-compiled, under qemu-user (installs both with apt-get)
	sh scripts/install_packages.sh
	PHIQUANT_EMULATE=aarch64 $(BIN)/python -m pytest -n auto --dist worksteal tests/kernels

browser: $(VENV)/.ready-tests ## the chat page in Chromium, which has to be installed (Debian: apt-get install chromium)
	$(BIN)/python $(PIP) --prefer-binary --group browser
	$(BIN)/python -m pytest -m browser tests/browser

examples: $(VENV)/.ready-tests $(EXAMPLES_STAMP) ## run examples/ against the server (installs their clients in an environment of its own)
	PHIQUANT_EXAMPLES_PYTHON=$(abspath $(EXAMPLES_VENV))/bin/python $(BIN)/python -m pytest tests/server/test_server_examples.py

fuzz: $(VENV)/.ready-tests ## $(FUZZ) requests of each kind to each endpoint of the server, made by schemathesis (half an hour)
	PHIQUANT_FUZZ=$(FUZZ) $(BIN)/python -m pytest tests/server/test_server_fuzz.py

check: $(VENV)/.ready-tests ## linter, formatting, types, imports between rooms, generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py tests/cli/test_cli_reference.py

docs: $(VENV)/.ready ## write docs/cli.md again
	$(BIN)/python -m phiquant.cli.reference > docs/cli.md

parity: $(PARITY_STAMP) ## compare with transformers (installs $(TORCH) in an environment of its own)
	PYTHONPATH=src $(PARITY_VENV)/bin/python -m pytest -m parity -n auto --dist loadscope

interop: $(VENV)/.ready-tests $(PARITY_STAMP) $(INTEROP_STAMP) ## compare with llama.cpp (builds it: needs a C++ compiler)
	PHIQUANT_INTEROP_PYTHON=$(abspath $(INTEROP_VENV))/bin/python \
	PHIQUANT_LLAMA_CPP_SOURCE=$(abspath $(LLAMA_CPP_SOURCE)) \
	PHIQUANT_PARITY_PYTHON=$(abspath $(PARITY_VENV))/bin/python \
	$(BIN)/python -m pytest -m interop -n auto --dist loadscope

bench: $(VENV)/.ready-tests $(PARITY_STAMP) $(INTEROP_STAMP) ## measure against llama.cpp on a synthetic Phi-3.5-mini (16 GB of disk)
	test -e $(SYNTHETIC)/config.json || $(BIN)/python benchmarks/make_synthetic.py $(SYNTHETIC)
	$(BIN)/python benchmarks/compare_llama_cpp.py $(SYNTHETIC) \
		--peer $(INTEROP_VENV)/bin/python --converter-python $(PARITY_VENV)/bin/python --source $(LLAMA_CPP_SOURCE)

bench-speed: $(VENV)/.ready-tests $(LLAMA_CPP_NATIVE)/bin/llama-quantize $(LLAMA_CPP_NATIVE)-avx2/bin/llama-bench ## speeds of seven file types against llama-bench (an hour)
	test -e $(SYNTHETIC)/config.json || $(BIN)/python benchmarks/make_synthetic.py $(SYNTHETIC)
	test -e $(SYNTHETIC)-F16.gguf || $(BIN)/phiquant convert $(SYNTHETIC) --outfile $(SYNTHETIC)-F16.gguf --outtype f16
	$(BIN)/python benchmarks/compare_speed.py $(SYNTHETIC)-F16.gguf --against $(LLAMA_CPP_NATIVE)/bin/llama-bench
	$(BIN)/python benchmarks/compare_speed.py $(SYNTHETIC)-F16.gguf --against $(LLAMA_CPP_NATIVE)-avx2/bin/llama-bench \
		--types Q4_K_M --prompts 256,512 --generated 0 --lowering avx2 --build 'build for AVX2'

bench-types: $(VENV)/.ready-tests $(INTEROP_STAMP) $(LLAMA_CPP_NATIVE)/bin/llama-quantize ## measure every file type against llama.cpp (an hour)
	test -e $(SYNTHETIC)/config.json || $(BIN)/python benchmarks/make_synthetic.py $(SYNTHETIC)
	test -e $(SYNTHETIC)-F16.gguf || $(BIN)/phiquant convert $(SYNTHETIC) --outfile $(SYNTHETIC)-F16.gguf --outtype f16
	$(BIN)/python benchmarks/compare_types.py $(SYNTHETIC)-F16.gguf --tools $(LLAMA_CPP_NATIVE)/bin --peer $(INTEROP_VENV)/bin/python

bench-load: $(VENV)/.ready-tests $(LLAMA_CPP_NATIVE)/bin/llama-server ## measure the server under load against llama-server (half an hour, alone on the machine)
	test -e $(SYNTHETIC)-8-Q4_K_M.gguf || { $(BIN)/python benchmarks/make_synthetic.py $(SYNTHETIC)-8 --layers 8 && \
		$(BIN)/phiquant quantize $(SYNTHETIC)-8 $(SYNTHETIC)-8-Q4_K_M.gguf Q4_K_M && rm -rf $(SYNTHETIC)-8; }
	$(BIN)/python benchmarks/server_load.py $(SYNTHETIC)-8-Q4_K_M.gguf --against $(LLAMA_CPP_NATIVE)/bin/llama-server

soak: $(VENV)/.ready-tests ## 10,000 requests to the server, clients that leave and malformed ones among them (minutes)
	$(BIN)/python benchmarks/soak.py

table: $(VENV)/.ready-tests $(INTEROP_STAMP) ## write docs/formats/table.md again: every file type, measured (ten minutes, alone on the machine)
	$(BIN)/python $(PIP) --prefer-binary --group plot
	$(BIN)/python benchmarks/format_table.py --peer $(INTEROP_VENV)/bin/python

parity-table: $(VENV)/.ready-tests $(PARITY_STAMP) $(INTEROP_STAMP) ## measure docs/parity.md's table again (minutes)
	$(BIN)/python scripts/parity_table.py --oracle $(PARITY_VENV)/bin/python --peer $(INTEROP_VENV)/bin/python

clean: ## remove what make and the tests made in this folder (the shared environments stay)
	rm -rf $(VENV) build dist demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("phiquant needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) --upgrade 'pip>=25.1'
	$(BIN)/python $(PIP) --prefer-binary --editable .
	@touch $@

$(VENV)/.ready-tests: $(VENV)/.ready
	$(BIN)/python $(PIP) --prefer-binary --group test --group check
	@touch $@

# The package itself comes from src (PYTHONPATH): what is installed here may belong to another clone.
$(PARITY_STAMP):
	test -x $(PARITY_VENV)/bin/python || $(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python $(PIP) --upgrade 'pip>=25.1'
	$(PARITY_VENV)/bin/python $(PIP) '$(TORCH)'
	$(PARITY_VENV)/bin/python $(PIP) --prefer-binary --group parity --group test .
	@touch $@

$(EXAMPLES_STAMP):
	test -x $(EXAMPLES_VENV)/bin/python || $(PYTHON) -m venv $(EXAMPLES_VENV)
	$(EXAMPLES_VENV)/bin/python $(PIP) --upgrade 'pip>=25.1'
	$(EXAMPLES_VENV)/bin/python $(PIP) --prefer-binary --group examples
	@touch $@

$(INTEROP_STAMP):
	@command -v c++ > /dev/null || command -v g++ > /dev/null || command -v clang++ > /dev/null || \
		{ echo 'make interop builds llama.cpp, which needs a C++ compiler: install g++ or clang' >&2; exit 1; }
	test -x $(INTEROP_VENV)/bin/python || $(PYTHON) -m venv $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python $(PIP) --upgrade 'pip>=25.1'
	$(INTEROP_VENV)/bin/python -c 'import llama_cpp, sys; sys.exit("==" + llama_cpp.__version__ not in "$(LLAMA_CPP_PYTHON)")' 2> /dev/null || \
		$(EXACT) $(INTEROP_VENV)/bin/python $(PIP) --no-binary llama-cpp-python '$(LLAMA_CPP_PYTHON)'
	test -e $(LLAMA_CPP_SOURCE)/convert_hf_to_gguf.py || sh scripts/fetch_llama_cpp.sh \
		$(INTEROP_VENV)/bin/python '$(LLAMA_CPP_PYTHON)' $(LLAMA_CPP_SOURCE)
	@touch $@

$(LLAMA_CPP_NATIVE)-avx2/bin/llama-bench: $(INTEROP_STAMP)
	TOOLS=llama-bench sh scripts/build_llama_cpp.sh $(LLAMA_CPP_SOURCE) $(LLAMA_CPP_NATIVE)-avx2 \
		-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON -DGGML_AVX512=OFF
	@touch $@

$(LLAMA_CPP_NATIVE)/bin/llama-quantize $(LLAMA_CPP_NATIVE)/bin/llama-server: $(INTEROP_STAMP)
	sh scripts/build_llama_cpp.sh $(LLAMA_CPP_SOURCE) $(LLAMA_CPP_NATIVE)
	@touch $@
