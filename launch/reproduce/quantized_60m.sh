#!/usr/bin/env bash
# Trains Mamba-1 and Mamba-2 of 58 million parameters with two seeds each, and
# judges every recipe of quantization on them: the tables of
# docs/quantization.md, as JSON and pictures in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/quantized_60m.sh DATA OUT [SECONDS]

DATA holds corpora/gutenberg_{train,valid,test}.txt.xz and, for the tasks,
eval/ as eval_lm.py's --data wants it. A run that ends after SECONDS (570) goes
on where it stopped when it is started again: what it made lies in runs/.

  GPUS=2      GPUs of this host; Mamba-2 takes the first, Mamba-1 the last
  WORKERS=8   recipes at a time on each GPU
  TINY=1      two layers and some windows: a try on a CPU, in minutes
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
DATA=$1 OUT=$2 LIMIT=${3:-570} GPUS=${GPUS:-2} WORKERS=${WORKERS:-8}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=$PWD/runs/quantized_60m_jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
mkdir -p runs/quantized_60m_log "$OUT"
TRAIN=${TRAIN:-$DATA/corpora/gutenberg_train.txt.xz}
VALID=$DATA/corpora/gutenberg_valid.txt.xz
TEST=$DATA/corpora/gutenberg_test.txt.xz
TRAIN_FLAGS=() EVAL_FLAGS=()
if [[ -n ${TINY:-} ]]; then
  TRAIN_FLAGS=(--layers=2 --d_model=64 --steps=30 --batch=4 --length=64
    --vocab_size=2048 --eval_windows=8 --warmup=5 --checkpoint_every=15
    --cache=runs/tokens_tiny)
  EVAL_FLAGS=(--length=256 --windows=8 --scored_windows=32 --rows=4
    --tokens=64 --at=16,32,48)
fi
FIRST=${FIRST:-rtn_w8a16,rtn_w4a16,gptq_w4a16,gptq_w4a16_s8,w4a16,w4a16_head8,w4a16_s8,w8a8_naive,w8a8_columns,w8a8_sorted,w8a8_smoothquant,w8a8_quarot,quamba_w8a8,mambaquant_w8a8,quamba2_w8a8,w4a8_nearest,quamba2_w4a8,llama_cpp_q8_0,llama_cpp_q4_k}
[[ -n ${ALL:-} ]] && EVAL_FLAGS+=(--recipes="$ALL")

left() { echo $((LIMIT - SECONDS)); }
say() { echo "[$SECONDS s] $*"; }

tokens() { compgen -G "runs/tokens*/*/meta.json" >/dev/null; }

train() { # FAMILY SEED
  local run=runs/lm_60m_$1_$2
  [[ -d $run/model ]] && return 0
  say "train $1 seed $2"
  timeout -k 5 "$(left)" "$PY" experiments/train_lm.py \
    --flagfile=experiments/flagfiles/lm_60m_$1.flags \
    --text="$TRAIN" --eval_text="$VALID" --seed="$2" --workdir="$run" \
    "${TRAIN_FLAGS[@]}" >>"runs/quantized_60m_log/train_$1_$2.log" 2>&1
  say "train $1 seed $2: exit $?"
}

judge() { # NAME FAMILY FLAGS...
  local name=$1 family=$2; shift 2
  if [[ -f runs/$name.done ]]; then
    cp "runs/$name.json" "runs/$name.png" "$OUT/"
    return 0
  fi
  evaluate "$name" "$name" "$family" "$@" || return
  cp "$OUT/$name.json" runs/ && cp "runs/$name.png" "$OUT/"
  touch "runs/$name.done"
}

evaluate() { # RESULT WORKDIR FAMILY FLAGS...
  local result=$1 name=$2 family=$3; shift 3
  [[ $(left) -gt 20 ]] || return 1
  say "judge $result"
  local xla; xla=$(cat runs/quantized_60m_xla)
  env ${xla:+XLA_FLAGS="$xla"} timeout -k 5 "$(left)" "$PY" \
    experiments/eval_quantized.py \
    --flagfile=experiments/flagfiles/quantized_lm_60m.flags \
    --model=runs/lm_60m_${family}_0/model,runs/lm_60m_${family}_1/model \
    --name="Mamba-${family#mamba}" --text="$TEST" --calibration_text="$VALID" \
    --data="$DATA/eval" --workers="$WORKERS" --workdir="runs/$name" \
    --plot="runs/$name.png" --result="$OUT/$result.json" \
    "${EVAL_FLAGS[@]}" "$@" >>"runs/quantized_60m_log/$name.log" 2>&1
  local code=$?
  say "judge $result: exit $code"
  return $code
}

# The search's model has a dozen stacks and compiles longest. So it comes last,
# and what was found without it stays where it does not end in time.
searched() { # FAMILY
  local name=quantized_lm_60m_$1
  [[ -f runs/$name.done && ! -f runs/$name.searched ]] || return 0
  evaluate "${name}_all" "$name" "$1" || { rm -f "$OUT/${name}_all.json"; return; }
  mv "$OUT/${name}_all.json" "$OUT/$name.json"
  cp "$OUT/$name.json" runs/ && cp "runs/$name.png" "$OUT/"
  touch "runs/$name.searched"
}

lane() { # GPU FAMILY
  export CUDA_VISIBLE_DEVICES=$(($1 % GPUS))
  train "$2" 0 & local first=$!
  # Tokens are made once; the others wait for them.
  until tokens || ! kill -0 $first 2>/dev/null; do sleep 1; done
  train "$2" 1 & local second=$!
  wait $first $second
  for seed in 0 1; do
    [[ -d runs/lm_60m_$2_$seed/model ]] || { say "no $2 $seed"; return 1; }
  done
  until [[ -f runs/quantized_60m_xla ]]; do sleep 1; done
  judge "quantized_lm_60m_$2" "$2" --recipes="$FIRST"
  # Whoever is ready first, once both Mamba-2 are there, takes the planted ones.
  until [[ -d runs/lm_60m_mamba2_0/model && -d runs/lm_60m_mamba2_1/model ]]; do
    [[ $(left) -gt 20 ]] || return 1
    sleep 1
  done
  mkdir "runs/planted.taken.$$" 2>/dev/null || { searched "$2"; return; }
  judge quantized_planted_lm_60m_mamba2 mamba2 --plant=100 --tasks= \
    --recipes="${PLANTED:-rtn_w8a16,w4a16,w8a8_naive,w8a8_columns,w8a8_smoothquant,w8a8_quarot,quamba_w8a8,mambaquant_w8a8,quamba2_w8a8,quamba2_w4a8}"
  searched "$2"
}

# Searching for products by Triton is most of a compilation.
NO_TRITON=--xla_gpu_enable_triton_gemm=false
if [[ ! -f runs/quantized_60m_xla ]]; then
  { [[ -z ${TINY:-} ]] && CUDA_VISIBLE_DEVICES=$((GPUS - 1)) \
    XLA_FLAGS="$NO_TRITON" timeout 60 "$PY" \
    launch/reproduce/int8_products.py && echo "$NO_TRITON" >runs/quantized_60m_xla ||
    echo "" >runs/quantized_60m_xla; } &
fi
lane 0 mamba2 & one=$!
if [[ $GPUS -gt 0 ]]; then until tokens || ! kill -0 $one 2>/dev/null; do sleep 1; done; fi
lane 1 mamba1 & two=$!
wait $one $two
for log in runs/quantized_60m_log/*.log; do
  echo "== $log"; tr '\r' '\n' <"$log" | tail -n 40
done >"$OUT/quality.log"
tar czf "$OUT/training.tgz" runs/lm_60m_mamba?_?/{result.json,report.md,metrics.jsonl} 2>/dev/null
grep -h "judged in\|done before" runs/quantized_60m_log/*.log
say "end"; ls -l "$OUT"
