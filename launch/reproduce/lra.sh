#!/usr/bin/env bash
# Trains FABNet and what it is compared with on Long Range Arena, three seeds
# and two rates each, and times them: tables and pictures of docs/fabnet.md.
set -u

usage() {
  cat <<'TEXT'
Usage: launch/reproduce/lra.sh DATA OUT [SECONDS]

DATA holds lra/ with imdb_labelled.jsonl.xz and cifar10_gray_*.npy.xz. A run
that ends after SECONDS (540) goes on where it stopped when it is started again:
what it made lies in runs/. On another machine RESUME=FOLDER, an earlier OUT,
brings back what was finished, and small checkpoints of what was not.

  GPUS=2      GPUs of this host, which share the jobs
  WORKERS=3   trainings at a time on each GPU; times are taken alone before
  TASKS="listops text image pathfinder32"
  MODELS="fabnet transformer dense_time dense_parameters low_rank block_diagonal fabnet_abfly"
  FLAGS=""    further flags of all trainings, such as --pretrain_share=.5
  NAME=lra    of this set of runs: another one for other FLAGS
  TINY=1      a try on a CPU, in minutes
TEXT
}

[[ $# -ge 2 && $1 != -* ]] || {
  usage
  [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
}
cd "$(dirname "$0")/../.." || exit
export DATA=$1 OUT=$2 LIMIT=${3:-540} GPUS=${GPUS:-2} WORKERS=${WORKERS:-3}
export NAME=${NAME:-lra} FLAGS=${FLAGS:-} TINY=${TINY:-}
TASKS=${TASKS:-listops text image pathfinder32}
MODELS=${MODELS:-fabnet transformer dense_time dense_parameters low_rank block_diagonal fabnet_abfly}
export PY=${PYTHON:-$(command -v .venv/bin/python || command -v python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR=$PWD/runs/${NAME}_jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2
# Searching for products by Triton is most of a compilation.
[[ -n $TINY ]] || export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false"
TIMED=$(tr ' ' '\n' <<<"$MODELS" | grep -v dense_ | paste -sd,)
export TIMED RUNS=runs/$NAME START=$(date +%s)
mkdir -p "$RUNS/log" "$OUT"
for archive in ${RESUME:+"$RESUME"/${NAME}_*.tgz}; do
  [[ -f $archive ]] && tar xzf "$archive"
done

left() { echo $((LIMIT - $(date +%s) + START)); }
say() { echo "[$(($(date +%s) - START)) s] $*"; }

flags_of() { # TASK: of the recipe, the data, and a try on a CPU
  echo "--flagfile=experiments/flagfiles/lra_$1.flags --cache=runs/lra_data"
  [[ $1 == text || $1 == image ]] && echo "--data=$DATA/lra"
  [[ -n $TINY ]] && echo "--examples=512 --steps=20 --eval_every=10 --warmup=5" \
    "--batch=4 --d_model=16 --d_ff=16 --layers=1 --heads=2 --seeds=0,1"
  [[ -n $TINY && $1 == listops ]] && echo "--length=64"
  [[ -n $TINY && $1 == text ]] && echo "--length=64"
  return 0
}

times() { # GPU TASK
  local result=$RUNS/times_$2.json
  [[ -f $result || $(left) -lt 30 ]] && return 0
  local tiny=()
  [[ -n $TINY ]] && tiny=(--length=64 --d_model=16 --d_ff=16 --layers=1
    --heads=2 --batch=4 --batches=1,4 --depths=1 --widths=8,16)
  [[ -n $TINY && $2 != listops && $2 != text ]] && tiny+=(--length=1024)
  local recipe=experiments/flagfiles/lra_$2.flags
  # Of the recipe, what time depends on.
  local own; own=$(grep -E '^--(task|length|batch|dropout|dtype|augment)' "$recipe")
  CUDA_VISIBLE_DEVICES=$1 timeout -k 5 "$(left)" "$PY" experiments/time_lra.py \
    $own --depths=1,2 --widths=32,64,128 "${tiny[@]}" --sizes="$RUNS/sizes" \
    --models="$TIMED" \
    --result="$result" >"$RUNS/log/times_$2.log" 2>&1
  say "times of $2: exit $?"
}

train() { # GPU TASK MODEL
  local run=$RUNS/$2_$3 model=()
  [[ -f $run/result.json || $(left) -lt 25 ]] && return 0
  case $3 in
    dense_*) model=(--flagfile="$RUNS/sizes/$2_$3.flags")
      [[ -f $RUNS/sizes/$2_$3.flags ]] || { say "no size of $2 $3"; return 0; } ;;
    fabnet_abfly) model=(--model=fabnet --attention_layers=1) ;;
    rotary) model=(--model=transformer --positions=rotary) ;;
    *) model=(--model="$3") ;;
  esac
  CUDA_VISIBLE_DEVICES=$1 timeout -k 15 "$(left)" "$PY" \
    experiments/train_lra.py $(flags_of "$2") "${model[@]}" $FLAGS \
    --workdir="$run" >>"$RUNS/log/$2_$3.log" 2>&1
  say "$2 $3: exit $?"
}
export -f left say flags_of times train

# Data is generated once: images on the GPU, before times are taken there, and
# expressions on the CPU.
generate() { # GPU TASK
  [[ $2 == listops || $2 == pathfinder32 ]] || return 0
  CUDA_VISIBLE_DEVICES=$1 "$PY" - $(flags_of "$2") \
    >"$RUNS/log/generate_$2.log" 2>&1 <<'PYTHON'
import re, sys
from research.lra import data, options, tasks
lines = [*open(sys.argv[1].partition("=")[2]).read().split("\n"), *sys.argv[2:]]
given = dict(re.findall(r"^--(\w+)=(.*)", "\n".join(lines), re.M))
known = {key: given[key] for key in ("task", "level") if key in given}
known |= {key: int(given[key]) for key in ("length", "examples") if key in given}
asked = options.Options(**known)
data.load(tasks.TASKS[asked.task], data.Options.of(asked, None, given["cache"]))
PYTHON
  say "data of $2: exit $?"
}

lane() { # GPU TASKS...: times alone, then trainings beside each other
  local gpu=$1 made=(); shift
  for task in "$@"; do
    generate "$gpu" "$task" & made+=($!)
    [[ $task == pathfinder32 ]] && wait $!
  done
  for task in "$@"; do times "$gpu" "$task"; done
  wait "${made[@]}"
  for model in $MODELS; do
    for task in "$@"; do echo "$gpu $task $model"; done
  done | xargs -P "$WORKERS" -L 1 bash -c 'train "$@"' _
}

read -ra all <<<"$TASKS"
for ((gpu = 0; gpu < (GPUS > 0 ? GPUS : 1); gpu++)); do
  own=()
  for ((n = gpu; n < ${#all[@]}; n += (GPUS > 0 ? GPUS : 1))); do
    own+=("${all[n]}")
  done
  [[ ${#own[@]} -gt 0 ]] && lane "$gpu" "${own[@]}" &
done
wait

for task in $TASKS; do
  runs=() names=()
  for model in $MODELS; do
    [[ -f $RUNS/${task}_$model/result.json ]] || continue
    runs+=("$RUNS/${task}_$model") names+=("$model")
  done
  [[ ${#runs[@]} -gt 0 ]] || continue
  times=()
  [[ -f $RUNS/times_$task.json ]] && times=(--times="$RUNS/times_$task.json")
  JAX_PLATFORMS=cpu "$PY" experiments/plot_lra.py "${times[@]}" \
    --runs="$(IFS=,; echo "${runs[*]}")" --names="$(IFS=,; echo "${names[*]}")" \
    --title="$task: accuracy over the time of an update" \
    --plot="$RUNS/$task.png" --result="$OUT/${NAME}_$task.json"
  cp "$RUNS/$task.png" "$OUT/${NAME}_$task.png"
  cp "$RUNS/times_$task.json" "$OUT/${NAME}_times_$task.json" 2>/dev/null
done
tar czf "$OUT/${NAME}_finished.tgz" "$RUNS"/times_*.json "$RUNS"/sizes \
  "$RUNS"/*/{result.json,report.md,metrics.jsonl,flags.json} 2>/dev/null
# Checkpoints of what was not finished, each on its own, up to 12 MB.
for run in "$RUNS"/*_*/; do
  [[ -d $run/checkpoints && ! -f $run/result.json ]] || continue
  archive=$OUT/${NAME}_$(basename "$run").tgz
  tar czf "$archive" "$run"
  [[ $(stat -c %s "$archive") -lt 12000000 ]] || rm -f "$archive"
done
for log in "$RUNS"/log/*.log; do
  echo "== $log"; tr '\r' '\n' <"$log" | tail -n 12 | cut -c1-300
done >"$OUT/${NAME}.log"
say "end"; ls -l "$OUT"
