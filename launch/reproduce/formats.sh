#!/usr/bin/env bash
# Judges every format of 3 and 4 bits on language models: weights by rounding to
# nearest and by GPTQ, with and without Hadamard rotations and clipping, inputs
# in the same formats, and caches. JSONs and pictures in OUT/formats.tgz.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/formats.sh DATA OUT [SECONDS]

DATA holds corpora/wikitext2_raw_test.txt, corpora/gutenberg_{train,valid,test}.
txt.xz and eval/ as eval_lm.py's --data wants it. A run that ends after SECONDS
(570) goes on where it stopped when it is started again: what it made lies in
runs/. On another machine RESUME=formats.tgz brings back what was finished, and
the trained models. Weights of SmolLM2 lie on a 4-bit grid already.

  MODELS="smollm2 transformer mamba2"  the last two of 58 million parameters are
                                       trained here, in bfloat16
  PARTS="weights books inputs caches"  which comparisons, in this order
  WORKERS=8   recipes at a time
  TINY=1      a few windows, and small models: a try on a CPU
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
DATA=$1 OUT=$2 LIMIT=${3:-570} WORKERS=${WORKERS:-8}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/formats_jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
FOUND=runs/formats
mkdir -p "$FOUND" "$OUT"
[[ -n ${RESUME:-} ]] && tar xzf "$RESUME"
VALID=$DATA/corpora/gutenberg_valid.txt.xz
TRAIN_FLAGS=() EVAL_FLAGS=() PRECISION=tensorfloat32
if [[ -n ${TINY:-} ]]; then
  TRAIN_FLAGS=(--layers=2 --d_model=64 --steps=30 --batch=4 --length=64
    --vocab_size=2048 --eval_windows=8 --warmup=5 --checkpoint_every=15
    --attention=xla --cache=runs/tokens_tiny)
  EVAL_FLAGS=(--length=256 --windows=8 --scored_windows=16 --rows=2
    --tokens=32 --at=8,16)
  PRECISION=default
fi

left() { echo $((LIMIT - SECONDS)); }
say() { echo "[$SECONDS s] $*"; }

model_of() { # MODEL
  [[ $1 == smollm2 ]] && echo smollm2 || echo "runs/lm_60m_$1_0/model"
}

train() { # FAMILY
  local run=runs/lm_60m_$1_0
  [[ -d $run/model ]] && return 0
  [[ $(left) -gt 60 ]] || return 1
  say "train $1"
  timeout -k 5 "$(left)" "$PY" experiments/train_lm.py \
    --flagfile="experiments/flagfiles/lm_60m_$1.flags" \
    --text="$DATA/corpora/gutenberg_train.txt.xz" --eval_text="$VALID" \
    --seed=0 --workdir="$run" "${TRAIN_FLAGS[@]}" >>"$FOUND/train_$1.log" 2>&1
  say "train $1: exit $?"
}

judge() { # MODEL PART
  local model=$1 part=$2 name=formats_$1_$2 recipes tasks=
  local text=$DATA/corpora/wikitext2_raw_test.txt
  case $part in
    weights) recipes=all_formats,all_gptq tasks=lambada,arc_easy,arc_challenge,piqa ;;
    books) recipes=all_formats,all_gptq text=$DATA/corpora/gutenberg_test.txt.xz ;;
    inputs) recipes=all_hadamard,all_clipped,all_inputs ;;
    caches)
      # Mamba-2 keeps no keys and values.
      [[ $model == mamba2 ]] && return 0
      recipes=all_caches ;;
    *) say "no part $part"; return 2 ;;
  esac
  recipes=${RECIPES:-$recipes}
  [[ -f $FOUND/$name.done ]] && return 0
  [[ $(left) -gt 30 ]] || return 1
  say "judge $name"
  timeout -k 5 "$(left)" "$PY" experiments/eval_quantized.py --as_arrays \
    --model="$(model_of "$model")" --name="$model" --recipes="$recipes" \
    --text="$text" --calibration_text="$VALID" --length=1024 --windows=64 \
    --rows=4 --tokens=256 --at=16,128 --tasks="${TASKS-$tasks}" \
    --data="$DATA/eval" --workers="$WORKERS" --matmul_precision="$PRECISION" \
    --workdir="$FOUND/$name" --plot="$FOUND/$name.png" \
    --result="$FOUND/$name.json" "${EVAL_FLAGS[@]}" >>"$FOUND/$name.log" 2>&1
  local code=$?
  say "judge $name: exit $code"
  [[ $code -eq 0 ]] && touch "$FOUND/$name.done"
  return $code
}

MISSING=
for part in ${PARTS:-weights books inputs caches}; do
  for model in ${MODELS:-smollm2 transformer mamba2}; do
    if [[ $model != smollm2 ]] && ! train "$model"; then
      MISSING+=" $model:$part"
      continue
    fi
    judge "$model" "$part" || MISSING+=" $model:$part"
  done
done
trained=()
for model in transformer mamba2; do
  [[ -d runs/lm_60m_${model}_0/model ]] && trained+=("runs/lm_60m_${model}_0/model")
done
tar czf "$OUT/formats.tgz" --exclude='*.npz' "$FOUND" "${trained[@]}"
[[ -z $MISSING ]] || {
  echo "missing:$MISSING; start it again to go on, or see $FOUND/*.log"
  exit 3
}
