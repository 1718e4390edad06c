# Every target sets up .venv by itself. What must be on the machine: Python with venv and headers, g++, make.

PYTHON ?= python3
RANKS ?= 4
# Options for the program or for pytest: make train ARGS="--steps 10", make test ARGS="-k combine -x"
ARGS ?=
# Processes that run tests: as many as there are CPUs to use, if memory has room: each may start eight ranks of 0.6 GB.
WORKERS ?= $(shell cpus=$$(nproc); echo $$((cpus < 2 ? 2 : cpus > 4 ? 4 : cpus)))

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
# torch_npu is loaded with every torch that is installed beside it, so it has an environment of its own.
NPU_VENV := .venv-npu
NPU_STAMPS := $(NPU_VENV)/.stamps
NPU_REQUIREMENTS := torch==2.13.0 torch-npu==2.13.0 packaging protobuf pyyaml
CXX_FOLDERS := $(wildcard src torch_library ops)
# The folders are in the list too: a file that was added or removed changes its folder's time.
CXX_INPUTS := CMakeLists.txt $(wildcard cmake/*.cmake) $(shell find $(CXX_FOLDERS) -type d -o -name '*.cpp' -o -name '*.h')
CXX_FILES := $(filter %.cpp %.h,$(CXX_INPUTS)) \
  $(shell find benchmarks tests/aarch64 tests/cann tests/fake_cann tests/host_kernels tests/twin -name '*.cpp' -o -name '*.h')

.PHONY: FORCE help setup build train train-npu bench twin-report time-model test test-cpu test-quick test-npu test-aarch64 test-long mutate-kernels lint types format docs docs-check wheel \
  sdist wheel-check clean

help:
	@echo "make train       train a small MoE on RANKS=$(RANKS) processes (options in ARGS)"
	@echo "make train-npu   the same with graphs for NPUs and the AscendC kernels, over stand-ins for CANN and for an NPU"
	@echo "make bench       the CPU backend against gloo, MPI and the speed of memory (ARGS=--help: other configurations)"
	@echo "make test        the whole suite, which is test-cpu, then test-npu, and at the end what both did"
	@echo "                 (in WORKERS=$(WORKERS) processes; one of them: make test ARGS=\"--numprocesses 0\")"
	@echo "make test-quick  about 2 minutes; test-long: with many more random cases"
	@echo "make test-aarch64  the C++ parts and the kernels, cross-compiled and run by qemu, with pages of 4 and of 64 KB"
	@echo "make twin-report   what launches of the AscendC kernels move (ARGS=\"--ops combine\"; ARGS=--help)"
	@echo "make time-model  how long they may take on NPUs, as tables"
	@echo "make mutate-kernels   faults in the AscendC kernels, one at a time: how many the twin catches"
	@echo "make lint types  check the style of the code and its types; format: rewrite the files in that style"
	@echo "make docs        the documentation as a site, in build/docs; docs-check: look at it in Chromium"
	@echo "make wheel       output/deep_ep-*.whl; sdist: output/deep_ep-*.tar.gz; wheel-check: try the wheel that the sdist gives"
	@echo "make clean       remove what was built; .venv stays"

setup: $(STAMPS)/setup
build: $(STAMPS)/build

# Everything from PyPI: what the build needs (torch first of all, at its pinned version), dev, docs and examples.
$(STAMPS)/setup: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || { echo "make: $(PYTHON) is missing or older than 3.10 (Debian: python3; another one: make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "make: $(PYTHON) cannot make virtual environments (Debian: python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
	  || { echo "make: $(PYTHON) has no Python.h, which torch.compile needs (Debian: python3-dev)" >&2; exit 1; }
	@command -v g++ >/dev/null || { echo "make: there is no g++ (Debian: g++)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	$(BIN)/python -c "$$LIST_REQUIREMENTS" > $(STAMPS)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(STAMPS)/requirements.txt
	@touch $@

define LIST_REQUIREMENTS
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
with open('pyproject.toml', 'rb') as f:
    settings = tomllib.load(f)
extras = settings['project']['optional-dependencies']
print(*settings['build-system']['requires'], *extras['dev'], *extras['docs'], *extras['examples'], sep='\n')
endef
export LIST_REQUIREMENTS

$(STAMPS)/modules: FORCE | $(STAMPS)/setup
	@find python -name '*.py' | sort > $@.new; cmp -s $@.new $@ || cp $@.new $@
FORCE:

# The editable install compiles what changed since the last one, and has a list of the Python files.
$(STAMPS)/build: $(STAMPS)/setup $(STAMPS)/modules $(CXX_INPUTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

train: $(STAMPS)/build
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node=$(RANKS) examples/train_moe.py $(ARGS)

bench: $(STAMPS)/build
	$(BIN)/python -m benchmarks.ep $(ARGS)

# The second tier runs whatever became of the first, and the last lines say what became of both.
REPORTS := build/reports
# Neighbours of a file stay together, with what it has made for them, until a process has nothing else to do.
IN_WORKERS = --numprocesses $(WORKERS) --dist worksteal
IN_TIER = $(IN_WORKERS) --complete -m "not long" --durations 30

test:
	@rm -f $(REPORTS)/cpu.xml $(REPORTS)/npu.xml
	@status=0; \
	  $(MAKE) --no-print-directory test-cpu || status=1; \
	  $(MAKE) --no-print-directory test-npu || status=1; \
	  $(PYTHON) tests/tiers.py test-cpu $(REPORTS)/cpu.xml test-npu $(REPORTS)/npu.xml || status=1; \
	  exit $$status

# What is built for NPUs is tested with headers of torch_npu.
test-cpu: $(STAMPS)/build $(NPU_STAMPS)/setup
	$(BIN)/python -m pytest $(IN_TIER) --junit-xml $(REPORTS)/cpu.xml tests --ignore tests/npu $(ARGS)

# The wheel, under the real torch_npu and torchair; without CANN, over the stand-in of tests/cann, of which every process
# has its own. NPUs are there once.
test-npu: $(NPU_STAMPS)/deep_ep
	$(OVER_CANN) -m pytest $(IN_TIER) $$(test "$$libraries" || echo --numprocesses 0) --junit-xml $(REPORTS)/npu.xml tests/npu $(ARGS)

train-npu: $(NPU_STAMPS)/deep_ep
	$(OVER_CANN) -m torch.distributed.run --standalone --nproc-per-node=$(RANKS) tests/npu/run_example.py $(ARGS)

# stand_in.py builds the stand-in and says where it is, or nothing where CANN is installed.
OVER_CANN = libraries="$$(TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(NPU_VENV)/bin/python tests/cann/stand_in.py)" && \
  LD_LIBRARY_PATH="$${libraries:-$$LD_LIBRARY_PATH}" $(NPU_VENV)/bin/python

$(NPU_STAMPS)/setup: $(STAMPS)/setup Makefile
	test -x $(NPU_VENV)/bin/python || $(PYTHON) -m venv $(NPU_VENV)
	@mkdir -p $(NPU_STAMPS)
	$(NPU_VENV)/bin/python -m pip install --quiet $(NPU_REQUIREMENTS) $$(grep -E '^(cmake|hypothesis|matplotlib|ninja|numpy|pytest|pytest-xdist|tqdm)[=>]' $(STAMPS)/requirements.txt)
	@touch $@

$(NPU_STAMPS)/deep_ep: $(NPU_STAMPS)/setup $(CXX_INPUTS) $(shell find python -name '*.py')
	@$(MAKE) --no-print-directory wheel
	$(NPU_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall output/deep_ep-*.whl
	@touch $@

test-quick: $(STAMPS)/build
	$(BIN)/python -m pytest $(IN_WORKERS) tests --ignore tests/npu -m "not slow and not long" $(ARGS)

# The C++ parts on aarch64, without Python and torch: what tests/aarch64/ranks.cpp calls.
AARCH64 := $(CURDIR)/build/aarch64
CROSS = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CROSSCOMPILING_EMULATOR='qemu-aarch64;-L;/usr/aarch64-linux-gnu'
# The folder torch_npu, wherever .venv-npu finds it: the twin is compiled with headers of that wheel.
TORCH_NPU = $(shell $(NPU_VENV)/bin/python -c 'import importlib.util as u; print(u.find_spec("torch_npu").submodule_search_locations[0])')

test-aarch64: $(STAMPS)/setup $(NPU_STAMPS)/setup
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null \
	  || { echo "make: there is no aarch64-linux-gnu-g++ or qemu-aarch64 (Debian: g++-aarch64-linux-gnu qemu-user)" >&2; exit 1; }
	$(CROSS) -S tests/aarch64 -B $(AARCH64)/ranks
	$(BIN)/ninja -C $(AARCH64)/ranks
	$(CROSS) -S . -B $(AARCH64)/library -DCMAKE_MODULE_LINKER_FLAGS=-L$(AARCH64)/ranks
	$(BIN)/ninja -C $(AARCH64)/library
	$(CROSS) -S ops/twin/kernels -B $(AARCH64)/kernels -DTORCH_NPU_DIR=$(TORCH_NPU)
	$(BIN)/ninja -C $(AARCH64)/kernels deep_ep_twin_kernels
	for pages in 4096 65536; do \
	  qemu-aarch64 -p $$pages -L /usr/aarch64-linux-gnu -E LD_LIBRARY_PATH=$(AARCH64)/ranks $(AARCH64)/ranks/ranks \
	    $(AARCH64)/library/libdeep_ep.so $(AARCH64)/kernels/libdeep_ep_twin_kernels.so || exit 1; \
	done

# What launches of the AscendC kernels move and wait for on the twin: docs/kernels.md; how long they may take:
# docs/time_model.md.
twin-report: $(STAMPS)/build $(NPU_STAMPS)/setup
	$(BIN)/python -m tools.twin report $(ARGS)

time-model: $(STAMPS)/build
	$(BIN)/python -m tools.twin model $(ARGS)

# Every fault in the AscendC kernels, one at a time: docs/kernels.md.
mutate-kernels: $(STAMPS)/build $(NPU_STAMPS)/setup
	$(BIN)/python tests/npu/mutate.py $(ARGS)

test-long: $(STAMPS)/build
	DEEP_EP_HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest tests $(ARGS)

lint: $(STAMPS)/setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(STAMPS)/setup
	$(BIN)/mypy

format: $(STAMPS)/setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(STAMPS)/build
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

# What a reader sees, in Chromium: docs/check_site.py.
docs-check: docs
	$(BIN)/python docs/check_site.py build/docs

# auditwheel names the oldest glibc that the wheel runs with; torch's libraries are not put into it.
IN_WHEELS = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so'

wheel: $(STAMPS)/setup
	rm -rf build/wheel output/deep_ep-*.whl
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(IN_WHEELS) --wheel-dir output build/wheel/deep_ep-*.whl
	@ls output/deep_ep-*.whl

sdist: $(STAMPS)/setup
	rm -f output/deep_ep-*.tar.gz
	$(BIN)/python -c 'from scikit_build_core.build import build_sdist; build_sdist("output")'

# The wheel that the sdist gives is imported alone, from a folder of its own: -S keeps the editable install out.
wheel-check: sdist
	rm -rf build/wheel-check
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel-check output/deep_ep-*.tar.gz
	$(IN_WHEELS) --wheel-dir build/wheel-check/repaired build/wheel-check/deep_ep-*.whl
	test -f build/wheel-check/repaired/deep_ep-*-py3-none-manylinux_*_$$(uname -m).whl
	$(BIN)/python -m zipfile --extract build/wheel-check/repaired/deep_ep-*.whl build/wheel-check/alone
	! grep --quiet -e "$(CURDIR)" -e pip-req-build build/wheel-check/alone/deep_ep/libdeep_ep.so
	PYTHONPATH=build/wheel-check/alone:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))') \
	  $(BIN)/python -S -c 'import deep_ep, torch; print(deep_ep.__version__, torch.ops.deep_ep.dispatch.default, deep_ep.__file__)'

clean:
	rm -rf build output $(STAMPS)/build $(NPU_STAMPS)/deep_ep .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
