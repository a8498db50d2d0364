#!/usr/bin/env bash
# Times Mamba-2 2.7B and 8B and Mamba-1 2.8B, with random weights in bfloat16, 8
# and 4 bits and states of several formats: decoding at four batch sizes, and
# prefill, as JSON in OUT; for docs/quantization.md.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/quantized_speed.sh [--dry-run] OUT [SECONDS]

First all programs are compiled, several at a time, into a cache in runs/; then
each model is timed alone on its GPU, all formats in one process, until SECONDS
(570) have gone. quantized_speed_MODEL.json has the rows of a model, and
quantized_speed.json those of all. --dry-run prints the commands.

  GPUS=     GPUs to use; by default those that nvidia-smi lists
  WORKERS=3 compilations at a time on each
  MODELS="mamba2_2_7b mamba2_8b mamba_2_8b"
  BATCHES="1 16 64 256" PROMPTS="1x1024 1x8192"
  PEERS=mamba_ssm timed beside, where it is installed
  TINY=1    tiny models, on a CPU, to try the script
TEXT
}

dry_run=
[[ ${1:-} != --dry-run ]] || { dry_run=1; shift; }
[[ $# -ge 1 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
OUT=$1 LIMIT=${2:-570} TINY=${TINY:-} WORKERS=${WORKERS:-3}
GPUS=${GPUS:-$(nvidia-smi -L 2>/dev/null | wc -l)}
MODELS=${MODELS:-mamba2_2_7b mamba2_8b mamba_2_8b}
BATCHES=${BATCHES:-1 16 64 256} PROMPTS=${PROMPTS:-1x1024 1x8192}
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
# Formats of weights and of states, in pairs.
WEIGHTS=(bfloat16 bfloat16 int8 int8/int8 int4:128 int4:128/int8)
STATES=(float32 bfloat16 int8 int8 int8 int8)
TIMED=(--tokens=32 --seconds=.5 --repeats=7)
if [[ $TINY ]]; then
  GPUS=1 MODELS="tiny_mamba2 tiny_mamba1" BATCHES="1 2" PROMPTS=1x16
  WEIGHTS=(bfloat16 int4:16) STATES=(float32 int8)
  TIMED=(--tokens=2 --seconds=0 --repeats=1)
  export JAX_PLATFORMS=cpu
fi
[[ $GPUS -ge 1 ]] || { echo "error: no GPU: set GPUS" >&2; exit 2; }
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=$PWD/runs/quantized_speed_jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
log=runs/quantized_speed_log

join() { local IFS=,; echo "$*"; }

# Prints the command that times a model: command MODEL "WEIGHTS" "STATES".
command() {
  local all=() batch prompt
  for batch in $BATCHES; do all+=("$1:$batch"); done
  local prompts=()
  for prompt in $PROMPTS; do prompts+=("$1:$prompt"); done
  echo "$PY experiments/bench.py --suite=language_model" \
    "--decode=$(join "${all[@]}") --prefill=$(join "${prompts[@]}")" \
    "--weights_format=$2 --state_format=$3"
}

left() { echo $((LIMIT - SECONDS)); }

# Compiles and times the models of a GPU: lane GPU MODEL...
lane() {
  local gpu=$1 model i; shift
  export CUDA_VISIBLE_DEVICES=$gpu
  for model in "$@"; do
    for i in "${!WEIGHTS[@]}"; do
      echo "$(command "$model" "${WEIGHTS[i]}" "${STATES[i]}") --repeats=1 --seconds=0 --tokens=${TIMED[0]#*=}"
    done
  done | if [[ $dry_run ]]; then cat; else
    # Half of the time at most: what is not compiled then, is when it is timed.
    xargs -d '\n' -P "$WORKERS" -I{} timeout -k 5 $(($(left) / 2)) \
      bash -c '{}' >>"$log/compile_$gpu.log" 2>&1
    echo "[$SECONDS s] GPU $gpu: compiled"
  fi
  for model in "$@"; do
    local run
    run="$(command "$model" "$(join "${WEIGHTS[@]}")" "$(join "${STATES[@]}")")"
    run+=" ${TIMED[*]} --result=$OUT/quantized_speed_$model.json"
    [[ -z ${PEERS:-} ]] || run+=" --peers=$PEERS"
    if [[ $dry_run ]]; then echo "$run"; continue; fi
    [[ $(left) -gt 10 ]] || { echo "[$SECONDS s] no time for $model"; continue; }
    timeout -k 5 "$(left)" bash -c "$run" >>"$log/$model.log" 2>&1
    echo "[$SECONDS s] $model: exit $?"
  done
}

[[ $dry_run ]] || mkdir -p "$OUT" "$log"
for ((gpu = 0; gpu < GPUS; gpu++)); do
  own=() place=0
  for model in $MODELS; do
    [[ $((place++ % GPUS)) != "$gpu" ]] || own+=("$model")
  done
  [[ ${#own[@]} -gt 0 ]] || continue
  if [[ $dry_run ]]; then lane "$gpu" "${own[@]}"; else lane "$gpu" "${own[@]}" & fi
done
wait
[[ $dry_run ]] || {
  "$PY" -m research.results.merging "$OUT/quantized_speed.json" "$OUT"/quantized_speed_*.json
  tail -qn 3 "$log"/*.log
}
