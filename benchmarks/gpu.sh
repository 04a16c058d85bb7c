#!/usr/bin/env bash
# On a machine with one Hopper or Ampere GPU, torch >= 2.11, triton, transformers and peft; needs no network.
#   bash benchmarks/gpu.sh check [WHEELS]    every attention kernel and the head against plain forwards, and their costs
#   bash benchmarks/gpu.sh bench [WHEELS]    dpo_ds against TRL at the 8B shape; the 70B shape's layers
#   bash benchmarks/gpu.sh                   both
# WHEELS: a folder of wheels of what else is needed (deepspeed, trl, datasets, ...), as this makes it:
#   pip download --no-deps -d WHEELS deepspeed==0.19.8 trl==1.16.0 ...      (benchmarks/README.md has the whole line)
# Results go to benchmarks/results/, or to $OUT where that is set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PART="${1:-all}"
WHEELS="${2:-}"
RESULTS="${OUT:-benchmarks/results}"
PYTHON="$(command -v python3 || command -v python)"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if [ -n "$WHEELS" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/dpo_ds_site "$WHEELS"/*.whl
    export PYTHONPATH="$PYTHONPATH:/tmp/dpo_ds_site"
fi
case "$PART" in check | bench | all) ;; *) echo "gpu.sh: $PART is neither check nor bench" >&2; exit 2 ;; esac
if [ "$PART" != bench ]; then
    "$PYTHON" benchmarks/gpu_check.py --output "$RESULTS/gpu_check.json" ${GPU_SMALL:+--small}
fi
if [ "$PART" != check ]; then
    "$PYTHON" benchmarks/gpu_bench.py --output "$RESULTS/gpu_bench.json" ${GPU_SMALL:+--small}
fi
