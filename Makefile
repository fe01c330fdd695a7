# Two commands for a new user: `make demo` and `make test`. Each does all its set-up in .venv and rebuilds only what changed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUTLASS ?= nvidia-cutlass==4.2.0.0
VENV ?= .venv
PY := $(VENV)/bin/python
SETUP := $(VENV)/.setup-$(shell printf '%s' '$(TORCH) $(CUTLASS)' | cat - pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: chip audit gpu-suite tuning demo test test-quick ext docs lint format wheel check-install check-reproducible check-versions sanitize sanitize-sample clean help

help:
	@grep -E '^## ' Makefile | sed 's/^## //'

# torch first and by itself: the project's own requirement (torch>=2.10) is then satisfied and pulls no other build of it.
# CUTLASS is headers alone (--no-deps: its Python dependencies are not needed).
$(SETUP):
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q '$(TORCH)' numpy safetensors
	$(PY) -c 'import tomllib as t' 2>/dev/null || $(PY) -m pip install -q tomli
	$(PY) -c 'import sys; t = __import__("tomllib" if sys.version_info > (3, 11) else "tomli"); print("\n".join(t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"]))' > $(VENV)/requirements-dev.txt
	$(PY) -m pip install -q -r $(VENV)/requirements-dev.txt
	$(PY) -m pip install -q --no-deps '$(CUTLASS)'
	rm -f $(VENV)/.setup-*
	touch $@

## make ext        build rf_kernels/_C.abi3.so in place (CMake + Ninja: only what changed)
ext: $(SETUP)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) setup.py -q build_ext --inplace

## make chip       the functional model of a Hopper chip with the kernels on it, for tests (which build it when needed)
chip: $(SETUP)
	$(PY) tests/chip/build.py

## make audit      what the compiler made of the CUDA kernels, held against what was intended (2: no CUDA kernels to look at)
audit: ext
	$(PY) -m benchmarks.audit || test $$? -eq 2

## make demo       stream a video from a checkpoint, compare with the published path, write out/
demo: ext
	PYTHONPATH=.:python $(PY) -m reward_forcing.cli demo --out out

## make test       all tests, the heavy ones last
test: ext
	$(PY) -m pytest -q -m "not heavy"
	$(PY) -m pytest -q -m heavy

## make test-quick the everyday run
test-quick: ext
	$(PY) -m pytest -q -m "not heavy"

## make gpu-suite  on a GPU: tests, benchmarks, report and pictures in out/gpu (docs/gpu.md)
gpu-suite: ext
	PYTHONPATH=.:python $(PY) -m benchmarks.gpu_suite --out out/gpu

## make tuning     variants of the Hopper attention kernel, one change each, for the suite's stage of that name (docs/tuning.md)
tuning: ext
	$(PY) benchmarks/tuning/build_variants.py

## make docs       the API reference from the docstrings, in build/docs (warnings are errors)
docs: ext
	$(PY) -m sphinx -q -n -W --keep-going -b html -d build/doctrees docs/api build/docs

## make lint       ruff and clang-format, as CI runs them
lint: $(SETUP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

## make format     rewrite the sources in the project's format
format: $(SETUP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

## make wheel      dist/rf_kernels-*-cp310-abi3-*.whl
wheel: $(SETUP)
	rm -rf dist build/lib* build/bdist*
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

## make check-install every way of building and installing, in a fresh environment
check-install: wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) tests/packaging/check_install.py --torch '$(TORCH)'

## make check-reproducible a second build of the commit, elsewhere and without a network, gives the wheel's bytes
check-reproducible: wheel
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) tests/packaging/check_reproducible.py --wheel dist/*.whl

## make check-versions the one extension under other Pythons and PyTorches (VERSIONS="python3.12:2.11.0 ...")
VERSIONS ?= python3.10:2.10.0 python3.12:2.11.0
check-versions: ext
	$(PY) tests/packaging/check_versions.py $(VERSIONS)

## make sanitize   the CPU backend under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer (-sample: few configurations)
sanitize: $(SETUP)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) tests/helpers/sanitize.py --report tests/contracts/reports/sanitize.json
sanitize-sample: $(SETUP)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) tests/helpers/sanitize.py --sample --seeds 0:40

clean:
	rm -rf build dist out *.egg-info rf_kernels/_C.abi3.so
