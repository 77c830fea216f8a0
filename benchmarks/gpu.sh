#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU: builds the kernels, tests them, measures them, and prints a short table last.
#
#   benchmarks/gpu.sh                  all stages, half an hour at most
#   benchmarks/gpu.sh build test       some of them: build test kernels models table
#   FASTEDIT_GPU_REHEARSAL=1 benchmarks/gpu.sh kernels table      the same lines in small, on a machine without a GPU
#
# OUT                   folder of rows and logs; benchmarks/results if unset, a new folder in a rehearsal
# PYTHON                the interpreter; python3 if unset
# FASTEDIT_GPU_OPS      ops to measure, all if unset; FASTEDIT_GPU_CASES: cases of benchmarks/throughput.py
# FASTEDIT_COMMIT       what is measured, where the tree is a copy without a repository
#
# A stage has a time limit, says in one line how it ended, and lets the next one run. The exit status is 1 where one failed.
set -uo pipefail
exec 3>&1
if [[ -n ${OUT:-} ]]; then
  mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

STAGES=(build test kernels models table)
declare -A LIMITS=([build]=240 [test]=330 [kernels]=570 [models]=560 [table]=30)
MODELS="llava-1.5-7b-lora qwen2.5-vl-7b-lora blip2-opt-2.7b-lora llava-1.5-7b-ft"
SMALL=0.0078125
PYTHON=${PYTHON:-python3}
rehearsal=${FASTEDIT_GPU_REHEARSAL:-}
started=$(date -u +%Y-%m-%dT%H:%M:%S+00:00)
# tables in logs, and what Python has printed when a limit ends it
export COLUMNS=160 PYTHONUNBUFFERED=1

# Run a command for so many seconds at most, and not past the end of its stage.
limited() {
  local most=$1 left=$((deadline - SECONDS))
  shift
  echo "+ $*"
  if ((left < 1)); then
    echo "no time is left in this stage"
    return 124
  fi
  timeout --kill-after=10 "$((left < most ? left : most))" "$@"
}

has() {
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

build() {
  local wanted builds="cuda auto cpu"
  # a rehearsal leaves the library as it is
  [[ -n $rehearsal ]] && builds=python
  for wanted in $builds; do
    if limited 240 env FASTEDIT_BUILD="$wanted" "$PYTHON" setup.py -q build_ext --inplace; then
      break
    fi
    failed+=("$wanted")
    echo "gpu.sh: FASTEDIT_BUILD=$wanted FAILED: LESS IS BUILT, WHAT FOLLOWS MAY TEST AND MEASURE OTHER KERNELS" | tee /dev/fd/3
  done
  limited 60 "$PYTHON" - <<'PY' || failed+=(import)
from fastedit import _native, ops
print(_native.build_info())
for name, served in ops.implementations().items():
    print(f"{name}: {served}")
PY
}

tests() {
  local workers=() chosen=cuda
  has xdist && workers=(-n "${FASTEDIT_GPU_WORKERS:-8}")
  # without a workspace of its own, cuBLAS warns at every product of the deterministic mode that tests run in
  local environment=(env -u TRITON_INTERPRET FASTEDIT_EXPECT=triton:cuda,cuda:csrc CUBLAS_WORKSPACE_CONFIG=:4096:8)
  local kernels=(tests/kernels) backbone=(tests/backbone) ops=(tests/ops)
  if [[ -n $rehearsal ]]; then
    workers=() chosen=interpreted environment=(env TRITON_INTERPRET=1 FASTEDIT_EXPECT=triton:interpreted)
    kernels=(tests/kernels -k nearest_keys) backbone=(tests/backbone/test_states.py) ops=(tests/ops/test_low_rank.py)
  fi
  limited 200 "${environment[@]}" "$PYTHON" -m pytest "${workers[@]}" "${ops[@]}" -k "$chosen and not emulated" || failed+=(ops)
  limited 100 "${environment[@]}" "$PYTHON" -m pytest "${workers[@]}" "${kernels[@]}" || failed+=(kernels)
  limited 200 "${environment[@]}" "$PYTHON" -m pytest "${workers[@]}" "${backbone[@]}" || failed+=(backbone)
}

kernels() {
  local op ops=${FASTEDIT_GPU_OPS:-} where=(--device cuda) much=(--seconds 3)
  local environment=(env -u TRITON_INTERPRET)
  if [[ -z $ops ]]; then
    ops=$(cd benchmarks/kernel_cases && ls -- [a-z]*.py | sed 's/\.py$//')
  fi
  if [[ -n $rehearsal ]]; then
    # compiling the baselines would take a minute
    where=(--device cpu --scale "$SMALL") much=(--seconds 0 --least 1)
    environment=(env TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1)
  fi
  limited 60 "$PYTHON" benchmarks/roofline.py "${where[@]}" --record || failed+=(machine)
  # a process each: what one leaves in a broken state is not the next one's
  for op in $ops; do
    limited 180 "${environment[@]}" "$PYTHON" benchmarks/kernels.py "$op" "${where[@]}" "${much[@]}" --record \
      || failed+=("$op")
  done
}

models() {
  local name small=() cases=${FASTEDIT_GPU_CASES:-$MODELS}
  declare -A tiny=([llava]=llava-tiny [qwen2.5]=qwen2.5vl-tiny [blip2]=blip2-tiny)
  for name in $cases; do
    if [[ -n $rehearsal ]]; then
      small=(--model "random:${tiny[${name%%-*}]}" --device cpu --edits 2 --batch-size 2 --steps 2 --repeats 1 --no-memory)
    fi
    limited 200 "$PYTHON" benchmarks/throughput.py --case "$name" "${small[@]}" --record || failed+=("$name")
  done
  name=${cases%% *}
  if [[ -z $rehearsal ]] && has bitsandbytes; then
    limited 200 "$PYTHON" benchmarks/throughput.py --case "$name" --quantize nf4 --record || failed+=("$name nf4")
  fi
}

table() {
  local since=()
  ((${#chosen[@]} > 1)) && since=(--since "$started")
  limited 30 "$PYTHON" benchmarks/summary.py "${since[@]}" || failed+=(rows)
}

# Run a stage into its log; one line of outcome, the log's end where it failed. The table is printed too.
run() {
  local name=$1 log="$OUT/gpu-$1.log" began=$SECONDS work=$1 outcome=ok
  failed=() deadline=$((SECONDS + LIMITS[$name]))
  [[ $name == test ]] && work=tests
  "$work" >"$log" 2>&1
  [[ $name == table ]] && grep -v '^+ ' "$log"
  ((${#failed[@]})) && outcome="FAILED (${failed[*]})"
  echo "gpu.sh: $name: $outcome, $((SECONDS - began)) s, $log"
  if ((${#failed[@]})); then
    status=1
    tail -n 12 "$log" | sed 's/^/    /'
  fi
}

chosen=("$@")
((${#chosen[@]})) || chosen=("${STAGES[@]}")
for stage in "${chosen[@]}"; do
  if [[ -z ${LIMITS[$stage]:-} ]]; then
    echo "gpu.sh: stages are ${STAGES[*]} (got $stage)" >&2
    exit 2
  fi
done
if [[ -n $rehearsal ]]; then
  OUT=${OUT:-$(mktemp -d)}
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu.sh: torch sees no CUDA device; FASTEDIT_GPU_REHEARSAL=1 goes through the same lines on a CPU" >&2
  exit 2
fi
OUT=${OUT:-$PWD/benchmarks/results}
mkdir -p "$OUT" || exit 1
export FASTEDIT_RESULTS=$OUT
status=0
for stage in "${chosen[@]}"; do
  run "$stage"
done
exit "$status"
