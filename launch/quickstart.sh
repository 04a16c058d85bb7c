#!/usr/bin/env bash
# From nothing to an aligned model, without GPU or network beyond pip: sets up .venv, trains the embedded tiny GPT-2 on
# the embedded preference pairs with DPO on DeepSpeed, exports it, and shows what it writes before and after.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

OUT=runs/quickstart-$(date +%Y%m%d-%H%M%S)
deepspeed --num_gpus 1 -m dpo_ds.train --model tiny-gpt2 --dataset sample --output_dir "$OUT" "$@"
echo "dpo_ds: the run is in $OUT: metrics.jsonl, generations.md, and the model itself in merged/"
