"""dpo_ds: direct preference optimisation of language models on DeepSpeed.

Run `deepspeed --num_gpus 8 -m dpo_ds.train --model gpt2`.
"""

__version__ = "0.1.0"
