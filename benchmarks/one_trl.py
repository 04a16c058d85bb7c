"""One run of TRL's DPOTrainer for vs_trl.py. Prints its measurements as JSON.

    python benchmarks/one_trl.py MODEL PAIRS.jsonl MAX_LENGTH OUTPUT_DIR live|precomputed recompute|keep [bf16=True] \
        [lora=True]          PAIRS are taken in the file's order
"""

import json
import os
import sys
import time

import work


def main(
    model: str, pairs: str, max_length: str, output_dir: str, reference: str, activations: str, *more: str
) -> dict:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    bf16, lora = "bf16=True" in more, "lora=True" in more
    adapters = {}
    if lora:
        from peft import LoraConfig

        adapters = {"peft_config": LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    seconds, losses, cold = [], [], []

    class Watch(TrainerCallback):
        """Times each step from the end of the one before, so that loading a batch counts, as it does in dpo_ds."""

        def on_train_begin(self, *_, **__):
            self.last = time.perf_counter()

        def on_step_end(self, *_, **__):
            now = time.perf_counter()
            seconds.append(now - self.last)
            cold.append(work.process_age())
            self.last = now

        def on_log(self, args, state, control, logs, **__):
            if "loss" in logs:
                losses.append(float(logs["loss"]))
            self.last = time.perf_counter() if not seconds else self.last

    class Timed(DPOTrainer):
        precomputing = 0.0

        def _precompute_ref_logps(self, *args, **kwargs):
            began = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*args, **kwargs)
            finally:
                self.precomputing = time.perf_counter() - began

    config = DPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=min(8, work.BATCH),
        gradient_accumulation_steps=max(1, work.BATCH // 8),
        num_train_epochs=1,
        learning_rate=work.LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=work.BETA,
        max_length=int(max_length),
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=activations == "recompute",
        precompute_ref_log_probs=reference == "precomputed",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=work.SEED,
    )
    words = AutoTokenizer.from_pretrained(model)
    words.pad_token = words.eos_token
    data = load_dataset("json", data_files=pairs, split="train", cache_dir=f"{output_dir}/cache")
    trainer = Timed(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if bf16 else torch.float32),
        args=config,
        train_dataset=data,
        processing_class=words,
        callbacks=[Watch()],
        **adapters,
    )
    trainer.train()
    return {
        "pairs": len(data),
        "step_seconds": seconds,
        "losses": losses,
        "reference_seconds": trainer.precomputing,
        "cold_start": cold[0],
        "peak_memory": work.peak_memory(),
        "gpu_memory": work.gpu_memory(),
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(*sys.argv[1:])))
