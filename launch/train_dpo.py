"""The main job as a script, for launchers and habits that want a file: python launch/train_dpo.py --model_name gpt2

The same as `python -m dpo_ds.train`; also under torchrun, accelerate launch and deepspeed.
"""

from dpo_ds.ranks import console
from dpo_ds.train import main

if __name__ == "__main__":
    console.run_main(main)
