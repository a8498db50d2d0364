#!/usr/bin/env bash
# Trains networks whose accuracies experiments/codesign_fabnet.py searches by, and
# searches: results, pictures and tables in OUT.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/codesign_fabnet.sh listops OUT [SECONDS]
       launch/reproduce/codesign_fabnet.sh text DATA OUT [SECONDS]

listops trains 15 networks of the large space on short ListOps: a quarter of an
hour on two CPU cores. text trains the paper's 45 networks on LRA's Text, of
which DATA/lra has the files: for one GPU. A run that ends after SECONDS (570)
goes on where it stopped when it is started again: what it made lies in runs/.
On another machine RESUME=FOLDER, an earlier OUT, brings back what was finished.

  WORKERS=1    trainings at a time; 4 on a GPU
  STEPS=2000   updates of each network on Text
  LENGTH=1024  bytes of a sequence of Text
  SEEDS=0      seeds, trained together
TEXT
}

TASK=${1:-}
case $TASK in
  listops) [[ $# -ge 2 ]] && OUT=$2 LIMIT=${3:-570} DATA= || TASK= ;;
  text) [[ $# -ge 3 ]] && DATA=$2 OUT=$3 LIMIT=${4:-570} || TASK= ;;
esac
[[ $TASK == listops || $TASK == text ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export TF_CPP_MIN_LOG_LEVEL=2 XLA_PYTHON_CLIENT_PREALLOCATE=false
[[ $TASK == text ]] && export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false"
export PY OUT LIMIT FOUND=runs/codesign_$TASK
mkdir -p "$FOUND" "$OUT"
[[ -n ${RESUME:-} ]] && cp "$RESUME"/[0-9]*.json "$FOUND/"

# Width, FFN over width, FBfly blocks, ABfly blocks.
if [[ $TASK == listops ]]; then
  # Drawn at random among widths 32 and 64 and at most 4 blocks; the last two
  # are what the front of a first search asked for.
  NETWORKS="32,1,1,1 32,1,3,0 32,2,1,0 32,2,2,0 32,2,2,2 32,3,2,1 32,4,1,0
    64,1,3,0 64,2,2,2 64,3,0,1 64,3,1,0 64,3,1,1 64,4,1,0
    64,1,1,0 64,1,2,0"
  TRAIN=(--flagfile=experiments/flagfiles/lra_tiny.flags --steps=400)
else
  NETWORKS=
  for d in 64 128 256 512 1024; do
    for ratio in 1 2 3; do
      NETWORKS+=" $d,$ratio,1,0 $d,$ratio,2,0 $d,$ratio,1,1"
    done
  done
  TRAIN=(--task=text --model=fabnet --data="$DATA/lra" --length="${LENGTH:-1024}"
    --steps="${STEPS:-2000}" --eval_every=500 --warmup=200 --batch=32 --heads=2
    --dtype=bfloat16 --learning_rates=1e-3 --seeds="${SEEDS:-0}")
fi

train() { # LIMIT NETWORK FLAGS...: one network, unless it is there
  local left=$(($1 - $(date +%s))) network=$2 d ratio fourier attention
  shift 2
  IFS=, read -r d ratio fourier attention <<<"$network"
  local name=${network//,/_} run=$FOUND/${network//,/_}
  if [[ ! -s $run.json ]]; then
    ((left > 0)) || return 0
    timeout -s INT -k 20 "$left" "$PY" experiments/train_lra.py "$@" \
      --d_model="$d" --d_ff=$((d * ratio)) --layers=$((fourier + attention)) \
      --attention_layers="$attention" --workdir="$run" --result="$run.json" \
      >>"$run.log" 2>&1
    echo "$network: exit $?"
  fi
  [[ -s $run.json ]] && cp "$run.json" "$OUT/$name.json"
  return 0
}
export -f train

END=$(($(date +%s) + LIMIT))
tr -s ' \n' '\n' <<<"$NETWORKS" | grep . |
  xargs -P "${WORKERS:-1}" -I{} bash -c 'train "$@"' _ "$END" {} "${TRAIN[@]}"
for network in $NETWORKS; do
  [[ -s $FOUND/${network//,/_}.json ]] && continue
  echo "$network is missing: start it again to go on, or see $FOUND/*.log"
  exit 3
done
# Below runs/, since results name the files of their command.
"$PY" experiments/codesign_fabnet.py \
  --flagfile="experiments/flagfiles/codesign_$TASK.flags" \
  --plot="runs/codesign_$TASK.png" --csv="runs/codesign_$TASK.csv" \
  --result="$OUT/codesign_$TASK.json" &&
  cp "runs/codesign_$TASK".{png,csv} "$OUT/"
