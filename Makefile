# make demo: an image from a prompt. make test: the tests. make check: all that must pass.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.demo
export SDRT_HOME ?= $(CURDIR)/build/sdrt
# The tests start hundreds of processes that import the same sources.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-rest test-slow test-full test-fleet test-rig onnxruntime-gpu gpu-check check lint types mutations wheel bundle bench fuzz lock audit docs clean kill-points

# Takes what `make test` has set up, or the smallest install that makes an image.
demo: $(if $(wildcard $(READY)),$(READY),$(DEMO))
	$(BIN)/sdrt run "a red circle on a blue background" --seed 0 --output out/demo.png

# A file stays on one worker; tests/conftest.py sorts them. Graphs that tests export are cached in
# build/test-cache, or SDRT_TEST_CACHE.
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
SKIPPED := not gpu and not release and not rig and not slow
FULL := (build or grid or rest or trt)

# Before a commit: a sample of the grids, every kind of check. COMPLETE=1 runs `make test-rest` with it,
# in one run that collects once and waits for its last file once.
test: $(READY)
	$(PYTEST) $(if $(COMPLETE),-m "$(SKIPPED)")

# At every edit: no exports, no browser, nothing that takes seconds.
test-fast: $(READY)
	$(PYTEST) -m "$(SKIPPED) and not $(FULL) and not browser and not exports and not integration"

# What `make test` leaves to the continuous integration: complete grids, builds and plans.
test-rest: $(READY)
	$(PYTEST) -m "$(SKIPPED) and $(FULL)"

# Half an hour: every family of networks on every engine, thousands of changes and kills.
test-slow: $(READY)
	$(PYTEST) -m "slow and not gpu and not release"

test-full: COMPLETE = 1
test-full: test test-slow

# Stand-ins of the CUDA driver and of TensorRT, which take the place of a GPU in their process. After
# `make onnxruntime-gpu`, ONNX Runtime's CUDA provider over stand-ins too. Other files, which have no
# such test, take longer to import than most of these tests.
test-rig: $(READY)
	$(PYTEST) -m rig $$(grep -rlE 'mark\.(gpu|rig)' tests)

# ONNX Runtime's CUDA provider, for a test that runs it over stand-ins of CUDA; 250 MB, in build.
onnxruntime-gpu: build/onnxruntime-gpu
build/onnxruntime-gpu: $(READY) constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $@ \
		onnxruntime-gpu==$(shell sed -n 's/^onnxruntime==//p' constraints.txt)
	touch $@

# On a machine with a GPU: everything that needs one; results go to benchmarks/results.
gpu-check: $(READY)
	$(BIN)/python tools/gpu_check.py

# Ray is large, and its tests take minutes.
test-fleet: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[ray]" -c constraints.txt
	$(BIN)/pytest -m slow tests/serve/ray/test_app.py

check: lint types test

# Some two hundred builds that are killed and restarted.
kill-points: $(READY)
	$(BIN)/python benchmarks/kill_points.py --save
	$(BIN)/python benchmarks/results.py

# The documentation site, in build/site; a broken link or reference fails.
docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]" -c constraints.txt
	mkdir -p build/docs  # mkdocstrings looks for its paths before the hook fills them
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package is checked as it is installed, from another folder; for Linux,
# macOS and Windows.
types: $(READY)
	rm -rf build/types && mkdir -p build/types
	$(PYTHON) tools/link_package.py build/types
	printf '%s\n' linux darwin win32 | xargs -P $(WORKERS) -I{} sh -c \
		"cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir .mypy_cache_{} --platform {} -p sdrt"

# Removes each check of SECURITY.md in turn: its test must fail.
mutations: $(READY)
	$(BIN)/python tools/mutations.py --save

# Writes the bundles of the embedded model, its ControlNet and its IP-Adapter, without their weights,
# into the package; commit the result.
bundle: $(READY)
	$(BIN)/sdrt build --model shapes --feature-reuse --force --quiet --output build/shapes
	$(BIN)/python tools/embed_bundle.py build/shapes shapes
	$(BIN)/sdrt build --controlnet outline --size 64x64 --name outline --force --quiet \
		--output build/outline.bundle
	$(BIN)/python tools/embed_bundle.py build/outline.bundle outline
	$(BIN)/sdrt build --ip-adapter likeness --force --quiet --output build/likeness.bundle
	$(BIN)/python tools/embed_bundle.py build/likeness.bundle likeness

# The same commit gives the same bytes. A CycloneDX bill of materials is written next to the wheel.
wheel: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
wheel: $(READY)
	rm -rf dist build/lib build/bdist*
	$(BIN)/python -m build --wheel --no-isolation
	$(BIN)/python tools/third_party.py --wheel dist/*.whl
	$(BIN)/pytest -n $(WORKERS) -m release tests/test_embedded_bundle.py tests/test_supply.py

# Ten million executions of the parsers of untrusted input; failures are stored in tests/corpus.
fuzz: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[fuzz]" -c constraints.txt
	$(BIN)/python tools/fuzz.py

# Writes the newest versions of everything that development needs into constraints.txt.
lock: $(READY)
	$(BIN)/python tools/lock.py
	$(MAKE) $(READY)
	$(BIN)/python tools/third_party.py

# Known vulnerabilities of the versions in constraints.txt; asks the Python package index.
audit: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[audit]" -c constraints.txt
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# Measures for half an hour on a machine of any size, stores the figures in benchmarks/results and
# writes them into the README and docs/benchmarks.
bench: $(READY)
	$(BIN)/sdrt build --model shapes --feature-reuse --force --quiet
	$(BIN)/python benchmarks/cold_start.py --install --save
	$(BIN)/python benchmarks/overhead.py --save
	$(BIN)/python benchmarks/build.py --divisor 4 --size 256x256 --fp32 --work build/narrow --save
	$(BIN)/python benchmarks/scaling.py --work build/narrow --save
	$(BIN)/python benchmarks/hoisting.py --work build/narrow --rounds 5 --save
	$(BIN)/python benchmarks/serve_cost.py --save
	$(BIN)/python benchmarks/serve_load.py --requests 60 --rounds 2 --save
	$(BIN)/python benchmarks/serve_load.py --mix --requests 60 --rounds 2 --save
	$(BIN)/python benchmarks/serve_sim.py --save
	$(BIN)/python benchmarks/shapes_quality.py --save
	$(BIN)/python benchmarks/fewer.py --save
	$(MAKE) report

# At full size: 15 GB of disk, 16 GB of memory, an hour. The bundle is built once, in build/full.
bench-full: $(READY)
	$(BIN)/python benchmarks/build.py --save
	$(BIN)/python benchmarks/latency.py --work build/full --rounds 7 --save
	$(BIN)/python benchmarks/latency.py --work build/full --size 512x512 \
		--engines reference,openvino-bf16,onnxruntime --save
	$(BIN)/python benchmarks/latency.py --work build/full --compiled \
		--engines 'reference bf16,openvino-bf16' --save
	$(BIN)/python benchmarks/latency.py --work build/full --compiled --size 512x512 \
		--engines 'reference bf16,openvino-bf16' --save
	$(BIN)/python benchmarks/image.py --work build/full --save
	$(BIN)/python benchmarks/memory.py --work build/full --save
	$(BIN)/python benchmarks/opening.py --work build/full --save
	$(BIN)/python benchmarks/scaling.py --work build/narrow --full build/full --save
	$(MAKE) report

# The README's table, docs/benchmarks and the plots, from benchmarks/results.
report: $(READY)
	$(BIN)/python benchmarks/results.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[build,cpu,serve,dev]" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps open_clip_torch -c constraints.txt
	touch $@

$(DEMO): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cpu]" -c constraints.txt
	touch $@

clean:
	rm -rf build dist out $(VENV)
