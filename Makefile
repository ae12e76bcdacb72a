# Every target makes .venv when it is missing, installs the development extras, builds the library, then does its work.
VENV := .venv
PYTHON := $(VENV)/bin/python
DIST := dist
SOURCES := $(filter-out csrc/gpusim/%,$(wildcard csrc/*/*)) csrc/exports.map csrc/cuda.cmake CMakeLists.txt setup.py

.PHONY: install gpusim cuda-simulator test test-full test-sanitizers test-gpu demo lint bench wheel wheel-files
install: $(VENV)/.built

$(PYTHON):
	python3 -m venv $(VENV)

# Dependencies first (torch's headers are needed to compile), as a pure-Python install.
$(VENV)/.dependencies: pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install -q "setuptools>=77"
	EVA02_BUILD=pure $(PYTHON) -m pip install -q --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# The PTX simulator's core, which tests alone use.
gpusim: $(VENV)/.gpusim

$(VENV)/.gpusim: $(VENV)/.dependencies $(wildcard csrc/gpusim/*)
	$(VENV)/bin/cmake -S csrc/gpusim -B build/gpusim -G Ninja -DPython3_EXECUTABLE=$(abspath $(PYTHON)) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) > /dev/null
	$(VENV)/bin/ninja -C build/gpusim
	touch $@

# The CUDA operators built for the simulator: the very sources of the wheel, for tests on machines without a GPU.
cuda-simulator: $(VENV)/.cuda-simulator

$(VENV)/.cuda-simulator: $(VENV)/.gpusim $(SOURCES)
	$(VENV)/bin/cmake -S . -B build/cuda-simulator -G Ninja -DEVA02_SIMULATOR=ON \
	  -DPython3_EXECUTABLE=$(abspath $(PYTHON)) -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) > /dev/null
	$(VENV)/bin/ninja -C build/cuda-simulator eva02_kernels_cuda
	cp build/cuda-simulator/libeva02_kernels_cuda.so eva02_kernels/testing/gpusim/
	touch $@

# $(call part,name,command): runs a part of the tests and notes its minutes, also when it fails.
TIMES := build/test-minutes.txt
define part
	@begin=$$(date +%s); status=0; $(2) || status=$$?; \
	printf '%-12s %5s minutes%s\n' "$(1)" "$$(( ($$(date +%s) - begin) / 60 )).$$(( ($$(date +%s) - begin) % 60 / 6 ))" \
	  "$$([ $$status = 0 ] || echo ', FAILED')" >> $(TIMES); [ $$status = 0 ] || { cat $(TIMES); exit $$status; }
endef

# Triton decorates a kernel for its interpreter or for its compiler: a process can have one of them.
INTERPRETED := env TRITON_INTERPRET=1 $(PYTHON) -m pytest -q --backend triton
# The same suite on the compiled kernels' PTX: what the dispatcher and Dynamo do with an operator is the same there.
SIMULATED := $(PYTHON) -m pytest -q --backend triton
# Without an nvcc the CUDA kernels are neither built nor tested, which the table of minutes says.
NVCC := $(shell command -v nvcc 2> /dev/null)
SIMULATED_CUDA := $(PYTHON) -m pytest -q --backend cuda
SIMULATED_TESTS := tests/test_contract.py -k "is_accurate or statistics or deterministic"

test: install gpusim $(if $(NVCC),cuda-simulator)
	@mkdir -p build && rm -f $(TIMES)
	$(call part,contract,$(PYTHON) -m pytest -q -m "not full and not gpu and not wheel" tests/test_contract.py)
	$(call part,interpreter,$(INTERPRETED) -m "not full" tests/test_contract.py tests/test_interpreter.py)
	$(call part,simulator,$(SIMULATED) -m "not full" $(SIMULATED_TESTS))
	$(if $(NVCC),$(call part,cuda,$(SIMULATED_CUDA) -m "not full" $(SIMULATED_TESTS)),@echo "cuda         not tested: there is no nvcc" >> $(TIMES))
	$(call part,rest,$(PYTHON) -m pytest -q -m "not full and not gpu and not wheel" --ignore=tests/test_contract.py \
	  --ignore=tests/test_interpreter.py tests)
	$(call part,wheel,env EVA02_CUDA_ARCHITECTURES=80 $(PYTHON) -m pytest -q -m "wheel and not full" tests/test_wheel.py)
	@cat $(TIMES)

test-full: install gpusim $(if $(NVCC),cuda-simulator)
	@mkdir -p build && rm -f $(TIMES)
	$(call part,tests,$(PYTHON) -m pytest -q -m "not gpu and not wheel" --ignore=tests/test_interpreter.py tests)
	$(call part,interpreter,$(INTERPRETED) tests/test_contract.py tests/test_interpreter.py)
	$(call part,simulator,$(SIMULATED) tests/test_contract.py)
	$(call part,cuda,$(SIMULATED_CUDA) tests/test_contract.py)
	$(call part,perturbed,$(SIMULATED) --numerics perturb $(SIMULATED_TESTS))
	$(call part,cuda-perturb,$(SIMULATED_CUDA) --numerics perturb $(SIMULATED_TESTS))
	$(call part,sanitizers,$(MAKE) test-sanitizers)
	$(call part,wheel,$(PYTHON) -m pytest -q -m wheel tests/test_wheel.py)
	@cat $(TIMES)

# The simulator's core with AddressSanitizer and UndefinedBehaviorSanitizer, under its own tests.
SANITIZED := build/gpusim-sanitized
test-sanitizers: gpusim
	$(VENV)/bin/cmake -S csrc/gpusim -B $(SANITIZED) -G Ninja -DEVA02_SANITIZE=ON -DEVA02_OUTPUT=$(abspath $(SANITIZED)) \
	  -DPython3_EXECUTABLE=$(abspath $(PYTHON)) -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV)/bin/ninja) > /dev/null
	$(VENV)/bin/ninja -C $(SANITIZED) _core
	env LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  EVA02_GPUSIM_CORE=$(SANITIZED) $(PYTHON) -m pytest -q --capture=sys -p no:faulthandler tests/test_gpusim.py \
	  tests/test_gpusim_faults.py tests/test_gpusim_instructions.py tests/test_gpusim_matrices.py tests/test_gpusim_fuzz.py

# On a machine with a GPU: the same contract suite and what only a GPU can show, then the benchmarks, whose JSON is to be
# committed.
test-gpu: install
	@mkdir -p build && rm -f $(TIMES)
	$(call part,contract,$(PYTHON) -m pytest -q --backend triton --device cuda tests/test_contract.py)
	$(call part,cuda,$(PYTHON) -m pytest -q --backend cuda --device cuda tests/test_contract.py)
	$(call part,gpu,$(PYTHON) -m pytest -q -m gpu tests/test_gpu.py)
	$(PYTHON) -m benchmarks.run --suite ops --device cuda --dtype bfloat16 --json benchmarks/results/ops-gpu.json
	@cat $(TIMES)

demo: install
	$(PYTHON) -m benchmarks.demo

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')
	$(PYTHON) -m mypy

bench: install
	$(PYTHON) -m benchmarks.run --suite ops

# The platform wheel, the pure-Python wheel and the sdist, into $(DIST). build/lib is setuptools' and would keep files
# that have since been removed.
wheel: install
	$(MAKE) wheel-files

wheel-files:
	rm -rf build/lib* build/bdist* $(DIST)/eva02_kernels-*
	EVA02_BUILD=manylinux $(PYTHON) -m build --no-isolation --wheel --outdir $(DIST)
	rm -rf build/lib* build/bdist*
	EVA02_BUILD=pure $(PYTHON) -m build --no-isolation --wheel --outdir $(DIST)
	EVA02_BUILD=pure $(PYTHON) -m build --no-isolation --sdist --outdir $(DIST)
	rm -rf build/lib* build/bdist*
