#!/usr/bin/env bash
# All benchmarks of one visit to a GPU machine, the most useful first. Each part is a process with a time limit. Each
# figure is printed and kept in $OUT (/tmp/gpu_run) as soon as it is measured.
#   bash benchmarks/gpu_run.sh first|second [WHEELS]       SMALL=1: tiny shapes, for a CPU
#   first    head and kernels against plain forwards; a layer's speed; dpo_ds.train at every stage
#   second   the 8B shape with LoRA against TRL; the 70B shape's layers
# WHEELS: a folder with wheels of the packages that the machine does not have (benchmarks/README.md says how to make it).
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in first | second) ;; *) echo "gpu_run.sh: say first or second" >&2; exit 2 ;; esac
PYTHON="$(command -v python3 || command -v python)"
# Temporary files are kept in memory if it has room for a model of 16 GB.
TMPDIR=/tmp
[ "$(df --output=avail -BG /dev/shm | tail -n 1 | tr -dc 0-9)" -ge 24 ] && TMPDIR=/dev/shm
export TMPDIR OUT="${OUT:-/tmp/gpu_run}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$OUT"
if [ -n "${2:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/dpo_ds_site "$2"/*.whl
    export PYTHONPATH="$PYTHONPATH:/tmp/dpo_ds_site"
fi
small=${SMALL:+--small}
failed=0
part() { # SECONDS NAME WORDS…: runs one benchmark script, which writes its figures to $OUT/NAME.json
    local most=$1 name=$2 code=0
    shift 2
    echo "== at $SECONDS s: $name $*"
    timeout "$most" "$PYTHON" "benchmarks/$name.py" $small --output "$OUT/$name.json" "$@" 2>&1 || code=$?
    echo "== at $SECONDS s: $name: exit code $code"
    [ "$code" = 0 ] || failed=1
}

if [ "$1" = first ]; then
    command -v nvidia-smi >/dev/null && nvidia-smi
    # DeepSpeed's CPUAdam is compiled during the first checks, on other cores.
    "$PYTHON" -c 'from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()' >/tmp/ops.log 2>&1 &
    part 150 gpu_check ${MODELS:+--models $MODELS}
    part 150 gpu_layers
    wait
    tail -n 3 /tmp/ops.log
    part 300 gpu_train --seconds "${SECONDS_A_RUN:-60}"
else
    export BENCH_PAIRS="${BENCH_PAIRS:-32}"
    part 290 gpu_bench --parts ${PARTS:-trl layers} --sets ${SETS:-ultrafeedback hh long} --minutes "${MINUTES:-4.6}"
fi
exit $failed
