# make demo    compile, verify and benchmark a real model; says where the report lies
# make test    everything a change has to pass: lint, types, quick tests
# make slow    the tests that take longer
# make serving the tests on a real Triton server, which is fetched once into effc's cache
# make plugin  the TensorRT plugin in TensorRT 10 and 11, which are fetched once into effc's cache
# make lint    style and types only
# make format  put the code into the style that lint asks for
# make clean   remove what the others made
#
# Each sets up what it needs in .venv, given python3 (3.11 or newer, with venv), g++ and make.
.PHONY: demo test slow serving plugin lint format setup clean

PYTHON ?= python3
VENV := .venv
PACKAGES := $(VENV)/.packages
NATIVE := build/native/.installed
DEMO := demo/minilm

# CMake and ninja are Python packages of the development environment.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Models come from packages: nothing here may wait for a hub.
export HF_HUB_OFFLINE := 1

test: lint
	python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

slow: setup
	python -m pytest -m slow

serving: setup
	python -m pytest -m server

plugin: setup
	python -m pytest -m slow -rs tests/test_tensorrt_plugin.py -k test_tensorrt_10_and_11_create_the_plugin

lint: setup
	ruff check .
	ruff format --check .
	mypy

format: setup
	ruff check --fix .
	ruff format .

demo: setup
	rm -rf demo && mkdir demo
	python scripts/write_reviews.py --count 100 demo/reviews.jsonl
	effc compile "$$(python scripts/find_minilm.py)" --attn=local:256 --quant=int8 --target=onnxruntime \
		--data demo/reviews.jsonl -o $(DEMO)
	effc verify $(DEMO) --data demo/reviews.jsonl
	effc bench $(DEMO)
	@echo
	@echo "The report: $(CURDIR)/$(DEMO)/report.html"

setup: $(PACKAGES) $(NATIVE)

# torch goes first and by itself: a requirement that admits newer releases would fetch gigabytes of CUDA packages. The
# packages that carry models go without the requirements of the code beside them.
$(PACKAGES): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	python -m pip install --quiet -c constraints.txt --editable '.[dev,serve]' --config-settings=wheel.cmake=false
	python -m pip install --quiet --no-deps $$(python scripts/extra.py models) $$(python scripts/extra.py tensorrt-headers)
	touch $@

# The checkout's own copy of the native library, which the editable install finds beside effc/plugins/native.py.
$(NATIVE): CMakeLists.txt $(wildcard cpp_plugins/*/*.?pp) | $(PACKAGES)
	cmake -S . -B build/native -G Ninja -DCMAKE_BUILD_TYPE=Release
	cmake --build build/native --target effc_cpu
	cmake --install build/native --prefix .
	touch $@

clean:
	rm -rf $(VENV) build dist demo effc/plugins/lib effc/plugins/sources .pytest_cache .mypy_cache .ruff_cache .hypothesis
