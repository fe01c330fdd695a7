# Two commands for a new user: `make demo` and `make test`. Each does all its set-up in .venv and rebuilds only
# what changed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
CUTLASS ?= nvidia-cutlass==4.2.0.0
VENV ?= .venv
PY := $(VENV)/bin/python
BIN := $(abspath $(VENV))/bin
SETUP := $(VENV)/.setup-$(shell printf '%s' '$(TORCH) $(CUTLASS)' | cat - pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: help ext test train-smoke bench demo lint docs wheel audit gpu-suite tuning sanitize check-install clean

help:
	@grep -E '^## ' Makefile | sed 's/^## //'

# torch first and by itself: the project's own requirement (torch>=2.10) is then satisfied and pulls no other
# build of it. CUTLASS is headers alone (--no-deps: its Python dependencies are not needed).
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

## make ext           build rf_kernels/_C.abi3.so in place (CMake + Ninja: only what changed)
ext: $(SETUP)
	PATH="$(BIN):$$PATH" $(PY) setup.py -q build_ext --inplace

## make test          all tests, the heavy ones last, by two processes (TESTS="tests/ops -k rope", WORKERS=8)
TESTS ?= tests
WORKERS ?= 2
test: ext
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m "not heavy" $(TESTS)
	$(PY) -m pytest -q -n $(WORKERS) --dist worksteal -m heavy $(TESTS)

## make train-smoke   every stage of training on the embedded world, a few steps each (docs/training.md)
train-smoke: ext
	$(PY) -m pytest -q tests/model/test_train_smoke.py

## make bench         times every op beside its peers (BENCH="--quick --op ema_evict" for a part; docs of the ops)
BENCH ?= --json out/bench.json
bench: ext
	$(PY) -m benchmarks $(BENCH)

## make demo          the trained student under four sinks, a stream beside the published path: film, report in out/
demo: ext
	PYTHONPATH=.:python $(PY) -m benchmarks.demo --out out

## make lint          ruff and clang-format, as CI runs them (FIX=1 rewrites the sources)
lint: $(SETUP)
	$(VENV)/bin/ruff check $(if $(FIX),--fix) .
	$(VENV)/bin/ruff format $(if $(FIX),,--check) .
	$(VENV)/bin/clang-format $(if $(FIX),-i,--dry-run --Werror) $$(git ls-files '*.h' '*.cpp' '*.cu')

## make docs          the API reference from the docstrings, in build/docs (warnings are errors)
docs: ext
	$(PY) -m sphinx -q -n -W --keep-going -b html -d build/doctrees docs/api build/docs

## make wheel         dist/rf_kernels-*-cp310-abi3-*.whl
wheel: $(SETUP)
	rm -rf dist build/lib* build/bdist*
	PATH="$(BIN):$$PATH" $(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

## make audit         what the compiler made of the CUDA kernels, held against what was intended
audit: ext
	$(PY) -m benchmarks.audit || test $$? -eq 2

## make gpu-suite     on a GPU: tests, benchmarks, report and pictures in out/gpu (docs/gpu.md)
gpu-suite: ext
	$(PY) -m benchmarks.gpu_suite --out out/gpu

## make tuning        variants of the Hopper attention kernel, for the GPU suite (TRITON=1: times Triton's tiles)
tuning: ext
	$(PY) -m benchmarks.tuning.$(if $(TRITON),triton_configs,build_variants)

## make sanitize      the CPU backend under three sanitizers (SAMPLE=1: few configurations)
sanitize: $(SETUP)
	PATH="$(BIN):$$PATH" $(PY) tests/helpers/sanitize.py $(if $(SAMPLE),--sample --seeds 0:40,--report tests/contracts/reports/sanitize.json)

## make check-install builds and installations, tried for real (CHECK="python3.12:2.11.0": under other versions)
CHECK ?= install reproducible
check-install: ext wheel
	PATH="$(BIN):$$PATH" $(PY) tests/packaging/check.py --torch '$(TORCH)' $(CHECK)

clean:
	rm -rf build dist out *.egg-info rf_kernels/_C.abi3.so
